//! What containerd makes for a pod of a container of its own, and leaves to the shim for any other: the files with the
//! pod's names, and the memory that its containers share.
//!
//! containerd leaves their mounts out of the containers then, or has them from a folder of its own, in which it has made
//! nothing but empty folders; and gives each container a memory of its own.

use std::fs;
use std::path::{Path, PathBuf};

use containerd_shim_protos::api::Mount;
use oci_spec::runtime::Spec;

use crate::errors::{Error, Result};
use crate::mounts;
use crate::wire::options::{DnsConfig, PodSandboxConfig};

/// The memory, in the sandbox's bundle.
pub const SHARED_MEMORY: &str = "shm";
const HOSTNAME: &str = "hostname";
const HOSTS: &str = "hosts";
const RESOLVER: &str = "resolv.conf";
/// Where containers find which.
const PLACES: [(&str, &str); 4] =
    [(HOSTNAME, "/etc/hostname"), (HOSTS, "/etc/hosts"), (RESOLVER, "/etc/resolv.conf"), (SHARED_MEMORY, "/dev/shm")];

/// The files of a sandbox, in its bundle.
pub(super) struct PodFiles {
    id: String,
    folder: PathBuf,
}

impl PodFiles {
    /// Makes them. After an error what is left goes with the bundle.
    pub fn make(id: &str, folder: &Path, config: &PodSandboxConfig) -> Result<Self> {
        let files = Self { id: id.to_owned(), folder: folder.to_owned() };
        files.write(HOSTNAME, &format!("{}\n", config.hostname))?;
        files.write(HOSTS, &of_host(Path::new("/etc/hosts"))?)?;
        files.write(RESOLVER, &resolver(&config.dns_config)?)?;
        let memory = folder.join(SHARED_MEMORY);
        fs::create_dir_all(&memory).map_err(Error::file("make", &memory))?;
        mounts::mount_all(&[shared_memory()], &memory)?;
        Ok(files)
    }

    fn write(&self, name: &str, text: &str) -> Result<()> {
        let path = self.folder.join(name);
        fs::write(&path, text).map_err(Error::file("write", path))
    }

    /// Takes away what is not gone with the bundle.
    pub fn remove(&self) -> Result<()> {
        Ok(mounts::unmount_all(&self.folder.join(SHARED_MEMORY))?)
    }

    /// Has a container of the pod find them, where it is not to find something else.
    pub fn bring_into(&self, spec: &mut Spec) {
        let read_only = spec.root().as_ref().and_then(oci_spec::runtime::Root::readonly).unwrap_or(false);
        let mut mounts = spec.mounts().clone().unwrap_or_default();
        for (name, target) in PLACES {
            let ours = mounts.iter().position(|mount| mount.destination() == Path::new(target));
            if ours.is_some_and(|index| !self.stands_for(&mounts[index], name)) {
                continue;
            }
            let access = if read_only && name != SHARED_MEMORY { "ro" } else { "rw" };
            let mut mount = oci_spec::runtime::Mount::default();
            mount
                .set_destination(target.into())
                .set_typ(Some("bind".to_owned()))
                .set_source(Some(self.folder.join(name)))
                .set_options(Some(vec!["rbind".to_owned(), access.to_owned()]));
            match ours {
                Some(index) => mounts[index] = mount,
                None => mounts.push(mount),
            }
        }
        spec.set_mounts(Some(mounts));
    }

    /// Whether this mount is what containerd has instead: memory of the container's own, or the place of its own file.
    fn stands_for(&self, mount: &oci_spec::runtime::Mount, name: &str) -> bool {
        let place = Path::new("sandboxes").join(&self.id).join(name);
        let of_the_container = name == SHARED_MEMORY && mount.typ().as_deref() == Some("tmpfs");
        of_the_container || mount.source().as_ref().is_some_and(|source| source.ends_with(place))
    }
}

/// As large as containerd makes it.
fn shared_memory() -> Mount {
    let options = ["nosuid", "nodev", "noexec", "mode=1777", "size=64m"].map(str::to_owned).to_vec();
    Mount { type_: "tmpfs".to_owned(), source: SHARED_MEMORY.to_owned(), options, ..Default::default() }
}

fn resolver(dns: &DnsConfig) -> Result<String> {
    let line = |word: &str, values: &[String]| match values.is_empty() {
        true => String::new(),
        false => format!("{word} {}\n", values.join(" ")),
    };
    let servers: String = dns.servers.iter().map(|server| format!("nameserver {server}\n")).collect();
    let text = line("search", &dns.searches) + &servers + &line("options", &dns.options);
    if text.is_empty() { of_host(Path::new("/etc/resolv.conf")) } else { Ok(text) }
}

/// What a file of the host says; one that is not there says nothing.
fn of_host(path: &Path) -> Result<String> {
    match fs::read_to_string(path) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(String::new()),
        read => read.map_err(Error::file("read", path)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_resolver_is_asked_for_or_the_hosts() {
        let texts = |texts: &[&str]| texts.iter().map(|&text| text.to_owned()).collect();
        let dns = DnsConfig {
            servers: texts(&["192.0.2.1", "192.0.2.2"]),
            searches: texts(&["a.example", "example"]),
            options: texts(&["ndots:5"]),
            ..Default::default()
        };
        let expected = "search a.example example\nnameserver 192.0.2.1\nnameserver 192.0.2.2\noptions ndots:5\n";
        assert_eq!(resolver(&dns).unwrap(), expected);
        assert_eq!(resolver(&DnsConfig::default()).unwrap(), of_host(Path::new("/etc/resolv.conf")).unwrap());
    }

    #[test]
    fn containers_find_the_files_instead_of_empty_folders() {
        let files = PodFiles { id: "pod".to_owned(), folder: "/bundle".into() };
        let bind = |destination: &str, source: &str| {
            format!(r#"{{"destination":"{destination}","type":"bind","source":"{source}","options":["rbind"]}}"#)
        };
        let brought = |mounts: &[String]| {
            let mut spec: Spec =
                serde_json::from_str(&format!(r#"{{"ociVersion":"1.0.2","mounts":[{}]}}"#, mounts.join(","))).unwrap();
            files.bring_into(&mut spec);
            let mounts = spec.mounts().clone().unwrap_or_default();
            let sources = mounts.iter().map(|mount| mount.source().clone().unwrap());
            sources.map(|source| source.display().to_string()).collect::<Vec<_>>()
        };
        let ours = ["/bundle/hostname", "/bundle/hosts", "/bundle/resolv.conf", "/bundle/shm"];
        assert_eq!(brought(&[]), ours);
        let own = r#"{"destination":"/dev/shm","type":"tmpfs","source":"shm","options":["nosuid"]}"#.to_owned();
        let theirs = [own, bind("/etc/resolv.conf", "/r/sandboxes/pod/resolv.conf")];
        assert_eq!(brought(&theirs), ["/bundle/shm", "/bundle/resolv.conf", "/bundle/hostname", "/bundle/hosts"]);
        // What was asked for by the user stays.
        let others = [bind("/etc/hosts", "/v/hosts"), bind("/dev/shm", "/sandboxes/p/shm")];
        assert_eq!(brought(&others), ["/v/hosts", "/sandboxes/p/shm", "/bundle/hostname", "/bundle/resolv.conf"]);
    }
}
