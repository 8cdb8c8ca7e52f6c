//! A guest's buffers, and the two system calls that move bytes between them and a stream without a copy in between.

use std::io;
use std::mem::MaybeUninit;
use std::os::fd::AsRawFd as _;
use std::os::unix::net::UnixStream;

use virtio_queue::desc::split::Descriptor;
use vm_memory::{Bytes as _, GuestMemory as _, VolatileSlice};

use super::super::Chain;
use crate::Memory;

/// How many pieces of a chain are looked at. Linux makes a header and at most 17 more.
const MAX_PIECES: usize = 64;

/// A run of memory in pieces, mostly the guest's, which may be changing it.
pub(super) struct Buffer<'a>(Vec<VolatileSlice<'a>>);

impl<'a> Buffer<'a> {
    /// What the device may read of a chain; none where a part of it is no memory.
    pub(super) fn readable(memory: &'a Memory, chain: Chain) -> Option<Self> {
        Self::of(memory, chain.readable())
    }

    /// What the device may write of a chain; none where a part of it is no memory.
    pub(super) fn writable(memory: &'a Memory, chain: Chain) -> Option<Self> {
        Self::of(memory, chain.writable())
    }

    fn of(memory: &'a Memory, descriptors: impl Iterator<Item = Descriptor>) -> Option<Self> {
        let slices = descriptors
            .take(MAX_PIECES)
            .flat_map(|descriptor| memory.get_slices(descriptor.addr(), descriptor.len() as usize));
        slices.take(MAX_PIECES).collect::<Result<_, _>>().ok().map(Self)
    }

    /// How many bytes it has.
    pub(super) fn len(&self) -> usize {
        // A chain is shorter than 2^32 bytes.
        self.0.iter().map(VolatileSlice::len).sum()
    }

    /// At most `length` bytes from `start` on: fewer where it ends before.
    pub(super) fn part(&self, start: usize, length: usize) -> Self {
        let (mut skip, mut wanted) = (start, length);
        let mut part = Vec::with_capacity(self.0.len());
        for piece in &self.0 {
            let skipped = skip.min(piece.len());
            let taken = wanted.min(piece.len() - skipped);
            if taken > 0 {
                part.extend(piece.subslice(skipped, taken).ok());
            }
            skip -= skipped;
            wanted -= taken;
        }
        Self(part)
    }

    /// Copies its first bytes out, as many as there is room for.
    pub(super) fn copy_to(&self, into: &mut [u8]) {
        let mut at = 0;
        for piece in &self.0 {
            at += piece.read(&mut into[at..], 0).unwrap_or_default();
        }
    }

    /// Copies bytes to its beginning, as many as it has room for.
    pub(super) fn copy_from(&self, from: &[u8]) {
        let mut at = 0;
        for piece in &self.0 {
            at += piece.write(&from[at..], 0).unwrap_or_default();
        }
    }

    /// Sends it into the stream, as much as that takes at once.
    ///
    /// # Errors
    /// `WouldBlock`; what the stream says.
    pub(super) fn send(&self, stream: &UnixStream) -> io::Result<usize> {
        self.message(|message| {
            let flags = libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL;
            // SAFETY: the message names pieces of memory that stay mapped during the call, which only reads them.
            unsafe { libc::sendmsg(stream.as_raw_fd(), message, flags) }
        })
    }

    /// Fills it from the stream, as far as that goes at once. 0 is the stream's end.
    ///
    /// # Errors
    /// `WouldBlock`; what the stream says.
    pub(super) fn receive(&self, stream: &UnixStream) -> io::Result<usize> {
        self.message(|message| {
            // SAFETY: the message names pieces of the guest's memory, mapped during the call and nobody's in Rust,
            // and has no room for control data.
            unsafe { libc::recvmsg(stream.as_raw_fd(), message, libc::MSG_DONTWAIT) }
        })
    }

    fn message(&self, call: impl Fn(&mut libc::msghdr) -> libc::ssize_t) -> io::Result<usize> {
        let guards: Vec<_> = self.0.iter().map(VolatileSlice::ptr_guard_mut).collect();
        let pieces = guards.iter().map(|guard| libc::iovec { iov_base: guard.as_ptr().cast(), iov_len: guard.len() });
        let mut pieces: Vec<_> = pieces.collect();
        // SAFETY: a structure of integers and pointers, for which zeros are "none".
        let mut message: libc::msghdr = unsafe { MaybeUninit::zeroed().assume_init() };
        message.msg_iov = pieces.as_mut_ptr();
        message.msg_iovlen = pieces.len() as _;
        loop {
            if let Ok(moved) = usize::try_from(call(&mut message)) {
                return Ok(moved);
            }
            let error = io::Error::last_os_error();
            if error.kind() != io::ErrorKind::Interrupted {
                return Err(error);
            }
        }
    }
}

impl<'a, const N: usize> From<[VolatileSlice<'a>; N]> for Buffer<'a> {
    fn from(pieces: [VolatileSlice<'a>; N]) -> Self {
        Self(pieces.into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_end_where_the_buffer_ends() {
        let (mut first, mut second, mut third) = (*b"abc", *b"", *b"defgh");
        let pieces = [&mut first[..], &mut second[..], &mut third[..]];
        let buffer = Buffer(pieces.into_iter().map(VolatileSlice::from).collect());
        assert_eq!(buffer.len(), 8);
        for (start, length, expected) in [
            (0, 8, "abcdefgh"),
            (0, 2, "ab"),
            (2, 3, "cde"),
            (3, 1, "d"),
            (5, usize::MAX, "fgh"),
            (8, 1, ""),
            (usize::MAX, usize::MAX, ""),
            (1, 0, ""),
        ] {
            let part = buffer.part(start, length);
            let mut seen = vec![0; part.len()];
            part.copy_to(&mut seen);
            assert_eq!(seen, expected.as_bytes(), "{start} {length}");
        }
        buffer.part(2, 3).copy_from(b"XYZmore");
        let mut seen = [0; 8];
        buffer.copy_to(&mut seen);
        assert_eq!(&seen, b"abXYZfgh");
    }

    #[test]
    fn bytes_go_from_piece_to_piece() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let (mut from, mut into) = (*b"hello, world", [0; 12]);
        let (head, tail) = from.split_at_mut(5);
        assert_eq!(Buffer(vec![head.into(), tail.into()]).send(&ours).unwrap(), 12);
        let (head, tail) = into.split_at_mut(7);
        let buffer = Buffer(vec![head.into(), tail.into()]);
        assert_eq!(buffer.receive(&theirs).unwrap(), 12);
        assert_eq!(buffer.receive(&theirs).unwrap_err().kind(), io::ErrorKind::WouldBlock);
        drop(ours);
        assert_eq!(buffer.receive(&theirs).unwrap(), 0);
        assert_eq!(buffer.send(&theirs).unwrap_err().kind(), io::ErrorKind::BrokenPipe);
        assert_eq!(&into, b"hello, world");
    }
}
