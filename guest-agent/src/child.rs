//! Copies of PID 1 that do what may block, or what changes a process for good.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd as _, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::process::Pid;

use crate::log;

static IS_CHILD: AtomicBool = AtomicBool::new(false);

/// Whether this process is a copy of PID 1: its end is not the guest's.
pub(crate) fn is_child() -> bool {
    IS_CHILD.load(Ordering::Relaxed)
}

/// Runs `work` in a copy of this process, which then exits with what it returns. The copy has no files open but its
/// stdio and those in `keep`: what goes on into a container must not carry anything of the agent's there. Its log
/// goes into `log`, which is among the kept.
pub(crate) fn fork(log: OwnedFd, keep: &[BorrowedFd<'_>], work: impl FnOnce() -> i32) -> io::Result<Pid> {
    split(|| {
        let kept = keep.iter().map(BorrowedFd::as_raw_fd).chain([log.as_raw_fd()]);
        leave_files(kept.collect());
        forget_signals();
        log::redirect(File::from(log));
        work()
    })
}

/// Runs `work` in a copy of this process that keeps everything; otherwise as [`fork`].
pub(crate) fn split(work: impl FnOnce() -> i32) -> io::Result<Pid> {
    // SAFETY: the agent has one thread, so the copy has everything that it may need.
    let forked = unsafe { libc::fork() };
    match forked {
        0 => {
            IS_CHILD.store(true, Ordering::Relaxed);
            exit(work())
        }
        pid => Pid::from_raw(pid).filter(|_| pid > 0).ok_or_else(io::Error::last_os_error),
    }
}

/// Ends this process and nothing else.
pub(crate) fn exit(code: i32) -> ! {
    // SAFETY: it does not return, and runs nothing of the process that this one is a copy of.
    unsafe { libc::_exit(code) }
}

/// Closes every file but stdio and the given.
fn leave_files(mut kept: Vec<i32>) {
    kept.sort_unstable();
    kept.dedup();
    let mut first = 3;
    for file in kept.into_iter().filter(|&file| file > 2) {
        if first < file {
            close_range(first, file - 1);
        }
        first = file + 1;
    }
    close_range(first, i32::MAX);
}

fn close_range(first: i32, last: i32) {
    // SAFETY: the owners of these files are parts of the agent that never run in this copy.
    unsafe { libc::syscall(libc::SYS_close_range, first, last, 0) };
}

/// The agent's handler writes into a file that is closed by now.
fn forget_signals() {
    // SAFETY: the default action is no code of this process.
    unsafe { libc::signal(libc::SIGCHLD, libc::SIG_DFL) };
}
