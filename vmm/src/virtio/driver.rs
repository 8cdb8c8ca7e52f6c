//! The guest's side of queues, for tests: puts requests into them as a driver does, without a guest.

use std::sync::Arc;

use virtio_queue::{Queue, QueueT as _};
use vm_memory::{Bytes as _, GuestAddress, GuestMemoryMmap};

use super::{Device, DeviceError, Interrupt, Io, Poller, VirtQueue};
use crate::{Event, Memory};

/// How many bytes of memory a driver uses for its queues and buffers.
pub const MEMORY: usize = 8 << 20;
/// Queues are this far apart, the first at 0.
const STRIDE: u64 = 0x1_0000;
const AVAIL: u64 = 0x8000;
const USED: u64 = 0xc000;
/// Buffers are taken from here on.
const BUFFERS: u64 = 4 << 20;

const NEXT: u16 = 1;
const WRITE: u16 = 2;

/// One piece of a request.
#[derive(Clone, Copy, Debug)]
pub enum Piece<'a> {
    /// For the device to read.
    Readable(&'a [u8]),
    /// For the device to write, so many bytes.
    Writable(u32),
    /// A descriptor with these very fields, for what no driver would do.
    Raw {
        /// Where.
        address: u64,
        /// How much.
        length: u32,
        /// Which rights, and whether another follows.
        flags: u16,
        /// Which follows.
        next: u16,
    },
}

/// A request in a queue.
#[derive(Clone, Debug)]
pub struct Request {
    /// By which the queue knows it.
    pub head: u16,
    writable: Vec<(u64, u32)>,
}

/// Has a device do what there is to do now, as its thread would, in this one; whether there was anything.
///
/// # Errors
/// The device's, and those of waiting.
pub fn serve(device: &mut dyn Device, io: &mut Io) -> Result<bool, DeviceError> {
    let mut busy = false;
    if io.poller.is_ready().map_err(DeviceError::host("wait for the host"))? {
        for ready in io.poller.wait().map_err(DeviceError::host("wait for the host"))? {
            device.descriptor_ready(io, ready)?;
            busy = true;
        }
    }
    for index in 0..io.queues.len() {
        let queue = &io.queues[index];
        if queue.kick_descriptor().clear() && queue.ready() {
            device.queue_ready(io, index)?;
            busy = true;
        }
    }
    Ok(busy)
}

/// A driver of one device.
pub struct Driver {
    /// What the device serves.
    pub io: Io,
    /// The device's interrupt.
    pub interrupt: Interrupt,
    /// Where it goes.
    pub line: Arc<Event>,
    queues: Vec<Ring>,
    buffer: u64,
}

struct Ring {
    size: u16,
    descriptor: u16,
    available: u16,
    used: u16,
}

#[expect(clippy::expect_used, reason = "tests end where the host has no memory or descriptors")]
impl Driver {
    /// A driver with all the queues of `device`, with the features that it offers.
    pub fn new(device: &dyn Device) -> Self {
        let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), MEMORY)]).expect("memory for a test");
        Self::with_memory(device, memory.into())
    }

    /// A driver in this memory, of which it uses the first [`MEMORY`] bytes.
    pub fn with_memory(device: &dyn Device, memory: Memory) -> Self {
        let line = Arc::new(Event::new().expect("an event"));
        let interrupt = Interrupt::new(line.clone());
        let mut queues = Vec::new();
        let mut rings = Vec::new();
        for (index, &size) in device.queue_sizes().iter().enumerate() {
            let base = index as u64 * STRIDE;
            let mut queue = Queue::new(size).expect("a queue");
            queue.set_size(size);
            queue.set_desc_table_address(Some(base as u32), Some(0));
            queue.set_avail_ring_address(Some((base + AVAIL) as u32), Some(0));
            queue.set_used_ring_address(Some((base + USED) as u32), Some(0));
            queue.set_ready(true);
            queues.push(VirtQueue::new(index, queue, Event::new().expect("an event"), interrupt.clone()));
            rings.push(Ring { size, descriptor: 0, available: 0, used: 0 });
        }
        let poller = Poller::new().expect("an epoll");
        let io = Io { memory, queues, features: device.features(), poller };
        Self { io, interrupt, line, queues: rings, buffer: BUFFERS }
    }

    /// Puts a request into a queue. Its descriptors and buffers are never used again: a test has some megabytes of them.
    pub fn put(&mut self, queue: usize, pieces: &[Piece<'_>]) -> Request {
        let base = queue as u64 * STRIDE;
        let head = self.queues[queue].descriptor;
        let mut writable = Vec::new();
        for (index, &piece) in pieces.iter().enumerate() {
            let last = index + 1 == pieces.len();
            let ring = &mut self.queues[queue];
            let place = ring.descriptor;
            ring.descriptor = (place + 1) % ring.size;
            let follow = if last { 0 } else { NEXT };
            let following = if last { 0 } else { ring.descriptor };
            let (address, length, flags, next) = match piece {
                Piece::Readable(bytes) => {
                    let address = self.allocate(bytes.len() as u64);
                    self.io.memory.write_slice(bytes, GuestAddress(address)).expect("a buffer");
                    (address, bytes.len() as u32, follow, following)
                }
                Piece::Writable(length) => {
                    let address = self.allocate(length.into());
                    writable.push((address, length));
                    (address, length, follow | WRITE, following)
                }
                Piece::Raw { address, length, flags, next } => (address, length, flags, next),
            };
            let mut descriptor = [0; 16];
            descriptor[..8].copy_from_slice(&address.to_le_bytes());
            descriptor[8..12].copy_from_slice(&length.to_le_bytes());
            descriptor[12..14].copy_from_slice(&flags.to_le_bytes());
            descriptor[14..].copy_from_slice(&next.to_le_bytes());
            let place = GuestAddress(base + u64::from(place) * 16);
            self.io.memory.write_slice(&descriptor, place).expect("a descriptor");
        }
        self.offer(queue, head);
        Request { head, writable }
    }

    /// Makes the chain at `head` available.
    pub fn offer(&mut self, queue: usize, head: u16) {
        let base = queue as u64 * STRIDE + AVAIL;
        let ring = &mut self.queues[queue];
        let place = base + 4 + u64::from(ring.available % ring.size) * 2;
        ring.available = ring.available.wrapping_add(1);
        let available = ring.available;
        self.io.memory.write_obj(head, GuestAddress(place)).expect("the ring");
        self.io.memory.write_obj(available, GuestAddress(base + 2)).expect("the ring");
    }

    /// The next chain that the device has given back: its head, and how much was written.
    pub fn used(&mut self, queue: usize) -> Option<(u16, u32)> {
        let base = queue as u64 * STRIDE + USED;
        let index: u16 = self.io.memory.read_obj(GuestAddress(base + 2)).expect("the ring");
        let ring = &mut self.queues[queue];
        if index == ring.used {
            return None;
        }
        let place = base + 4 + u64::from(ring.used % ring.size) * 8;
        ring.used = ring.used.wrapping_add(1);
        let head: u32 = self.io.memory.read_obj(GuestAddress(place)).expect("the ring");
        let written = self.io.memory.read_obj(GuestAddress(place + 4)).expect("the ring");
        Some((head as u16, written))
    }

    /// What the device's part of a request's buffers holds.
    pub fn written(&self, request: &Request) -> Vec<u8> {
        let mut all = Vec::new();
        for &(address, length) in &request.writable {
            let mut bytes = vec![0; length as usize];
            self.io.memory.read_slice(&mut bytes, GuestAddress(address)).expect("a buffer");
            all.extend(bytes);
        }
        all
    }

    fn allocate(&mut self, length: u64) -> u64 {
        let address = self.buffer;
        self.buffer += length.next_multiple_of(16);
        assert!(self.buffer <= MEMORY as u64, "a test's requests have more bytes than its memory");
        address
    }
}
