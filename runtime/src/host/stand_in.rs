//! The root that is found through what stands for a container on the host.
//!
//! Engines enter the mount namespace of that process, as they may with a runc's: Podman does so to copy files into and out
//! of a running container. Without a namespace of its own they would find the host's root there, and write to it.

use std::io;
use std::path::Path;
use std::sync::mpsc;

use rustix::mount::{MountPropagationFlags, UnmountFlags, mount_bind_recursive, mount_change, unmount};
use rustix::process::{chdir, pivot_root};
use rustix::thread::UnshareFlags;

/// What becomes of the calling thread of [`behind`].
pub struct Standing {
    begin: mpsc::Sender<()>,
    done: mpsc::Receiver<io::Result<()>>,
}

impl Standing {
    /// Has it change its root now.
    pub fn begin(&self) {
        // Where it has ended, the other knows.
        let _ = self.begin.send(());
    }

    /// Waits until it has nothing but the new root for its files.
    ///
    /// # Errors
    /// Why it has not.
    pub fn wait(self) -> io::Result<()> {
        self.begin();
        self.done.recv().unwrap_or_else(|_| Err(io::Error::other("nobody changed the root")))
    }
}

/// Does `work` on a thread of its own, with the host's files, while the calling one, which has to be the process's first,
/// changes to nothing but `rootfs`, once `work` says so. Copying the host's mounts and letting go of them takes milliseconds of a
/// processor, which is best done while `work` waits for something else.
pub fn behind<T: Send>(rootfs: &Path, work: impl FnOnce(Standing) -> T + Send) -> io::Result<T> {
    std::thread::scope(|scope| {
        let ((begin, begun), (tell, done)) = (mpsc::channel(), mpsc::channel());
        let worker = std::thread::Builder::new().spawn_scoped(scope, move || work(Standing { begin, done }))?;
        if begun.recv().is_ok() {
            // Who does not listen has ended, which is seen next.
            let _ = tell.send(change_root(rootfs));
        }
        worker.join().map_err(|_| io::Error::other("the thread that does the work ended"))
    })
}

fn change_root(rootfs: &Path) -> io::Result<()> {
    // SAFETY: the table of descriptors is not among the flags; the root and the folder become this thread's own.
    unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWNS) }?;
    mount_change("/", MountPropagationFlags::DOWNSTREAM | MountPropagationFlags::REC)?;
    mount_bind_recursive(rootfs, rootfs)?;
    chdir(rootfs)?;
    // Puts the host's root on top of the new one, from where it is taken away: no mount of the host's is kept busy.
    pivot_root(".", ".")?;
    unmount(".", UnmountFlags::DETACH)?;
    Ok(chdir("/")?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn others_find_the_root_and_the_work_the_hosts_files() {
        let rootfs = tempfile::tempdir().unwrap();
        std::fs::write(rootfs.path().join("inside"), "").unwrap();
        let standing = std::thread::scope(|scope| {
            let standing = scope.spawn(|| {
                let tid = rustix::thread::gettid().as_raw_nonzero();
                behind(rootfs.path(), |standing| {
                    standing.wait().unwrap();
                    let root = format!("/proc/self/task/{tid}/root");
                    let mounts = std::fs::read_to_string(format!("/proc/self/task/{tid}/mountinfo")).unwrap();
                    let found = Path::new(&root).join("inside").exists();
                    (found, mounts.lines().count(), rootfs.path().join("inside").exists())
                })
            });
            standing.join().unwrap().unwrap()
        });
        assert_eq!(standing, (true, 1, true));
    }
}
