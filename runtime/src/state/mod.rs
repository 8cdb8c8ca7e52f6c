//! The record of a container on disk: one folder per container below the state root, with `state.json` and the
//! monitor's socket in it.
//!
//! Whether a container runs is never read from the record alone: it runs as long as its monitor's process does. The
//! record is written whole or not at all, and changed only under the folder's lock.

use std::collections::HashMap;
use std::fs::{self, File};
use std::io::{self, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};

use oci_spec::runtime::Hooks;
use rustix::fs::{FlockOperation, flock};
use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::host::process::ProcessIdentity;
use crate::sandbox::Size;

/// The version of the record's format; another one's is not read.
const VERSION: u32 = 2;
/// What the name of an exec's process has in front of it.
const EXEC: &str = "exec-";
const FILE: &str = "state.json";
/// A record's largest size that is read, in bytes.
const MAX_RECORD: u64 = 1 << 20;

/// What can go wrong with the records.
#[derive(Debug, Error)]
pub enum StateError {
    /// No record by this ID.
    #[error("container \"{0}\" does not exist")]
    NotFound(String),
    /// The ID is taken.
    #[error("container with given ID already exists: \"{0}\"")]
    Exists(String),
    /// The ID is not one.
    #[error("invalid container ID \"{0}\": it has 1 to 1024 letters, digits and `_ + - .`, and no slash")]
    InvalidId(String),
    /// The record was written by another version of runvm.
    #[error("{path} has version {found}, this runvm reads version {VERSION}: delete the container with the runvm that made it, or remove its folder", path = path.display())]
    Version {
        /// The record.
        path: PathBuf,
        /// Its version.
        found: u32,
    },
    /// The record cannot be understood.
    #[error("{path} is damaged", path = path.display())]
    Damaged {
        /// The record.
        path: PathBuf,
        /// Where and why.
        source: serde_json::Error,
    },
    /// A file of the record cannot be read or written.
    #[error("cannot {action} {path}", path = path.display())]
    Io {
        /// What was tried.
        action: &'static str,
        /// The file or folder.
        path: PathBuf,
        /// Why it failed.
        source: io::Error,
    },
}

/// What the user was last told of a container; see [`Container::status`] for what it is now.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Phase {
    /// `create` has not come to its end.
    Creating,
    /// Waits for `start`.
    Created,
    /// Its program was started.
    Running,
}

/// What a container is now, by the names that engines know.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Status {
    /// Being created.
    Creating,
    /// Waits for `start`.
    Created,
    /// Runs.
    Running,
    /// Frozen.
    Paused,
    /// Its first process has ended, or its VM is gone.
    Stopped,
}

impl Status {
    /// The engine's word for it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Creating => "creating",
            Self::Created => "created",
            Self::Running => "running",
            Self::Paused => "paused",
            Self::Stopped => "stopped",
        }
    }
}

/// The record itself.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Record {
    version: u32,
    /// The container's ID.
    pub id: String,
    /// The version that its config.json has.
    pub oci_version: String,
    /// Absolute path of its bundle.
    pub bundle: PathBuf,
    /// Absolute path of its root file system.
    pub rootfs: PathBuf,
    /// When `create` began, as RFC 3339 has it.
    pub created: String,
    /// The user who called `create`.
    pub owner: u32,
    /// The annotations of its config.json.
    pub annotations: HashMap<String, String>,
    /// The hooks of its config.json, which may change once the container is made.
    pub hooks: Option<Hooks>,
    /// How far its verbs have come.
    pub phase: Phase,
    /// Whether it rests, wherever it is.
    pub paused: bool,
    /// What its VM was made with.
    pub size: Size,
    /// The process that stands for it; none before that was made.
    pub monitor: Option<ProcessIdentity>,
    /// Further processes that end with the monitor, and whose end `delete` awaits.
    pub helpers: Vec<ProcessIdentity>,
    /// Host cgroups that are its own: absolute folders, to be removed with it.
    pub cgroups: Vec<PathBuf>,
}

impl Record {
    /// A record as it is before anything of the container was made.
    pub fn new(id: &str, bundle: &crate::bundle::Bundle) -> Self {
        Self {
            version: VERSION,
            id: id.to_owned(),
            oci_version: bundle.spec.version().clone(),
            bundle: bundle.path.clone(),
            rootfs: bundle.rootfs.clone(),
            created: crate::log::timestamp(),
            owner: rustix::process::getuid().as_raw(),
            annotations: bundle.spec.annotations().clone().unwrap_or_default(),
            hooks: bundle.spec.hooks().clone(),
            phase: Phase::Creating,
            paused: false,
            size: Size::of(&bundle.spec),
            monitor: None,
            helpers: Vec::new(),
            cgroups: Vec::new(),
        }
    }
}

/// A container's record and its folder.
#[derive(Debug)]
pub struct Container {
    dir: PathBuf,
    /// Holds the folder's lock, where one is held.
    lock: Option<File>,
    /// The record as last read or written.
    pub record: Record,
}

impl Container {
    /// Takes the record's ID and makes its folder, locked until the container is dropped or [`Self::unlock`]ed.
    ///
    /// # Errors
    /// [`StateError::InvalidId`], [`StateError::Exists`], or that of the file system.
    pub fn create(root: &Path, record: Record) -> Result<Self, StateError> {
        let dir = folder(root, &record.id)?;
        let made = fs::DirBuilder::new()
            .recursive(true)
            .mode(0o711)
            .create(root)
            .and_then(|()| fs::DirBuilder::new().mode(0o700).create(&dir));
        match made {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists && dir.exists() => {
                return Err(StateError::Exists(record.id));
            }
            made => made.map_err(io_error("create", &dir))?,
        }
        let lock = Some(lock(&dir, FlockOperation::LockExclusive)?);
        let mut container = Self { dir, lock, record };
        if let Err(error) = container.save() {
            let _ = container.remove();
            return Err(error);
        }
        Ok(container)
    }

    /// Reads the record of `id`, locked: no other verb changes it meanwhile.
    ///
    /// # Errors
    /// [`StateError`]; [`StateError::NotFound`] where there is none.
    pub fn open(root: &Path, id: &str) -> Result<Self, StateError> {
        let dir = folder(root, id)?;
        let lock = match lock(&dir, FlockOperation::LockExclusive) {
            Err(StateError::Io { source, .. }) if source.kind() == io::ErrorKind::NotFound => {
                return Err(StateError::NotFound(id.to_owned()));
            }
            lock => lock?,
        };
        let record = read(&dir, id)?;
        Ok(Self { dir, lock: Some(lock), record })
    }

    /// Reads the record of `id` without its lock, to look only.
    ///
    /// # Errors
    /// [`StateError`]; [`StateError::NotFound`] where there is none.
    pub fn look(root: &Path, id: &str) -> Result<Self, StateError> {
        let dir = folder(root, id)?;
        let record = read(&dir, id)?;
        Ok(Self { dir, lock: None, record })
    }

    /// All containers of a state root; records that cannot be read are left out with a warning.
    ///
    /// # Errors
    /// That of reading the state root; one that does not exist has no containers.
    pub fn list(root: &Path) -> Result<Vec<Self>, StateError> {
        let entries = match fs::read_dir(root) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            entries => entries.map_err(io_error("read", root))?,
        };
        let mut containers = Vec::new();
        for entry in entries {
            let entry = entry.map_err(io_error("read", root))?;
            let name = entry.file_name();
            let Some(id) = name.to_str().filter(|_| entry.path().join(FILE).exists()) else { continue };
            match Self::look(root, id) {
                Ok(container) => containers.push(container),
                Err(error) => tracing::warn!("{error}"),
            }
        }
        containers.sort_by(|a, b| a.record.created.cmp(&b.record.created));
        Ok(containers)
    }

    /// The container's folder.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// The processes on the host that stand for its execs.
    ///
    /// # Errors
    /// That of the file system.
    pub fn execs(&self) -> Result<Vec<ProcessIdentity>, StateError> {
        let mut execs = execs(&self.dir).map_err(io_error("read", &self.dir))?;
        execs.retain(ProcessIdentity::alive);
        Ok(execs)
    }

    /// Gives the lock back before the container is dropped.
    pub fn unlock(&mut self) {
        self.lock = None;
    }

    /// What the container is now.
    pub fn status(&self) -> Status {
        let alive = self.record.monitor.as_ref().is_some_and(ProcessIdentity::alive);
        match self.record.phase {
            Phase::Creating if alive || self.record.monitor.is_none() => Status::Creating,
            _ if !alive => Status::Stopped,
            Phase::Creating => Status::Creating,
            _ if self.record.paused => Status::Paused,
            Phase::Created => Status::Created,
            Phase::Running => Status::Running,
        }
    }

    /// Writes the record: after a crash the file holds this record or the one before it.
    ///
    /// # Errors
    /// That of the file system, a full disk among them.
    pub fn save(&mut self) -> Result<(), StateError> {
        let path = self.dir.join(FILE);
        let text =
            serde_json::to_vec(&self.record).map_err(|source| StateError::Damaged { path: path.clone(), source })?;
        let temporary = self.dir.join(".state.json.new");
        File::create(&temporary)
            .and_then(|mut file| file.write_all(&text))
            .and_then(|()| fs::rename(&temporary, &path))
            .map_err(io_error("write", &path))
    }

    /// Removes the record and its folder.
    ///
    /// # Errors
    /// That of the file system.
    pub fn remove(&mut self) -> Result<(), StateError> {
        remove(&self.dir)
    }
}

/// Removes the folder of a container without a record, which a `create` that was killed has left, if there is one.
///
/// # Errors
/// That of the file system.
pub fn discard(root: &Path, id: &str) -> Result<(), StateError> {
    remove(&folder(root, id)?)
}

fn remove(dir: &Path) -> Result<(), StateError> {
    match fs::remove_dir_all(dir) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(io_error("remove", dir)(error)),
        _ => Ok(()),
    }
}

/// The processes that stand, or stood, for the execs of the container with this folder. Each leaves its name there; the
/// next one takes away what those left that are gone.
///
/// # Errors
/// Those of reading the folder.
pub fn execs(folder: &Path) -> io::Result<Vec<ProcessIdentity>> {
    let entries = fs::read_dir(folder)?;
    let identity = |name: &str| ProcessIdentity::from_name(name.strip_prefix(EXEC)?);
    Ok(entries.filter_map(|entry| identity(entry.ok()?.file_name().to_str()?)).collect())
}

/// Notes that a process stands for an exec of the container with this folder.
///
/// # Errors
/// That of the file system.
pub fn note_exec(folder: &Path, exec: ProcessIdentity) -> Result<(), StateError> {
    let path = |exec: &ProcessIdentity| folder.join(format!("{EXEC}{exec}"));
    for gone in execs(folder).map_err(io_error("read", folder))?.iter().filter(|exec| !exec.alive()) {
        // Another may be doing the same.
        let _ = fs::remove_file(path(gone));
    }
    let path = path(&exec);
    fs::write(&path, "").map_err(io_error("write", &path))
}

fn io_error(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> StateError {
    let path = path.to_owned();
    move |source| StateError::Io { action, path, source }
}

/// The folder of a container; the ID is the engine's or a user's word, and becomes a path here.
fn folder(root: &Path, id: &str) -> Result<PathBuf, StateError> {
    let allowed = |c: char| c.is_ascii_alphanumeric() || "_+-.".contains(c);
    if id.is_empty() || id.len() > 1024 || id == "." || id == ".." || !id.chars().all(allowed) {
        return Err(StateError::InvalidId(id.to_owned()));
    }
    Ok(root.join(id))
}

fn lock(dir: &Path, operation: FlockOperation) -> Result<File, StateError> {
    let folder = File::open(dir).map_err(io_error("open", dir))?;
    flock(&folder, operation).map_err(|errno| io_error("lock", dir)(errno.into()))?;
    // While this process waited for the lock, its holder may have removed the container, and another one
    // may have made it anew.
    let held = folder.metadata().map_err(io_error("lock", dir))?;
    let now = fs::metadata(dir).map_err(io_error("lock", dir))?;
    if (held.dev(), held.ino()) != (now.dev(), now.ino()) {
        return Err(io_error("lock", dir)(io::ErrorKind::NotFound.into()));
    }
    Ok(folder)
}

fn read(dir: &Path, id: &str) -> Result<Record, StateError> {
    use io::Read as _;
    let path = dir.join(FILE);
    let file = match File::open(&path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Err(StateError::NotFound(id.to_owned())),
        file => file.map_err(io_error("read", &path))?,
    };
    let mut text = Vec::new();
    file.take(MAX_RECORD).read_to_end(&mut text).map_err(io_error("read", &path))?;
    let damaged = |source| StateError::Damaged { path: path.clone(), source };
    let version: OnlyVersion = serde_json::from_slice(&text).map_err(damaged)?;
    if version.version != VERSION {
        return Err(StateError::Version { path, found: version.version });
    }
    serde_json::from_slice(&text).map_err(damaged)
}

#[derive(Deserialize)]
struct OnlyVersion {
    version: u32,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(id: &str) -> Record {
        let spec = serde_json::from_str(r#"{"ociVersion":"1.0.2"}"#).unwrap();
        Record::new(id, &crate::bundle::Bundle { path: "/b".into(), rootfs: "/b/rootfs".into(), spec })
    }

    #[test]
    fn a_record_is_made_read_and_removed() {
        let root = tempfile::tempdir().unwrap();
        let mut made = Container::create(root.path(), record("a")).unwrap();
        assert!(matches!(Container::create(root.path(), record("a")), Err(StateError::Exists(_))));
        made.record.phase = Phase::Created;
        made.record.monitor = ProcessIdentity::of(std::process::id());
        made.save().unwrap();
        made.unlock();

        let read = Container::open(root.path(), "a").unwrap();
        assert_eq!(read.status(), Status::Created);
        assert_eq!(Container::list(root.path()).unwrap().len(), 1);
        drop(read);
        made.remove().unwrap();
        assert!(matches!(Container::open(root.path(), "a"), Err(StateError::NotFound(_))));
    }

    #[test]
    fn a_folder_without_a_record_is_in_nobodys_way() {
        let root = tempfile::tempdir().unwrap();
        fs::create_dir(root.path().join("a")).unwrap();
        assert!(matches!(Container::open(root.path(), "a"), Err(StateError::NotFound(_))));
        discard(root.path(), "a").unwrap();
        Container::create(root.path(), record("a")).unwrap();
        discard(root.path(), "b").unwrap();
    }

    #[test]
    fn a_container_whose_monitor_is_gone_is_stopped() {
        let root = tempfile::tempdir().unwrap();
        let mut container = Container::create(root.path(), record("a")).unwrap();
        assert_eq!(container.status(), Status::Creating);
        let mut child = std::process::Command::new("true").spawn().unwrap();
        container.record.monitor = ProcessIdentity::of(child.id());
        child.wait().unwrap();
        for phase in [Phase::Creating, Phase::Created, Phase::Running] {
            container.record.phase = phase;
            assert_eq!(container.status(), Status::Stopped);
        }
    }

    #[test]
    fn ids_that_are_paths_are_refused() {
        let root = tempfile::tempdir().unwrap();
        for id in ["", ".", "..", "a/b", "a b", &"x".repeat(1025)] {
            assert!(matches!(Container::create(root.path(), record(id)), Err(StateError::InvalidId(_))), "{id}");
        }
    }

    #[test]
    fn another_versions_record_is_named_not_read() {
        let root = tempfile::tempdir().unwrap();
        let container = Container::create(root.path(), record("a")).unwrap();
        fs::write(container.dir().join(FILE), r#"{"version":99,"new":"format"}"#).unwrap();
        let message = Container::look(root.path(), "a").unwrap_err().to_string();
        assert!(message.contains("version 99") && message.contains("state.json"), "{message}");
        fs::write(container.dir().join(FILE), "{").unwrap();
        assert!(matches!(Container::look(root.path(), "a"), Err(StateError::Damaged { .. })));
    }
}
