use std::time::{Duration, Instant};

use super::super::lookout::Spans;
use super::*;

const LONG: Duration = Duration::from_secs(3600);

/// With these nothing but the test makes the thread stop, however busy the host is.
const UNDISTURBED: Spans = Spans { soon: LONG, patience: LONG, shift: LONG, taken: LONG };

/// What takes so long never comes.
const HANGS: Duration = Duration::from_secs(60);

/// A guest that asks until its device's thread is called to look for requests, and the request that it makes. None where
/// there is no other processor to look on.
fn asking(root: &Path, spans: Spans) -> Option<(Guest, Vec<u8>)> {
    if sched_getaffinity(None).unwrap().count() < 2 {
        eprintln!("there is no other processor to look on");
        return None;
    }
    let device = Fs::build("share", served(root), Some(Lookout::new(spans))).unwrap();
    let mut guest = Client::new(device).unwrap();
    guest.begin().unwrap();
    let request = guest.compose(Opcode::Getattr as u32, ROOT, &[&[0; 16]]);
    let called = (0..100).any(|_| {
        put(&mut guest.driver, &request);
        guest.device.desk.attend(REQUESTS).unwrap();
        assert!(guest.driver.used(REQUESTS).is_some());
        guest.driver.io.queues[REQUESTS].kick_descriptor().clear()
    });
    assert!(called);
    Some((guest, request))
}

/// Has the device's thread do what it is called for, and puts a request as soon as it looks. It looks no more once what is
/// awaited has come. Whether the request was answered, and whether the thread ended by itself.
fn asked_while_looking((guest, request): &mut (Guest, Vec<u8>), awaited: Awaited) -> (bool, bool) {
    let Client { device, driver, .. } = guest;
    let desk = device.desk.clone();
    let lookout = desk.lookout.as_ref().unwrap();
    let Io { memory, queues, features, .. } = &driver.io;
    let poller = Poller::new().unwrap();
    let mut io = Io { memory: memory.clone(), queues: queues.clone(), features: *features, poller };
    thread::scope(|scope| {
        let serve = || device.queue_ready(&mut io, REQUESTS).unwrap();
        let thread = scope.spawn(|| in_role(Role::Device(Kind::FileSystem), serve));
        let comes = |is_so: &mut dyn FnMut() -> bool| {
            let deadline = Instant::now() + HANGS;
            while !is_so() && Instant::now() < deadline {
                thread::yield_now();
            }
        };
        comes(&mut || lookout.looking() || thread.is_finished());
        let head = put(driver, request).head;
        let mut used = None;
        let mut answered = || {
            used = used.or_else(|| driver.used(REQUESTS));
            used == Some((head, ATTRIBUTES))
        };
        match awaited {
            Awaited::Answer => comes(&mut answered),
            Awaited::End => comes(&mut || thread.is_finished()),
        }
        let ended = thread.is_finished();
        lookout.give_up();
        (answered(), ended)
    })
}

/// What is waited for while the thread looks.
enum Awaited {
    /// An answer to the request.
    Answer,
    /// That the thread ends by itself.
    End,
}

#[test]
fn requests_that_nobody_tells_of_are_found() {
    let tree = tree();
    let Some(mut asking) = asking(tree.path(), UNDISTURBED) else { return };
    assert_eq!(asked_while_looking(&mut asking, Awaited::Answer), (true, false));
    // It looks no more, and wants to be told.
    let (mut guest, request) = asking;
    assert!(!guest.device.desk.lookout.as_ref().unwrap().looking());
    put(&mut guest.driver, &request);
    guest.device.desk.attend(REQUESTS).unwrap();
    assert!(guest.driver.used(REQUESTS).is_some());
}

#[test]
fn who_finds_nothing_goes_home() {
    let tree = tree();
    let spans = Spans { patience: Duration::from_millis(1), ..UNDISTURBED };
    let Some(mut asking) = asking(tree.path(), spans) else { return };
    let (_, ended) = asked_while_looking(&mut asking, Awaited::End);
    assert!(ended);
    assert!(!asking.0.device.desk.lookout.as_ref().unwrap().looking());
}

#[test]
fn who_has_looked_for_long_does_something_else_and_goes_on() {
    let tree = tree();
    let Some(mut asking) = asking(tree.path(), Spans { shift: Duration::ZERO, ..UNDISTURBED }) else { return };
    for _ in 0..2 {
        assert_eq!(asked_while_looking(&mut asking, Awaited::End), (true, true));
        assert!(asking.0.driver.io.queues[REQUESTS].kick_descriptor().clear());
    }
}
