//! Entropy source: the specification's section 5.4. The host's random numbers, as many as the guest asks for.

use std::io::Write as _;

use rustix::rand::{GetRandomFlags, getrandom};

use super::{Chain, Device, DeviceError, Io, Kind, Served};
use crate::Memory;

/// Linux asks for less than a page, in one request at a time.
const QUEUE_SIZE: u16 = 16;

/// How many bytes a request is answered with at most; the specification allows for fewer than there is room for.
const MAX_ANSWER: usize = 1 << 16;

const PORTION: usize = 1 << 10;

/// An entropy source. It has no state.
#[derive(Debug, Default)]
pub struct Rng;

impl Device for Rng {
    fn kind(&self) -> Kind {
        Kind::Entropy
    }

    fn queue_sizes(&self) -> &[u16] {
        &[QUEUE_SIZE]
    }

    fn queue_ready(&mut self, io: &mut Io, queue: usize) -> Result<(), DeviceError> {
        let memory = io.memory.clone();
        io.queues[queue].drain(&memory, |chain| answer(&memory, chain, queue))
    }
}

fn answer(memory: &Memory, chain: Chain, queue: usize) -> Result<Served, DeviceError> {
    let mut writer = chain.writer(memory).map_err(|reason| DeviceError::Queue { queue, reason })?;
    let mut left = writer.available_bytes().min(MAX_ANSWER);
    while left > 0 {
        let mut portion = [0; PORTION];
        let length = left.min(PORTION);
        // It waits only on a host that has itself not gathered enough since it booted.
        let random = getrandom(&mut portion[..length], GetRandomFlags::empty());
        let length = random.map_err(|errno| DeviceError::host("get random numbers")(errno.into()))?;
        writer.write_all(&portion[..length]).map_err(DeviceError::host("write the guest's memory"))?;
        left -= length;
    }
    Ok(Served::Done(writer.bytes_written() as u32))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::virtio::driver::{Driver, Piece};

    #[test]
    fn requests_are_filled_and_no_two_alike() {
        let mut driver = Driver::new(&Rng);
        let requests: Vec<_> =
            (0..5).map(|_| driver.put(0, &[Piece::Writable(13), Piece::Writable(3), Piece::Writable(2000)])).collect();
        Rng.queue_ready(&mut driver.io, 0).unwrap();
        let mut seen = Vec::new();
        for request in &requests {
            assert_eq!(driver.used(0), Some((request.head, 2016)));
            let bytes = driver.written(request);
            // Were any part of it left as it was, it would be zeros; of true random numbers 24 never are.
            assert!(bytes.windows(24).all(|bytes| bytes.iter().any(|&byte| byte != 0)));
            assert!(!seen.contains(&bytes));
            seen.push(bytes);
        }
        assert!(driver.line.clear());
    }

    #[test]
    fn an_answer_has_a_limit() {
        let mut driver = Driver::new(&Rng);
        let request = driver.put(0, &[Piece::Writable(1000), Piece::Writable(1 << 20)]);
        Rng.queue_ready(&mut driver.io, 0).unwrap();
        assert_eq!(driver.used(0), Some((request.head, 1 << 16)));
        let bytes = driver.written(&request);
        assert!(bytes[1 << 16..].iter().all(|&byte| byte == 0));
        assert!(bytes[(1 << 16) - 24..1 << 16].iter().any(|&byte| byte != 0));
    }

    #[test]
    fn bad_requests_are_answered_with_nothing_or_end_the_device() {
        let mut driver = Driver::new(&Rng);
        let request = driver.put(0, &[Piece::Readable(b"nothing to write")]);
        Rng.queue_ready(&mut driver.io, 0).unwrap();
        assert_eq!(driver.used(0), Some((request.head, 0)));
        for (address, length) in [(1 << 40, 1), (u64::MAX, 2), ((8 << 20) - 1, 2)] {
            let mut driver = Driver::new(&Rng);
            driver.put(0, &[Piece::Raw { address, length, flags: 2, next: 0 }]);
            let end = Rng.queue_ready(&mut driver.io, 0);
            assert!(matches!(end, Err(DeviceError::Queue { queue: 0, .. })), "{address:x}: {end:?}");
        }
    }
}
