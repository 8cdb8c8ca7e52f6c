//! `delete`: nothing is left of a container whose shim containerd has lost.
//!
//! containerd calls it whenever a connection to a shim ends, also for one container of a pod whose shim goes on. So a
//! shim that answers is asked to end the container, and only after one that does not is cleaned up.

use std::fs;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, SystemTime};

use containerd_shim_protos::api::{DeleteRequest, DeleteResponse, KillRequest, WaitRequest};
use containerd_shim_protos::shim_async::TaskClient;
use oci_spec::runtime::Spec;
use protobuf::Message as _;
use runvm::error::sentence;
use runvm::monitor::KILLED;
use runvm::pod::Pod;
use rustix::process::Signal;
use serde::Deserialize;
use ttrpc::asynchronous::transport::Socket;
use ttrpc::context::with_duration;

use super::{Address, BootstrapError, Flags, Result, print};
use crate::task::{CGROUP_PARENT, SHARED_MEMORY};
use crate::{mounts, wire};

/// How long a shim that answers may take. containerd waits for five seconds.
const LIMIT: Duration = Duration::from_secs(4);

/// Cleans up, and prints how the container ended.
pub fn delete(flags: &Flags) -> Result<()> {
    let bundle = super::start::bundle(flags)?;
    let address = address(&bundle);
    let deleted = match address.as_ref().map(Address::connect) {
        Some(Ok(shim)) => ask(shim, &flags.id)?,
        Some(Err(error)) if error.kind() == std::io::ErrorKind::ConnectionRefused => {
            address.as_ref().map(Address::remove).transpose().map_err(BootstrapError::system("remove the socket"))?;
            None
        }
        _ => None,
    };
    let response = match deleted {
        Some(response) => response,
        None => {
            clean_up(&flags.id, &bundle);
            killed(&bundle)
        }
    };
    print(&response.write_to_bytes().map_err(BootstrapError::message("write the answer"))?)
}

/// Where the shim was reached: its `start` wrote it down, or where there was none, for a container of a sandbox,
/// containerd did.
fn address(bundle: &Path) -> Option<Address> {
    #[derive(Deserialize)]
    struct Bootstrap {
        address: String,
    }
    if let Ok(text) = fs::read_to_string(bundle.join("address")) {
        return Address::parse(&text);
    }
    let bootstrap: Bootstrap = serde_json::from_slice(&fs::read(bundle.join("bootstrap.json")).ok()?).ok()?;
    Address::parse(&bootstrap.address)
}

/// Has a shim end a container; none where it does not know it.
fn ask(shim: UnixStream, id: &str) -> Result<Option<DeleteResponse>> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(BootstrapError::system("start the runtime"))?;
    runtime.block_on(async {
        let socket = Socket::try_from(shim).map_err(BootstrapError::system("talk to the shim"))?;
        let client = TaskClient::new(ttrpc::asynchronous::Client::new(socket));
        let id = id.to_owned();
        let kill = KillRequest { id: id.clone(), signal: Signal::KILL.as_raw().unsigned_abs(), ..Default::default() };
        let wait = WaitRequest { id: id.clone(), ..Default::default() };
        let delete = DeleteRequest { id, ..Default::default() };
        let answered = tokio::time::timeout(LIMIT, async {
            // One that has ended, or was never there, needs no killing and no waiting.
            let _ = client.kill(with_duration(LIMIT), &kill).await;
            let _ = client.wait(with_duration(LIMIT), &wait).await;
            client.delete(with_duration(LIMIT), &delete).await
        });
        Ok(answered.await.ok().and_then(std::result::Result::ok))
    })
}

/// Removes what outlives a shim that was killed. What cannot be removed is told, and keeps nothing else from being.
fn clean_up(id: &str, bundle: &Path) {
    let cleaned = match fs::read_to_string(bundle.join(CGROUP_PARENT)) {
        Ok(parent) => Pod::clean_up_below(&parent, id),
        Err(_) => match Spec::load(bundle.join("config.json")) {
            Ok(spec) => Pod::clean_up(id, &spec),
            Err(error) => {
                eprintln!("the cgroup of {id} stays, as its config.json cannot be read: {error}");
                Ok(())
            }
        },
    };
    if let Err(error) = cleaned {
        eprintln!("{}", sentence(&error));
    }
    for place in ["rootfs", SHARED_MEMORY] {
        if let Err(error) = mounts::unmount_all(&bundle.join(place)) {
            eprintln!("{}", sentence(&error));
        }
    }
}

/// What is told of a container that ended with its shim.
fn killed(bundle: &Path) -> DeleteResponse {
    let pid = fs::read_to_string(bundle.join("init.pid")).ok().and_then(|text| text.trim().parse().ok());
    DeleteResponse {
        pid: pid.unwrap_or_default(),
        exit_status: KILLED.into(),
        exited_at: Some(wire::timestamp(SystemTime::now())).into(),
        ..Default::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_address_is_found_wherever_it_was_written() {
        let bundle = tempfile::tempdir().unwrap();
        assert_eq!(address(bundle.path()), None);
        let text = r#"{"version":3,"address":"unix:///s/b","protocol":"ttrpc"}"#;
        fs::write(bundle.path().join("bootstrap.json"), text).unwrap();
        assert_eq!(address(bundle.path()), Address::parse("unix:///s/b"));
        fs::write(bundle.path().join("address"), "unix:///s/a").unwrap();
        assert_eq!(address(bundle.path()), Address::parse("unix:///s/a"));
    }
}
