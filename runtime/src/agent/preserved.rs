//! Descriptors that a process is handed beside its stdio (`--preserve-fds`). A guest cannot have one of the host's open:
//! what is read from it and written to it is carried, and nothing else of it.

use std::io;
use std::os::fd::{BorrowedFd, FromRawFd as _, OwnedFd, RawFd};

use runvm_protocol::MAX_PRESERVED;
use rustix::fs::{FileType, OFlags};
use rustix::io::FdFlags;
use rustix::net::SocketType;
use rustix::net::sockopt::{socket_acceptconn, socket_type};
use thiserror::Error;

use super::stdio::{Sink, Source, file};

/// Why a descriptor is not handed over.
#[derive(Debug, Error)]
pub enum PreservedError {
    /// There are more than an agent takes.
    #[error("--preserve-fds {0}: a process in a VM is handed {MAX_PRESERVED} descriptors at most")]
    TooMany(u32),
    /// Nobody has opened it for this program.
    #[error("--preserve-fds: descriptor {0} is not open: open it, or ask for fewer")]
    NotOpen(RawFd),
    /// It is none of bytes that come one after the other.
    #[error("--preserve-fds: descriptor {0} is {1}, which cannot be open in a VM: {2}")]
    Kind(RawFd, &'static str, &'static str),
    /// The system refuses.
    #[error("cannot look at descriptor {0}")]
    System(RawFd, #[source] io::Error),
}

/// A descriptor of the host's, by what can be done with it.
pub struct Preserved {
    /// What is read from it.
    pub source: Option<Source>,
    /// What is written to it.
    pub sink: Option<Sink>,
}

/// Takes over `count` descriptors from `first` on that were handed down to this process. Of its own, which close when it
/// becomes another program, none is mistaken for one.
///
/// # Errors
/// [`PreservedError`].
pub fn take(first: RawFd, count: u32) -> Result<Vec<OwnedFd>, PreservedError> {
    let end = i32::try_from(count).ok().filter(|_| count <= MAX_PRESERVED).map(|count| first + count);
    let numbers = first..end.ok_or(PreservedError::TooMany(count))?;
    numbers.clone().try_for_each(check)?;
    numbers.map(own).collect()
}

/// Takes a descriptor over, which no program that this process starts is to have.
fn own(number: RawFd) -> Result<OwnedFd, PreservedError> {
    // SAFETY: it is open and was handed down to this process, in which nothing else owns what closes with no program.
    let descriptor = unsafe { OwnedFd::from_raw_fd(number) };
    let closing = rustix::io::fcntl_setfd(&descriptor, FdFlags::CLOEXEC);
    closing.map_err(|error| PreservedError::System(number, error.into()))?;
    Ok(descriptor)
}

fn check(number: RawFd) -> Result<(), PreservedError> {
    // SAFETY: the number is looked at by the system only, and an invalid one is its error to report.
    let descriptor = unsafe { BorrowedFd::borrow_raw(number) };
    let failed = |error: rustix::io::Errno| PreservedError::System(number, error.into());
    match rustix::io::fcntl_getfd(descriptor) {
        Ok(flags) if !flags.contains(FdFlags::CLOEXEC) => {}
        _ => return Err(PreservedError::NotOpen(number)),
    }
    let mode = rustix::fs::fcntl_getfl(descriptor).map_err(failed)?;
    let kind = FileType::from_raw_mode(rustix::fs::fstat(descriptor).map_err(failed)?.st_mode);
    let refused = |kind, instead| Err(PreservedError::Kind(number, kind, instead));
    match kind {
        _ if mode.contains(OFlags::PATH) => refused("a place in the host's files", "use a volume"),
        FileType::Directory => refused("a directory", "use a volume"),
        FileType::RegularFile if mode.contains(OFlags::RDWR) => {
            refused("a file to be read and written", "use a volume, or open it for one of both")
        }
        FileType::Socket if socket_type(descriptor).map_err(failed)? != SocketType::STREAM => {
            refused("a socket of messages", "use a stream")
        }
        FileType::Socket if socket_acceptconn(descriptor).map_err(failed)? => {
            refused("a socket that listens", "have the container listen, and publish its port")
        }
        FileType::RegularFile | FileType::Socket | FileType::Fifo | FileType::CharacterDevice => {
            rustix::io::fcntl_setfd(descriptor, FdFlags::CLOEXEC).map_err(failed)
        }
        _ => refused("no file of bytes", "use a volume"),
    }
}

impl Preserved {
    /// What can be done with a descriptor.
    ///
    /// # Errors
    /// Those of dup(2).
    pub fn new(descriptor: OwnedFd) -> io::Result<Self> {
        let mode = rustix::fs::fcntl_getfl(&descriptor)? & OFlags::RWMODE;
        let source = (mode != OFlags::WRONLY).then(|| descriptor.try_clone()).transpose()?;
        let sink = (mode != OFlags::RDONLY).then_some(descriptor);
        Ok(Self { source: source.map(|source| file(source) as Source), sink: sink.map(Sink::File) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::{AsRawFd as _, IntoRawFd as _};

    /// As a parent hands it down.
    fn inherited(file: impl Into<OwnedFd>) -> RawFd {
        let descriptor = file.into();
        rustix::io::fcntl_setfd(&descriptor, FdFlags::empty()).unwrap();
        descriptor.into_raw_fd()
    }

    #[test]
    fn what_was_handed_down_is_taken_by_its_direction() {
        let (reader, writer) = io::pipe().unwrap();
        let [reader, writer] = [inherited(reader), inherited(writer)].map(|number| take(number, 1).unwrap().remove(0));
        let (reader, writer) = (Preserved::new(reader).unwrap(), Preserved::new(writer).unwrap());
        assert!(reader.source.is_some() && reader.sink.is_none());
        assert!(writer.source.is_none() && writer.sink.is_some());
        let (one, _other) = std::os::unix::net::UnixStream::pair().unwrap();
        let both = Preserved::new(take(inherited(one), 1).unwrap().remove(0)).unwrap();
        assert!(both.source.is_some() && both.sink.is_some());
    }

    #[test]
    fn what_no_guest_can_have_is_refused() {
        let own = std::fs::File::open("/dev/null").unwrap();
        assert!(matches!(take(own.as_raw_fd(), 1), Err(PreservedError::NotOpen(_))));
        assert!(matches!(take(3, MAX_PRESERVED + 1), Err(PreservedError::TooMany(_))));
        let folder = inherited(std::fs::File::open("/").unwrap());
        assert!(matches!(take(folder, 1), Err(PreservedError::Kind(_, "a directory", _))));
        let messages = inherited(std::os::unix::net::UnixDatagram::unbound().unwrap());
        assert!(matches!(take(messages, 1), Err(PreservedError::Kind(_, "a socket of messages", _))));
        let both = inherited(std::fs::File::from(OwnedFd::from(tempfile::tempfile().unwrap())));
        assert!(matches!(take(both, 1), Err(PreservedError::Kind(..))));
        assert!(take(both + 1000, 0).unwrap().is_empty());
    }
}
