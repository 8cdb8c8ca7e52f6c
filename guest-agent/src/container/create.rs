//! The making of a container: its cgroup, and its first process, a copy of PID 1 that goes its own way (see
//! [`super::init`]) since it waits, changes what it runs in, and may hang on a file system of the container's.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd as _, OwnedFd};
use std::time::Duration;

use libcontainer::oci_spec::runtime::Spec;
use rustix::pipe::PipeFlags;
use rustix::process::Pid;
use tokio::io::AsyncReadExt as _;
use tokio::sync::watch;

use super::cgroup::Cgroup;
use super::company::Company;
use super::delegation::delegate;
use super::init::{self, READY, Reins};
use super::process::{Files, child_log, console, hear, receive_file, report};
use super::spec::SpecError;
use crate::child::{self, Birthplace};
use crate::error::RequestError;
use crate::log;
use crate::reaper::{Exit, Reaper};
use crate::user_namespace::UserNamespace;

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
    files: Files,
) -> Result<Created, RequestError> {
    let linux = spec.linux().as_ref().ok_or(SpecError::Missing("linux"))?;
    let user_namespace = company.user_namespace().map(AsRef::as_ref);
    cgroup.create(linux.resources().as_ref()).map_err(RequestError::Program)?;
    delegate(cgroup.path(), spec, user_namespace)
        .map_err(RequestError::system("give the container's cgroup to its user"))?;
    let place = File::open(cgroup.path()).map_err(RequestError::system("open the container's cgroup"))?;
    let (mut said, report_end) = report().map_err(RequestError::system("make a pipe"))?;
    let (mut number, number_end) = report().map_err(RequestError::system("make a pipe"))?;
    let (go_end, go) = rustix::pipe::pipe_with(PipeFlags::CLOEXEC).map_err(RequestError::system("make a pipe"))?;
    let (console, console_end) = console().map_err(RequestError::system("make a socket"))?;
    let (log, log_end) = child_log().map_err(RequestError::system("make a pipe"))?;
    let reins = Reins { report: report_end, go: go_end, console: console_end, number: number_end };
    let mut keep = vec![reins.report.as_fd(), reins.go.as_fd(), reins.console.as_fd(), reins.number.as_fd()];
    keep.extend(files.ends());
    keep.extend(company.descriptor());
    keep.extend(user_namespace.map(UserNamespace::as_fd));
    let expected = reaper.expect();
    let namespaces = init::birth_namespaces(linux, company);
    let place = Birthplace {
        namespaces: if user_namespace.is_some() { 0 } else { namespaces },
        pid_namespace: company.pid_namespace(),
        cgroup: place.as_fd(),
    };
    let born = child::fork_into(&place, log_end, &keep, || match user_namespace {
        None => init::live(id, spec, company, &files, &reins),
        Some(user_namespace) => init::precede(user_namespace.as_fd(), namespaces, spec, &reins, || {
            init::live_within(id, spec, company, &files, &reins)
        }),
    });
    drop(keep);
    drop((reins, files));
    let born = born.map_err(RequestError::system("start a process"))?;
    let init = match user_namespace {
        None => Ok(born),
        // It is the one that the first process has told of, if it came so far.
        Some(_) => number.read_i32().await.and_then(|pid| Pid::from_raw(pid).ok_or(io::ErrorKind::InvalidData.into())),
    };
    let first = init.map(|init| (init, expected.fulfil(init)));
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
    let (init, exit) = first.map_err(RequestError::system("hear from the process"))?;
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
