//! The tree of files: a small tmpfs with every export bind-mounted on it, as the root of this process alone.
//!
//! The process leaves the host's mount namespace first. Mounts that appear on the host below an export still
//! arrive (its mounts follow the host's), and none of ours ever gets out. Nothing below the root can act on the
//! host by being there: devices are dead, set-user-ID and execution are off, and links are never followed on the way to a
//! file, here by the kernel as well as by virtiofsd.

use std::collections::BTreeSet;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::{Component, Path};

use nix::libc;
use rustix::fs::{AtFlags, CWD, FileType, Mode, OFlags, ResolveFlags};
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, MountPropagationFlags, MoveMountFlags, OpenTreeFlags, UnmountFlags,
};
use rustix::thread::UnshareFlags;

use super::{Export, IdMap, SetupError};
use crate::host::user_namespace;

/// What no mount of the tree needs.
const INERT: u64 =
    libc::MOUNT_ATTR_NODEV | libc::MOUNT_ATTR_NOSUID | libc::MOUNT_ATTR_NOEXEC | libc::MOUNT_ATTR_NOSYMFOLLOW;

/// Any directory serves that is sure to be there; the mount is gone from it as soon as it is the root.
const STAGE: &str = "/proc";

/// An export, cut loose from where it came from.
pub(super) struct Source {
    mount: OwnedFd,
    directory: bool,
}

/// Makes the tree of `exports` the root of this process.
pub(super) fn enter(exports: &[Export]) -> Result<(), SetupError> {
    leave_host()?;
    let sources = exports.iter().map(open).collect::<Result<Vec<_>, _>>()?;
    let root = skeleton(exports, &sources)?;
    for (export, source) in exports.iter().zip(&sources) {
        attach(&root, export, source)?;
    }
    let read_only = Change { set: libc::MOUNT_ATTR_RDONLY, ..Change::default() };
    read_only.apply(root.as_fd(), false).map_err(step("make the share's root read-only"))?;
    switch_to(&root)
}

/// The directory `/proc/self/fd` as a file system of its own, for virtiofsd, which reopens files through it:
/// nothing else of /proc can be reached from it.
pub(super) fn own_descriptors() -> Result<OwnedFd, SetupError> {
    rustix::mount::open_tree(CWD, "/proc/self/fd", OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC)
        .map_err(step("open /proc/self/fd"))
}

/// Turns an error number into a [`SetupError`].
pub(super) fn step<E: Into<io::Error>>(step: &str) -> impl FnOnce(E) -> SetupError + '_ {
    move |error| SetupError::Step { step: step.into(), errno: error.into().raw_os_error().unwrap_or(libc::EIO) }
}

fn leave_host() -> Result<(), SetupError> {
    // The network namespace is empty: this process has no business with any.
    let flags = UnshareFlags::NEWNS | UnshareFlags::NEWNET | UnshareFlags::NEWIPC | UnshareFlags::NEWUTS;
    // SAFETY: the table of descriptors is not among the flags.
    unsafe { rustix::thread::unshare_unsafe(flags) }.map_err(step("leave the host's namespaces"))?;
    rustix::mount::mount_change("/", MountPropagationFlags::DOWNSTREAM | MountPropagationFlags::REC)
        .map_err(step("detach the mount namespace from the host's"))
}

/// Cuts an export loose from where it is. What is mounted there on the host still arrives, and nothing goes back.
pub(super) fn open(export: &Export) -> Result<Source, SetupError> {
    let fail = |errno: io::Error| SetupError::Source {
        source_path: export.source.clone(),
        errno: errno.raw_os_error().unwrap_or(libc::EIO),
    };
    let mut flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    flags.set(OpenTreeFlags::AT_RECURSIVE, export.recursive);
    let mount = rustix::mount::open_tree(CWD, &export.source, flags).map_err(|errno| fail(errno.into()))?;
    let attributes = if export.read_only { INERT | libc::MOUNT_ATTR_RDONLY } else { INERT };
    let change = Change { set: attributes, propagation: libc::MS_SLAVE, ..Change::default() };
    change.apply(mount.as_fd(), true).map_err(fail)?;
    if let Some(id_map) = &export.id_map {
        map_ids(mount.as_fd(), id_map)
            .map_err(|reason| SetupError::IdMap { source_path: export.source.clone(), reason })?;
    }
    let status = rustix::fs::fstat(&mount).map_err(|errno| fail(errno.into()))?;
    Ok(Source { mount, directory: FileType::from_raw_mode(status.st_mode).is_dir() })
}

/// Has the files be owned by those who stand for their owners; why they cannot, as a clause.
fn map_ids(mount: BorrowedFd<'_>, id_map: &IdMap) -> Result<(), String> {
    let namespace =
        user_namespace::make(&id_map.mappings).map_err(|error| format!("the host refuses such mappings: {error}"))?;
    let user_namespace = Some(namespace.as_fd());
    let change = Change { set: libc::MOUNT_ATTR_IDMAP, user_namespace, ..Change::default() };
    change.apply(mount, id_map.recursive).map_err(|error| match error.raw_os_error() {
        Some(libc::EINVAL) => "its file system does not let them be, give the files their owners".to_owned(),
        Some(libc::EPERM) => "they are mapped already, or it is not the host's root that mounted it".to_owned(),
        _ => error.to_string(),
    })
}

/// A tmpfs with a place for each export, on [`STAGE`].
fn skeleton(exports: &[Export], sources: &[Source]) -> Result<OwnedFd, SetupError> {
    let mut places = BTreeSet::new();
    let make = || -> rustix::io::Result<OwnedFd> {
        let context = rustix::mount::fsopen("tmpfs", FsOpenFlags::FSOPEN_CLOEXEC)?;
        rustix::mount::fsconfig_set_string(&context, "mode", "0755")?;
        rustix::mount::fsconfig_create(&context)?;
        let attributes = MountAttrFlags::MOUNT_ATTR_NODEV
            | MountAttrFlags::MOUNT_ATTR_NOSUID
            | MountAttrFlags::MOUNT_ATTR_NOEXEC
            | MountAttrFlags::MOUNT_ATTR_NOSYMFOLLOW;
        let root = rustix::mount::fsmount(&context, FsMountFlags::FSMOUNT_CLOEXEC, attributes)?;
        rustix::mount::move_mount(&root, "", CWD, STAGE, MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH)?;
        Ok(root)
    };
    let root = make().map_err(step("make the share's root"))?;
    for (export, source) in exports.iter().zip(sources) {
        if !places.insert(export.path.as_path()) {
            return Err(SetupError::Place { path: export.path.clone() });
        }
        make_place(&root, export, source)?;
    }
    Ok(root)
}

/// Makes what an export is mounted on, in a tmpfs that may be written to.
pub(super) fn make_place(root: &OwnedFd, export: &Export, source: &Source) -> Result<(), SetupError> {
    let refused = || SetupError::Place { path: export.path.clone() };
    if !is_plain(&export.path) {
        return Err(refused());
    }
    place(root, &export.path, source.directory).map_err(|_| refused())
}

fn is_plain(path: &Path) -> bool {
    path.components().next().is_some() && path.components().all(|component| matches!(component, Component::Normal(_)))
}

/// Makes the directory or the empty file that an export is mounted on, and what leads there.
fn place(root: &OwnedFd, path: &Path, directory: bool) -> rustix::io::Result<()> {
    let above = path.ancestors().skip(1).filter(|above| !above.as_os_str().is_empty()).collect::<Vec<_>>();
    let directories = above.into_iter().rev().chain(directory.then_some(path));
    for path in directories {
        match rustix::fs::mkdirat(root, path, Mode::from_raw_mode(0o755)) {
            Ok(()) | Err(rustix::io::Errno::EXIST) => {}
            Err(errno) => return Err(errno),
        }
    }
    if !directory {
        rustix::fs::mknodat(root, path, FileType::RegularFile, Mode::from_raw_mode(0o644), 0)?;
    }
    Ok(())
}

/// Mounts an export on its place.
pub(super) fn attach(root: &OwnedFd, export: &Export, source: &Source) -> Result<(), SetupError> {
    // Within another export this would be the guest's own directory: it is not ours to walk.
    let place = rustix::fs::openat2(
        root,
        &export.path,
        OFlags::PATH | OFlags::CLOEXEC,
        Mode::empty(),
        ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_XDEV,
    )
    .map_err(|_| SetupError::Place { path: export.path.clone() })?;
    let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH | MoveMountFlags::MOVE_MOUNT_T_EMPTY_PATH;
    rustix::mount::move_mount(&source.mount, "", &place, "", flags)
        .map_err(step(&format!("mount {}", export.source.display())))
}

fn switch_to(root: &OwnedFd) -> Result<(), SetupError> {
    let switch = || -> rustix::io::Result<()> {
        rustix::process::fchdir(root)?;
        // With both the same, the old root ends on top of the new, in one place with it: ready to be taken off.
        rustix::process::pivot_root(".", ".")?;
        rustix::mount::unmount(".", UnmountFlags::DETACH)?;
        rustix::process::chdir("/")
    };
    switch().map_err(step("change to the share's root"))
}

/// A change of a mount's attributes; those that it does not name stay.
#[derive(Default)]
pub(super) struct Change<'a> {
    pub(super) set: u64,
    pub(super) clear: u64,
    /// As in mount(2); zero leaves it.
    pub(super) propagation: u64,
    /// The user namespace of `MOUNT_ATTR_IDMAP`.
    pub(super) user_namespace: Option<BorrowedFd<'a>>,
}

impl Change<'_> {
    /// Makes it, also to the mounts below where it is `recursive`.
    pub(super) fn apply(&self, mount: BorrowedFd<'_>, recursive: bool) -> io::Result<()> {
        let attributes = libc::mount_attr {
            attr_set: self.set,
            attr_clr: self.clear,
            propagation: self.propagation,
            userns_fd: self.user_namespace.map_or(0, |namespace| u64::from(namespace.as_raw_fd().cast_unsigned())),
        };
        let mut flags = AtFlags::EMPTY_PATH.bits();
        if recursive {
            flags |= libc::AT_RECURSIVE.cast_unsigned();
        }
        // SAFETY: the path is a C string and the attributes are of the size that is given.
        let result = unsafe {
            libc::syscall(
                libc::SYS_mount_setattr,
                mount.as_raw_fd(),
                c"".as_ptr(),
                flags,
                &raw const attributes,
                size_of::<libc::mount_attr>(),
            )
        };
        if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
    }
}
