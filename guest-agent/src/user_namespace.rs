//! The user namespace of the guest's containers.
//!
//! There is one in a guest, or none. It is made before the network is set up: what a container's root may do to
//! interfaces, ports and raw sockets is decided by the user namespace in which the network's was made. The agent itself
//! stays outside, with all power over it.

use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use runvm_protocol::agent::IdMapping;
use rustix::fs::{Gid, Uid};
use rustix::pipe::PipeFlags;
use rustix::process::Pid;

use crate::child;
use crate::network::{self, NetworkError};

/// Why there is no user namespace.
#[derive(Debug, thiserror::Error)]
pub(crate) enum UserNamespaceError {
    #[error("cannot make a user namespace: {0}")]
    Make(#[source] io::Error),
    #[error("cannot set {file} of the user namespace: {source}")]
    Map { file: &'static str, source: io::Error },
    #[error(transparent)]
    Network(#[from] NetworkError),
}

/// A user namespace, and what its IDs are outside.
pub(crate) struct UserNamespace {
    file: OwnedFd,
    uids: Vec<IdMapping>,
    gids: Vec<IdMapping>,
}

impl UserNamespace {
    /// Makes it, with a network namespace that is its own, which the agent and the guest's devices go into.
    pub(crate) async fn make(uids: &[IdMapping], gids: &[IdMapping]) -> Result<Self, UserNamespaceError> {
        let (stay, leave) =
            rustix::pipe::pipe_with(PipeFlags::CLOEXEC).map_err(|errno| UserNamespaceError::Make(errno.into()))?;
        // It keeps the namespaces until they are held here.
        let first = child::split_into(libc::CLONE_NEWUSER | libc::CLONE_NEWNET, || {
            child::let_go(&leave);
            i32::from(rustix::io::read(&stay, &mut [0; 1]).is_err())
        });
        let first = first.map_err(UserNamespaceError::Make)?;
        map(first, "gid_map", gids)?;
        map(first, "uid_map", uids)?;
        let open = |kind| File::open(format!("/proc/{first}/ns/{kind}")).map_err(UserNamespaceError::Make);
        let (file, network) = (open("user")?, open("net")?);
        drop(leave);
        network::move_into(network.as_fd()).await?;
        Ok(Self { file: file.into(), uids: uids.to_vec(), gids: gids.to_vec() })
    }

    /// Whether it has these mappings.
    pub(crate) fn maps(&self, uids: &[IdMapping], gids: &[IdMapping]) -> bool {
        self.uids == uids && self.gids == gids
    }

    /// What users and groups of it are outside; nothing for one that it does not have.
    pub(crate) fn outside(&self, uid: u32, gid: u32) -> Option<(u32, u32)> {
        Some((outside(&self.uids, uid)?, outside(&self.gids, gid)?))
    }
}

impl AsFd for UserNamespace {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

/// Has the calling process, which has entered a user namespace, be root there.
pub(crate) fn become_root() -> rustix::io::Result<()> {
    rustix::thread::set_thread_groups(&[])?;
    rustix::thread::set_thread_res_gid(Gid::ROOT, Gid::ROOT, Gid::ROOT)?;
    rustix::thread::set_thread_res_uid(Uid::ROOT, Uid::ROOT, Uid::ROOT)
}

fn map(process: Pid, file: &'static str, mappings: &[IdMapping]) -> Result<(), UserNamespaceError> {
    let line = |mapping: &IdMapping| format!("{} {} {}\n", mapping.container_id, mapping.host_id, mapping.size);
    let table: String = mappings.iter().map(line).collect();
    fs::write(format!("/proc/{process}/{file}"), table).map_err(|source| UserNamespaceError::Map { file, source })
}

fn outside(mappings: &[IdMapping], id: u32) -> Option<u32> {
    mappings.iter().find_map(|mapping| {
        let offset = id.checked_sub(mapping.container_id).filter(|&offset| offset < mapping.size)?;
        mapping.host_id.checked_add(offset)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mapping(container_id: u32, host_id: u32, size: u32) -> IdMapping {
        IdMapping { container_id, host_id, size, ..Default::default() }
    }

    #[test]
    fn ids_have_their_numbers_outside() {
        let mappings = [mapping(0, 1000, 1), mapping(10, 5000, 3), mapping(20, u32::MAX, 2)];
        for (inside, expected) in
            [(0, Some(1000)), (1, None), (9, None), (10, Some(5000)), (12, Some(5002)), (13, None), (21, None)]
        {
            assert_eq!(outside(&mappings, inside), expected, "{inside}");
        }
    }
}
