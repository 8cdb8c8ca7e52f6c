//! Open files that tasks wait for.

use std::io;
use std::os::fd::OwnedFd;

use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// Has the runtime watch an open file.
pub(crate) fn watch(file: OwnedFd, interest: Interest) -> io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: an `OwnedFd` owns its file, and nothing replaces or closes it while the runtime has it.
    Ok(unsafe { AsyncFd::register_with_interest(file, interest) }?)
}
