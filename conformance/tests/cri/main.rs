//! runvm under containerd's CRI plugin, as Kubernetes drives it, held against runc.

mod containers;
mod exec;
mod logs;
mod network;
mod pods;
mod security;
mod sharing;
mod stats;
mod trouble;
mod volumes;

use std::path::Path;
use std::process::ExitCode;

use conformance::cri::{Cri, Engine, Release, v1};
use conformance::enclosure::run_inside;
use conformance::suite::{Suite, run};

/// The releases of containerd that most is tried on; a handful of cases runs on all.
const MOST: &[&str] = &["containerd-1.6", "containerd-2"];

/// Those that make a pod's own container: containerd 2 ends by a null pointer when a pod in the host's network is made
/// by a shim.
const BY_CONTAINER: &[&str] = &["containerd-1.6", "containerd-1.7", "containerd-2"];

const SLEEP: &[&str] = &["sleep", "1000"];

fn main() -> ExitCode {
    let scripts: &[&[&str]] = &[
        &["setup.sh"],
        &["images.sh", "busybox"],
        &["images.sh", "pause"],
        &["later.sh", "trixie", "containerd"],
        &["later.sh", "sid", "containerd"],
    ];
    run_inside(scripts, |enclosure| {
        let mut failed = false;
        for release in Release::ALL {
            let cases = [
                containers::cases(),
                exec::cases(),
                logs::cases(),
                network::cases(),
                pods::cases(),
                security::cases(),
                sharing::cases(),
                stats::cases(),
                trouble::cases(),
                volumes::cases(),
            ];
            let cases = cases.into_iter().flatten().collect();
            let suite = Suite { name: "cri", engine: release.name(), shim: true, cases, open: Cri::open };
            failed |= run(suite, || Engine::start(enclosure, release))? != ExitCode::SUCCESS;
        }
        Ok(if failed { ExitCode::FAILURE } else { ExitCode::SUCCESS })
    })
}

/// A mount of something of the host's.
fn bind(host: &Path, container: &str) -> v1::Mount {
    v1::Mount { host_path: host.display().to_string(), container_path: container.to_owned(), ..Default::default() }
}

/// What a container may use, to be changed.
fn resources(config: &mut v1::ContainerConfig) -> &mut v1::LinuxContainerResources {
    config.linux.get_or_insert_default().resources.get_or_insert_default()
}

/// A number that may be absent.
fn number(value: i64) -> v1::Int64Value {
    v1::Int64Value { value }
}
