//! The transport and the worker, driven through registers as a guest drives them.

use std::sync::Arc;

use rustix::event::{PollFd, PollFlags, poll};
use vm_memory::{Address as _, Bytes as _, GuestAddress};

use super::driver::{Driver, MEMORY, Piece};
use super::transport::{LIST, LIST_SIZE, LISTED_READ, QUEUE_INTERRUPTS, Transport};
use super::*;

const QUEUE_SIZE: u16 = 16;
const FEATURE: u64 = 1 << 3;

/// Writes back what it reads, inverted.
#[derive(Default)]
struct Inverter;

impl Device for Inverter {
    fn kind(&self) -> Kind {
        Kind::Entropy
    }

    fn queue_sizes(&self) -> &[u16] {
        &[QUEUE_SIZE]
    }

    fn features(&self) -> u64 {
        FEATURE
    }

    fn config(&self) -> ConfigSpace {
        ConfigSpace::new(vec![1, 2, 3, 4])
    }

    fn queue_ready(&mut self, io: &mut Io, queue: usize) -> Result<(), DeviceError> {
        let memory = io.memory.clone();
        io.queues[queue].drain(&memory, |chain| {
            let mut reader = chain.clone().reader(&memory).unwrap();
            let mut writer = chain.writer(&memory).unwrap();
            while let Ok(byte) = reader.read_obj::<u8>() {
                writer.write_obj(!byte).unwrap();
            }
            Ok(Served::Done(writer.bytes_written() as u32))
        })
    }
}

fn transport(driver: &Driver) -> Transport {
    offer(Box::new(Inverter), driver)
}

fn offer(device: Box<dyn Device>, driver: &Driver) -> Transport {
    Transport::new(device, driver.io.memory.clone(), driver.line.clone(), Arc::new(|_| Ok(()))).unwrap()
}

fn read(transport: &mut Transport, offset: u64) -> u32 {
    let mut bytes = [0; 4];
    transport.read(offset, &mut bytes);
    u32::from_le_bytes(bytes)
}

fn write(transport: &mut Transport, offset: u64, value: u32) {
    transport.write(offset, &value.to_le_bytes());
}

/// What Linux does to start a device, with the queue where [`Driver`] has it.
fn start(transport: &mut Transport) {
    start_with(transport, FEATURE);
}

fn start_with(transport: &mut Transport, features: u64) {
    for status in [0, 1, 3] {
        write(transport, 0x70, status);
    }
    for (select, features) in [(0, features as u32), (1, (features >> 32) as u32 | 1)] {
        write(transport, 0x24, select);
        write(transport, 0x20, features);
    }
    write(transport, 0x70, 11);
    assert_eq!(read(transport, 0x70), 11);
    write(transport, 0x30, 0);
    assert_eq!(read(transport, 0x34), u32::from(QUEUE_SIZE));
    for (offset, value) in [(0x38, QUEUE_SIZE.into()), (0x80, 0), (0x90, 0x8000), (0xa0, 0xc000), (0x44, 1)] {
        write(transport, offset, value);
    }
    write(transport, 0x70, 15);
}

/// Puts a list of accesses into the memory, and tells the device of it; what it has for their values then.
fn access(transport: &mut Transport, driver: &Driver, place: u32, length: u32, accesses: &[(u32, u32)]) -> Vec<u32> {
    let memory = &driver.io.memory;
    let address = GuestAddress(u64::from(place) * LIST_SIZE as u64);
    let words = accesses.iter().flat_map(|&(register, value)| [register, value]);
    let list: Vec<u8> = [length, 0].into_iter().chain(words).flat_map(u32::to_le_bytes).collect();
    memory.write_slice(&list, address).unwrap();
    write(transport, LIST, place);
    let value = |index| memory.read_obj(address.unchecked_add(8 * index as u64 + 12)).unwrap();
    (0..accesses.len()).map(value).collect()
}

fn await_interrupt(driver: &Driver) {
    poll(&mut [PollFd::new(&*driver.line, PollFlags::IN)], None).unwrap();
    driver.line.clear();
}

#[test]
fn a_device_is_found_started_served_and_reset() {
    let mut driver = Driver::new(&Inverter);
    let mut transport = transport(&driver);
    assert_eq!(read(&mut transport, 0), u32::from_le_bytes(*b"virt"));
    assert_eq!((read(&mut transport, 4), read(&mut transport, 8)), (2, 4));
    assert_eq!((read(&mut transport, 0xb0), read(&mut transport, 0xb4)), (u32::MAX, u32::MAX));
    start(&mut transport);
    for round in 0..40u8 {
        let request = driver.put(0, &[Piece::Readable(&[round]), Piece::Writable(1)]);
        write(&mut transport, 0x50, 0);
        await_interrupt(&driver);
        assert_eq!(read(&mut transport, 0x60), 1);
        write(&mut transport, 0x64, 1);
        assert_eq!(read(&mut transport, 0x60), 0);
        assert_eq!(driver.used(0), Some((request.head, 1)));
        assert_eq!(driver.written(&request), [!round]);
    }
    write(&mut transport, 0x70, 0);
    assert_eq!((read(&mut transport, 0x70), read(&mut transport, 0x44)), (0, 0));
}

#[test]
fn a_list_of_accesses_is_as_good_as_each_of_them() {
    const PLACE: u32 = 0x2000;
    let mut driver = Driver::new(&Inverter);
    let mut transport = transport(&driver);
    let find = [(0x70, 0), (0x70, 3), (0x14, 1), (LISTED_READ | 0x10, 7), (LISTED_READ | 0x100, 7)];
    let found = access(&mut transport, &driver, PLACE, 5, &find);
    assert_eq!(found, [0, 3, 1, 1 | (QUEUE_INTERRUPTS >> 32) as u32, 0x0403_0201]);
    let features = [(0x24, 1), (0x20, 1), (0x24, 0), (0x20, FEATURE as u32), (0x70, 11), (LISTED_READ | 0x70, 0)];
    assert_eq!(access(&mut transport, &driver, PLACE, 6, &features)[5], 11);
    let queue =
        [(0x30, 0), (0x38, QUEUE_SIZE.into()), (0x80, 0), (0x90, 0x8000), (0xa0, 0xc000), (0x44, 1), (0x70, 15)];
    access(&mut transport, &driver, PLACE, 7, &queue);
    let request = driver.put(0, &[Piece::Readable(b"x"), Piece::Writable(1)]);
    access(&mut transport, &driver, PLACE, 1, &[(0x50, 0)]);
    await_interrupt(&driver);
    assert_eq!(driver.used(0), Some((request.head, 1)));
}

#[test]
fn a_list_is_no_longer_than_it_is() {
    let driver = Driver::new(&Inverter);
    let mut transport = transport(&driver);
    let reads = [(LISTED_READ, 0); LIST_SIZE / 8];
    let read = access(&mut transport, &driver, 1, u32::MAX, &reads);
    let (last, all) = read.split_last().unwrap();
    assert!(all.iter().all(|&value| value == u32::from_le_bytes(*b"virt")), "{all:x?}");
    assert_eq!(*last, 0, "what follows a list is not its own");
    // A list that tells of itself.
    access(&mut transport, &driver, 1, 2, &[(LIST as u32, 1), (LISTED_READ | LIST as u32, 1)]);
    // Where no memory is.
    for place in [(MEMORY / LIST_SIZE) as u32, u32::MAX] {
        write(&mut transport, LIST, place);
    }
}

#[test]
fn features_that_were_not_offered_are_not_taken() {
    let driver = Driver::new(&Inverter);
    let mut transport = transport(&driver);
    for (low, high) in [(1 << 9, 1), (0, 0), (0, 3)] {
        for status in [0, 1, 3] {
            write(&mut transport, 0x70, status);
        }
        for (select, features) in [(0, low), (1, high)] {
            write(&mut transport, 0x24, select);
            write(&mut transport, 0x20, features);
        }
        write(&mut transport, 0x70, 11);
        assert_eq!(read(&mut transport, 0x70), 3, "{low:x} {high:x}");
        write(&mut transport, 0x70, 15);
        assert_eq!(read(&mut transport, 0x70) & 4, 0, "it must not start");
    }
}

#[test]
fn a_saved_device_goes_on_in_another_one() {
    let mut driver = Driver::new(&Inverter);
    let mut first = transport(&driver);
    start(&mut first);
    first.rest();
    let before = driver.put(0, &[Piece::Readable(b"x"), Piece::Writable(1)]);
    let saved = first.save().unwrap();
    drop(first);

    let mut second = transport(&driver);
    second.restore(saved.clone()).unwrap();
    second.go_on();
    await_interrupt(&driver);
    assert_eq!(driver.used(0), Some((before.head, 1)));
    assert_eq!(driver.written(&before), [!b'x']);

    let text = serde_json::to_string(&saved).unwrap();
    for (sound, damaged) in [
        (r#""kind":4"#, r#""kind":5"#),
        (r#""status":15"#, r#""status":7"#),
        (r#""status":15"#, r#""status":31"#),
        (r#""max_size":16"#, r#""max_size":32"#),
        (r#""desc_table":0"#, r#""desc_table":7"#),
        (r#""device":[]"#, r#""device":[1]"#),
        (r#""config":[1,2,3,4]"#, r#""config":[]"#),
        (r#""driver_features":4294967304"#, r#""driver_features":4294967295"#),
    ] {
        assert!(text.contains(sound), "{text}");
        let damaged = serde_json::from_str(&text.replace(sound, damaged)).unwrap();
        assert!(transport(&driver).restore(damaged).is_err(), "{sound}");
    }
}

#[test]
fn only_what_never_changes_offers_interrupts_without_reasons() {
    let driver = Driver::new(&Inverter);
    let offers = |device| {
        let mut transport = offer(device, &driver);
        write(&mut transport, 0x14, 1);
        u64::from(read(&mut transport, 0x10)) << 32 & QUEUE_INTERRUPTS != 0
    };
    let balloon = balloon::Balloon::new(balloon::Backing::Private);
    assert_eq!((offers(Box::new(Inverter)), offers(Box::new(balloon))), (true, false));
}

#[test]
fn a_driver_that_looks_at_its_queues_is_given_no_reason() {
    let mut driver = Driver::new(&Inverter);
    let mut transport = transport(&driver);
    start_with(&mut transport, QUEUE_INTERRUPTS);
    for _ in 0..2 {
        let request = driver.put(0, &[Piece::Readable(b"x"), Piece::Writable(1)]);
        write(&mut transport, 0x50, 0);
        await_interrupt(&driver);
        assert_eq!(read(&mut transport, 0x60), 0);
        assert_eq!(driver.used(0), Some((request.head, 1)));
    }
}

#[test]
fn a_device_that_fails_gives_a_reason_even_so() {
    let mut driver = Driver::new(&Inverter);
    let mut transport = transport(&driver);
    start_with(&mut transport, QUEUE_INTERRUPTS);
    (0..2 * QUEUE_SIZE).for_each(|_| driver.offer(0, 0));
    write(&mut transport, 0x50, 0);
    await_interrupt(&driver);
    assert_eq!((read(&mut transport, 0x60), read(&mut transport, 0x70) & 64), (2, 64));
}

#[test]
fn a_malformed_queue_stops_its_device_alone() {
    let mut driver = Driver::new(&Inverter);
    let mut transport = transport(&driver);
    start(&mut transport);
    // More available than the queue can hold.
    (0..2 * QUEUE_SIZE).for_each(|_| driver.offer(0, 0));
    write(&mut transport, 0x50, 0);
    await_interrupt(&driver);
    assert_eq!(read(&mut transport, 0x70) & 64, 64);
    write(&mut transport, 0x70, 0);
    assert_eq!(read(&mut transport, 0x70), 0);
}
