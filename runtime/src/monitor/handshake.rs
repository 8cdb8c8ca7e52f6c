//! What a monitor or an exec's proxy and the command that starts it tell each other, as lines of JSON over a socket.

use std::io::{self, BufRead as _, BufReader, Read as _, Write as _};
use std::os::fd::{FromRawFd as _, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;

use serde::{Deserialize, Serialize};

use crate::host::process::ProcessIdentity;

/// The number of the socket's descriptor in the started process.
pub const DESCRIPTOR: RawFd = 3;
/// The number of the first descriptor that is handed down for the container's process.
pub const PRESERVED: RawFd = DESCRIPTOR + 1;
/// The longest line, in bytes.
const MAX_LINE: u64 = 64 << 10;

/// What the started process says.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ToOwner {
    /// It is in the container's network namespace: hooks can be run.
    Ready,
    /// The container, or the exec's process, is created.
    Created {
        /// Processes of the VM.
        helpers: Vec<ProcessIdentity>,
    },
    /// It gives up.
    Failed {
        /// One sentence.
        message: String,
    },
}

/// The started process's end.
#[derive(Debug)]
pub struct Owner(Option<UnixStream>);

impl Owner {
    /// The end that was handed down to this process.
    ///
    /// # Errors
    /// Where there is none.
    pub fn inherited() -> io::Result<Self> {
        // SAFETY: the number is looked at by the system only, and an invalid one is its error to report.
        let borrowed = unsafe { std::os::fd::BorrowedFd::borrow_raw(DESCRIPTOR) };
        let flags = rustix::io::fcntl_getfd(borrowed)?;
        rustix::io::fcntl_setfd(borrowed, flags | rustix::io::FdFlags::CLOEXEC)?;
        // SAFETY: the descriptor is open, and this, at the process's begin, is its only owner.
        let socket = unsafe { OwnedFd::from_raw_fd(DESCRIPTOR) };
        Ok(Self(Some(socket.into())))
    }

    /// Tells the starting command.
    ///
    /// # Errors
    /// Those of the socket; `NotConnected` after [`Self::dismiss`].
    pub fn send(&mut self, message: &ToOwner) -> io::Result<()> {
        let socket = self.0.as_mut().ok_or(io::ErrorKind::NotConnected)?;
        let mut line = serde_json::to_vec(message)?;
        line.push(b'\n');
        socket.write_all(&line)
    }

    /// Waits until the starting command has done its part; what it hands down.
    ///
    /// # Errors
    /// `UnexpectedEof` where it has ended instead.
    pub fn await_go(&mut self) -> io::Result<Vec<u8>> {
        let socket = self.0.as_mut().ok_or(io::ErrorKind::NotConnected)?;
        let mut length = [0; size_of::<u32>()];
        socket.read_exact(&mut length)?;
        let mut parcel = Vec::new();
        let length = u64::from(u32::from_ne_bytes(length));
        match socket.take(length).read_to_end(&mut parcel)? as u64 == length {
            true => Ok(parcel),
            false => Err(io::ErrorKind::UnexpectedEof.into()),
        }
    }

    /// There is nothing more to say.
    pub fn dismiss(&mut self) {
        self.0 = None;
    }
}

/// The starting command's end.
#[derive(Debug)]
pub struct Started {
    socket: BufReader<UnixStream>,
}

impl Started {
    /// Both ends: this one, and the one for the process to be started.
    ///
    /// # Errors
    /// Those of socketpair(2).
    pub fn pair() -> io::Result<(Self, OwnedFd)> {
        let (ours, theirs) = UnixStream::pair()?;
        Ok((Self { socket: BufReader::new(ours) }, theirs.into()))
    }

    /// The next message; `None` when the process has ended.
    ///
    /// # Errors
    /// Those of the socket, and of a line that is no message.
    pub fn receive(&mut self) -> io::Result<Option<ToOwner>> {
        let mut line = Vec::new();
        match (&mut self.socket).take(MAX_LINE).read_until(b'\n', &mut line)? {
            0 => Ok(None),
            _ => Ok(Some(serde_json::from_slice(&line)?)),
        }
    }

    /// Lets the process go on, and hands down a parcel.
    ///
    /// # Errors
    /// Those of the socket; `InvalidInput` for a parcel of 4 GiB and more.
    pub fn go(&mut self, parcel: &[u8]) -> io::Result<()> {
        let length = u32::try_from(parcel.len()).map_err(|_| io::ErrorKind::InvalidInput)?;
        let socket = self.socket.get_mut();
        socket.write_all(&length.to_ne_bytes())?;
        socket.write_all(parcel)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_ends_understand_each_other() {
        let (mut started, theirs) = Started::pair().unwrap();
        let mut owner = Owner(Some(theirs.into()));
        owner.send(&ToOwner::Ready).unwrap();
        assert!(matches!(started.receive().unwrap(), Some(ToOwner::Ready)));
        started.go(b"parcel").unwrap();
        assert_eq!(owner.await_go().unwrap(), b"parcel");
        owner.send(&ToOwner::Failed { message: "no".into() }).unwrap();
        assert!(matches!(started.receive().unwrap(), Some(ToOwner::Failed { message }) if message == "no"));
        owner.dismiss();
        assert!(started.receive().unwrap().is_none());
        assert!(owner.send(&ToOwner::Ready).is_err());
    }

    #[test]
    fn a_creator_that_ended_is_noticed() {
        let (started, theirs) = Started::pair().unwrap();
        drop(started);
        assert_eq!(Owner(Some(theirs.into())).await_go().unwrap_err().kind(), io::ErrorKind::UnexpectedEof);
    }
}
