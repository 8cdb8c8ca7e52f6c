//! The device between a guest's driver and real Unix sockets, in one thread: whatever happens, happens when
//! [`Guest::serve`] lets it.

mod flow;
mod hostile;
mod lifecycle;

use std::io::{ErrorKind, Read as _, Write as _};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;

use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};

use super::connection::BUF_ALLOC;
use super::packet::{NEITHER, NO_RECEIVE, NO_SEND};
use super::*;
use crate::door::hand_over;
use crate::virtio::driver::{Driver, Piece, Request};

const PORT: u32 = 77;
/// How much the guest's end of a connection holds, where a test does not say.
const ROOM: u32 = 64 * 1024;
const SENTINEL: u64 = 1 << 40;

/// A packet as the guest sees it.
type Packet = (Header, Vec<u8>);

struct Guest {
    device: Vsock,
    driver: Driver,
    knocked: Event,
    sentinel: Event,
    outside: OwnedFd,
    /// The receive buffers that the device has not used.
    offered: VecDeque<Request>,
}

impl Guest {
    fn new() -> Self {
        let knocked = Event::new().unwrap();
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let (outside, inside) = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None).unwrap();
        let mut device = Vsock::new(Door::new(inside), PORT, knocked.try_clone().unwrap());
        let mut driver = Driver::new(&device);
        let sentinel = Event::new().unwrap();
        sentinel.raise();
        driver.io.poller.add(&sentinel, SENTINEL, EventFlags::IN).unwrap();
        device.start(&mut driver.io).unwrap();
        Self { device, driver, knocked, sentinel, outside, offered: VecDeque::new() }
    }

    /// One that has knocked, and offers as many receive buffers as it can.
    fn ready() -> Self {
        let mut guest = Self::new();
        guest.offer(QUEUE_SIZE, 4096);
        guest.knock();
        let answers = guest.receive();
        assert_eq!(answers.len(), 1);
        assert_eq!(answers[0].0.op, Some(Op::Reset));
        guest
    }

    fn knock(&mut self) {
        self.send(Header { dst_port: PORT, src_port: 5000, ..packet(0, Op::Request) }, &[]);
    }

    fn offer(&mut self, count: u16, length: u32) {
        for _ in 0..count {
            let request = self.driver.put(RX, &[Piece::Writable(length)]);
            self.offered.push_back(request);
        }
        self.device.queue_ready(&mut self.driver.io, RX).unwrap();
        self.serve();
    }

    /// Has the device do all that it has to do. Fails where it would never rest.
    fn serve(&mut self) {
        for _ in 0..10_000 {
            let mut busy = false;
            for ready in self.driver.io.poller.wait().unwrap() {
                if ready.token != SENTINEL {
                    self.device.descriptor_ready(&mut self.driver.io, ready).unwrap();
                    busy = true;
                }
            }
            for queue in [RX, TX, EVENT] {
                if self.driver.io.queues[queue].kick_descriptor().clear() {
                    self.device.queue_ready(&mut self.driver.io, queue).unwrap();
                    busy = true;
                }
            }
            if !busy {
                return;
            }
        }
        panic!("the device never rests");
    }

    fn send(&mut self, header: Header, payload: &[u8]) {
        let header = Header { len: payload.len() as u32, ..header };
        self.send_raw(&[Piece::Readable(&header.to_bytes()), Piece::Readable(payload)]);
    }

    fn send_raw(&mut self, pieces: &[Piece<'_>]) {
        let request = self.driver.put(TX, pieces);
        self.device.queue_ready(&mut self.driver.io, TX).unwrap();
        assert_eq!(self.driver.used(TX), Some((request.head, 0)));
        self.serve();
    }

    /// The packets that have come. New buffers are offered in place of those they came in.
    fn receive(&mut self) -> Vec<Packet> {
        let mut packets = Vec::new();
        while let Some(packet) = self.take_one() {
            packets.push(packet);
            self.offer(1, 4096);
        }
        packets
    }

    fn take_one(&mut self) -> Option<Packet> {
        let (head, written) = self.driver.used(RX)?;
        let request = self.offered.pop_front().unwrap();
        assert_eq!(request.head, head);
        let bytes = self.driver.written(&request);
        let (header, payload) = bytes[..written as usize].split_at(SIZE);
        let header = Header::parse(header.try_into().unwrap());
        assert_eq!(payload.len(), header.len as usize);
        Some((header, payload.to_vec()))
    }

    /// The one packet that has come.
    #[track_caller]
    fn receive_one(&mut self) -> Packet {
        let mut packets = self.receive();
        assert_eq!(packets.len(), 1, "{packets:?}");
        packets.remove(0)
    }

    /// What the one packet that has come says, without payload.
    #[track_caller]
    fn receive_op(&mut self) -> (Op, u32) {
        let (header, payload) = self.receive_one();
        assert!(payload.is_empty());
        (header.op.unwrap(), header.flags)
    }

    /// A client of the host's.
    fn client(&mut self) -> UnixStream {
        let (client, theirs) = UnixStream::pair().unwrap();
        hand_over(&self.outside, theirs).unwrap();
        client.set_nonblocking(true).unwrap();
        self.serve();
        client
    }

    /// A client that the guest has accepted, and the host's port.
    fn connected(&mut self) -> (UnixStream, u32) {
        let client = self.client();
        let (header, _) = self.receive_one();
        assert_eq!(header.op, Some(Op::Request));
        assert_eq!((header.src_cid, header.dst_cid, header.dst_port), (2, 3, PORT));
        assert_eq!((header.kind, header.buf_alloc, header.fwd_cnt), (STREAM, BUF_ALLOC, 0));
        self.send(packet(header.src_port, Op::Response), &[]);
        (client, header.src_port)
    }
}

/// A packet of the guest's on a connection.
fn packet(host_port: u32, op: Op) -> Header {
    Header {
        src_cid: 3,
        dst_cid: 2,
        src_port: PORT,
        dst_port: host_port,
        len: 0,
        kind: STREAM,
        op: Some(op),
        flags: 0,
        buf_alloc: ROOM,
        fwd_cnt: 0,
    }
}

fn shutdown(host_port: u32, flags: u32) -> Header {
    Header { flags, ..packet(host_port, Op::Shutdown) }
}

/// All that there is to read, and whether the stream has ended.
fn read(client: &mut UnixStream) -> (Vec<u8>, bool) {
    let mut all = Vec::new();
    match client.read_to_end(&mut all) {
        Ok(_) => (all, true),
        Err(error) if error.kind() == ErrorKind::WouldBlock => (all, false),
        Err(error) => panic!("{error}"),
    }
}

/// Bytes of which no two pieces are alike.
fn pattern(length: usize) -> Vec<u8> {
    (0..length as u32).map(|index| (index.wrapping_mul(2_654_435_761) >> 13) as u8).collect()
}
