//! Streams to the agent, through the VM's process: each is a socket pair, whose far end is handed over.

use std::io;
use std::os::fd::OwnedFd;

use async_trait::async_trait;
use runvm_vmm::door::hand_over;
use tokio::io::Interest;
use tokio::net::UnixStream;

use crate::vmm::{ByteStream, Channel};

/// The socket over which streams are handed to the VM's process. Nobody else has either end of it.
pub(super) struct Doorway(UnixStream);

impl Doorway {
    /// The owner's end, and the process's.
    pub(super) fn pair() -> io::Result<(Self, OwnedFd)> {
        let (ours, theirs) = UnixStream::pair()?;
        Ok((Self(ours), theirs.into_std()?.into()))
    }
}

#[async_trait]
impl Channel for Doorway {
    async fn open(&self) -> io::Result<ByteStream> {
        let (ours, theirs) = UnixStream::pair()?;
        let theirs = theirs.into_std()?;
        self.0.async_io(Interest::WRITABLE, || hand_over(&self.0, &theirs)).await?;
        Ok(Box::new(ours))
    }
}
