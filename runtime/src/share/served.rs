//! A share that is being served: exports come to it and go while the guest runs.
//!
//! The process that serves a share can mount nothing, and sees nothing of the host: that is the point of it. So its owner
//! does it, in a thread that enters the process's mount namespace for this, and ends with it.

use std::os::fd::{AsFd as _, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread;

use nix::libc;
use rustix::fs::{AtFlags, CWD, Mode, OFlags, StatxFlags};
use rustix::io::Errno;
use rustix::mount::{OpenTreeFlags, UnmountFlags};
use rustix::thread::{ThreadNameSpaceType, UnshareFlags, move_into_thread_name_spaces};
use tokio::sync::oneshot;

use super::tree::{Change, attach, make_place, open, step};
use super::{Export, SetupError};

/// The way into the share that a process serves. Copies lead to the same.
#[derive(Clone, Debug)]
pub struct Served(Arc<OwnedFd>);

impl Served {
    /// The share of the process that the pidfd is of, or in the mount namespace that the descriptor is of.
    pub fn by(process: OwnedFd) -> Self {
        Self(Arc::new(process))
    }

    /// Takes exports into the share: all of them, or none.
    ///
    /// # Errors
    /// [`SetupError`], as for those that a share begins with.
    pub async fn add(&self, exports: Vec<Export>) -> Result<(), SetupError> {
        let process = self.0.clone();
        apart(move || {
            // The sources are the host's, so they are opened before it is left.
            let sources = exports.iter().map(open).collect::<Result<Vec<_>, _>>()?;
            let tree = Tree::enter(&process)?;
            let add = |export, source| {
                make_place(&tree.writable, export, source)?;
                attach(&tree.root, export, source)
            };
            for (index, (export, source)) in exports.iter().zip(&sources).enumerate() {
                if let Err(error) = add(export, source) {
                    exports[..index].iter().for_each(|export| tree.clear(&export.path));
                    return Err(error);
                }
            }
            Ok(())
        })
        .await
    }

    /// Takes exports out of the share, by their places in it. One that is not there is no error.
    ///
    /// # Errors
    /// [`SetupError`] where the share cannot be reached.
    pub async fn remove(&self, places: Vec<PathBuf>) -> Result<(), SetupError> {
        let process = self.0.clone();
        apart(move || {
            let tree = Tree::enter(&process)?;
            places.iter().for_each(|place| tree.clear(place));
            Ok(())
        })
        .await
    }
}

/// Does `work` in a thread that may be anywhere afterwards.
async fn apart<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, SetupError> + Send + 'static,
) -> Result<T, SetupError> {
    let (answer, done) = oneshot::channel();
    let thread = thread::Builder::new().name("share".to_owned()).spawn(move || answer.send(work()));
    thread.map_err(step("start a thread"))?;
    done.await.map_err(|_| SetupError::Step { step: "change the share".to_owned(), errno: libc::EIO })?
}

/// Which mount is at the top of what the calling thread sees.
fn topmost_mount() -> Result<u64, SetupError> {
    let status = rustix::fs::statx(CWD, "/", AtFlags::empty(), StatxFlags::MNT_ID);
    status.map(|status| status.stx_mnt_id).map_err(step("look at the share's root"))
}

/// The tree of the share, as seen by a thread that has entered it.
struct Tree {
    root: OwnedFd,
    /// Its topmost file system once more, as a mount that nobody else has and that is not read-only.
    writable: OwnedFd,
}

impl Tree {
    /// Puts the calling thread, which is not the program's first, into the tree.
    fn enter(process: &OwnedFd) -> Result<Self, SetupError> {
        // SAFETY: the table of descriptors is not among the flags.
        unsafe { rustix::thread::unshare_unsafe(UnshareFlags::FS) }.map_err(step("leave the host's root"))?;
        let on_host = topmost_mount()?;
        move_into_thread_name_spaces(process.as_fd(), ThreadNameSpaceType::MOUNT).map_err(step("enter the share"))?;
        // Whatever that process is, the host's own tree is not to be changed.
        if topmost_mount()? == on_host {
            return Err(step("enter the share")(Errno::XDEV));
        }
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let root = rustix::fs::open("/", flags, Mode::empty()).map_err(step("open the share's root"))?;
        let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
        let writable = rustix::mount::open_tree(CWD, "/", flags).map_err(step("open the share's root"))?;
        let change = Change { clear: libc::MOUNT_ATTR_RDONLY, ..Change::default() };
        change.apply(writable.as_fd(), false).map_err(step("make room in the share"))?;
        Ok(Self { root, writable })
    }

    /// Takes away what is at a place, and what led there alone, but for the topmost directories: a guest believes for a
    /// while that those are the ones that it has seen.
    fn clear(&self, place: &Path) {
        // What is not there is not to be cleared, and what is still in use goes with its last user.
        let _ =
            rustix::mount::unmount(Path::new("/").join(place).as_path(), UnmountFlags::DETACH | UnmountFlags::NOFOLLOW);
        let removed = match rustix::fs::unlinkat(&self.writable, place, AtFlags::REMOVEDIR) {
            Err(Errno::NOTDIR) => rustix::fs::unlinkat(&self.writable, place, AtFlags::empty()),
            removed => removed,
        };
        let above =
            place.ancestors().skip(1).take_while(|above| above.parent().is_some_and(|top| top != Path::new("")));
        if removed.is_ok() {
            // One that others are in stays, and so does what it is in.
            for above in above {
                let _ = rustix::fs::unlinkat(&self.writable, above, AtFlags::REMOVEDIR);
            }
        }
    }
}
