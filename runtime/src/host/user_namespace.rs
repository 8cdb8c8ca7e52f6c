//! User namespaces, as id-mapped mounts are told by them which IDs stand for which.

use std::fs::{self, File};
use std::io::{self, PipeReader, PipeWriter};
use std::os::fd::{AsRawFd as _, BorrowedFd, OwnedFd};

use nix::libc;
use oci_spec::runtime::LinuxIdMapping;
use serde::{Deserialize, Serialize};

/// IDs within a user namespace, or on a file system, and those outside that they stand for.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct IdMappings {
    /// Of users.
    pub uids: Vec<LinuxIdMapping>,
    /// Of groups.
    pub gids: Vec<LinuxIdMapping>,
}

impl IdMappings {
    /// What root is outside; nothing where it is nobody.
    pub fn root(&self) -> Option<(u32, u32)> {
        let root = |mappings: &[LinuxIdMapping]| {
            let of_root = mappings.iter().find(|mapping| mapping.container_id() == 0 && mapping.size() > 0);
            of_root.map(LinuxIdMapping::host_id)
        };
        Some((root(&self.uids)?, root(&self.gids)?))
    }
}

/// Makes a user namespace in which nobody is.
///
/// # Errors
/// What the kernel refuses: mappings that overlap, or that are too many.
pub(crate) fn make(mappings: &IdMappings) -> io::Result<OwnedFd> {
    let (stay, leave) = io::pipe()?;
    let process = first_process(&stay, &leave)?;
    let set = |file: &str, mappings: &[LinuxIdMapping]| {
        let line =
            |mapping: &LinuxIdMapping| format!("{} {} {}\n", mapping.container_id(), mapping.host_id(), mapping.size());
        fs::write(format!("/proc/{process}/{file}"), mappings.iter().map(line).collect::<String>())
    };
    let made = set("uid_map", &mappings.uids)
        .and_then(|()| set("gid_map", &mappings.gids))
        .and_then(|()| File::open(format!("/proc/{process}/ns/user")));
    drop(leave);
    // SAFETY: it takes a number, and no place for a status.
    unsafe { libc::waitpid(process, std::ptr::null_mut(), 0) };
    made.map(OwnedFd::from)
}

/// A namespace needs a process to come to be: one that does nothing, and ends once `leave` is closed.
fn first_process(stay: &PipeReader, leave: &PipeWriter) -> io::Result<libc::pid_t> {
    // SAFETY: nothing in it has to be anything but zero.
    let mut arguments: libc::clone_args = unsafe { std::mem::zeroed() };
    arguments.flags = u64::from(libc::CLONE_NEWUSER.cast_unsigned());
    arguments.exit_signal = u64::from(libc::SIGCHLD.cast_unsigned());
    // SAFETY: without memory in common this is fork(2); of the copy see below.
    match unsafe { libc::syscall(libc::SYS_clone3, &raw const arguments, size_of::<libc::clone_args>()) } {
        0 => wait_in_a_copy(stay.as_raw_fd(), leave.as_raw_fd()),
        forked => libc::pid_t::try_from(forked).ok().filter(|&pid| pid > 0).ok_or_else(io::Error::last_os_error),
    }
}

/// What this process's other threads have locked stays so in a copy of it: it may only make system calls.
fn wait_in_a_copy(stay: libc::c_int, leave: libc::c_int) -> ! {
    // SAFETY: the copy never returns to where it would be used or closed again.
    unsafe { libc::close(leave) };
    // SAFETY: the copy never returns to where it would be closed.
    let stay = unsafe { BorrowedFd::borrow_raw(stay) };
    let _ = rustix::io::read(stay, &mut [0; 1]);
    // SAFETY: it does not return, and runs nothing of the process that this one is a copy of.
    unsafe { libc::_exit(0) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mappings(text: &str) -> IdMappings {
        serde_json::from_str(text).unwrap()
    }

    #[test]
    fn root_is_found() {
        let ids = r#"[{"containerID":5,"hostID":9,"size":1},{"containerID":0,"hostID":1000,"size":5}]"#;
        assert_eq!(mappings(&format!(r#"{{"uids":{ids},"gids":{ids}}}"#)).root(), Some((1000, 1000)));
        assert_eq!(mappings(&format!(r#"{{"uids":{ids},"gids":[]}}"#)).root(), None);
    }

    #[test]
    fn a_namespace_is_made_or_refused() {
        let one = r#"{"containerID":0,"hostID":1000,"size":5}"#;
        make(&mappings(&format!(r#"{{"uids":[{one}],"gids":[{one}]}}"#))).unwrap();
        let error = make(&mappings(&format!(r#"{{"uids":[{one},{one}],"gids":[{one}]}}"#))).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::EINVAL));
    }
}
