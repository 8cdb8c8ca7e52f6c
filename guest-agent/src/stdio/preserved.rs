//! Descriptors of the host's that a process is handed beside its stdio, by what can be carried of them: what is read
//! from them, and what is written to them.

use std::io;
use std::os::fd::{AsRawFd as _, OwnedFd};

use runvm_protocol::{MAX_PRESERVED, PRESERVED_FIRST, agent};
use rustix::fs::OFlags;
use rustix::net::{AddressFamily, Shutdown, SocketFlags, SocketType};
use tokio::io::Interest;
use tokio::sync::watch;

use super::{HeldStreams, NotHeld, Owner, Stream, null, owned_by, pipe, pollable, relay};
use crate::reaper::Exit;

/// Takes the numbers that processes find such descriptors by, for as long as the agent runs: what is opened later, and
/// has to be open in a child on its way to its program, is then in nobody's way. To be called before anything is opened.
pub(crate) fn reserve() -> io::Result<()> {
    let root = rustix::fs::open("/", OFlags::PATH | OFlags::CLOEXEC, rustix::fs::Mode::empty())?;
    let mut taken = vec![root];
    while taken.last().is_some_and(|last| last.as_raw_fd() < PRESERVED_FIRST + MAX_PRESERVED as i32) {
        taken.push(taken[0].try_clone()?);
    }
    std::mem::forget(taken);
    Ok(())
}

/// The streams of one descriptor.
pub(super) struct Preserved {
    /// What the process reads.
    input: Option<Stream>,
    /// What it writes.
    output: Option<Stream>,
}

/// The agent's end of one, and its streams.
pub(super) struct Connection {
    end: OwnedFd,
    streams: Preserved,
}

impl Preserved {
    /// Takes the streams that the request names.
    pub(super) async fn take(held: &HeldStreams, named: &agent::Preserved) -> Result<Self, NotHeld> {
        Ok(Self { input: held.take(&named.input).await?, output: held.take(&named.output).await? })
    }

    /// Makes what the process gets, which `owner` owns.
    pub(super) fn connect(self, owner: Owner) -> io::Result<(Option<Connection>, OwnedFd)> {
        let (end, child) = match (&self.input, &self.output) {
            (None, None) => return Ok((None, null()?)),
            (Some(_), None) => {
                let (read, write) = pipe()?;
                (write, read)
            }
            (None, Some(_)) => pipe()?,
            (Some(_), Some(_)) => {
                rustix::net::socketpair(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None)?
            }
        };
        Ok((Some(Connection { end, streams: self }), owned_by(child, owner)?))
    }
}

impl Connection {
    /// Begins to carry bytes. What the process has written is carried until its end, and no more of those who outlive it.
    pub(super) fn attach(self, exit: &Exit) -> io::Result<()> {
        let Preserved { input, output } = self.streams;
        let interest = match (&input, &output) {
            (Some(_), None) => Interest::WRITABLE,
            (None, _) => Interest::READABLE,
            (Some(_), Some(_)) => Interest::READABLE | Interest::WRITABLE,
        };
        let end = pollable(self.end, interest)?;
        if let Some(stream) = input {
            let end = end.clone();
            tokio::spawn(async move {
                relay::input(stream, end.clone()).await;
                // Of a pipe there is nothing more to close.
                let _ = rustix::net::shutdown(end.get_ref(), Shutdown::Write);
            });
        }
        if let Some(stream) = output {
            let (report, _) = watch::channel(None);
            tokio::spawn(relay::output(end, stream, exit.clone(), report, relay::Until::Exit));
        }
        Ok(())
    }
}
