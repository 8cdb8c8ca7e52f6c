//! Socket device: streams between Unix sockets of the host's and one port of the guest's, without a module of the
//! host. Specification, section 5.10.
//!
//! A stream that comes in by the device's [`Door`] is connected to the guest's port, and bytes flow at once. The guest
//! opens no connections of its own. It only knocks: it asks once for its port's number on the host, and with that,
//! though it is refused, says that it listens. Until then streams wait before the door.
//!
//! Live streams cannot move to another process. A device that is restored tells the guest that its connections are
//! gone, if it had any, and takes new ones once the guest has heard it.

mod buffer;
mod connection;
mod packet;
#[cfg(test)]
mod tests;

use std::collections::{HashMap, VecDeque};
use std::io;
use std::os::unix::net::UnixStream;

use rustix::event::epoll::EventFlags;
use serde::{Deserialize, Serialize};

use self::buffer::Buffer;
use self::connection::Connection;
use self::packet::{Header, Op, SIZE, STREAM};
use super::{Chain, ConfigSpace, Device, DeviceError, Io, Kind, Poller, Ready, Served, VirtQueue};
use crate::door::Door;
use crate::{Event, Memory};

/// The guest's address.
pub const GUEST_CID: u64 = 3;
/// The host's address, by which a guest reaches the device.
pub const HOST_CID: u64 = 2;
/// How many connections there can be at once. What comes beyond is closed.
pub const MAX_CONNECTIONS: usize = 1023;

const RX: usize = 0;
const TX: usize = 1;
const EVENT: usize = 2;

/// The guest keeps a page ready for each entry of its receive queue.
const QUEUE_SIZE: u16 = 64;
/// As many as Linux puts there.
const EVENT_QUEUE_SIZE: u16 = 8;

/// How many refusals may wait for buffers of the guest's. A guest that asks for more gets no answer.
const MAX_REFUSALS: usize = 64;

/// The event that all connections are gone.
const TRANSPORT_RESET: [u8; 4] = 0u32.to_le_bytes();

/// Connections are registered under their ports, which are below.
const DOOR: u64 = 1 << 32;
/// Ports below are for services.
const FIRST_PORT: u32 = 1024;

/// The device.
pub struct Vsock {
    door: Door,
    guest_port: u32,
    knocked: Event,
    /// The guest has knocked.
    ready: bool,
    reset: Reset,
    /// By the host's port.
    connections: HashMap<u32, Entry>,
    /// The ports of connections with something for the guest, each once.
    turns: VecDeque<u32>,
    refusals: VecDeque<Header>,
    next_port: u32,
    max_connections: usize,
    /// Whether connections are taken.
    listening: bool,
}

struct Entry {
    connection: Connection,
    interest: EventFlags,
    has_turn: bool,
}

/// What the guest has to learn of the connections that it had before it was restored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Reset {
    /// Nothing.
    None,
    /// That they are gone.
    Owed,
    /// It has been told, and has had this many buffers for events left. Another one says that it has taken note: what
    /// connected before would be reset with the rest.
    Told(u16),
}

#[derive(Serialize, Deserialize)]
struct Saved {
    ready: bool,
    reset: bool,
    next_port: u32,
}

impl Vsock {
    /// A device that connects what comes in by `door` to the guest's port of this number. `knocked` is raised when the
    /// guest says that it listens there.
    pub fn new(door: Door, guest_port: u32, knocked: Event) -> Self {
        Self {
            door,
            guest_port,
            knocked,
            ready: false,
            reset: Reset::None,
            connections: HashMap::new(),
            turns: VecDeque::new(),
            refusals: VecDeque::new(),
            next_port: FIRST_PORT,
            max_connections: MAX_CONNECTIONS,
            listening: false,
        }
    }

    /// Takes connections as soon as the guest can.
    fn listen(&mut self, poller: &Poller) -> Result<(), DeviceError> {
        if self.ready && self.reset == Reset::None && !self.listening {
            poller
                .add(&self.door, DOOR, EventFlags::IN | EventFlags::ET)
                .map_err(DeviceError::host("wait for connections"))?;
            self.listening = true;
        }
        Ok(())
    }

    fn accept(&mut self, poller: &Poller) -> Result<(), DeviceError> {
        loop {
            match self.door.admit() {
                Ok(Some(stream)) if self.connections.len() < self.max_connections => self.connect(stream, poller)?,
                Ok(Some(_)) => {
                    tracing::warn!("a stream to the guest is closed: there are {} already", self.max_connections)
                }
                Ok(None) => return Ok(()),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                Err(error) => {
                    tracing::warn!("cannot take a stream to the guest: {error}");
                    // The one is lost, others may follow.
                    if error.kind() != io::ErrorKind::InvalidData {
                        return Ok(());
                    }
                }
            }
        }
    }

    fn connect(&mut self, stream: UnixStream, poller: &Poller) -> Result<(), DeviceError> {
        let port = self.free_port();
        let connection = Connection::new(stream, port, self.guest_port);
        let interest = connection.interest();
        if let Err(error) = poller.add(connection.stream(), port.into(), interest) {
            tracing::warn!("a connection to the guest is closed, as it cannot be waited for: {error}");
            return Ok(());
        }
        self.connections.insert(port, Entry { connection, interest, has_turn: false });
        self.tend(port, poller)
    }

    /// Ports are taken in turn: the guest may remember one for a while.
    fn free_port(&mut self) -> u32 {
        loop {
            let port = self.next_port.max(FIRST_PORT);
            self.next_port = port.wrapping_add(1);
            if port != u32::MAX && port != self.guest_port && !self.connections.contains_key(&port) {
                return port;
            }
        }
    }

    /// Does what follows when something has happened to a connection.
    fn tend(&mut self, port: u32, poller: &Poller) -> Result<(), DeviceError> {
        let Some(entry) = self.connections.get_mut(&port) else { return Ok(()) };
        if entry.connection.is_done() {
            if entry.has_turn {
                self.turns.retain(|&other| other != port);
            }
            self.connections.remove(&port);
            return Ok(());
        }
        let interest = entry.connection.interest();
        if interest != entry.interest {
            poller
                .modify(entry.connection.stream(), port.into(), interest)
                .map_err(DeviceError::host("wait for a connection"))?;
            entry.interest = interest;
        }
        if !entry.has_turn && entry.connection.wants_to_send() {
            entry.has_turn = true;
            self.turns.push_back(port);
        }
        Ok(())
    }

    /// Takes a packet of the guest's.
    fn take(&mut self, memory: &Memory, chain: Chain, poller: &Poller) -> Result<(), DeviceError> {
        let Some(packet) = Buffer::readable(memory, chain) else { return Ok(()) };
        let mut header = [0; SIZE];
        if packet.len() < header.len() {
            return Ok(());
        }
        packet.copy_to(&mut header);
        let header = Header::parse(&header);
        match self.connection_of(&header) {
            Some(connection) => {
                connection.take(&header, &packet.part(SIZE, header.len as usize));
                self.tend(header.dst_port, poller)
            }
            None => self.refuse(&header, poller),
        }
    }

    fn connection_of(&mut self, header: &Header) -> Option<&mut Connection> {
        let ours = header.kind == STREAM
            && (header.src_cid, header.src_port) == (GUEST_CID, self.guest_port)
            && header.dst_cid == HOST_CID;
        let entry = if ours { self.connections.get_mut(&header.dst_port) } else { None };
        entry.map(|entry| &mut entry.connection).filter(|connection| connection.is_known_to_guest())
    }

    /// Answers what belongs to no connection.
    fn refuse(&mut self, header: &Header, poller: &Poller) -> Result<(), DeviceError> {
        if header.src_cid != GUEST_CID || header.op == Some(Op::Reset) {
            return Ok(());
        }
        if self.refusals.len() < MAX_REFUSALS {
            self.refusals.push_back(header.refusal());
        }
        let knocks = header.op == Some(Op::Request)
            && header.kind == STREAM
            && (header.dst_cid, header.dst_port) == (HOST_CID, self.guest_port);
        if knocks && !self.ready {
            self.ready = true;
            self.knocked.raise();
        }
        self.listen(poller)
    }

    /// Fills the guest's receive buffers with what there is for it.
    fn fill(&mut self, io: &mut Io) -> Result<(), DeviceError> {
        if self.refusals.is_empty() && self.turns.is_empty() {
            return Ok(());
        }
        let Io { memory, queues, poller, .. } = io;
        let queue = &mut queues[RX];
        if !queue.ready() {
            return Ok(());
        }
        for _ in 0..QUEUE_SIZE {
            let Some(chain) = queue.pop(memory)? else {
                if queue.want_kicks(memory, true)? {
                    continue;
                }
                return Ok(());
            };
            let head = chain.head_index();
            let written = match Buffer::writable(memory, chain) {
                Some(buffer) if buffer.len() > SIZE => self.next_packet(&buffer, poller)?,
                // No driver offers such a buffer.
                _ => Some(0),
            };
            match written {
                Some(written) => queue.push(memory, head, written)?,
                None => {
                    queue.put_back();
                    return Ok(());
                }
            }
        }
        // Others have their turn first.
        queue.kick();
        Ok(())
    }

    /// Tells the guest of packets for it, and of its own that have left: with one interrupt for both, but at once. Whoever
    /// waits there for room in a socket is woken only when Linux knows that most of what was sent by it has left.
    fn tell(io: &mut Io) -> Result<(), DeviceError> {
        let Io { memory, queues, .. } = io;
        let (received, sent) = (queues[RX].take_notice(memory)?, queues[TX].take_notice(memory)?);
        if received || sent {
            queues[RX].interrupt().queue_used();
        }
        Ok(())
    }

    /// Makes the next packet for the guest; how long it is.
    fn next_packet(&mut self, buffer: &Buffer<'_>, poller: &Poller) -> Result<Option<u32>, DeviceError> {
        if let Some(refusal) = self.refusals.pop_front() {
            buffer.copy_from(&refusal.to_bytes());
            return Ok(Some(SIZE as u32));
        }
        while let Some(port) = self.turns.pop_front() {
            let Some(entry) = self.connections.get_mut(&port) else { continue };
            entry.has_turn = false;
            let written = entry.connection.send(buffer);
            self.tend(port, poller)?;
            if written.is_some() {
                return Ok(written);
            }
        }
        Ok(None)
    }

    /// Tells the guest that its connections are gone, if it has to know, and waits until it has taken note.
    fn announce_reset(&mut self, io: &mut Io) -> Result<(), DeviceError> {
        let Io { memory, queues, poller, .. } = io;
        let queue = &mut queues[EVENT];
        if self.reset == Reset::Owed
            && let Some(chain) = queue.pop(memory)?
        {
            let head = chain.head_index();
            if let Some(buffer) = Buffer::writable(memory, chain) {
                buffer.copy_from(&TRANSPORT_RESET);
            }
            queue.push(memory, head, TRANSPORT_RESET.len() as u32)?;
            self.reset = Reset::Told(waiting(queue, memory)?);
            queue.notify(memory)?;
        }
        if let Reset::Told(before) = self.reset
            && waiting(queue, memory)? > before
        {
            self.reset = Reset::None;
        }
        self.listen(poller)
    }
}

/// How many buffers are in the queue, none of which is taken. The driver tells when there are more.
fn waiting(queue: &mut VirtQueue, memory: &Memory) -> Result<u16, DeviceError> {
    let mut count = 0;
    while count < EVENT_QUEUE_SIZE && queue.pop(memory)?.is_some() {
        count += 1;
    }
    // It asks for a kick for what comes behind the last that was popped.
    if queue.want_kicks(memory, true)? {
        queue.kick();
    }
    (0..count).for_each(|_| queue.put_back());
    Ok(count)
}

impl Device for Vsock {
    fn kind(&self) -> Kind {
        Kind::Vsock
    }

    fn queue_sizes(&self) -> &[u16] {
        &[QUEUE_SIZE, QUEUE_SIZE, EVENT_QUEUE_SIZE]
    }

    fn config(&self) -> ConfigSpace {
        ConfigSpace::new(GUEST_CID.to_le_bytes().to_vec())
    }

    fn start(&mut self, io: &mut Io) -> Result<(), DeviceError> {
        self.listening = false;
        self.listen(&io.poller)?;
        for (&port, entry) in &self.connections {
            io.poller
                .add(entry.connection.stream(), port.into(), entry.interest)
                .map_err(DeviceError::host("wait for a connection"))?;
        }
        Ok(())
    }

    fn queue_ready(&mut self, io: &mut Io, queue: usize) -> Result<(), DeviceError> {
        match queue {
            TX => {
                let Io { memory, queues, poller, .. } = io;
                queues[TX].drain_untold(memory, QUEUE_SIZE, |chain| {
                    self.take(memory, chain, poller)?;
                    Ok(Served::Done(0))
                })?;
            }
            EVENT => self.announce_reset(io)?,
            _ => {}
        }
        self.fill(io)?;
        Self::tell(io)
    }

    fn descriptor_ready(&mut self, io: &mut Io, ready: Ready) -> Result<(), DeviceError> {
        if ready.token == DOOR {
            self.accept(&io.poller)?;
        } else if let Ok(port) = u32::try_from(ready.token)
            && let Some(entry) = self.connections.get_mut(&port)
        {
            entry.connection.stream_ready(ready.flags);
            self.tend(port, &io.poller)?;
        }
        self.fill(io)?;
        Self::tell(io)
    }

    fn reset(&mut self) {
        self.ready = false;
        self.reset = Reset::None;
        self.connections.clear();
        self.turns.clear();
        self.refusals.clear();
    }

    fn save(&mut self) -> Result<Vec<u8>, DeviceError> {
        let known = self.connections.values().any(|entry| entry.connection.is_known_to_guest());
        let saved = Saved { ready: self.ready, reset: known || self.reset != Reset::None, next_port: self.next_port };
        postcard::to_stdvec(&saved).map_err(io::Error::other).map_err(DeviceError::host("save the socket device"))
    }

    fn restore(&mut self, state: &[u8]) -> Result<(), DeviceError> {
        let (saved, rest) = postcard::take_from_bytes::<Saved>(state)
            .map_err(|_| DeviceError::State("the socket device's is not readable"))?;
        if !rest.is_empty() {
            return Err(DeviceError::State("the socket device's is too long"));
        }
        self.ready = saved.ready;
        self.reset = if saved.reset { Reset::Owed } else { Reset::None };
        // The guest may still know the last ones.
        self.next_port = saved.next_port;
        Ok(())
    }
}
