//! Reads the network namespace.

use std::fs;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use futures::TryStreamExt as _;
use rtnetlink::packet_route::AddressFamily;
use rtnetlink::packet_route::address::{AddressAttribute, AddressFlags, AddressMessage};
use rtnetlink::packet_route::link::{LinkAttribute, LinkFlags, LinkLayerType, LinkMessage};
use rtnetlink::packet_route::neighbour::{NeighbourAddress, NeighbourAttribute, NeighbourMessage, NeighbourState};
use rtnetlink::packet_route::route::{
    RouteAddress, RouteAttribute, RouteFlags, RouteHeader, RouteMessage, RouteNextHopFlags, RouteProtocol, RouteType,
};
use rtnetlink::{Handle, RouteMessageBuilder};

use super::attach::TAP_PREFIX;
use super::{Interface, Neighbour, Network, NetworkError, Prefix, Route, namespace, netlink};

/// Reads what the network namespace of this thread holds for a guest.
///
/// # Errors
/// Those of netlink.
pub async fn scan() -> Result<Network, NetworkError> {
    let netlink = netlink()?;
    let mut interfaces: Vec<Interface> = links(&netlink).await?.iter().filter_map(interface).collect();
    for message in addresses(&netlink).await? {
        let Some(interface) = interfaces.iter_mut().find(|interface| interface.index == message.header.index) else {
            continue;
        };
        interface.addresses.extend(address(&message, interface.mac));
    }
    let mut routes = Vec::new();
    for message in [RouteMessageBuilder::<Ipv4Addr>::new().build(), RouteMessageBuilder::<Ipv6Addr>::new().build()] {
        routes.extend(dump_routes(&netlink, message).await?.iter().filter_map(|message| route(message, &interfaces)));
    }
    // A gateway has to be on the link already when the route through it is made.
    routes.sort_by_key(|route| route.gateway.is_some());
    let neighbours = neighbours(&netlink).await?.iter().filter_map(|message| neighbour(message, &interfaces)).collect();
    Ok(Network { interfaces, routes, neighbours, loopback_ipv6: has_ipv6("lo"), resolver: namespace::has_resolver()? })
}

async fn links(netlink: &Handle) -> Result<Vec<LinkMessage>, NetworkError> {
    netlink.link().get().execute().try_collect().await.map_err(NetworkError::netlink("list the network interfaces"))
}

async fn addresses(netlink: &Handle) -> Result<Vec<AddressMessage>, NetworkError> {
    netlink.address().get().execute().try_collect().await.map_err(NetworkError::netlink("list the network addresses"))
}

async fn dump_routes(netlink: &Handle, filter: RouteMessage) -> Result<Vec<RouteMessage>, NetworkError> {
    netlink.route().get(filter).execute().try_collect().await.map_err(NetworkError::netlink("list the routes"))
}

async fn neighbours(netlink: &Handle) -> Result<Vec<NeighbourMessage>, NetworkError> {
    netlink.neighbours().get().execute().try_collect().await.map_err(NetworkError::netlink("list the neighbours"))
}

/// An Ethernet interface that carries frames: up, of its own, and not one of our taps. So the fallback devices
/// that some kernels put into each namespace, tunnels and ports of a bridge stay out.
fn interface(message: &LinkMessage) -> Option<Interface> {
    let header = &message.header;
    if header.link_layer_type != LinkLayerType::Ether || !header.flags.contains(LinkFlags::Up) {
        return None;
    }
    let (mut name, mut mac, mut mtu, mut port) = (None, None, None, false);
    for attribute in &message.attributes {
        match attribute {
            LinkAttribute::IfName(value) => name = Some(value.clone()),
            LinkAttribute::Address(value) => mac = value.as_slice().try_into().ok(),
            LinkAttribute::Mtu(value) => mtu = Some(*value),
            LinkAttribute::Controller(controller) => port = *controller != 0,
            _ => {}
        }
    }
    let name = name.filter(|name| !port && !name.starts_with(TAP_PREFIX))?;
    let ipv6 = has_ipv6(&name);
    Some(Interface { index: header.index, name, mac: mac?, mtu: mtu?, addresses: Vec::new(), ipv6 })
}

fn has_ipv6(name: &str) -> bool {
    fs::read_to_string(format!("/proc/sys/net/ipv6/conf/{name}/disable_ipv6"))
        .is_ok_and(|disabled| disabled.trim() == "0")
}

fn address(message: &AddressMessage, mac: [u8; 6]) -> Option<Prefix> {
    let (mut local, mut peer, mut flags) = (None, None, AddressFlags::empty());
    for attribute in &message.attributes {
        match attribute {
            AddressAttribute::Local(ip) => local = Some(*ip),
            AddressAttribute::Address(ip) => peer = Some(*ip),
            AddressAttribute::Flags(value) => flags = *value,
            _ => {}
        }
    }
    let ip = local.or(peer)?;
    // The guest's kernel makes this one too, of the same MAC address.
    if ip == IpAddr::V6(link_local(mac)) {
        return None;
    }
    // With a peer, or where the engine wants no route of it, the address says nothing of a network. What
    // there is of routes comes as such.
    let alone = flags.contains(AddressFlags::Noprefixroute) || peer.is_some_and(|peer| peer != ip);
    Some(Prefix { ip, length: if alone { bits(ip) } else { message.header.prefix_len } })
}

fn route(message: &RouteMessage, interfaces: &[Interface]) -> Option<Route> {
    let header = &message.header;
    if header.kind != RouteType::Unicast || header.flags.contains(RouteFlags::Cloned) {
        return None;
    }
    let any: IpAddr = match header.address_family {
        AddressFamily::Inet => Ipv4Addr::UNSPECIFIED.into(),
        AddressFamily::Inet6 => Ipv6Addr::UNSPECIFIED.into(),
        _ => return None,
    };
    let mut destination = Prefix { ip: any, length: header.destination_prefix_length };
    let (mut gateway, mut source, mut device, mut metric) = (None, None, None, 0);
    let mut table = u32::from(header.table);
    let mut onlink = header.flags.contains(RouteFlags::Onlink);
    for attribute in &message.attributes {
        match attribute {
            RouteAttribute::Destination(value) => destination.ip = ip(value)?,
            RouteAttribute::Gateway(value) => gateway = ip(value),
            RouteAttribute::PrefSource(value) => source = ip(value),
            RouteAttribute::Oif(value) => device = Some(*value),
            RouteAttribute::Priority(value) => metric = *value,
            RouteAttribute::Table(value) => table = *value,
            RouteAttribute::MultiPath(hops) => {
                // The guest is told of one way; the first is as good as any.
                let hop = hops.first()?;
                device = Some(hop.interface_index);
                onlink = hop.flags.contains(RouteNextHopFlags::Onlink);
                gateway = hop.attributes.iter().find_map(|attribute| match attribute {
                    RouteAttribute::Gateway(value) => ip(value),
                    _ => None,
                });
            }
            _ => {}
        }
    }
    let interface = interfaces.iter().find(|interface| Some(interface.index) == device)?;
    let by_itself = match header.protocol {
        RouteProtocol::Kernel => made_by_kernel(destination, interface),
        // The guest hears the router as well.
        RouteProtocol::Ra => true,
        _ => false,
    };
    if table != u32::from(RouteHeader::RT_TABLE_MAIN) || by_itself {
        return None;
    }
    let device = interface.name.clone();
    Some(Route { destination, gateway, device, source, scope: header.scope.into(), metric, onlink })
}

/// Whether a kernel makes this route of an interface's addresses.
fn made_by_kernel(destination: Prefix, interface: &Interface) -> bool {
    let own = match destination.ip {
        IpAddr::V6(ip) => ip.is_unicast_link_local() || ip.is_multicast(),
        IpAddr::V4(_) => false,
    };
    own || interface
        .addresses
        .iter()
        .any(|address| address.length == destination.length && network(*address) == network(destination))
}

fn neighbour(message: &NeighbourMessage, interfaces: &[Interface]) -> Option<Neighbour> {
    if message.header.state != NeighbourState::Permanent {
        return None;
    }
    let interface = interfaces.iter().find(|interface| interface.index == message.header.ifindex)?;
    let (mut ip, mut mac) = (None, None);
    for attribute in &message.attributes {
        match attribute {
            NeighbourAttribute::Destination(NeighbourAddress::Inet(value)) => ip = Some(IpAddr::V4(*value)),
            NeighbourAttribute::Destination(NeighbourAddress::Inet6(value)) => ip = Some(IpAddr::V6(*value)),
            NeighbourAttribute::LinkLayerAddress(value) => mac = value.as_slice().try_into().ok(),
            _ => {}
        }
    }
    Some(Neighbour { ip: ip?, mac: mac?, device: interface.name.clone() })
}

fn ip(address: &RouteAddress) -> Option<IpAddr> {
    match address {
        RouteAddress::Inet(ip) => Some((*ip).into()),
        RouteAddress::Inet6(ip) => Some((*ip).into()),
        _ => None,
    }
}

fn bits(ip: IpAddr) -> u8 {
    if ip.is_ipv4() { 32 } else { 128 }
}

/// The bits of an address that name its network.
fn network(prefix: Prefix) -> u128 {
    let (value, host_bits) = match prefix.ip {
        IpAddr::V4(ip) => (u128::from(ip.to_bits()), 32 - u32::from(prefix.length).min(32)),
        IpAddr::V6(ip) => (ip.to_bits(), 128 - u32::from(prefix.length).min(128)),
    };
    value.checked_shr(host_bits).unwrap_or(0)
}

/// The link-local address that follows from a MAC address (EUI-64).
fn link_local(mac: [u8; 6]) -> Ipv6Addr {
    let [a, b, c, d, e, f] = mac;
    Ipv6Addr::from([0xfe, 0x80, 0, 0, 0, 0, 0, 0, a ^ 2, b, c, 0xff, 0xfe, d, e, f])
}
