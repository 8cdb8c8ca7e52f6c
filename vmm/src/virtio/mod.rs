//! Virtio devices over MMIO, version 1 of the specification and no earlier.
//!
//! A [`Device`] says what it is and serves its queues; it knows nothing of registers, threads or snapshots. The
//! [`transport`] is the guest's side of it, the registers; the [`worker`] is ours, the thread that calls the device
//! whenever the guest has filled a queue or a descriptor of the device is ready.

pub mod balloon;
pub mod block;
pub mod buffers;
mod config;
#[cfg(any(test, feature = "driver"))]
pub mod driver;
pub mod fs;
mod interrupt;
pub mod net;
mod poller;
mod queue;
pub mod rng;
#[cfg(test)]
mod tests;
pub mod transport;
pub mod vsock;
pub mod worker;

use std::io;
use std::sync::Arc;

use thiserror::Error;

use crate::Memory;
pub use config::ConfigSpace;
pub use interrupt::{Interrupt, Line};
pub use poller::{Poller, Ready};
pub use queue::{Chain, Served, VirtQueue};

/// A kind of device, by its number in the specification's chapter 5.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Kind {
    /// Network card.
    Net = 1,
    /// Disk.
    Block = 2,
    /// Entropy source.
    Entropy = 4,
    /// Memory balloon.
    Balloon = 5,
    /// Socket device.
    Vsock = 19,
    /// File system.
    FileSystem = 26,
}

/// What a device has at hand while it serves: valid from the driver's start to its reset.
#[derive(Debug)]
pub struct Io {
    /// The guest's memory.
    pub memory: Memory,
    /// The queues, as many as [`Device::queue_sizes`] names.
    pub queues: Vec<VirtQueue>,
    /// The features that device and driver agreed on.
    pub features: u64,
    /// Where the device registers descriptors that it waits for.
    pub poller: Poller,
}

/// Why a device cannot go on. The guest is told that the device needs a reset, and whoever runs the machine reads it in
/// the log.
#[derive(Debug, Error)]
pub enum DeviceError {
    /// A queue is not as the specification wants it.
    #[error("the guest's queue {queue} is malformed: {reason}")]
    Queue {
        /// Its index.
        queue: usize,
        /// What is wrong with it.
        reason: virtio_queue::Error,
    },
    /// The host's side of the device failed.
    #[error("cannot {step}")]
    Host {
        /// Completes "cannot …".
        step: &'static str,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// A saved state that is not one of this device.
    #[error("the saved state of a device is damaged: {0}")]
    State(&'static str),
}

impl DeviceError {
    /// For `map_err` behind a system call.
    pub fn host(step: &'static str) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::Host { step, source }
    }
}

/// A virtio device.
///
/// It is asked what it is first; all other calls come from its own thread. None may wait for the guest, nor longer for
/// the host than serving a request takes: while a device is busy, the machine cannot be paused.
pub trait Device: Send {
    /// What it is.
    fn kind(&self) -> Kind;

    /// The largest size of each of its queues, powers of two.
    fn queue_sizes(&self) -> &[u16];

    /// The features that it offers beside those of the transport.
    fn features(&self) -> u64 {
        0
    }

    /// Its configuration space, shared with the registers.
    fn config(&self) -> ConfigSpace {
        ConfigSpace::default()
    }

    /// Whoever serves the device's queues in the place of its thread, if there is somebody.
    fn attendant(&self) -> Option<Arc<dyn Attendant>> {
        None
    }

    /// Begins to serve, or goes on after a pause: registers the device's descriptors with `io.poller`. Queues may
    /// have been filled already; [`Device::queue_ready`] follows for each of them.
    ///
    /// # Errors
    /// [`DeviceError`].
    fn start(&mut self, io: &mut Io) -> Result<(), DeviceError> {
        let _ = io;
        Ok(())
    }

    /// The guest has put buffers into this queue, perhaps.
    ///
    /// # Errors
    /// [`DeviceError`] where the device cannot go on.
    fn queue_ready(&mut self, io: &mut Io, queue: usize) -> Result<(), DeviceError>;

    /// A descriptor that the device has registered is ready.
    ///
    /// # Errors
    /// [`DeviceError`] where the device cannot go on.
    fn descriptor_ready(&mut self, io: &mut Io, ready: Ready) -> Result<(), DeviceError> {
        let _ = (io, ready);
        Ok(())
    }

    /// Finishes what was begun: the queues are about to be taken away, for a pause or for good.
    ///
    /// # Errors
    /// [`DeviceError`] where the device cannot go on.
    fn rest(&mut self, io: &mut Io) -> Result<(), DeviceError> {
        let _ = io;
        Ok(())
    }

    /// Forgets what the driver knew: the guest has reset the device.
    fn reset(&mut self) {}

    /// What a device of the same make needs to go on in this one's place, beside its queues. The device is paused.
    ///
    /// # Errors
    /// [`DeviceError`] where it cannot be saved.
    fn save(&mut self) -> Result<Vec<u8>, DeviceError> {
        Ok(Vec::new())
    }

    /// Takes over from a saved device, before its first start. The state is as untrusted as a guest.
    ///
    /// # Errors
    /// [`DeviceError::State`] where the state is not one of this device.
    fn restore(&mut self, state: &[u8]) -> Result<(), DeviceError> {
        if state.is_empty() { Ok(()) } else { Err(DeviceError::State("there is one where none was expected")) }
    }
}

/// Serves a device's queues in the threads of the guest's processors: what a processor asks for is answered when its
/// notification returns, and no thread has to be woken for it, nor the processor when it is done.
///
/// The processor stands still meanwhile, so this is for requests that are answered in microseconds. What takes longer
/// can be left to the device's thread, by [`VirtQueue::kick`].
pub trait Attendant: Send + Sync {
    /// Prepares the calling thread; once in each that serves, before it is confined.
    ///
    /// # Errors
    /// Where it cannot serve.
    fn enter(&self) -> Result<(), DeviceError>;

    /// The guest has put buffers into this queue, perhaps, and perhaps there is no such queue. Called by several threads
    /// at once.
    ///
    /// # Errors
    /// [`DeviceError`] where the device cannot go on: then nothing is served until it is started again.
    fn attend(&self, queue: usize) -> Result<(), DeviceError>;
}
