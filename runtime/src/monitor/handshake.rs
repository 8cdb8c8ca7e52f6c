//! What a monitor or an exec's proxy and the command that starts it tell each other, over a socket: the first lines of JSON,
//! the second that the first may go on.

use std::io::{self, BufRead as _, BufReader, Read as _, Write as _};
use std::os::unix::net::UnixStream;

use serde::{Deserialize, Serialize};

use crate::host::process::ProcessIdentity;

/// The longest line, in bytes.
const MAX_LINE: u64 = 64 << 10;
/// What lets the started process go on.
const GO: [u8; 1] = [b'\n'];

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
    /// It, over its end of the socket pair.
    pub fn new(socket: UnixStream) -> Self {
        Self(Some(socket))
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

    /// Waits until the starting command has done its part.
    ///
    /// # Errors
    /// `UnexpectedEof` where it has ended instead.
    pub fn await_go(&mut self) -> io::Result<()> {
        let socket = self.0.as_mut().ok_or(io::ErrorKind::NotConnected)?;
        socket.read_exact(&mut [0; GO.len()])
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
    pub fn pair() -> io::Result<(Self, UnixStream)> {
        let (ours, theirs) = UnixStream::pair()?;
        Ok((Self { socket: BufReader::new(ours) }, theirs))
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

    /// Lets the process go on.
    ///
    /// # Errors
    /// Those of the socket.
    pub fn go(&mut self) -> io::Result<()> {
        self.socket.get_mut().write_all(&GO)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_ends_understand_each_other() {
        let (mut started, theirs) = Started::pair().unwrap();
        let mut owner = Owner::new(theirs);
        owner.send(&ToOwner::Ready).unwrap();
        assert!(matches!(started.receive().unwrap(), Some(ToOwner::Ready)));
        started.go().unwrap();
        owner.await_go().unwrap();
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
        assert_eq!(Owner::new(theirs).await_go().unwrap_err().kind(), io::ErrorKind::UnexpectedEof);
    }
}
