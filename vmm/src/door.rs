//! Streams that come through a socket: one end of each is handed over as a descriptor.
//!
//! So a process that holds a machine listens nowhere: whoever is to reach it was given the one socket to do so.

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags,
};

/// What travels with a descriptor, as something has to.
const LETTER: [u8; 1] = [0];

/// The end of a non-blocking socket where streams arrive.
#[derive(Debug)]
pub struct Door(OwnedFd);

impl Door {
    /// The door whose other end is given to those who are to come in.
    pub fn new(socket: OwnedFd) -> Self {
        Self(socket)
    }

    /// The next stream; none when nobody will come any more.
    ///
    /// # Errors
    /// `WouldBlock` where nobody is there yet; `InvalidData` for a message without a descriptor.
    pub fn admit(&self) -> io::Result<Option<UnixStream>> {
        let mut letter = LETTER;
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut ancillary = RecvAncillaryBuffer::new(&mut space);
        let received = rustix::io::retry_on_intr(|| {
            rustix::net::recvmsg(&self.0, &mut [IoSliceMut::new(&mut letter)], &mut ancillary, RecvFlags::CMSG_CLOEXEC)
        })?;
        let stream = ancillary.drain().find_map(|message| match message {
            RecvAncillaryMessage::ScmRights(mut descriptors) => descriptors.next(),
            _ => None,
        });
        match stream {
            Some(stream) => Ok(Some(stream.into())),
            None if received.bytes == 0 => Ok(None),
            None => Err(io::Error::new(io::ErrorKind::InvalidData, "a stream was announced and not handed over")),
        }
    }
}

impl AsFd for Door {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// Hands a stream over at the other end of a [`Door`].
///
/// # Errors
/// `WouldBlock` where the door is crowded; `BrokenPipe` where it is gone.
pub fn hand_over(socket: impl AsFd, stream: impl AsFd) -> io::Result<()> {
    let descriptors = [stream.as_fd()];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    ancillary.push(SendAncillaryMessage::ScmRights(&descriptors));
    rustix::net::sendmsg(socket, &[IoSlice::new(&LETTER)], &mut ancillary, SendFlags::NOSIGNAL)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
    use std::io::{Read as _, Write as _};

    #[test]
    fn streams_come_in_until_the_other_end_is_gone() {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let (outside, inside) = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None).unwrap();
        let door = Door::new(inside);
        assert_eq!(door.admit().unwrap_err().kind(), io::ErrorKind::WouldBlock);
        let (mut ours, theirs) = UnixStream::pair().unwrap();
        hand_over(&outside, &theirs).unwrap();
        drop(theirs);
        ours.write_all(b"hello").unwrap();
        drop(ours);
        let mut heard = String::new();
        door.admit().unwrap().unwrap().read_to_string(&mut heard).unwrap();
        assert_eq!(heard, "hello");
        rustix::net::send(&outside, b"x", SendFlags::NOSIGNAL).unwrap();
        assert_eq!(door.admit().unwrap_err().kind(), io::ErrorKind::InvalidData);
        drop(outside);
        assert!(door.admit().unwrap().is_none());
    }
}
