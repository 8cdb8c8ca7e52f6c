//! The network namespace itself: made, entered, told from another.

use std::fs;
use std::io;
use std::ops::RangeInclusive;
use std::os::fd::AsFd as _;
use std::os::linux::fs::MetadataExt as _;
use std::path::Path;

use rtnetlink::LinkUnspec;
use rustix::thread::{LinkNameSpaceType, UnshareFlags};

use super::{NetworkError, netlink};
use crate::bundle::NetworkNamespace;

/// The index of `lo` in every namespace.
const LOOPBACK: u32 = 1;

/// Puts the calling thread into a container's network namespace, which is made where it is to be a new one.
///
/// # Errors
/// Where it is missing, or the host's own: nothing of ours may ever touch the host's interfaces.
pub async fn take_up(namespace: &NetworkNamespace) -> Result<(), NetworkError> {
    match namespace {
        NetworkNamespace::New => create().await,
        NetworkNamespace::Existing(path) => enter(path),
        NetworkNamespace::Host => Err(NetworkError::Host),
    }
}

/// Puts the calling thread into a new network namespace, with its loopback interface up as a container expects it.
///
/// # Errors
/// Those of unshare(2) and of netlink.
pub async fn create() -> Result<(), NetworkError> {
    // SAFETY: the table of descriptors is not among the flags.
    unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWNET) }
        .map_err(NetworkError::system("make a network namespace"))?;
    let up = LinkUnspec::new_with_index(LOOPBACK).up().build();
    netlink()?.link().set(up).execute().await.map_err(NetworkError::netlink("bring up lo"))
}

/// Puts the calling thread into the network namespace that a file stands for.
///
/// # Errors
/// Where the file is missing or is no network namespace.
pub fn enter(path: &Path) -> Result<(), NetworkError> {
    let action = || format!("enter the network namespace {}", path.display());
    let file = fs::File::open(path).map_err(NetworkError::system(action()))?;
    rustix::thread::move_into_link_name_space(file.as_fd(), Some(LinkNameSpaceType::Network))
        .map_err(NetworkError::system(action()))
}

/// Whether the file stands for the network namespace that the calling thread is in: for a runtime that has just been
/// started, the host's.
///
/// # Errors
/// Where the file is missing.
pub fn is_current(path: &Path) -> Result<bool, NetworkError> {
    let identity = |path: &Path| {
        let metadata = fs::metadata(path)
            .map_err(NetworkError::system(format!("look at the network namespace {}", path.display())))?;
        Ok((metadata.st_dev(), metadata.st_ino()))
    };
    Ok(identity(path)? == identity(Path::new("/proc/thread-self/ns/net"))?)
}

/// Whether an engine's resolver listens in the namespace.
pub(super) fn has_resolver() -> Result<bool, NetworkError> {
    let address = format!("{:08X}:", u32::from_ne_bytes(runvm_protocol::dns::RESOLVER.octets()));
    let sockets = read("/proc/thread-self/net/udp")?;
    Ok(sockets.lines().filter_map(|line| line.split_whitespace().nth(1)).any(|local| local.starts_with(&address)))
}

/// Has the kernel choose the ports of the namespace's own sockets from a range.
pub(super) fn restrict_ports(ports: RangeInclusive<u16>) -> Result<(), NetworkError> {
    let path = "/proc/sys/net/ipv4/ip_local_port_range";
    fs::write(path, format!("{} {}", ports.start(), ports.end())).map_err(NetworkError::system(format!("write {path}")))
}

fn read(path: &str) -> Result<String, NetworkError> {
    fs::read_to_string(path).map_err(|error: io::Error| NetworkError::system(format!("read {path}"))(error))
}
