//! The vsock port of the channel, where the machine has a socket device: each connection of the host's is one stream.

use std::io;
use std::os::fd::{AsFd as _, BorrowedFd};

use rustix::io::Errno;
use rustix::net::SendFlags;
use tokio_vsock::{VMADDR_CID_ANY, VMADDR_CID_HOST, VsockAddr, VsockListener, VsockStream};

use crate::stdio::HostStream;

/// How many streams may wait to be accepted: more than the host's device has. Those beyond it the kernel refuses, and fifty
/// verbs at once open two hundred and fifty.
const BACKLOG: i32 = 1024;

/// Listens on the port.
pub(crate) struct Listener(VsockListener);

impl Listener {
    /// Listens from now on.
    pub(crate) fn bind(port: u32) -> io::Result<Self> {
        // Whatever address the guest has, now or after it was restored in another machine.
        let listener = VsockListener::bind(VsockAddr::new(VMADDR_CID_ANY, port))?;
        // It listens already, for 128.
        rustix::net::listen(&listener, BACKLOG)?;
        Ok(Self(listener))
    }

    /// The next stream that the host opens.
    pub(crate) async fn accept(&self) -> io::Result<VsockStream> {
        loop {
            let (stream, peer) = self.0.accept().await?;
            if peer.cid() == VMADDR_CID_HOST {
                return Ok(stream);
            }
            // With a loopback transport anybody in the guest could be the host.
            tracing::warn!("a stream from {peer:?}, which is not the host, is closed");
        }
    }
}

/// Tells the host that the port is listened on: by asking for one of the same number there, which nobody has.
pub(crate) async fn knock(port: u32) -> io::Result<()> {
    match VsockStream::connect(VsockAddr::new(VMADDR_CID_HOST, port)).await {
        Err(error) if error.raw_os_error() == Some(Errno::NODEV.raw_os_error()) => Err(error),
        // The refusal, or none where the machine was restored before it came: the host has heard.
        _ => Ok(()),
    }
}

impl HostStream for VsockStream {
    fn is_gone(&self) -> bool {
        // Nothing is sent, but an error says whether anything could be.
        rustix::net::send(self, &[], SendFlags::NOSIGNAL | SendFlags::DONTWAIT).is_err()
    }

    fn socket(&self) -> Option<BorrowedFd<'_>> {
        Some(self.as_fd())
    }
}
