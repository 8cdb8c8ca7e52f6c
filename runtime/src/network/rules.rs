//! The rules of traffic control that move frames between an interface and its tap.
//!
//! They are of the `u32` classifier, which kernels have where they lack newer ones, with no other action than
//! `mirred`.
//!
//! One kind of frame is for the namespace's own kernel: an engine's resolver lives in the namespace and asks other
//! servers from there, with the guest's address. Its answers are told from the guest's by their port, as the namespace's
//! sockets are kept to a range ([`OWN_PORTS`]) that a guest's kernel does not choose from by itself. To ask at all, the
//! kernel has to hear who has which address, so it gets a copy of what is said about that.

use std::ops::RangeInclusive;

use rtnetlink::packet_route::tc::{
    TcAction, TcActionAttribute, TcActionMirror, TcActionMirrorOption, TcActionOption, TcActionType, TcFilterU32Option,
    TcHandle, TcMirror, TcMirrorActionType, TcU32Key, TcU32Selector, TcU32SelectorFlags,
};
use rtnetlink::{Error, Handle};

/// Where the namespace's own sockets get their ports from; a power of two of them, so that one mask tells. Linux
/// chooses from 32768 to 60999.
pub(super) const OWN_PORTS: RangeInclusive<u16> = 0xfe00..=0xffff;

/// The handle of a device's ingress queueing discipline.
const INGRESS_QDISC: u32 = 0xffff_0000;

const ETH_P_ALL: u16 = 0x0003;
const ETH_P_IP: u16 = 0x0800;
const ETH_P_ARP: u16 = 0x0806;
const ETH_P_IPV6: u16 = 0x86dd;
const ARP_REPLY: u16 = 2;
const TCP: u8 = 6;
const UDP: u8 = 17;
const ICMPV6: u8 = 58;
const NEIGHBOUR_ADVERTISEMENT: u8 = 136;
const DNS_PORT: u16 = 53;

/// Sends all that one device receives out by the other.
pub(super) async fn redirect(netlink: &Handle, from: u32, to: u32) -> Result<(), Error> {
    add_ingress(netlink, from).await?;
    let everything = Match { protocol: ETH_P_ALL, priority: 9, keys: vec![key(0, 0, 0)] };
    everything.add(netlink, from, Some(mirred(to, TcMirrorActionType::EgressRedir, TcActionType::Stolen))).await
}

/// Lets the namespace's own kernel have the answers to what a resolver in it asks.
pub(super) async fn spare_resolver(netlink: &Handle, interface: u32, tap: u32) -> Result<(), Error> {
    for protocol in [UDP, TCP] {
        for dns in [answers_v4(protocol), answers_v6(protocol)] {
            dns.add(netlink, interface, None).await?;
        }
    }
    for resolution in [arp_replies(), neighbour_advertisements()] {
        let copy = mirred(tap, TcMirrorActionType::EgressMirror, TcActionType::Ok);
        resolution.add(netlink, interface, Some(copy)).await?;
    }
    Ok(())
}

/// The place for rules on what a device receives. What an earlier user of the namespace left there pointed to a
/// tap that is gone.
async fn add_ingress(netlink: &Handle, device: u32) -> Result<(), Error> {
    let add = || netlink.qdisc().add(device.cast_signed()).ingress().execute();
    match add().await {
        Err(Error::NetlinkError(error)) if error.raw_code() == -nix::libc::EEXIST => {
            let mut request = netlink.qdisc().del(device.cast_signed());
            request.message_mut().header.parent = TcHandle::INGRESS;
            request.execute().await?;
            add().await
        }
        result => result,
    }
}

/// Which frames a rule is for.
struct Match {
    /// `ETH_P_…`.
    protocol: u16,
    /// One for each protocol; lower ones are asked first.
    priority: u16,
    /// On words of the packet, from the network header on; all have to match.
    keys: Vec<TcU32Key>,
}

impl Match {
    /// Without an action the frames go on to the kernel.
    async fn add(self, netlink: &Handle, device: u32, action: Option<TcAction>) -> Result<(), Error> {
        let mut selector = TcU32Selector::default();
        selector.flags = TcU32SelectorFlags::Terminal;
        selector.nkeys = u8::try_from(self.keys.len()).map_err(|_| Error::RequestFailed)?;
        selector.keys = self.keys;
        let class = TcHandle { major: 0, minor: 1 };
        let mut options = vec![TcFilterU32Option::ClassId(class), TcFilterU32Option::Selector(selector)];
        options.extend(action.map(|action| TcFilterU32Option::Action(vec![action])));
        netlink
            .traffic_filter(device.cast_signed())
            .add()
            .parent(INGRESS_QDISC)
            .priority(self.priority)
            .protocol(self.protocol.to_be())
            .u32(&options)?
            .execute()
            .await
    }
}

/// What servers answer to the namespace's ports. IPv4 only without options, so that the ports are where they are
/// looked for, which is how DNS servers send.
fn answers_v4(transport: u8) -> Match {
    let keys = vec![
        key(0, 0xff00_0000, 0x4500_0000),
        key(4, 0x0000_1fff, 0),
        key(8, 0x00ff_0000, u32::from(transport) << 16),
        answer_ports(20),
    ];
    Match { protocol: ETH_P_IP, priority: 1, keys }
}

fn answers_v6(transport: u8) -> Match {
    let keys = vec![key(4, 0x0000_ff00, u32::from(transport) << 8), answer_ports(40)];
    Match { protocol: ETH_P_IPV6, priority: 2, keys }
}

fn answer_ports(offset: i32) -> TcU32Key {
    let own = u32::from(*OWN_PORTS.start());
    key(offset, 0xffff_0000 | own, u32::from(DNS_PORT) << 16 | own)
}

fn neighbour_advertisements() -> Match {
    let keys = vec![
        key(4, 0x0000_ff00, u32::from(ICMPV6) << 8),
        key(40, 0xff00_0000, u32::from(NEIGHBOUR_ADVERTISEMENT) << 24),
    ];
    Match { protocol: ETH_P_IPV6, priority: 2, keys }
}

fn arp_replies() -> Match {
    Match { protocol: ETH_P_ARP, priority: 3, keys: vec![key(4, 0x0000_ffff, u32::from(ARP_REPLY))] }
}

fn key(offset: i32, mask: u32, value: u32) -> TcU32Key {
    let mut key = TcU32Key::default();
    key.off = offset;
    key.mask = mask;
    key.val = value;
    key
}

fn mirred(to: u32, how: TcMirrorActionType, then: TcActionType) -> TcAction {
    let mut mirror = TcMirror::default();
    mirror.generic.action = then;
    mirror.eaction = how;
    mirror.ifindex = to;
    let options = vec![TcActionOption::Mirror(TcActionMirrorOption::Parms(mirror))];
    let mut action = TcAction::default();
    action.attributes =
        vec![TcActionAttribute::Kind(TcActionMirror::KIND.to_string()), TcActionAttribute::Options(options)];
    action
}
