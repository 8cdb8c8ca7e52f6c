//! What a container shares with others of the guest: the containers of a pod have some namespaces in common.

use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::sync::Arc;

use rustix::io::Result;
use rustix::thread::{ThreadNameSpaceType, move_into_thread_name_spaces};

use crate::user_namespace::UserNamespace;

/// The namespaces that a container does not have to itself.
pub(super) struct Company {
    namespaces: ThreadNameSpaceType,
    /// The process that is in them; none where they are the guest's own.
    sandbox: Option<OwnedFd>,
    /// The guest's one, of which all containers are that have any.
    user_namespace: Option<Arc<UserNamespace>>,
}

impl Company {
    /// The namespaces of a process (a pidfd), or the guest's own.
    pub(super) fn new(
        namespaces: ThreadNameSpaceType,
        sandbox: Option<OwnedFd>,
        user_namespace: Option<Arc<UserNamespace>>,
    ) -> Self {
        Self { namespaces, sandbox, user_namespace }
    }

    /// The user namespace, if the container has one.
    pub(super) fn user_namespace(&self) -> Option<&Arc<UserNamespace>> {
        self.user_namespace.as_ref()
    }

    /// Which they are.
    pub(super) fn namespaces(&self) -> ThreadNameSpaceType {
        self.namespaces
    }

    /// Whether the container's processes are among those of others.
    pub(super) fn has_pid_namespace(&self) -> bool {
        self.namespaces.contains(ThreadNameSpaceType::PROCESS_ID)
    }

    /// The PID namespace to be born in, as only children come into one.
    pub(super) fn pid_namespace(&self) -> Option<BorrowedFd<'_>> {
        self.descriptor().filter(|_| self.has_pid_namespace())
    }

    /// What has to be open to join.
    pub(super) fn descriptor(&self) -> Option<BorrowedFd<'_>> {
        self.sandbox.as_ref().map(|sandbox| sandbox.as_fd())
    }

    /// Joins those that a process is not born in.
    pub(super) fn join(&self) -> Result<()> {
        let namespaces = self.namespaces.difference(ThreadNameSpaceType::PROCESS_ID);
        match self.descriptor() {
            Some(sandbox) if !namespaces.is_empty() => move_into_thread_name_spaces(sandbox, namespaces),
            _ => Ok(()),
        }
    }
}
