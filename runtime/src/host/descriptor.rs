//! Descriptors: handed to who listens on a socket, as engines do, or closed where they are nobody's.

use std::io::{self, IoSlice};
use std::mem::MaybeUninit;
use std::os::fd::{BorrowedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::path::Path;

use nix::libc;
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};

/// How many descriptors are the stdio.
const STDIO: u32 = 3;

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

/// Closes all descriptors of this process but those of its stdio and these: whoever started it may have left any open.
///
/// # Safety
/// Nothing in the process uses the others any more, which includes dropping what owns them.
///
/// # Errors
/// Where the host's kernel cannot.
pub unsafe fn close_others(keep: &[RawFd]) -> io::Result<()> {
    gaps(keep.iter().map(|number| number.cast_unsigned()).collect()).try_for_each(|(first, last)| {
        // SAFETY: the caller knows of nobody who needs them.
        match unsafe { libc::close_range(first, last, 0) } {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    })
}

/// The ranges, first and last, after the stdio that none of these numbers is in.
fn gaps(mut numbers: Vec<u32>) -> impl Iterator<Item = (u32, u32)> {
    numbers.sort_unstable();
    let firsts = std::iter::once(STDIO).chain(numbers.clone().into_iter().map(|number| number + 1));
    let ends = numbers.into_iter().map(Some).chain([None]);
    firsts.zip(ends).filter_map(|(first, end)| match end {
        Some(end) => (first < end).then(|| (first, end - 1)),
        None => Some((first, u32::MAX)),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_lies_between_is_closed() {
        let all = |numbers: &[u32]| gaps(numbers.to_vec()).collect::<Vec<_>>();
        assert_eq!(all(&[]), [(3, u32::MAX)]);
        assert_eq!(all(&[7, 4, 4]), [(3, 3), (5, 6), (8, u32::MAX)]);
        assert_eq!(all(&[3, 4]), [(5, u32::MAX)]);
    }
}
