//! One connection: the guest at one end, a Unix stream of the host's at the other.
//!
//! What the guest sends goes into the stream at once. What the stream does not take is kept, and the guest is never
//! told of more room than there is for that. What comes out of the stream goes straight into the guest's buffers, as
//! long as the guest has room, and otherwise stays where it is.

use std::collections::VecDeque;
use std::net::Shutdown;
use std::os::unix::net::UnixStream;

use rustix::event::epoll::EventFlags;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use vm_memory::VolatileSlice;

use super::buffer::Buffer;
use super::packet::{Header, NEITHER, NO_RECEIVE, NO_SEND, Op, SIZE, STREAM};
use super::{GUEST_CID, HOST_CID};

/// How many bytes of the guest's are kept for a stream that does not take them.
pub(super) const BUF_ALLOC: u32 = 256 * 1024;

/// How far a connection is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    /// The guest is to be asked.
    New,
    /// It has been asked.
    Asked,
    /// Bytes flow.
    Open,
    /// The guest is to be told that it is over.
    Ending,
    /// It is over for the guest. What it has sent is still on its way.
    Over,
}

/// A connection.
#[derive(Debug)]
pub(super) struct Connection {
    stream: UnixStream,
    host_port: u32,
    guest_port: u32,
    phase: Phase,
    /// Whether there may be something to read in the stream.
    readable: bool,
    /// Which directions the guest has ended, as a SHUTDOWN says it.
    guest_ended: u32,
    /// Which directions the stream has ended.
    host_ended: u32,
    /// What of that the guest knows.
    told_ended: u32,
    /// The stream has seen the end behind the guest's last byte.
    finished: bool,
    /// The guest's bytes that the stream has not taken.
    backlog: VecDeque<u8>,
    /// How many of the guest's bytes have left, modulo 2^32.
    forwarded: u32,
    /// What of that the guest knows.
    told_forwarded: u32,
    /// The guest wants to know it.
    credit_requested: bool,
    /// How many bytes have been sent to the guest, modulo 2^32.
    sent: u32,
    guest_buf_alloc: u32,
    guest_fwd_cnt: u32,
    /// The guest has been asked for room since it last had some.
    asked_for_credit: bool,
}

impl Connection {
    /// A connection that the guest does not know yet.
    pub(super) fn new(stream: UnixStream, host_port: u32, guest_port: u32) -> Self {
        Self {
            stream,
            host_port,
            guest_port,
            phase: Phase::New,
            readable: false,
            guest_ended: 0,
            host_ended: 0,
            told_ended: 0,
            finished: false,
            backlog: VecDeque::new(),
            forwarded: 0,
            told_forwarded: 0,
            credit_requested: false,
            sent: 0,
            guest_buf_alloc: 0,
            guest_fwd_cnt: 0,
            asked_for_credit: false,
        }
    }

    /// The host's end.
    pub(super) fn stream(&self) -> &UnixStream {
        &self.stream
    }

    /// What to wait for in the stream. Its being writable matters only while it is behind.
    pub(super) fn interest(&self) -> EventFlags {
        let always = EventFlags::IN | EventFlags::ET;
        if self.backlog.is_empty() { always } else { always | EventFlags::OUT }
    }

    /// Whether the guest has, or may have, a socket for it.
    pub(super) fn is_known_to_guest(&self) -> bool {
        matches!(self.phase, Phase::Asked | Phase::Open | Phase::Ending)
    }

    /// Whether nothing is left to be done for it.
    pub(super) fn is_done(&self) -> bool {
        self.phase == Phase::Over && self.backlog.is_empty()
    }

    /// Whether [`Connection::send`] has a packet for the guest.
    pub(super) fn wants_to_send(&self) -> bool {
        match self.phase {
            Phase::New | Phase::Ending => true,
            Phase::Asked | Phase::Over => false,
            Phase::Open => {
                self.may_read() && self.credit() > 0
                    || self.host_ended != self.told_ended
                    || self.lacks_credit()
                    || self.owes_credit()
            }
        }
    }

    /// Takes a packet of the guest's.
    pub(super) fn take(&mut self, header: &Header, payload: &Buffer<'_>) {
        self.guest_buf_alloc = header.buf_alloc;
        self.guest_fwd_cnt = header.fwd_cnt;
        self.asked_for_credit &= self.credit() == 0;
        match (self.phase, header.op) {
            (_, Some(Op::Reset)) => self.leave(Phase::Over),
            (Phase::Ending, _) => {}
            (Phase::Asked, Some(Op::Response)) => self.phase = Phase::Open,
            (Phase::Open, Some(Op::Data)) if self.has_room_for(header, payload) => self.forward(payload),
            (Phase::Open, Some(Op::Shutdown)) => self.end_by_guest(header.flags & NEITHER),
            (Phase::Open, Some(Op::CreditUpdate)) => {}
            (Phase::Open, Some(Op::CreditRequest)) => self.credit_requested = true,
            _ => self.leave(Phase::Ending),
        }
        self.settle();
    }

    /// The stream is ready.
    pub(super) fn stream_ready(&mut self, flags: EventFlags) {
        self.readable = true;
        if flags.intersects(EventFlags::HUP | EventFlags::ERR) {
            self.lose_reader();
        }
        self.flush();
        self.settle();
    }

    /// Makes the next packet for the guest in one of its buffers, which has room for more than a header. How long the
    /// packet is; none where there is nothing to say after all.
    pub(super) fn send(&mut self, buffer: &Buffer<'_>) -> Option<u32> {
        let packet = self.next_packet(buffer);
        self.settle();
        let (op, flags, len) = packet?;
        self.told_forwarded = self.forwarded;
        self.credit_requested = false;
        let header = Header {
            src_cid: HOST_CID,
            dst_cid: GUEST_CID,
            src_port: self.host_port,
            dst_port: self.guest_port,
            len,
            kind: STREAM,
            op: Some(op),
            flags,
            buf_alloc: BUF_ALLOC,
            fwd_cnt: self.forwarded,
        };
        buffer.copy_from(&header.to_bytes());
        Some(SIZE as u32 + len)
    }

    /// The operation, the flags and the length of the payload, which is in the buffer already.
    fn next_packet(&mut self, buffer: &Buffer<'_>) -> Option<(Op, u32, u32)> {
        match self.phase {
            Phase::New => {
                self.phase = Phase::Asked;
                Some((Op::Request, 0, 0))
            }
            Phase::Ending => {
                self.phase = Phase::Over;
                Some((Op::Reset, 0, 0))
            }
            Phase::Asked | Phase::Over => None,
            Phase::Open => {
                if let Some(len) = self.read_into(buffer) {
                    return Some((Op::Data, 0, len));
                }
                if self.host_ended != self.told_ended {
                    self.told_ended = self.host_ended;
                    return Some((Op::Shutdown, self.told_ended, 0));
                }
                if self.lacks_credit() {
                    self.asked_for_credit = true;
                    return Some((Op::CreditRequest, 0, 0));
                }
                self.owes_credit().then_some((Op::CreditUpdate, 0, 0))
            }
        }
    }

    /// Reads the stream into the buffer, behind the place of the header.
    fn read_into(&mut self, buffer: &Buffer<'_>) -> Option<u32> {
        let credit = self.credit();
        if !self.may_read() || credit == 0 {
            return None;
        }
        match buffer.part(SIZE, credit as usize).receive(&self.stream) {
            Ok(read @ 1..) => {
                self.sent = self.sent.wrapping_add(read as u32);
                return Some(read as u32);
            }
            Ok(0) => {
                self.host_ended |= NO_SEND;
                // Both ends at once, where both are known: the guest tells a reader that went from one that listens.
                if self.is_hung_up() {
                    self.lose_reader();
                }
            }
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {}
            Err(_) => {
                self.host_ended |= NO_SEND;
                self.lose_reader();
            }
        }
        self.readable = false;
        None
    }

    fn may_read(&self) -> bool {
        self.readable && self.host_ended & NO_SEND == 0 && self.guest_ended & NO_RECEIVE == 0
    }

    /// How many bytes the guest has room for.
    fn credit(&self) -> u32 {
        self.guest_buf_alloc.saturating_sub(self.sent.wrapping_sub(self.guest_fwd_cnt))
    }

    fn lacks_credit(&self) -> bool {
        self.may_read() && self.credit() == 0 && !self.asked_for_credit
    }

    /// Whether the guest has to learn how many bytes have left: seldom, as each time costs an interrupt, and before it
    /// has to wait. Linux has no more on the way than it would itself take.
    fn owes_credit(&self) -> bool {
        let untold = self.forwarded.wrapping_sub(self.told_forwarded);
        let window = BUF_ALLOC.min(self.guest_buf_alloc);
        self.credit_requested || untold > 0 && untold >= window / 2
    }

    /// Whether the packet is what it says, and no more than the guest was told there is room for.
    fn has_room_for(&self, header: &Header, payload: &Buffer<'_>) -> bool {
        let length = payload.len();
        self.guest_ended & NO_SEND == 0
            && length == header.len as usize
            && length <= (BUF_ALLOC as usize).saturating_sub(self.backlog.len())
    }

    /// Passes the guest's bytes on, and keeps what the stream does not take. They come after those that are kept.
    fn forward(&mut self, payload: &Buffer<'_>) {
        let mut sent = 0;
        if self.backlog.is_empty() && self.host_ended & NO_RECEIVE == 0 {
            match payload.send(&self.stream) {
                Ok(taken) => sent = taken,
                Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {}
                Err(_) => self.lose_reader(),
            }
        }
        if self.host_ended & NO_RECEIVE != 0 {
            sent = payload.len();
        }
        self.forwarded = self.forwarded.wrapping_add(sent as u32);
        self.keep(&payload.part(sent, usize::MAX));
    }

    fn keep(&mut self, payload: &Buffer<'_>) {
        let mut chunk = [0; 16 * 1024];
        let mut kept = 0;
        while kept < payload.len() {
            let part = payload.part(kept, chunk.len());
            part.copy_to(&mut chunk);
            self.backlog.extend(&chunk[..part.len()]);
            kept += part.len();
        }
    }

    /// Passes on what was kept, as far as the stream takes it.
    fn flush(&mut self) {
        while !self.backlog.is_empty() {
            let (first, second) = self.backlog.as_mut_slices();
            let kept = Buffer::from([first, second].map(VolatileSlice::from));
            match kept.send(&self.stream) {
                Ok(sent) => {
                    self.backlog.drain(..sent);
                    self.forwarded = self.forwarded.wrapping_add(sent as u32);
                }
                Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => return,
                Err(_) => self.lose_reader(),
            }
        }
        // Most streams are never behind again.
        self.backlog = VecDeque::new();
    }

    /// Nobody reads the stream any more: what the guest sends goes nowhere.
    fn lose_reader(&mut self) {
        self.host_ended |= NO_RECEIVE;
        self.forwarded = self.forwarded.wrapping_add(self.backlog.len() as u32);
        self.backlog = VecDeque::new();
    }

    /// The guest's SHUTDOWN. Once both directions have ended it waits for a reset, which frees its socket.
    fn end_by_guest(&mut self, flags: u32) {
        self.guest_ended |= flags;
        if self.guest_ended == NEITHER {
            self.leave(Phase::Ending);
        } else if self.guest_ended & NO_RECEIVE != 0 {
            self.refuse_more();
        }
    }

    /// The guest's end goes: nothing more comes from it or reaches it.
    fn leave(&mut self, phase: Phase) {
        self.phase = phase;
        self.guest_ended = NEITHER;
        self.refuse_more();
    }

    /// Lets whoever writes into the stream know that it is in vain.
    fn refuse_more(&self) {
        // It fails only where the other end is gone.
        let _ = self.stream.shutdown(Shutdown::Read);
    }

    /// Draws the conclusions from what has ended.
    fn settle(&mut self) {
        if self.backlog.is_empty() && self.guest_ended & NO_SEND != 0 && !self.finished {
            self.finished = true;
            // It fails only where the other end is gone.
            let _ = self.stream.shutdown(Shutdown::Write);
        }
        if self.host_ended & self.guest_ended & NO_RECEIVE != 0 {
            // Neither side listens.
            self.host_ended = NEITHER;
        }
        if self.phase == Phase::Open && self.told_ended == NEITHER {
            // The guest has seen the end behind the last byte; its socket can be gone at any time.
            self.leave(Phase::Over);
        }
    }

    fn is_hung_up(&self) -> bool {
        let now = Timespec { tv_sec: 0, tv_nsec: 0 };
        let mut watched = [PollFd::new(&self.stream, PollFlags::empty())];
        poll(&mut watched, Some(&now)).is_ok() && watched[0].revents().contains(PollFlags::HUP)
    }
}
