//! Which mounts of a container are passed on to whom: the options of `mounts` that libcontainer takes for nothing.

use std::path::Path;

use libcontainer::oci_spec::runtime::{Mount, Spec};
use rustix::io::Errno;
use rustix::mount::{MountPropagationFlags, mount_change};

use super::process::failed;

/// Sets the propagation of every mount that asks for one; the calling process is in the container's root.
pub(super) fn set(spec: &Spec) -> Result<(), String> {
    for mount in spec.mounts().iter().flatten() {
        for flags in mount.options().iter().flatten().filter_map(|option| flags(option)) {
            change(mount, flags).map_err(failed("set the propagation of a mount"))?;
        }
    }
    Ok(())
}

fn change(mount: &Mount, flags: MountPropagationFlags) -> Result<(), Errno> {
    mount_change(Path::new("/").join(mount.destination()), flags)
}

fn flags(option: &str) -> Option<MountPropagationFlags> {
    let (kind, recursive) = match option {
        "private" | "shared" | "slave" | "unbindable" => (option, MountPropagationFlags::empty()),
        _ => (option.strip_prefix('r')?, MountPropagationFlags::REC),
    };
    let kind = match kind {
        "private" => MountPropagationFlags::PRIVATE,
        "shared" => MountPropagationFlags::SHARED,
        "slave" => MountPropagationFlags::DOWNSTREAM,
        "unbindable" => MountPropagationFlags::UNBINDABLE,
        _ => return None,
    };
    Some(kind | recursive)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_propagation_is_taken() {
        assert_eq!(flags("shared"), Some(MountPropagationFlags::SHARED));
        assert_eq!(flags("rslave"), Some(MountPropagationFlags::DOWNSTREAM | MountPropagationFlags::REC));
        assert!(["ro", "rro", "rbind", "rrprivate", "mode=755"].into_iter().all(|option| flags(option).is_none()));
    }
}
