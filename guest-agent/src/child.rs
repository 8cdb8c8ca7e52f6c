//! Copies of PID 1 that do what may block, or what changes a process for good.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd as _, AsRawFd as _, BorrowedFd, OwnedFd};
use std::ptr;
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::process::{Pid, PidfdFlags, pidfd_open};
use rustix::thread::{ThreadNameSpaceType, move_into_thread_name_spaces};

use crate::{log, memory};

/// In the words of clone(2); libc's own is too small for it.
const CLONE_INTO_CGROUP: u64 = 0x2_0000_0000;

static IS_CHILD: AtomicBool = AtomicBool::new(false);

/// Whether this process is a copy of PID 1: its end is not the guest's.
pub(crate) fn is_child() -> bool {
    IS_CHILD.load(Ordering::Relaxed)
}

/// Where a copy is born, if not where this process is: new namespaces, as flags of clone(2), the PID namespace of another
/// process, and a cgroup.
pub(crate) struct Birthplace<'a> {
    pub(crate) namespaces: libc::c_int,
    pub(crate) pid_namespace: Option<BorrowedFd<'a>>,
    pub(crate) cgroup: BorrowedFd<'a>,
}

/// Runs `work` in a copy of this process, which then exits with what it returns. The copy has no files open but its
/// stdio and those in `keep`: what goes on into a container must not carry anything of the agent's there. Its log
/// goes into `log`, which is among the kept.
pub(crate) fn fork(log: OwnedFd, keep: &[BorrowedFd<'_>], work: impl FnOnce() -> i32) -> io::Result<Pid> {
    split(|| apart(log, keep, work))
}

/// Runs `work` as [`fork`] does, in a copy that is born elsewhere.
pub(crate) fn fork_into(
    place: &Birthplace<'_>,
    log: OwnedFd,
    keep: &[BorrowedFd<'_>],
    work: impl FnOnce() -> i32,
) -> io::Result<Pid> {
    let mut arguments = arguments(place.namespaces);
    arguments.flags |= CLONE_INTO_CGROUP;
    arguments.cgroup = u64::from(place.cgroup.as_raw_fd().cast_unsigned());
    let fork = || clone3(&arguments, || apart(log, keep, work));
    match place.pid_namespace {
        Some(other) => bear_into(other, fork),
        None => fork(),
    }
}

/// Runs `work` in a copy of this process that keeps everything and is born in new namespaces.
pub(crate) fn split_into(namespaces: libc::c_int, work: impl FnOnce() -> i32) -> io::Result<Pid> {
    clone3(&arguments(namespaces), work)
}

/// As [`split_into`], for a copy of PID 1: its copy is a child of PID 1 too.
pub(crate) fn split_beside(namespaces: libc::c_int, work: impl FnOnce() -> i32) -> io::Result<Pid> {
    let mut arguments = arguments(namespaces | libc::CLONE_PARENT);
    // It is that of the calling process.
    arguments.exit_signal = 0;
    clone3(&arguments, work)
}

fn arguments(flags: libc::c_int) -> libc::clone_args {
    // SAFETY: nothing in it has to be anything but zero.
    let mut arguments: libc::clone_args = unsafe { std::mem::zeroed() };
    arguments.flags = u64::from(flags.cast_unsigned());
    arguments.exit_signal = u64::from(libc::SIGCHLD.cast_unsigned());
    arguments
}

fn clone3(arguments: &libc::clone_args, work: impl FnOnce() -> i32) -> io::Result<Pid> {
    // SAFETY: without memory in common this is fork(2), and the agent has one thread. What the C library knows of
    // the process that may not be so any more, its number, it only uses to abort.
    let forked = unsafe { libc::syscall(libc::SYS_clone3, arguments, size_of::<libc::clone_args>()) };
    continue_as(forked, work)
}

/// Has a copy be born into the PID namespace of another process (a pidfd), and later ones into this process's own again.
fn bear_into(other: BorrowedFd<'_>, fork: impl FnOnce() -> io::Result<Pid>) -> io::Result<Pid> {
    let own = pidfd_open(rustix::process::getpid(), PidfdFlags::empty())?;
    move_into_thread_name_spaces(other, ThreadNameSpaceType::PROCESS_ID)?;
    // The copy does not come back from it.
    let forked = fork();
    move_into_thread_name_spaces(own.as_fd(), ThreadNameSpaceType::PROCESS_ID)?;
    forked
}

fn apart(log: OwnedFd, keep: &[BorrowedFd<'_>], work: impl FnOnce() -> i32) -> i32 {
    let kept = keep.iter().map(BorrowedFd::as_raw_fd).chain([log.as_raw_fd()]);
    leave_files(kept.collect());
    forget_signals();
    log::redirect(File::from(log));
    work()
}

/// Runs `work` in a copy of this process that keeps everything; otherwise as [`fork`].
pub(crate) fn split(work: impl FnOnce() -> i32) -> io::Result<Pid> {
    // SAFETY: the agent has one thread, so the copy has everything that it may need.
    let forked = unsafe { libc::fork() };
    continue_as(forked.into(), work)
}

/// What a process beside this one has as its stack, in units of 16 bytes: for a few calls, and no more.
const SMALL_STACK: usize = (16 << 10) / 16;

/// Runs `work` in a process of its own that has the memory of this one and a copy of its files, which exits with what it
/// returns: nothing is copied for it. Stack and argument stay when it has ended.
///
/// `work` must only make system calls, not by the C library: all else may be in the middle of something in this process.
pub(crate) fn beside<T: Sync + 'static>(argument: T, work: fn(&T) -> i32) -> io::Result<Pid> {
    extern "C" fn begin<T>(task: *mut libc::c_void) -> libc::c_int {
        // SAFETY: it is the task of this very type that is leaked below.
        let (argument, work) = unsafe { &*task.cast::<(T, fn(&T) -> i32)>() };
        work(argument)
    }
    let stack: &mut [u128] = Box::leak(vec![0; SMALL_STACK].into_boxed_slice());
    let task: &(T, fn(&T) -> i32) = Box::leak(Box::new((argument, work)));
    let top = stack.as_mut_ptr_range().end;
    let flags = libc::CLONE_VM | libc::SIGCHLD;
    // SAFETY: the stack is aligned, and nobody else's; the task is there for ever, may be looked at by several, and leaves
    // alone what this process may be changing.
    let pid = unsafe { libc::clone(begin::<T>, top.cast(), flags, ptr::from_ref(task).cast_mut().cast()) };
    Pid::from_raw(pid).filter(|_| pid > 0).ok_or_else(io::Error::last_os_error)
}

fn continue_as(forked: libc::c_long, work: impl FnOnce() -> i32) -> io::Result<Pid> {
    match i32::try_from(forked) {
        Ok(0) => {
            IS_CHILD.store(true, Ordering::Relaxed);
            memory::settle_copy();
            exit(work())
        }
        Ok(pid) => Pid::from_raw(pid).filter(|_| pid > 0).ok_or_else(io::Error::last_os_error),
        Err(error) => Err(io::Error::other(error)),
    }
}

/// Ends this process and nothing else.
pub(crate) fn exit(code: i32) -> ! {
    // SAFETY: it does not return, and runs nothing of the process that this one is a copy of.
    unsafe { libc::_exit(code) }
}

/// Closes a descriptor in a copy of PID 1, to which it is lent: whoever waits for its end is to see it.
pub(crate) fn let_go(descriptor: &OwnedFd) {
    // SAFETY: nothing in this copy uses it any more, and the copy never returns to where it would be closed again.
    unsafe { libc::close(descriptor.as_raw_fd()) };
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
