//! The making of a container: its cgroup, and its first process, a copy of PID 1 that goes its own way (see
//! [`super::init`]) since it waits, changes what it runs in, and may hang on a file system of the container's.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd as _, OwnedFd};
use std::time::Duration;

use libcontainer::oci_spec::runtime::Spec;
use rustix::net::{AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SocketFlags, SocketType};
use rustix::pipe::PipeFlags;
use rustix::process::Pid;
use tokio::net::unix::pipe;
use tokio::sync::watch;

use super::cgroup::Cgroup;
use super::init::{self, READY, Reins};
use super::process::{Stdio, hear, report};
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
    stdio: Stdio,
) -> Result<Created, RequestError> {
    let linux = spec.linux().clone().unwrap_or_default();
    cgroup.create(linux.resources().as_ref()).map_err(RequestError::Program)?;
    let place = File::open(cgroup.path()).map_err(RequestError::system("open the container's cgroup"))?;
    let place = Birthplace { namespaces: init::namespaces(&linux), cgroup: place.as_fd() };
    let (mut said, report) = report().map_err(RequestError::system("make a pipe"))?;
    let (go_end, go) = rustix::pipe::pipe_with(PipeFlags::CLOEXEC).map_err(RequestError::system("make a pipe"))?;
    let (console, console_end) =
        rustix::net::socketpair(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None)
            .map_err(RequestError::system("make a socket"))?;
    let (log, log_end) = child_log().map_err(RequestError::system("make a pipe"))?;
    let reins = Reins { report, go: go_end, console: console_end };
    let mut keep = vec![reins.report.as_fd(), reins.go.as_fd(), reins.console.as_fd()];
    if let Stdio::Pipes(ends) = &stdio {
        keep.extend([ends.stdin.as_fd(), ends.stdout.as_fd(), ends.stderr.as_fd()]);
    }
    let init = child::fork_into(&place, log_end, &keep, || init::live(id, spec, &stdio, &reins));
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

/// A pipe for a child's log.
pub(super) fn child_log() -> io::Result<(pipe::Receiver, OwnedFd)> {
    let (read, write) = rustix::pipe::pipe_with(PipeFlags::CLOEXEC | PipeFlags::NONBLOCK)?;
    Ok((pipe::Receiver::from_owned_fd(read)?, write))
}

/// Receives one open file.
pub(super) fn receive_file(socket: impl std::os::fd::AsFd) -> io::Result<OwnedFd> {
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
