//! Output without a copy: what comes from a socket goes into a pipe by splice(2).

use std::io;
use std::os::fd::OwnedFd;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::RecvFlags;
use rustix::pipe::SpliceFlags;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::net::UnixStream;

/// How much is moved at once, in bytes, if the pipe has room for it: as much as any holds.
const MOST: usize = 1 << 20;

/// How far it has come.
pub(super) enum Progress {
    /// So many bytes are in the pipe.
    Moved(usize),
    /// The pipe is full.
    Full,
    /// There is something now, and room for it.
    Changed,
}

/// Moves all that comes from the socket into the pipe, which may be shared with others and is left as blocking as it is.
///
/// # Errors
/// The pipe's: that nobody reads it, above all.
pub(super) async fn all(socket: &UnixStream, pipe: OwnedFd, mut tell: impl FnMut(Progress)) -> io::Result<()> {
    // SAFETY: an `OwnedFd` owns its file, and nothing replaces or closes it while the runtime has it.
    let pipe = unsafe { AsyncFd::register_with_interest(pipe, Interest::WRITABLE) }?;
    loop {
        socket.readable().await?;
        let mut room = pipe.writable().await?;
        match socket.try_io(Interest::READABLE, || step(socket, pipe.get_ref())) {
            Ok(Progress::Moved(0)) => return Ok(()),
            Ok(progress) => {
                // What is cleared wrongly is never set again.
                if matches!(progress, Progress::Full) {
                    room.clear_ready();
                }
                tell(progress);
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => return Err(error),
        }
    }
}

/// Moves what there is. `WouldBlock` is the socket's alone, which is what its readiness is about.
fn step(socket: &UnixStream, pipe: &OwnedFd) -> io::Result<Progress> {
    match rustix::pipe::splice(socket, None, pipe, None, MOST, SpliceFlags::NONBLOCK) {
        Ok(moved) => Ok(Progress::Moved(moved)),
        // It does not say of which, and either may have changed since.
        Err(Errno::AGAIN) => {
            rustix::net::recv(socket, &mut [0; 1], RecvFlags::PEEK | RecvFlags::DONTWAIT)?;
            let mut pipe = [PollFd::new(pipe, PollFlags::OUT)];
            let full = poll(&mut pipe, Some(&Timespec::default()))? == 0;
            Ok(if full { Progress::Full } else { Progress::Changed })
        }
        Err(errno) => Err(errno.into()),
    }
}
