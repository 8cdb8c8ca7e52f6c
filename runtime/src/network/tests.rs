//! Against the kernel: each test has a network namespace of its own, that goes with its thread. They need root.

use std::collections::HashMap;
use std::fs;
use std::net::{Ipv4Addr, Ipv6Addr};
use std::os::fd::OwnedFd;
use std::time::Duration;

use rtnetlink::packet_route::neighbour::NeighbourState;
use rtnetlink::packet_route::route::RouteScope;
use rtnetlink::{LinkUnspec, LinkVeth, RouteMessageBuilder};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::net::UdpSocket;

use super::*;

const MAC: [u8; 6] = [0x02, 0x42, 0xac, 0x11, 0x00, 0x02];
const GUEST: Ipv4Addr = Ipv4Addr::new(172, 17, 0, 2);
const WORLD_MAC: [u8; 6] = [0x02, 0x42, 0xac, 0x11, 0x00, 0x09];
const WORLD: Ipv4Addr = Ipv4Addr::new(172, 17, 0, 1);

const IP: u16 = 0x0800;
const ARP: u16 = 0x0806;
/// An Ethernet type that no kernel uses.
const EXPERIMENT: u16 = 0x88b5;

/// What a tap puts before a frame (`struct virtio_net_hdr`): all zero for one that needs nothing done.
const HEADER: [u8; 10] = [0; 10];

/// Nothing waits so long in a test that passes.
const PATIENCE: Duration = Duration::from_secs(10);

fn in_namespace(test: impl AsyncFnOnce(rtnetlink::Handle)) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        namespace::create().await.unwrap();
        test(netlink().unwrap()).await;
    });
}

/// What an engine does: a veth whose peer is the world's.
async fn plug(netlink: &rtnetlink::Handle) -> u32 {
    netlink.link().add(LinkVeth::new("eth0", "world").build()).execute().await.unwrap();
    let index = index("eth0");
    let up = LinkUnspec::new_with_index(index).address(MAC.to_vec()).mtu(1400).up().build();
    netlink.link().set(up).execute().await.unwrap();
    netlink.link().set(LinkUnspec::new_with_name("world").up().build()).execute().await.unwrap();
    index
}

fn index(name: &str) -> u32 {
    rustix::net::netdevice::name_to_index(std::os::unix::net::UnixDatagram::unbound().unwrap(), name).unwrap()
}

async fn interface_of(name: &str) -> Interface {
    scan().await.unwrap().interfaces.into_iter().find(|interface| interface.name == name).unwrap()
}

#[test]
fn an_empty_namespace_has_nothing_for_a_guest() {
    in_namespace(async |_| assert_eq!(scan().await.unwrap(), Network { loopback_ipv6: true, ..Network::default() }));
}

#[test]
fn scan_returns_what_the_engine_set() {
    in_namespace(async |netlink| {
        let eth0 = plug(&netlink).await;
        let v4 = GUEST;
        let v6: Ipv6Addr = "fd00:17::2".parse().unwrap();
        let gateway = WORLD;
        let far_gateway: Ipv4Addr = "169.254.1.1".parse().unwrap();
        let gateway6: Ipv6Addr = "fd00:17::1".parse().unwrap();
        netlink.address().add(eth0, v4.into(), 16).execute().await.unwrap();
        netlink.address().add(eth0, v6.into(), 64).execute().await.unwrap();
        let default = RouteMessageBuilder::<Ipv4Addr>::new().gateway(gateway).build();
        netlink.route().add(default).execute().await.unwrap();
        let onlink = RouteMessageBuilder::<Ipv4Addr>::new()
            .destination_prefix("10.1.0.0".parse().unwrap(), 16)
            .gateway(far_gateway)
            .output_interface(eth0)
            .pref_source(v4)
            .priority(7)
            .onlink()
            .build();
        netlink.route().add(onlink).execute().await.unwrap();
        let link = RouteMessageBuilder::<Ipv4Addr>::new()
            .destination_prefix("10.2.0.0".parse().unwrap(), 24)
            .output_interface(eth0)
            .scope(RouteScope::Link)
            .build();
        netlink.route().add(link).execute().await.unwrap();
        let default6 = RouteMessageBuilder::<Ipv6Addr>::new().gateway(gateway6).build();
        netlink.route().add(default6).execute().await.unwrap();
        netlink
            .neighbours()
            .add(eth0, gateway.into())
            .link_layer_address(&WORLD_MAC)
            .state(NeighbourState::Permanent)
            .execute()
            .await
            .unwrap();

        let network = scan().await.unwrap();
        let interface = network.interfaces.iter().find(|interface| interface.name == "eth0").unwrap();
        assert_eq!((interface.index, interface.mac, interface.mtu, interface.ipv6), (eth0, MAC, 1400, true));
        assert_eq!(interface.addresses, [Prefix { ip: v4.into(), length: 16 }, Prefix { ip: v6.into(), length: 64 }]);
        let route = |destination: &str, length, gateway: Option<IpAddr>| Route {
            destination: Prefix { ip: destination.parse().unwrap(), length },
            gateway,
            device: "eth0".into(),
            source: None,
            scope: 0,
            metric: 0,
            onlink: false,
        };
        let expected = [
            Route { scope: 253, ..route("10.2.0.0", 24, None) },
            route("0.0.0.0", 0, Some(gateway.into())),
            Route {
                source: Some(v4.into()),
                metric: 7,
                onlink: true,
                ..route("10.1.0.0", 16, Some(far_gateway.into()))
            },
            Route { metric: 1024, ..route("::", 0, Some(gateway6.into())) },
        ];
        assert_eq!(network.routes, expected);
        let neighbour = Neighbour { ip: gateway.into(), mac: WORLD_MAC, device: "eth0".into() };
        assert_eq!(network.neighbours, [neighbour]);

        let request = agent::ConfigureNetworkRequest::from(&network);
        assert!(request.routes[1].destination.is_empty());
        assert_eq!(request.routes[1].gateway, gateway.octets());
        assert!(request.routes[3].ipv6);
    });
}

#[test]
fn an_interface_without_ipv6_says_so() {
    in_namespace(async |netlink| {
        plug(&netlink).await;
        fs::write("/proc/sys/net/ipv6/conf/eth0/disable_ipv6", "1").unwrap();
        assert!(!interface_of("eth0").await.ipv6);
    });
}

#[test]
fn interfaces_that_are_down_or_taps_of_ours_are_left_out() {
    in_namespace(async |netlink| {
        plug(&netlink).await;
        let _tap = attach(&interface_of("eth0").await, false).await.unwrap();
        netlink.link().set(LinkUnspec::new_with_name("world").down().build()).execute().await.unwrap();
        let names: Vec<_> = scan().await.unwrap().interfaces.into_iter().map(|interface| interface.name).collect();
        assert_eq!(names, ["eth0"]);
    });
}

/// The tap on one side and another on the world's, so that a test can speak for both the guest and the network.
struct Line {
    guest: AsyncFd<OwnedFd>,
    world: AsyncFd<OwnedFd>,
}

impl Line {
    async fn new(netlink: &rtnetlink::Handle) -> Self {
        plug(netlink).await;
        netlink.address().add(index("eth0"), GUEST.into(), 16).execute().await.unwrap();
        Self { guest: tap("eth0").await, world: tap("world").await }
    }
}

async fn tap(name: &str) -> AsyncFd<OwnedFd> {
    registered(attach(&interface_of(name).await, namespace::has_resolver().unwrap()).await.unwrap().fd)
}

fn registered(tap: OwnedFd) -> AsyncFd<OwnedFd> {
    // SAFETY: an owned descriptor stays the same and open.
    unsafe { AsyncFd::register(tap) }.unwrap()
}

async fn send(tap: &AsyncFd<OwnedFd>, frame: &[u8]) {
    let frame = [&HEADER[..], frame].concat();
    tap.async_io(Interest::WRITABLE, |fd| Ok(rustix::io::write(fd, &frame)?)).await.unwrap();
}

/// The next frame of one Ethernet type: kernels say things about IPv6 by themselves.
async fn receive(tap: &AsyncFd<OwnedFd>, kind: u16) -> Vec<u8> {
    let next = async {
        loop {
            let mut buffer = [0; 2048];
            let length = tap.async_io(Interest::READABLE, |fd| Ok(rustix::io::read(fd, &mut buffer)?)).await.unwrap();
            let frame = &buffer[HEADER.len()..length];
            if frame[12..14] == kind.to_be_bytes() {
                return frame.to_vec();
            }
        }
    };
    tokio::time::timeout(PATIENCE, next).await.expect("a frame")
}

fn ethernet(to: [u8; 6], from: [u8; 6], kind: u16, payload: &[u8]) -> Vec<u8> {
    [&to[..], &from, &kind.to_be_bytes(), payload].concat()
}

fn arp(operation: u16, from: ([u8; 6], Ipv4Addr), to: ([u8; 6], Ipv4Addr)) -> Vec<u8> {
    let head = [0, 1, 8, 0, 6, 4, 0, operation as u8];
    let payload = [&head[..], &from.0, &from.1.octets(), &to.0, &to.1.octets()].concat();
    ethernet(if operation == 1 { [0xff; 6] } else { to.0 }, from.0, ARP, &payload)
}

/// Without the checksum that IPv4 lets UDP go without.
fn udp(from: (Ipv4Addr, u16), to: (Ipv4Addr, u16), text: &[u8]) -> Vec<u8> {
    let length = text.len() as u16 + 8;
    let mut header = [0x45, 0, 0, 0, 0, 0, 0, 0, 64, 17, 0, 0].to_vec();
    header[2..4].copy_from_slice(&(length + 20).to_be_bytes());
    header.extend([from.0.octets(), to.0.octets()].concat());
    let sum: u32 = header.chunks(2).map(|word| u32::from(u16::from_be_bytes([word[0], word[1]]))).sum();
    let sum = !((sum & 0xffff) + (sum >> 16)) as u16;
    header[10..12].copy_from_slice(&sum.to_be_bytes());
    let ports = [from.1.to_be_bytes(), to.1.to_be_bytes(), length.to_be_bytes(), [0, 0]].concat();
    ethernet(MAC, WORLD_MAC, IP, &[&header, &ports[..], text].concat())
}

#[test]
fn frames_pass_both_ways() {
    in_namespace(async |netlink| {
        let line = Line::new(&netlink).await;
        let frame = ethernet([0xff; 6], MAC, EXPERIMENT, &[7; 1000]);
        send(&line.guest, &frame).await;
        assert_eq!(receive(&line.world, EXPERIMENT).await, frame);
        let frame = ethernet(MAC, WORLD_MAC, EXPERIMENT, &[9; 60]);
        send(&line.world, &frame).await;
        assert_eq!(receive(&line.guest, EXPERIMENT).await, frame);
    });
}

#[test]
fn what_comes_late_is_tied() {
    in_namespace(async |netlink| {
        let (mut spares, taps) = late::Spares::make(false).unwrap();
        assert_eq!(spares.tie().await.unwrap(), None);
        plug(&netlink).await;
        // The other end of the cable is an interface as well. Who has failed after this tries it again.
        spares.tie().await.unwrap();
        let tied = spares.tie().await.unwrap().unwrap().interfaces;
        let mut ends: HashMap<_, _> = tied.into_iter().map(|interface| interface.name).zip(taps).collect();
        let mut end = |name: &str| registered(ends.remove(name).unwrap());
        let line = Line { guest: end("eth0"), world: end("world") };
        let frame = ethernet([0xff; 6], MAC, EXPERIMENT, &[7; 1000]);
        send(&line.guest, &frame).await;
        assert_eq!(receive(&line.world, EXPERIMENT).await, frame);
    });
}

#[test]
fn more_than_there_is_room_for_comes_too_late() {
    in_namespace(async |netlink| {
        let (mut spares, taps) = late::Spares::make(false).unwrap();
        for number in 0..=taps.len() {
            let name = format!("eth{number}");
            netlink.link().add(LinkVeth::new(&name, &format!("world{number}")).build()).execute().await.unwrap();
            netlink.link().set(LinkUnspec::new_with_name(&name).up().build()).execute().await.unwrap();
        }
        // Their other ends are down, and left out.
        let error = spares.tie().await.unwrap_err().to_string();
        assert_eq!(error, "the VM has 4 spare network devices, and 5 interfaces have come after `create`");
    });
}

#[test]
fn a_namespace_can_be_used_again() {
    in_namespace(async |netlink| {
        drop(Line::new(&netlink).await);
        let line = Line { guest: tap("eth0").await, world: tap("world").await };
        let frame = ethernet(MAC, WORLD_MAC, EXPERIMENT, b"again");
        send(&line.world, &frame).await;
        assert_eq!(receive(&line.guest, EXPERIMENT).await, frame);
    });
}

#[test]
fn the_kernel_of_the_namespace_leaves_the_answers_to_the_guest() {
    in_namespace(async |netlink| {
        let line = Line::new(&netlink).await;
        let question = arp(1, (WORLD_MAC, WORLD), ([0; 6], GUEST));
        send(&line.world, &question).await;
        assert_eq!(receive(&line.guest, ARP).await, question);
        // The line keeps the order: whatever the kernel had answered would come before this.
        let answer = arp(2, (MAC, GUEST), (WORLD_MAC, WORLD));
        send(&line.guest, &answer).await;
        assert_eq!(receive(&line.world, ARP).await, answer);
    });
}

#[test]
fn a_resolver_in_the_namespace_gets_its_answers() {
    in_namespace(async |netlink| {
        let _resolver = UdpSocket::bind((runvm_protocol::dns::RESOLVER, 0)).await.unwrap();
        let line = Line::new(&netlink).await;
        let forward = UdpSocket::bind((GUEST, 0)).await.unwrap();
        forward.connect((WORLD, 53)).await.unwrap();
        let port = forward.local_addr().unwrap().port();
        assert!(rules::OWN_PORTS.contains(&port));

        forward.send(b"question").await.unwrap();
        receive(&line.world, ARP).await;
        let whereabouts = arp(2, (WORLD_MAC, WORLD), (MAC, GUEST));
        send(&line.world, &whereabouts).await;
        assert_eq!(receive(&line.guest, ARP).await, whereabouts, "the guest hears it as well");
        assert!(receive(&line.world, IP).await.ends_with(b"question"));
        send(&line.world, &udp((WORLD, 53), (GUEST, port), b"answer")).await;
        let mut answer = [0; 16];
        let received = tokio::time::timeout(PATIENCE, forward.recv(&mut answer)).await.unwrap().unwrap();
        assert_eq!(&answer[..received], b"answer");

        for (from, to) in [(53, 40_000), (54, port)] {
            let packet = udp((WORLD, from), (GUEST, to), b"for the guest");
            send(&line.world, &packet).await;
            assert_eq!(receive(&line.guest, IP).await, packet);
        }
    });
}

#[test]
fn a_namespace_is_told_from_others() {
    in_namespace(async |_| {
        let host = format!("/proc/{}/ns/net", std::process::id());
        assert!(!namespace::is_current(host.as_ref()).unwrap());
        namespace::enter(host.as_ref()).unwrap();
        assert!(namespace::is_current(host.as_ref()).unwrap());
        let error = namespace::enter("/dev/null".as_ref()).unwrap_err();
        assert_eq!(error.to_string(), "cannot enter the network namespace /dev/null");
    });
}
