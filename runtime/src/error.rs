//! The errors that end a command, and the one place where their sentences meet what engines match on.
//!
//! Engines know runc's texts: containerd takes "does not exist" for a container that is gone, and "container not
//! running", "process already finished" or "no such process" for a signal that came too late.

use std::io;
use std::path::PathBuf;

use thiserror::Error;

use crate::agent::AgentError;
use crate::agent::preserved::PreservedError;
use crate::bundle::BundleError;
use crate::host::cgroup::CgroupError;
use crate::host::hooks::HookError;
use crate::sandbox::SandboxError;
use crate::state::{StateError, Status};
use crate::template::TemplateError;
use crate::vmm::ConfigurationError;
use crate::vmm::probe::NoKvm;

/// Why a command failed.
#[derive(Debug, Error)]
pub enum Error {
    /// About the bundle.
    #[error(transparent)]
    Bundle(#[from] BundleError),
    /// About the records.
    #[error(transparent)]
    State(#[from] StateError),
    /// About the VM.
    #[error(transparent)]
    Sandbox(#[from] SandboxError),
    /// About templates.
    #[error(transparent)]
    Template(#[from] TemplateError),
    /// About the guest.
    #[error(transparent)]
    Agent(#[from] AgentError),
    /// About descriptors to be handed over.
    #[error(transparent)]
    Preserved(#[from] PreservedError),
    /// About the host's cgroups.
    #[error(transparent)]
    Cgroup(#[from] CgroupError),
    /// About a hook.
    #[error(transparent)]
    Hook(#[from] HookError),
    /// About the configuration.
    #[error(transparent)]
    Configuration(#[from] ConfigurationError),
    /// KVM was demanded and is not there.
    #[error(transparent)]
    NoKvm(#[from] NoKvm),
    /// What takes a container with processes that go on, for one that has none, or none that do.
    #[error("container not running")]
    NotRunning,
    /// A signal for a process that has ended.
    #[error("process already finished")]
    Finished,
    /// `start` of a container that is past it.
    #[error("cannot start a container that is {}", .0.name())]
    CannotStart(Status),
    /// `delete` of a container that is not stopped.
    #[error("cannot delete container {id} that is not stopped: {}: stop it, or use --force", status.name())]
    CannotDelete {
        /// The container.
        id: String,
        /// What it is instead.
        status: Status,
    },
    /// `create` of a pod's second container.
    #[error(
        "the pod {pod} has the container {other} already: containers in VMs of their own cannot share a pod's \
         namespaces, give each a pod"
    )]
    PodTaken {
        /// The pod.
        pod: String,
        /// Who is in it.
        other: String,
    },
    /// `resume` of a container that is not paused.
    #[error("container not paused")]
    NotPaused,
    /// `update` to more memory than there is.
    #[error(
        "cannot set the memory limit to {limit} bytes: the container's VM has {} MiB, and gets no more while it runs: \
         give the limit when the container is created",
        memory >> 20
    )]
    TooLarge {
        /// In bytes.
        limit: i64,
        /// The VM's, in bytes.
        memory: u64,
    },
    /// A container for more memory than its pod's VM has.
    #[error(
        "the container may use {limit} bytes of memory, and its pod's VM has {} MiB and gets no more: state the limits of \
         all containers in the pod, which the VM is sized by",
        memory >> 20
    )]
    PodTooSmall {
        /// In bytes.
        limit: i64,
        /// The VM's, in bytes.
        memory: u64,
    },
    /// The monitor, a process of its own, failed; its sentence.
    #[error("{0}")]
    Monitor(String),
    /// The monitor ended without a word.
    #[error("the monitor of the container ended unexpectedly{0}")]
    MonitorDied(String),
    /// An argument of the command line.
    #[error("{0}")]
    Usage(String),
    /// A file of the host.
    #[error("cannot {action} {path}", path = path.display())]
    File {
        /// What was tried.
        action: &'static str,
        /// The file.
        path: PathBuf,
        /// Why it failed.
        source: io::Error,
    },
    /// Anything else that the operating system refuses.
    #[error("cannot {action}")]
    System {
        /// What was tried.
        action: &'static str,
        /// Why it failed.
        source: io::Error,
    },
}

impl Error {
    /// For `map_err`: names what was tried.
    pub fn system<E: Into<io::Error>>(action: &'static str) -> impl FnOnce(E) -> Self {
        move |source| Self::System { action, source: source.into() }
    }

    /// For `map_err`: names the file and what was tried.
    pub fn file(action: &'static str, path: impl Into<PathBuf>) -> impl FnOnce(io::Error) -> Self {
        let path = path.into();
        move |source| Self::File { action, path, source }
    }
}

/// An error and what it comes from, as one sentence.
pub fn sentence(error: &dyn std::error::Error) -> String {
    let mut sentence = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        sentence.push_str(": ");
        sentence.push_str(&error.to_string());
        source = error.source();
    }
    sentence
}

/// The result of a command.
pub type Result<T> = std::result::Result<T, Error>;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn engines_find_the_texts_they_match_on() {
        for (error, text) in [
            (Error::NotRunning, "container not running"),
            (Error::Finished, "process already finished"),
            (StateError::NotFound("a".into()).into(), "does not exist"),
            (StateError::Exists("a".into()).into(), "already exists"),
        ] {
            assert!(error.to_string().contains(text), "{error}");
        }
    }
}
