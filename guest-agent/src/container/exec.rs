//! A further process in a running container.
//!
//! libcontainer's own way leaves out the container's seccomp filter and starts the program before its terminal has a
//! size, so this takes the steps itself, in runc's order and with libcontainer's parts.

use std::convert::Infallible;
use std::fmt;
use std::fs::{self, File};
use std::io::{self, Write as _};
use std::os::fd::{AsFd as _, BorrowedFd, IntoRawFd as _, OwnedFd};

use libcontainer::capabilities;
use libcontainer::oci_spec::runtime::{LinuxNamespace, LinuxNamespaceType, LinuxSeccomp, Process};
use libcontainer::seccomp::initialize_seccomp;
use libcontainer::syscall::Syscall;
use libcontainer::syscall::syscall::create_syscall;
use libcontainer::tty;
use rustix::fs::{Gid, Mode, Uid};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketFlags, SocketType};
use rustix::pipe::PipeFlags;
use rustix::process::{DumpableBehavior, Pid, PidfdFlags};
use rustix::stdio::{dup2_stderr, dup2_stdin, dup2_stdout};
use rustix::termios::Winsize;
use rustix::thread::{ThreadNameSpaceType, move_into_thread_name_spaces};
use tokio::io::AsyncReadExt as _;
use tokio::net::unix::pipe;

use super::cgroup::Cgroup;
use super::create::{child_log, receive_file};
use super::program::{self, describe};
use crate::child;
use crate::error::RequestError;
use crate::log;
use crate::reaper::{Exit, Reaper};
use crate::stdio::ChildEnds;

/// The longest sentence that is taken from a process on its way into a container.
const MAX_SENTENCE: u64 = 4096;

/// What a process needs to get into a container.
pub(super) struct Door {
    /// The container's first process.
    init: OwnedFd,
    init_pid: Pid,
    namespaces: ThreadNameSpaceType,
    cgroup: Cgroup,
    seccomp: Option<LinuxSeccomp>,
}

impl Door {
    /// The door of a container whose first process is there.
    pub(super) fn new(
        init: Pid,
        namespaces: &[LinuxNamespace],
        cgroup: Cgroup,
        seccomp: Option<LinuxSeccomp>,
    ) -> io::Result<Self> {
        let namespaces = namespaces.iter().map(|namespace| namespace_type(namespace.typ())).collect();
        let init_file = rustix::process::pidfd_open(init, PidfdFlags::empty())?;
        Ok(Self { init: init_file, init_pid: init, namespaces, cgroup, seccomp })
    }
}

fn namespace_type(namespace: LinuxNamespaceType) -> ThreadNameSpaceType {
    match namespace {
        LinuxNamespaceType::Mount => ThreadNameSpaceType::MOUNT,
        LinuxNamespaceType::Cgroup => ThreadNameSpaceType::CONTROL_GROUP,
        LinuxNamespaceType::Uts => ThreadNameSpaceType::HOST_NAME_AND_NIS_DOMAIN_NAME,
        LinuxNamespaceType::Ipc => ThreadNameSpaceType::INTER_PROCESS_COMMUNICATION,
        LinuxNamespaceType::User => ThreadNameSpaceType::USER,
        LinuxNamespaceType::Pid => ThreadNameSpaceType::PROCESS_ID,
        LinuxNamespaceType::Network => ThreadNameSpaceType::NETWORK,
        LinuxNamespaceType::Time => ThreadNameSpaceType::TIME,
    }
}

/// What the process gets for stdin, stdout and stderr.
pub(super) enum ExecStdio {
    Pipes(ChildEnds),
    /// A terminal of this size, where one is known.
    Terminal(Option<Winsize>),
}

/// A process that runs its program.
pub(super) struct Entered {
    pub(super) pid: Pid,
    pub(super) exit: Exit,
    pub(super) master: Option<OwnedFd>,
}

/// The child's ends of what it reports through. All close when the program runs.
struct Reports {
    number: OwnedFd,
    failure: OwnedFd,
    console: OwnedFd,
}

/// Runs the process in the container.
pub(super) async fn enter(
    reaper: &Reaper,
    door: &Door,
    process: &Process,
    stdio: ExecStdio,
) -> Result<Entered, RequestError> {
    let (mut number, number_end) = report().map_err(RequestError::system("make a pipe"))?;
    let (mut failure, failure_end) = report().map_err(RequestError::system("make a pipe"))?;
    let (console, console_end) =
        rustix::net::socketpair(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None)
            .map_err(RequestError::system("make a socket"))?;
    let (log, log_end) = child_log().map_err(RequestError::system("make a pipe"))?;
    let expected = reaper.expect();
    let reports = Reports { number: number_end, failure: failure_end, console: console_end };
    let mut keep = vec![door.init.as_fd(), reports.number.as_fd(), reports.failure.as_fd(), reports.console.as_fd()];
    if let ExecStdio::Pipes(ends) = &stdio {
        keep.extend([ends.stdin.as_fd(), ends.stdout.as_fd(), ends.stderr.as_fd()]);
    }
    let helper = child::fork(log_end, &keep, || go_in(door, process, &stdio, &reports));
    drop(keep);
    drop(reports);
    tokio::spawn(log::adopt(log));
    reaper.watch(helper.map_err(RequestError::system("start a process"))?);
    drop(stdio);

    let mut sentence = String::new();
    let pid = number.read_i32().await;
    (&mut failure)
        .take(MAX_SENTENCE)
        .read_to_string(&mut sentence)
        .await
        .map_err(RequestError::system("hear from the process"))?;
    if !sentence.is_empty() {
        return Err(RequestError::Program(sentence));
    }
    let pid = pid.and_then(|pid| Pid::from_raw(pid).ok_or_else(|| io::Error::other("it has no number")));
    let pid = pid.map_err(RequestError::system("hear from the process"))?;
    let master = process.terminal().unwrap_or_default().then(|| receive_file(&console)).transpose();
    let master = master.map_err(RequestError::system("receive the terminal"))?;
    Ok(Entered { pid, exit: expected.fulfil(pid), master })
}

fn report() -> io::Result<(pipe::Receiver, OwnedFd)> {
    let (read, write) = rustix::pipe::pipe_with(PipeFlags::CLOEXEC)?;
    rustix::io::ioctl_fionbio(&read, true)?;
    Ok((pipe::Receiver::from_owned_fd(read)?, write))
}

/// In the child: goes where the container's processes are, and leaves the program to a child of its own, since a PID
/// namespace takes only children in.
fn go_in(door: &Door, process: &Process, stdio: &ExecStdio, reports: &Reports) -> i32 {
    let entered = join(door, process).and_then(|()| {
        let pid = child::split(|| finish(door, process, stdio, reports)).map_err(failed("start a process"))?;
        let number = pid.as_raw_nonzero().get().to_be_bytes();
        rustix::io::write(&reports.number, &number).map_err(failed("report the process"))?;
        Ok(())
    });
    entered.map_or_else(|sentence| tell(&reports.failure, &sentence), |()| 0)
}

fn join(door: &Door, process: &Process) -> Result<(), String> {
    rustix::process::set_dumpable_behavior(DumpableBehavior::NotDumpable).map_err(failed("hide the process"))?;
    join_cgroup(door).map_err(failed("join the container's cgroup"))?;
    if let Some(score) = process.oom_score_adj() {
        fs::write("/proc/self/oom_score_adj", score.to_string()).map_err(failed("set process.oomScoreAdj"))?;
    }
    let syscall = create_syscall();
    for limit in process.rlimits().iter().flatten() {
        syscall.set_rlimit(limit).map_err(failed("set process.rlimits"))?;
    }
    move_into_thread_name_spaces(door.init.as_fd(), door.namespaces).map_err(failed("join the container's namespaces"))
}

/// A container that manages cgroups of its own has no processes in its topmost: then it is where its first process is.
fn join_cgroup(door: &Door) -> io::Result<()> {
    match fs::write(door.cgroup.path().join("cgroup.procs"), "0") {
        Err(error) if error.raw_os_error() == Some(Errno::BUSY.raw_os_error()) => {
            let of_init = fs::read_to_string(format!("/proc/{}/cgroup", door.init_pid))?;
            let below = of_init.trim_end().strip_prefix("0::/").filter(|path| !path.contains(".."));
            let below = below.ok_or_else(|| io::Error::other("its first process is in none"))?;
            fs::write(std::path::Path::new(crate::boot::CGROUP_ROOT).join(below).join("cgroup.procs"), "0")
        }
        joined => joined,
    }
}

/// In the child's child: becomes the program.
fn finish(door: &Door, process: &Process, stdio: &ExecStdio, reports: &Reports) -> i32 {
    // SAFETY: nothing uses the file here after this; the process that it is a report of must see it end.
    unsafe { libc::close(std::os::fd::AsRawFd::as_raw_fd(&reports.number)) };
    match become_program(door, process, stdio, reports) {
        Err(sentence) => tell(&reports.failure, &sentence),
    }
}

fn become_program(door: &Door, process: &Process, stdio: &ExecStdio, reports: &Reports) -> Result<Infallible, String> {
    let syscall = create_syscall();
    let syscall = syscall.as_ref();
    rustix::process::setsid().map_err(failed("start a session"))?;
    connect(stdio, reports.console.as_fd(), syscall, process)?;
    let unprivileged_filter = process.no_new_privileges().unwrap_or_default();
    if unprivileged_filter {
        rustix::thread::set_no_new_privs(true).map_err(failed("set process.noNewPrivileges"))?;
    } else {
        filter(door)?;
    }
    let entered = rustix::process::chdir(process.cwd());
    if let Err(errno) = entered
        && errno != Errno::PERM
        && errno != Errno::ACCESS
    {
        return Err(chdir_failure(process, errno));
    }
    if let Some(umask) = process.user().umask() {
        rustix::process::umask(Mode::from_raw_mode(umask));
    }
    take_identity(process, syscall)?;
    if entered.is_err() {
        rustix::process::chdir(process.cwd()).map_err(|errno| chdir_failure(process, errno))?;
    }
    stay_inside()?;
    if unprivileged_filter {
        filter(door)?;
    }
    program::run(process)
}

fn connect(stdio: &ExecStdio, console: BorrowedFd<'_>, syscall: &dyn Syscall, process: &Process) -> Result<(), String> {
    match stdio {
        ExecStdio::Pipes(ends) => {
            let done = dup2_stdin(&ends.stdin)
                .and_then(|()| dup2_stdout(&ends.stdout))
                .and_then(|()| dup2_stderr(&ends.stderr));
            done.map_err(failed("connect the process's stdio"))
        }
        ExecStdio::Terminal(size) => {
            let console = console.try_clone_to_owned().map_err(failed("copy the console socket"))?;
            tty::setup_console(syscall, console.into_raw_fd(), false).map_err(failed("set up the terminal"))?;
            let terminal = rustix::stdio::stdin();
            if let Some(size) = size {
                rustix::termios::tcsetwinsize(terminal, *size).map_err(failed("size the terminal"))?;
            }
            rustix::fs::fchown(terminal, Some(Uid::from_raw(process.user().uid())), None)
                .map_err(failed("give the terminal to the process's user"))
        }
    }
}

fn take_identity(process: &Process, syscall: &dyn Syscall) -> Result<(), String> {
    let user = process.user();
    let gids: Vec<_> = user.additional_gids().iter().flatten().map(|&gid| Gid::from_raw(gid)).collect();
    rustix::thread::set_thread_groups(&gids).map_err(failed("set process.user.additionalGids"))?;
    syscall.set_id(user.uid().into(), user.gid().into()).map_err(failed("set process.user"))?;
    if let Some(set) = process.capabilities() {
        capabilities::reset_effective(syscall).map_err(failed("set process.capabilities"))?;
        capabilities::drop_privileges(set, syscall).map_err(failed("set process.capabilities"))?;
    }
    Ok(())
}

fn filter(door: &Door) -> Result<(), String> {
    match &door.seccomp {
        Some(profile) => initialize_seccomp(profile).map(drop).map_err(failed("load linux.seccomp")),
        None => Ok(()),
    }
}

/// A working directory may lead out of the container by a descriptor that came along.
fn stay_inside() -> Result<(), String> {
    match rustix::process::getcwd(Vec::new()) {
        Ok(path) if path.as_bytes().starts_with(b"/") => Ok(()),
        _ => Err("current working directory is outside of container mount namespace root".into()),
    }
}

fn chdir_failure(process: &Process, errno: Errno) -> String {
    format!("chdir to cwd ({:?}) set in config.json failed: {}", process.cwd(), describe(errno))
}

fn failed<E: fmt::Display>(step: &str) -> impl FnOnce(E) -> String {
    move |error| format!("cannot {step}: {error}")
}

fn tell(report: &OwnedFd, sentence: &str) -> i32 {
    if let Ok(report) = report.try_clone() {
        let _ = File::from(report).write_all(sentence.as_bytes());
    }
    1
}
