//! The share: the tree of files that a guest sees, and the virtio-fs daemon that serves it.
//!
//! A container's root and volumes lie anywhere on the host; the guest gets them as one file system. [`spawn`]
//! runs this very program again with the verb `share-daemon`; that process ([`daemon_main`]) builds the tree from
//! bind mounts in a mount namespace of its own ([`tree`](self)), makes it its root, gives up everything that serving
//! files does not need, and serves it with virtiofsd's library until the VMM hangs up. So there is nothing on
//! the host to clean up: the mounts, the socket and the names vanish with the process, which dies with its parent.
//!
//! What a guest can do to the host through here, and what bounds it, is said in `confine` and `serve`.

pub(crate) mod confine;
mod control;
mod fresh;
mod log;
mod serve;
mod served;
#[cfg(test)]
mod tests;
mod tree;

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::{Child, Command, ExitCode, Stdio};

pub use fresh::{FRESH, Fresh};
pub use serve::Files;
pub(crate) use serve::enter;
pub use served::Served;

use rustix::process::{Pid, PidfdFlags, Signal};
use serde::{Deserialize, Serialize};

use crate::host::user_namespace::IdMappings;

/// The verb that makes this program the daemon.
pub const VERB: &str = "share-daemon";

/// A directory or a single file of the host that the guest gets to see.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Export {
    /// Where in the share: relative, without `.` or `..`; not within another export.
    pub path: PathBuf,
    /// Where on the host; links are followed.
    pub source: PathBuf,
    /// The guest cannot change anything below it, whatever is mounted there.
    pub read_only: bool,
    /// With what is mounted below the source.
    pub recursive: bool,
    /// Who stands for the owners of its files.
    pub id_map: Option<IdMap>,
}

/// How the owners of files are shown, and those of new ones kept.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct IdMap {
    /// The IDs of the files, and those that the guest sees.
    pub mappings: IdMappings,
    /// What is mounted below the source has it too.
    pub recursive: bool,
}

/// Why the guest got no share.
#[derive(Debug, thiserror::Error)]
pub enum ShareError {
    /// The process did not start.
    #[error("cannot start the share's daemon")]
    Spawn(#[source] io::Error),
    /// The channel to the process failed.
    #[error("cannot talk to the share's daemon")]
    Control(#[source] io::Error),
    /// The process ended without a word: its log says why.
    #[error("the share's daemon ended before it served ({0})")]
    Ended(std::process::ExitStatus),
    /// The process could not make the share.
    #[error(transparent)]
    Setup(#[from] SetupError),
}

/// What the daemon could not do. It crosses a process boundary, hence no source but an error number.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error, Serialize, Deserialize)]
pub enum SetupError {
    /// An export's source cannot be opened.
    #[error("cannot share {path}: {error}", path = source_path.display(), error = io::Error::from_raw_os_error(*errno))]
    Source {
        /// On the host.
        source_path: PathBuf,
        /// As in errno(3).
        errno: i32,
    },
    /// An export's files cannot have other owners than they have.
    #[error("cannot map the IDs of {path}: {reason}", path = source_path.display())]
    IdMap {
        /// On the host.
        source_path: PathBuf,
        /// As a clause.
        reason: String,
    },
    /// An export has no place in the tree.
    #[error("{path} is no place in a share: it has to be relative, without `..`, and not within another export", path = path.display())]
    Place {
        /// In the share.
        path: PathBuf,
    },
    /// A step that no input decides.
    #[error("cannot {step} for the share's daemon: {error}", error = io::Error::from_raw_os_error(*errno))]
    Step {
        /// Completes "cannot …".
        step: String,
        /// As in errno(3).
        errno: i32,
    },
    /// virtiofsd's library refused.
    #[error("cannot serve the share: {0}")]
    Serve(String),
}

/// The running daemon. It is killed when this is dropped, and when the thread that called [`spawn`] ends.
#[derive(Debug)]
pub struct Daemon {
    child: Child,
    pidfd: OwnedFd,
    control: UnixStream,
}

/// Starts the daemon. It makes itself ready while the caller does other things: see [`Daemon::connect`].
///
/// `command` runs this program, with the options that set up its log, which goes to the command's stderr; the
/// verb is added here.
///
/// # Errors
/// [`ShareError::Spawn`], [`ShareError::Control`].
pub fn spawn(mut command: Command, exports: &[Export]) -> Result<Daemon, ShareError> {
    let (control, theirs) = UnixStream::pair().map_err(ShareError::Spawn)?;
    let child =
        command.arg(VERB).stdin(OwnedFd::from(theirs)).stdout(Stdio::null()).spawn().map_err(ShareError::Spawn)?;
    // The command holds the other end too; with it open, the daemon's death would not be an end of file here.
    drop(command);
    let pidfd = rustix::process::pidfd_open(Pid::from_child(&child), PidfdFlags::empty())
        .map_err(|errno| ShareError::Spawn(errno.into()))?;
    let daemon = Daemon { child, pidfd, control };
    control::send_exports(&daemon.control, exports).map_err(ShareError::Control)?;
    Ok(daemon)
}

impl Daemon {
    /// The process.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Readable once the process has ended.
    pub fn pidfd(&self) -> BorrowedFd<'_> {
        self.pidfd.as_fd()
    }

    /// Waits until the share is served, and gives the VMM's end of the vhost-user connection: connected, and
    /// the only one there will be. The daemon ends when it is closed.
    ///
    /// # Errors
    /// Whatever kept the daemon from serving.
    pub fn connect(&mut self) -> Result<OwnedFd, ShareError> {
        match control::receive_reply(&self.control).map_err(ShareError::Control)? {
            Some(reply) => Ok(reply?),
            None => Err(ShareError::Ended(self.child.wait().map_err(ShareError::Control)?)),
        }
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        // Neither fails but for a process that is gone already, which is what is wanted.
        let _ = rustix::process::pidfd_send_signal(&self.pidfd, Signal::KILL);
        let _ = self.child.wait();
    }
}

/// The daemon itself: serves the share that the parent describes on stdin, and returns when the VMM hangs up.
pub fn daemon_main() -> ExitCode {
    match serve::run() {
        Ok(()) => ExitCode::SUCCESS,
        // The parent has been told, and it is the one to say so.
        Err(_) => ExitCode::FAILURE,
    }
}
