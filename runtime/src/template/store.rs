//! Where templates are kept: a folder for each, by its shape's key, with the machine's `state` and `memory` and the
//! `shape.json` that they belong to.
//!
//! A template is there whole or not at all: it is written into a [`Draft`], which becomes the template by a rename. At
//! most one draft of a key is being written; its lock ends with the process that writes it, however that ends, and the
//! next one clears away what it left. Nothing is ever changed in a template, so whoever has its files open is not
//! disturbed by its removal.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io;
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use rustix::fs::{FlockOperation, flock};
use serde::Serialize;

use super::{Shape, TemplateError};
use crate::host::boot_id;

const STATE: &str = "state";
const MEMORY: &str = "memory";
const SHAPE: &str = "shape.json";
/// What a draft's folder has behind its key.
const DRAFT: &str = ".draft";
const LOCK: &str = ".lock";

/// How much room templates may take on disk, in bytes; the ones that were not used for longest go first.
pub const MAX_TOTAL: u64 = 2 << 30;

type Result<T> = std::result::Result<T, TemplateError>;

/// The folder of all templates.
#[derive(Clone, Debug)]
pub struct Store(PathBuf);

/// A template's files, open for reading.
#[derive(Debug)]
pub struct Files {
    /// The machine but for its memory.
    pub state: File,
    /// Its memory.
    pub memory: File,
}

/// What there is to tell of a template.
#[derive(Debug, Serialize)]
pub struct Template {
    /// Its name.
    pub key: String,
    /// What it is of; none where that cannot be read.
    pub shape: Option<Shape>,
    /// What it takes on disk, in bytes.
    pub size: u64,
    /// When it was last used, or made, in seconds since 1970.
    pub used: u64,
    /// Whether a machine can still be forked from it: not after the host's boot that it was made in.
    pub usable: bool,
}

impl Store {
    /// The store in this folder, which is made when it is needed.
    pub fn at(folder: PathBuf) -> Self {
        Self(folder)
    }

    /// Opens the template of a shape; none where there is none.
    pub fn open(&self, shape: &Shape) -> Option<Files> {
        let folder = self.0.join(shape.key());
        let written = fs::read(folder.join(SHAPE)).ok()?;
        (serde_json::from_slice::<Shape>(&written).ok()? == *shape).then_some(())?;
        let state = File::open(folder.join(STATE)).ok()?;
        let memory = File::open(folder.join(MEMORY)).ok()?;
        // Its time only says which is to go first.
        let _ = state.set_modified(SystemTime::now());
        Some(Files { state, memory })
    }

    /// Begins a template; none where it is there, or another process is writing it.
    ///
    /// # Errors
    /// [`TemplateError::File`].
    pub fn begin(&self, shape: &Shape) -> Result<Option<Draft>> {
        let make = |path: &Path| DirBuilder::new().recursive(true).mode(0o700).create(path);
        make(&self.0).map_err(TemplateError::file("make", &self.0))?;
        let key = shape.key();
        let Some(lock) = self.lock(&key)? else { return Ok(None) };
        if self.open(shape).is_some() {
            return Ok(None);
        }
        let folder = self.0.join(format!("{key}{DRAFT}"));
        discard(&folder).map_err(TemplateError::file("remove", &folder))?;
        make(&folder).map_err(TemplateError::file("make", &folder))?;
        let draft = Draft { store: self.clone(), key, folder, _lock: lock };
        let text = serde_json::to_vec(shape).map_err(io::Error::from);
        let path = draft.folder.join(SHAPE);
        text.and_then(|text| fs::write(&path, text)).map_err(TemplateError::file("write", path))?;
        Ok(Some(draft))
    }

    /// All templates, the one that was last used first.
    ///
    /// # Errors
    /// [`TemplateError::File`].
    pub fn list(&self) -> Result<Vec<Template>> {
        let read = TemplateError::file("read", &self.0);
        let entries = match fs::read_dir(&self.0) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            entries => entries.and_then(Iterator::collect::<io::Result<Vec<_>>>).map_err(read)?,
        };
        let boot = boot_id();
        let names = entries.iter().filter_map(|entry| entry.file_name().into_string().ok());
        let mut templates: Vec<_> = names.filter_map(|key| self.look(key, &boot)).collect();
        templates.sort_by_key(|template| std::cmp::Reverse(template.used));
        Ok(templates)
    }

    /// Removes a template.
    ///
    /// # Errors
    /// [`TemplateError::Unknown`], [`TemplateError::File`].
    pub fn remove(&self, key: &str) -> Result<()> {
        let folder = self.0.join(key);
        if !is_key(key) || !folder.is_dir() {
            return Err(TemplateError::Unknown(key.to_owned()));
        }
        self.take_away(key).map_err(TemplateError::file("remove", folder))
    }

    /// Removes the templates that can no longer be used, then those unused for longest until the others take no more
    /// than `limit` bytes, and what processes that were killed left; the names of the templates that went.
    ///
    /// # Errors
    /// [`TemplateError::File`].
    pub fn prune(&self, limit: u64) -> Result<Vec<String>> {
        let mut total = 0;
        let mut gone = Vec::new();
        for template in self.list()? {
            total += template.size;
            if !template.usable || total > limit {
                self.remove(&template.key)?;
                gone.push(template.key);
            }
        }
        self.sweep();
        Ok(gone)
    }

    /// Clears away drafts that nobody writes any more, and templates that their removers did not get rid of. What cannot
    /// be removed now is left for the next time.
    fn sweep(&self) {
        let entries = fs::read_dir(&self.0).into_iter().flatten().flatten();
        for name in entries.filter_map(|entry| entry.file_name().into_string().ok()) {
            let Some((key, end)) = name.split_once('.').filter(|(key, _)| is_key(key)) else { continue };
            let _lock = match end {
                // A lock that was left goes when it is given back.
                "draft" | "lock" => match self.lock(key) {
                    Ok(Some(lock)) => Some(lock),
                    _ => continue,
                },
                _ if end.parse::<u32>().is_ok() => None,
                _ => continue,
            };
            if end != "lock" {
                let _ = discard(&self.0.join(&name));
            }
        }
    }

    /// The lock on the draft of a key; none where another process has it.
    fn lock(&self, key: &str) -> Result<Option<Lock>> {
        let path = self.0.join(format!("{key}{LOCK}"));
        loop {
            let file = OpenOptions::new().write(true).create(true).truncate(false).mode(0o600).open(&path);
            let file = file.map_err(TemplateError::file("open", &path))?;
            match flock(&file, FlockOperation::NonBlockingLockExclusive) {
                Err(rustix::io::Errno::WOULDBLOCK) => return Ok(None),
                locked => locked.map_err(|errno| TemplateError::file("lock", &path)(errno.into()))?,
            }
            let number = |status: io::Result<fs::Metadata>| status.map(|status| status.ino()).ok();
            // Who had it may have removed it since it was opened here.
            if number(file.metadata()) == number(fs::metadata(&path)) {
                return Ok(Some(Lock { path, _file: file }));
            }
        }
    }

    fn look(&self, key: String, boot: &str) -> Option<Template> {
        if !is_key(&key) {
            return None;
        }
        let folder = self.0.join(&key);
        let status = |name: &str| fs::metadata(folder.join(name)).ok();
        let (state, memory) = (status(STATE), status(MEMORY));
        let size = [&state, &memory].into_iter().flatten().map(|status| status.blocks() * 512).sum();
        let shape = fs::read(folder.join(SHAPE)).ok().and_then(|text| serde_json::from_slice::<Shape>(&text).ok());
        let used = state.as_ref().map_or(0, |status| u64::try_from(status.mtime()).unwrap_or(0));
        let usable = state.is_some() && memory.is_some() && shape.as_ref().is_some_and(|shape| shape.boot == boot);
        Some(Template { key, shape, size, used, usable })
    }

    /// First by a rename, so that nobody sees half a template.
    fn take_away(&self, key: &str) -> io::Result<()> {
        let aside = self.0.join(format!("{key}.{}", std::process::id()));
        match fs::rename(self.0.join(key), &aside) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            renamed => renamed.and_then(|()| discard(&aside)),
        }
    }
}

/// A locked file, which goes with the lock.
#[derive(Debug)]
struct Lock {
    path: PathBuf,
    _file: File,
}

impl Drop for Lock {
    fn drop(&mut self) {
        // One that stays is taken by the next.
        let _ = fs::remove_file(&self.path);
    }
}

/// A template that is being written. Dropped, it leaves nothing behind.
#[derive(Debug)]
pub struct Draft {
    store: Store,
    key: String,
    folder: PathBuf,
    _lock: Lock,
}

impl Draft {
    /// Makes the files that are to be written: the machine's state, and its memory.
    ///
    /// # Errors
    /// [`TemplateError::File`].
    pub fn files(&self) -> Result<Files> {
        let create = |name: &str| {
            let path = self.folder.join(name);
            let file = OpenOptions::new().read(true).write(true).create_new(true).mode(0o600).open(&path);
            file.map_err(TemplateError::file("create", path))
        };
        Ok(Files { state: create(STATE)?, memory: create(MEMORY)? })
    }

    /// Makes it the template of its shape, and lets others go where there are too many.
    ///
    /// # Errors
    /// [`TemplateError::File`].
    pub fn commit(self) -> Result<()> {
        self.store.take_away(&self.key).map_err(TemplateError::file("replace", &self.folder))?;
        let place = self.store.0.join(&self.key);
        fs::rename(&self.folder, &place).map_err(TemplateError::file("rename", &self.folder))?;
        self.store.prune(MAX_TOTAL).map(drop)
    }
}

impl Drop for Draft {
    fn drop(&mut self) {
        // What cannot be removed now is removed by who next begins the same template.
        let _ = discard(&self.folder);
    }
}

fn discard(folder: &Path) -> io::Result<()> {
    match fs::remove_dir_all(folder) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        removed => removed,
    }
}

fn is_key(name: &str) -> bool {
    name.len() == 16 && name.bytes().all(|byte| byte.is_ascii_hexdigit())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::template::shape::tests::shape;
    use std::io::{Read as _, Write as _};

    fn make(store: &Store, shape: &Shape, content: &[u8]) {
        let draft = store.begin(shape).unwrap().unwrap();
        let mut files = draft.files().unwrap();
        files.state.write_all(content).unwrap();
        files.memory.write_all(content).unwrap();
        draft.commit().unwrap();
    }

    fn current(vcpus: u32) -> Shape {
        Shape { boot: boot_id(), ..shape(vcpus) }
    }

    #[test]
    fn a_template_is_there_whole_or_not_at_all() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::at(dir.path().join("templates"));
        assert!(store.open(&current(1)).is_none() && store.list().unwrap().is_empty());
        let draft = store.begin(&current(1)).unwrap().unwrap();
        draft.files().unwrap();
        assert!(store.begin(&current(1)).unwrap().is_none(), "one at a time");
        assert!(store.open(&current(1)).is_none() && store.list().unwrap().is_empty());
        drop(draft);
        make(&store, &current(1), b"machine");
        assert!(store.begin(&current(1)).unwrap().is_none());
        let mut files = store.open(&current(1)).unwrap();
        assert!(store.open(&current(2)).is_none());
        let key = current(1).key();
        store.remove(&key).unwrap();
        assert!(matches!(store.remove(&key), Err(TemplateError::Unknown(_))));
        assert!(matches!(store.remove("../templates"), Err(TemplateError::Unknown(_))));
        let mut text = String::new();
        files.state.read_to_string(&mut text).unwrap();
        assert_eq!(text, "machine", "an open template outlives its name");
    }

    #[test]
    fn what_a_killed_writer_left_is_cleared_away() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::at(dir.path().to_owned());
        let left = dir.path().join(format!("{}{DRAFT}", current(1).key()));
        fs::create_dir(&left).unwrap();
        fs::write(left.join(STATE), "half").unwrap();
        make(&store, &current(1), b"whole");
        assert!(!left.exists() && store.open(&current(1)).is_some());
    }

    #[test]
    fn pruning_clears_away_what_the_killed_left() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::at(dir.path().to_owned());
        let writing = store.begin(&current(1)).unwrap().unwrap();
        let left = [current(2).key() + DRAFT, current(2).key() + ".4194304"].map(|name| dir.path().join(name));
        left.iter().for_each(|left| fs::create_dir(left).unwrap());
        fs::write(dir.path().join(current(2).key() + LOCK), "").unwrap();
        store.prune(MAX_TOTAL).unwrap();
        assert!(left.iter().all(|left| !left.exists()));
        assert!(writing.folder.is_dir(), "a draft that is being written stays");
        assert!(store.begin(&current(1)).unwrap().is_none(), "and so does its lock");
        drop(writing);
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
    }

    #[test]
    fn a_shape_that_only_shares_the_key_is_no_match() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::at(dir.path().to_owned());
        make(&store, &current(1), b"machine");
        fs::rename(dir.path().join(current(1).key()), dir.path().join(current(2).key())).unwrap();
        assert!(store.open(&current(2)).is_none());
        make(&store, &current(2), b"machine");
        assert!(store.open(&current(2)).is_some());
    }

    #[test]
    fn pruning_takes_the_useless_and_the_unused() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::at(dir.path().to_owned());
        make(&store, &shape(9), b"of another boot");
        make(&store, &current(1), &[1; 8192]);
        make(&store, &current(2), &[2; 8192]);
        assert!(store.list().unwrap().iter().all(|template| template.key != shape(9).key()), "a new one lets it go");
        let old = File::open(dir.path().join(current(1).key()).join(STATE)).unwrap();
        old.set_modified(SystemTime::UNIX_EPOCH).unwrap();
        assert_eq!(store.prune(16_384).unwrap(), [current(1).key()]);
        assert!(store.open(&current(2)).is_some());
    }
}
