//! Bytes flow both ways, are held back, and end.

use super::*;

#[test]
fn more_than_all_buffers_goes_both_ways_at_once() {
    const LENGTH: usize = 1 << 20;
    const PIECE: usize = 40_000;
    let mut guest = Guest::ready();
    let (mut client, port) = guest.connected();
    let sent = pattern(LENGTH);
    let (mut to_guest, mut to_host) = (sent.as_slice(), sent.as_slice());
    let (mut at_guest, mut at_host) = (Vec::new(), Vec::new());
    let mut forwarded = 0;
    while at_guest.len() < LENGTH || at_host.len() < LENGTH {
        if let Ok(written) = client.write(to_guest) {
            to_guest = &to_guest[written..];
        }
        guest.serve();
        for (header, payload) in guest.receive() {
            at_guest.extend(payload);
            forwarded = header.fwd_cnt;
        }
        let in_flight = LENGTH - to_host.len() - forwarded as usize;
        let piece = PIECE.min(to_host.len()).min(BUF_ALLOC as usize - in_flight);
        let header = Header { fwd_cnt: at_guest.len() as u32, ..packet(port, Op::Data) };
        let header = if piece == 0 { Header { op: Some(Op::CreditRequest), ..header } } else { header };
        guest.send(header, &to_host[..piece]);
        to_host = &to_host[piece..];
        at_host.extend(read(&mut client).0);
    }
    assert!(at_guest == sent && at_host == sent);
}

#[test]
fn the_guests_room_is_respected() {
    let mut guest = Guest::ready();
    let (mut client, port) = guest.connected();
    client.write_all(&pattern(ROOM as usize + 10)).unwrap();
    guest.serve();
    let packets = guest.receive();
    let (data, last) = packets.split_at(packets.len() - 1);
    assert!(data.iter().all(|(header, _)| header.op == Some(Op::Data)));
    let seen: Vec<u8> = data.iter().flat_map(|(_, payload)| payload.clone()).collect();
    assert!(seen == pattern(ROOM as usize));
    assert_eq!(last[0].0.op, Some(Op::CreditRequest));

    guest.send(packet(port, Op::CreditUpdate), &[]);
    assert_eq!(guest.receive(), [], "there is no room, and it has been asked for");
    guest.send(Header { fwd_cnt: 4, ..packet(port, Op::CreditUpdate) }, &[]);
    let packets = guest.receive();
    assert_eq!(packets[0].1, pattern(ROOM as usize + 10)[ROOM as usize..][..4]);
    assert_eq!((packets.len(), packets[1].0.op), (2, Some(Op::CreditRequest)));
    guest.send(Header { fwd_cnt: ROOM, ..packet(port, Op::CreditUpdate) }, &[]);
    assert_eq!(guest.receive_one().1, pattern(ROOM as usize + 10)[ROOM as usize + 4..]);
}

/// Sends until the guest has no more room; how much that was.
fn flood(guest: &mut Guest, port: u32) -> usize {
    let piece = pattern(32 * 1024);
    let (mut sent, mut forwarded) = (0u32, 0);
    while sent - forwarded < BUF_ALLOC {
        guest.send(packet(port, Op::Data), &piece);
        sent += piece.len() as u32;
        if let Some((header, _)) = guest.receive().last() {
            forwarded = header.fwd_cnt;
        }
    }
    sent as usize
}

#[test]
fn a_reader_that_stops_holds_up_its_own_stream_alone() {
    let mut guest = Guest::ready();
    let (mut slow, slow_port) = guest.connected();
    let (mut quick, quick_port) = guest.connected();
    let sent = flood(&mut guest, slow_port);
    assert!(sent > BUF_ALLOC as usize);
    guest.send(packet(quick_port, Op::Data), b"quick");
    assert_eq!(read(&mut quick).0, b"quick");
    guest.send(shutdown(slow_port, NEITHER), &[]);
    assert_eq!(guest.receive_op(), (Op::Reset, 0));

    let mut seen = Vec::new();
    let mut ended = false;
    while !ended {
        let (bytes, end) = read(&mut slow);
        seen.extend(bytes);
        ended = end;
        guest.serve();
    }
    assert!(seen == pattern(32 * 1024).repeat(sent / (32 * 1024)), "nothing is lost when the guest closes");
    assert_eq!(guest.device.connections.len(), 1);
}

#[test]
fn the_guest_learns_of_room_when_a_reader_goes_on() {
    let mut guest = Guest::ready();
    let (mut client, port) = guest.connected();
    let sent = flood(&mut guest, port) as u32;
    let mut seen = 0;
    let mut told = 0;
    while seen < sent {
        seen += read(&mut client).0.len() as u32;
        guest.serve();
        for (header, _) in guest.receive() {
            assert_eq!(header.op, Some(Op::CreditUpdate));
            told = header.fwd_cnt;
        }
    }
    assert!(sent - told < BUF_ALLOC / 2 + 1, "{sent} {told}");
    guest.send(packet(port, Op::CreditRequest), &[]);
    let (header, _) = guest.receive_one();
    assert_eq!((header.op, header.fwd_cnt), (Some(Op::CreditUpdate), sent));
}

#[test]
fn a_guest_with_a_small_window_does_not_wait_in_vain() {
    let mut guest = Guest::ready();
    let (mut client, port) = guest.connected();
    for (buf_alloc, told) in [(1000, Some(500)), (1001, Some(1000)), (1002, None), (0, Some(2000))] {
        guest.send(Header { buf_alloc, ..packet(port, Op::Data) }, &[7; 500]);
        assert_eq!(read(&mut client).0.len(), 500);
        assert_eq!(guest.receive().first().map(|(header, _)| header.fwd_cnt), told, "{buf_alloc}");
    }
    guest.send(Header { buf_alloc: 0, ..packet(port, Op::CreditUpdate) }, &[]);
    assert_eq!(guest.receive(), [], "it knows");
}

#[test]
fn the_host_ends_its_half_behind_its_last_byte() {
    let mut guest = Guest::ready();
    let (mut client, port) = guest.connected();
    client.write_all(b"question").unwrap();
    client.shutdown(std::net::Shutdown::Write).unwrap();
    guest.serve();
    let packets = guest.receive();
    assert_eq!(packets[0].1, b"question");
    assert_eq!((packets[1].0.op, packets[1].0.flags), (Some(Op::Shutdown), NO_SEND));
    assert_eq!(packets.len(), 2);
    guest.send(packet(port, Op::Data), b"answer");
    guest.send(shutdown(port, NO_SEND), &[]);
    assert_eq!(read(&mut client), (b"answer".to_vec(), true));
    // Nothing can follow from either side.
    assert_eq!(guest.receive_op(), (Op::Shutdown, NEITHER));
    assert!(guest.device.connections.is_empty());
}

#[test]
fn the_guest_ends_its_half_behind_its_last_byte() {
    let mut guest = Guest::ready();
    let (mut client, port) = guest.connected();
    guest.send(packet(port, Op::Data), b"question");
    guest.send(shutdown(port, NO_SEND), &[]);
    assert_eq!(read(&mut client), (b"question".to_vec(), true));
    client.write_all(b"answer").unwrap();
    guest.serve();
    assert_eq!(guest.receive_one().1, b"answer");
    drop(client);
    guest.serve();
    assert_eq!(guest.receive_op(), (Op::Shutdown, NEITHER));
    guest.send(packet(port, Op::Reset), &[]);
    assert_eq!(guest.receive(), []);
}

#[test]
fn a_writer_learns_that_the_guest_listens_no_more() {
    let mut guest = Guest::ready();
    let (mut client, port) = guest.connected();
    guest.send(shutdown(port, NO_RECEIVE), &[]);
    assert_eq!(client.write(b"?").unwrap_err().kind(), ErrorKind::BrokenPipe);
    guest.send(packet(port, Op::Data), b"but speaks");
    assert_eq!(read(&mut client), (b"but speaks".to_vec(), false));
    drop(client);
    guest.serve();
    assert_eq!(guest.receive_op(), (Op::Shutdown, NEITHER));
}

#[test]
fn what_a_client_wrote_before_it_went_arrives() {
    let mut guest = Guest::ready();
    let mut client = guest.client();
    let (request, _) = guest.receive_one();
    client.write_all(&pattern(100_000)).unwrap();
    drop(client);
    guest.serve();
    let room = Header { buf_alloc: 1 << 20, ..packet(request.src_port, Op::Response) };
    guest.send(room, &[]);
    let mut packets = guest.receive();
    let (end, _) = packets.pop().unwrap();
    assert_eq!((end.op, end.flags), (Some(Op::Shutdown), NEITHER));
    assert!(packets.into_iter().flat_map(|(_, payload)| payload).eq(pattern(100_000)));
}

#[test]
fn a_client_that_goes_sets_a_waiting_guest_free() {
    let mut guest = Guest::ready();
    let (mut client, port) = guest.connected();
    let sent = flood(&mut guest, port) as u32;
    // The guest does not read: what the client says at last has to wait, that it went has not.
    client.write_all(&pattern(ROOM as usize + 1)).unwrap();
    guest.serve();
    guest.receive();
    drop(client);
    guest.serve();
    let (end, _) = guest.receive_one();
    assert_eq!((end.op, end.flags, end.fwd_cnt), (Some(Op::Shutdown), NO_RECEIVE, sent));
    guest.send(packet(port, Op::Data), b"nobody hears it");
    guest.send(Header { fwd_cnt: ROOM, ..packet(port, Op::CreditUpdate) }, &[]);
    let packets = guest.receive();
    assert_eq!(packets[0].1.len(), 1);
    assert_eq!((packets[1].0.op, packets[1].0.flags), (Some(Op::Shutdown), NEITHER));
    assert_eq!(packets[1].0.fwd_cnt, sent + 15);
}

#[test]
fn what_there_is_for_a_guest_without_buffers_waits() {
    let mut guest = Guest::new();
    guest.knock();
    let mut clients: Vec<_> = (0..50).map(|_| guest.client()).collect();
    guest.serve();
    guest.offer(1, 4096);
    assert_eq!(guest.take_one().unwrap().0.op, Some(Op::Reset));
    let mut ports = Vec::new();
    for _ in 0..clients.len() {
        guest.offer(1, 4096);
        let (request, _) = guest.take_one().unwrap();
        assert_eq!(request.op, Some(Op::Request));
        ports.push(request.src_port);
    }
    for (client, &port) in clients.iter_mut().zip(&ports) {
        guest.send(packet(port, Op::Response), &[]);
        client.write_all(&[7; 5000]).unwrap();
    }
    guest.serve();
    let mut bytes = 0;
    while bytes < 5000 * clients.len() {
        guest.offer(1, 1044);
        let (header, payload) = guest.take_one().unwrap();
        assert_eq!(header.op, Some(Op::Data));
        bytes += payload.len();
    }
    assert_eq!(bytes, 5000 * clients.len());
}
