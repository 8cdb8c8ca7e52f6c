//! The devices of a container with a user namespace: its root may not make nodes, so they are made outside, and mounted
//! where the container shall have them.

use std::fs::{self, Permissions};
use std::io;
use std::os::unix::fs::{PermissionsExt as _, chown};
use std::path::{Path, PathBuf};

use libcontainer::oci_spec::runtime::{LinuxDevice, LinuxDeviceType, Mount, MountBuilder, Spec};
use rustix::fs::{CWD, FileType, Mode, mknodat};
use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};

use crate::user_namespace::UserNamespace;

const FOLDER: &str = "/run/runvm/devices";

/// A file system of nodes; it goes with this.
pub(super) struct Nodes(PathBuf);

impl Nodes {
    /// Makes what `linux.devices` asks for, and has `mounts` ask for it instead.
    pub(super) fn make(id: &str, spec: &mut Spec, namespace: &UserNamespace) -> io::Result<Option<Self>> {
        let asked = spec.linux_mut().as_mut().and_then(|linux| linux.devices_mut().take()).unwrap_or_default();
        if asked.is_empty() {
            return Ok(None);
        }
        let folder = Path::new(FOLDER).join(id);
        fs::create_dir_all(&folder)?;
        mount("tmpfs", &folder, "tmpfs", MountFlags::NOSUID | MountFlags::NOEXEC, c"mode=0755")?;
        let nodes = Self(folder);
        let mut mounts = spec.mounts().clone().unwrap_or_default();
        for (index, device) in asked.iter().enumerate() {
            let node = nodes.0.join(index.to_string());
            make(&node, device, namespace)?;
            mounts.push(at(device.path(), node)?);
        }
        spec.set_mounts(Some(mounts));
        Ok(Some(nodes))
    }
}

impl Drop for Nodes {
    fn drop(&mut self) {
        // The container's mounts are its own. Neither fails but for a folder that is gone.
        let _ = unmount(&self.0, UnmountFlags::DETACH);
        let _ = fs::remove_dir(&self.0);
    }
}

/// Makes a node as libcontainer does; its owner is one of the container's users.
fn make(path: &Path, device: &LinuxDevice, namespace: &UserNamespace) -> io::Result<()> {
    let kind = match device.typ() {
        LinuxDeviceType::B => FileType::BlockDevice,
        LinuxDeviceType::P => FileType::Fifo,
        LinuxDeviceType::C | LinuxDeviceType::U | LinuxDeviceType::A => FileType::CharacterDevice,
    };
    let number = |number: i64| u32::try_from(number).map_err(io::Error::other);
    let number = rustix::fs::makedev(number(device.major())?, number(device.minor())?);
    mknodat(CWD, path, kind, Mode::RUSR, number)?;
    fs::set_permissions(path, Permissions::from_mode(device.file_mode().unwrap_or(0o666)))?;
    let owner = (device.uid().unwrap_or_default(), device.gid().unwrap_or_default());
    let unmapped = || io::Error::other(format!("{} is of no user of the user namespace", device.path().display()));
    let (uid, gid) = namespace.outside(owner.0, owner.1).ok_or_else(unmapped)?;
    chown(path, Some(uid), Some(gid))
}

fn at(destination: &Path, node: PathBuf) -> io::Result<Mount> {
    let mount = MountBuilder::default().destination(destination).typ("bind").source(node);
    mount.options(vec!["bind".to_owned()]).build().map_err(io::Error::other)
}
