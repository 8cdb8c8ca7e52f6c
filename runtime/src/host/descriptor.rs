//! Descriptors that are handed to who listens on a socket, as engines do.

use std::io::{self, IoSlice};
use std::mem::MaybeUninit;
use std::os::fd::BorrowedFd;
use std::os::unix::net::UnixStream;
use std::path::Path;

use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};

/// Sends the descriptor, and a name of what it is.
///
/// # Errors
/// Those of the socket.
pub fn send(socket: &Path, descriptor: BorrowedFd<'_>, name: &[u8]) -> io::Result<()> {
    let socket = UnixStream::connect(socket)?;
    let descriptors = [descriptor];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !control.push(SendAncillaryMessage::ScmRights(&descriptors)) {
        return Err(io::Error::other("a descriptor does not fit into the message to the socket"));
    }
    sendmsg(socket, &[IoSlice::new(name)], &mut control, SendFlags::NOSIGNAL)?;
    Ok(())
}
