//! Terminals of the host: the pair that an engine gets its half of over `--console-socket`, and the user's own.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use rustix::termios::{OptionalActions, Termios, tcgetattr, tcgetwinsize, tcsetattr};

use super::descriptor;

/// Rows and columns of a terminal; zero where none are known.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Size {
    /// Lines of text.
    pub rows: u16,
    /// Characters in a line.
    pub columns: u16,
}

/// The size of the terminal behind a descriptor.
pub fn size(terminal: impl AsFd) -> Size {
    tcgetwinsize(terminal).map(|size| Size { rows: size.ws_row, columns: size.ws_col }).unwrap_or_default()
}

/// Makes a terminal, hands its master to the engine that listens on `console_socket`, and returns its slave, raw: what
/// a terminal does with the bytes (echo, signals) is done once, by the guest's.
///
/// # Errors
/// Those of the pseudo-terminal and of the socket.
pub fn for_engine(console_socket: &Path) -> io::Result<OwnedFd> {
    let master = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC)?;
    grantpt(&master)?;
    unlockpt(&master)?;
    let name = ptsname(&master, Vec::new())?;
    let flags = rustix::fs::OFlags::RDWR | rustix::fs::OFlags::NOCTTY | rustix::fs::OFlags::CLOEXEC;
    let slave = rustix::fs::open(name.as_c_str(), flags, rustix::fs::Mode::empty())?;
    make_raw(&slave)?;
    descriptor::send(console_socket, master.as_fd(), name.as_bytes())?;
    Ok(slave)
}

fn make_raw(terminal: impl AsFd) -> io::Result<Termios> {
    let before = tcgetattr(&terminal)?;
    let mut raw = before.clone();
    raw.make_raw();
    tcsetattr(&terminal, OptionalActions::Now, &raw)?;
    Ok(before)
}

/// The user's terminal, raw as long as this lives.
#[derive(Debug)]
pub struct RawTerminal {
    terminal: OwnedFd,
    before: Termios,
}

impl RawTerminal {
    /// Makes the terminal raw; `None` where the descriptor is no terminal.
    ///
    /// # Errors
    /// Those of tcsetattr(3).
    pub fn new(terminal: impl AsFd) -> io::Result<Option<Self>> {
        if !rustix::termios::isatty(&terminal) {
            return Ok(None);
        }
        let terminal = terminal.as_fd().try_clone_to_owned()?;
        let before = make_raw(&terminal)?;
        Ok(Some(Self { terminal, before }))
    }
}

impl Drop for RawTerminal {
    fn drop(&mut self) {
        // The terminal may be gone, and then needs no care.
        let _ = tcsetattr(&self.terminal, OptionalActions::Now, &self.before);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};
    use std::io::{IoSliceMut, Read as _, Write as _};
    use std::mem::MaybeUninit;
    use std::os::unix::net::UnixListener;

    #[test]
    fn the_engine_gets_the_master_of_a_raw_terminal() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("console.sock");
        let listener = UnixListener::bind(&path).unwrap();
        let slave = for_engine(&path).unwrap();

        let (socket, _) = listener.accept().unwrap();
        let mut name = [0; 64];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        recvmsg(&socket, &mut [IoSliceMut::new(&mut name)], &mut control, RecvFlags::empty()).unwrap();
        let master = control
            .drain()
            .find_map(|message| match message {
                RecvAncillaryMessage::ScmRights(mut descriptors) => descriptors.next(),
                _ => None,
            })
            .unwrap();

        let mut master = std::fs::File::from(master);
        master.write_all(b"\x03a").unwrap();
        let mut seen = [0; 2];
        std::fs::File::from(slave).read_exact(&mut seen).unwrap();
        assert_eq!(&seen, b"\x03a");
    }
}
