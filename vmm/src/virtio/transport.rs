//! Virtio over MMIO: the registers that a guest's driver sees. Register numbers and rules are those of the
//! specification's section 4.2.

use std::io;
use std::sync::Arc;

use thiserror::Error;
use virtio_bindings::virtio_config::{
    VIRTIO_CONFIG_S_ACKNOWLEDGE, VIRTIO_CONFIG_S_DRIVER, VIRTIO_CONFIG_S_DRIVER_OK, VIRTIO_CONFIG_S_FEATURES_OK,
    VIRTIO_CONFIG_S_NEEDS_RESET, VIRTIO_F_VERSION_1,
};
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use virtio_queue::{Queue, QueueState, QueueT as _};
use vm_memory::{Bytes as _, GuestAddress};

use super::worker::Worker;
use super::{Attendant, ConfigSpace, Device, DeviceError, Interrupt, Io, Kind, Line, Poller, VirtQueue};
use crate::confinement::Confinement;
use crate::{Event, Memory};

/// How much of the guest's address space a device's registers take.
pub const SIZE: u64 = 0x1000;
/// Where a driver writes the number of a queue that it has filled.
pub const QUEUE_NOTIFY: u64 = 0x50;

/// The feature by which a device says that its configuration never changes, and a driver that it takes each interrupt
/// for its queues': then used buffers leave nothing in InterruptStatus that would have to be read and acknowledged.
///
/// Linux knows it by `kernel/patches/0005-virtio-mmio-look-at-the-queues-when-interrupted.patch`, of devices of our
/// vendor's number. It is one of the bits that the specification keeps for later. A device that fails still sets its
/// bit: the driver reads it when no queue has anything.
pub const QUEUE_INTERRUPTS: u64 = 1 << 49;

/// Where a driver tells of a list of accesses, by its address in units of its size: a register that the specification leaves
/// alone.
///
/// Linux does so by `kernel/patches/0015-virtio-mmio-set-a-device-up-with-fewer-accesses.patch`, with devices of our
/// vendor's number.
pub const LIST: u64 = 0xf8;
/// How many bytes a list takes: how many accesses follow, in four bytes, four of nothing, and the accesses, in eight each.
pub const LIST_SIZE: usize = 512;
/// What an access has in its register's place, besides, that reads.
pub const LISTED_READ: u32 = 1 << 31;

/// "virt", little endian.
const MAGIC: u32 = 0x7472_6976;
const VERSION: u32 = 2;
/// "RNVM".
const VENDOR: u32 = 0x4d56_4e52;
const CONFIG: u64 = 0x100;

const TRANSPORT_FEATURES: u64 =
    1 << VIRTIO_F_VERSION_1 | 1 << VIRTIO_RING_F_EVENT_IDX | 1 << VIRTIO_RING_F_INDIRECT_DESC;

/// The bits of the status that are a driver's to set.
const STATUS: u32 =
    VIRTIO_CONFIG_S_ACKNOWLEDGE | VIRTIO_CONFIG_S_DRIVER | VIRTIO_CONFIG_S_FEATURES_OK | VIRTIO_CONFIG_S_DRIVER_OK;

/// A device that cannot be offered to a guest.
#[derive(Debug, Error)]
pub enum TransportError {
    /// No thread, no descriptor.
    #[error("cannot set up the device {0:?}")]
    Setup(Kind, #[source] io::Error),
    /// A queue's size is not one.
    #[error("the device {0:?} has a queue of an impossible size")]
    QueueSize(Kind),
    /// The device refuses the state, or cannot give its own.
    #[error(transparent)]
    Device(#[from] DeviceError),
    /// It panicked.
    #[error("the device {0:?} is gone")]
    Gone(Kind),
    /// What was saved is not of this device.
    #[error("the saved state of the device {0:?} is damaged: {1}")]
    State(Kind, &'static str),
}

/// A device as the guest sees it.
pub struct Transport {
    kind: Kind,
    offered: u64,
    worker: Worker,
    attendant: Option<Arc<dyn Attendant>>,
    config: ConfigSpace,
    memory: Memory,
    interrupt: Interrupt,
    kicks: Vec<Event>,
    registers: Registers,
    /// The queues, while no driver has them served.
    queues: Vec<Queue>,
}

/// What the driver has written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
struct Registers {
    status: u32,
    device_features_select: u32,
    driver_features_select: u32,
    driver_features: u64,
    queue_select: u32,
}

/// A device at rest, ready to be written to a file. Nothing in it is believed when it comes back.
#[derive(Clone, Debug, serde::Serialize, serde::Deserialize)]
pub struct SavedTransport {
    kind: u32,
    registers: Registers,
    reasons: u32,
    queues: Vec<SavedQueue>,
    config: Vec<u8>,
    device: Vec<u8>,
}

#[derive(Clone, Copy, Debug, serde::Serialize, serde::Deserialize)]
struct SavedQueue(#[serde(with = "QueueStateFields")] QueueState);

/// The fields of [`QueueState`], which knows nothing of serde.
#[derive(serde::Serialize, serde::Deserialize)]
#[serde(remote = "QueueState")]
struct QueueStateFields {
    max_size: u16,
    next_avail: u16,
    next_used: u16,
    event_idx_enabled: bool,
    size: u16,
    ready: bool,
    desc_table: u64,
    avail_ring: u64,
    used_ring: u64,
}

impl Transport {
    /// Offers a device that interrupts by `line`, and whose thread is `confinement`'s first: [`Transport::ready`] tells
    /// when it has done its part.
    ///
    /// # Errors
    /// [`TransportError`].
    pub fn new(
        device: Box<dyn Device>,
        memory: Memory,
        line: Arc<dyn Line>,
        confinement: Confinement,
    ) -> Result<Self, TransportError> {
        let kind = device.kind();
        let setup = |error| TransportError::Setup(kind, error);
        let queues = device.queue_sizes().iter().map(|&size| Queue::new(size)).collect::<Result<Vec<_>, _>>();
        let queues = queues.map_err(|_| TransportError::QueueSize(kind))?;
        let kicks = queues.iter().map(|_| Event::new()).collect::<io::Result<Vec<_>>>().map_err(setup)?;
        let config = device.config();
        let constant = if config.is_changing() { 0 } else { QUEUE_INTERRUPTS };
        let offered = device.features() | TRANSPORT_FEATURES | constant;
        let interrupt = Interrupt::new(line);
        let attendant = device.attendant();
        let worker = Worker::spawn(device, confinement).map_err(setup)?;
        let registers = Registers::default();
        Ok(Self { kind, offered, worker, attendant, config, memory, interrupt, kicks, registers, queues })
    }

    /// Waits until the device's thread is confined; to be called once.
    ///
    /// # Errors
    /// Where it cannot be.
    pub fn ready(&self) -> Result<(), TransportError> {
        self.worker.ready().map_err(|error| TransportError::Setup(self.kind, error))
    }

    /// The device's kind.
    pub fn kind(&self) -> Kind {
        self.kind
    }

    /// For each queue what KVM writes when the queue's number is written to [`QUEUE_NOTIFY`]; none where there is an
    /// attendant.
    pub fn kicks(&self) -> &[Event] {
        if self.attendant.is_some() { &[] } else { &self.kicks }
    }

    /// Whoever is to be called when the queue's number is written to [`QUEUE_NOTIFY`], if there is somebody.
    pub fn attendant(&self) -> Option<Arc<dyn Attendant>> {
        self.attendant.clone()
    }

    /// The attendant could not go on.
    pub fn fail(&self, error: &DeviceError) {
        self.worker.fail(self.kind, error);
        self.interrupt.config_changed();
    }

    /// The driver reads.
    pub fn read(&mut self, offset: u64, into: &mut [u8]) {
        if let Some(offset) = offset.checked_sub(CONFIG) {
            self.config.read(offset, into);
        } else if let Ok(into) = <&mut [u8; 4]>::try_from(into) {
            *into = self.register(offset).to_le_bytes();
        }
    }

    /// The driver writes. What it may not write changes nothing.
    pub fn write(&mut self, offset: u64, from: &[u8]) {
        if let Some(offset) = offset.checked_sub(CONFIG) {
            self.config.write(offset, from);
        } else if let Ok(bytes) = <[u8; 4]>::try_from(from) {
            self.set_register(offset, u32::from_le_bytes(bytes));
        }
    }

    fn register(&self, offset: u64) -> u32 {
        match offset {
            0x000 => MAGIC,
            0x004 => VERSION,
            0x008 => self.kind as u32,
            0x00c => VENDOR,
            0x010 => match self.registers.device_features_select {
                0 => self.offered as u32,
                1 => (self.offered >> 32) as u32,
                _ => 0,
            },
            0x034 => self.selected().map_or(0, |queue| u32::from(queue.max_size())),
            0x044 => self.selected().map_or(0, |queue| u32::from(queue.ready())),
            0x060 => self.interrupt.reasons(),
            0x070 => self.status(),
            // No device has shared memory: the length and the address of each region are all ones.
            0x0b0 | 0x0b4 | 0x0b8 | 0x0bc => u32::MAX,
            0x0fc => self.config.generation(),
            _ => 0,
        }
    }

    fn set_register(&mut self, offset: u64, value: u32) {
        let (low, high) = (Some(value), Some(value));
        match offset {
            0x014 => self.registers.device_features_select = value,
            0x020 => self.set_driver_features(value),
            0x024 => self.registers.driver_features_select = value,
            0x030 => self.registers.queue_select = value,
            0x038 => self.configure(|queue| queue.set_size(u16::try_from(value).unwrap_or(0))),
            0x044 => self.configure(|queue| queue.set_ready(value == 1)),
            0x064 => self.interrupt.acknowledge(value),
            0x070 => self.set_status(value),
            0x080 => self.configure(|queue| queue.set_desc_table_address(low, None)),
            0x084 => self.configure(|queue| queue.set_desc_table_address(None, high)),
            0x090 => self.configure(|queue| queue.set_avail_ring_address(low, None)),
            0x094 => self.configure(|queue| queue.set_avail_ring_address(None, high)),
            0x0a0 => self.configure(|queue| queue.set_used_ring_address(low, None)),
            0x0a4 => self.configure(|queue| queue.set_used_ring_address(None, high)),
            // Where KVM does not take the notification itself.
            QUEUE_NOTIFY => {
                if let Some(kick) = self.kicks.get(value as usize) {
                    kick.raise();
                }
            }
            LIST => self.access_listed(value),
            _ => {}
        }
    }

    /// Makes a list of accesses as if they had come one by one, each of which would be an exit for the guest. An access is
    /// a register and a value, four bytes each, little endian; with [`LISTED_READ`] the value is where it is read to.
    fn access_listed(&mut self, place: u32) {
        let place = GuestAddress(u64::from(place) * LIST_SIZE as u64);
        let memory = self.memory.clone();
        let mut list = [[[0; 4]; 2]; LIST_SIZE / 8];
        if memory.read_slice(list.as_flattened_mut().as_flattened_mut(), place).is_err() {
            return;
        }
        let Some(([length, _], accesses)) = list.split_first_mut() else { return };
        for [register, value] in accesses.iter_mut().take(u32::from_le_bytes(*length) as usize) {
            let register = u32::from_le_bytes(*register);
            let offset = u64::from(register & !LISTED_READ);
            if register & LISTED_READ != 0 {
                self.read(offset, value);
            } else if offset != LIST {
                // A list of lists could go on for ever.
                self.write(offset, value);
            }
        }
        // It is where it was read.
        let _ = memory.write_slice(list.as_flattened().as_flattened(), place);
    }

    fn status(&self) -> u32 {
        let failed = if self.worker.failed() { VIRTIO_CONFIG_S_NEEDS_RESET } else { 0 };
        self.registers.status | failed
    }

    fn set_driver_features(&mut self, value: u32) {
        if self.registers.status & VIRTIO_CONFIG_S_FEATURES_OK != 0 {
            return;
        }
        let shift = match self.registers.driver_features_select {
            0 => 0,
            1 => 32,
            _ => return,
        };
        self.registers.driver_features &= !(u64::from(u32::MAX) << shift);
        self.registers.driver_features |= u64::from(value) << shift;
    }

    fn set_status(&mut self, value: u32) {
        if value == 0 {
            self.reset();
            return;
        }
        let old = self.registers.status;
        let mut new = old | value & STATUS;
        let features = self.registers.driver_features;
        if new & !old & VIRTIO_CONFIG_S_FEATURES_OK != 0 && !self.acceptable(features) {
            new &= !VIRTIO_CONFIG_S_FEATURES_OK;
        }
        let starts = new & !old & VIRTIO_CONFIG_S_DRIVER_OK != 0;
        if starts && new & VIRTIO_CONFIG_S_FEATURES_OK == 0 {
            return;
        }
        self.registers.status = new;
        if starts {
            let event_idx = features & 1 << VIRTIO_RING_F_EVENT_IDX != 0;
            self.queues.iter_mut().for_each(|queue| queue.set_event_idx(event_idx));
            self.begin();
        }
    }

    fn acceptable(&self, features: u64) -> bool {
        features & !self.offered == 0 && features & 1 << VIRTIO_F_VERSION_1 != 0
    }

    fn reset(&mut self) {
        self.rest();
        // A device that panicked has nothing to forget.
        let _ = self.worker.call(|device| device.reset());
        self.registers = Registers::default();
        self.interrupt.restore(0);
        self.queues.iter_mut().for_each(Queue::reset);
    }

    fn selected(&self) -> Option<&Queue> {
        self.queues.get(self.registers.queue_select as usize)
    }

    /// Changes a queue, which the driver may do until it has started the device.
    fn configure(&mut self, change: impl FnOnce(&mut Queue)) {
        let started = self.registers.status & VIRTIO_CONFIG_S_DRIVER_OK != 0;
        if let Some(queue) = self.queues.get_mut(self.registers.queue_select as usize)
            && !started
        {
            change(queue);
        }
    }

    /// Lets the device's thread rest: before a snapshot. Nothing happens to a device that no driver has started.
    pub fn rest(&mut self) {
        if let Some(io) = self.worker.halt() {
            self.queues = io.queues.into_iter().map(VirtQueue::into_queue).collect();
        }
    }

    /// Goes on after [`Transport::rest`] or [`Transport::restore`], if a driver has started the device.
    pub fn go_on(&mut self) {
        if self.registers.status & VIRTIO_CONFIG_S_DRIVER_OK != 0 && !self.queues.is_empty() {
            self.begin();
        }
    }

    /// Waits until a device that goes on does.
    pub fn await_begin(&self) {
        self.worker.await_begin();
    }

    fn begin(&mut self) {
        match self.io() {
            Ok(io) => self.worker.serve(io),
            Err(error) => tracing::warn!("the guest's device {:?} does not start: {error}", self.kind),
        }
    }

    fn io(&mut self) -> io::Result<Io> {
        let poller = Poller::new()?;
        let kicks = self.kicks.iter().map(Event::try_clone).collect::<io::Result<Vec<_>>>()?;
        let memory = self.memory.clone();
        let features = self.registers.driver_features;
        let unexplained = features & QUEUE_INTERRUPTS != 0;
        let interrupt = if unexplained { self.interrupt.unexplained() } else { self.interrupt.clone() };
        for queue in &mut self.queues {
            // One that lies outside the memory is as good as none; later accesses are checked one by one.
            if !queue.is_valid(&*memory) {
                queue.set_ready(false);
            }
        }
        let queues = std::mem::take(&mut self.queues).into_iter().zip(kicks).enumerate();
        let queues =
            queues.map(|(index, (queue, kick))| VirtQueue::new(index, queue, kick, interrupt.clone())).collect();
        Ok(Io { memory, queues, features, poller })
    }

    /// The device at rest: call [`Transport::rest`] first.
    ///
    /// # Errors
    /// Where the device cannot be saved.
    pub fn save(&self) -> Result<SavedTransport, TransportError> {
        Ok(SavedTransport {
            kind: self.kind as u32,
            registers: self.registers,
            reasons: self.interrupt.reasons(),
            queues: self.queues.iter().map(|queue| SavedQueue(queue.state())).collect(),
            config: self.config.bytes(),
            device: self.worker.call(|device| device.save()).ok_or(TransportError::Gone(self.kind))??,
        })
    }

    /// Takes over from a saved device of the same make. [`Transport::go_on`] lets it run.
    ///
    /// # Errors
    /// Where what was saved is not of such a device.
    pub fn restore(&mut self, saved: SavedTransport) -> Result<(), TransportError> {
        let damaged = |what| TransportError::State(self.kind, what);
        if saved.kind != self.kind as u32 {
            return Err(damaged("it is of another kind"));
        }
        let registers = saved.registers;
        let status = |bit| registers.status & bit != 0;
        if status(!STATUS) || status(VIRTIO_CONFIG_S_DRIVER_OK) && !status(VIRTIO_CONFIG_S_FEATURES_OK) {
            return Err(damaged("no driver could have brought it so far"));
        }
        if status(VIRTIO_CONFIG_S_FEATURES_OK) && !self.acceptable(registers.driver_features) {
            return Err(damaged("its features are not offered"));
        }
        if saved.queues.len() != self.queues.len() {
            return Err(damaged("it has another number of queues"));
        }
        let mut queues = Vec::new();
        for (SavedQueue(state), offered) in saved.queues.into_iter().zip(&self.queues) {
            if state.max_size != offered.max_size() {
                return Err(damaged("a queue has another size"));
            }
            queues.push(Queue::try_from(state).map_err(|_| damaged("a queue is impossible"))?);
        }
        if saved.config.len() != self.config.bytes().len() {
            return Err(damaged("its configuration has another length"));
        }
        let restored = self.worker.call(move |device| device.restore(&saved.device));
        restored.ok_or(TransportError::Gone(self.kind))??;
        self.registers = registers;
        self.queues = queues;
        self.interrupt.restore(saved.reasons);
        Ok(())
    }
}

impl Drop for Transport {
    fn drop(&mut self) {
        self.rest();
    }
}
