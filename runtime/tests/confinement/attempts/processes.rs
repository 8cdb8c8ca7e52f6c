//! Other processes: new ones, and those of the host.

use std::ffi::{CStr, CString};
use std::fs::{self, File};
use std::io;
use std::os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd};
use std::os::unix::fs::FileExt as _;
use std::process::Command;
use std::thread;

use nix::libc;

use super::{Attempt, attempt, in_vain, sometimes};
use crate::ground::{Map, SECRET};
use crate::system::{argument, c_path, call};

/// A signal that does nothing to who has no use for it.
const SIGNAL: libc::c_int = libc::SIGURG;

pub const ATTEMPTS: &[Attempt] = &[
    attempt("start a process", |_| match call(libc::SYS_clone, [libc::SIGCHLD as usize, 0, 0, 0, 0])? {
        0 => std::process::exit(0),
        _ => Ok(()),
    }),
    attempt("start a thread", |_| thread::Builder::new().spawn(|| {}).map(drop)),
    attempt("run a command", |_| Command::new("/bin/true").status().map(drop)),
    attempt("become another program", |_| execute(libc::AT_FDCWD, c"/bin/true")),
    attempt("become a program of an export", |map| execute(libc::AT_FDCWD, &program(map)?)),
    attempt("become a program in memory", |map| {
        let memory = memory_file()?;
        fs::write(format!("/proc/self/fd/{}", memory.as_raw_fd()), fs::read(map.writable.join("program"))?)?;
        execute(memory.as_raw_fd(), c"")
    }),
    attempt("signal a process", |map| call(libc::SYS_kill, [pid(map), argument(SIGNAL)]).map(drop)),
    attempt("signal a thread", |map| call(libc::SYS_tgkill, [pid(map), pid(map), argument(SIGNAL)]).map(drop)),
    attempt("signal a process by a descriptor", |map| {
        call(libc::SYS_pidfd_send_signal, [pidfd(map)?, argument(SIGNAL), 0, 0]).map(drop)
    }),
    attempt("have a process signalled by a descriptor's events", |map| {
        call(libc::SYS_fcntl, [0, argument(libc::F_SETOWN), pid(map)]).map(drop)
    }),
    attempt("trace a process", |map| call(libc::SYS_ptrace, [libc::PTRACE_SEIZE as usize, pid(map), 0, 0]).map(drop)),
    attempt("be traced", |_| call(libc::SYS_ptrace, [libc::PTRACE_TRACEME as usize, 0, 0, 0]).map(drop)),
    attempt("read another's memory", |map| {
        let mut word = 0u64;
        transfer(libc::SYS_process_vm_readv, map, &raw mut word)?;
        if word == SECRET { Ok(()) } else { Err(in_vain()) }
    }),
    attempt("write another's memory", |map| {
        let mut word = SECRET;
        transfer(libc::SYS_process_vm_writev, map, &raw mut word)
    }),
    attempt("read another's memory by /proc", |map| {
        let mut word = [0; size_of::<u64>()];
        File::open(format!("/proc/{}/mem", map.owner))?.read_exact_at(&mut word, map.secret as u64)?;
        if word == SECRET.to_ne_bytes() { Ok(()) } else { Err(in_vain()) }
    }),
    attempt("read another's environment", |map| fs::read(format!("/proc/{}/environ", map.owner)).map(drop)),
    attempt("list the processes", |map| {
        let names = fs::read_dir("/proc")?.map(|entry| Ok(entry?.file_name())).collect::<io::Result<Vec<_>>>()?;
        if names.contains(&map.owner.to_string().into()) { Ok(()) } else { Err(in_vain()) }
    }),
    attempt("take another's descriptor", |map| call(libc::SYS_pidfd_getfd, [pidfd(map)?, 0, 0]).map(drop)),
    attempt("enter another's namespaces", |map| {
        call(libc::SYS_setns, [pidfd(map)?, libc::CLONE_NEWNS as usize]).map(drop)
    }),
    attempt("see another's limits", |map| {
        let mut limit = [0u64; 2];
        call(libc::SYS_prlimit64, [pid(map), libc::RLIMIT_NOFILE as usize, 0, limit.as_mut_ptr() as usize]).map(drop)
    }),
    attempt("change another's priority", |map| {
        call(libc::SYS_setpriority, [libc::PRIO_PROCESS as usize, pid(map), 0]).map(drop)
    }),
    sometimes("compare another's descriptors", |map| call(libc::SYS_kcmp, [pid(map), pid(map), 2, 0, 0]).map(drop)),
];

fn pid(map: &Map) -> usize {
    argument(map.owner)
}

fn pidfd(map: &Map) -> io::Result<usize> {
    call(libc::SYS_pidfd_open, [pid(map), 0])
}

fn program(map: &Map) -> io::Result<CString> {
    CString::from_vec_with_nul(c_path(&map.writable.join("program"))).map_err(io::Error::other)
}

fn memory_file() -> io::Result<OwnedFd> {
    let descriptor = call(libc::SYS_memfd_create, [c"program".as_ptr() as usize, 0])?;
    // SAFETY: it has just been made.
    Ok(unsafe { OwnedFd::from_raw_fd(descriptor as i32) })
}

/// Returns only where it fails; the program ends with success.
fn execute(folder: i32, path: &CStr) -> io::Result<()> {
    let arguments = [path.as_ptr(), std::ptr::null()];
    let flags = if path.is_empty() { libc::AT_EMPTY_PATH } else { 0 };
    let arguments = [argument(folder), path.as_ptr() as usize, arguments.as_ptr() as usize, 0, argument(flags)];
    call(libc::SYS_execveat, arguments).map(drop)
}

/// Moves a word between ours and the owner's [`SECRET`].
fn transfer(number: libc::c_long, map: &Map, word: *mut u64) -> io::Result<()> {
    let vector = |base| libc::iovec { iov_base: base, iov_len: size_of::<u64>() };
    let (ours, theirs) = (vector(word.cast()), vector(map.secret as *mut libc::c_void));
    call(number, [pid(map), &raw const ours as usize, 1, &raw const theirs as usize, 1, 0]).map(drop)
}
