//! The system calls, role by role.
//!
//! Each list is what its threads were seen to make, and what the code behind them says they may. Nowhere in them is
//! what starts a program or a thread, makes a socket, mounts, signals or looks at another process, or makes memory
//! executable; and files are named by those alone that serve them, the file system's thread and the processors'.

use kvm_bindings as kvm;
use libc::{
    SYS_brk, SYS_capget, SYS_capset, SYS_clock_gettime, SYS_close, SYS_copy_file_range, SYS_dup, SYS_epoll_create1,
    SYS_epoll_ctl, SYS_epoll_pwait, SYS_epoll_pwait2, SYS_epoll_wait, SYS_exit, SYS_exit_group, SYS_fallocate,
    SYS_fchdir, SYS_fchmod, SYS_fchmodat, SYS_fchownat, SYS_fcntl, SYS_fdatasync, SYS_fgetxattr, SYS_flistxattr,
    SYS_fremovexattr, SYS_fsetxattr, SYS_fstat, SYS_fstatfs, SYS_fsync, SYS_ftruncate, SYS_futex, SYS_getdents64,
    SYS_getegid, SYS_geteuid, SYS_getpid, SYS_getrandom, SYS_gettid, SYS_getxattr, SYS_ioctl, SYS_linkat,
    SYS_listxattr, SYS_lseek, SYS_madvise, SYS_memfd_create, SYS_mincore, SYS_mkdirat, SYS_mknodat, SYS_mmap,
    SYS_mprotect, SYS_mremap, SYS_munmap, SYS_name_to_handle_at, SYS_newfstatat, SYS_openat, SYS_openat2, SYS_ppoll,
    SYS_prctl, SYS_pread64, SYS_preadv, SYS_preadv2, SYS_pwrite64, SYS_pwritev, SYS_pwritev2, SYS_read, SYS_readlinkat,
    SYS_readv, SYS_recvfrom, SYS_recvmsg, SYS_removexattr, SYS_renameat2, SYS_restart_syscall, SYS_rt_sigaction,
    SYS_rt_sigprocmask, SYS_rt_sigreturn, SYS_sched_getaffinity, SYS_sched_setaffinity, SYS_sched_yield, SYS_sendmsg,
    SYS_sendto, SYS_setgroups, SYS_setresgid, SYS_setresuid, SYS_setxattr, SYS_shutdown, SYS_sigaltstack, SYS_statx,
    SYS_symlinkat, SYS_syncfs, SYS_tgkill, SYS_umask, SYS_unlinkat, SYS_unshare, SYS_utimensat, SYS_write, SYS_writev,
    c_long,
};
use linux_raw_sys::ioctl::UFFDIO_REGISTER;
use rustix::ioctl::opcode;
use seccompiler::BackendError;

use super::{Allowed, Role, is, lacks, null};
use crate::virtio::Kind;

/// What Rust and the C library do on their own in any thread: memory, locks, the time, a line in the log, an end in
/// good order or in panic.
const EVERY_THREAD: &[c_long] = &[
    SYS_brk,
    SYS_munmap,
    SYS_mremap,
    SYS_madvise,
    SYS_futex,
    SYS_sched_yield,
    SYS_sched_getaffinity,
    SYS_getrandom,
    SYS_clock_gettime,
    SYS_read,
    SYS_write,
    SYS_writev,
    SYS_close,
    SYS_getpid,
    SYS_gettid,
    SYS_rt_sigaction,
    SYS_rt_sigprocmask,
    SYS_rt_sigreturn,
    SYS_sigaltstack,
    // A thread that was frozen, or stopped by a debugger, takes its wait up again by this.
    SYS_restart_syscall,
    SYS_exit,
    SYS_exit_group,
];

/// The owner, who talks to whoever made the process, lets devices go on with new pollers, and saves the machine or trims
/// its memory.
const OWNER: &[c_long] = &[
    SYS_recvfrom,
    SYS_ppoll,
    SYS_epoll_create1,
    SYS_pread64,
    SYS_pwrite64,
    SYS_ftruncate,
    SYS_fsync,
    SYS_statx,
    SYS_mincore,
];

/// A processor: a write to a register can start a device anew, with a poller of its own.
const VCPU: &[c_long] = &[SYS_epoll_create1];

/// Any device waits for descriptors, and raises interrupts: [`KVM_IRQ_LINE`].
const DEVICE: &[c_long] = &[SYS_epoll_wait, SYS_epoll_pwait, SYS_epoll_pwait2, SYS_epoll_ctl];

/// Streams: two that are moved by messages, and a third by which they come in.
const VSOCK: &[c_long] = &[SYS_recvmsg, SYS_sendmsg, SYS_shutdown, SYS_ppoll];

/// A tap.
const NET: &[c_long] = &[SYS_readv];

/// An image.
const BLOCK: &[c_long] = &[SYS_preadv, SYS_preadv2, SYS_pwritev, SYS_pwritev2, SYS_fdatasync, SYS_fsync, SYS_fallocate];

/// A tree of files, as virtiofsd serves it; of its own list all but what it does before it serves, and in pools of
/// threads, and by handles of files.
const FILE_SYSTEM: &[c_long] = &[
    // By name.
    SYS_openat,
    SYS_openat2,
    SYS_readlinkat,
    SYS_statx,
    SYS_newfstatat,
    SYS_name_to_handle_at,
    SYS_mkdirat,
    SYS_mknodat,
    SYS_symlinkat,
    SYS_linkat,
    SYS_unlinkat,
    SYS_renameat2,
    SYS_fchmodat,
    SYS_fchownat,
    SYS_utimensat,
    // Attributes that need a file opened for reading are reached by names in /proc/self/fd, as the working folder.
    SYS_fchdir,
    SYS_getxattr,
    SYS_listxattr,
    SYS_setxattr,
    SYS_removexattr,
    // Of open files.
    SYS_fstat,
    SYS_fstatfs,
    SYS_getdents64,
    SYS_lseek,
    SYS_readv,
    SYS_preadv,
    SYS_preadv2,
    SYS_pwritev,
    SYS_pwritev2,
    SYS_copy_file_range,
    SYS_fallocate,
    SYS_ftruncate,
    SYS_fsync,
    SYS_fdatasync,
    SYS_syncfs,
    SYS_fchmod,
    SYS_fgetxattr,
    SYS_flistxattr,
    SYS_fsetxattr,
    SYS_fremovexattr,
    SYS_dup,
    // As the guest's users, and with fewer capabilities for a moment.
    SYS_umask,
    SYS_geteuid,
    SYS_getegid,
    SYS_setresuid,
    SYS_setresgid,
    SYS_setgroups,
    SYS_capget,
    SYS_capset,
    // Holds a session that is saved.
    SYS_memfd_create,
];

/// Adds what a role takes.
pub(super) fn of(role: Role, allowed: &mut Allowed) -> Result<(), BackendError> {
    allowed.calls(EVERY_THREAD);
    for call in [SYS_mmap, SYS_mprotect] {
        allowed.only(call, [lacks(2, libc::PROT_EXEC as u32)])?;
    }
    // Wakes a processor, and raises SIGABRT at the end of a panic.
    allowed.only(SYS_tgkill, [is(0, std::process::id())])?;
    // To copy descriptors, and to look at them as they are closed, which Rust does where it is built for debugging. Other
    // commands could make the kernel signal any process.
    for command in [libc::F_DUPFD_CLOEXEC, libc::F_GETFD] {
        allowed.only(SYS_fcntl, [is(1, command as u32)])?;
    }
    match role {
        Role::Owner => {
            allowed.calls(OWNER);
            // Into a connection that there is, and to nobody else.
            allowed.only(SYS_sendto, [null(4)])?;
            // Over memory of its own, by a descriptor that can hold nobody up: [`crate::Watch`].
            allowed.only(SYS_ioctl, [is(1, UFFDIO_REGISTER)])?;
            SAVED_STATE.iter().try_for_each(|&request| allowed.only(SYS_ioctl, [is(1, request)]))
        }
        Role::Vcpu => {
            allowed.calls(VCPU);
            allowed.only(SYS_ioctl, [is(1, KVM_RUN)])?;
            // It serves the guest's files itself: [`crate::virtio::Attendant`].
            allowed.only(SYS_ioctl, [is(1, KVM_IRQ_LINE)])?;
            file_system(allowed)
        }
        Role::Device(kind) => {
            allowed.calls(DEVICE);
            allowed.only(SYS_ioctl, [is(1, KVM_IRQ_LINE)])?;
            device(kind, allowed)
        }
    }
}

fn device(kind: Kind, allowed: &mut Allowed) -> Result<(), BackendError> {
    match kind {
        Kind::Entropy | Kind::Balloon => Ok(()),
        Kind::Vsock => {
            allowed.calls(VSOCK);
            Ok(())
        }
        Kind::Block => {
            allowed.calls(BLOCK);
            Ok(())
        }
        Kind::Net => {
            allowed.calls(NET);
            allowed.only(SYS_ioctl, [is(1, libc::TUNSETVNETHDRSZ as u32)])?;
            allowed.only(SYS_ioctl, [is(1, libc::TUNSETOFFLOAD as u32)])
        }
        Kind::FileSystem => {
            // For an umask and a working folder of its own.
            allowed.only(SYS_unshare, [is(0, libc::CLONE_FS as u32)])?;
            // To look for requests on another processor than the guest's; for itself alone.
            allowed.only(SYS_sched_setaffinity, [is(0, 0)])?;
            file_system(allowed)
        }
    }
}

fn file_system(allowed: &mut Allowed) -> Result<(), BackendError> {
    allowed.calls(FILE_SYSTEM);
    // How libcap-ng learns which capabilities there are.
    allowed.only(SYS_prctl, [is(0, libc::PR_CAPBSET_READ as u32)])?;
    let ambient = [is(0, libc::PR_CAP_AMBIENT as u32), is(1, libc::PR_CAP_AMBIENT_IS_SET as u32)];
    allowed.only(SYS_prctl, ambient)
}

const KVM: u8 = kvm::KVMIO as u8;
const KVM_RUN: u32 = opcode::none(KVM, 0x80);
const KVM_IRQ_LINE: u32 = opcode::write::<kvm::kvm_irq_level>(KVM, 0x61);
/// How processors and machines are read: Documentation/virt/kvm/api.rst.
const SAVED_STATE: [u32; 14] = [
    opcode::none(KVM, 0x03), // KVM_CHECK_EXTENSION
    opcode::read_write::<kvm::kvm_irqchip>(KVM, 0x62),
    opcode::read::<kvm::kvm_clock_data>(KVM, 0x7c),
    opcode::read::<kvm::kvm_regs>(KVM, 0x81),
    opcode::read::<kvm::kvm_sregs>(KVM, 0x83),
    opcode::read_write::<kvm::kvm_msrs>(KVM, 0x88),
    opcode::read::<kvm::kvm_lapic_state>(KVM, 0x8e),
    opcode::read_write::<kvm::kvm_cpuid2>(KVM, 0x91),
    opcode::read::<kvm::kvm_mp_state>(KVM, 0x98),
    opcode::read::<kvm::kvm_vcpu_events>(KVM, 0x9f),
    opcode::read::<kvm::kvm_debugregs>(KVM, 0xa1),
    opcode::read::<kvm::kvm_xsave>(KVM, 0xa4),
    opcode::read::<kvm::kvm_xcrs>(KVM, 0xa6),
    opcode::read::<kvm::kvm_xsave>(KVM, 0xcf), // KVM_GET_XSAVE2
];
