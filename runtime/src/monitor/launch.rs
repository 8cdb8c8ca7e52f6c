//! Starting a monitor or an exec's proxy: this program again, with the caller's stdio and its end of the handshake.

use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::process::{Child, Command};

use command_fds::{CommandFdExt as _, FdMapping};

use super::handshake::{DESCRIPTOR, PRESERVED, Started, ToOwner};
use crate::error::{Error, Result};
use crate::host::process::{ProcessIdentity, own_program};
use crate::log;
use crate::vmm;

/// The options that come before every verb, and are handed down.
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

impl Globals {
    /// This program with these options.
    pub fn command(&self) -> Command {
        let mut command = own_program();
        command.arg("--root").arg(&self.root);
        self.vm.hand_down(&mut command);
        self.log.hand_down(&mut command);
        if let Some(file) = &self.guest_console {
            command.arg("--guest-console").arg(file);
        }
        command
    }
}

/// A started monitor or proxy.
#[derive(Debug)]
pub struct Launched {
    /// The process.
    pub child: Child,
    /// The same, for records.
    pub identity: ProcessIdentity,
    started: Started,
}

impl Launched {
    /// Starts `command`, which is a hidden verb of this program, with these descriptors of its caller's.
    ///
    /// # Errors
    /// [`Error::System`].
    pub fn start(mut command: Command, preserved: Vec<OwnedFd>) -> Result<Self> {
        let (started, theirs) = Started::pair().map_err(Error::system("make a socket"))?;
        if !preserved.is_empty() {
            command.arg("--preserve-fds").arg(preserved.len().to_string());
        }
        let preserved = preserved.into_iter().zip(PRESERVED..);
        let mappings =
            preserved.chain([(theirs, DESCRIPTOR)]).map(|(parent_fd, child_fd)| FdMapping { parent_fd, child_fd });
        command
            .fd_mappings(mappings.collect())
            .map_err(|error| Error::system("hand down a socket")(std::io::Error::other(error)))?;
        let child = command.spawn().map_err(Error::system("start the monitor"))?;
        // The command holds the child's end of the socket open; with it this side would never see the child's end.
        drop(command);
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

    /// Lets the process go on once it is ready, with what else it must know.
    pub fn go(&mut self, parcel: &[u8]) {
        // Where it has ended in the meantime, its last message says why.
        let _ = self.started.go(parcel);
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

    /// Ends the process.
    pub fn kill(&mut self) {
        // One that has ended needs no killing.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn unexpected(message: &ToOwner) -> Error {
    Error::MonitorDied(format!(": it said {message:?} out of turn"))
}
