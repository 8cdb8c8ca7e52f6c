//! The making of a container: its root file system, its stdio, and its place in a VM, which is booted for the first one.

use std::fs;
use std::path::PathBuf;
use std::sync::Arc;

use containerd_shim_protos::api::CreateTaskRequest;
use oci_spec::runtime::{Process as ProcessSpec, Spec};
use runvm::agent::Relay;
use runvm::bundle::{Bundle, Membership};
use runvm::error::sentence;
use runvm::host::terminal::Size;
use runvm::pod::Pod;

use super::container::Container;
use super::process::Process;
use super::{Held, Tasks};
use crate::errors::{Error, Result};
use crate::mounts;
use crate::stdio::{Logger, Stdio};

/// What a container of a pod says that it is.
const CONTAINER_TYPE: &str = "io.kubernetes.cri.container-type";
/// What names a group of containers beside pods.
const GROUP: &str = "io.containerd.runc.v2.group";

/// A container, and the streams of its first process.
pub(super) struct Made {
    pub container: Container,
    pub relay: Relay,
    pub logger: Option<Logger>,
}

/// Makes it. After an error nothing of it is left.
pub(super) async fn make(tasks: &Tasks, request: &CreateTaskRequest) -> Result<Made> {
    let bundle = PathBuf::from(&request.bundle);
    let rootfs = bundle.join("rootfs");
    let mounted = !request.rootfs.is_empty();
    if mounted {
        fs::create_dir_all(&rootfs).map_err(Error::file("make", &rootfs))?;
        mounts::mount_all(&request.rootfs, &rootfs)?;
    }
    let made = in_vm(tasks, request, bundle, mounted).await;
    if made.is_err()
        && mounted
        && let Err(error) = mounts::unmount_all(&rootfs)
    {
        tracing::warn!("after a container that was not made: {}", sentence(&error));
    }
    made
}

async fn in_vm(tasks: &Tasks, request: &CreateTaskRequest, path: PathBuf, mounted: bool) -> Result<Made> {
    let mut place = tasks.pod.lock().await;
    let config = path.join("config.json");
    let spec = Spec::load(&config).map_err(|error| Error::file("read", config)(std::io::Error::other(error)))?;
    let membership = match &*place {
        Some(_) => Membership::Member,
        None => of_first(&spec),
    };
    let mut bundle = Bundle::load_as(&path, membership).map_err(runvm::error::Error::from)?;
    tasks.complete(&mut bundle.spec);
    let stdio = Stdio {
        stdin: request.stdin.clone(),
        stdout: request.stdout.clone(),
        stderr: request.stderr.clone(),
        terminal: request.terminal,
    };
    let size = console_size(bundle.spec.process().as_ref());
    let opened = stdio.open(&request.id, &tasks.namespace, size, &tasks.streams).await?;
    let (pod, relay) = match &*place {
        Some(held) => {
            let pod = held.pod.clone();
            drop(place);
            let relay = pod.create(&request.id, &bundle, opened.descriptors).await?;
            (pod, relay)
        }
        None => {
            let options = tasks.environment.complete(request.options.as_ref(), tasks.log.clone())?;
            let (pod, relay) = Pod::boot(&options, &request.id, &bundle, membership, opened.descriptors).await?;
            let pod = Arc::new(pod);
            *place = Some(Held { pod: pod.clone(), kept: false });
            (pod, relay)
        }
    };
    note_pid(&path, pod.pid());
    let init = Process::new("", stdio, None);
    init.hold(opened.stdin, opened.claims);
    let container = Container::new(&request.id, path, pod, Arc::new(init), mounted);
    Ok(Made { container, relay, logger: opened.logger })
}

/// Whether others will join the first container of a VM.
fn of_first(spec: &Spec) -> Membership {
    let annotations = spec.annotations().as_ref();
    let annotation = |name| annotations.and_then(|annotations| annotations.get(name)).map(String::as_str);
    match (annotation(CONTAINER_TYPE), annotation(GROUP)) {
        (Some("sandbox"), _) | (_, Some(_)) => Membership::Sandbox,
        _ => Membership::Alone,
    }
}

/// The size that a terminal begins with.
pub(super) fn console_size(process: Option<&ProcessSpec>) -> Size {
    let Some(size) = process.and_then(ProcessSpec::console_size) else { return Size::default() };
    let cells = |count: u64| u16::try_from(count).unwrap_or(0);
    Size { rows: cells(size.height()), columns: cells(size.width()) }
}

/// For the `delete` after a shim that was killed. Without it only a number in an event is missing.
fn note_pid(bundle: &std::path::Path, pid: u32) {
    if let Err(error) = fs::write(bundle.join("init.pid"), pid.to_string()) {
        tracing::info!("init.pid is not written: {error}");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_container_tells_whether_others_follow() {
        let of = |annotations: &str| {
            of_first(
                &serde_json::from_str(&format!(r#"{{"ociVersion":"1.0.2","annotations":{annotations}}}"#)).unwrap(),
            )
        };
        assert_eq!(of(r"{}"), Membership::Alone);
        assert_eq!(of(r#"{"io.kubernetes.cri.container-type":"sandbox"}"#), Membership::Sandbox);
        assert_eq!(of(r#"{"io.kubernetes.cri.container-type":"container"}"#), Membership::Alone);
        assert_eq!(of(r#"{"io.containerd.runc.v2.group":"g"}"#), Membership::Sandbox);
    }

    #[test]
    fn a_terminal_begins_with_the_size_of_its_process() {
        let process: ProcessSpec =
            serde_json::from_str(r#"{"cwd":"/","user":{"uid":0,"gid":0},"consoleSize":{"height":40,"width":120}}"#)
                .unwrap();
        assert_eq!(console_size(Some(&process)), Size { rows: 40, columns: 120 });
        assert_eq!(console_size(None), Size::default());
    }
}
