//! A container that mounts its cgroup writable may manage it: as with runc, its process's user owns what the kernel
//! names for that.

use std::fs;
use std::io;
use std::os::unix::fs::chown;
use std::path::Path;

use libcontainer::oci_spec::runtime::{Mount, Spec};

use crate::user_namespace::UserNamespace;

/// The files of a cgroup that are its manager's, one a line.
const FILES: &str = "/sys/kernel/cgroup/delegate";

/// Gives the cgroup to the container's user where it is to manage it.
pub(super) fn delegate(cgroup: &Path, spec: &Spec, user_namespace: Option<&UserNamespace>) -> io::Result<()> {
    let Some(user) = spec.process().as_ref().map(|process| process.user()) else { return Ok(()) };
    let user = match user_namespace {
        Some(namespace) => namespace.outside(user.uid(), user.gid()).map(|(uid, _)| uid),
        None => Some(user.uid()),
    };
    // All of it is root's already.
    let Some(uid) = user.filter(|&uid| uid != 0 && spec.mounts().iter().flatten().any(is_writable_cgroup)) else {
        return Ok(());
    };
    chown(cgroup, Some(uid), None)?;
    for file in fs::read_to_string(FILES)?.lines() {
        match chown(cgroup.join(file), Some(uid), None) {
            // Of a controller that the kernel does not have.
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            given => given?,
        }
    }
    Ok(())
}

fn is_writable_cgroup(mount: &Mount) -> bool {
    let has_type = mount.typ().as_deref().is_some_and(|kind| kind == "cgroup" || kind == "cgroup2");
    let is_read_only = mount.options().iter().flatten().any(|option| option == "ro" || option == "rro");
    has_type && !is_read_only && mount.destination() == Path::new("/sys/fs/cgroup")
}
