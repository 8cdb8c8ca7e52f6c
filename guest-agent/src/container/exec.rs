//! A further process in a running container.
//!
//! libcontainer's own way leaves out the container's seccomp filter and starts the program before its terminal has a
//! size, so this takes the steps itself.

use std::convert::Infallible;
use std::fs;
use std::io;
use std::os::fd::{AsFd as _, OwnedFd};
use std::path::{Component, Path};

use libcontainer::oci_spec::runtime::{LinuxSeccomp, Process};
use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags};
use rustix::thread::{ThreadNameSpaceType, move_into_thread_name_spaces};
use tokio::io::AsyncReadExt as _;

use super::cgroup::Cgroup;
use super::process::{self, Files, child_log, console, failed, hear, receive_file, report, tell};
use super::{priority, program};
use crate::child::{self, let_go};
use crate::error::RequestError;
use crate::log;
use crate::reaper::{Exit, Reaper};
use crate::user_namespace::become_root;

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
        namespaces: ThreadNameSpaceType,
        cgroup: Cgroup,
        seccomp: Option<LinuxSeccomp>,
    ) -> io::Result<Self> {
        let init_file = rustix::process::pidfd_open(init, PidfdFlags::empty())?;
        Ok(Self { init: init_file, init_pid: init, namespaces, cgroup, seccomp })
    }

    /// The container's first process, as a descriptor.
    ///
    /// # Errors
    /// Those of dup(2).
    pub(super) fn first_process(&self) -> io::Result<OwnedFd> {
        self.init.try_clone()
    }
}

/// A process that is to get into a container.
pub(super) struct Visitor {
    pub(super) process: Process,
    /// Where it goes below the container's cgroup.
    pub(super) cgroup: String,
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
    visitor: &Visitor,
    files: Files,
) -> Result<Entered, RequestError> {
    let (mut number, number_end) = report().map_err(RequestError::system("make a pipe"))?;
    let (mut failure, failure_end) = report().map_err(RequestError::system("make a pipe"))?;
    let (console, console_end) = console().map_err(RequestError::system("make a socket"))?;
    let (log, log_end) = child_log().map_err(RequestError::system("make a pipe"))?;
    let expected = reaper.expect();
    let reports = Reports { number: number_end, failure: failure_end, console: console_end };
    let mut keep = vec![door.init.as_fd(), reports.number.as_fd(), reports.failure.as_fd(), reports.console.as_fd()];
    keep.extend(files.ends());
    let helper = child::fork(log_end, &keep, || go_in(door, visitor, &files, &reports));
    drop(keep);
    drop(reports);
    tokio::spawn(log::adopt(log));
    reaper.watch(helper.map_err(RequestError::system("start a process"))?);
    drop(files);

    let pid = number.read_i32().await;
    let sentence = hear(&mut failure).await.map_err(RequestError::system("hear from the process"))?;
    if !sentence.is_empty() {
        return Err(RequestError::Program(sentence));
    }
    let pid = pid.and_then(|pid| Pid::from_raw(pid).ok_or_else(|| io::Error::other("it has no number")));
    let pid = pid.map_err(RequestError::system("hear from the process"))?;
    let master = visitor.process.terminal().unwrap_or_default().then(|| receive_file(&console)).transpose();
    let master = master.map_err(RequestError::system("receive the terminal"))?;
    Ok(Entered { pid, exit: expected.fulfil(pid), master })
}

/// In the child: goes where the container's processes are, and leaves the program to a child of its own, since a PID
/// namespace takes only children in.
fn go_in(door: &Door, visitor: &Visitor, files: &Files, reports: &Reports) -> i32 {
    let entered = join(door, visitor).and_then(|()| {
        let pid = child::split(|| finish(door, &visitor.process, files, reports)).map_err(failed("start a process"))?;
        let number = pid.as_raw_nonzero().get().to_be_bytes();
        rustix::io::write(&reports.number, &number).map_err(failed("report the process"))?;
        Ok(())
    });
    entered.map_or_else(|sentence| tell(&reports.failure, &sentence), |()| 0)
}

fn join(door: &Door, visitor: &Visitor) -> Result<(), String> {
    match visitor.cgroup.as_str() {
        "" => join_cgroup(door).map_err(failed("join the container's cgroup"))?,
        path => join_below(door, path).map_err(failed(&format!("join the cgroup {path:?} below the container's")))?,
    }
    process::limit(&visitor.process)?;
    move_into_thread_name_spaces(door.init.as_fd(), door.namespaces)
        .map_err(failed("join the container's namespaces"))?;
    if door.namespaces.contains(ThreadNameSpaceType::USER) {
        become_root().map_err(failed("become root of the container's user namespace"))?;
    }
    Ok(())
}

/// A container that manages cgroups of its own has no processes in its topmost: then it is where its first process is.
fn join_cgroup(door: &Door) -> io::Result<()> {
    match fs::write(door.cgroup.path().join("cgroup.procs"), "0") {
        Err(error) if error.raw_os_error() == Some(Errno::BUSY.raw_os_error()) => {
            let of_init = fs::read_to_string(format!("/proc/{}/cgroup", door.init_pid))?;
            let below = of_init.trim_end().strip_prefix("0::/").filter(|path| !path.contains(".."));
            let below = below.ok_or_else(|| io::Error::other("its first process is in none"))?;
            fs::write(Path::new(crate::boot::CGROUP_ROOT).join(below).join("cgroup.procs"), "0")
        }
        joined => joined,
    }
}

fn join_below(door: &Door, path: &str) -> io::Result<()> {
    let below = Path::new(path.trim_start_matches('/'));
    if !below.components().all(|part| matches!(part, Component::Normal(_) | Component::CurDir)) {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    fs::write(door.cgroup.path().join(below).join("cgroup.procs"), "0")
}

/// In the child's child: becomes the program.
fn finish(door: &Door, process: &Process, files: &Files, reports: &Reports) -> i32 {
    let_go(&reports.number);
    match become_program(door, process, files, reports) {
        Err(sentence) => tell(&reports.failure, &sentence),
    }
}

fn become_program(door: &Door, process: &Process, files: &Files, reports: &Reports) -> Result<Infallible, String> {
    priority::set(process)?;
    rustix::process::setsid().map_err(failed("start a session"))?;
    process::connect(files, reports.console.as_fd(), process, false)?;
    process::settle(process, door.seccomp.as_ref())?;
    program::run(&program::find(process)?, process)
}
