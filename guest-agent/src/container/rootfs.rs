//! The file systems of a container: mounted, entered, and closed to what its processes may not change or see.

use std::borrow::Cow;
use std::fs::{DirBuilder, File};
use std::io;
use std::os::unix::fs::{DirBuilderExt as _, FileTypeExt as _, MetadataExt as _};
use std::path::Path;

use libcontainer::oci_spec::runtime::{Linux, Spec};
use libcontainer::rootfs::RootFS;
use libcontainer::syscall::syscall::create_syscall;
use rustix::fs::statvfs;
use rustix::io::Errno;
use rustix::mount::{MountFlags, mount, mount_bind, mount_bind_recursive, mount_remount};
use rustix::thread::ThreadNameSpaceType;

use super::copy_up::Covered;
use super::process::{self, failed};
use super::program::describe;
use super::propagation;

/// Mounts what the specification has, and makes it the root of the calling process, which is in a mount namespace of
/// its own.
pub(super) fn enter(spec: &Spec, linux: &Linux) -> Result<(), String> {
    let root = spec.root().as_ref().ok_or("root is missing")?.path();
    let mut mounts = Cow::Borrowed(spec);
    let covered = Covered::find(&mut mounts, root).map_err(failed("look at what a tmpfs covers"))?;
    let file_systems = RootFS::new();
    // In a user namespace nobody may make a device.
    let binds_devices = process::namespaces(linux).contains(ThreadNameSpaceType::USER);
    file_systems.prepare_rootfs(&mounts, root, binds_devices, true).map_err(failed("prepare the root file system"))?;
    covered.iter().try_for_each(|covered| covered.copy_up(root)).map_err(failed("copy for a mount with tmpcopyup"))?;
    create_syscall().pivot_rootfs(root).map_err(failed("enter the root file system"))?;
    propagation::set(spec)?;
    file_systems.adjust_root_mount_propagation(linux).map_err(failed("set linux.rootfsPropagation"))
}

/// Makes the working directory where the image and the mounts lack it, as runc does. What was made for the program's
/// user in the image keeps its owner.
pub(super) fn make_directory(path: &Path) -> Result<(), String> {
    match DirBuilder::new().recursive(true).mode(0o755).create(path) {
        Ok(()) => Ok(()),
        Err(error) => {
            let errno = Errno::from_io_error(&error).unwrap_or(Errno::NOTDIR);
            // What is there and no directory is told so.
            let errno = if errno == Errno::EXIST { Errno::NOTDIR } else { errno };
            Err(format!("mkdir {}: {}", path.display(), describe(errno)))
        }
    }
}

/// Closes what the specification wants to be read-only, or hidden.
pub(super) fn protect(spec: &Spec, linux: &Linux) -> Result<(), String> {
    if spec.root().as_ref().and_then(|root| root.readonly()).unwrap_or_default() {
        make_read_only(Path::new("/")).map_err(failed("set root.readonly"))?;
    }
    for path in linux.readonly_paths().iter().flatten().map(Path::new) {
        match mount_bind_recursive(path, path) {
            Err(Errno::NOENT) => {}
            bound => bound.and_then(|()| make_read_only(path)).map_err(failed("set linux.readonlyPaths"))?,
        }
    }
    let paths: Vec<_> = linux.masked_paths().iter().flatten().map(Path::new).collect();
    if paths.is_empty() {
        return Ok(());
    }
    check_null().map_err(failed("use the container's /dev/null for linux.maskedPaths"))?;
    paths.into_iter().try_for_each(|path| mask(path).map_err(failed("set linux.maskedPaths")))
}

/// What else is said of a mount stays: the kernel takes a list of flags for the whole truth.
fn make_read_only(path: &Path) -> Result<(), Errno> {
    let flags = MountFlags::from_bits_truncate(statvfs(path)?.f_flag.bits() as u32);
    mount_remount(path, flags | MountFlags::BIND | MountFlags::RDONLY, "")
}

fn mask(path: &Path) -> Result<(), Errno> {
    match mount_bind("/dev/null", path) {
        Err(Errno::NOENT) => Ok(()),
        Err(Errno::NOTDIR) => mount("tmpfs", path, "tmpfs", MountFlags::RDONLY, None),
        masked => masked,
    }
}

/// An image could have something else there.
fn check_null() -> io::Result<()> {
    let data = File::open("/dev/null")?.metadata()?;
    let number = (libc::major(data.rdev()), libc::minor(data.rdev()));
    match data.file_type().is_char_device() && number == (1, 3) {
        true => Ok(()),
        false => Err(io::Error::other("it is not the null device")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_directory_that_cannot_be_made_is_told_in_runcs_words() {
        let made = |path: &str| make_directory(Path::new(path));
        assert_eq!(made("/"), Ok(()));
        assert_eq!(made("/etc/passwd"), Err("mkdir /etc/passwd: not a directory".into()));
        assert_eq!(made("/etc/passwd/x"), Err("mkdir /etc/passwd/x: not a directory".into()));
        assert_eq!(made("/proc/no/such"), Err("mkdir /proc/no/such: no such file or directory".into()));
    }
}
