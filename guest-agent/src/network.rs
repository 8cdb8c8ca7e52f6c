//! The guest's network, which is its containers': what the engine put into the network namespace on the host.

use std::fs;
use std::io;
use std::net::IpAddr;
use std::os::fd::{AsRawFd as _, BorrowedFd};

use futures::TryStreamExt as _;
use rtnetlink::packet_route::address::AddressHeaderFlags;
use rtnetlink::packet_route::link::{LinkAttribute, LinkFlags, LinkMessage};
use rtnetlink::packet_route::route::RouteScope;
use rtnetlink::{Handle, LinkUnspec, RouteMessageBuilder};
use runvm_protocol::agent::{ConfigureNetworkRequest, Interface, Neighbour, Route};
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

/// The kernel's first interface.
const LOOPBACK: u32 = 1;

/// The longest name of an interface.
const MAX_NAME: usize = 15;

/// A part of the network that cannot be set up.
#[derive(Debug, thiserror::Error)]
pub(crate) enum NetworkError {
    #[error("{0:?} is no name of an interface")]
    Name(String),
    #[error("an address has 4 or 16 bytes, not {0}")]
    Address(usize),
    #[error("a prefix of {0} bits is too long")]
    Prefix(u32),
    #[error("the interface {name:?} has no device with the address {mac}")]
    NoDevice { name: String, mac: String },
    #[error("there is no interface {0:?}")]
    NoInterface(String),
    #[error("the route's destination, gateway and source are of different families")]
    Families,
    #[error("cannot reach the kernel's network: {0}")]
    Connection(#[source] io::Error),
    #[error("cannot set {parameter}: {source}")]
    Parameter { parameter: String, source: io::Error },
    #[error("cannot {step}: {source}")]
    Kernel { step: String, source: rtnetlink::Error },
}

/// Brings the network to what the request says; what is so already stays.
pub(crate) async fn configure(request: &ConfigureNetworkRequest) -> Result<(), NetworkError> {
    let (connection, handle, _) = rtnetlink::new_connection().map_err(NetworkError::Connection)?;
    let connection = tokio::spawn(connection);
    let configured = Network { handle }.configure(request).await;
    connection.abort();
    configured
}

/// Takes every device of the guest, and the agent, into another network namespace.
pub(crate) async fn move_into(namespace: BorrowedFd<'_>) -> Result<(), NetworkError> {
    let (connection, handle, _) = rtnetlink::new_connection().map_err(NetworkError::Connection)?;
    let connection = tokio::spawn(connection);
    let moved = Network { handle }.move_devices(namespace).await;
    connection.abort();
    moved?;
    move_into_link_name_space(namespace, Some(LinkNameSpaceType::Network))
        .map_err(|errno| NetworkError::Connection(errno.into()))
}

struct Network {
    handle: Handle,
}

impl Network {
    async fn configure(&self, request: &ConfigureNetworkRequest) -> Result<(), NetworkError> {
        set_ipv6("lo", request.loopback_ipv6)?;
        self.set(LinkUnspec::new_with_index(LOOPBACK).up().build(), || "bring lo up".into()).await?;
        self.name_all(&request.interfaces).await?;
        for interface in &request.interfaces {
            self.set_up(interface).await?;
        }
        // A gateway must be reachable before a route can name it.
        let (direct, via): (Vec<_>, Vec<_>) = request.routes.iter().partition(|route| route.gateway.is_empty());
        for route in direct.into_iter().chain(via) {
            self.add_route(route).await?;
        }
        for neighbour in &request.neighbours {
            self.add_neighbour(neighbour).await?;
        }
        Ok(())
    }

    async fn move_devices(&self, namespace: BorrowedFd<'_>) -> Result<(), NetworkError> {
        // Each namespace has a loopback of its own.
        for link in self.links().await?.iter().filter(|link| link.index != LOOPBACK) {
            let change = LinkUnspec::new_with_index(link.index).setns_by_fd(namespace.as_raw_fd()).build();
            self.set(change, || format!("move {}", link.name)).await?;
        }
        Ok(())
    }

    /// Gives every device its name, also where two swap theirs.
    async fn name_all(&self, interfaces: &[Interface]) -> Result<(), NetworkError> {
        let mut links = self.links().await?;
        if announce(interfaces, &links)? {
            links = self.links().await?;
        }
        let mut renamed = Vec::new();
        for interface in interfaces {
            check_name(&interface.name)?;
            let link =
                links.iter().find(|link| link.mac == interface.device_mac).ok_or_else(|| NetworkError::NoDevice {
                    name: interface.name.clone(),
                    mac: interface.device_mac.iter().map(|byte| format!("{byte:02x}")).collect::<Vec<_>>().join(":"),
                })?;
            if link.name == interface.name {
                continue;
            }
            renamed.push((link, &interface.name));
            if let Some(other) = links.iter().find(|other| other.name == interface.name) {
                self.rename(other, &format!("rvm{}", other.index)).await?;
            }
        }
        for (link, name) in renamed {
            self.rename(link, name).await?;
        }
        Ok(())
    }

    async fn rename(&self, link: &Link, name: &str) -> Result<(), NetworkError> {
        let step = || format!("rename {} to {name}", link.name);
        if link.up {
            self.set(LinkUnspec::new_with_index(link.index).down().build(), step).await?;
        }
        self.set(LinkUnspec::new_with_index(link.index).name(name).build(), step).await
    }

    async fn set_up(&self, interface: &Interface) -> Result<(), NetworkError> {
        let name = &interface.name;
        let index = self.index_of(name).await?;
        set_ipv6(name, interface.ipv6)?;
        let mut change = LinkUnspec::new_with_index(index).address(interface.mac.clone()).up();
        if interface.mtu != 0 {
            change = change.mtu(interface.mtu);
        }
        self.set(change.build(), || format!("bring {name} up")).await?;
        for address in &interface.addresses {
            let ip = ip(&address.ip)?;
            let mut request = self.handle.address().add(index, ip, prefix(ip, address.prefix_length)?).replace();
            if ip.is_ipv6() {
                // The host's kernel has it for its own already, and is not asked again.
                request.message_mut().header.flags |= AddressHeaderFlags::Nodad;
            }
            request.execute().await.map_err(kernel(|| format!("add the address {ip} to {name}")))?;
        }
        Ok(())
    }

    async fn add_route(&self, route: &Route) -> Result<(), NetworkError> {
        let mut message = RouteMessageBuilder::<IpAddr>::new().output_interface(self.index_of(&route.device).await?);
        let any = if route.ipv6 { IpAddr::from([0; 16]) } else { IpAddr::from([0; 4]) };
        let destination = if route.destination.is_empty() { any } else { ip(&route.destination)? };
        let length = prefix(destination, route.prefix_length)?;
        message = message.destination_prefix(destination, length).map_err(|_| NetworkError::Families)?;
        if !route.gateway.is_empty() {
            message = message.gateway(ip(&route.gateway)?).map_err(|_| NetworkError::Families)?;
        }
        if !route.source.is_empty() {
            message = message.pref_source(ip(&route.source)?).map_err(|_| NetworkError::Families)?;
        }
        if route.metric != 0 {
            message = message.priority(route.metric);
        }
        if route.onlink {
            message = message.onlink();
        }
        message = message.scope(RouteScope::from(u8::try_from(route.scope).unwrap_or_default()));
        let added = self.handle.route().add(message.build()).replace().execute().await;
        added.map_err(kernel(|| format!("add the route to {destination}/{length} by {}", route.device)))
    }

    async fn add_neighbour(&self, neighbour: &Neighbour) -> Result<(), NetworkError> {
        let index = self.index_of(&neighbour.device).await?;
        let ip = ip(&neighbour.ip)?;
        let request = self.handle.neighbours().add(index, ip).link_layer_address(&neighbour.mac).replace();
        request.execute().await.map_err(kernel(|| format!("add the neighbour {ip} on {}", neighbour.device)))
    }

    async fn set(&self, change: LinkMessage, step: impl Fn() -> String) -> Result<(), NetworkError> {
        self.handle.link().set(change).execute().await.map_err(kernel(step))
    }

    async fn links(&self) -> Result<Vec<Link>, NetworkError> {
        let links = self.handle.link().get().execute().map_ok(Link::from);
        links.try_collect().await.map_err(kernel(|| "list the interfaces".into()))
    }

    async fn index_of(&self, name: &str) -> Result<u32, NetworkError> {
        let links = self.links().await?;
        let link = links.iter().find(|link| link.name == name);
        link.map(|link| link.index).ok_or_else(|| NetworkError::NoInterface(name.to_owned()))
    }
}

struct Link {
    index: u32,
    name: String,
    mac: Vec<u8>,
    up: bool,
}

impl From<LinkMessage> for Link {
    fn from(message: LinkMessage) -> Self {
        let up = message.header.flags.contains(LinkFlags::Up);
        let mut link = Self { index: message.header.index, name: String::new(), mac: Vec::new(), up };
        for attribute in message.attributes {
            match attribute {
                LinkAttribute::IfName(name) => link.name = name,
                LinkAttribute::Address(mac) => link.mac = mac,
                _ => {}
            }
        }
        link
    }
}

/// Tells the kernel of the devices that it does not know yet; whether there are any. Their driver has them when this returns.
fn announce(interfaces: &[Interface], links: &[Link]) -> Result<bool, NetworkError> {
    const PARAMETER: &str = "/sys/module/virtio_mmio/parameters/device";
    let unknown = |interface: &&Interface| {
        !interface.whereabouts.is_empty() && !links.iter().any(|link| link.mac == interface.device_mac)
    };
    let mut announced = false;
    for interface in interfaces.iter().filter(unknown) {
        fs::write(PARAMETER, &interface.whereabouts)
            .map_err(|source| NetworkError::Parameter { parameter: PARAMETER.to_owned(), source })?;
        announced = true;
    }
    Ok(announced)
}

/// Whether the interface has IPv6; and if so, that its addresses serve at once.
fn set_ipv6(name: &str, enabled: bool) -> Result<(), NetworkError> {
    for (parameter, value) in [("disable_ipv6", if enabled { "0" } else { "1" }), ("accept_dad", "0")] {
        let parameter = format!("net/ipv6/conf/{name}/{parameter}");
        match fs::write(format!("/proc/sys/{parameter}"), value) {
            Err(source) if enabled || source.kind() != io::ErrorKind::NotFound => {
                return Err(NetworkError::Parameter { parameter, source });
            }
            // A kernel without IPv6 has nothing to disable.
            _ => {}
        }
    }
    Ok(())
}

fn check_name(name: &str) -> Result<(), NetworkError> {
    let allowed = |c: char| c.is_ascii_graphic() && c != '/' && c != ':';
    let fits = (1..=MAX_NAME).contains(&name.len()) && name != "." && name != ".." && name.chars().all(allowed);
    if fits { Ok(()) } else { Err(NetworkError::Name(name.to_owned())) }
}

fn ip(bytes: &[u8]) -> Result<IpAddr, NetworkError> {
    let v4 = <[u8; 4]>::try_from(bytes).map(IpAddr::from);
    v4.or_else(|_| <[u8; 16]>::try_from(bytes).map(IpAddr::from)).map_err(|_| NetworkError::Address(bytes.len()))
}

fn prefix(ip: IpAddr, length: u32) -> Result<u8, NetworkError> {
    let longest = if ip.is_ipv4() { 32 } else { 128 };
    u8::try_from(length).ok().filter(|&length| length <= longest).ok_or(NetworkError::Prefix(length))
}

fn kernel(step: impl Fn() -> String) -> impl FnOnce(rtnetlink::Error) -> NetworkError {
    move |source| NetworkError::Kernel { step: step(), source }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_stay_within_their_folder() {
        assert!(check_name("eth0").is_ok());
        for name in ["", ".", "..", "a/b", "a b", "sixteen-letters-", "a:1"] {
            assert!(check_name(name).is_err(), "{name:?}");
        }
    }

    #[test]
    fn addresses_have_the_length_of_their_family() {
        assert_eq!(ip(&[10, 0, 0, 1]).unwrap().to_string(), "10.0.0.1");
        assert!(ip(&[0; 16]).unwrap().is_ipv6());
        assert!(ip(&[0; 5]).is_err());
        assert_eq!(prefix(ip(&[0; 4]).unwrap(), 32).unwrap(), 32);
        assert!(prefix(ip(&[0; 4]).unwrap(), 33).is_err());
        assert!(prefix(ip(&[0; 16]).unwrap(), 300).is_err());
    }
}
