//! Takes a specification apart: host paths become exports of the share, host matters stay here, and the rest is
//! what the guest's agent is told.

use std::path::{Path, PathBuf};

use oci_spec::runtime::{Hooks, LinuxNamespaceType, Mount, Spec};
use runvm_protocol::{SHARE_MOUNT_POINT, SHARED_MEMORY};

use super::{Bundle, BundleError, id_mappings, namespaces, unsupported};
use crate::share::{Export, FRESH};

/// See statfs(2).
const TMPFS_MAGIC: rustix::fs::FsWord = 0x0102_1994;

/// The guest's part of a bundle.
#[derive(Clone, Debug, Default)]
pub struct GuestSpec {
    /// The specification for the agent: each path in it is the guest's.
    pub spec: Spec,
    /// What the share must hold for it.
    pub exports: Vec<Export>,
    /// The namespaces that it shares with other containers of the guest. The specification's have no path.
    pub shared_namespaces: Vec<LinuxNamespaceType>,
    /// The size of the memory that it shares with them by names, in bytes, where it has a mount of it.
    pub shared_memory: Option<u64>,
}

impl GuestSpec {
    /// Has the container find at another place of the share what it would at `place`.
    pub fn relocate(&mut self, place: &Path, other: &Path) {
        let (place, other) = (guest_path(place), guest_path(other));
        for mount in self.spec.mounts_mut().iter_mut().flatten() {
            if mount.source().as_ref() == Some(&place) {
                mount.set_source(Some(other.clone()));
            }
        }
    }
}

/// Takes a container's specification apart. Its files are at `place` in the share, which is a name.
///
/// # Errors
/// [`BundleError::Field`] for a mount whose source does not exist.
pub fn split(bundle: &Bundle, place: &str) -> Result<GuestSpec, BundleError> {
    let mut spec = bundle.spec.clone();
    let mut exports = vec![Export {
        path: Path::new("rootfs").join(place),
        source: bundle.rootfs.clone(),
        read_only: read_only_root(bundle),
        recursive: true,
        id_map: None,
    }];
    if let Some(root) = spec.root_mut() {
        root.set_path(guest_path(&exports[0].path));
    }
    let mut shared_memory = None;
    for (index, mount) in spec.mounts_mut().iter_mut().flatten().enumerate() {
        let Some(recursive) = bind(mount) else { continue };
        let source = source(bundle, index, mount)?;
        let id_map = id_mappings::of_mount(&bundle.spec, mount);
        mount.set_uid_mappings(None).set_gid_mappings(None);
        if let Some(size) = memory_behind(mount, &source).filter(|_| id_map.is_none()) {
            // Memory of the host's would be slower, and nobody there looks at it.
            shared_memory = Some(size);
            mount.set_source(Some(SHARED_MEMORY.into()));
            continue;
        }
        if of_the_kernel(&source) {
            if id_map.is_some() {
                let problem =
                    "asks for IDs to be mapped, which the files of a guest's kernel cannot have: leave it out";
                return Err(bundle.field(format!("mounts[{index}] ({})", mount.destination().display()), problem));
            }
            // The guest has a kernel of its own, so these mean the guest's.
            mount.set_source(Some(source));
            continue;
        }
        let read_only = has_option(mount, &["ro", "rro"]);
        // What the guest cannot change only the host does; and of a single file there is little to ask.
        let kind = if read_only || !source.is_dir() { FRESH } else { "mounts" };
        let path = Path::new(kind).join(place).join(index.to_string());
        let export = Export { path, source, read_only, recursive, id_map };
        mount.set_source(Some(guest_path(&export.path)));
        exports.push(export);
    }
    take_out_host_matters(&mut spec);
    Ok(GuestSpec { spec, exports, shared_namespaces: namespaces::shared(&bundle.spec), shared_memory })
}

/// Whether the guest may not change the root file system.
pub(super) fn read_only_root(bundle: &Bundle) -> bool {
    bundle.spec.root().as_ref().and_then(oci_spec::runtime::Root::readonly).unwrap_or(false)
}

/// Where the guest finds what is there in the share.
pub fn guest_path(in_share: &Path) -> PathBuf {
    Path::new(SHARE_MOUNT_POINT).join(in_share)
}

fn has_option(mount: &Mount, options: &[&str]) -> bool {
    mount.options().iter().flatten().any(|option| options.contains(&option.as_str()))
}

/// Whether this is a bind mount, and if so, whether with what is mounted below.
pub(super) fn bind(mount: &Mount) -> Option<bool> {
    let recursive = has_option(mount, &["rbind"]);
    let bind = recursive || has_option(mount, &["bind"]) || mount.typ().as_deref() == Some("bind");
    bind.then_some(recursive)
}

/// The size of the tmpfs that a container is to have as its `/dev/shm`: engines make one for those that share it.
fn memory_behind(mount: &Mount, source: &Path) -> Option<u64> {
    if mount.destination() != Path::new("/dev/shm") {
        return None;
    }
    let file_system = rustix::fs::statfs(source).ok().filter(|file_system| file_system.f_type == TMPFS_MAGIC)?;
    let (blocks, size) = (file_system.f_blocks, u64::try_from(file_system.f_bsize).ok()?);
    blocks.checked_mul(size).filter(|&bytes| bytes > 0)
}

fn source(bundle: &Bundle, index: usize, mount: &Mount) -> Result<PathBuf, BundleError> {
    let field = || format!("mounts[{index}].source ({})", mount.destination().display());
    let Some(source) = mount.source() else {
        return Err(bundle.field(field(), "is missing: a bind mount needs one"));
    };
    let source = bundle.path.join(source);
    if of_the_kernel(&source) {
        return Ok(source);
    }
    source
        .canonicalize()
        .map_err(|error| bundle.field(field(), format!("is {}: {}", source.display(), describe(&error))))
}

fn describe(error: &std::io::Error) -> String {
    match error.kind() {
        std::io::ErrorKind::NotFound => "no such file or directory".into(),
        _ => error.to_string(),
    }
}

/// Paths whose content is a kernel's, not a disk's.
fn of_the_kernel(path: &Path) -> bool {
    ["/proc", "/sys", "/dev"].iter().any(|top| path.starts_with(top))
}

fn take_out_host_matters(spec: &mut Spec) {
    let shifts_clocks = unsupported::has_offsets(spec);
    let start_container = spec.hooks().as_ref().and_then(|hooks| hooks.start_container().clone());
    spec.set_hooks(start_container.map(|start_container| {
        let mut hooks = Hooks::default();
        hooks.set_start_container(Some(start_container));
        hooks
    }));
    if let Some(process) = spec.process_mut() {
        // Labels of the host's security modules: the guest's kernel has neither policy.
        process.set_apparmor_profile(None);
        process.set_selinux_label(None);
    }
    if let Some(linux) = spec.linux_mut() {
        linux.set_cgroups_path(None);
        linux.set_mount_label(None);
        if let Some(resources) = linux.resources_mut() {
            // Files are read and written by the host, in its cgroup.
            resources.set_block_io(None);
            if let Some(cpu) = resources.cpu_mut() {
                // The numbers are of the host's processors and nodes, and its cgroup holds the VM to them. The guest has as
                // many processors as there are in the list, or fewer.
                cpu.set_cpus(None).set_mems(None);
            }
        }
        if let Some(namespaces) = linux.namespaces_mut() {
            // The whole guest is the container's network namespace. A time namespace without offsets is of no use in a
            // kernel that booted with the container.
            namespaces.retain(|namespace| match namespace.typ() {
                LinuxNamespaceType::Network => false,
                LinuxNamespaceType::Time => shifts_clocks,
                _ => true,
            });
            namespaces.iter_mut().for_each(|namespace| {
                // The guest is told by whom the namespace is shared.
                namespace.set_path(None);
            });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn split_spec(text: &str) -> Result<GuestSpec, BundleError> {
        let bundle = Bundle { path: "/".into(), rootfs: "/b/rootfs".into(), spec: serde_json::from_str(text).unwrap() };
        split(&bundle, "web")
    }

    #[test]
    fn host_paths_become_exports() {
        let guest = split_spec(
            r#"{"ociVersion":"1.0.2","root":{"path":"rootfs"},"mounts":[
                {"destination":"/proc","type":"proc","source":"proc"},
                {"destination":"/data","type":"bind","source":"/usr","options":["rbind","ro"]},
                {"destination":"/sys/fs/cgroup","type":"bind","source":"/sys/fs/cgroup"}]}"#,
        )
        .unwrap();
        let exports: Vec<_> = guest
            .exports
            .iter()
            .map(|export| (export.path.to_str().unwrap(), export.read_only, export.recursive))
            .collect();
        assert_eq!(exports, [("rootfs/web", false, true), ("fresh/web/1", true, true)]);
        let mounts = guest.spec.mounts().as_ref().unwrap();
        assert_eq!(mounts[1].source().as_deref(), Some(Path::new("/run/runvm/share/fresh/web/1")));
        assert_eq!(mounts[2].source().as_deref(), Some(Path::new("/sys/fs/cgroup")));
        assert_eq!(guest.spec.root().as_ref().unwrap().path(), Path::new("/run/runvm/share/rootfs/web"));
    }

    #[test]
    fn a_source_that_is_not_there_is_named() {
        let error =
            split_spec(r#"{"ociVersion":"1.0.2","mounts":[{"destination":"/d","type":"bind","source":"/no/such"}]}"#)
                .unwrap_err()
                .to_string();
        assert!(error.contains("mounts[0].source (/d)") && error.contains("/no/such"), "{error}");
    }

    #[test]
    fn mappings_stay_on_the_host() {
        let ids = r#"[{"containerID":0,"hostID":1000,"size":10}]"#;
        let mount = |source: &str| {
            format!(
                r#"{{"ociVersion":"1.2.0","mounts":[{{"destination":"/d","source":"{source}","options":["rbind"],
                    "uidMappings":{ids},"gidMappings":{ids}}}]}}"#
            )
        };
        let guest = split_spec(&mount("/usr")).unwrap();
        assert_eq!(guest.exports[1].id_map.as_ref().unwrap().mappings.root(), Some((1000, 1000)));
        assert_eq!(guest.spec.mounts().as_ref().unwrap()[0].uid_mappings(), &None);
        let error = split_spec(&mount("/sys/block")).unwrap_err().to_string();
        assert!(error.contains("mounts[0] (/d)") && error.contains("guest's kernel"), "{error}");
    }

    #[test]
    fn the_guest_sees_no_host_matters() {
        let guest = split_spec(
            r#"{"ociVersion":"1.0.2",
                "hooks":{"prestart":[{"path":"/bin/a"}],"startContainer":[{"path":"/bin/b"}]},
                "linux":{"cgroupsPath":"/docker/x","namespaces":[{"type":"network"},{"type":"time"},{"type":"pid"}],
                    "resources":{"cpu":{"cpus":"12-13","mems":"1","shares":5},"blockIO":{"weight":10}}}}"#,
        )
        .unwrap();
        let hooks = guest.spec.hooks().as_ref().unwrap();
        assert!(hooks.start_container().is_some());
        assert_eq!(hooks.poststop(), &None);
        let linux = guest.spec.linux().as_ref().unwrap();
        assert_eq!(linux.cgroups_path(), &None);
        assert_eq!(linux.namespaces().as_ref().unwrap().len(), 1);
        let resources = linux.resources().as_ref().unwrap();
        let cpu = resources.cpu().as_ref().unwrap();
        assert_eq!((cpu.cpus(), cpu.mems(), cpu.shares()), (&None, &None, Some(5)));
        assert_eq!(resources.block_io(), &None);
    }

    #[test]
    fn memory_to_share_is_the_guests() {
        let bind = |destination: &str, source: &Path| {
            format!(r#"{{"destination":"{destination}","type":"bind","source":"{}"}}"#, source.display())
        };
        // A tmpfs there is on any host, and a directory that is none.
        let memory = tempfile::tempdir_in("/dev/shm").unwrap();
        let mounts = [bind("/dev/shm", Path::new("/usr")), bind("/other", Path::new("/usr"))].join(",");
        let guest = split_spec(&format!(r#"{{"ociVersion":"1.0.2","mounts":[{mounts}]}}"#)).unwrap();
        assert_eq!((guest.shared_memory, guest.exports.len()), (None, 3));
        let mount = serde_json::from_str::<Mount>(&bind("/dev/shm", memory.path())).unwrap();
        assert!(memory_behind(&mount, memory.path()).is_some_and(|bytes| bytes >= 1 << 20));
        assert_eq!(memory_behind(&mount, Path::new("/usr")), None);
    }
}
