//! A pod's container, in a VM of its own.
//!
//! The containers of a pod share namespaces, which are those of a container that only waits, or were made by the engine.
//! Two VMs cannot share them. One that is the only container of its pod needs nobody to share them with: then its
//! guest's own serve as well, with the pod's name, and the pod's network is its to have.
//!
//! Podman and CRI-O say so by the same annotations.

use std::collections::HashMap;

use oci_spec::runtime::{LinuxNamespaceType, Spec};

use crate::host::hostname;

const CONTAINER_TYPE: &str = "io.kubernetes.cri-o.ContainerType";
const SANDBOX_ID: &str = "io.kubernetes.cri-o.SandboxID";

/// The ID of the pod that a container with these annotations is in, beside the one that holds the pod's namespaces.
pub fn pod_of(annotations: &HashMap<String, String>) -> Option<&str> {
    let is_member = annotations.get(CONTAINER_TYPE).is_some_and(|kind| kind == "container");
    annotations.get(SANDBOX_ID).filter(|id| is_member && !id.is_empty()).map(String::as_str)
}

/// Whether the container is in a pod.
pub(super) fn is_one(spec: &Spec) -> bool {
    spec.annotations().as_ref().is_some_and(|annotations| pod_of(annotations).is_some())
}

/// Gives a pod's container namespaces of its own for those that it would share, except for the network's.
///
/// # Errors
/// That of reading the pod's host name, with the namespace's path in it.
pub(super) fn settle(spec: &mut Spec) -> Result<(), String> {
    let Some(linux) = spec.linux_mut().as_mut() else { return Ok(()) };
    let mut name = None;
    for namespace in linux.namespaces_mut().iter_mut().flatten() {
        let Some(path) = namespace.path().as_ref().filter(|path| !path.as_os_str().is_empty()) else { continue };
        match namespace.typ() {
            LinuxNamespaceType::Ipc => {}
            LinuxNamespaceType::Uts => {
                let of_pod = hostname::in_namespace(path)
                    .map_err(|error| format!("names {}, which has no host name: {error}", path.display()))?;
                name = Some(of_pod);
            }
            _ => continue,
        }
        namespace.set_path(None);
    }
    if spec.hostname().is_none() {
        spec.set_hostname(name);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec(annotations: &str) -> Spec {
        let text = format!(
            r#"{{"ociVersion":"1.0.2","annotations":{{{annotations}}},"linux":{{"namespaces":[{{"type":"mount"}},
                {{"type":"ipc","path":"/proc/self/ns/ipc"}},{{"type":"uts","path":"/proc/self/ns/uts"}},
                {{"type":"pid","path":"/proc/self/ns/pid"}}]}}}}"#
        );
        serde_json::from_str(&text).unwrap()
    }

    #[test]
    fn only_members_are_in_a_pod() {
        let pod = r#""io.kubernetes.cri-o.SandboxID":"p""#;
        for (kind, expected) in [("container", true), ("sandbox", false)] {
            let annotations = format!(r#"{pod},"io.kubernetes.cri-o.ContainerType":"{kind}""#);
            assert_eq!(is_one(&spec(&annotations)), expected, "{kind}");
        }
        assert!(!is_one(&spec(pod)));
    }

    #[test]
    fn what_would_be_shared_becomes_its_own() {
        let mut spec = spec("");
        settle(&mut spec).unwrap();
        let own = rustix::system::uname().nodename().to_str().unwrap().to_owned();
        assert_eq!(spec.hostname().as_deref(), Some(own.as_str()));
        let named = spec.linux().as_ref().unwrap().namespaces().iter().flatten().filter(|one| one.path().is_some());
        // Whose processes it would see is nothing that it could have by itself.
        assert_eq!(named.map(|one| one.typ()).collect::<Vec<_>>(), [LinuxNamespaceType::Pid]);
    }
}
