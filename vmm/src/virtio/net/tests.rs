//! The card with a driver on its one side, and on its other a tap in a network namespace of its own, or a pair of
//! sockets where a tap could not be made to do what is tested.

use std::os::fd::{AsFd, AsRawFd as _};
use std::{fs, mem, thread};

use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, recv, send, socketpair, sockopt};
use virtio_queue::QueueT as _;
use vm_memory::{Bytes as _, GuestAddress};

use super::tap::MAX_PIECES;
use super::*;
use crate::Event;
use crate::virtio::VirtQueue;
use crate::virtio::driver::{Driver, Piece, Request};

const MAC: [u8; 6] = [2, 0, 0, 0, 0, 1];
/// What Linux makes its buffers of at first.
const SMALL: u32 = 1526;
const IN: Ready = Ready { token: TAP, flags: EventFlags::IN };
const OUT: Ready = Ready { token: TAP, flags: EventFlags::OUT };
/// Where a header says how many buffers its frame is in.
const NUM_BUFFERS: usize = 10;
/// A header as a tap writes it, which leaves the guest's old bytes where the number of buffers is to be.
const STALE: [u8; HEADER] = [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 9, 9];

/// A card whose tap is the first of a pair of sockets, and the second.
fn card() -> (Net, Driver, OwnedFd) {
    let (tap, far) = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::NONBLOCK, None).unwrap();
    sockopt::set_socket_send_buffer_size(&far, 1 << 20).unwrap();
    let mut net = Net::new(tap, MAC, 1500);
    let driver = Driver::new(&net);
    net.attach(&driver.io).unwrap();
    (net, driver, far)
}

/// The next frame that the driver gets, without its header: the header, the frame and the number of its buffers.
fn received(driver: &mut Driver, buffers: &mut impl Iterator<Item = Request>) -> Option<(Vec<u8>, Vec<u8>, u16)> {
    let mut frame = Vec::new();
    let mut count = 0;
    loop {
        let (head, written) = driver.used(RECEIVE)?;
        let request = buffers.next().unwrap();
        assert_eq!(request.head, head);
        let mut bytes = driver.written(&request);
        assert!(bytes[written as usize..].iter().all(|&byte| byte == 0), "more was written than was said");
        bytes.truncate(written as usize);
        frame.extend(bytes);
        count += 1;
        if count == u16::from_le_bytes([frame[NUM_BUFFERS], frame[NUM_BUFFERS + 1]]) {
            return Some((frame[..HEADER].to_vec(), frame[HEADER..].to_vec(), count));
        }
    }
}

fn offer_buffers(driver: &mut Driver, count: usize) -> Vec<Request> {
    (0..count).map(|_| driver.put(RECEIVE, &[Piece::Writable(SMALL)])).collect()
}

fn pattern(length: usize) -> Vec<u8> {
    (0..length).map(|index| (index % 251) as u8 + 1).collect()
}

#[test]
fn the_configuration_names_address_link_and_mtu() {
    let (net, ..) = card();
    let expected = [2, 0, 0, 0, 0, 1, 1, 0, 1, 0, 0xdc, 5];
    assert_eq!(net.config().bytes(), expected);
    net.config().write(0, &[7; 12]);
    assert_eq!(net.config().bytes(), expected);
}

#[test]
fn the_tap_is_waited_for_only_while_there_is_room_for_a_frame() {
    let (mut net, mut driver, far) = card();
    net.queue_ready(&mut driver.io, RECEIVE).unwrap();
    assert_eq!(net.awaited, EventFlags::empty());
    let mut buffers = offer_buffers(&mut driver, 42);
    net.queue_ready(&mut driver.io, RECEIVE).unwrap();
    assert_eq!(net.awaited, EventFlags::empty(), "42 buffers are less than a frame may need");
    let frame = [&STALE[..], &pattern(60_000)].concat();
    send(&far, &frame, SendFlags::empty()).unwrap();
    net.queue_ready(&mut driver.io, RECEIVE).unwrap();
    assert_eq!(driver.used(RECEIVE), None);

    buffers.extend(offer_buffers(&mut driver, 1));
    net.queue_ready(&mut driver.io, RECEIVE).unwrap();
    let (_, bytes, count) = received(&mut driver, &mut buffers.into_iter()).unwrap();
    assert!(bytes == pattern(60_000) && count == 40, "{count}");
    assert!(driver.line.clear());
    assert_eq!(net.awaited, EventFlags::empty());

    offer_buffers(&mut driver, 40);
    net.queue_ready(&mut driver.io, RECEIVE).unwrap();
    assert_eq!(net.awaited, EventFlags::IN);
    assert!(!driver.line.clear());
}

#[test]
fn a_card_out_of_buffers_asks_to_be_told_of_the_next_one() {
    let (mut net, mut driver, far) = card();
    let mut queue = driver.io.queues.remove(RECEIVE).into_queue();
    queue.set_event_idx(true);
    let used_event = queue.avail_ring() + 4 + 2 * u64::from(QUEUE_SIZE);
    let avail_event = queue.used_ring() + 4 + 8 * u64::from(QUEUE_SIZE);
    driver.io.queues.insert(RECEIVE, VirtQueue::new(RECEIVE, queue, Event::new().unwrap(), driver.interrupt.clone()));
    driver.io.memory.write_obj(39u16, GuestAddress(used_event)).unwrap();
    let buffers = offer_buffers(&mut driver, 42);
    net.queue_ready(&mut driver.io, RECEIVE).unwrap();
    // Not 0: a driver kicks only when it goes past this number.
    assert_eq!(driver.io.memory.read_obj::<u16>(GuestAddress(avail_event)).unwrap(), 42);

    // And the driver is told when the device goes past the number that it waits for, in the middle of a frame or not.
    offer_buffers(&mut driver, 43);
    for (length, told) in [(38 * SMALL as usize, false), (5 * SMALL as usize, true), (100, false)] {
        send(&far, &vec![0; length], SendFlags::empty()).unwrap();
        net.descriptor_ready(&mut driver.io, IN).unwrap();
        assert_eq!(driver.line.clear(), told, "{length}");
    }
    assert_eq!(driver.used(RECEIVE), Some((buffers[0].head, SMALL)));
}

#[test]
fn buffers_without_frames_stay_in_the_queue() {
    let (mut net, mut driver, far) = card();
    let mut buffers = offer_buffers(&mut driver, 60).into_iter();
    for length in [14, SMALL as usize, 64] {
        send(&far, &[&STALE[..], &pattern(length)].concat(), SendFlags::empty()).unwrap();
    }
    net.queue_ready(&mut driver.io, RECEIVE).unwrap();
    for (length, count) in [(14, 1), (SMALL as usize, 2), (64, 1)] {
        assert!(received(&mut driver, &mut buffers) == Some((header(count), pattern(length), count)), "{length}");
    }
    assert_eq!(driver.io.queues.remove(RECEIVE).into_queue().next_avail(), 4);
}

fn header(buffers: u16) -> Vec<u8> {
    let mut header = vec![0; HEADER];
    header[NUM_BUFFERS..].copy_from_slice(&buffers.to_le_bytes());
    header
}

#[test]
fn without_mergeable_buffers_a_frame_has_one_of_any_shape() {
    let (mut net, mut driver, far) = card();
    driver.io.features &= !(1 << VIRTIO_NET_F_MRG_RXBUF);
    let shape = [Piece::Writable(5), Piece::Writable(6), Piece::Writable(1), Piece::Writable(2000)];
    let mut buffers = [driver.put(RECEIVE, &shape), driver.put(RECEIVE, &shape)].into_iter();
    for length in [1000, 3000] {
        send(&far, &[&[0; HEADER][..], &pattern(length)].concat(), SendFlags::empty()).unwrap();
    }
    net.queue_ready(&mut driver.io, RECEIVE).unwrap();
    assert!(received(&mut driver, &mut buffers) == Some((header(1), pattern(1000), 1)));
    let (_, cut, _) = received(&mut driver, &mut buffers).unwrap();
    assert!(cut == pattern(3000)[..2000]);
    assert_eq!(net.awaited, EventFlags::empty());
}

#[test]
fn a_full_tap_is_waited_for_and_nothing_is_lost() {
    let (mut net, mut driver, far) = card();
    sockopt::set_socket_send_buffer_size(&net.tap, 1 << 14).unwrap();
    let frames: Vec<_> = (0..80).map(|number| [&[0; HEADER][..], &[number; 1000]].concat()).collect();
    let requests: Vec<_> = frames.iter().map(|frame| driver.put(TRANSMIT, &[Piece::Readable(frame)]).head).collect();
    net.queue_ready(&mut driver.io, TRANSMIT).unwrap();
    assert_eq!(net.awaited, EventFlags::OUT);
    let mut arrived = Vec::new();
    let mut bytes = [0; 2000];
    while arrived.len() < frames.len() {
        while let Ok((_, length)) = recv(&far, &mut bytes, RecvFlags::empty()) {
            arrived.push(bytes[..length].to_vec());
        }
        net.descriptor_ready(&mut driver.io, OUT).unwrap();
    }
    assert!(arrived == frames);
    assert_eq!(net.awaited, EventFlags::empty());
    for head in requests {
        assert_eq!(driver.used(TRANSMIT), Some((head, 0)));
    }
}

#[test]
fn one_direction_does_not_keep_the_other_waiting() {
    let (mut net, mut driver, far) = card();
    sockopt::set_socket_send_buffer_size(&net.tap, 1 << 20).unwrap();
    (0..100).for_each(|_| drop(driver.put(TRANSMIT, &[Piece::Readable(&[0; HEADER + 14])])));
    net.queue_ready(&mut driver.io, TRANSMIT).unwrap();
    assert_eq!((0..).map_while(|_| driver.used(TRANSMIT)).count(), FRAMES_PER_TURN);
    // The queue has been kicked for the rest.
    let kick = driver.io.queues[TRANSMIT].kick_descriptor();
    assert!(kick.clear());
    net.queue_ready(&mut driver.io, TRANSMIT).unwrap();
    assert_eq!((0..).map_while(|_| driver.used(TRANSMIT)).count(), 100 - FRAMES_PER_TURN);
    drop(far);
}

#[test]
fn a_tap_that_is_gone_ends_the_device() {
    let (mut net, mut driver, far) = card();
    drop(far);
    let ready = Ready { token: TAP, flags: EventFlags::IN | EventFlags::HUP };
    assert!(matches!(net.descriptor_ready(&mut driver.io, ready), Err(DeviceError::Host { .. })));
    offer_buffers(&mut driver, 50);
    assert!(matches!(net.queue_ready(&mut driver.io, RECEIVE), Err(DeviceError::Host { .. })));
    driver.put(TRANSMIT, &[Piece::Readable(&[0; HEADER + 14])]);
    assert!(matches!(net.queue_ready(&mut driver.io, TRANSMIT), Err(DeviceError::Host { .. })));
}

#[test]
fn impossible_buffers_end_the_device() {
    let raw = |address, length, flags| Piece::Raw { address, length, flags, next: 0 };
    for (queue, piece) in [
        (RECEIVE, Piece::Writable(HEADER as u32 - 1)),
        (RECEIVE, Piece::Readable(&[0; 100])),
        (RECEIVE, raw(1 << 40, 2000, 2)),
        (RECEIVE, raw((8 << 20) - 100, 2000, 2)),
        (RECEIVE, raw(u64::MAX, u32::MAX, 2)),
        // A chain that is its own next: as long as the queue at most.
        (RECEIVE, raw(0, 0, 3)),
        (TRANSMIT, raw(1 << 40, 100, 0)),
        (TRANSMIT, raw(u64::MAX - 10, 100, 0)),
    ] {
        let (mut net, mut driver, _far) = card();
        driver.put(queue, &[piece]);
        let end = net.queue_ready(&mut driver.io, queue);
        assert!(
            matches!(&end, Err(DeviceError::Queue { queue: at, .. }) if *at == queue),
            "{queue} {piece:?}: {end:?}"
        );
    }
}

#[test]
fn what_cannot_be_a_frame_is_dropped_and_the_next_one_sent() {
    let (mut net, mut driver, far) = card();
    // Indirect descriptors of one byte each, more than a system call takes.
    let table: Vec<u8> = (1..=MAX_PIECES as u16 + 1)
        .flat_map(|next| {
            let follows = u16::from(usize::from(next) <= MAX_PIECES);
            let (flags, next) = (follows.to_le_bytes(), next.to_le_bytes());
            [&(6u64 << 20).to_le_bytes()[..], &1u32.to_le_bytes(), &flags, &next].concat()
        })
        .collect();
    let at = 5 << 20;
    driver.io.memory.write_slice(&table, GuestAddress(at)).unwrap();
    let long = vec![0; HEADER + MAX_FRAME + 1];
    let sound = [0; HEADER + 60];
    for piece in [
        Piece::Raw { address: at, length: table.len() as u32, flags: 4, next: 0 },
        Piece::Readable(&long),
        Piece::Writable(100),
        Piece::Readable(&sound),
    ] {
        driver.put(TRANSMIT, &[piece]);
    }
    net.queue_ready(&mut driver.io, TRANSMIT).unwrap();
    assert_eq!((0..).map_while(|_| driver.used(TRANSMIT)).count(), 4);
    let mut bytes = [0; 100];
    let mut lengths = Vec::new();
    while let Ok((_, length)) = recv(&far, &mut bytes, RecvFlags::empty()) {
        lengths.push(length);
    }
    // The one without anything to send arrives as nothing from a socket; a tap does not even see it.
    lengths.retain(|&length| length > 0);
    assert_eq!(lengths, [sound.len()]);
}

/// A tap in a network namespace that only this thread is in, and a socket on the tap's other side that sends and
/// receives frames behind headers of [`SOCKET_HEADER`].
struct Wire {
    net: Net,
    driver: Driver,
    socket: OwnedFd,
}

const SOCKET_HEADER: usize = 10;

fn on_a_wire(features: u64, test: impl FnOnce(Wire) + Send + 'static) {
    let thread = thread::spawn(move || {
        let (tap, socket) = tap_and_socket();
        let mut net = Net::new(tap, MAC, 1500);
        let mut driver = Driver::new(&net);
        driver.io.features = features;
        net.start(&mut driver.io).unwrap();
        net.queue_ready(&mut driver.io, RECEIVE).unwrap();
        test(Wire { net, driver, socket });
    });
    thread.join().unwrap();
}

/// What the C library answers, or its error.
fn check(result: libc::c_int) -> libc::c_int {
    assert!(result >= 0, "{}", io::Error::last_os_error());
    result
}

fn tap_and_socket() -> (OwnedFd, OwnedFd) {
    // SAFETY: changes the namespace of this thread alone.
    check(unsafe { libc::unshare(libc::CLONE_NEWNET) });
    // The kernel's own frames would mix with the test's. Kernels without IPv6 send none.
    let _ = fs::write("/proc/sys/net/ipv6/conf/default/disable_ipv6", "1");
    let tap = rustix::fs::open(
        "/dev/net/tun",
        rustix::fs::OFlags::RDWR | rustix::fs::OFlags::NONBLOCK,
        rustix::fs::Mode::empty(),
    )
    .unwrap();
    // SAFETY: a plain C structure of integers, for which zeros are valid.
    let mut request: libc::ifreq = unsafe { mem::zeroed() };
    request.ifr_name[..3].copy_from_slice(&[b't' as i8, b'a' as i8, b'p' as i8]);
    request.ifr_ifru.ifru_flags = (libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR) as i16;
    // SAFETY: TUNSETIFF reads and writes a `struct ifreq`.
    check(unsafe { libc::ioctl(tap.as_raw_fd(), libc::TUNSETIFF, &mut request) });
    request.ifr_ifru.ifru_flags = libc::IFF_UP as i16;
    let all = rustix::net::eth::ALL;
    let family = AddressFamily::PACKET;
    let socket = rustix::net::socket(family, SocketType::RAW, Some(all)).unwrap();
    // SAFETY: SIOCSIFFLAGS reads a `struct ifreq`.
    check(unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCSIFFLAGS, &mut request) });
    let on = 1i32;
    // SAFETY: the option is an `int`.
    check(unsafe {
        libc::setsockopt(socket.as_raw_fd(), libc::SOL_PACKET, libc::PACKET_VNET_HDR, (&raw const on).cast(), 4)
    });
    let index = rustix::net::netdevice::name_to_index(&socket, "tap").unwrap();
    // SAFETY: a plain C structure of integers, for which zeros are valid.
    let mut address: libc::sockaddr_ll = unsafe { mem::zeroed() };
    address.sll_family = libc::AF_PACKET as u16;
    address.sll_protocol = (libc::ETH_P_ALL as u16).to_be();
    address.sll_ifindex = index as i32;
    let size = size_of_val(&address) as u32;
    // SAFETY: the address is one of the socket's family, and of that size.
    check(unsafe { libc::bind(socket.as_raw_fd(), (&raw const address).cast(), size) });
    let patience = Some(std::time::Duration::from_secs(10));
    sockopt::set_socket_timeout(&socket, sockopt::Timeout::Recv, patience).unwrap();
    (tap, socket)
}

/// What a card that leaves segmentation to the next one writes before a frame.
const UNSEGMENTED: [u8; SOCKET_HEADER] = {
    let (segment, header) = (1448u16.to_le_bytes(), 54u16.to_le_bytes());
    [1, 1, header[0], header[1], segment[0], segment[1], 34, 0, 16, 0]
};

/// A TCP segment of many kilobytes.
fn large_frame(payload: usize) -> Vec<u8> {
    let mut frame = [&MAC[..], &[2, 0, 0, 0, 0, 2], &[8, 0]].concat();
    let total = (payload + 40) as u16;
    frame.extend([0x45, 0]);
    frame.extend(total.to_be_bytes());
    frame.extend([0, 0, 0x40, 0, 64, 6, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2]);
    frame.extend([0, 80, 0, 80, 0, 0, 0, 0, 0, 0, 0, 0, 0x50, 0x10, 0xff, 0xff, 0, 0, 0, 0]);
    frame.extend(pattern(payload));
    frame
}

fn receive_from(socket: impl AsFd) -> (Vec<u8>, Vec<u8>) {
    let mut bytes = vec![0; 1 << 17];
    let (_, length) = recv(socket, &mut bytes[..], RecvFlags::empty()).unwrap();
    (bytes[..SOCKET_HEADER].to_vec(), bytes[SOCKET_HEADER..length].to_vec())
}

#[test]
fn large_frames_cross_a_tap_whole() {
    on_a_wire(FEATURES, |mut wire| {
        let frame = large_frame(60_000);
        let mut buffers = offer_buffers(&mut wire.driver, 100).into_iter();
        wire.net.queue_ready(&mut wire.driver.io, RECEIVE).unwrap();
        send(&wire.socket, &[&UNSEGMENTED[..], &frame].concat(), SendFlags::empty()).unwrap();
        let ready = wire.driver.io.poller.wait().unwrap()[0];
        wire.net.descriptor_ready(&mut wire.driver.io, ready).unwrap();
        let (header, bytes, count) = received(&mut wire.driver, &mut buffers).unwrap();
        assert_eq!((count, &header[..SOCKET_HEADER]), (40, &UNSEGMENTED[..]));
        assert!(bytes[54..] == frame[54..]);

        let (head, tail) = frame.split_at(30_000);
        let header = [&UNSEGMENTED[..], &[0, 0]].concat();
        let pieces = [Piece::Readable(&header), Piece::Readable(head), Piece::Readable(tail)];
        let sent = wire.driver.put(TRANSMIT, &pieces).head;
        wire.net.queue_ready(&mut wire.driver.io, TRANSMIT).unwrap();
        assert_eq!(wire.driver.used(TRANSMIT), Some((sent, 0)));
        assert!(receive_from(&wire.socket) == (UNSEGMENTED.to_vec(), frame));
    });
}

#[test]
fn the_tap_segments_for_a_driver_that_cannot() {
    on_a_wire(FEATURES & !(1 << VIRTIO_NET_F_GUEST_TSO4 | 1 << VIRTIO_NET_F_GUEST_TSO6), |mut wire| {
        let frame = large_frame(14_480);
        let mut buffers = offer_buffers(&mut wire.driver, 12).into_iter();
        send(&wire.socket, &[&UNSEGMENTED[..], &frame].concat(), SendFlags::empty()).unwrap();
        wire.net.queue_ready(&mut wire.driver.io, RECEIVE).unwrap();
        let mut payload = Vec::new();
        while let Some((header, bytes, count)) = received(&mut wire.driver, &mut buffers) {
            assert_eq!((header[1], bytes.len(), count), (0, 1502, 1));
            payload.extend_from_slice(&bytes[54..]);
        }
        assert!(payload == frame[54..]);
    });
}

#[test]
fn headers_that_the_tap_refuses_lose_their_frames_only() {
    on_a_wire(FEATURES, |mut wire| {
        let frame = large_frame(100);
        let bad: [&[u8]; 5] = [
            &[0, 0x7f, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0],
            &[1, 0, 0, 0, 0, 0, 0xff, 0xff, 0xff, 0xff, 0, 0],
            &[1, 1, 0xff, 0xff, 0, 0, 34, 0, 16, 0, 0, 0],
            &[1, 3, 54, 0, 200, 0, 200, 0, 6, 0, 0, 0],
            &[0; 5],
        ];
        for header in bad {
            let body = if header.len() < HEADER { &[][..] } else { &frame[..] };
            wire.driver.put(TRANSMIT, &[Piece::Readable(header), Piece::Readable(body)]);
        }
        wire.driver.put(TRANSMIT, &[Piece::Readable(&[0; HEADER]), Piece::Readable(&frame)]);
        wire.net.queue_ready(&mut wire.driver.io, TRANSMIT).unwrap();
        assert_eq!((0..).map_while(|_| wire.driver.used(TRANSMIT)).count(), bad.len() + 1);
        assert_eq!(receive_from(&wire.socket).1, frame);
    });
}
