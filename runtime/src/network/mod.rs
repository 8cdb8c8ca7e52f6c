//! What the engine put into the network namespace, handed on to the guest.
//!
//! An engine gives a container interfaces, addresses and routes in a network namespace. The guest cannot enter it,
//! so [`scan`] reads what is there, each interface gets a tap whose frames are exchanged with the interface's own
//! ([`attach`]), and the guest gets the same MAC addresses, IP addresses, routes and neighbours on its end of the
//! taps. From outside nothing can be told from a container in the namespace.
//!
//! Everything here works on the network namespace that the calling thread is in ([`namespace`]) and leaves
//! nothing behind: a tap goes with its descriptor, the rules of an interface with the namespace. What the engine
//! serves inside the namespace stays there and is reached through [`dns`].

mod attach;
pub mod dns;
pub mod late;
pub mod loopback;
pub mod namespace;
mod rules;
mod scan;
#[cfg(test)]
mod tests;

use std::io;
use std::net::IpAddr;

use runvm_protocol::agent;

pub use attach::{Tap, attach, loose_tap};
pub use scan::scan;

/// What is to be the guest's network.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Network {
    /// In the order in which they came into the namespace.
    pub interfaces: Vec<Interface>,
    /// Those that the guest's kernel does not make by itself; each after those that its gateway needs.
    pub routes: Vec<Route>,
    /// The permanent ones.
    pub neighbours: Vec<Neighbour>,
    /// Whether the loopback interface has IPv6.
    pub loopback_ipv6: bool,
    /// Whether an engine's resolver listens in the namespace, out of the guest's reach.
    pub resolver: bool,
}

/// An Ethernet interface.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Interface {
    /// In the namespace.
    pub index: u32,
    /// As in the namespace.
    pub name: String,
    /// As in the namespace.
    pub mac: [u8; 6],
    /// As in the namespace.
    pub mtu: u32,
    /// Without those that a kernel makes of the MAC address.
    pub addresses: Vec<Prefix>,
    /// Whether IPv6 is enabled on it.
    pub ipv6: bool,
}

/// The MAC address that a VMM gives its network device with this index. The guest finds the device by it, and gives it the
/// interface's own: a guest that is forked has the devices of the one that it was forked from.
pub fn device_mac(index: usize) -> [u8; 6] {
    // Locally administered. No guest has 256 devices.
    [0x02, b'r', b'u', b'n', b'v', index as u8]
}

/// An address and how many of its bits name the network.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Prefix {
    /// All of its bits count, or those of the network only.
    pub ip: IpAddr,
    /// 0 to 32, or to 128.
    pub length: u8,
}

/// A route of the main table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Route {
    /// Length zero is the default route.
    pub destination: Prefix,
    /// None where the destination is on the link.
    pub gateway: Option<IpAddr>,
    /// The interface's name.
    pub device: String,
    /// The address that packets go out with.
    pub source: Option<IpAddr>,
    /// As in rtnetlink(7).
    pub scope: u8,
    /// Lower wins; 0 is IPv4's default.
    pub metric: u32,
    /// The gateway is reached on the link, whatever the addresses say.
    pub onlink: bool,
}

/// A permanent entry of the neighbour table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Neighbour {
    /// The neighbour.
    pub ip: IpAddr,
    /// Where it is.
    pub mac: [u8; 6],
    /// The interface's name.
    pub device: String,
}

/// What can go wrong between a network namespace and a guest.
#[derive(Debug, thiserror::Error)]
pub enum NetworkError {
    /// The host's own network was asked for.
    #[error("a container in a VM cannot use the host's network")]
    Host,
    /// More interfaces after `create` than the VM has spare devices for.
    #[error("the VM has {spare} spare network devices, and {came} interfaces have come after `create`")]
    TooLate {
        /// Interfaces.
        came: usize,
        /// Devices.
        spare: usize,
    },
    /// Netlink did not work as it should.
    #[error("cannot {action}")]
    Netlink {
        /// What was asked, completing "cannot …".
        action: String,
        /// What happened.
        #[source]
        source: rtnetlink::Error,
    },
    /// The kernel refused.
    #[error("cannot {action}")]
    System {
        /// What was asked, completing "cannot …".
        action: String,
        /// The answer.
        #[source]
        source: io::Error,
    },
}

impl NetworkError {
    fn netlink(action: impl Into<String>) -> impl FnOnce(rtnetlink::Error) -> Self {
        move |error| match error {
            rtnetlink::Error::NetlinkError(refusal) => Self::System { action: action.into(), source: refusal.to_io() },
            source => Self::Netlink { action: action.into(), source },
        }
    }

    fn system<E: Into<io::Error>>(action: impl Into<String>) -> impl FnOnce(E) -> Self {
        move |source| Self::System { action: action.into(), source: source.into() }
    }
}

/// A netlink socket in the calling thread's network namespace.
fn netlink() -> Result<rtnetlink::Handle, NetworkError> {
    let (connection, handle, _) = rtnetlink::new_connection().map_err(NetworkError::system("open a netlink socket"))?;
    // Ends when the last handle is gone.
    tokio::spawn(connection);
    Ok(handle)
}

impl From<&Network> for agent::ConfigureNetworkRequest {
    fn from(network: &Network) -> Self {
        Self {
            interfaces: network.interfaces.iter().enumerate().map(|(index, interface)| interface.wire(index)).collect(),
            routes: network.routes.iter().map(Into::into).collect(),
            neighbours: network.neighbours.iter().map(Into::into).collect(),
            loopback_ipv6: network.loopback_ipv6,
            ..Self::default()
        }
    }
}

impl Interface {
    /// What the guest is told of the interface with this index.
    fn wire(&self, index: usize) -> agent::Interface {
        agent::Interface {
            device_mac: device_mac(index).to_vec(),
            mac: self.mac.to_vec(),
            name: self.name.clone(),
            mtu: self.mtu,
            addresses: self
                .addresses
                .iter()
                .map(|address| agent::Address {
                    ip: octets(address.ip),
                    prefix_length: address.length.into(),
                    ..agent::Address::default()
                })
                .collect(),
            ipv6: self.ipv6,
            ..agent::Interface::default()
        }
    }
}

impl From<&Route> for agent::Route {
    fn from(route: &Route) -> Self {
        let destination = route.destination;
        Self {
            destination: if destination.length == 0 { Vec::new() } else { octets(destination.ip) },
            prefix_length: destination.length.into(),
            gateway: route.gateway.map(octets).unwrap_or_default(),
            device: route.device.clone(),
            source: route.source.map(octets).unwrap_or_default(),
            scope: route.scope.into(),
            metric: route.metric,
            ipv6: destination.ip.is_ipv6(),
            onlink: route.onlink,
            ..Self::default()
        }
    }
}

impl From<&Neighbour> for agent::Neighbour {
    fn from(neighbour: &Neighbour) -> Self {
        Self {
            ip: octets(neighbour.ip),
            mac: neighbour.mac.to_vec(),
            device: neighbour.device.clone(),
            ..Self::default()
        }
    }
}

fn octets(ip: IpAddr) -> Vec<u8> {
    match ip {
        IpAddr::V4(ip) => ip.octets().to_vec(),
        IpAddr::V6(ip) => ip.octets().to_vec(),
    }
}
