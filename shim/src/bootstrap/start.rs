//! `start`: the address of a container's shim, which is started unless its pod has one.

use std::collections::HashMap;
use std::fs;
use std::io::{self, Read as _};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use command_fds::{CommandFdExt as _, FdMapping};
use rustix::process::getppid;
use serde::Deserialize;

use super::address::Place;
use super::parameters::Parameters;
use super::{Address, BootstrapError, Flags, Result, print};
use crate::events::TTRPC_ADDRESS;
use crate::server::LISTENER;

/// The most that is read of containerd's parameters, in bytes.
const MAX_PARAMETERS: u64 = 10 << 20;
/// The annotations that name the group of containers which have one shim, in the order in which they count.
const GROUPS: [&str; 2] = ["io.containerd.runc.v2.group", "io.kubernetes.cri.sandbox-id"];

/// Prints the address, and makes it so that somebody listens there.
pub fn start(flags: &Flags) -> Result<()> {
    let mut input = Vec::new();
    io::stdin()
        .take(MAX_PARAMETERS)
        .read_to_end(&mut input)
        .map_err(BootstrapError::system("read containerd's parameters from stdin"))?;
    let parameters = Parameters::read(&input, flags);
    let bundle = bundle(flags)?;
    let group = group(&bundle.join("config.json"))?.unwrap_or_else(|| flags.id.clone());
    let address = Address::of(parameters.socket_folder(), &flags.address, &flags.namespace, &group);
    let place = address.take().map_err(BootstrapError::system("listen on the shim's socket"))?;
    if let Place::Free(listener) = place
        && let Err(error) = launch(flags, &parameters, &bundle, &address, listener)
    {
        // Nobody listens there, and what is left is in the next one's way at most.
        let _ = address.remove();
        return Err(error);
    }
    write(&bundle.join("address"), &address.to_string())?;
    print(&parameters.answer(&address)?)
}

/// The bundle's folder.
pub(super) fn bundle(flags: &Flags) -> Result<PathBuf> {
    match &flags.bundle {
        Some(bundle) => Ok(bundle.clone()),
        None => std::env::current_dir().map_err(BootstrapError::system("find the bundle")),
    }
}

/// The group of containers that this one belongs to; a sandbox without containers has no config.json.
fn group(config: &Path) -> Result<Option<String>> {
    #[derive(Deserialize)]
    struct Annotated {
        #[serde(default)]
        annotations: HashMap<String, String>,
    }
    let file = match fs::File::open(config) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        file => file.map_err(BootstrapError::file("read", config))?,
    };
    let annotated: Annotated = serde_json::from_reader(io::BufReader::new(file))
        .map_err(|error| BootstrapError::Spec(config.to_owned(), error))?;
    Ok(GROUPS.iter().find_map(|name| annotated.annotations.get(*name)).cloned())
}

/// Starts this program again, as the server. It keeps nothing of what containerd waits for to be closed.
fn launch(
    flags: &Flags,
    parameters: &Parameters,
    bundle: &Path,
    address: &Address,
    listener: UnixListener,
) -> Result<()> {
    let program = std::env::current_exe().map_err(BootstrapError::system("find this program"))?;
    let mut command = Command::new(program);
    command.args(["-namespace", &flags.namespace, "-id", &flags.id, "-address", &flags.address]);
    command.args(["-publish-binary", &flags.publish_binary, "-socket", &address.to_string()]);
    command.arg("-bundle").arg(bundle);
    if flags.debug || parameters.debug() {
        command.arg("-debug");
    }
    if let Some(events) = parameters.events_address() {
        command.env(TTRPC_ADDRESS, events);
    }
    command.current_dir(bundle).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    command
        .fd_mappings(vec![FdMapping { parent_fd: OwnedFd::from(listener), child_fd: LISTENER }])
        .map_err(|error| BootstrapError::system("hand down the socket")(io::Error::other(error)))?;
    let child = command.spawn().map_err(BootstrapError::system("start the shim"))?;
    spare(child.id())?;
    write(&bundle.join("shim.pid"), &child.id().to_string())
}

/// Has the kernel take any process but containerd for more worthwhile, as shims do when memory is short.
fn spare(pid: u32) -> Result<()> {
    let Some(containerd) = getppid() else { return Ok(()) };
    let path = PathBuf::from(format!("/proc/{}/oom_score_adj", containerd.as_raw_nonzero()));
    let text = fs::read_to_string(&path).map_err(BootstrapError::file("read", path))?;
    let score = text.trim().parse::<i32>().unwrap_or(0).saturating_add(1).min(1000);
    let path = PathBuf::from(format!("/proc/{pid}/oom_score_adj"));
    fs::write(&path, score.to_string()).map_err(BootstrapError::file("write", path))
}

/// Writes a file whole or not at all.
fn write(path: &Path, text: &str) -> Result<()> {
    let draft = path.with_extension("new");
    fs::write(&draft, text).and_then(|()| fs::rename(&draft, path)).map_err(BootstrapError::file("write", path))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn group_of(config: &str) -> Result<Option<String>> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("config.json");
        fs::write(&path, config).unwrap();
        group(&path)
    }

    #[test]
    fn containers_are_grouped_by_their_annotations() {
        let of = |config: &str| group_of(config).unwrap();
        assert_eq!(of(r#"{"ociVersion":"1.0.2"}"#), None);
        assert_eq!(of(r#"{"annotations":{"io.kubernetes.cri.sandbox-id":"pod","x":"y"}}"#).as_deref(), Some("pod"));
        let both = r#"{"annotations":{"io.kubernetes.cri.sandbox-id":"pod","io.containerd.runc.v2.group":"g"}}"#;
        assert_eq!(of(both).as_deref(), Some("g"));
        assert_eq!(group(Path::new("/no/such/config.json")).unwrap(), None);
        assert!(group_of("{").unwrap_err().to_string().contains("not a valid OCI configuration"));
    }
}
