//! The making of a container: its cgroup, and its first process, a copy of PID 1 that goes its own way (see
//! [`super::init`]) since it waits, changes what it runs in, and may hang on a file system of the container's.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd as _, OwnedFd};
use std::time::Duration;

use libcontainer::oci_spec::runtime::Spec;
use rustix::pipe::PipeFlags;
use rustix::process::Pid;
use tokio::sync::watch;

use super::cgroup::Cgroup;
use super::company::Company;
use super::init::{self, READY, Reins};
use super::process::{Stdio, child_log, console, hear, receive_file, report};
use super::spec::SpecError;
use crate::child::{self, Birthplace};
use crate::error::RequestError;
use crate::log;
use crate::reaper::{Exit, Reaper};

/// How long a start waits for its program to be loaded.
const START_PATIENCE: Duration = Duration::from_secs(10);

/// A container whose program is ready to run.
pub(super) struct Created {
    pub(super) init: Pid,
    pub(super) exit: Exit,
    pub(super) master: Option<OwnedFd>,
    pub(super) starter: Starter,
}

/// What lets a container's first process go on to its program.
pub(super) struct Starter {
    go: OwnedFd,
    /// Whether the program has taken the process over, or the process has ended before.
    running: watch::Receiver<bool>,
}

/// Creates the container.
pub(super) async fn create(
    reaper: &Reaper,
    id: &str,
    cgroup: &Cgroup,
    spec: &Spec,
    company: &Company,
    stdio: Stdio,
) -> Result<Created, RequestError> {
    let linux = spec.linux().as_ref().ok_or(SpecError::Missing("linux"))?;
    cgroup.create(linux.resources().as_ref()).map_err(RequestError::Program)?;
    let place = File::open(cgroup.path()).map_err(RequestError::system("open the container's cgroup"))?;
    let place = Birthplace {
        namespaces: init::birth_namespaces(linux, company),
        pid_namespace: company.pid_namespace(),
        cgroup: place.as_fd(),
    };
    let (mut said, report) = report().map_err(RequestError::system("make a pipe"))?;
    let (go_end, go) = rustix::pipe::pipe_with(PipeFlags::CLOEXEC).map_err(RequestError::system("make a pipe"))?;
    let (console, console_end) = console().map_err(RequestError::system("make a socket"))?;
    let (log, log_end) = child_log().map_err(RequestError::system("make a pipe"))?;
    let reins = Reins { report, go: go_end, console: console_end };
    let mut keep = vec![reins.report.as_fd(), reins.go.as_fd(), reins.console.as_fd()];
    keep.extend(stdio.ends());
    keep.extend(company.descriptor());
    let init = child::fork_into(&place, log_end, &keep, || init::live(id, spec, company, &stdio, &reins));
    drop(keep);
    drop((reins, stdio));
    let init = init.map_err(RequestError::system("start a process"))?;
    let exit = reaper.watch(init);
    let (sender, running) = watch::channel(false);
    tokio::spawn(async move {
        // The last to hold the pipe is the process that becomes the program.
        log::adopt(log).await;
        sender.send_replace(true);
    });
    match hear(&mut said).await.map_err(RequestError::system("hear from the process"))?.as_str() {
        READY => {}
        "" => return Err(RequestError::Program("the container's first process died while it was made".into())),
        sentence => return Err(RequestError::Program(sentence.into())),
    }
    let has_terminal = spec.process().as_ref().and_then(|process| process.terminal()).unwrap_or_default();
    let master = has_terminal.then(|| receive_file(&console)).transpose();
    let master = master.map_err(RequestError::system("receive the terminal"))?;
    Ok(Created { init, exit, master, starter: Starter { go, running } })
}

impl Starter {
    /// Lets the program run, and waits until it does: what is sent to it from now on is the program's, which sees to its
    /// signals sooner than a further step of ours would.
    pub(super) async fn start(&self) -> io::Result<()> {
        rustix::io::write(&self.go, b"g")?;
        let mut running = self.running.clone();
        // A program on a file system that hangs is started all the same.
        let _ = tokio::time::timeout(START_PATIENCE, running.wait_for(|running| *running)).await;
        Ok(())
    }
}
