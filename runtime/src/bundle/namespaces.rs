//! Which namespaces a container may ask for, now that it has a kernel of its own.
//!
//! New namespaces are made in the guest. A namespace that exists on the host cannot be shared with a guest, except
//! for the network namespace, whose interfaces are handed on.

use std::path::{Path, PathBuf};

use oci_spec::runtime::{LinuxNamespace, LinuxNamespaceType, Spec};

use super::{Bundle, BundleError, Membership, lone_member};
use crate::network::namespace;

/// Where a container's network namespace comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum NetworkNamespace {
    /// runvm makes one.
    New,
    /// The engine made one: the path of its file.
    Existing(PathBuf),
    /// None is asked for: the host's.
    Host,
}

/// Whether it asks for a namespace of this kind, a new one or another's.
pub(super) fn has(spec: &Spec, kind: LinuxNamespaceType) -> bool {
    namespaces(spec).iter().any(|namespace| namespace.typ() == kind)
}

fn namespaces(spec: &Spec) -> &[LinuxNamespace] {
    spec.linux().as_ref().and_then(|linux| linux.namespaces().as_deref()).unwrap_or_default()
}

pub(super) fn network(spec: &Spec) -> NetworkNamespace {
    match namespaces(spec).iter().find(|namespace| namespace.typ() == LinuxNamespaceType::Network) {
        None => NetworkNamespace::Host,
        Some(namespace) => match namespace.path() {
            Some(path) if !path.as_os_str().is_empty() => NetworkNamespace::Existing(path.clone()),
            _ => NetworkNamespace::New,
        },
    }
}

/// The kinds of namespaces that the containers of a pod can have in common, beside the network's, which is the guest's.
const COMMON: [LinuxNamespaceType; 3] = [LinuxNamespaceType::Ipc, LinuxNamespaceType::Pid, LinuxNamespaceType::Uts];

/// The namespaces that a container of a pod shares with the others: those that it names by a path.
pub(super) fn shared(spec: &Spec) -> Vec<LinuxNamespaceType> {
    let shared = namespaces(spec).iter().filter(|namespace| is_named(namespace)).map(LinuxNamespace::typ);
    shared.filter(|kind| COMMON.contains(kind)).collect()
}

fn is_named(namespace: &LinuxNamespace) -> bool {
    namespace.path().as_ref().is_some_and(|path| !path.as_os_str().is_empty())
}

/// Refuses what cannot be shared with a guest.
pub(super) fn check(bundle: &Bundle, membership: Membership) -> Result<(), BundleError> {
    match membership {
        Membership::Alone => check_network(bundle)?,
        Membership::Sandbox => {
            check_network(bundle)?;
            check_of_pod(bundle)?;
        }
        // Its network is that of the pod.
        Membership::Member => check_of_pod(bundle)?,
    }
    check_new(bundle)?;
    let in_common = |kind| membership == Membership::Member && COMMON.contains(&kind);
    let mut named = namespaces(&bundle.spec).iter().filter(|namespace| is_named(namespace));
    match named.find(|namespace| namespace.typ() != LinuxNamespaceType::Network && !in_common(namespace.typ())) {
        None => Ok(()),
        Some(namespace) => Err(bundle.field(
            "linux.namespaces",
            format!(
                "asks to share the {} namespace of another container, which a container in a VM of its own cannot",
                namespace.typ()
            ),
        )),
    }
}

fn check_network(bundle: &Bundle) -> Result<(), BundleError> {
    match network(&bundle.spec) {
        NetworkNamespace::Host => Err(host_network(bundle, "has no network namespace")),
        // Whether the file exists is asked where it is used.
        NetworkNamespace::Existing(path) if namespace::is_current(&path).unwrap_or(false) => {
            Err(host_network(bundle, "asks for the host's network namespace"))
        }
        NetworkNamespace::Existing(path) if is_of_a_process(&path) && !lone_member::is_one(&bundle.spec) => Err(bundle
            .field(
                "linux.namespaces",
                format!(
                    "asks for the network namespace {} of another container (`--network container:`): two containers \
                 in VMs of their own cannot share one, give each a network",
                    path.display()
                ),
            )),
        _ => Ok(()),
    }
}

/// What a pod asks for beyond the namespaces that its VM has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PodWishes {
    /// To be among the host's processes.
    pub host_pid: bool,
    /// The host's System V objects and message queues.
    pub host_ipc: bool,
    /// Other users than the host's.
    pub own_users: bool,
}

impl PodWishes {
    /// Refuses those that a VM cannot grant.
    ///
    /// # Errors
    /// Why, as the rest of a sentence about the pod.
    pub fn check(self) -> Result<(), String> {
        for (wished, kind, word) in [(self.host_pid, "pid", "hostPID"), (self.host_ipc, "ipc", "hostIPC")] {
            if wished {
                return Err(format!("has no {kind} namespace (`{word}`): a pod in a VM cannot use the host's"));
            }
        }
        match self.own_users {
            true => Err(
                "asks for a user namespace (`hostUsers: false`), which the containers of a pod in a VM have none of: \
                         leave it out"
                    .to_owned(),
            ),
            false => Ok(()),
        }
    }
}

fn check_of_pod(bundle: &Bundle) -> Result<(), BundleError> {
    let wishes = PodWishes {
        host_pid: !has(&bundle.spec, LinuxNamespaceType::Pid),
        host_ipc: !has(&bundle.spec, LinuxNamespaceType::Ipc),
        own_users: has(&bundle.spec, LinuxNamespaceType::User),
    };
    wishes.check().map_err(|problem| bundle.field("linux.namespaces", problem))
}

/// Refuses the lack of a namespace that a guest needs.
fn check_new(bundle: &Bundle) -> Result<(), BundleError> {
    match has(&bundle.spec, LinuxNamespaceType::Mount) {
        true => Ok(()),
        false => Err(bundle
            .field("linux.namespaces", "has no mount namespace: a container in a VM cannot use the host's mounts")),
    }
}

fn host_network(bundle: &Bundle, finding: &str) -> BundleError {
    let reason =
        "a container in a VM cannot use the host's network (`--network host`), choose a bridge network or `none`";
    bundle.field("linux.namespaces", format!("{finding}: {reason}"))
}

/// `/proc/PID/ns/net`: how Docker names the namespace of a container, while named ones are files elsewhere.
fn is_of_a_process(path: &Path) -> bool {
    let parts: Vec<_> = path.iter().filter_map(|part| part.to_str()).collect();
    matches!(parts[..], ["/", "proc", pid, "ns", "net"] if pid.parse::<u32>().is_ok())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bundle(namespaces: &str) -> Bundle {
        let text = format!(r#"{{"ociVersion":"1.0.2","linux":{{"namespaces":[{namespaces}]}}}}"#);
        Bundle { path: "/b".into(), rootfs: "/b/rootfs".into(), spec: serde_json::from_str(&text).unwrap() }
    }

    #[test]
    fn the_network_namespace_is_found() {
        let new = bundle(r#"{"type":"network"},{"type":"mount"}"#);
        let named = bundle(r#"{"type":"network","path":"/run/netns/a"},{"type":"mount"}"#);
        assert_eq!(new.network_namespace(), NetworkNamespace::New);
        assert_eq!(named.network_namespace(), NetworkNamespace::Existing("/run/netns/a".into()));
        assert!([new, named].iter().all(|bundle| check(bundle, Membership::Alone).is_ok()));
    }

    #[test]
    fn what_cannot_be_shared_is_refused() {
        for (namespaces, reason) in [
            (r#"{"type":"mount"}"#, "--network host"),
            (r#"{"type":"network","path":"/proc/self/ns/net"}"#, "--network host"),
            (r#"{"type":"network","path":"/proc/999999999/ns/net"}"#, "--network container:"),
            (r#"{"type":"network"},{"type":"mount"},{"type":"pid","path":"/proc/42/ns/pid"}"#, "pid namespace"),
            (r#"{"type":"network"},{"type":"mount"},{"type":"user","path":"/proc/42/ns/user"}"#, "user namespace"),
            (r#"{"type":"network"}"#, "mount namespace"),
        ] {
            let message = check(&bundle(namespaces), Membership::Alone).unwrap_err().to_string();
            assert!(message.contains(reason), "{message}");
        }
    }

    #[test]
    fn containers_of_a_pod_share_what_they_name() {
        const OWN: &str = r#"{"type":"mount"},{"type":"network","path":"/proc/42/ns/net"},{"type":"pid"}"#;
        let member = bundle(&format!(r#"{OWN},{{"type":"ipc","path":"/proc/42/ns/ipc"}}"#));
        check(&member, Membership::Member).unwrap();
        assert_eq!(shared(&member.spec), [LinuxNamespaceType::Ipc]);
        let mounts = bundle(r#"{"type":"pid"},{"type":"ipc"},{"type":"mount","path":"/proc/42/ns/mnt"}"#);
        let message = check(&mounts, Membership::Member).unwrap_err().to_string();
        assert!(message.contains("mnt namespace"), "{message}");
    }

    #[test]
    fn a_pod_is_not_among_the_hosts_processes() {
        const NETWORK: &str = r#"{"type":"mount"},{"type":"network"}"#;
        for (namespaces, word) in [(r#"{"type":"ipc"}"#, "hostPID"), (r#"{"type":"pid"}"#, "hostIPC")] {
            let bundle = bundle(&format!("{NETWORK},{namespaces}"));
            check(&bundle, Membership::Alone).unwrap();
            for membership in [Membership::Sandbox, Membership::Member] {
                assert!(check(&bundle, membership).unwrap_err().to_string().contains(word));
            }
        }
    }
}
