//! More power, and the corners of the kernel that an attacker who has none looks for flaws in.

use std::arch::asm;
use std::io;

use nix::libc;
use rustix::thread::{CapabilitySet, CapabilitySets};

use super::{Attempt, attempt, in_vain, sometimes};
use crate::system::{argument, c_path, call};

const PAGE: usize = 4096;
const READ_WRITE: i32 = libc::PROT_READ | libc::PROT_WRITE;
/// In `ioctl` for any descriptor: how much there is to read.
const FIONREAD: usize = libc::FIONREAD as usize;
const PR_SET_DUMPABLE: usize = libc::PR_SET_DUMPABLE as usize;
const X32: libc::c_long = 0x4000_0000;

pub const ATTEMPTS: &[Attempt] = &[
    attempt("take a capability", |_| {
        let wanted = CapabilitySet::SYS_ADMIN;
        let inheritable = CapabilitySet::empty();
        let sets = CapabilitySets { effective: wanted, permitted: wanted, inheritable };
        rustix::thread::set_capabilities(None, sets).map_err(Into::into)
    }),
    attempt("have a mount namespace", |_| unshare(libc::CLONE_NEWNS)),
    attempt("have a network namespace", |_| unshare(libc::CLONE_NEWNET)),
    attempt("have a PID namespace", |_| unshare(libc::CLONE_NEWPID)),
    sometimes("have a user namespace", |_| unshare(libc::CLONE_NEWUSER)),
    attempt("let itself be looked at", |_| call(libc::SYS_prctl, [PR_SET_DUMPABLE, 1, 0, 0, 0]).map(drop)),
    attempt("get memory to execute", |_| map_memory(READ_WRITE | libc::PROT_EXEC, None).map(drop)),
    attempt("make memory executable", |_| {
        let memory = map_memory(READ_WRITE, None)?;
        call(libc::SYS_mprotect, [memory, PAGE, (READ_WRITE | libc::PROT_EXEC) as usize]).map(drop)
    }),
    attempt("map a program of an export", |map| {
        let path = c_path(&map.writable.join("program"));
        let file = call(libc::SYS_openat, [argument(libc::AT_FDCWD), path.as_ptr() as usize, 0])?;
        map_memory(libc::PROT_READ | libc::PROT_EXEC, Some(file)).map(drop)
    }),
    attempt("have all memory be executable", |_| {
        call(libc::SYS_personality, [libc::READ_IMPLIES_EXEC as usize]).map(drop)
    }),
    attempt("ask a driver for something", |_| {
        let (mut pipe, mut there) = ([0i32; 2], 0i32);
        call(libc::SYS_pipe2, [pipe.as_mut_ptr() as usize, 0])?;
        call(libc::SYS_ioctl, [argument(pipe[0]), FIONREAD, &raw mut there as usize]).map(drop)
    }),
    attempt("load a BPF map", |_| {
        // BPF_MAP_CREATE of an array of one word.
        let attributes = [2u32, 4, 4, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
        call(libc::SYS_bpf, [0, attributes.as_ptr() as usize, size_of_val(&attributes)]).map(drop)
    }),
    sometimes("count events of processors", |_| {
        // PERF_TYPE_SOFTWARE, PERF_COUNT_SW_CPU_CLOCK.
        let mut attributes = [0u32; 32];
        attributes[0] = 1;
        attributes[1] = size_of_val(&attributes) as u32;
        let arguments = [attributes.as_ptr() as usize, 0, argument(-1), argument(-1), 0];
        call(libc::SYS_perf_event_open, arguments).map(drop)
    }),
    sometimes("handle page faults", |_| call(libc::SYS_userfaultfd, [0]).map(drop)),
    sometimes("have a ring for system calls", |_| {
        let mut parameters = [0u32; 32];
        call(libc::SYS_io_uring_setup, [1, parameters.as_mut_ptr() as usize]).map(drop)
    }),
    attempt("read a key ring", |_| {
        // KEYCTL_GET_KEYRING_ID of the process's, made if it has none.
        call(libc::SYS_keyctl, [0, argument(-2), 1]).map(drop)
    }),
    attempt("watch files", |_| call(libc::SYS_inotify_init1, [0]).map(drop)),
    sometimes("watch all files", |_| call(libc::SYS_fanotify_init, [0, 0]).map(drop)),
    attempt("share memory with others", |_| {
        call(libc::SYS_shmget, [0, PAGE, (libc::IPC_CREAT | 0o600) as usize]).map(drop)
    }),
    attempt("read the kernel's messages", |_| {
        // SYSLOG_ACTION_SIZE_BUFFER.
        call(libc::SYS_syslog, [10, 0, 0]).map(drop)
    }),
    sometimes("use all ports of the machine", |_| call(libc::SYS_iopl, [3]).map(drop)),
    sometimes("make a system call of another kind", |_| call(X32 | libc::SYS_getpid, []).map(drop)),
    sometimes("make a system call of 32 bits", |_| old_getpid()),
];

fn unshare(namespaces: libc::c_int) -> io::Result<()> {
    call(libc::SYS_unshare, [argument(namespaces)]).map(drop)
}

fn map_memory(protection: libc::c_int, file: Option<usize>) -> io::Result<usize> {
    let kind = if file.is_some() { 0 } else { libc::MAP_ANONYMOUS };
    let flags = (libc::MAP_PRIVATE | kind) as usize;
    call(libc::SYS_mmap, [0, PAGE, protection as usize, flags, file.unwrap_or(argument(-1)), 0])
}

/// By the gate of 32-bit programs, whose numbers mean other calls.
fn old_getpid() -> io::Result<()> {
    const GETPID: i32 = 20;
    let mut result = GETPID;
    // SAFETY: it touches no memory; the gate changes no register but these.
    unsafe { asm!("int 0x80", inout("eax") result, out("r8") _, out("r9") _, out("r10") _, out("r11") _) };
    if result == std::process::id().cast_signed() { Ok(()) } else { Err(in_vain()) }
}
