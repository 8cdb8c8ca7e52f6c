//! A tmpfs is like the folder that it covers: it has its mode where none is asked for, as under runc, and begins as a copy
//! of it with `tmpcopyup`, an option that runc knows and Podman gives.

use std::borrow::Cow;
use std::fs::{self, Metadata};
use std::io;
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::os::unix::fs::{MetadataExt as _, lchown, symlink};
use std::path::{Path, PathBuf};

use libcontainer::oci_spec::runtime::{Mount, Spec};
use rustix::fs::{
    AtFlags, CWD, FileType, Mode, OFlags, ResolveFlags, Timespec, Timestamps, fstat, mknodat, open, openat2, utimensat,
};
use rustix::io::Errno;

const COPY: &str = "tmpcopyup";
const MODE: &str = "mode=";

/// A folder below a mount that shall begin as a copy of it.
pub(super) struct Covered {
    destination: PathBuf,
    folder: OwnedFd,
}

impl Covered {
    /// Finds what the specification's mounts are about to cover and shall begin as, and gives them its mode.
    pub fn find(spec: &mut Cow<'_, Spec>, root: &Path) -> io::Result<Vec<Self>> {
        let mut found = Vec::new();
        if !spec.mounts().iter().flatten().any(is_like_what_it_covers) {
            return Ok(found);
        }
        for mount in spec.to_mut().mounts_mut().iter_mut().flatten().filter(|mount| is_like_what_it_covers(mount)) {
            let destination = mount.destination().clone();
            let folder = match below(root, &destination) {
                Ok(folder) => Some(folder),
                // Then it begins empty.
                Err(Errno::NOENT | Errno::NOTDIR) => None,
                Err(errno) => return Err(errno.into()),
            };
            let wants_copy = has(mount, |option| option == COPY);
            // It is none of the file system's options.
            let mut options: Vec<_> =
                mount.options().iter().flatten().filter(|option| *option != COPY).cloned().collect();
            if let Some(folder) = &folder
                && !has(mount, |option| option.starts_with(MODE))
            {
                options.push(format!("{MODE}{:o}", fstat(folder)?.st_mode & 0o7777));
            }
            mount.set_options(Some(options));
            found.extend(folder.filter(|_| wants_copy).map(|folder| Self { destination, folder }));
        }
        Ok(found)
    }

    /// Copies it into what covers it.
    pub fn copy_up(&self, root: &Path) -> io::Result<()> {
        copy(&reached_by(&self.folder), &reached_by(&below(root, &self.destination)?))
    }
}

fn is_like_what_it_covers(mount: &Mount) -> bool {
    mount.typ().as_deref() == Some("tmpfs")
        && (has(mount, |option| option == COPY) || !has(mount, |option| option.starts_with(MODE)))
}

fn has(mount: &Mount, wanted: impl Fn(&str) -> bool) -> bool {
    mount.options().iter().flatten().any(|option| wanted(option))
}

/// A folder in the container's root, whose symbolic links lead nowhere else.
fn below(root: &Path, place: &Path) -> Result<OwnedFd, Errno> {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let root = open(root, flags, Mode::empty())?;
    openat2(root, place, flags, Mode::empty(), ResolveFlags::IN_ROOT)
}

fn reached_by(folder: &OwnedFd) -> PathBuf {
    format!("/proc/self/fd/{}", folder.as_raw_fd()).into()
}

fn copy(from: &Path, to: &Path) -> io::Result<()> {
    for entry in fs::read_dir(from)? {
        let entry = entry?;
        let (source, target) = (entry.path(), to.join(entry.file_name()));
        let metadata = entry.metadata()?;
        let kind = metadata.file_type();
        if kind.is_dir() {
            fs::create_dir(&target)?;
            copy(&source, &target)?;
        } else if kind.is_symlink() {
            symlink(fs::read_link(&source)?, &target)?;
        } else if kind.is_file() {
            fs::copy(&source, &target)?;
        } else {
            mknodat(CWD, &target, FileType::from_raw_mode(metadata.mode()), Mode::RUSR, metadata.rdev())?;
        }
        lchown(&target, Some(metadata.uid()), Some(metadata.gid()))?;
        if !kind.is_symlink() {
            fs::set_permissions(&target, metadata.permissions())?;
        }
        utimensat(CWD, &target, &times(&metadata), AtFlags::SYMLINK_NOFOLLOW)?;
    }
    Ok(())
}

fn times(of: &Metadata) -> Timestamps {
    Timestamps {
        last_access: Timespec { tv_sec: of.atime(), tv_nsec: of.atime_nsec() },
        last_modification: Timespec { tv_sec: of.mtime(), tv_nsec: of.mtime_nsec() },
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt as _;

    #[test]
    fn a_copy_is_like_what_it_is_of() {
        let folder = std::env::temp_dir().join(format!("runvm-copy-up-{}", std::process::id()));
        let (from, to) = (folder.join("from"), folder.join("to"));
        fs::create_dir_all(from.join("inner/empty")).unwrap();
        fs::create_dir(&to).unwrap();
        fs::write(from.join("inner/file"), "content").unwrap();
        fs::set_permissions(from.join("inner/file"), fs::Permissions::from_mode(0o4751)).unwrap();
        symlink("/nowhere", from.join("link")).unwrap();
        mknodat(CWD, from.join("fifo"), FileType::Fifo, Mode::RUSR, 0).unwrap();
        copy(&from, &to).unwrap();
        assert_eq!(fs::read_to_string(to.join("inner/file")).unwrap(), "content");
        assert_eq!(fs::read_link(to.join("link")).unwrap(), Path::new("/nowhere"));
        assert!(to.join("inner/empty").is_dir());
        for name in ["inner", "inner/file", "link", "fifo"] {
            let [one, other] = [&from, &to].map(|folder| fs::symlink_metadata(folder.join(name)).unwrap());
            let of = |file: &Metadata| (file.mode(), file.uid(), file.mtime(), file.mtime_nsec());
            assert_eq!(of(&one), of(&other), "{name}");
        }
        fs::remove_dir_all(&folder).unwrap();
    }

    #[test]
    fn what_is_covered_is_in_the_containers_root() {
        let root = std::env::temp_dir().join(format!("runvm-covered-{}", std::process::id()));
        fs::create_dir_all(root.join("etc")).unwrap();
        fs::set_permissions(root.join("etc"), fs::Permissions::from_mode(0o1751)).unwrap();
        symlink("/etc", root.join("link")).unwrap();
        let spec: Spec = serde_json::from_value(serde_json::json!({
            "ociVersion": "1.0.2",
            "mounts": [
                { "destination": "/link", "type": "tmpfs", "options": ["tmpcopyup", "nodev"] },
                { "destination": "/none", "type": "tmpfs", "options": ["tmpcopyup"] },
                { "destination": "/etc", "type": "tmpfs", "options": ["nosuid", "mode=700"] },
                { "destination": "/etc", "type": "tmpfs", "options": ["nosuid"] },
                { "destination": "/etc", "type": "bind" },
            ],
        }))
        .unwrap();
        let mut spec = Cow::Borrowed(&spec);
        let covered = Covered::find(&mut spec, &root).unwrap();
        let [only] = &covered[..] else { panic!("{} are covered", covered.len()) };
        assert_eq!(fs::read_link(reached_by(&only.folder)).unwrap(), root.join("etc"));
        let options = spec.mounts().iter().flatten().map(|mount| mount.options().clone().unwrap_or_default().join(","));
        let expected = ["nodev,mode=1751", "", "nosuid,mode=700", "nosuid,mode=1751", ""];
        assert_eq!(options.collect::<Vec<_>>(), expected);
        fs::remove_dir_all(&root).unwrap();
    }
}
