//! What a specification may ask for and neither the host nor the guest gives.
//!
//! It is refused, with the name of the field, since a container that silently lacks what it was to have is worse than
//! none. What is only a remark to one kernel or the other is logged instead.

use oci_spec::runtime::{LinuxNamespaceType, LinuxSeccompAction, Mount, Spec};

use super::{Bundle, BundleError, namespaces};

/// Refuses what cannot be had.
pub(super) fn check(bundle: &Bundle) -> Result<(), BundleError> {
    let spec = &bundle.spec;
    let asked = of_process(spec).into_iter().chain(of_linux(spec)).chain(of_seccomp(spec)).chain(of_resources(spec));
    if let Some((_, field, problem)) = asked.into_iter().find(|(asked, ..)| *asked) {
        return Err(bundle.field(field, problem));
    }
    spec.mounts().iter().flatten().enumerate().try_for_each(|(index, mount)| check_mount(bundle, index, mount))
}

/// Whether something is asked for, the field, and why it cannot be had.
type Question = (bool, &'static str, &'static str);

fn of_process(spec: &Spec) -> [Question; 2] {
    let process = spec.process().as_ref();
    [
        (
            process.is_some_and(|process| process.exec_cpu_affinity().is_some()),
            "process.execCPUAffinity",
            "names processors of the host, which an exec in a VM does not run on: leave it out",
        ),
        (spec.vm().is_some(), "vm", "describes a VM: runvm's own options do, leave it out"),
    ]
}

fn of_linux(spec: &Spec) -> Vec<Question> {
    let Some(linux) = spec.linux() else { return Vec::new() };
    vec![
        (
            has_offsets(spec) && !namespaces::has(spec, LinuxNamespaceType::Time),
            "linux.timeOffsets",
            "shifts the clocks of a time namespace, and linux.namespaces has none",
        ),
        (
            linux.net_devices().as_ref().is_some_and(|devices| !devices.is_empty()),
            "linux.netDevices",
            "moves devices of the host's network: put them into the container's network namespace instead",
        ),
        (
            linux.intel_rdt().is_some(),
            "linux.intelRdt",
            "asks for a share of the host's processor caches, which runvm does not set: leave it out",
        ),
        (
            linux.memory_policy().is_some(),
            "linux.memoryPolicy",
            "names memory nodes of the host, which a guest does not have: use linux.resources.cpu.mems",
        ),
    ]
}

/// Whether the container's clocks are to be shifted.
pub(super) fn has_offsets(spec: &Spec) -> bool {
    let offsets = spec.linux().as_ref().and_then(|linux| linux.time_offsets().as_ref());
    offsets.is_some_and(|offsets| !offsets.is_empty())
}

fn of_seccomp(spec: &Spec) -> [Question; 1] {
    let seccomp = spec.linux().as_ref().and_then(|linux| linux.seccomp().as_ref());
    let notifies = seccomp.is_some_and(|seccomp| {
        let mut actions = seccomp.syscalls().iter().flatten().map(|rule| rule.action());
        seccomp.listener_path().is_some()
            || seccomp.default_action() == LinuxSeccompAction::ScmpActNotify
            || actions.any(|action| action == LinuxSeccompAction::ScmpActNotify)
    });
    [(
        notifies,
        "linux.seccomp",
        "asks an agent of the host about system calls (SCMP_ACT_NOTIFY), which it cannot be about those of a guest: \
         allow or forbid them",
    )]
}

fn of_resources(spec: &Spec) -> Vec<Question> {
    let Some(resources) = spec.linux().as_ref().and_then(|linux| linux.resources().as_ref()) else { return Vec::new() };
    let cpu = resources.cpu().as_ref();
    let network = resources.network().as_ref();
    vec![
        (
            cpu.is_some_and(|cpu| cpu.realtime_runtime().is_some_and(|time| time != 0)),
            "linux.resources.cpu.realtimeRuntime",
            "limits real-time programs, which the guest's kernel does not: use linux.resources.cpu.quota",
        ),
        (
            cpu.is_some_and(|cpu| cpu.realtime_period().is_some_and(|time| time != 0)),
            "linux.resources.cpu.realtimePeriod",
            "limits real-time programs, which the guest's kernel does not: use linux.resources.cpu.quota",
        ),
        (
            network.is_some_and(|network| network.class_id().is_some_and(|class| class != 0)),
            "linux.resources.network.classID",
            "marks packets for the host's traffic control, which sees those of a VM by their interface only",
        ),
        (
            network.is_some_and(|network| network.priorities().as_ref().is_some_and(|list| !list.is_empty())),
            "linux.resources.network.priorities",
            "sets priorities for the host's interfaces, which a VM does not send by",
        ),
        (
            resources.rdma().as_ref().is_some_and(|limits| !limits.is_empty()),
            "linux.resources.rdma",
            "limits devices that a guest does not have: leave it out",
        ),
    ]
}

fn check_mount(bundle: &Bundle, index: usize, mount: &Mount) -> Result<(), BundleError> {
    let options = mount.options().as_deref().unwrap_or_default();
    if options.iter().any(|option| option == "tmpcopyup") && mount.typ().as_deref() != Some("tmpfs") {
        let problem = "has a tmpfs begin as a copy of what it covers, and this is none: leave it out";
        return Err(bundle.field(format!("mounts[{index}].options (tmpcopyup)"), problem));
    }
    if options.iter().any(|option| option == "iversion") {
        let problem = "asks for versions of inodes, which no file system of a guest counts: leave it out";
        return Err(bundle.field(format!("mounts[{index}].options (iversion)"), problem));
    }
    Ok(())
}

/// Tells the log what has no meaning in a guest, and that engines send without being asked to.
pub fn remark(spec: &Spec) {
    let process = spec.process().as_ref();
    let linux = spec.linux().as_ref();
    let memory = linux.and_then(|linux| linux.resources().as_ref()).and_then(|resources| resources.memory().as_ref());
    let named = |label: Option<&String>| label.is_some_and(|label| !label.is_empty());
    for (asked, field, why) in [
        (
            named(process.and_then(|process| process.apparmor_profile().as_ref())),
            "process.apparmorProfile",
            "names a profile of the host's kernel; the guest's has no AppArmor",
        ),
        (
            named(process.and_then(|process| process.selinux_label().as_ref())),
            "process.selinuxLabel",
            "is a label of the host's policy; the guest's kernel has no SELinux",
        ),
        (
            named(linux.and_then(|linux| linux.mount_label().as_ref())),
            "linux.mountLabel",
            "is a label of the host's policy; the guest's kernel has no SELinux",
        ),
        (
            memory.is_some_and(|memory| memory.kernel().max(memory.kernel_tcp()) > Some(0)),
            "linux.resources.memory.kernel",
            "is a limit that kernels have no more; linux.resources.memory.limit includes it",
        ),
        (
            memory.is_some_and(|memory| memory.disable_oom_killer() == Some(true)),
            "linux.resources.memory.disableOOMKiller",
            "is nothing that the guest's cgroups have; a program over its limit is killed",
        ),
    ] {
        if asked {
            tracing::warn!("{field} is not followed: it {why}");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bundle(rest: &str) -> Bundle {
        let text = format!(r#"{{"ociVersion":"1.2.0",{rest}}}"#);
        Bundle { path: "/b".into(), rootfs: "/b/rootfs".into(), spec: serde_json::from_str(&text).unwrap() }
    }

    #[test]
    fn what_cannot_be_had_is_named() {
        for (rest, field) in [
            (r#""process":{"cwd":"/","user":{"uid":0,"gid":0},"execCPUAffinity":{"initial":"0"}}"#, "execCPUAffinity"),
            (r#""vm":{"kernel":{"path":"/k"}}"#, "vm in"),
            (r#""linux":{"timeOffsets":{"monotonic":{"secs":1}}}"#, "linux.timeOffsets"),
            (r#""linux":{"netDevices":{"eth0":{}}}"#, "linux.netDevices"),
            (r#""linux":{"intelRdt":{"closID":"a"}}"#, "linux.intelRdt"),
            (r#""linux":{"memoryPolicy":{"mode":"MPOL_BIND","nodes":"0"}}"#, "linux.memoryPolicy"),
            (r#""linux":{"seccomp":{"defaultAction":"SCMP_ACT_NOTIFY"}}"#, "SCMP_ACT_NOTIFY"),
            (
                r#""linux":{"seccomp":{"defaultAction":"SCMP_ACT_ALLOW","syscalls":[{"names":["a"],"action":"SCMP_ACT_NOTIFY"}]}}"#,
                "SCMP_ACT_NOTIFY",
            ),
            (r#""linux":{"resources":{"cpu":{"realtimeRuntime":1}}}"#, "cpu.realtimeRuntime"),
            (r#""linux":{"resources":{"network":{"classID":1}}}"#, "network.classID"),
            (r#""linux":{"resources":{"network":{"priorities":[{"name":"lo","priority":1}]}}}"#, "network.priorities"),
            (r#""linux":{"resources":{"rdma":{"m":{"hcaHandles":1}}}}"#, "resources.rdma"),
            (r#""mounts":[{"destination":"/a","options":["ro","iversion"]}]"#, "mounts[0].options (iversion)"),
        ] {
            let message = check(&bundle(rest)).unwrap_err().to_string();
            assert!(message.contains(field), "{message}");
        }
    }

    #[test]
    fn what_engines_send_passes() {
        let rest = r#""process":{"cwd":"/","user":{"uid":0,"gid":0},"apparmorProfile":"docker-default"},
            "mounts":[{"destination":"/a","options":["rbind","rprivate"]}],
            "linux":{"mountLabel":"","uidMappings":[],"seccomp":{"defaultAction":"SCMP_ACT_ERRNO"},
                "resources":{"network":{},"cpu":{"shares":2,"realtimePeriod":0},"memory":{"disableOOMKiller":false}}}"#;
        check(&bundle(rest)).unwrap();
    }
}
