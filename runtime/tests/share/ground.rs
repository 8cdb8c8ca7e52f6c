//! What there is to be reached, and must not be.

use std::fs;
use std::os::unix::fs::{MetadataExt as _, symlink};
use std::path::{Path, PathBuf};

use libtest_mimic::Failed;
use runvm::share::Export;
use rustix::fs::{CWD, FileType, Mode, makedev, mknodat};
use serde::{Deserialize, Serialize};
use tempfile::TempDir;

/// What is in files that are not the guest's.
pub const SECRET: &str = "nobody may read this";
/// What is in a file that the guest may only read.
const PRECIOUS: &str = "nobody may change this";

/// The exports, by their names in the tree.
pub const WRITABLE: &str = "writable";
pub const READ_ONLY: &str = "read-only";
/// One below which something is mounted that is not exported.
pub const BOUND: &str = "bound";
/// Where that is.
pub const BELOW: &str = "below";

/// The ground, as a guest's files are told of it.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Map {
    /// The folder of all, which has the exports and the folder `outside` with the files `secret` and `doomed`.
    pub folder: PathBuf,
    /// The inodes that are no export's.
    pub outside: Vec<u64>,
}

impl Map {
    /// What is shared with the guest.
    pub fn exports(&self) -> [Export; 3] {
        let export = |path: &str, read_only| Export {
            path: path.into(),
            source: self.folder.join(path),
            read_only,
            recursive: path != BOUND,
            id_map: None,
        };
        [export(WRITABLE, false), export(READ_ONLY, true), export(BOUND, false)]
    }

    /// The file that everybody is after.
    pub fn secret(&self) -> PathBuf {
        self.folder.join("outside/secret")
    }
}

/// The ground itself. It is gone when this is dropped.
pub struct Ground {
    /// What to tell a guest's files.
    pub map: Map,
    _folder: TempDir,
}

impl Ground {
    /// Makes it.
    pub fn make() -> Result<Self, Failed> {
        let temporary = TempDir::new()?;
        let folder = temporary.path().canonicalize()?;
        let place = |path: &str| folder.join(path);
        for path in ["outside", "writable/folder", "read-only/folder", "bound/below"] {
            fs::create_dir_all(place(path))?;
        }
        fs::write(place("outside/secret"), SECRET)?;
        fs::write(place("outside/doomed"), SECRET)?;
        fs::write(place("writable/file"), "the guest's")?;
        fs::write(place("read-only/file"), PRECIOUS)?;
        symlink(place("outside/secret"), place("writable/absolute"))?;
        symlink("../outside/secret", place("writable/relative"))?;
        symlink("..", place("writable/up"))?;
        for (name, kind) in [("device", FileType::CharacterDevice), ("fifo", FileType::Fifo)] {
            mknodat(CWD, place("writable").join(name), kind, Mode::from_raw_mode(0o666), makedev(1, 5))?;
        }
        let inode = |path: &str| fs::metadata(place(path)).map(|metadata| metadata.ino());
        let outside = vec![inode("")?, inode("outside")?, inode("outside/secret")?, inode("outside/doomed")?];
        Ok(Self { map: Map { folder, outside }, _folder: temporary })
    }

    /// Whether all that the guest may not change is as it was.
    pub fn check(&self) -> Result<(), Failed> {
        let folder = &self.map.folder;
        let untouched = names(folder)? == [BOUND, "outside", READ_ONLY, WRITABLE]
            && names(&folder.join("outside"))? == ["doomed", "secret"]
            && fs::read_to_string(self.map.secret())? == SECRET
            && names(&folder.join(READ_ONLY))? == ["file", "folder"]
            && fs::read_to_string(folder.join("read-only/file"))? == PRECIOUS
            && names(&folder.join("read-only/folder"))?.is_empty();
        if untouched { Ok(()) } else { Err("something has changed that is not the guest's".into()) }
    }
}

fn names(folder: &Path) -> Result<Vec<String>, Failed> {
    let entries = fs::read_dir(folder)?.map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned()));
    let mut names = entries.collect::<std::io::Result<Vec<_>>>()?;
    names.sort();
    Ok(names)
}
