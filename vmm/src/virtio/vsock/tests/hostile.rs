//! What no driver would do.

use super::*;

#[test]
fn packets_that_are_none_are_passed_over() {
    let mut guest = Guest::ready();
    let (mut client, port) = guest.connected();
    let header = packet(port, Op::Data).to_bytes();
    let outside = Piece::Raw { address: 1 << 40, length: 100, flags: 0, next: 0 };
    for piece in [Piece::Readable(&header[..43]), Piece::Writable(100), outside] {
        guest.send_raw(&[piece]);
    }
    assert_eq!(guest.receive(), []);
    guest.send(packet(port, Op::Data), b"sound");
    assert_eq!(read(&mut client), (b"sound".to_vec(), false));
}

#[test]
fn what_breaks_the_rules_ends_its_connection() {
    let data = packet(0, Op::Data);
    for (header, payload) in [
        (Header { len: 9, ..data }, &b"too short"[..8]),
        (Header { len: u32::MAX, ..data }, b"?"),
        (Header { op: None, ..data }, b""),
        (packet(0, Op::Request), b""),
        (packet(0, Op::Response), b""),
    ] {
        let mut guest = Guest::ready();
        let (mut client, port) = guest.connected();
        guest.send(packet(port, Op::Data), b"before");
        let header = Header { dst_port: port, ..header }.to_bytes();
        guest.send_raw(&[Piece::Readable(&header), Piece::Readable(payload)]);
        let answer = guest.receive_one().0;
        assert_eq!((answer.op, answer.src_port, answer.dst_port), (Some(Op::Reset), port, PORT));
        assert_eq!(read(&mut client), (b"before".to_vec(), true));
        assert!(guest.device.connections.is_empty());
    }
}

#[test]
fn data_before_the_connection_or_behind_its_end_is_refused() {
    let mut guest = Guest::ready();
    let mut client = guest.client();
    let (request, _) = guest.receive_one();
    guest.send(packet(request.src_port, Op::Data), b"too early");
    assert_eq!(guest.receive_op(), (Op::Reset, 0));
    assert_eq!(read(&mut client), (vec![], true));

    let (mut client, port) = guest.connected();
    guest.send(shutdown(port, NO_SEND), &[]);
    guest.send(packet(port, Op::Data), b"too late");
    assert_eq!(guest.receive_op(), (Op::Reset, 0));
    assert_eq!(read(&mut client), (vec![], true));
}

#[test]
fn a_guest_cannot_send_more_than_there_is_room_for() {
    let mut guest = Guest::ready();
    let (mut client, port) = guest.connected();
    let piece = pattern(64 * 1024);
    let mut sent = 0;
    while guest.device.connections.values().any(|entry| entry.connection.is_known_to_guest()) {
        guest.send(packet(port, Op::Data), &piece);
        sent += 1;
        assert!(sent < 32, "without bound");
    }
    let mut seen = Vec::new();
    let mut ended = false;
    while !ended {
        let (bytes, end) = read(&mut client);
        seen.extend(bytes);
        ended = end;
        guest.serve();
    }
    assert!(seen == piece.repeat(sent - 1), "what was taken is passed on");
}

#[test]
fn refusals_are_bounded() {
    let mut guest = Guest::new();
    for port in 0..2 * MAX_REFUSALS as u32 {
        guest.send(packet(port, Op::Data), &[]);
    }
    assert_eq!(guest.device.refusals.len(), MAX_REFUSALS);
    guest.offer(QUEUE_SIZE, 4096);
    assert_eq!(guest.receive().len(), MAX_REFUSALS);
}

#[test]
fn receive_buffers_without_room_are_given_back() {
    let mut guest = Guest::new();
    guest.knock();
    let small = guest.driver.put(RX, &[Piece::Writable(SIZE as u32)]);
    let readable = guest.driver.put(RX, &[Piece::Readable(&[0; 100])]);
    let outside = guest.driver.put(RX, &[Piece::Raw { address: 1 << 40, length: 4096, flags: 2, next: 0 }]);
    guest.offer(1, 4096);
    for request in [small, readable, outside] {
        assert_eq!(guest.driver.used(RX), Some((request.head, 0)));
    }
    assert_eq!(guest.take_one().unwrap().0.op, Some(Op::Reset));
}

#[test]
fn a_malformed_queue_is_an_error() {
    for queue in [RX, TX, EVENT] {
        let mut guest = Guest::ready();
        let (mut client, _) = guest.connected();
        client.write_all(b"for the guest").unwrap();
        guest.device.reset = Reset::Owed;
        (0..2 * QUEUE_SIZE).for_each(|_| guest.driver.offer(queue, 0));
        let mut served = guest.device.queue_ready(&mut guest.driver.io, queue);
        if queue == RX {
            for ready in guest.driver.io.poller.wait().unwrap() {
                served = served.and(guest.device.descriptor_ready(&mut guest.driver.io, ready));
            }
        }
        assert!(matches!(served, Err(DeviceError::Queue { .. })), "{queue}: {served:?}");
    }
}

/// Any packets in any order: nothing panics, nothing grows without bound, and the device rests in between.
#[test]
fn anything_goes() {
    let mut guest = Guest::ready();
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut random = move |below: u64| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 11) % below
    };
    guest.device.max_connections = 30;
    let payload = pattern(2000);
    let mut clients = Vec::new();
    for _ in 0..3000 {
        match random(8) {
            0 if clients.len() < 20 => clients.push(guest.client()),
            1 if !clients.is_empty() => drop(clients.swap_remove(random(clients.len() as u64) as usize)),
            2 => clients.iter_mut().for_each(|client| drop(client.write(&payload))),
            3 => clients.iter_mut().for_each(|client| drop(client.read(&mut [0; 4000]))),
            4 => {
                while guest.driver.used(RX).is_some() {
                    guest.offered.pop_front();
                }
            }
            5 if guest.offered.len() < usize::from(QUEUE_SIZE) => guest.offer(1, random(300) as u32),
            _ => {
                let mut ports: Vec<_> = guest.device.connections.keys().copied().collect();
                ports.sort_unstable();
                let port = if ports.is_empty() { 1 } else { ports[random(ports.len() as u64) as usize] };
                let length = random(500);
                let header = Header {
                    op: Header::parse(&[random(8) as u8; SIZE]).op,
                    flags: random(4) as u32,
                    len: if random(9) == 0 { random(1 << 32) as u32 } else { length as u32 },
                    buf_alloc: random(1 << 20) as u32,
                    fwd_cnt: random(1 << 17) as u32,
                    ..packet(port, Op::Data)
                };
                guest.send_raw(&[Piece::Readable(&header.to_bytes()), Piece::Readable(&payload[..length as usize])]);
            }
        }
        assert!(guest.device.turns.len() <= guest.device.connections.len());
        assert!(guest.device.connections.len() <= 30);
    }
}
