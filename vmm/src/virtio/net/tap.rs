//! The host's end of the card: a tap, of which each read and each write is one frame behind a header.
//!
//! Frames go straight between the kernel and the guest's memory. Nothing of ours lies in between that could be too
//! small for them or believe what they say: the kernel checks the headers that the guest writes.

use std::ffi::c_int;
use std::io;
use std::os::fd::{AsFd, AsRawFd as _, BorrowedFd, OwnedFd};

use libc::iovec;
use rustix::io::Errno;
use rustix::ioctl::{IntegerSetter, Opcode, Setter, ioctl};
use vm_memory::VolatileSlice;

/// The size of `struct virtio_net_hdr_v1`, which devices of version 1 always use (section 5.1.6).
pub const HEADER: usize = 12;

/// The most pieces that a frame may be in: what one system call takes.
pub const MAX_PIECES: usize = 1024;

/// A tap that was opened with `IFF_VNET_HDR` and `O_NONBLOCK`.
#[derive(Debug)]
pub struct Tap(OwnedFd);

impl Tap {
    /// Takes over a tap.
    pub fn new(tap: OwnedFd) -> Self {
        Self(tap)
    }

    /// Sets the header's size to [`HEADER`], and what kinds of unfinished frames the reader takes: `TUN_F_*`.
    ///
    /// # Errors
    /// Where it is not a tap, or its kernel knows not all of the kinds.
    pub fn configure(&self, offloads: u32) -> io::Result<()> {
        let size = HEADER as c_int;
        // SAFETY: TUNSETVNETHDRSZ reads one `int`.
        let header = unsafe { Setter::<{ libc::TUNSETVNETHDRSZ as Opcode }, c_int>::new(size) };
        // SAFETY: it changes how frames are laid out in reads and writes, which are of bytes.
        unsafe { ioctl(&self.0, header) }?;
        // SAFETY: TUNSETOFFLOAD takes an integer for its argument.
        let kinds = unsafe { IntegerSetter::<{ libc::TUNSETOFFLOAD as Opcode }>::new_usize(offloads as usize) };
        // SAFETY: it changes what frames are read.
        unsafe { ioctl(&self.0, kinds) }?;
        Ok(())
    }

    /// Receives a frame into these pieces, of which there are at most [`MAX_PIECES`]: the length of header and frame,
    /// or none where there is no frame. What does not fit is lost.
    ///
    /// # Errors
    /// Where there will be no frames any more.
    pub fn receive<'m>(&self, pieces: impl IntoIterator<Item = &'m VolatileSlice<'m>>) -> io::Result<Option<usize>> {
        let guards: Vec<_> = pieces.into_iter().map(VolatileSlice::ptr_guard_mut).collect();
        let vectors: Vec<_> =
            guards.iter().map(|guard| iovec { iov_base: guard.as_ptr().cast(), iov_len: guard.len() }).collect();
        let count = c_int::try_from(vectors.len()).map_err(io::Error::other)?;
        // SAFETY: the vectors are `count`, and each is a piece of the guest's memory, which stays mapped while it is
        // borrowed and of which nobody has a reference: it may be written at any time.
        match unsafe { libc::readv(self.0.as_raw_fd(), vectors.as_ptr(), count) } {
            0 => Err(io::ErrorKind::UnexpectedEof.into()),
            length if length > 0 => Ok(Some(length.unsigned_abs())),
            _ => match last_errno() {
                // Nothing interrupts what does not wait; if it did, the tap would be ready still.
                Errno::AGAIN | Errno::INTR => Ok(None),
                errno => Err(errno.into()),
            },
        }
    }

    /// Sends a frame that is in these pieces, of which there are at most [`MAX_PIECES`]; whether it is gone. It is not
    /// where the tap has no room. What the tap refuses is dropped, as by any card that cannot send something.
    ///
    /// # Errors
    /// Where no frame can be sent any more.
    pub fn send<'m>(&self, pieces: impl IntoIterator<Item = &'m VolatileSlice<'m>>) -> io::Result<bool> {
        let guards: Vec<_> = pieces.into_iter().map(VolatileSlice::ptr_guard).collect();
        let vectors: Vec<_> = guards
            .iter()
            .map(|guard| iovec { iov_base: guard.as_ptr().cast_mut().cast(), iov_len: guard.len() })
            .collect();
        let count = c_int::try_from(vectors.len()).map_err(io::Error::other)?;
        // SAFETY: the vectors are `count`, and each is a piece of the guest's memory, which stays mapped while it is
        // borrowed; the kernel only reads it, and takes what it finds.
        match unsafe { libc::writev(self.0.as_raw_fd(), vectors.as_ptr(), count) } {
            0.. => Ok(true),
            _ => match last_errno() {
                Errno::AGAIN => Ok(false),
                // The device behind the descriptor is gone, or the other end of what stands for it in a test.
                errno @ (Errno::BADFD | Errno::PIPE) => Err(errno.into()),
                _ => Ok(true),
            },
        }
    }
}

impl AsFd for Tap {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

fn last_errno() -> Errno {
    Errno::from_io_error(&io::Error::last_os_error()).unwrap_or(Errno::IO)
}
