//! What the parent and the daemon say to each other, over the daemon's stdin: the exports one way, to the end of
//! the stream; back the VMM's end of the vhost-user connection, or what went wrong.

use std::io::{self, IoSlice, IoSliceMut, Read, Write};
use std::mem::MaybeUninit;
use std::net::Shutdown;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags,
};

use super::{Export, SetupError};

/// The longest reply: an error with a path in it.
const MAX_REPLY: usize = 16 << 10;

pub(super) fn send_exports(mut control: &UnixStream, exports: &[Export]) -> io::Result<()> {
    control.write_all(&serde_json::to_vec(exports)?)?;
    control.shutdown(Shutdown::Write)
}

pub(super) fn receive_exports(mut control: &UnixStream) -> io::Result<Vec<Export>> {
    let mut text = Vec::new();
    control.read_to_end(&mut text)?;
    Ok(serde_json::from_slice(&text)?)
}

pub(super) fn send_reply(control: &UnixStream, reply: Result<OwnedFd, SetupError>) -> io::Result<()> {
    let text = serde_json::to_vec(&reply.as_ref().map(|_| ()))?;
    let descriptors = [reply.as_ref().map_or(control.as_fd(), AsFd::as_fd)];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    if reply.is_ok() {
        ancillary.push(SendAncillaryMessage::ScmRights(&descriptors));
    }
    rustix::net::sendmsg(control, &[IoSlice::new(&text)], &mut ancillary, SendFlags::NOSIGNAL)?;
    Ok(())
}

/// `None` where the daemon ended without a reply.
pub(super) fn receive_reply(control: &UnixStream) -> io::Result<Option<Result<OwnedFd, SetupError>>> {
    let mut text = vec![0; MAX_REPLY];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let received = rustix::io::retry_on_intr(|| {
        rustix::net::recvmsg(control, &mut [IoSliceMut::new(&mut text)], &mut ancillary, RecvFlags::CMSG_CLOEXEC)
    })?;
    if received.bytes == 0 {
        return Ok(None);
    }
    let reply: Result<(), SetupError> = serde_json::from_slice(&text[..received.bytes])?;
    let socket = ancillary.drain().find_map(|message| match message {
        RecvAncillaryMessage::ScmRights(mut descriptors) => descriptors.next(),
        _ => None,
    });
    match (reply, socket) {
        (Ok(()), Some(socket)) => Ok(Some(Ok(socket))),
        (Ok(()), None) => Err(io::Error::new(io::ErrorKind::InvalidData, "the reply lacks its descriptor")),
        (Err(error), _) => Ok(Some(Err(error))),
    }
}
