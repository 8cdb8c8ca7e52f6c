//! The shared file system: virtio-fs, the specification's section 5.11.
//!
//! The device is a transport for FUSE. What is served, and to which tree its names lead, is the business of whoever gives
//! it a [`FileSystem`]; requests are taken apart by virtiofsd's server, the one that its daemon uses, without its daemon.
//!
//! Requests are served one after another by the device's thread, which costs less than to hand each to another one.
//! So a request that takes its time lets later ones wait, and a pause as well. virtiofsd opens only regular files and
//! directories, never a FIFO or a device that could wait for somebody, and offers no locks that wait; what is left is the
//! host's own slowness in reading and writing.
//!
//! virtiofsd changes the umask and the working folder for a moment when it creates files or sets attributes, so the
//! device's thread has its own: it calls `unshare(CLONE_FS)` when it is first started, which its seccomp filter has to
//! allow. It takes users' identities and drops capabilities by system calls that are for the calling thread alone.

#[cfg(any(test, feature = "driver"))]
pub mod client;
mod guard;
mod letter;
mod state;
#[cfg(test)]
mod tests;

use std::io::Write as _;
use std::mem::size_of;

use rustix::thread::{UnshareFlags, unshare_unsafe};
use thiserror::Error;
use virtiofsd::Error as FuseError;
use virtiofsd::filesystem::{FileSystem, SerializableFileSystem};
use virtiofsd::fuse::{InHeader, OutHeader};
use virtiofsd::server::Server;
use vm_memory::ByteValued as _;

use super::buffers::IoMemory;
use super::{Chain, ConfigSpace, Device, DeviceError, Io, Kind, Served};
use guard::{Guard, Session};
use letter::Letter;

/// The longest tag, in bytes.
pub const MAX_TAG: usize = 36;

/// For requests that nothing answers: forgotten inodes, interruptions.
const URGENT_QUEUE_SIZE: u16 = 128;

/// For all others. A request's pages each take a buffer, and Linux makes its requests no larger than a queue is long,
/// less four: this one lets it have the whole megabyte that virtiofsd grants it, and more than one system call takes.
const REQUEST_QUEUE_SIZE: u16 = super::buffers::MAX_BUFFERS;

/// The first is the urgent one. One thread serves them all, so more of them would serve nobody.
const QUEUES: [u16; 2] = [URGENT_QUEUE_SIZE, REQUEST_QUEUE_SIZE];

/// How many requests are served before the guest is told and the machine may be paused. Requests of a megabyte are no
/// rarity, and whoever waits for the first one should not wait for all of a full queue.
const BATCH: u16 = 16;

/// The largest request, and the largest answer, in bytes: the megabyte that virtiofsd grants, and the headers before it.
/// What a chain has beyond is left alone, lest a single one keep the device for as long as gigabytes take.
const MAX_MESSAGE: usize = (1 << 20) + 4096;

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
pub struct Fs<F: FileSystem + Sync> {
    server: Server<Guard<F>>,
    session: Session,
    config: ConfigSpace,
    memory: Option<IoMemory>,
    /// Takes answers for which the guest has left no room.
    nowhere: Letter,
    /// Whether the device's thread has its own umask and working folder.
    apart: bool,
}

impl<F: FileSystem + SerializableFileSystem + Send + Sync + 'static> Fs<F> {
    /// A device that serves `served` to whoever mounts `tag`.
    ///
    /// # Errors
    /// [`FsError`].
    pub fn new(tag: &str, served: F) -> Result<Self, FsError> {
        if tag.is_empty() || tag.len() > MAX_TAG {
            return Err(FsError::Tag(tag.to_owned()));
        }
        let mut config = tag.as_bytes().to_vec();
        config.resize(MAX_TAG, 0);
        let request_queues = QUEUES.len() as u32 - 1;
        config.extend(request_queues.to_le_bytes());
        let session = Session::default();
        Ok(Self {
            server: Server::new(Guard::new(served, session.clone())),
            session,
            config: ConfigSpace::new(config),
            memory: None,
            nowhere: Letter::new(&[])?,
            apart: false,
        })
    }

    /// Serves a request; how much was written into it.
    fn serve(&self, memory: &IoMemory, chain: &Chain) -> u32 {
        let Ok((mut reader, mut writer)) = memory.buffers(chain) else { return 0 };
        // Each keeps what is before; the rest is dropped here, and there may be none.
        let _ = (reader.split_at(MAX_MESSAGE), writer.split_at(MAX_MESSAGE));
        // The server takes it for granted that there is room for an answer's header, but there is none where the guest
        // wants no answer.
        let served = if writer.available_bytes() < size_of::<OutHeader>() {
            let Ok(nowhere) = self.nowhere.writer() else { return 0 };
            self.server.handle_message(reader, nowhere, None::<&mut ()>).map(|_| 0)
        } else {
            self.server.handle_message(reader, writer, None::<&mut ()>)
        };
        match served {
            Ok(written) => u32::try_from(written).unwrap_or(0),
            Err(error) => refuse(memory, chain, &error).unwrap_or(0),
        }
    }
}

/// Answers a request that the server can make nothing of, or whose answer it has no room for.
fn refuse(memory: &IoMemory, chain: &Chain, error: &FuseError) -> Option<u32> {
    tracing::debug!("the guest's request to its file system is malformed: {error}");
    let (mut reader, mut writer) = memory.buffers(chain).ok()?;
    let errno = match error {
        FuseError::EncodeMessage(_) | FuseError::FlushMessage(_) => libc::EIO,
        _ => libc::EINVAL,
    };
    let length = size_of::<OutHeader>() as u32;
    let header: InHeader = reader.read_obj().ok()?;
    let answer = OutHeader { len: length, error: -errno, unique: header.unique };
    writer.write_all(answer.as_slice()).ok()?;
    Some(length)
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

    fn start(&mut self, io: &mut Io) -> Result<(), DeviceError> {
        if !self.apart {
            // SAFETY: the table of descriptors stays shared.
            unsafe { unshare_unsafe(UnshareFlags::FS) }
                .map_err(|errno| DeviceError::host("give a thread its own working folder")(errno.into()))?;
            self.apart = true;
        }
        self.memory = Some(IoMemory::new(&io.memory)?);
        Ok(())
    }

    fn queue_ready(&mut self, io: &mut Io, queue: usize) -> Result<(), DeviceError> {
        let Some(memory) = &self.memory else { return Ok(()) };
        let guest = io.memory.clone();
        io.queues[queue].drain_some(&guest, BATCH, |chain| Ok(Served::Done(self.serve(memory, &chain))))
    }

    fn reset(&mut self) {
        self.server.destroy();
    }

    fn save(&mut self) -> Result<Vec<u8>, DeviceError> {
        self.session.capable().map_or(Ok(Vec::new()), |capable| state::save(&self.server, capable))
    }

    fn restore(&mut self, saved: &[u8]) -> Result<(), DeviceError> {
        if saved.is_empty() {
            return Ok(());
        }
        state::restore(&self.server, saved).inspect_err(|_| {
            self.server.destroy();
        })
    }
}
