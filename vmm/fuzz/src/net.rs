//! The network card, with a pair of sockets for its tap.

use std::os::fd::OwnedFd;

use arbitrary::{Result, Unstructured};
use runvm_vmm::virtio::Io;
use runvm_vmm::virtio::net::Net;
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, recv, send, socketpair, sockopt};

use crate::bench::{self, Bench, Subject};
use crate::guest::{Piece, length, raw};

const RECEIVE: usize = 0;
/// Frames of the host's, their headers included: none of the guest's buffers to more than all that a frame may take.
const FRAMES: [usize; 10] = [1, 11, 12, 13, 60, 1526, 4096, 9000, 65_562, 70_000];

/// Does what the input says.
pub fn run(data: &[u8]) {
    bench::run::<Tap>(data);
}

struct Tap {
    far: Option<OwnedFd>,
    mtu: u16,
}

#[expect(clippy::expect_used, reason = "a fuzzer ends where the host has no descriptors")]
impl Subject for Tap {
    type Device = Net;

    fn new(u: &mut Unstructured<'_>) -> Result<Self> {
        Ok(Self { far: None, mtu: *u.choose(&[1500, 0, 68, 9000, u16::MAX])? })
    }

    fn device(&mut self) -> Net {
        let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
        let (tap, far) = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None).expect("sockets");
        sockopt::set_socket_send_buffer_size(&far, 1 << 20).expect("a buffer");
        // A tap that is soon full.
        sockopt::set_socket_send_buffer_size(&tap, 1 << 14).expect("a buffer");
        self.far = Some(far);
        Net::new(tap, [2, 0, 0, 0, 0, 1], self.mtu)
    }

    fn start(device: &mut Net, io: &mut Io) -> bool {
        device.attach(io).is_ok()
    }

    fn request(&mut self, u: &mut Unstructured<'_>, queue: usize) -> Result<Vec<Piece>> {
        if u.ratio(1, 8)? {
            return raw(u);
        }
        if queue == RECEIVE {
            return (0..u.int_in_range(1..=3)?)
                .map(|_| {
                    let bytes = *u.choose(&[12, 13, 64, 1526, 4096, 65_562, 1 << 17])?;
                    Ok(Piece::Writable(if u.ratio(1, 8)? { length(u)? } else { bytes }))
                })
                .collect();
        }
        let header: [u8; 12] = u.arbitrary()?;
        let bytes = *u.choose(&FRAMES)?;
        Ok(vec![Piece::Readable(header.to_vec()), Piece::Readable(vec![0xee; bytes])])
    }

    fn event(&mut self, u: &mut Unstructured<'_>, _: &mut Net) -> Result<()> {
        let Some(far) = &self.far else { return Ok(()) };
        match u.int_in_range(0..=15)? {
            0..=8 => {
                let bytes = *u.choose(&FRAMES)?;
                let _ = send(far, &vec![0x77; bytes], SendFlags::NOSIGNAL);
            }
            9..=13 => {
                let mut frame = vec![0; 1 << 17];
                while recv(far, &mut frame[..], RecvFlags::empty()).is_ok_and(|(_, length)| length > 0) {}
            }
            // An end, as no tap has it.
            14 => drop(send(far, &[], SendFlags::NOSIGNAL)),
            _ => self.far = None,
        }
        Ok(())
    }

    /// A guest that has offered buffers, and frames for them.
    fn sequence(bench: &mut Bench<Self>, u: &mut Unstructured<'_>) -> Result<()> {
        let bytes = *u.choose(&[1526, 4096, 65_562])?;
        for _ in 0..u.int_in_range(1..=48)? {
            bench.request_of(u, RECEIVE, &[Piece::Writable(bytes)])?;
        }
        for _ in 0..u.int_in_range(1..=8)? {
            bench.event(u)?;
        }
        Ok(())
    }
}
