//! Where a shim is reached: a Unix socket with a short path, the same for all containers of a pod.

use std::fs::{self, DirBuilder, Permissions};
use std::io;
use std::os::unix::fs::{DirBuilderExt as _, PermissionsExt as _};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use sha2::{Digest as _, Sha256};

/// The folder of the sockets, where containerd names none.
const FOLDER: &str = "/run/containerd/s";
const SCHEME: &str = "unix://";

/// The address of a shim.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Address(PathBuf);

/// What there is at an address.
pub enum Place {
    /// Nobody: a socket to listen on is made.
    Free(UnixListener),
    /// A shim that answers.
    Taken,
}

impl Address {
    /// That of the shim for a group of containers: a hash, since a socket's path has a hundred bytes at most.
    pub fn of(folder: Option<&str>, containerd: &str, namespace: &str, group: &str) -> Self {
        let hash = Sha256::digest(format!("{containerd}/{namespace}/{group}"));
        let name: String = hash.iter().map(|byte| format!("{byte:02x}")).collect();
        Self(Path::new(folder.unwrap_or(FOLDER)).join(name))
    }

    /// What was written down.
    pub fn parse(text: &str) -> Option<Self> {
        text.trim().strip_prefix(SCHEME).map(|path| Self(path.into()))
    }

    /// Takes the place, unless a shim is there. A socket whose shim was killed is in nobody's way.
    ///
    /// # Errors
    /// Those of the socket and its folder.
    pub fn take(&self) -> io::Result<Place> {
        if let Some(folder) = self.0.parent() {
            DirBuilder::new().recursive(true).mode(0o711).create(folder)?;
        }
        match UnixListener::bind(&self.0) {
            Err(error) if error.kind() == io::ErrorKind::AddrInUse => {}
            bound => return self.guarded(bound?),
        }
        if self.connect().is_ok() {
            return Ok(Place::Taken);
        }
        self.remove()?;
        self.guarded(UnixListener::bind(&self.0)?)
    }

    fn guarded(&self, listener: UnixListener) -> io::Result<Place> {
        fs::set_permissions(&self.0, Permissions::from_mode(0o600))?;
        Ok(Place::Free(listener))
    }

    /// Connects to the shim.
    ///
    /// # Errors
    /// Those of connect(2): `ConnectionRefused` where its shim is gone.
    pub fn connect(&self) -> io::Result<UnixStream> {
        UnixStream::connect(&self.0)
    }

    /// Removes the socket; one that is gone is no error.
    ///
    /// # Errors
    /// Those of unlink(2).
    pub fn remove(&self) -> io::Result<()> {
        match fs::remove_file(&self.0) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => Ok(()),
        }
    }
}

impl std::fmt::Display for Address {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{SCHEME}{}", self.0.display())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_group_has_one_short_address() {
        let of = |namespace, group| Address::of(None, "/run/containerd/containerd.sock", namespace, group);
        let address = of("k8s.io", "pod").to_string();
        let hash = address.strip_prefix("unix:///run/containerd/s/").unwrap();
        assert!(hash.len() == 64 && address.len() < 108);
        assert_eq!(of("k8s.io", "pod"), Address::parse(&address).unwrap());
        assert_ne!(of("k8s.io", "pod"), of("moby", "pod"));
        assert_ne!(of("k8s.io", "pod"), of("k8s.io", "other"));
        assert!(Address::of(Some("/s"), "/c", "n", "g").to_string().starts_with("unix:///s/"));
        assert_eq!(Address::parse("vsock://1:2"), None);
    }

    #[test]
    fn a_place_is_taken_once_and_a_dead_shims_again() {
        let folder = tempfile::tempdir().unwrap();
        let address = Address::of(folder.path().join("s").to_str(), "c", "n", "g");
        let Place::Free(listener) = address.take().unwrap() else { panic!("taken") };
        assert!(matches!(address.take().unwrap(), Place::Taken));
        drop(listener);
        assert!(matches!(address.take().unwrap(), Place::Free(_)));
        address.remove().unwrap();
        address.remove().unwrap();
    }
}
