//! The root file system that containerd has a shim mount: what mount(8) would be told by fstab(5), over the bundle's
//! `rootfs`, in the host's mount namespace.

use std::ffi::CString;
use std::io;
use std::path::{Component, Path, PathBuf};

use containerd_shim_protos::api::Mount;
use rustix::io::Errno;
use rustix::mount::{
    MountFlags, MountPropagationFlags, UnmountFlags, mount, mount_bind, mount_bind_recursive, mount_change,
    mount_remount, unmount,
};
use rustix::thread::{UnshareFlags, unshare_unsafe};
use thiserror::Error;

/// What the kernel takes of options for a file system, in bytes: a page, less the end of the string.
const MAX_DATA: usize = 4095;
/// How many mounts may lie on top of each other at one place.
const MAX_STACK: usize = 64;
/// How the options that are meant for the one who mounts begin, and not for the kernel.
const COMMENTS: [&str; 2] = ["x-", "X-"];

/// Why a root file system is not mounted, or stays.
#[derive(Debug, Error)]
pub enum MountError {
    /// mount(2) refuses.
    #[error("cannot mount {what} ({kind}) on {target}", target = target.display())]
    Mount {
        /// The file system's type.
        kind: String,
        /// What was to be mounted.
        what: String,
        /// Where.
        target: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// An option asks for what is not done.
    #[error("cannot mount {0}: the option {1} is not supported by this shim")]
    Option(String, String),
    /// A target that leads out of the root file system.
    #[error("cannot mount {0} on {1}, which is not below the root file system")]
    Target(String, String),
    /// umount2(2) refuses.
    #[error("cannot unmount {path}", path = .0.display())]
    Unmount(PathBuf, #[source] io::Error),
}

/// Mounts all, in order. After an error none is left.
///
/// # Errors
/// That of the first one that cannot be mounted.
pub fn mount_all(mounts: &[Mount], root: &Path) -> Result<(), MountError> {
    for (done, wanted) in mounts.iter().enumerate() {
        if let Err(error) = mount_one(wanted, root) {
            if done > 0 {
                unmount_all(root)?;
            }
            return Err(error);
        }
    }
    Ok(())
}

/// Unmounts whatever is mounted at and below a folder; where that is nothing, or the folder is not there, nothing.
///
/// # Errors
/// [`MountError::Unmount`].
pub fn unmount_all(root: &Path) -> Result<(), MountError> {
    for _ in 0..MAX_STACK {
        // Detached, as what is still used in a dying VM must not keep the bundle from being removed.
        match unmount(root, UnmountFlags::DETACH | UnmountFlags::NOFOLLOW) {
            Ok(()) => {}
            Err(Errno::INVAL | Errno::NOENT) => return Ok(()),
            Err(error) => return Err(MountError::Unmount(root.to_owned(), error.into())),
        }
    }
    Err(MountError::Unmount(root.to_owned(), io::ErrorKind::ResourceBusy.into()))
}

fn mount_one(wanted: &Mount, root: &Path) -> Result<(), MountError> {
    let options = Options::parse(&wanted.options);
    if let Some(unsupported) = options.unsupported {
        return Err(MountError::Option(wanted.source.clone(), unsupported));
    }
    let target =
        below(root, &wanted.target).ok_or_else(|| MountError::Target(wanted.source.clone(), wanted.target.clone()))?;
    let kind = &wanted.type_;
    let done = match options.bind.or_else(|| (kind == "bind").then_some(Bind::One)) {
        Some(bind) => options.bind(bind, &wanted.source, &target),
        None => options.mount(kind, &wanted.source, &target),
    };
    done.map_err(|source| MountError::Mount { kind: kind.clone(), what: wanted.source.clone(), target, source })
}

fn below(root: &Path, target: &str) -> Option<PathBuf> {
    let mut path = root.to_owned();
    for component in Path::new(target).components() {
        match component {
            Component::RootDir | Component::CurDir => {}
            Component::Normal(name) => path.push(name),
            Component::ParentDir | Component::Prefix(_) => return None,
        }
    }
    Some(path)
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Bind {
    One,
    Recursive,
}

/// The options of one mount.
#[derive(Debug, PartialEq, Eq)]
struct Options {
    flags: MountFlags,
    bind: Option<Bind>,
    propagation: Option<MountPropagationFlags>,
    /// The file system's own.
    data: Vec<String>,
    unsupported: Option<String>,
}

impl Options {
    fn parse(texts: &[String]) -> Self {
        let mut options =
            Self { flags: MountFlags::empty(), bind: None, propagation: None, data: Vec::new(), unsupported: None };
        for text in texts {
            match text.as_str() {
                "bind" => options.bind = Some(Bind::One),
                "rbind" => options.bind = Some(Bind::Recursive),
                "loop" => options.unsupported = Some(text.clone()),
                text if COMMENTS.iter().any(|comment| text.starts_with(comment)) => {}
                text => match (flag(text), propagation(text)) {
                    (Some((flag, true)), _) => options.flags |= flag,
                    (Some((flag, false)), _) => options.flags &= !flag,
                    (None, Some(propagation)) => options.propagation = Some(propagation),
                    (None, None) => options.data.push(text.to_owned()),
                },
            }
        }
        options
    }

    fn bind(&self, bind: Bind, source: &str, target: &Path) -> io::Result<()> {
        match bind {
            Bind::One => mount_bind(source, target)?,
            Bind::Recursive => mount_bind_recursive(source, target)?,
        }
        // A bind mount begins with the flags of what it shows.
        if !self.flags.is_empty() {
            mount_remount(target, MountFlags::BIND | self.flags, "")?;
        }
        self.propagate(target)
    }

    fn mount(&self, kind: &str, source: &str, target: &Path) -> io::Result<()> {
        let data = self.data.join(",");
        if data.len() <= MAX_DATA {
            mount(source, target, kind, self.flags, as_c_string(data)?.as_deref())?;
        } else {
            let (folder, data) = shortened(&self.data).ok_or(io::ErrorKind::ArgumentListTooLong)?;
            let data = as_c_string(data)?;
            in_folder(&folder, || Ok(mount(source, target, kind, self.flags, data.as_deref())?))?;
        }
        self.propagate(target)
    }

    fn propagate(&self, target: &Path) -> io::Result<()> {
        self.propagation.map_or(Ok(()), |propagation| Ok(mount_change(target, propagation)?))
    }
}

fn as_c_string(data: String) -> io::Result<Option<CString>> {
    Ok(if data.is_empty() { None } else { Some(CString::new(data)?) })
}

/// A flag, and whether it is set or cleared.
fn flag(text: &str) -> Option<(MountFlags, bool)> {
    Some(match text {
        "ro" => (MountFlags::RDONLY, true),
        "rw" => (MountFlags::RDONLY, false),
        "nosuid" => (MountFlags::NOSUID, true),
        "suid" => (MountFlags::NOSUID, false),
        "nodev" => (MountFlags::NODEV, true),
        "dev" => (MountFlags::NODEV, false),
        "noexec" => (MountFlags::NOEXEC, true),
        "exec" => (MountFlags::NOEXEC, false),
        "sync" => (MountFlags::SYNCHRONOUS, true),
        "async" => (MountFlags::SYNCHRONOUS, false),
        "dirsync" => (MountFlags::DIRSYNC, true),
        "noatime" => (MountFlags::NOATIME, true),
        "atime" => (MountFlags::NOATIME, false),
        "nodiratime" => (MountFlags::NODIRATIME, true),
        "diratime" => (MountFlags::NODIRATIME, false),
        "relatime" => (MountFlags::RELATIME, true),
        "norelatime" => (MountFlags::RELATIME, false),
        "strictatime" => (MountFlags::STRICTATIME, true),
        "nostrictatime" => (MountFlags::STRICTATIME, false),
        "defaults" => (MountFlags::empty(), true),
        _ => return None,
    })
}

fn propagation(text: &str) -> Option<MountPropagationFlags> {
    let recursive = text.strip_prefix('r').filter(|rest| !rest.is_empty());
    let kind = match recursive.unwrap_or(text) {
        "private" => MountPropagationFlags::PRIVATE,
        "shared" => MountPropagationFlags::SHARED,
        "slave" => MountPropagationFlags::DOWNSTREAM,
        "unbindable" => MountPropagationFlags::UNBINDABLE,
        _ => return None,
    };
    Some(if recursive.is_some() { kind | MountPropagationFlags::REC } else { kind })
}

/// The options of an overlay with the many lower folders of an image named from the folder that all are in.
fn shortened(data: &[String]) -> Option<(PathBuf, String)> {
    const LOWER: &str = "lowerdir=";
    let lower = data.iter().find_map(|option| option.strip_prefix(LOWER))?;
    let mut folder = Path::new(lower.split(':').next()?).parent()?;
    while !lower.split(':').all(|path| Path::new(path).starts_with(folder)) {
        folder = folder.parent()?;
    }
    let relative = |path: &str| Path::new(path).strip_prefix(folder).ok()?.to_str().map(str::to_owned);
    let relative = lower.split(':').map(relative).collect::<Option<Vec<_>>>()?.join(":");
    let options: Vec<_> = data
        .iter()
        .map(|option| if option.starts_with(LOWER) { format!("{LOWER}{relative}") } else { option.clone() })
        .collect();
    let options = options.join(",");
    (folder != Path::new("/") && options.len() <= MAX_DATA).then(|| (folder.to_owned(), options))
}

/// Does the work in another working folder, which is a thread's of its own meanwhile.
fn in_folder(folder: &Path, work: impl FnOnce() -> io::Result<()> + Send) -> io::Result<()> {
    let thread = || {
        // SAFETY: only the working folder, root and umask are unshared, and no descriptors.
        unsafe { unshare_unsafe(UnshareFlags::FS) }?;
        rustix::process::chdir(folder)?;
        work()
    };
    let done = std::thread::scope(|scope| scope.spawn(thread).join());
    done.unwrap_or_else(|_| Err(io::Error::other("the thread that mounts ended unexpectedly")))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn options(texts: &[&str]) -> Options {
        Options::parse(&texts.iter().map(|&text| text.to_owned()).collect::<Vec<_>>())
    }

    #[test]
    fn options_are_the_kernels_or_the_file_systems() {
        let overlay =
            options(&["index=off", "workdir=/w", "upperdir=/u", "lowerdir=/a:/b", "volatile", "X-c.e=1", "ro"]);
        assert_eq!(overlay.data, ["index=off", "workdir=/w", "upperdir=/u", "lowerdir=/a:/b", "volatile"]);
        assert_eq!((overlay.flags, overlay.bind, overlay.propagation), (MountFlags::RDONLY, None, None));
        let bind = options(&["rbind", "ro", "nosuid", "rw", "rprivate"]);
        assert_eq!((bind.bind, bind.flags), (Some(Bind::Recursive), MountFlags::NOSUID));
        assert_eq!(bind.propagation, Some(MountPropagationFlags::PRIVATE | MountPropagationFlags::REC));
        assert_eq!(options(&["loop"]).unsupported.as_deref(), Some("loop"));
        assert_eq!(options(&["relatime", "defaults"]).flags, MountFlags::RELATIME);
    }

    #[test]
    fn a_target_stays_below_the_root() {
        let root = Path::new("/b/rootfs");
        assert_eq!(below(root, ""), Some("/b/rootfs".into()));
        assert_eq!(below(root, "/x/./y"), Some("/b/rootfs/x/y".into()));
        assert_eq!(below(root, "/x/../../y"), None);
    }

    #[test]
    fn many_layers_fit() {
        let layers: Vec<_> = (0..120).map(|n| format!("/var/lib/containerd/snapshots/{n}/fs")).collect();
        let data = ["upperdir=/var/lib/u".to_owned(), format!("lowerdir={}", layers.join(":"))];
        let (folder, text) = shortened(&data).unwrap();
        assert_eq!(folder, Path::new("/var/lib/containerd/snapshots"));
        assert!(text.starts_with("upperdir=/var/lib/u,lowerdir=0/fs:1/fs:") && text.len() < 1200, "{text}");
        assert_eq!(shortened(&["lowerdir=/a:/b".to_owned()]), None);
    }

    #[test]
    fn mounts_come_and_go() {
        let folder = tempfile::tempdir().unwrap();
        let (source, root) = (folder.path().join("s"), folder.path().join("rootfs"));
        std::fs::create_dir(&source).unwrap();
        std::fs::create_dir(&root).unwrap();
        std::fs::write(source.join("f"), "x").unwrap();
        let bind = Mount {
            type_: "bind".into(),
            source: source.to_str().unwrap().into(),
            options: vec!["rbind".into(), "ro".into()],
            ..Default::default()
        };
        mount_all(std::slice::from_ref(&bind), &root).unwrap();
        assert!(std::fs::read(root.join("f")).is_ok());
        assert!(std::fs::write(root.join("g"), "x").is_err());
        let bad = Mount { type_: "no-such-fs".into(), ..Default::default() };
        let error = mount_all(&[bind, bad], &root).unwrap_err();
        assert!(error.to_string().contains("no-such-fs"), "{error}");
        assert!(std::fs::read(root.join("f")).is_err());
        unmount_all(&root).unwrap();
        unmount_all(&root.join("no")).unwrap();
    }
}
