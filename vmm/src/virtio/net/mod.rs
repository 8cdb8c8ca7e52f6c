//! Network card: the specification's section 5.1, over a tap.
//!
//! Checksums and segmentation are left undone wherever both sides can: a frame of up to 64 KiB goes from the guest's
//! TCP to the host's (or back) as one, in one system call and without a copy of ours. With mergeable buffers the guest
//! need not keep 64 KiB for each frame that might come: a large one is spread over many small buffers.
//!
//! The device waits for the tap only while it could do something with what it waits for, and sleeps otherwise.

mod buffers;
mod tap;
#[cfg(test)]
mod tests;

use std::collections::VecDeque;
use std::io;
use std::os::fd::OwnedFd;

use libc::{TUN_F_CSUM, TUN_F_TSO4, TUN_F_TSO6};
use rustix::event::epoll::EventFlags;
use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_CSUM, VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_TSO4, VIRTIO_NET_F_GUEST_TSO6,
    VIRTIO_NET_F_HOST_TSO4, VIRTIO_NET_F_HOST_TSO6, VIRTIO_NET_F_MAC, VIRTIO_NET_F_MRG_RXBUF, VIRTIO_NET_F_MTU,
    VIRTIO_NET_F_STATUS, VIRTIO_NET_S_LINK_UP,
};

use super::{Chain, ConfigSpace, Device, DeviceError, Io, Kind, Ready};
use crate::Memory;
use buffers::{ReceiveBuffers, append_pieces};
use tap::{HEADER, Tap};

const RECEIVE: usize = 0;
const TRANSMIT: usize = 1;

/// Enough for 15 frames of 64 KiB in buffers of a page. Larger queues would make guests keep more memory for frames.
const QUEUE_SIZE: u16 = 256;

/// The tap's token.
const TAP: u64 = 0;

/// An Ethernet header and a VLAN tag.
const LINK_HEADER: usize = 14 + 4;
/// The largest frame: what the specification expects of segmentation (section 5.1.6.3.1), and a tag.
const MAX_FRAME: usize = 65_550 + 4;

/// How many frames go in one direction before the other has its turn.
const FRAMES_PER_TURN: usize = 64;
/// How many bytes are moved before the driver is told. It works on them while the next follow.
const BYTES_PER_NOTICE: usize = 1 << 16;

const FEATURES: u64 = 1 << VIRTIO_NET_F_MAC
    | 1 << VIRTIO_NET_F_STATUS
    | 1 << VIRTIO_NET_F_MTU
    | 1 << VIRTIO_NET_F_CSUM
    | 1 << VIRTIO_NET_F_HOST_TSO4
    | 1 << VIRTIO_NET_F_HOST_TSO6
    | 1 << VIRTIO_NET_F_GUEST_CSUM
    | 1 << VIRTIO_NET_F_GUEST_TSO4
    | 1 << VIRTIO_NET_F_GUEST_TSO6
    | 1 << VIRTIO_NET_F_MRG_RXBUF;

/// A network card. Beside its queues it has no state that a snapshot would have to hold: what the tap has to know
/// follows from the features.
#[derive(Debug)]
pub struct Net {
    tap: Tap,
    mtu: u16,
    config: ConfigSpace,
    /// What the poller tells of the tap.
    awaited: EventFlags,
}

impl Net {
    /// A card for a tap that was opened with `IFF_VNET_HDR` and `O_NONBLOCK`. `mtu` is the largest that a driver will
    /// let its interface have later (section 5.1.4.1), not only the one it begins with.
    pub fn new(tap: OwnedFd, mac: [u8; 6], mtu: u16) -> Self {
        let mut config = mac.to_vec();
        let queue_pairs = 1;
        for field in [VIRTIO_NET_S_LINK_UP as u16, queue_pairs, mtu] {
            config.extend(field.to_le_bytes());
        }
        Self { tap: Tap::new(tap), mtu, config: ConfigSpace::new(config), awaited: EventFlags::empty() }
    }

    /// Waits for the tap from now on, for nothing yet. [`Device::start`] does so when it has set up the tap; tests and
    /// fuzzers, where a socket stands for one, begin here.
    ///
    /// # Errors
    /// [`DeviceError::Host`] where it cannot be waited for.
    pub fn attach(&mut self, io: &Io) -> Result<(), DeviceError> {
        self.awaited = EventFlags::empty();
        io.poller.add(&self.tap, TAP, self.awaited).map_err(DeviceError::host("wait for the tap"))
    }

    fn wait_for(&mut self, io: &Io, flag: EventFlags, wanted: bool) -> Result<(), DeviceError> {
        let mut awaited = self.awaited;
        awaited.set(flag, wanted);
        if awaited != self.awaited {
            io.poller.modify(&self.tap, TAP, awaited).map_err(DeviceError::host("wait for the tap"))?;
            self.awaited = awaited;
        }
        Ok(())
    }

    /// Moves frames from the tap to the guest, until there are none or the guest has no room. Only while it has is the
    /// tap waited for.
    fn receive(&mut self, io: &mut Io) -> Result<(), DeviceError> {
        let memory = io.memory.clone();
        let queue = &mut io.queues[RECEIVE];
        queue.want_kicks(&memory, false)?;
        let mut buffers = ReceiveBuffers::new(&memory, RECEIVE, self.room_for_a_frame(io.features));
        let mut room = true;
        let mut unnoticed = 0;
        for _ in 0..FRAMES_PER_TURN {
            room = buffers.gather(queue)?;
            if !room {
                break;
            }
            let received = self.tap.receive(buffers.pieces()).map_err(DeviceError::host("read from the tap"))?;
            let Some(length) = received else { break };
            buffers.fill(queue, length)?;
            unnoticed += length;
            if unnoticed >= BYTES_PER_NOTICE {
                queue.notify(&memory)?;
                unnoticed = 0;
            }
        }
        buffers.put_back(queue);
        queue.notify(&memory)?;
        self.wait_for(io, EventFlags::IN, room)
    }

    /// How much room there has to be before a frame is read, which takes it out of the tap whether it fits or not.
    fn room_for_a_frame(&self, features: u64) -> usize {
        if features & 1 << VIRTIO_NET_F_MRG_RXBUF == 0 {
            // One buffer, which the driver has to make large enough.
            HEADER
        } else if tap_offloads(features) & (TUN_F_TSO4 | TUN_F_TSO6) == 0 {
            HEADER + LINK_HEADER + usize::from(self.mtu)
        } else {
            HEADER + MAX_FRAME
        }
    }

    /// Moves frames from the guest to the tap, until there are none or the tap has no room: then it is waited for, and
    /// not the guest.
    fn transmit(&mut self, io: &mut Io) -> Result<(), DeviceError> {
        let memory = io.memory.clone();
        let queue = &mut io.queues[TRANSMIT];
        queue.want_kicks(&memory, false)?;
        let mut frames = 0;
        let mut unnoticed = 0;
        let full = loop {
            if frames == FRAMES_PER_TURN {
                queue.kick();
                break false;
            }
            let Some(chain) = queue.pop(&memory)? else {
                if queue.want_kicks(&memory, true)? {
                    continue;
                }
                break false;
            };
            let head = chain.head_index();
            let Some(length) = self.send(&memory, chain)? else {
                queue.put_back();
                break true;
            };
            queue.push(&memory, head, 0)?;
            frames += 1;
            unnoticed += length;
            if unnoticed >= BYTES_PER_NOTICE {
                queue.notify(&memory)?;
                unnoticed = 0;
            }
        };
        queue.notify(&memory)?;
        self.wait_for(io, EventFlags::OUT, full)
    }

    /// Sends the frame in a chain; how long it was, none where the tap has no room. What cannot be a frame is dropped.
    fn send(&self, memory: &Memory, chain: Chain) -> Result<Option<usize>, DeviceError> {
        let mut pieces = VecDeque::new();
        let length = append_pieces(memory, chain.readable(), &mut pieces)
            .map_err(|reason| DeviceError::Queue { queue: TRANSMIT, reason })?;
        match length {
            Some(length) if length <= HEADER + MAX_FRAME => {
                let gone = self.tap.send(&pieces).map_err(DeviceError::host("write to the tap"))?;
                Ok(gone.then_some(length))
            }
            _ => Ok(Some(0)),
        }
    }
}

impl Device for Net {
    fn kind(&self) -> Kind {
        Kind::Net
    }

    fn queue_sizes(&self) -> &[u16] {
        &[QUEUE_SIZE; 2]
    }

    fn features(&self) -> u64 {
        FEATURES
    }

    fn config(&self) -> ConfigSpace {
        self.config.clone()
    }

    fn start(&mut self, io: &mut Io) -> Result<(), DeviceError> {
        self.tap.configure(tap_offloads(io.features)).map_err(DeviceError::host("set up the tap"))?;
        self.attach(io)
    }

    fn queue_ready(&mut self, io: &mut Io, queue: usize) -> Result<(), DeviceError> {
        match queue {
            RECEIVE => self.receive(io),
            _ => self.transmit(io),
        }
    }

    fn descriptor_ready(&mut self, io: &mut Io, ready: Ready) -> Result<(), DeviceError> {
        if ready.flags.intersects(EventFlags::ERR | EventFlags::HUP) {
            return Err(DeviceError::host("go on without the tap")(io::ErrorKind::NotConnected.into()));
        }
        if ready.flags.contains(EventFlags::IN) {
            self.receive(io)?;
        }
        if ready.flags.contains(EventFlags::OUT) {
            self.transmit(io)?;
        }
        Ok(())
    }
}

/// What the tap may leave undone, for a driver that has agreed to these features.
fn tap_offloads(features: u64) -> u32 {
    let agreed = |feature: u32, kind| if features & 1 << feature == 0 { 0 } else { kind };
    match agreed(VIRTIO_NET_F_GUEST_CSUM, TUN_F_CSUM) {
        // Segments have checksums: section 5.1.3.1 wants the one feature with the others, and so does the tap.
        0 => 0,
        checksums => {
            checksums | agreed(VIRTIO_NET_F_GUEST_TSO4, TUN_F_TSO4) | agreed(VIRTIO_NET_F_GUEST_TSO6, TUN_F_TSO6)
        }
    }
}
