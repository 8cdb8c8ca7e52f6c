//! The steps that any process takes on its way to its program, a container's first and further ones alike: runc's, in
//! its order, with libcontainer's parts.

use std::fmt;
use std::fs::{self, File};
use std::io::{self, Write as _};
use std::os::fd::{AsFd, AsRawFd as _, BorrowedFd, IntoRawFd as _, OwnedFd};

use libcontainer::capabilities;
use libcontainer::oci_spec::runtime::{Linux, LinuxNamespace, LinuxNamespaceType, LinuxSeccomp, Process};
use libcontainer::seccomp::initialize_seccomp;
use libcontainer::syscall::syscall::create_syscall;
use libcontainer::tty;
use runvm_protocol::PRESERVED_FIRST;
use rustix::fs::{Gid, Mode, Uid};
use rustix::io::Errno;
use rustix::net::{AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SocketFlags, SocketType};
use rustix::pipe::PipeFlags;
use rustix::process::DumpableBehavior;
use rustix::stdio::{dup2_stderr, dup2_stdin, dup2_stdout};
use rustix::termios::Winsize;
use rustix::thread::ThreadNameSpaceType;
use tokio::io::AsyncReadExt as _;
use tokio::net::unix::pipe;

use super::program::describe;
use super::spec::SpecError;
use crate::processors;
use crate::stdio::ChildEnds;

/// The longest sentence that is taken from a process on its way.
const MAX_SENTENCE: u64 = 4096;

/// What a process gets for stdin, stdout and stderr.
pub(super) enum Stdio {
    Pipes(ChildEnds),
    /// It makes a terminal, of this size where one is known, and hands over its master.
    Terminal(Option<Winsize>),
}

/// What a process begins with open.
pub(super) struct Files {
    pub(super) stdio: Stdio,
    /// From descriptor 3 on.
    pub(super) preserved: Vec<OwnedFd>,
}

impl Files {
    /// What the process has to have open for it.
    pub(super) fn ends(&self) -> impl Iterator<Item = BorrowedFd<'_>> {
        let ends = match &self.stdio {
            Stdio::Pipes(ends) => Some([ends.stdin.as_fd(), ends.stdout.as_fd(), ends.stderr.as_fd()]),
            Stdio::Terminal(_) => None,
        };
        ends.into_iter().flatten().chain(self.preserved.iter().map(AsFd::as_fd))
    }
}

/// The namespaces that a container has of its own.
pub(super) fn namespaces(linux: &Linux) -> ThreadNameSpaceType {
    let kind = |namespace: &LinuxNamespace| match namespace.typ() {
        LinuxNamespaceType::Mount => ThreadNameSpaceType::MOUNT,
        LinuxNamespaceType::Cgroup => ThreadNameSpaceType::CONTROL_GROUP,
        LinuxNamespaceType::Uts => ThreadNameSpaceType::HOST_NAME_AND_NIS_DOMAIN_NAME,
        LinuxNamespaceType::Ipc => ThreadNameSpaceType::INTER_PROCESS_COMMUNICATION,
        LinuxNamespaceType::User => ThreadNameSpaceType::USER,
        LinuxNamespaceType::Pid => ThreadNameSpaceType::PROCESS_ID,
        LinuxNamespaceType::Network => ThreadNameSpaceType::NETWORK,
        LinuxNamespaceType::Time => ThreadNameSpaceType::TIME,
    };
    linux.namespaces().iter().flatten().map(kind).collect()
}

/// The namespaces of these kinds, by the names of the specification.
pub(super) fn shared_namespaces(kinds: &[String]) -> Result<ThreadNameSpaceType, SpecError> {
    let kind = |kind: &String| match kind.as_str() {
        "ipc" => Ok(ThreadNameSpaceType::INTER_PROCESS_COMMUNICATION),
        "pid" => Ok(ThreadNameSpaceType::PROCESS_ID),
        "uts" => Ok(ThreadNameSpaceType::HOST_NAME_AND_NIS_DOMAIN_NAME),
        _ => Err(SpecError::Invalid {
            field: "shared namespaces",
            value: kind.clone(),
            reason: "containers of a guest share ipc, pid and uts",
        }),
    };
    kinds.iter().map(kind).collect()
}

/// Hides the process from those who are in the container already, and sets its limits.
pub(super) fn limit(process: &Process) -> Result<(), String> {
    rustix::process::set_dumpable_behavior(DumpableBehavior::NotDumpable).map_err(failed("hide the process"))?;
    if let Some(score) = process.oom_score_adj() {
        fs::write("/proc/self/oom_score_adj", score.to_string()).map_err(failed("set process.oomScoreAdj"))?;
    }
    let syscall = create_syscall();
    process
        .rlimits()
        .iter()
        .flatten()
        .try_for_each(|limit| syscall.set_rlimit(limit).map_err(failed("set process.rlimits")))
}

/// Connects the process's stdio, and what else it begins with open. The master of its terminal goes into `console`; the
/// first process's terminal is the container's console too.
pub(super) fn connect(files: &Files, console: BorrowedFd<'_>, process: &Process, is_first: bool) -> Result<(), String> {
    connect_stdio(&files.stdio, console, process, is_first)?;
    for (file, number) in files.preserved.iter().zip(PRESERVED_FIRST..) {
        // SAFETY: no owner of this number is in this process: the agent reserves it, and its copy was closed here.
        if unsafe { libc::dup2(file.as_raw_fd(), number) } < 0 {
            return Err(failed("hand over a descriptor")(io::Error::last_os_error()));
        }
    }
    Ok(())
}

fn connect_stdio(stdio: &Stdio, console: BorrowedFd<'_>, process: &Process, is_first: bool) -> Result<(), String> {
    match stdio {
        Stdio::Pipes(ends) => {
            let done = dup2_stdin(&ends.stdin)
                .and_then(|()| dup2_stdout(&ends.stdout))
                .and_then(|()| dup2_stderr(&ends.stderr));
            done.map_err(failed("connect the process's stdio"))
        }
        Stdio::Terminal(size) => {
            let console = console.try_clone_to_owned().map_err(failed("copy the console socket"))?;
            tty::setup_console(create_syscall().as_ref(), console.into_raw_fd(), is_first)
                .map_err(failed("set up the terminal"))?;
            let terminal = rustix::stdio::stdin();
            if let Some(size) = size {
                rustix::termios::tcsetwinsize(terminal, *size).map_err(failed("size the terminal"))?;
            }
            rustix::fs::fchown(terminal, Some(Uid::from_raw(process.user().uid())), None)
                .map_err(failed("give the terminal to the process's user"))
        }
    }
}

/// Takes the process to its working directory, and makes it its user's, with no more than that user may.
pub(super) fn settle(process: &Process, filter: Option<&LinuxSeccomp>) -> Result<(), String> {
    // Before the filter, which may forbid it.
    processors::use_all().map_err(failed("use all processors"))?;
    let unprivileged_filter = process.no_new_privileges().unwrap_or_default();
    if unprivileged_filter {
        rustix::thread::set_no_new_privs(true).map_err(failed("set process.noNewPrivileges"))?;
    } else {
        load(filter)?;
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
    take_identity(process)?;
    if entered.is_err() {
        rustix::process::chdir(process.cwd()).map_err(|errno| chdir_failure(process, errno))?;
    }
    stay_inside()?;
    if unprivileged_filter { load(filter) } else { Ok(()) }
}

fn take_identity(process: &Process) -> Result<(), String> {
    let syscall = create_syscall();
    let syscall = syscall.as_ref();
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

fn load(filter: Option<&LinuxSeccomp>) -> Result<(), String> {
    match filter {
        Some(filter) => initialize_seccomp(filter).map(drop).map_err(failed("load linux.seccomp")),
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

/// The sentence of a step that failed, with all its causes.
pub(super) fn failed<E: std::error::Error>(step: &str) -> impl FnOnce(E) -> String {
    move |error| {
        let mut text = format!("cannot {step}: {error}");
        let mut next = error.source();
        while let Some(source) = next {
            let cause = source.to_string();
            if !text.ends_with(&cause) {
                text = format!("{text}: {cause}");
            }
            next = source.source();
        }
        text
    }
}

/// A pipe by which a process says how far it came. It must not keep its end open in its program.
pub(super) fn report() -> io::Result<(pipe::Receiver, OwnedFd)> {
    let (read, write) = rustix::pipe::pipe_with(PipeFlags::CLOEXEC)?;
    rustix::io::ioctl_fionbio(&read, true)?;
    Ok((pipe::Receiver::from_owned_fd(read)?, write))
}

/// Says why a process comes no further; its exit code.
pub(super) fn tell(report: &OwnedFd, sentence: &dyn fmt::Display) -> i32 {
    if let Ok(report) = report.try_clone() {
        let _ = File::from(report).write_all(sentence.to_string().as_bytes());
    }
    1
}

/// What a process has said at its report's end.
pub(super) async fn hear(report: &mut pipe::Receiver) -> io::Result<String> {
    let mut said = Vec::new();
    report.take(MAX_SENTENCE).read_to_end(&mut said).await?;
    Ok(String::from_utf8_lossy(&said).into_owned())
}

/// A socket for the master of a terminal: the agent's end, and the process's.
pub(super) fn console() -> io::Result<(OwnedFd, OwnedFd)> {
    Ok(rustix::net::socketpair(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None)?)
}

/// A pipe for a child's log.
pub(super) fn child_log() -> io::Result<(pipe::Receiver, OwnedFd)> {
    let (read, write) = rustix::pipe::pipe_with(PipeFlags::CLOEXEC | PipeFlags::NONBLOCK)?;
    Ok((pipe::Receiver::from_owned_fd(read)?, write))
}

/// Receives one open file.
pub(super) fn receive_file(socket: impl AsFd) -> io::Result<OwnedFd> {
    let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let mut name = [0; 64];
    let mut buffer = [io::IoSliceMut::new(&mut name)];
    rustix::net::recvmsg(socket, &mut buffer, &mut ancillary, RecvFlags::CMSG_CLOEXEC)?;
    let mut files = ancillary.drain().filter_map(|message| match message {
        RecvAncillaryMessage::ScmRights(files) => Some(files),
        _ => None,
    });
    files.next().and_then(|mut files| files.next()).ok_or_else(|| io::Error::other("no terminal came"))
}
