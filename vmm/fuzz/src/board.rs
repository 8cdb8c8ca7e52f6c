//! A device behind its registers, served by its own thread.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use arbitrary::{Result, Unstructured};
use runvm_vmm::Event;
use runvm_vmm::door::Door;
use runvm_vmm::virtio::Device;
use runvm_vmm::virtio::balloon::{Backing, Balloon};
use runvm_vmm::virtio::block::Block;
use runvm_vmm::virtio::net::Net;
use runvm_vmm::virtio::rng::Rng;
use runvm_vmm::virtio::transport::{LIST, LIST_SIZE, LISTED_READ, SavedTransport, Transport};
use runvm_vmm::virtio::vsock::Vsock;
use rustix::fs::{MemfdFlags, memfd_create};
use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
use virtio_queue::QueueState;
use vm_memory::{Bytes as _, GuestAddress};

use crate::bench::mutate;
use crate::guest::{Guest, raw};

const STATUS: u64 = 0x70;
const NOTIFY: u64 = 0x50;
/// ACKNOWLEDGE and DRIVER, then FEATURES_OK, then DRIVER_OK.
const STATES: [u32; 3] = [3, 11, 15];

/// What kinds of devices there are here.
const KINDS: u8 = 5;

/// A device and its guest.
pub struct Board {
    /// The registers.
    pub transport: Transport,
    kind: u8,
    // The last to go: the device's thread uses its memory.
    guest: Guest,
}

impl Board {
    /// Any kind of device, which no driver has found yet.
    pub fn new(u: &mut Unstructured<'_>) -> Result<Self> {
        let kind = u.int_in_range(0..=KINDS - 1)?;
        let guest = Guest::new();
        Ok(Self { transport: transport(kind, &guest), kind, guest })
    }

    /// Writes a register.
    pub fn write(&mut self, register: u64, value: u32) {
        self.transport.write(register, &value.to_le_bytes());
    }

    /// Reads a register.
    pub fn read(&mut self, register: u64) -> u32 {
        let mut bytes = [0; 4];
        self.transport.read(register, &mut bytes);
        u32::from_le_bytes(bytes)
    }

    /// Starts the device as a driver does.
    pub fn start(&mut self, u: &mut Unstructured<'_>) -> Result<()> {
        self.write(STATUS, 0);
        self.write(STATUS, STATES[0]);
        for half in 0..2 {
            self.write(0x14, half);
            let offered = self.read(0x10);
            self.write(0x24, half);
            let agreed = if u.ratio(1, 8)? { offered & u.arbitrary::<u32>()? } else { offered };
            // Without version 1 there is nothing to agree on.
            self.write(0x20, agreed | half);
        }
        self.write(STATUS, STATES[1]);
        let states = self.guest.set_up(u, device(self.kind).as_ref())?;
        for (index, state) in (0..).zip(&states) {
            self.set_up(index, state);
        }
        self.write(STATUS, STATES[2]);
        Ok(())
    }

    fn set_up(&mut self, queue: u32, state: &QueueState) {
        self.write(0x30, queue);
        self.write(0x38, state.size.into());
        for (register, address) in [(0x80, state.desc_table), (0x90, state.avail_ring), (0xa0, state.used_ring)] {
            self.write(register, address as u32);
            self.write(register + 4, (address >> 32) as u32);
        }
        self.write(0x44, state.ready.into());
    }

    /// The guest does something in its memory.
    pub fn disturb(&mut self, u: &mut Unstructured<'_>) -> Result<()> {
        if self.guest.queues() == 0 {
            return self.guest.scribble(u);
        }
        let queue = u.choose_index(self.guest.queues())?;
        match u.int_in_range(0..=3)? {
            0 => self.guest.scribble(u)?,
            1 => self.guest.disorder(u, queue)?,
            _ => {
                let pieces = raw(u)?;
                self.guest.put(u, queue, &pieces)?;
            }
        }
        self.write(NOTIFY, queue as u32);
        Ok(())
    }

    /// Tells the device of a list of accesses.
    pub fn write_list(&mut self, u: &mut Unstructured<'_>) -> Result<()> {
        let place = if u.ratio(7, 8)? { u.int_in_range(0..=16)? } else { u.arbitrary()? };
        let length = if u.ratio(7, 8)? { u.int_in_range(0..=8)? } else { u.arbitrary()? };
        let mut list = [length, 0].map(u32::to_le_bytes).concat();
        for _ in 0..length.min(8) {
            let (usual, value) = access(u)?;
            let register = if u.ratio(1, 8)? { u.arbitrary()? } else { usual };
            let read = if u.arbitrary()? { LISTED_READ } else { 0 };
            list.extend([register | read, value].map(u32::to_le_bytes).concat());
        }
        // Where no memory is there is no list.
        let _ = self.guest.memory().write_slice(&list, GuestAddress(u64::from(place) * LIST_SIZE as u64));
        self.write(LIST, place);
        Ok(())
    }

    /// Lets the device rest, and go on: itself, or another in its place, which is told what it was or something else.
    pub fn move_on(&mut self, u: &mut Unstructured<'_>) -> Result<()> {
        self.transport.rest();
        if let Some(saved) = self.saved(u)? {
            let mut other = transport(self.kind, &self.guest);
            // One that refuses is as it was.
            let _ = other.restore(saved);
            self.transport = other;
        }
        self.transport.go_on();
        Ok(())
    }

    /// What the device is, after it has been written down and perhaps changed.
    fn saved(&self, u: &mut Unstructured<'_>) -> Result<Option<SavedTransport>> {
        let Ok(saved) = self.transport.save() else { return Ok(None) };
        let Ok(mut bytes) = postcard::to_stdvec(&saved) else { return Ok(None) };
        mutate(u, &mut bytes)?;
        Ok(postcard::from_bytes(&bytes).ok())
    }
}

/// A register, and what is written to it.
pub fn access(u: &mut Unstructured<'_>) -> Result<(u32, u32)> {
    let register = 4 * u.int_in_range(0..=0x4f)?;
    let value = if u.ratio(1, 4)? { u.arbitrary()? } else { u.int_in_range(0..=16)? };
    Ok((register, value))
}

#[expect(clippy::expect_used, reason = "a fuzzer ends where the host has no threads")]
fn transport(kind: u8, guest: &Guest) -> Transport {
    let line = Arc::new(Event::new().expect("an event"));
    Transport::new(device(kind), guest.memory().clone(), line, Arc::new(|_| Ok(()))).expect("a device")
}

#[expect(clippy::expect_used, reason = "a fuzzer ends where the host has no descriptors")]
fn device(kind: u8) -> Box<dyn Device> {
    match kind {
        0 => Box::new(Rng),
        1 => Box::new(Balloon::new(Backing::Private)),
        2 => {
            let image = File::from(memfd_create("image", MemfdFlags::CLOEXEC).expect("memory"));
            image.set_len(4096).expect("memory");
            Box::new(Block::new(image, "fuzz").expect("a disk"))
        }
        3 => Box::new(Vsock::new(Door::new(socket()), 1024, Event::new().expect("an event"))),
        // A tap that is none: it cannot be started.
        _ => Box::new(Net::new(socket(), [2, 0, 0, 0, 0, 1], 1500)),
    }
}

/// One whose other end is gone.
#[expect(clippy::expect_used, reason = "a fuzzer ends where the host has no descriptors")]
fn socket() -> OwnedFd {
    let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
    socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None).expect("sockets").0
}
