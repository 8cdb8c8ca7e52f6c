//! Which users and groups stand for which: those of a container's user namespace, and those of id-mapped mounts.

use oci_spec::runtime::{LinuxIdMapping, LinuxNamespaceType, Mount, Spec};

use super::{Bundle, BundleError, namespaces, split};
use crate::host::user_namespace::IdMappings;
use crate::share::IdMap;

/// The mappings of the container's user namespace, if it has one.
pub(super) fn of_container(spec: &Spec) -> Option<IdMappings> {
    let linux = spec.linux().as_ref().filter(|_| namespaces::has(spec, LinuxNamespaceType::User))?;
    Some(both(linux.uid_mappings(), linux.gid_mappings()))
}

/// How the IDs of a mount are mapped, if they are.
pub(super) fn of_mount(spec: &Spec, mount: &Mount) -> Option<IdMap> {
    let recursive = has_option(mount, "ridmap");
    let own = both(mount.uid_mappings(), mount.gid_mappings());
    let mappings = match own == IdMappings::default() {
        false => own,
        true if recursive || has_option(mount, "idmap") => of_container(spec)?,
        true => return None,
    };
    Some(IdMap { mappings, recursive })
}

/// Refuses mappings that nothing can follow.
pub(super) fn check(bundle: &Bundle) -> Result<(), BundleError> {
    let spec = &bundle.spec;
    match of_container(spec) {
        Some(mappings) if mappings.root().is_none() => {
            let problem = "do not say which user and which group of the host root of the user namespace is: map \
                           containerID 0 in both";
            return Err(bundle.field("linux.uidMappings and linux.gidMappings", problem));
        }
        Some(_) => {}
        None => {
            let linux = spec.linux().as_ref();
            let given = linux.map(|linux| both(linux.uid_mappings(), linux.gid_mappings())).unwrap_or_default();
            let problem = "maps IDs of a user namespace, and linux.namespaces has none";
            if !given.uids.is_empty() {
                return Err(bundle.field("linux.uidMappings", problem));
            }
            if !given.gids.is_empty() {
                return Err(bundle.field("linux.gidMappings", problem));
            }
        }
    }
    spec.mounts().iter().flatten().enumerate().try_for_each(|(index, mount)| check_mount(bundle, index, mount))
}

fn check_mount(bundle: &Bundle, index: usize, mount: &Mount) -> Result<(), BundleError> {
    let own = both(mount.uid_mappings(), mount.gid_mappings());
    let asks = ["idmap", "ridmap"].into_iter().find(|option| has_option(mount, option));
    let field = match (own.uids.is_empty(), own.gids.is_empty(), asks) {
        (true, true, None) => return Ok(()),
        (true, true, Some(option)) => format!("mounts[{index}].options ({option})"),
        (false, ..) => format!("mounts[{index}].uidMappings"),
        (true, false, _) => format!("mounts[{index}].gidMappings"),
    };
    let problem = if own.uids.is_empty() != own.gids.is_empty() {
        "maps users or groups only: give both uidMappings and gidMappings"
    } else if split::bind(mount).is_none() {
        "asks for IDs to be mapped, which are those of a bind mount's files, and this is none: leave it out"
    } else if of_mount(&bundle.spec, mount).is_none() {
        "asks for the mapping of the container's user namespace, and linux.namespaces has none: give uidMappings and \
         gidMappings"
    } else {
        return Ok(());
    };
    Err(bundle.field(field, problem))
}

fn both(uids: &Option<Vec<LinuxIdMapping>>, gids: &Option<Vec<LinuxIdMapping>>) -> IdMappings {
    IdMappings { uids: uids.clone().unwrap_or_default(), gids: gids.clone().unwrap_or_default() }
}

fn has_option(mount: &Mount, option: &str) -> bool {
    mount.options().iter().flatten().any(|given| given == option)
}

#[cfg(test)]
mod tests {
    use super::*;

    const IDS: &str = r#"[{"containerID":0,"hostID":1000,"size":10}]"#;

    fn bundle(linux: &str, mount: &str) -> Bundle {
        let mounts = format!(r#"[{{"destination":"/a","source":"/usr"{mount}}}]"#);
        let text = format!(r#"{{"ociVersion":"1.2.0","linux":{{{linux}}},"mounts":{mounts}}}"#);
        Bundle { path: "/b".into(), rootfs: "/b/rootfs".into(), spec: serde_json::from_str(&text).unwrap() }
    }

    fn with_user_namespace(mount: &str) -> Bundle {
        let linux = format!(r#""namespaces":[{{"type":"user"}}],"uidMappings":{IDS},"gidMappings":{IDS}"#);
        bundle(&linux, mount)
    }

    #[test]
    fn a_mount_has_its_own_mapping_or_the_containers() {
        let map = |bundle: &Bundle| {
            check(bundle).unwrap();
            of_mount(&bundle.spec, &bundle.spec.mounts().as_ref().unwrap()[0])
        };
        assert_eq!(map(&with_user_namespace(r#","options":["rbind"]"#)), None);
        let containers = map(&with_user_namespace(r#","options":["rbind","ridmap"]"#)).unwrap();
        assert!(containers.recursive);
        assert_eq!(containers.mappings.root(), Some((1000, 1000)));
        let own = format!(r#","options":["bind"],"uidMappings":{0},"gidMappings":{0}"#, IDS.replace("1000", "7"));
        for bundle in [bundle("", &own), with_user_namespace(&own)] {
            let own = map(&bundle).unwrap();
            assert!(!own.recursive);
            assert_eq!(own.mappings.root(), Some((7, 7)));
        }
    }

    #[test]
    fn what_nothing_can_follow_is_named() {
        let mapped = format!(r#","uidMappings":{IDS},"gidMappings":{IDS}"#);
        for (bundle, expected) in [
            (bundle(&format!(r#""uidMappings":{IDS}"#), ""), "linux.uidMappings in"),
            (bundle(&format!(r#""gidMappings":{IDS}"#), ""), "linux.gidMappings in"),
            (bundle(r#""namespaces":[{"type":"user"}]"#, ""), "map containerID 0"),
            (bundle("", r#","options":["bind","idmap"]"#), "mounts[0].options (idmap)"),
            (bundle("", &format!(r#","options":["bind"],"gidMappings":{IDS}"#)), "mounts[0].gidMappings"),
            (bundle("", &format!(r#","type":"tmpfs"{mapped}"#)), "mounts[0].uidMappings"),
        ] {
            let message = check(&bundle).map_or_else(|error| error.to_string(), |()| "none".into());
            assert!(message.contains(expected), "{message}");
        }
    }
}
