//! The places that mounts need in a root that the guest may not change.
//!
//! runc makes missing mount points in the root file system before it makes that read-only. A guest gets it read-only
//! from the start, so they are made here. The root is a stranger's: no link in it leads out of it.

use std::fs::Permissions;
use std::io;
use std::os::unix::fs::PermissionsExt as _;

use oci_spec::runtime::Mount;
use pathrs::{InodeType, Root};
use rustix::fs::{AtFlags, Gid, Uid, chownat};

use super::{Bundle, BundleError, split};

/// Makes the mount points that a read-only root lacks.
///
/// # Errors
/// [`BundleError::Field`], naming the mount.
pub fn make(bundle: &Bundle) -> Result<(), BundleError> {
    if !split::read_only_root(bundle) {
        return Ok(());
    }
    let mounts = bundle.spec.mounts().as_deref().unwrap_or_default();
    for (index, mount) in mounts.iter().enumerate().filter(|(_, mount)| !is_within_another(mount, mounts)) {
        make_one(bundle, mount).map_err(|error| {
            let destination = mount.destination().display();
            bundle.field(
                format!("mounts[{index}].destination"),
                format!("is {destination}, which cannot be made in the root file system: {error}"),
            )
        })?;
    }
    Ok(())
}

fn is_within_another(mount: &Mount, mounts: &[Mount]) -> bool {
    let destination = mount.destination();
    mounts.iter().any(|other| other.destination() != destination && destination.starts_with(other.destination()))
}

fn make_one(bundle: &Bundle, mount: &Mount) -> io::Result<()> {
    let root = Root::open(&bundle.rootfs).map_err(io::Error::other)?;
    // The container's root would have made them.
    let owner = bundle.user_namespace().and_then(|mappings| mappings.root());
    let source = mount.source().as_ref().map(|source| bundle.path.join(source));
    let is_file = split::bind(mount).is_some() && source.is_some_and(|source| source.is_file());
    let ways = mount.destination().ancestors().filter(|way| !way.as_os_str().is_empty());
    let mut ways: Vec<_> = ways.collect();
    ways.reverse();
    for way in ways {
        if root.resolve(way).is_ok() {
            continue;
        }
        let made = if is_file && way == mount.destination() {
            root.create(way, &InodeType::File(Permissions::from_mode(0o644))).and_then(|()| root.resolve(way))
        } else {
            root.mkdir_all(way, &Permissions::from_mode(0o755))
        };
        let made = made.map_err(io::Error::other)?;
        if let Some((uid, gid)) = owner {
            chownat(&made, "", Some(Uid::from_raw(uid)), Some(Gid::from_raw(gid)), AtFlags::EMPTY_PATH)?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::MetadataExt as _;
    use std::path::Path;

    fn bundle(dir: &Path, read_only: bool, mounts: &str) -> Bundle {
        let text =
            format!(r#"{{"ociVersion":"1.0.2","root":{{"path":"r","readonly":{read_only}}},"mounts":[{mounts}]}}"#);
        Bundle { path: dir.into(), rootfs: dir.into(), spec: serde_json::from_str(&text).unwrap() }
    }

    #[test]
    fn a_read_only_root_gets_what_it_lacks() {
        let dir = tempfile::tempdir().unwrap();
        let mounts = r#"{"destination":"/run/x","type":"tmpfs"},{"destination":"/run/x/y","type":"tmpfs"},
            {"destination":"/etc/hosts","type":"bind","source":"/etc/passwd"}"#;
        make(&bundle(dir.path(), false, mounts)).unwrap();
        assert!(!dir.path().join("run").exists());
        make(&bundle(dir.path(), true, mounts)).unwrap();
        assert!(dir.path().join("run/x").is_dir());
        assert!(!dir.path().join("run/x/y").exists());
        assert!(dir.path().join("etc/hosts").is_file());
    }

    #[test]
    fn what_is_made_is_of_the_containers_root() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir(dir.path().join("run")).unwrap();
        let mut bundle = bundle(dir.path(), true, r#"{"destination":"/run/x/y","type":"tmpfs"}"#);
        let ids = r#"[{"containerID":0,"hostID":1000,"size":1}]"#;
        let linux = format!(r#"{{"namespaces":[{{"type":"user"}}],"uidMappings":{ids},"gidMappings":{ids}}}"#);
        bundle.spec.set_linux(Some(serde_json::from_str(&linux).unwrap()));
        make(&bundle).unwrap();
        let owner = |path: &str| std::fs::metadata(dir.path().join(path)).unwrap().uid();
        assert_eq!((owner("run"), owner("run/x"), owner("run/x/y")), (rustix::process::getuid().as_raw(), 1000, 1000));
    }

    #[test]
    fn no_link_leads_out_of_the_root() {
        let dir = tempfile::tempdir().unwrap();
        let outside = tempfile::tempdir().unwrap();
        std::os::unix::fs::symlink(outside.path(), dir.path().join("out")).unwrap();
        let made = make(&bundle(dir.path(), true, r#"{"destination":"/out/x","type":"tmpfs"}"#));
        assert!(!outside.path().join("x").exists(), "{made:?}");
    }
}
