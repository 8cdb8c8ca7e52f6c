//! The socket device, with streams of the host's at its door.

use std::fs::File;
use std::io::{Read as _, Write as _};
use std::net::Shutdown;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;

use arbitrary::{Result, Unstructured};
use runvm_vmm::Event;
use runvm_vmm::door::{Door, hand_over};
use runvm_vmm::virtio::vsock::{GUEST_CID, HOST_CID, Vsock};
use rustix::fs::{MemfdFlags, memfd_create};
use rustix::net::{AddressFamily, SendFlags, SocketFlags, SocketType, send, socketpair};

use crate::bench::{self, Bench, Subject};
use crate::guest::{Piece, length, raw};

const RX: usize = 0;
const TX: usize = 1;
const PORT: u32 = 1024;
/// The first port that the device gives a stream: it passes over the guest's.
const FIRST: u32 = 1025;
const STREAM: u16 = 1;
const REQUEST: u16 = 1;
const RESPONSE: u16 = 2;
const DATA: u16 = 5;
/// How many of the host's ends are kept.
const MAX_STREAMS: usize = 12;

/// Does what the input says.
pub fn run(data: &[u8]) {
    bench::run::<Host>(data);
}

struct Host {
    /// Beyond the door.
    outside: Option<OwnedFd>,
    streams: Vec<UnixStream>,
    /// How many have come in, which tells their ports.
    connected: u32,
}

#[expect(clippy::expect_used, reason = "a fuzzer ends where the host has no descriptors")]
impl Subject for Host {
    type Device = Vsock;

    fn new(_: &mut Unstructured<'_>) -> Result<Self> {
        Ok(Self { outside: None, streams: Vec::new(), connected: 0 })
    }

    fn device(&mut self) -> Vsock {
        let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
        let (outside, inside) = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None).expect("sockets");
        self.outside = Some(outside);
        Vsock::new(Door::new(inside), PORT, Event::new().expect("an event"))
    }

    fn request(&mut self, u: &mut Unstructured<'_>, queue: usize) -> Result<Vec<Piece>> {
        if u.ratio(1, 12)? {
            return raw(u);
        }
        if queue != TX {
            let bytes = *u.choose(&[0, 4, 43, 44, 45, 100, 4096, 1 << 16])?;
            return Ok(vec![Piece::Writable(bytes); u.int_in_range(1..=3)?]);
        }
        let op = u.int_in_range(0..=8)?;
        let port = self.port(u)?;
        packet(u, op, port)
    }

    fn event(&mut self, u: &mut Unstructured<'_>, _: &mut Vsock) -> Result<()> {
        match u.int_in_range(0..=15)? {
            0..=2 => self.connect(),
            3..=5 => self.with_stream(u, |u, stream| {
                let bytes = length(u)?.min(1 << 19);
                let _ = stream.write(&vec![0x42; bytes as usize]);
                Ok(())
            })?,
            6..=8 => self.with_stream(u, |u, stream| {
                let bytes = length(u)?.min(1 << 19);
                let _ = stream.read(&mut vec![0; bytes as usize]);
                Ok(())
            })?,
            9 | 10 => self.with_stream(u, |u, stream| {
                let _ = stream.shutdown(*u.choose(&[Shutdown::Read, Shutdown::Write, Shutdown::Both])?);
                Ok(())
            })?,
            11 | 12 if !self.streams.is_empty() => {
                let which = u.choose_index(self.streams.len())?;
                drop(self.streams.swap_remove(which));
            }
            13 => self.knock_with_nothing(u)?,
            14 => self.outside = None,
            _ => {}
        }
        Ok(())
    }

    /// Streams that are open at both ends.
    fn sequence(bench: &mut Bench<Self>, u: &mut Unstructured<'_>) -> Result<()> {
        for _ in 0..u.int_in_range(0..=8)? {
            bench.request_of(u, RX, &[Piece::Writable(4096)])?;
        }
        let knock = packet(u, REQUEST, PORT)?;
        bench.request_of(u, TX, &knock)?;
        for _ in 0..u.int_in_range(1..=3)? {
            bench.subject().connect();
            bench.serve();
            let port = FIRST.wrapping_add(bench.subject().connected).wrapping_sub(1);
            let response = packet(u, RESPONSE, port)?;
            bench.request_of(u, TX, &response)?;
        }
        for _ in 0..u.int_in_range(0..=8)? {
            if u.arbitrary()? {
                bench.event(u)?;
            } else {
                let port = bench.subject().port(u)?;
                let data = packet(u, DATA, port)?;
                bench.request_of(u, TX, &data)?;
            }
        }
        Ok(())
    }
}

impl Host {
    fn connect(&mut self) {
        let (Some(outside), Ok((ours, theirs))) = (&self.outside, UnixStream::pair()) else { return };
        let _ = ours.set_nonblocking(true);
        if hand_over(outside, theirs).is_ok() {
            self.connected += 1;
            self.streams.push(ours);
            if self.streams.len() > MAX_STREAMS {
                self.streams.remove(0);
            }
        }
    }

    /// What is announced is no stream.
    fn knock_with_nothing(&mut self, u: &mut Unstructured<'_>) -> Result<()> {
        let Some(outside) = &self.outside else { return Ok(()) };
        if u.arbitrary()? {
            let _ = send(outside, &[0; 3], SendFlags::NOSIGNAL);
        } else if let Ok(file) = memfd_create("no socket", MemfdFlags::CLOEXEC) {
            self.connected += u32::from(hand_over(outside, File::from(file)).is_ok());
        }
        Ok(())
    }

    fn with_stream<'a>(
        &mut self,
        u: &mut Unstructured<'a>,
        act: impl FnOnce(&mut Unstructured<'a>, &mut UnixStream) -> Result<()>,
    ) -> Result<()> {
        if self.streams.is_empty() {
            return Ok(());
        }
        let which = u.choose_index(self.streams.len())?;
        act(u, &mut self.streams[which])
    }

    /// The port of a stream, mostly.
    fn port(&self, u: &mut Unstructured<'_>) -> Result<u32> {
        Ok(match u.int_in_range(0..=15)? {
            0 => u.arbitrary()?,
            1 => PORT,
            _ => FIRST.wrapping_add(u.int_in_range(0..=self.connected)?),
        })
    }
}

/// A packet for this port of the host's: as the guest's kernel sends it, mostly.
fn packet(u: &mut Unstructured<'_>, op: u16, port: u32) -> Result<Vec<Piece>> {
    let payload = if op == DATA { length(u)?.min(1 << 17) } else { 0 };
    let (mut source, mut target, mut guest_port, mut kind) = (GUEST_CID, HOST_CID, PORT, STREAM);
    let (mut said, mut room, mut forwarded) = (payload, 1 << 18, 0);
    if u.ratio(1, 4)? {
        match u.int_in_range(0..=6)? {
            0 => source = u.arbitrary()?,
            1 => target = u.arbitrary()?,
            2 => guest_port = u.arbitrary()?,
            3 => kind = u.arbitrary()?,
            4 => said = length(u)?,
            5 => room = length(u)?,
            _ => forwarded = length(u)?,
        }
    }
    let flags = u.int_in_range(0..=4u32)?;
    let header = [
        &source.to_le_bytes()[..],
        &target.to_le_bytes(),
        &guest_port.to_le_bytes(),
        &port.to_le_bytes(),
        &said.to_le_bytes(),
        &kind.to_le_bytes(),
        &op.to_le_bytes(),
        &flags.to_le_bytes(),
        &room.to_le_bytes(),
        &forwarded.to_le_bytes(),
    ]
    .concat();
    let payload = vec![0x33; payload as usize];
    // Header and payload together, apart, or cut anywhere.
    Ok(match u.int_in_range(0..=2)? {
        0 => vec![Piece::Readable([header, payload].concat())],
        1 => vec![Piece::Readable(header), Piece::Readable(payload)],
        _ => {
            let all = [header, payload].concat();
            let (first, second) = all.split_at(u.int_in_range(0..=all.len())?);
            vec![Piece::Readable(first.to_vec()), Piece::Readable(second.to_vec())]
        }
    })
}
