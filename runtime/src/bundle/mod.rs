//! The bundle: config.json and the root file system, as an engine hands them over.
//!
//! Loading proves what can be proved before anything is made, so that a mistake is answered with the name of the
//! field. [`split`] then takes the specification apart into what the host does and what the guest is told.

mod id_mappings;
pub mod lone_member;
pub mod mount_points;
mod namespaces;
mod split;
mod unsupported;

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use oci_spec::runtime::Spec;
use thiserror::Error;

use crate::host::user_namespace::IdMappings;

pub use namespaces::{NetworkNamespace, PodWishes};
pub use split::{GuestSpec, guest_path, split};
pub use unsupported::remark;

/// The newest version of the runtime specification that is understood.
pub const OCI_VERSION: &str = "1.2.1";

/// The largest config.json that is read, in bytes; engines write some 30 KiB.
const MAX_CONFIG: u64 = 16 << 20;

/// What is wrong with a bundle.
#[derive(Debug, Error)]
pub enum BundleError {
    /// The bundle or its config.json cannot be read.
    #[error("cannot read {path}", path = path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// config.json is not the JSON of a specification.
    #[error("{path} is not a valid OCI configuration, at {field}", path = path.display())]
    Parse {
        /// The file.
        path: PathBuf,
        /// Which field, or `.` for the file as a whole.
        field: String,
        /// Where and why.
        source: serde_json::Error,
    },
    /// The specification's version is another one.
    #[error("ociVersion in {path} is \"{version}\", which runvm does not support: 1.0.0 to {OCI_VERSION} are", path = path.display())]
    Version {
        /// The file.
        path: PathBuf,
        /// What it says.
        version: String,
    },
    /// A field is missing, or says what cannot be.
    #[error("{field} in {path} {problem}", path = path.display())]
    Field {
        /// The file.
        path: PathBuf,
        /// The field, as a path from the top.
        field: String,
        /// What is wrong with it, and what to do.
        problem: String,
    },
}

/// A bundle whose parts are there.
#[derive(Clone, Debug)]
pub struct Bundle {
    /// Absolute path of the bundle.
    pub path: PathBuf,
    /// Absolute path of the root file system, free of links.
    pub rootfs: PathBuf,
    /// config.json.
    pub spec: Spec,
}

/// Whom a container shares its VM with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Membership {
    /// Nobody.
    Alone,
    /// Those that will join it: it is the first of a pod, whose namespaces they share.
    Sandbox,
    /// A pod, which it joins.
    Member,
}

impl Bundle {
    /// Loads the bundle in the folder `path`, of a container that has its VM alone.
    ///
    /// # Errors
    /// [`BundleError`], naming the file and the field.
    pub fn load(path: &Path) -> Result<Self, BundleError> {
        Self::load_as(path, Membership::Alone)
    }

    /// Loads the bundle in the folder `path`.
    ///
    /// # Errors
    /// [`BundleError`], naming the file and the field.
    pub fn load_as(path: &Path, membership: Membership) -> Result<Self, BundleError> {
        let path = path.canonicalize().map_err(|source| BundleError::Read { path: path.to_owned(), source })?;
        let config = path.join("config.json");
        let mut spec = read_spec(&config)?;
        let field = |field: &str, problem: String| BundleError::Field {
            path: config.clone(),
            field: field.to_owned(),
            problem,
        };
        supported(spec.version())
            .then_some(())
            .ok_or_else(|| BundleError::Version { path: config.clone(), version: spec.version().clone() })?;
        let process = spec.process().as_ref().ok_or_else(|| field("process", "is missing".into()))?;
        if process.args().as_ref().is_none_or(Vec::is_empty) {
            return Err(field("process.args", "is empty: name the program to run".into()));
        }
        if !process.cwd().is_absolute() {
            return Err(field("process.cwd", format!("is \"{}\": it must be absolute", process.cwd().display())));
        }
        let root = spec.root().as_ref().ok_or_else(|| field("root", "is missing".into()))?;
        let rootfs = rootfs(&path, root.path()).map_err(|problem| field("root.path", problem))?;
        if membership == Membership::Alone && lone_member::is_one(&spec) {
            lone_member::settle(&mut spec).map_err(|problem| field("linux.namespaces", problem))?;
        }
        let bundle = Self { path, rootfs, spec };
        namespaces::check(&bundle, membership)?;
        id_mappings::check(&bundle)?;
        unsupported::check(&bundle)?;
        Ok(bundle)
    }

    /// An error about a field of this bundle's config.json.
    fn field(&self, field: impl Into<String>, problem: impl Into<String>) -> BundleError {
        BundleError::Field { path: self.path.join("config.json"), field: field.into(), problem: problem.into() }
    }

    /// Where the container's network namespace comes from.
    pub fn network_namespace(&self) -> NetworkNamespace {
        namespaces::network(&self.spec)
    }

    /// The mappings of the container's user namespace, if it has one.
    pub fn user_namespace(&self) -> Option<IdMappings> {
        id_mappings::of_container(&self.spec)
    }

    /// Whether the process wants a terminal.
    pub fn terminal(&self) -> bool {
        self.spec.process().as_ref().and_then(oci_spec::runtime::Process::terminal).unwrap_or(false)
    }
}

/// Reads a file of at most `limit` bytes as text.
pub(crate) fn read_bounded(path: &Path, limit: u64) -> io::Result<String> {
    use io::Read as _;
    let file = fs::File::open(path)?;
    let mut text = String::new();
    let length = file.take(limit + 1).read_to_string(&mut text)?;
    if length as u64 > limit {
        return Err(io::Error::new(io::ErrorKind::FileTooLarge, format!("it has more than {limit} bytes")));
    }
    Ok(text)
}

fn read_spec(config: &Path) -> Result<Spec, BundleError> {
    let text =
        read_bounded(config, MAX_CONFIG).map_err(|source| BundleError::Read { path: config.to_owned(), source })?;
    let mut json = serde_json::Deserializer::from_str(&text);
    serde_path_to_error::deserialize(&mut json).map_err(|error| BundleError::Parse {
        path: config.to_owned(),
        field: error.path().to_string(),
        source: error.into_inner(),
    })
}

/// Versions are compatible within 1.x; of what is added after [`OCI_VERSION`] nothing is known.
fn supported(version: &str) -> bool {
    let release = version.split(['-', '+']).next().unwrap_or_default();
    let numbers: Vec<_> = release.split('.').map(str::parse::<u32>).collect();
    matches!(numbers[..], [Ok(1), Ok(minor), Ok(_)] if minor <= 2)
}

/// The root file system, or what is wrong with `root.path`.
fn rootfs(bundle: &Path, path: &Path) -> Result<PathBuf, String> {
    if path.as_os_str().is_empty() {
        return Err("is empty: name the directory of the root file system".into());
    }
    let absolute = std::path::absolute(bundle.join(path)).map_err(|error| format!("cannot be resolved: {error}"))?;
    let real = absolute.canonicalize().map_err(|error| match error.kind() {
        io::ErrorKind::NotFound => format!("is {}, which does not exist", absolute.display()),
        _ => format!("is {}, which cannot be opened: {error}", absolute.display()),
    })?;
    if !real.is_dir() {
        return Err(format!("is {}, which is not a directory", absolute.display()));
    }
    // A link that a stranger's bundle carries could lead to any directory of the host.
    let named_in_bundle = !path.is_absolute() || absolute.starts_with(bundle);
    if named_in_bundle && !real.starts_with(bundle) {
        return Err(format!(
            "is {}, a link out of the bundle to {}: name that directory itself",
            absolute.display(),
            real.display()
        ));
    }
    Ok(real)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bundle(config: &str) -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("rootfs")).unwrap();
        fs::write(dir.path().join("config.json"), config).unwrap();
        dir
    }

    const NAMESPACES: &str = r#""linux":{"namespaces":[{"type":"network"},{"type":"mount"}]}"#;

    fn config(version: &str, process: &str, root: &str) -> String {
        format!(r#"{{"ociVersion":"{version}","process":{process},"root":{{"path":"{root}"}},{NAMESPACES}}}"#)
    }

    const PROCESS: &str = r#"{"cwd":"/","args":["true"],"user":{"uid":0,"gid":0}}"#;

    fn refusal(config: &str) -> String {
        Bundle::load(bundle(config).path()).unwrap_err().to_string()
    }

    #[test]
    fn a_whole_bundle_loads() {
        let dir = bundle(&config("1.0.2-dev", PROCESS, "rootfs"));
        let bundle = Bundle::load(dir.path()).unwrap();
        assert_eq!(bundle.rootfs, dir.path().canonicalize().unwrap().join("rootfs"));
        assert_eq!(bundle.network_namespace(), NetworkNamespace::New);
        assert!(!bundle.terminal());
    }

    #[test]
    fn each_mistake_names_its_field() {
        for (config, expected) in [
            (config("2.0.0", PROCESS, "rootfs"), "ociVersion"),
            (config("1.0.2", r#"{"cwd":"/","args":[],"user":{"uid":0,"gid":0}}"#, "rootfs"), "process.args"),
            (config("1.0.2", r#"{"cwd":"x","args":["a"],"user":{"uid":0,"gid":0}}"#, "rootfs"), "process.cwd"),
            (config("1.0.2", PROCESS, "missing"), "root.path"),
            (config("1.0.2", PROCESS, ""), "root.path"),
            ("{".to_owned(), "config.json is not a valid OCI configuration"),
            (config("1.0.2", r#"{"cwd":"/","args":"true","user":{"uid":0,"gid":0}}"#, "rootfs"), "process.args"),
        ] {
            let message = refusal(&config);
            assert!(message.contains(expected), "{message}");
            assert!(message.contains("config.json"), "{message}");
        }
    }

    #[test]
    fn a_link_out_of_the_bundle_is_refused() {
        let dir = bundle(&config("1.0.2", PROCESS, "link"));
        std::os::unix::fs::symlink("/usr", dir.path().join("link")).unwrap();
        let message = Bundle::load(dir.path()).unwrap_err().to_string();
        assert!(message.contains("root.path") && message.contains("link out of the bundle"), "{message}");
    }

    #[test]
    fn versions_within_one_are_supported() {
        assert!(["1.0.0", "1.0.2-dev", "1.1.0", "1.2.9+x"].into_iter().all(supported));
        assert!(!["", "1", "1.3.0", "0.9.0", "1.0.x", "2.0.0"].into_iter().any(supported));
    }
}
