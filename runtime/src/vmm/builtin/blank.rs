//! A VM's process before it knows what to make.
//!
//! A program of this size takes a millisecond to begin. Whoever will want a machine can have its process begin meanwhile,
//! before it can say which machine that is to be.

use std::io::{self, ErrorKind};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream as BlockingStream;
use std::process::Stdio;
use std::sync::Arc;

use tokio::io::{AsyncBufReadExt as _, AsyncReadExt as _, BufReader};
use tokio::net::UnixStream;
use tokio::process::{Child, Command};

use super::VERB;
use super::description::{Description, Report};
use crate::host::cgroup::Cgroup;
use crate::host::process::{ProcessIdentity, end_with_owner, own_program, send_elsewhere};
use crate::log;
use crate::vmm::{Options, VmmError, settle};

/// The longest report, in bytes: an error with a path in it.
const MAX_REPORT: u64 = 16 << 10;

/// A process that is to have a machine. It ends when this is dropped, and with the thread that started it.
#[derive(Debug)]
pub struct Blank {
    // Dropped in this order: it has nothing to say about being told nothing.
    pub(super) process: Child,
    pub(super) identity: ProcessIdentity,
    pub(super) control: UnixStream,
}

impl Blank {
    /// Starts one, within a runtime, if machines are the built-in VMM's as far as can be told yet.
    ///
    /// # Errors
    /// [`VmmError::Start`], [`VmmError::Cgroup`].
    pub fn ahead(vm: &Options, log: &log::Options, cgroup: Option<&Arc<Cgroup>>) -> Result<Option<Self>, VmmError> {
        vm.promise_builtin().then(|| Self::start(log, cgroup)).transpose()
    }

    /// Starts it, within a runtime, in this cgroup where that is not this process's own.
    ///
    /// # Errors
    /// [`VmmError::Start`], [`VmmError::Cgroup`].
    pub(super) fn start(log: &log::Options, cgroup: Option<&Arc<Cgroup>>) -> Result<Self, VmmError> {
        let (control, theirs) = BlockingStream::pair().map_err(VmmError::Start)?;
        let mut program = own_program();
        settle(&mut program, cgroup)?;
        log.hand_down_as_stderr(&mut program).map_err(VmmError::Start)?;
        program.arg(VERB).stdin(OwnedFd::from(theirs)).stdout(Stdio::null());
        end_with_owner(&mut program);
        let process = Command::from(program).kill_on_drop(true).spawn().map_err(VmmError::Start)?;
        let identity = process.id().and_then(ProcessIdentity::of);
        let identity = identity.ok_or_else(|| VmmError::Start(io::Error::other("it ended at once")))?;
        send_elsewhere(identity);
        control.set_nonblocking(true).map_err(VmmError::Start)?;
        let control = UnixStream::from_std(control).map_err(VmmError::Start)?;
        Ok(Self { process, identity, control })
    }

    /// Tells it what to make, and of what.
    pub(super) async fn tell(&mut self, description: &Description, descriptors: &[OwnedFd]) -> Result<(), VmmError> {
        let told = description.send(&mut self.control, descriptors).await;
        match told.as_ref().map_err(io::Error::kind) {
            // Where it has ended in the meantime, its report is missing, which is the better story.
            Err(ErrorKind::BrokenPipe | ErrorKind::ConnectionReset | ErrorKind::NotConnected) => Ok(()),
            _ => told.map_err(VmmError::Start),
        }
    }

    /// Waits for its report; none where it ended without one.
    pub(super) async fn report(&mut self) -> Result<Option<Report>, VmmError> {
        let mut report = Vec::new();
        // No more than the line: what follows is for later.
        let mut reader = BufReader::with_capacity(1, (&mut self.control).take(MAX_REPORT));
        reader.read_until(b'\n', &mut report).await.map_err(VmmError::Start)?;
        Ok(serde_json::from_slice(&report).ok())
    }
}
