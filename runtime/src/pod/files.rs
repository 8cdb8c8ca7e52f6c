//! What the containers of a pod see of the host: each one's root, and the volumes, of which those that several have are
//! in the share once. The guest then has one cache for them, and what one container writes the others see at once.

use std::fs;
use std::io;
use std::os::linux::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use tokio::sync::Mutex;

use crate::agent::Agent;
use crate::bundle::{GuestSpec, guest_path};
use crate::error::sentence;
use crate::share::{Export, Served, SetupError};

/// The share of a pod.
pub(super) struct Files {
    served: Served,
    /// Held while the share changes.
    table: Mutex<Table>,
}

/// What the share holds.
#[derive(Debug, Default)]
pub(super) struct Table {
    /// How many containers there have been.
    containers: u64,
    entries: Vec<Entry>,
}

#[derive(Debug)]
struct Entry {
    export: Export,
    /// Device and inode of its source: a path may come to mean something else.
    identity: Option<(u64, u64)>,
    users: usize,
}

impl Table {
    /// A name for the next container's place in the share.
    pub(super) fn next_place(&mut self) -> String {
        self.containers += 1;
        self.containers.to_string()
    }

    /// Takes note of a container's files, and has it use what others have brought. The places of all of them, and what
    /// has to be brought.
    pub(super) fn enter(&mut self, guest: &mut GuestSpec) -> (Vec<PathBuf>, Vec<Export>) {
        let root = guest.spec.root().as_ref().map(|root| root.path().clone());
        let (mut places, mut new) = (Vec::new(), Vec::new());
        for export in std::mem::take(&mut guest.exports) {
            let identity = identity(&export.source).ok();
            let is_root = Some(guest_path(&export.path)) == root;
            let there = self.entries.iter_mut().find(|entry| !is_root && entry.holds(&export, identity));
            match there {
                Some(entry) => {
                    entry.users += 1;
                    guest.relocate(&export.path, &entry.export.path);
                    places.push(entry.export.path.clone());
                }
                None => {
                    places.push(export.path.clone());
                    self.entries.push(Entry { export: export.clone(), identity, users: 1 });
                    new.push(export);
                }
            }
        }
        (places, new)
    }

    /// Takes note that a container does without these. Those that nobody has any more.
    fn leave(&mut self, places: &[PathBuf]) -> Vec<PathBuf> {
        for entry in &mut self.entries {
            if places.contains(&entry.export.path) {
                entry.users = entry.users.saturating_sub(1);
            }
        }
        let (kept, unused) = std::mem::take(&mut self.entries).into_iter().partition(|entry| entry.users > 0);
        self.entries = kept;
        unused.into_iter().map(|entry: Entry| entry.export.path).collect()
    }
}

impl Entry {
    fn holds(&self, export: &Export, identity: Option<(u64, u64)>) -> bool {
        let same = Export { path: export.path.clone(), ..self.export.clone() } == *export;
        same && identity.is_some() && self.identity == identity
    }
}

fn identity(path: &Path) -> io::Result<(u64, u64)> {
    let metadata = fs::metadata(path)?;
    Ok((metadata.st_dev(), metadata.st_ino()))
}

impl Files {
    /// The share that began with these.
    pub(super) fn new(served: Served, table: Table) -> Self {
        Self { served, table: Mutex::new(table) }
    }

    /// A name for the next container's place in the share.
    pub(super) async fn next_place(&self) -> String {
        self.table.lock().await.next_place()
    }

    /// Puts a container's files into the share; their places.
    pub(super) async fn take_in(&self, guest: &mut GuestSpec) -> Result<Vec<PathBuf>, SetupError> {
        let mut table = self.table.lock().await;
        let (places, new) = table.enter(guest);
        if let Err(error) = self.served.add(new).await {
            table.leave(&places);
            return Err(error);
        }
        Ok(places)
    }

    /// Takes a container's files out of the share, but for those that others have. What a guest does not let go of stays
    /// in use until its VM ends.
    pub(super) async fn take_out(&self, agent: &Agent, places: &[PathBuf]) {
        let mut table = self.table.lock().await;
        let unused = table.leave(places);
        let in_guest = unused.iter().map(|place| guest_path(place).to_string_lossy().into_owned()).collect();
        if let Err(error) = agent.release_files(in_guest).await {
            tracing::debug!("the guest keeps files of a container that is deleted: {}", sentence(&error));
        }
        if let Err(error) = self.served.remove(unused).await {
            tracing::debug!("files of a container that is deleted stay in the share: {error}");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A container with a root of its own, and these volumes.
    fn guest(place: &str, volumes: &[(&Path, bool)]) -> GuestSpec {
        let export = |name: String, source: &Path, read_only: bool| Export {
            path: Path::new(place).join(name),
            source: source.to_owned(),
            read_only,
            recursive: true,
            id_map: None,
        };
        let mut exports = vec![export("rootfs".to_owned(), Path::new("/"), false)];
        let mut mounts = Vec::new();
        for (index, (source, read_only)) in volumes.iter().enumerate() {
            let volume = export(index.to_string(), source, *read_only);
            mounts.push(serde_json::json!({"destination": "/v", "source": guest_path(&volume.path)}));
            exports.push(volume);
        }
        let root = guest_path(&exports[0].path);
        let spec = serde_json::json!({"ociVersion": "1.0.2", "root": {"path": root}, "mounts": mounts});
        GuestSpec {
            spec: serde_json::from_value(spec).unwrap(),
            exports,
            shared_namespaces: Vec::new(),
            shared_memory: None,
        }
    }

    fn source_of(guest: &GuestSpec) -> PathBuf {
        guest.spec.mounts().as_ref().unwrap()[0].source().clone().unwrap()
    }

    #[test]
    fn a_volume_that_two_have_is_there_once() {
        let volume = tempfile::tempdir().unwrap();
        let mut table = Table::default();
        let (mut first, mut second) = (guest("1", &[(volume.path(), false)]), guest("2", &[(volume.path(), false)]));
        let (of_first, new) = table.enter(&mut first);
        assert_eq!((of_first.len(), new.len()), (2, 2));
        let (of_second, new) = table.enter(&mut second);
        assert_eq!(new.iter().map(|export| export.path.as_path()).collect::<Vec<_>>(), [Path::new("2/rootfs")]);
        assert_eq!(source_of(&second), source_of(&first));
        assert_eq!(table.leave(&of_first), [Path::new("1/rootfs")]);
        assert_eq!(table.leave(&of_second), [Path::new("1/0"), Path::new("2/rootfs")]);
        assert!(table.entries.is_empty());
    }

    #[test]
    fn what_differs_is_there_twice() {
        let volume = tempfile::tempdir().unwrap();
        let mut table = Table::default();
        table.enter(&mut guest("1", &[(volume.path(), false)]));
        let (_, new) = table.enter(&mut guest("2", &[(volume.path(), true)]));
        assert_eq!(new.len(), 2);
        // Another directory has come to the path.
        let path = volume.path().to_owned();
        let aside = path.with_extension("aside");
        fs::rename(&path, &aside).unwrap();
        fs::create_dir(&path).unwrap();
        let (_, new) = table.enter(&mut guest("3", &[(&path, false)]));
        fs::remove_dir(&aside).unwrap();
        assert_eq!(new.len(), 2);
    }
}
