//! What the guest makes of a container's specification.
//!
//! The host has taken out what is its own. What is left goes to libcontainer, which ignores some of what it cannot
//! do; here that is either refused, or left out with a line in the log where nothing is lost.

use std::collections::HashMap;
use std::os::unix::fs::FileTypeExt as _;
use std::path::Path;
use std::{fs, os::unix::fs::MetadataExt as _};

use libcontainer::oci_spec::runtime::{
    Arch, Hooks, Linux, LinuxCapabilities, LinuxDevice, LinuxDeviceType, LinuxIdMapping, LinuxMemory, LinuxNamespace,
    LinuxNamespaceBuilder, LinuxNamespaceType, LinuxResources, LinuxSeccomp, LinuxSeccompAction, Mount, Process, Spec,
};
use runvm_protocol::agent::IdMapping;

/// A parameter that a kernel of 64 bits has if it runs programs of 32.
const KERNEL_RUNS_32_BIT: &str = "/proc/sys/abi/vsyscall32";

/// A specification that cannot be followed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum SpecError {
    #[error("cannot read {what}: {source}")]
    Parse { what: &'static str, source: serde_json::Error },
    #[error("{0} is missing")]
    Missing(&'static str),
    #[error("{0} is not supported in a guest: leave it out")]
    Unsupported(&'static str),
    #[error("{field} cannot be {value:?}: {reason}")]
    Invalid { field: &'static str, value: String, reason: &'static str },
    #[error("linux.uidMappings and linux.gidMappings are not those of the guest's user namespace")]
    UserNamespace,
}

/// A specification that libcontainer can follow, and what it leaves to the agent.
pub(crate) struct GuestSpec {
    pub(crate) spec: Spec,
    /// Parameters of the kernel's network, which in a guest is the container's.
    pub(crate) net_sysctls: HashMap<String, String>,
}

impl GuestSpec {
    /// Reads `config.json`. `cgroup` is where the container goes, whatever it says.
    pub(crate) fn parse(json: &[u8], cgroup: &Path) -> Result<Self, SpecError> {
        let mut spec: Spec =
            serde_json::from_slice(json).map_err(|source| SpecError::Parse { what: "config.json", source })?;
        let mut process = spec.process().clone().ok_or(SpecError::Missing("process"))?;
        adapt_process(&mut process)?;
        spec.set_process(Some(process));
        let root = spec.root().as_ref().ok_or(SpecError::Missing("root"))?;
        if !root.path().is_absolute() {
            let value = root.path().display().to_string();
            return Err(SpecError::Invalid { field: "root.path", value, reason: "it must be absolute in the guest" });
        }
        if let Some(hooks) = spec.hooks() {
            refuse_hooks(hooks)?;
        }
        let id_mapped = |mount: &Mount| mount.uid_mappings().is_some() || mount.gid_mappings().is_some();
        if spec.mounts().iter().flatten().any(id_mapped) {
            return Err(SpecError::Unsupported("mounts: uidMappings or gidMappings"));
        }
        spec.mounts_mut().iter_mut().flatten().for_each(adapt_mount);
        let mut linux = spec.linux().clone().ok_or(SpecError::Missing("linux"))?;
        let net_sysctls = adapt_linux(&mut linux)?;
        linux.set_cgroups_path(Some(cgroup.into()));
        spec.set_linux(Some(linux));
        Ok(Self { spec, net_sysctls })
    }
}

/// The IDs of a user namespace, as the host has told them too.
pub(crate) fn mappings(of: &Option<Vec<LinuxIdMapping>>) -> Vec<IdMapping> {
    let mapping = |mapping: &LinuxIdMapping| IdMapping {
        container_id: mapping.container_id(),
        host_id: mapping.host_id(),
        size: mapping.size(),
        ..Default::default()
    };
    of.iter().flatten().map(mapping).collect()
}

/// Reads the process of an exec.
pub(crate) fn parse_process(json: &[u8]) -> Result<Process, SpecError> {
    let mut process: Process =
        serde_json::from_slice(json).map_err(|source| SpecError::Parse { what: "process", source })?;
    adapt_process(&mut process)?;
    match process.exec_cpu_affinity() {
        Some(_) => Err(SpecError::Unsupported("process.execCPUAffinity")),
        None => Ok(process),
    }
}

/// Reads the limits of an update.
pub(crate) fn parse_resources(json: &[u8]) -> Result<LinuxResources, SpecError> {
    let mut resources: LinuxResources =
        serde_json::from_slice(json).map_err(|source| SpecError::Parse { what: "linux.resources", source })?;
    if resources.devices().as_ref().is_some_and(|devices| !devices.is_empty()) {
        return Err(SpecError::Unsupported("a change of linux.resources.devices"));
    }
    adapt_resources(&mut resources)?;
    Ok(resources)
}

fn adapt_process(process: &mut Process) -> Result<(), SpecError> {
    if process.args().iter().flatten().next().is_none() {
        return Err(SpecError::Missing("process.args"));
    }
    if !process.cwd().is_absolute() {
        let value = process.cwd().display().to_string();
        return Err(SpecError::Invalid { field: "process.cwd", value, reason: "it must be an absolute path" });
    }
    if let Some(variable) = process.env().iter().flatten().find(|variable| !variable.contains('=')) {
        let value = variable.clone();
        return Err(SpecError::Invalid { field: "process.env", value, reason: "a variable is NAME=VALUE" });
    }
    if process.no_new_privileges() == Some(false) {
        // libcontainer takes any value for a wish to load the filter without privileges.
        process.set_no_new_privileges(None);
    }
    if process.apparmor_profile().is_some() || process.selinux_label().is_some() {
        tracing::warn!("the guest's kernel has neither AppArmor nor SELinux: the container runs without its label");
        process.set_apparmor_profile(None).set_selinux_label(None);
    }
    process.set_capabilities(Some(complete(process.capabilities().clone())));
    Ok(())
}

/// A set that is not named is empty, not unchanged.
fn complete(capabilities: Option<LinuxCapabilities>) -> LinuxCapabilities {
    let given = |set: Option<&LinuxCapabilities>, of: fn(&LinuxCapabilities) -> Option<_>| {
        Some(set.and_then(of).unwrap_or_default())
    };
    let named = capabilities.as_ref();
    let mut complete = LinuxCapabilities::default();
    complete
        .set_bounding(given(named, |set| set.bounding().clone()))
        .set_effective(given(named, |set| set.effective().clone()))
        .set_permitted(given(named, |set| set.permitted().clone()))
        .set_inheritable(given(named, |set| set.inheritable().clone()))
        .set_ambient(given(named, |set| set.ambient().clone()));
    complete
}

/// Only one kind of hook runs inside the container; the others are programs of the host.
fn refuse_hooks(hooks: &Hooks) -> Result<(), SpecError> {
    let prestart = hooks.prestart();
    for (given, field) in [
        (prestart, "hooks.prestart"),
        (hooks.create_runtime(), "hooks.createRuntime"),
        (hooks.create_container(), "hooks.createContainer"),
        (hooks.poststart(), "hooks.poststart"),
        (hooks.poststop(), "hooks.poststop"),
    ] {
        if given.as_ref().is_some_and(|hooks| !hooks.is_empty()) {
            return Err(SpecError::Unsupported(field));
        }
    }
    Ok(())
}

fn adapt_linux(linux: &mut Linux) -> Result<HashMap<String, String>, SpecError> {
    for (present, field) in [
        (linux.net_devices().as_ref().is_some_and(|devices| !devices.is_empty()), "linux.netDevices"),
        (linux.intel_rdt().is_some(), "linux.intelRdt"),
        (linux.memory_policy().is_some(), "linux.memoryPolicy"),
        (linux.mount_label().as_ref().is_some_and(|label| !label.is_empty()), "linux.mountLabel"),
    ] {
        if present {
            return Err(SpecError::Unsupported(field));
        }
    }
    let namespaces = linux.namespaces().clone().unwrap_or_default();
    linux.set_namespaces(Some(adapt_namespaces(namespaces)?));
    if let Some(seccomp) = linux.seccomp().clone() {
        linux.set_seccomp(Some(adapt_seccomp(seccomp, Path::new(KERNEL_RUNS_32_BIT).exists())?));
    }
    if let Some(mut resources) = linux.resources().clone() {
        adapt_resources(&mut resources)?;
        linux.set_resources(Some(resources));
    }
    if let Some(devices) = linux.devices().clone().filter(|_| allows_every_device(linux)) {
        linux.set_devices(Some(devices_of_the_guest(devices, &guest_devices())));
    }
    let sysctls = linux.sysctl().clone().unwrap_or_default();
    let (net, others): (HashMap<_, _>, HashMap<_, _>) =
        sysctls.into_iter().partition(|(name, _)| name.starts_with("net.") || name.starts_with("net/"));
    linux.set_sysctl(Some(others));
    Ok(net)
}

/// Leaves out the architectures that the kernel has no system calls of, since the filter's size is time at each start.
/// The guest's kernels never have x32, and not all have x86 of 32 bits. What is left out is forbidden altogether.
fn adapt_seccomp(mut seccomp: LinuxSeccomp, runs_32_bit: bool) -> Result<LinuxSeccomp, SpecError> {
    let notifies = |action| action == LinuxSeccompAction::ScmpActNotify;
    if seccomp.syscalls().iter().flatten().any(|rule| notifies(rule.action())) {
        return Err(SpecError::Unsupported("linux.seccomp: SCMP_ACT_NOTIFY"));
    }
    if let Some(mut architectures) = seccomp.architectures().clone().filter(|list| list.contains(&Arch::ScmpArchX86_64))
    {
        let absent = |arch| arch == Arch::ScmpArchX32 || arch == Arch::ScmpArchX86 && !runs_32_bit;
        architectures.retain(|&arch| !absent(arch));
        seccomp.set_architectures(Some(architectures));
    }
    Ok(seccomp)
}

fn adapt_namespaces(mut namespaces: Vec<LinuxNamespace>) -> Result<Vec<LinuxNamespace>, SpecError> {
    namespaces.retain(|namespace| namespace.typ() != LinuxNamespaceType::Network);
    if namespaces.iter().any(|namespace| namespace.path().is_some()) {
        return Err(SpecError::Unsupported("linux.namespaces: path"));
    }
    let has = |wanted| namespaces.iter().any(|namespace| namespace.typ() == wanted);
    if !has(LinuxNamespaceType::Mount) {
        return Err(SpecError::Missing("linux.namespaces: mount"));
    }
    if !has(LinuxNamespaceType::Cgroup) {
        let cgroup = LinuxNamespaceBuilder::default().typ(LinuxNamespaceType::Cgroup).build();
        namespaces.push(cgroup.map_err(|_| SpecError::Missing("linux.namespaces: cgroup"))?);
    }
    Ok(namespaces)
}

/// Leaves out what only the first version of cgroups knows, as runc does on the second, and swap: a guest has none.
fn adapt_resources(resources: &mut LinuxResources) -> Result<(), SpecError> {
    if resources.rdma().as_ref().is_some_and(|limits| !limits.is_empty()) {
        return Err(SpecError::Unsupported("linux.resources.rdma"));
    }
    resources.set_network(None);
    if let Some(memory) = resources.memory() {
        let unlimited = memory.limit().is_some_and(|limit| limit < 0);
        let mut kept = LinuxMemory::default();
        kept.set_limit(memory.limit().filter(|_| !unlimited)).set_reservation(memory.reservation());
        resources.set_memory(Some(kept));
        if unlimited {
            // libcgroups would lift the limit of swap too, which this kernel does not have.
            let mut unified = resources.unified().clone().unwrap_or_default();
            unified.entry("memory.max".to_owned()).or_insert_with(|| "max".to_owned());
            resources.set_unified(Some(unified));
        }
    }
    Ok(())
}

/// Says what libcontainer does not know in its words, and leaves out what is so anyway.
fn adapt_mount(mount: &mut Mount) {
    let options = mount.options().iter().flatten().filter_map(|option| match option.as_str() {
        // Of no effect on a container: whether the kernel logs, and what no file system of the guest does.
        "silent" | "loud" | "noiversion" => None,
        // Of one mount and of all below it alike: what is bound comes as one file system.
        "nosymfollow" => Some("rnosymfollow".to_owned()),
        "symfollow" => Some("rsymfollow".to_owned()),
        _ => Some(option.clone()),
    });
    let options = options.collect();
    if mount.options().is_some() {
        mount.set_options(Some(options));
    }
}

/// Whether a container is privileged, as engines have it.
fn allows_every_device(linux: &Linux) -> bool {
    let rules = linux.resources().as_ref().and_then(|resources| resources.devices().as_ref());
    rules.into_iter().flatten().any(|rule| {
        let any_number = |number: Option<i64>| number.is_none_or(|number| number < 0);
        let any_type = matches!(rule.typ(), None | Some(LinuxDeviceType::A));
        rule.allow() && any_type && any_number(rule.major()) && any_number(rule.minor())
    })
}

/// A device's type and number.
type DeviceNumber = (LinuxDeviceType, u32, u32);

/// Keeps the devices that exist here: a privileged container's list is all that the host has. Others are made as they are
/// asked for, and who opens one that the guest does not have is told so.
fn devices_of_the_guest(devices: Vec<LinuxDevice>, existing: &[DeviceNumber]) -> Vec<LinuxDevice> {
    let number = |device: &LinuxDevice| {
        let kind = if device.typ() == LinuxDeviceType::U { LinuxDeviceType::C } else { device.typ() };
        Some((kind, u32::try_from(device.major()).ok()?, u32::try_from(device.minor()).ok()?))
    };
    let (kept, dropped): (Vec<_>, Vec<_>) = devices.into_iter().partition(|device| {
        device.typ() == LinuxDeviceType::P || number(device).is_some_and(|number| existing.contains(&number))
    });
    if !dropped.is_empty() {
        let names: Vec<_> = dropped.iter().map(|device| device.path().display().to_string()).collect();
        tracing::info!("the guest has no such devices: {}", names.join(", "));
    }
    kept
}

/// The devices of the guest that a container may have: not the agent's own channel.
fn guest_devices() -> Vec<DeviceNumber> {
    let mut devices = Vec::new();
    let mut folders = vec![std::path::PathBuf::from("/dev")];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
            let Ok(data) = entry.metadata() else { continue };
            let kind = match data.file_type() {
                kind if kind.is_dir() && entry.file_name() != "pts" => {
                    folders.push(entry.path());
                    continue;
                }
                kind if kind.is_block_device() => LinuxDeviceType::B,
                kind if kind.is_char_device() => LinuxDeviceType::C,
                _ => continue,
            };
            if !entry.file_name().to_string_lossy().starts_with("vport") {
                devices.push((kind, libc::major(data.rdev()), libc::minor(data.rdev())));
            }
        }
    }
    devices
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn config() -> serde_json::Value {
        json!({
            "ociVersion": "1.0.2",
            "root": {"path": "/run/runvm/share/a/rootfs"},
            "process": {"user": {"uid": 0, "gid": 0}, "cwd": "/", "args": ["sh"], "noNewPrivileges": false},
            "linux": {
                "cgroupsPath": "/host/path",
                "namespaces": [{"type": "mount"}, {"type": "pid"}, {"type": "network"}],
                "sysctl": {"net.ipv4.ip_forward": "1", "kernel.msgmax": "9"},
                "resources": {"memory": {"limit": 1000, "swap": 2000, "kernel": 5, "swappiness": 0}},
            }
        })
    }

    fn parse(config: &serde_json::Value) -> Result<GuestSpec, SpecError> {
        GuestSpec::parse(config.to_string().as_bytes(), Path::new("/runvm/a"))
    }

    #[test]
    fn the_specification_becomes_the_guests() {
        let GuestSpec { spec, net_sysctls } = parse(&config()).unwrap();
        let linux = spec.linux().as_ref().unwrap();
        assert_eq!(linux.cgroups_path().as_deref(), Some(Path::new("/runvm/a")));
        let types: Vec<_> = linux.namespaces().iter().flatten().map(LinuxNamespace::typ).collect();
        assert_eq!(types, [LinuxNamespaceType::Mount, LinuxNamespaceType::Pid, LinuxNamespaceType::Cgroup]);
        assert_eq!(net_sysctls["net.ipv4.ip_forward"], "1");
        assert_eq!(linux.sysctl().as_ref().unwrap().keys().collect::<Vec<_>>(), ["kernel.msgmax"]);
        let memory = linux.resources().as_ref().unwrap().memory().unwrap();
        assert_eq!(
            (memory.limit(), memory.swap(), memory.kernel(), memory.swappiness()),
            (Some(1000), None, None, None)
        );
        let process = spec.process().as_ref().unwrap();
        assert_eq!(process.no_new_privileges(), None);
        let capabilities = process.capabilities().as_ref().unwrap();
        assert_eq!(capabilities.effective().as_ref().map(|set| set.len()), Some(0));
    }

    #[test]
    fn what_cannot_be_done_is_named() {
        let refused = |pointer: &str, value: serde_json::Value| {
            let mut config = config();
            let (parent, key) = pointer.rsplit_once('/').unwrap();
            config.pointer_mut(parent).unwrap()[key] = value;
            parse(&config).err().map(|error| error.to_string()).unwrap_or_default()
        };
        assert!(refused("/linux/intelRdt", json!({})).contains("linux.intelRdt"));
        assert!(refused("/linux/resources/rdma", json!({"a": {"hcaHandles": 1}})).contains("linux.resources.rdma"));
        assert!(refused("/linux/namespaces", json!([{"type": "pid"}])).contains("mount"));
        assert!(refused("/linux/namespaces", json!([{"type": "mount", "path": "/x"}])).contains("path"));
        assert!(refused("/hooks", json!({"poststop": [{"path": "/bin/x"}]})).contains("hooks.poststop"));
        let mapped = json!([{"destination": "/a", "source": "/b", "uidMappings": []}]);
        assert!(refused("/mounts", mapped).contains("uidMappings"));
        assert!(refused("/root/path", json!("rootfs")).contains("root.path"));
        assert!(refused("/process/cwd", json!("x")).contains("process.cwd"));
        assert!(refused("/process/args", json!([])).contains("process.args"));
        assert!(refused("/process/env", json!(["A"])).contains("process.env"));
        assert!(refused("/process/args", json!(7)).contains("config.json"));
    }

    #[test]
    fn a_filter_covers_what_the_kernel_runs() {
        let filter = |action: &str| -> LinuxSeccomp {
            let architectures = ["SCMP_ARCH_X86_64", "SCMP_ARCH_X86", "SCMP_ARCH_X32"];
            let rule = json!({"names": ["read"], "action": action});
            let filter = json!({"defaultAction": "SCMP_ACT_ERRNO", "architectures": architectures, "syscalls": [rule]});
            serde_json::from_value(filter).unwrap()
        };
        let covered =
            |runs_32_bit| adapt_seccomp(filter("SCMP_ACT_ALLOW"), runs_32_bit).unwrap().architectures().clone();
        assert_eq!(covered(true), Some(vec![Arch::ScmpArchX86_64, Arch::ScmpArchX86]));
        assert_eq!(covered(false), Some(vec![Arch::ScmpArchX86_64]));
        assert!(adapt_seccomp(filter("SCMP_ACT_NOTIFY"), true).is_err());
    }

    #[test]
    fn devices_of_the_host_are_left_out() {
        let devices: Vec<LinuxDevice> = serde_json::from_value(json!([
            {"path": "/dev/null", "type": "c", "major": 1, "minor": 3},
            {"path": "/dev/sda", "type": "b", "major": 8, "minor": 0},
            {"path": "/dev/pipe", "type": "p", "major": 0, "minor": 0},
        ]))
        .unwrap();
        let kept = devices_of_the_guest(devices, &[(LinuxDeviceType::C, 1, 3), (LinuxDeviceType::C, 8, 0)]);
        let paths: Vec<_> = kept.iter().map(|device| device.path().to_str().unwrap()).collect();
        assert_eq!(paths, ["/dev/null", "/dev/pipe"]);
    }
}
