//! The shared file system: virtio-fs, the specification's section 5.11.
//!
//! The device is a transport for FUSE. What is served, and to which tree its names lead, is the business of whoever gives
//! it a [`FileSystem`]; requests are taken apart by virtiofsd's server, the one that its daemon uses, without its daemon.
//!
//! Requests are answered by the processor that tells of them, or else by the device's thread: see `desk`, and `lookout` for
//! when that thread does not wait to be told. So a request that takes its time lets its processor wait, and a pause as
//! well. virtiofsd opens only regular files and directories, never a FIFO or a device that could wait for somebody, and
//! offers no locks that wait; what is left is the host's own slowness in reading and writing.
//!
//! virtiofsd changes the umask and the working folder for a moment when it creates files or sets attributes, so each
//! thread that serves has its own: it calls `unshare(CLONE_FS)` first, which the seccomp filter of the device's has to
//! allow. It takes users' identities and drops capabilities by system calls that are for the calling thread alone.

#[cfg(any(test, feature = "driver"))]
pub mod client;
mod desk;
mod guard;
mod letter;
mod lookout;
mod readers;
mod state;
#[cfg(test)]
mod tests;

use std::sync::Arc;

use rustix::thread::{UnshareFlags, unshare_unsafe};
use thiserror::Error;
use virtiofsd::filesystem::{FileSystem, SerializableFileSystem};
use virtiofsd::server::Server;

use super::{Attendant, ConfigSpace, Device, DeviceError, Io, Kind};
use desk::Desk;
use guard::{Guard, Session};
use lookout::{Lookout, Spans};

/// The longest tag, in bytes.
pub const MAX_TAG: usize = 36;

/// For requests that nothing answers: forgotten inodes, interruptions.
const URGENT_QUEUE_SIZE: u16 = 128;

/// For all others. A request's pages each take a buffer, and Linux makes its requests no larger than a queue is long,
/// less four: this one lets it have the whole megabyte that virtiofsd grants it, and more than one system call takes.
const REQUEST_QUEUE_SIZE: u16 = super::buffers::MAX_BUFFERS;

/// The first is the urgent one. All processors share the other: a request takes no longer in it than in one of its own.
const QUEUES: [u16; 2] = [URGENT_QUEUE_SIZE, REQUEST_QUEUE_SIZE];

/// The queue of all requests but the urgent ones.
const REQUESTS: usize = 1;

/// A tag that a guest cannot mount by, or no memory.
#[derive(Debug, Error)]
pub enum FsError {
    /// Its length is wrong.
    #[error("the tag \"{0}\" of a shared file system is empty or longer than {MAX_TAG} bytes")]
    Tag(String),
    /// The host has no memory.
    #[error(transparent)]
    Device(#[from] DeviceError),
}

/// A virtio-fs device.
pub struct Fs<F: FileSystem + Send + Sync> {
    desk: Arc<Desk<F>>,
    session: Session,
    config: ConfigSpace,
    /// Whether the device's thread has its own umask and working folder.
    apart: bool,
}

impl<F: FileSystem + SerializableFileSystem + Send + Sync + 'static> Fs<F> {
    /// A device that serves `served` to whoever mounts `tag`.
    ///
    /// # Errors
    /// [`FsError`].
    pub fn new(tag: &str, served: F) -> Result<Self, FsError> {
        Self::build(tag, served, None)
    }

    /// One whose thread looks for requests by itself while there are many, where another processor of the host's has
    /// nothing to do: for hosts on which it takes long to be told.
    ///
    /// # Errors
    /// [`FsError`].
    pub fn with_lookout(tag: &str, served: F) -> Result<Self, FsError> {
        Self::build(tag, served, Some(Lookout::new(Spans::default())))
    }

    fn build(tag: &str, served: F, lookout: Option<Lookout>) -> Result<Self, FsError> {
        if tag.is_empty() || tag.len() > MAX_TAG {
            return Err(FsError::Tag(tag.to_owned()));
        }
        let mut config = tag.as_bytes().to_vec();
        config.resize(MAX_TAG, 0);
        let request_queues = QUEUES.len() as u32 - 1;
        config.extend(request_queues.to_le_bytes());
        let session = Session::default();
        let desk = Arc::new(Desk::new(Server::new(Guard::new(served, session.clone())), lookout)?);
        Ok(Self { desk, session, config: ConfigSpace::new(config), apart: false })
    }
}

/// Gives the calling thread an umask and a working folder of its own.
fn apart() -> Result<(), DeviceError> {
    // SAFETY: the table of descriptors stays shared.
    unsafe { unshare_unsafe(UnshareFlags::FS) }
        .map_err(|errno| DeviceError::host("give a thread its own working folder")(errno.into()))
}

impl<F: FileSystem + SerializableFileSystem + Send + Sync + 'static> Device for Fs<F> {
    fn kind(&self) -> Kind {
        Kind::FileSystem
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUES
    }

    fn config(&self) -> ConfigSpace {
        self.config.clone()
    }

    fn attendant(&self) -> Option<Arc<dyn Attendant>> {
        Some(self.desk.clone())
    }

    fn start(&mut self, io: &mut Io) -> Result<(), DeviceError> {
        if !self.apart {
            apart()?;
            self.apart = true;
        }
        self.desk.open(io)
    }

    fn queue_ready(&mut self, _: &mut Io, queue: usize) -> Result<(), DeviceError> {
        self.desk.work(queue)
    }

    fn rest(&mut self, _: &mut Io) -> Result<(), DeviceError> {
        self.desk.clear()
    }

    fn reset(&mut self) {
        self.desk.close();
        self.desk.server.destroy();
    }

    fn save(&mut self) -> Result<Vec<u8>, DeviceError> {
        self.session.capable().map_or(Ok(Vec::new()), |capable| state::save(&self.desk.server, capable))
    }

    fn restore(&mut self, saved: &[u8]) -> Result<(), DeviceError> {
        if saved.is_empty() {
            return Ok(());
        }
        state::restore(&self.desk.server, saved).inspect_err(|_| {
            self.desk.server.destroy();
        })
    }
}
