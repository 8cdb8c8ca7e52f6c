//! Ties a tap to an interface: what arrives on one leaves by the other.
//!
//! The [`rules`](super::rules) act on what both devices receive, before the namespace's own kernel sees a frame: so
//! it never answers for the addresses that are still on the interface. The guest does.

use std::fs::{self, OpenOptions};
use std::io;
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::os::unix::fs::OpenOptionsExt as _;

use nix::libc;
use rtnetlink::LinkUnspec;

use super::{Interface, NetworkError, namespace, netlink, rules};

/// What our taps' names begin with.
pub(super) const TAP_PREFIX: &str = "rvmtap";

/// The device's end that the VMM reads and writes. The device lasts as long as this is open.
#[derive(Debug)]
pub struct Tap {
    /// Non-blocking, each frame behind a `virtio_net_hdr`; its size and the offloads are the VMM's to set.
    pub fd: OwnedFd,
    /// In the namespace.
    pub name: String,
}

/// Makes a tap that stands for an interface, in a namespace where an engine's resolver listens or does not.
///
/// # Errors
/// Where there is no /dev/net/tun, or the kernel lacks the ingress queueing discipline, the `u32` classifier or the
/// `mirred` action.
pub async fn attach(interface: &Interface, resolver: bool) -> Result<Tap, NetworkError> {
    let tap = loose_tap()?;
    tie(interface, &tap.name, resolver).await?;
    Ok(tap)
}

/// Ties a tap that leads nowhere yet to an interface.
///
/// # Errors
/// Those of [`attach`].
pub(super) async fn tie(interface: &Interface, name: &str, resolver: bool) -> Result<(), NetworkError> {
    // The namespace's kernel must not speak on the tap: the guest would hear a stranger.
    let quiet = format!("/proc/sys/net/ipv6/conf/{name}/disable_ipv6");
    match fs::write(&quiet, "1") {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            return Err(NetworkError::system(format!("write {quiet}"))(error));
        }
        _ => {}
    }
    let socket = rustix::net::socket(rustix::net::AddressFamily::UNIX, rustix::net::SocketType::DGRAM, None)
        .map_err(NetworkError::system("open a socket"))?;
    let index =
        rustix::net::netdevice::name_to_index(&socket, name).map_err(NetworkError::system(format!("find {name}")))?;

    let netlink = netlink()?;
    let up = LinkUnspec::new_with_index(index).mtu(interface.mtu).up().build();
    netlink.link().set(up).execute().await.map_err(NetworkError::netlink(format!("bring up {name}")))?;

    let redirect = async |from, to, name: &str| {
        rules::redirect(&netlink, from, to)
            .await
            .map_err(NetworkError::netlink(format!("redirect what {name} receives")))
    };
    redirect(interface.index, index, &interface.name).await?;
    redirect(index, interface.index, name).await?;
    if resolver {
        namespace::restrict_ports(rules::OWN_PORTS)?;
        rules::spare_resolver(&netlink, interface.index, index)
            .await
            .map_err(NetworkError::netlink(format!("leave the resolver its answers on {}", interface.name)))?;
    }
    Ok(())
}

/// A tap that leads nowhere.
///
/// # Errors
/// Where there is no /dev/net/tun.
pub fn loose_tap() -> Result<Tap, NetworkError> {
    let fd = open_tun()?;
    let name = make_tap(&fd)?;
    Ok(Tap { fd, name })
}

/// What can become a tap of the calling thread's network namespace.
pub(super) fn open_tun() -> Result<OwnedFd, NetworkError> {
    let opened = OpenOptions::new().read(true).write(true).custom_flags(libc::O_NONBLOCK).open("/dev/net/tun");
    opened.map(Into::into).map_err(NetworkError::system("open /dev/net/tun"))
}

/// Makes it one; its name.
pub(super) fn make_tap(tun: &OwnedFd) -> Result<String, NetworkError> {
    // SAFETY: a plain C structure of integers, for which zeros are valid.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    let pattern = format!("{TAP_PREFIX}%d");
    for (to, from) in request.ifr_name.iter_mut().zip(pattern.bytes()) {
        *to = from.cast_signed();
    }
    let flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
    request.ifr_ifru.ifru_flags = flags as libc::c_short;
    set_interface(tun, &mut request).map_err(NetworkError::system("make a tap by /dev/net/tun"))?;
    let name = request.ifr_name.iter().take_while(|&&byte| byte != 0).map(|byte| char::from(byte.cast_unsigned()));
    Ok(name.collect())
}

fn set_interface(tun: &OwnedFd, request: &mut libc::ifreq) -> io::Result<()> {
    // SAFETY: TUNSETIFF reads and writes a `struct ifreq`, which `request` is.
    match unsafe { libc::ioctl(tun.as_raw_fd(), libc::TUNSETIFF, request) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}
