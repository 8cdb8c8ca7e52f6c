//! The guest's side of queues, as bad as the input wants it to be.
//!
//! Requests are laid out as a driver lays them out, and then spoilt here and there: so what lies behind a device's first
//! checks is reached, too. Buffers may be anywhere, also where descriptors and rings are, so that a device's own writes
//! change what it reads next.

use arbitrary::{Result, Unstructured};
use runvm_vmm::virtio::{Device, Interrupt, Io, Poller, VirtQueue};
use runvm_vmm::{Event, Memory};
use virtio_queue::{Queue, QueueState, QueueT as _};
use vm_memory::{Bytes as _, GuestAddress};

use crate::ground::{Ground, HIGH, LOW, REGIONS};

/// Queues are this far apart, the first at this address: what 1024 entries take.
const STRIDE: u64 = 0x8000;
const AVAIL: u64 = 0x4000;
const USED: u64 = 0x5000;
/// Buffers are taken from here on, and again when the end is reached.
const BUFFERS: u64 = 0x8_0000;
const BUFFERS_END: u64 = 2 * LOW as u64;
/// The size of a descriptor.
const DESCRIPTOR: u64 = 16;

const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;

/// One piece of a request.
#[derive(Clone, Debug)]
pub enum Piece {
    /// For the device to read.
    Readable(Vec<u8>),
    /// For the device to write, so many bytes.
    Writable(u32),
}

struct Descriptor {
    address: u64,
    length: u32,
    flags: u16,
    next: u16,
}

struct Ring {
    size: u16,
    table: u64,
    avail: u64,
    used: u64,
    descriptor: u16,
    index: u16,
}

/// A guest's memory and what it believes of its queues.
pub struct Guest {
    rings: Vec<Ring>,
    buffer: u64,
    last: u64,
    // The last to go.
    ground: Ground,
}

impl Guest {
    /// One that has not set up its queues.
    pub fn new() -> Self {
        Self { rings: Vec::new(), buffer: BUFFERS, last: BUFFERS, ground: Ground::new() }
    }

    /// Its memory.
    pub fn memory(&self) -> &Memory {
        &self.ground.memory
    }

    /// How many queues it has.
    pub fn queues(&self) -> usize {
        self.rings.len()
    }

    /// Sets up all queues of a device: mostly as a driver would.
    pub fn set_up(&mut self, u: &mut Unstructured<'_>, device: &dyn Device) -> Result<Vec<QueueState>> {
        self.rings.clear();
        let event_idx_enabled = u.arbitrary()?;
        let odd = u.ratio(1, 4)?;
        let mut states = Vec::new();
        for (index, &max_size) in (0..).zip(device.queue_sizes()) {
            let base = index * STRIDE;
            let mut ring =
                Ring { size: max_size, table: base, avail: base + AVAIL, used: base + USED, descriptor: 0, index: 0 };
            if odd {
                ring.size = 1 << u.int_in_range(0..=max_size.ilog2())?;
                ring.index = *u.choose(&[0, 1, u16::MAX, u16::MAX - 3, 0x7fff])?;
                for (place, alignment) in [(&mut ring.table, 16), (&mut ring.avail, 2), (&mut ring.used, 4)] {
                    if u.ratio(1, 3)? {
                        *place = self.address(u)? / alignment * alignment;
                    }
                }
            }
            states.push(QueueState {
                max_size,
                next_avail: ring.index,
                next_used: ring.index,
                event_idx_enabled,
                size: ring.size,
                ready: !odd || u.ratio(7, 8)?,
                desc_table: ring.table,
                avail_ring: ring.avail,
                used_ring: ring.used,
            });
            // What an earlier driver has left there is none of this one's.
            self.write(ring.avail, &u32::from(ring.index).rotate_left(16).to_le_bytes());
            self.write(ring.used, &u32::from(ring.index).rotate_left(16).to_le_bytes());
            self.rings.push(ring);
        }
        Ok(states)
    }

    /// Puts a request into a queue.
    pub fn put(&mut self, u: &mut Unstructured<'_>, queue: usize, pieces: &[Piece]) -> Result<()> {
        let spoil = u.ratio(1, 4)?;
        let mut chain = Vec::new();
        for piece in pieces {
            let length = match piece {
                Piece::Readable(bytes) => bytes.len() as u32,
                Piece::Writable(length) => *length,
            };
            let mut address = self.allocate(length.into());
            if spoil && u.ratio(1, 4)? {
                address = self.address(u)?;
            }
            let mut descriptor = Descriptor { address, length, flags: NEXT, next: 0 };
            match piece {
                Piece::Readable(bytes) => self.write(address, bytes),
                Piece::Writable(_) => descriptor.flags |= WRITE,
            }
            self.last = address;
            chain.push(descriptor);
        }
        if spoil {
            self.spoil(u, &mut chain)?;
        }
        let layout = u.int_in_range(0..=5)?;
        if layout < 4 || chain.is_empty() {
            self.lay_direct(u, queue, chain, spoil)
        } else {
            let direct = if layout == 4 { 0 } else { u.choose_index(chain.len())? };
            self.lay_indirect(u, queue, chain, direct, spoil)
        }
    }

    /// Makes pieces what no driver would make them.
    fn spoil(&mut self, u: &mut Unstructured<'_>, chain: &mut Vec<Descriptor>) -> Result<()> {
        for _ in 0..u.int_in_range(0..=2)? {
            if chain.is_empty() {
                break;
            }
            let place = u.choose_index(chain.len())?;
            match u.int_in_range(0..=5)? {
                0 => chain[place].length = length(u)?,
                1 => chain[place].flags ^= 1 << u.int_in_range(0..=3)?,
                2 => chain.truncate(place),
                3 => {
                    let descriptor = Descriptor { address: self.address(u)?, length: length(u)?, flags: NEXT, next: 0 };
                    chain.insert(place, descriptor);
                }
                // Many of the same: as much as a chain can be made of.
                4 => {
                    let Descriptor { address, length, flags, .. } = chain[place];
                    let copies = *u.choose(&[2, 16, 64, 300, 1024, 4096])?;
                    let copy = |_| Descriptor { address, length, flags, next: 0 };
                    chain.splice(place..place, (0..copies).map(copy));
                }
                _ => {
                    let other = u.choose_index(chain.len())?;
                    chain.swap(place, other);
                }
            }
        }
        Ok(())
    }

    /// A chain in the queue's own table.
    fn lay_direct(
        &mut self,
        u: &mut Unstructured<'_>,
        queue: usize,
        mut chain: Vec<Descriptor>,
        spoil: bool,
    ) -> Result<()> {
        let Some(ring) = self.rings.get_mut(queue) else { return Ok(()) };
        let (head, table) = (ring.descriptor, ring.table);
        let mut places = Vec::new();
        for descriptor in &mut chain {
            places.push(ring.descriptor);
            ring.descriptor = (ring.descriptor + 1) % ring.size;
            descriptor.next = ring.descriptor;
        }
        end(u, &mut chain, spoil)?;
        for (place, descriptor) in places.into_iter().zip(&chain) {
            self.describe(table.wrapping_add(u64::from(place) * DESCRIPTOR), descriptor);
        }
        self.offer(queue, head);
        Ok(())
    }

    /// A chain of which all but the first descriptors are in a table of their own.
    fn lay_indirect(
        &mut self,
        u: &mut Unstructured<'_>,
        queue: usize,
        mut chain: Vec<Descriptor>,
        direct: usize,
        spoil: bool,
    ) -> Result<()> {
        let mut inner = chain.split_off(direct);
        for (next, descriptor) in (1..).zip(&mut inner) {
            descriptor.next = next;
        }
        end(u, &mut inner, spoil)?;
        let mut length = (inner.len() as u64 * DESCRIPTOR) as u32;
        let mut address = self.allocate(length.into());
        if spoil && u.ratio(1, 3)? {
            match u.int_in_range(0..=3)? {
                0 => length = *u.choose(&[0, 1, 15, 17, 0x10_0000, 0xf_fff0, u32::MAX])?,
                1 => address = self.address(u)?,
                2 => inner[0].flags |= INDIRECT,
                // It describes itself.
                _ => (inner[0].address, inner[0].length) = (address, length),
            }
        }
        for (place, descriptor) in (0u64..).zip(&inner) {
            self.describe(address.wrapping_add(place * DESCRIPTOR), descriptor);
        }
        chain.push(Descriptor { address, length, flags: INDIRECT, next: 0 });
        self.lay_direct(u, queue, chain, false)
    }

    /// Makes the chain at `head` available.
    fn offer(&mut self, queue: usize, head: u16) {
        let Some(ring) = self.rings.get_mut(queue) else { return };
        let place = ring.avail.wrapping_add(4 + 2 * u64::from(ring.index % ring.size));
        ring.index = ring.index.wrapping_add(1);
        let (avail, index) = (ring.avail, ring.index);
        self.write(place, &head.to_le_bytes());
        self.write(avail.wrapping_add(2), &index.to_le_bytes());
    }

    /// Writes anything anywhere.
    pub fn scribble(&mut self, u: &mut Unstructured<'_>) -> Result<()> {
        let address = self.address(u)?;
        let length = u.int_in_range(1..=32)?;
        let bytes = u.bytes(length.min(u.len()))?;
        self.write(address, bytes);
        Ok(())
    }

    /// Writes where a queue's rings are: indices and heads.
    pub fn disorder(&mut self, u: &mut Unstructured<'_>, queue: usize) -> Result<()> {
        let Some(ring) = self.rings.get_mut(queue) else { return Ok(()) };
        let (avail, used, size) = (ring.avail, ring.used, u64::from(ring.size));
        let value = u16::arbitrary_near(u, ring.index)?;
        let place = match u.int_in_range(0..=5)? {
            0 => avail,
            1 => {
                ring.index = value;
                avail.wrapping_add(2)
            }
            2 => avail.wrapping_add(4 + 2 * u.int_in_range(0..=size)?),
            3 => used,
            4 => used.wrapping_add(2),
            _ => used.wrapping_add(4 + 8 * u.int_in_range(0..=size)?),
        };
        self.write(place, &value.to_le_bytes());
        Ok(())
    }

    /// An address that is worth a try.
    fn address(&self, u: &mut Unstructured<'_>) -> Result<u64> {
        let near = u64::from(u.arbitrary::<u8>()?);
        let base = match u.int_in_range(0..=7)? {
            0 => self.last,
            1 => BUFFERS,
            2 => {
                let &(start, length) = u.choose(&REGIONS)?;
                // Around the end.
                start + length as u64 - 128
            }
            3 => HIGH - 128,
            4 => u64::MAX - 255,
            5 => u.int_in_range(0..=self.rings.len() as u64)? * STRIDE,
            6 => u.int_in_range(0..=self.rings.len() as u64)? * STRIDE + AVAIL,
            _ => u.int_in_range(0..=self.rings.len() as u64)? * STRIDE + USED,
        };
        Ok(base.wrapping_add(near))
    }

    fn allocate(&mut self, length: u64) -> u64 {
        if self.buffer + length > BUFFERS_END {
            self.buffer = BUFFERS;
        }
        let address = self.buffer;
        self.buffer += length;
        address
    }

    fn describe(&self, address: u64, descriptor: &Descriptor) {
        let Descriptor { address: buffer, length, flags, next } = descriptor;
        let bytes = [&buffer.to_le_bytes()[..], &length.to_le_bytes(), &flags.to_le_bytes(), &next.to_le_bytes()];
        self.write(address, &bytes.concat());
    }

    /// What is not in the memory is not written.
    fn write(&self, address: u64, bytes: &[u8]) {
        let _ = self.ground.memory.write(bytes, GuestAddress(address));
    }
}

/// Numbers around another.
trait ArbitraryNear: Sized {
    fn arbitrary_near(u: &mut Unstructured<'_>, near: Self) -> Result<Self>;
}

impl ArbitraryNear for u16 {
    fn arbitrary_near(u: &mut Unstructured<'_>, near: Self) -> Result<Self> {
        let change: i8 = u.arbitrary()?;
        Ok(if u.ratio(1, 8)? { u.arbitrary()? } else { near.wrapping_add_signed(change.into()) })
    }
}

/// Ends a chain; or does not.
fn end(u: &mut Unstructured<'_>, chain: &mut [Descriptor], spoil: bool) -> Result<()> {
    let Some(last) = chain.last_mut() else { return Ok(()) };
    if spoil && u.ratio(1, 4)? {
        last.next = *u.choose(&[0, 1, last.next, u16::MAX])?;
    } else {
        last.flags &= !NEXT;
    }
    Ok(())
}

/// A length that is worth a try.
pub fn length(u: &mut Unstructured<'_>) -> Result<u32> {
    Ok(match u.int_in_range(0..=3)? {
        0 => u.int_in_range(0..=64)?,
        1 => u32::from(u.arbitrary::<u16>()?),
        2 => *u.choose(&[0, 1, 511, 512, 513, 4095, 4096, 4097, 1 << 16, 1 << 19, LOW as u32, 1 << 31, u32::MAX])?,
        _ => u.arbitrary()?,
    })
}

/// What a device is served with: these queues, with the features of `features` that it offers.
#[expect(clippy::expect_used, reason = "a fuzzer ends where the host has no descriptors")]
pub fn io(memory: &Memory, interrupt: &Interrupt, states: &[QueueState], features: u64) -> Io {
    let queue = |(index, &state): (usize, &QueueState)| {
        let mut queue = Queue::try_from(state).unwrap_or_else(|_| Queue::new(state.max_size).expect("a size"));
        // As the transport does.
        if !queue.is_valid(&**memory) {
            queue.set_ready(false);
        }
        let queue = VirtQueue::new(index, queue, Event::new().expect("an event"), interrupt.clone());
        queue.kick();
        queue
    };
    let queues = states.iter().enumerate().map(queue).collect();
    Io { memory: memory.clone(), queues, features, poller: Poller::new().expect("an epoll") }
}

/// A request that follows no rules.
pub fn raw(u: &mut Unstructured<'_>) -> Result<Vec<Piece>> {
    let piece = |u: &mut Unstructured<'_>| {
        Ok(if u.arbitrary()? {
            let length = u.int_in_range(0..=80)?;
            Piece::Readable(u.bytes(length.min(u.len()))?.to_vec())
        } else {
            Piece::Writable(length(u)?)
        })
    };
    (0..u.int_in_range(0..=5)?).map(|_| piece(u)).collect()
}
