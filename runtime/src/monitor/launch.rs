//! Starting a monitor or an exec's proxy: a copy of the command that does so, with its stdio.

use std::os::fd::{AsRawFd, OwnedFd};
use std::path::PathBuf;

use super::handshake::{Owner, Started, ToOwner};
use crate::error::{Error, Result};
use crate::host::fork::Forked;
use crate::host::process::ProcessIdentity;
use crate::log;
use crate::vmm;

/// The options that come before every verb.
#[derive(Clone, Debug)]
pub struct Globals {
    /// The state root.
    pub root: PathBuf,
    /// Where the log goes.
    pub log: log::Options,
    /// What is asked of the VM.
    pub vm: vmm::Options,
    /// Where guests' consoles are written.
    pub guest_console: Option<PathBuf>,
}

/// A started monitor or proxy.
#[derive(Debug)]
pub struct Launched {
    /// The process.
    pub child: Forked,
    /// The same, for records.
    pub identity: ProcessIdentity,
    started: Started,
}

impl Launched {
    /// Starts a process that does `work` with its end of the handshake and these descriptors of its caller's, and ends with
    /// the status that this returns.
    ///
    /// # Errors
    /// [`Error::System`].
    pub fn start(preserved: Vec<OwnedFd>, work: impl FnOnce(Owner, Vec<OwnedFd>) -> u8) -> Result<Self> {
        let (started, theirs) = Started::pair().map_err(Error::system("make a socket"))?;
        let mut keep: Vec<_> = preserved.iter().map(AsRawFd::as_raw_fd).collect();
        keep.push(theirs.as_raw_fd());
        let child = Forked::start(&keep, || work(Owner::new(theirs), preserved));
        let child = child.map_err(Error::system("start the monitor"))?;
        let identity =
            ProcessIdentity::of(child.id()).ok_or_else(|| Error::MonitorDied(" before it began".to_owned()))?;
        Ok(Self { child, identity, started })
    }

    /// Waits for the process's `Ready`.
    ///
    /// # Errors
    /// The process's own, or [`Error::MonitorDied`].
    pub fn await_ready(&mut self) -> Result<()> {
        match self.receive()? {
            ToOwner::Ready => Ok(()),
            other => Err(unexpected(&other)),
        }
    }

    /// Lets the process go on once it is ready.
    pub fn go(&mut self) {
        // Where it has ended in the meantime, its last message says why.
        let _ = self.started.go();
    }

    /// Waits until the process has created what it is for; the further processes of the VM.
    ///
    /// # Errors
    /// The process's own, or [`Error::MonitorDied`].
    pub fn await_created(&mut self) -> Result<Vec<ProcessIdentity>> {
        match self.receive()? {
            ToOwner::Created { helpers } => Ok(helpers),
            other => Err(unexpected(&other)),
        }
    }

    fn receive(&mut self) -> Result<ToOwner> {
        match self.started.receive().map_err(Error::system("listen to the monitor"))? {
            Some(ToOwner::Failed { message }) => Err(Error::Monitor(message)),
            Some(message) => Ok(message),
            None => {
                let status = self.child.wait().map(|status| format!(" ({status})")).unwrap_or_default();
                Err(Error::MonitorDied(status))
            }
        }
    }
}

fn unexpected(message: &ToOwner) -> Error {
    Error::MonitorDied(format!(": it said {message:?} out of turn"))
}
