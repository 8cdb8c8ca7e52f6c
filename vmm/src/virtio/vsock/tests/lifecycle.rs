//! Connections come, are refused, outlive pauses, and end with their machine.

use super::*;

#[test]
fn the_guest_knocks_and_is_connected_to_those_who_wait() {
    let mut guest = Guest::new();
    guest.offer(QUEUE_SIZE, 4096);
    let mut early = guest.client();
    early.write_all(b"early").unwrap();
    guest.serve();
    assert_eq!(guest.receive(), [], "the guest does not listen yet");
    assert!(!guest.knocked.clear());

    guest.knock();
    assert!(guest.knocked.clear());
    let packets = guest.receive();
    assert_eq!(packets.len(), 2);
    let (answer, request) = (packets[0].0, packets[1].0);
    assert_eq!((answer.op, answer.src_port, answer.dst_port), (Some(Op::Reset), PORT, 5000));
    assert_eq!(request.op, Some(Op::Request));
    guest.send(packet(request.src_port, Op::Response), &[]);
    assert_eq!(guest.receive_one().1, b"early");

    guest.knock();
    assert_eq!(guest.receive_op(), (Op::Reset, 0));
    assert!(!guest.knocked.clear(), "it is known already");
}

#[test]
fn the_guest_opens_no_connections() {
    let mut guest = Guest::new();
    guest.offer(QUEUE_SIZE, 4096);
    let base = packet(0, Op::Request);
    for refused in [
        Header { dst_port: PORT + 1, ..base },
        Header { dst_port: PORT, dst_cid: 5, ..base },
        Header { dst_port: PORT, kind: 2, ..base },
        Header { op: Some(Op::Data), ..base },
        Header { op: None, ..base },
    ] {
        guest.send(refused, &[]);
        let (answer, _) = guest.receive_one();
        assert_eq!(answer, refused.refusal(), "{refused:?}");
        assert_eq!((answer.src_cid, answer.src_port), (refused.dst_cid, refused.dst_port));
        assert_eq!((answer.dst_cid, answer.dst_port), (refused.src_cid, refused.src_port));
    }
    for unanswered in [Header { op: Some(Op::Reset), ..base }, Header { src_cid: 4, dst_port: PORT, ..base }] {
        guest.send(unanswered, &[]);
        assert_eq!(guest.receive(), [], "{unanswered:?}");
    }
    assert!(!guest.knocked.clear(), "none of these says that the guest listens");
}

#[test]
fn a_refused_client_sees_the_end() {
    let mut guest = Guest::ready();
    let mut client = guest.client();
    let (request, _) = guest.receive_one();
    guest.send(packet(request.src_port, Op::Reset), &[]);
    assert_eq!(read(&mut client), (vec![], true));
    assert!(guest.device.connections.is_empty());
    assert_eq!(guest.receive(), []);
}

#[test]
fn too_many_clients_are_turned_away() {
    let mut guest = Guest::ready();
    guest.device.max_connections = 2;
    let (mut first, port) = guest.connected();
    let _second = guest.connected();
    let mut third = guest.client();
    assert_eq!(read(&mut third), (vec![], true));
    assert_eq!(guest.receive(), []);
    guest.send(packet(port, Op::Reset), &[]);
    assert_eq!(read(&mut first), (vec![], true));
    guest.connected();
}

#[test]
fn ports_are_not_taken_twice() {
    let mut guest = Guest::ready();
    guest.device.next_port = u32::MAX - 1;
    let ports: Vec<_> = (0..3).map(|_| guest.connected()).collect();
    assert_eq!(ports.iter().map(|(_, port)| *port).collect::<Vec<_>>(), [u32::MAX - 1, FIRST_PORT, FIRST_PORT + 1]);
    guest.device.next_port = FIRST_PORT;
    assert_eq!(guest.connected().1, FIRST_PORT + 2);
}

#[test]
fn a_pause_changes_nothing() {
    let mut guest = Guest::ready();
    let (mut client, port) = guest.connected();
    guest.driver.io.poller = Poller::new().unwrap();
    client.write_all(b"during").unwrap();
    guest.driver.io.poller.add(&guest.sentinel, SENTINEL, EventFlags::IN).unwrap();
    guest.device.start(&mut guest.driver.io).unwrap();
    guest.serve();
    assert_eq!(guest.receive_one().1, b"during");
    guest.send(packet(port, Op::Data), b"after");
    assert_eq!(read(&mut client), (b"after".to_vec(), false));
    guest.connected();
}

#[test]
fn a_driver_that_starts_anew_has_no_connections() {
    let mut guest = Guest::ready();
    let (mut client, port) = guest.connected();
    guest.device.reset();
    assert_eq!(read(&mut client), (vec![], true));
    guest.send(packet(port, Op::Data), b"?");
    assert_eq!(guest.receive_op(), (Op::Reset, 0));
}

/// A guest whose device took over from this one's.
fn restored(guest: &mut Guest) -> Guest {
    let state = guest.device.save().unwrap();
    let mut other = Guest::new();
    other.device.restore(&state).unwrap();
    other.device.start(&mut other.driver.io).unwrap();
    other.offer(QUEUE_SIZE, 4096);
    other
}

fn offer_events(guest: &mut Guest, count: u16) -> Vec<Request> {
    let events = (0..count).map(|_| guest.driver.put(EVENT, &[Piece::Writable(4)])).collect();
    guest.device.queue_ready(&mut guest.driver.io, EVENT).unwrap();
    guest.serve();
    events
}

#[test]
fn a_template_is_restored_ready_and_in_silence() {
    let mut template = Guest::ready();
    let (client, _) = template.connected();
    drop(client);
    template.serve();
    assert_eq!(template.receive_op(), (Op::Shutdown, NEITHER));

    let mut guest = restored(&mut template);
    let _waiting = guest.client();
    assert_eq!(guest.receive_one().0.op, Some(Op::Request));
    offer_events(&mut guest, 8);
    assert_eq!(guest.driver.used(EVENT), None);
    assert!(!guest.knocked.clear());
}

#[test]
fn a_restored_guest_hears_that_its_connections_are_gone() {
    let mut first = Guest::ready();
    let (_client, port) = first.connected();
    let mut guest = restored(&mut first);
    let _waiting = guest.client();
    let events = offer_events(&mut guest, 4);
    assert_eq!(guest.driver.used(EVENT), Some((events[0].head, 4)));
    assert_eq!(guest.driver.written(&events[0]), TRANSPORT_RESET);
    assert_eq!(guest.receive(), [], "the guest would reset what connects before it has taken note");

    // What it still says on the old connection.
    guest.send(packet(port, Op::Data), b"?");
    assert_eq!(guest.receive_op(), (Op::Reset, 0));

    // Saved once more before the guest took note: it has to be told again.
    let mut again = restored(&mut guest);
    offer_events(&mut again, 8);
    assert!(again.driver.used(EVENT).is_some());

    offer_events(&mut guest, 1);
    let (request, _) = guest.receive_one();
    assert_eq!(request.op, Some(Op::Request));
    assert_ne!(request.src_port, port, "the guest may still have a socket for it");
    assert_eq!(guest.driver.used(EVENT), None, "it is told once");
    guest.send(packet(request.src_port, Op::Reset), &[]);
    let mut last = restored(&mut guest);
    offer_events(&mut last, 8);
    assert_eq!(last.driver.used(EVENT), None, "nothing was open");
}

#[test]
fn a_damaged_state_is_refused() {
    let mut guest = Guest::ready();
    let state = guest.device.save().unwrap();
    let mut other = Guest::new();
    other.device.restore(&state).unwrap();
    for damaged in [&[][..], &[2, 0, 0], &[1], &[1, 0, 255, 255, 255, 255, 255], &[state.as_slice(), &[0]].concat()] {
        assert!(other.device.restore(damaged).is_err(), "{damaged:?}");
    }
}
