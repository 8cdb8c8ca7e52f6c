//! Memory balloon: the specification's section 5.5. Gives memory that the guest does not use back to the host.
//!
//! The guest names such memory on two occasions: of its own accord what has been free for a while (free page
//! reporting), and, when its balloon is to grow, what it takes out of use for that. Both are advice. Where the host
//! cannot follow it nothing is wrong, and memory that was given back comes again at the guest's next touch.

use std::io::Read as _;
use std::sync::{Arc, OnceLock};

use rustix::mm::{Advice, madvise};
use rustix::param::page_size;
use virtio_queue::Error;
use vm_memory::{GuestAddress, GuestMemory as _};

use super::{Chain, ConfigSpace, Device, DeviceError, Interrupt, Io, Kind, Served};
use crate::Memory;

/// Queue 1, behind it, is the one of deflation.
const INFLATE: usize = 0;
/// The specification numbers the queue of reports 4, behind those of statistics and of hints. Over MMIO, Linux gives
/// the queues that it uses successive numbers (`vm_find_vqs`), and without those two features that makes it 2.
const REPORTING: usize = 2;

/// The driver refuses to report by a queue of less than 32, and has no more than one request in any queue.
const QUEUE_SIZES: [u16; 3] = [16, 16, 32];

/// The balloon shrinks rather than that the guest runs out of memory.
const DEFLATE_ON_OOM: u64 = 1 << 2;
/// The guest reports free memory.
///
/// Without the feature of page poison beside it, a guest that reports must not expect to find in that memory what it
/// had left there: one that initialises or poisons what it frees does not accept this feature then. So it does no harm
/// that memory comes back with other contents.
const PAGE_REPORTING: u64 = 1 << 5;

/// Pages in this device's configuration and requests are of this size, whatever the guest's and the host's are.
const PAGE: u64 = 4096;
/// How many pages of an inflation are given back; Linux names as many in one request at most.
const MAX_PAGES: usize = 256;
/// How many ranges of a report are given back: what fits into its queue.
const MAX_RANGES: usize = 32;
/// How many bytes of them; Linux reports an eighth of that at once.
const MAX_REPORT: u64 = 1 << 30;

/// The configuration space: how many pages the balloon is to have, and how many the driver says it has.
const NUM_PAGES: usize = 0;
const ACTUAL: usize = 4;
const CONFIG_SIZE: usize = 8;

/// What the guest's memory is to the host, which decides on how it is given back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Backing {
    /// Private to this process. What is given back comes again as zeros where the memory is anonymous, and as the
    /// file's bytes where it is a private mapping of a file.
    Private,
    /// A shared mapping of a file in memory. What is given back is taken out of the file, and comes again as zeros.
    Shared,
}

/// The balloon.
#[derive(Debug)]
pub struct Balloon {
    backing: Backing,
    config: ConfigSpace,
    interrupt: Arc<OnceLock<Interrupt>>,
    /// Whether the log says that the host does not take memory back.
    complained: bool,
}

/// What the host wants of the balloon. Clones are of the same one.
#[derive(Clone, Debug)]
pub struct Control {
    config: ConfigSpace,
    interrupt: Arc<OnceLock<Interrupt>>,
}

impl Control {
    /// Has the guest take so many pages of 4 KiB out of use, as far as it can.
    pub fn set_target(&self, pages: u32) {
        self.config.update(|bytes| bytes[NUM_PAGES..][..4].copy_from_slice(&pages.to_le_bytes()));
        // Before the first start there is nobody to be told: the driver looks when it comes.
        if let Some(interrupt) = self.interrupt.get() {
            interrupt.config_changed();
        }
    }

    /// How many pages the guest is to take out of use.
    pub fn target(&self) -> u32 {
        field(&self.config, NUM_PAGES)
    }

    /// How many pages the guest says it has taken out of use: any number, if it lies.
    pub fn actual(&self) -> u32 {
        field(&self.config, ACTUAL)
    }
}

fn field(config: &ConfigSpace, offset: usize) -> u32 {
    let mut bytes = [0; 4];
    config.read(offset as u64, &mut bytes);
    u32::from_le_bytes(bytes)
}

impl Balloon {
    /// An empty balloon in memory that is `backing` to the host.
    pub fn new(backing: Backing) -> Self {
        let config = ConfigSpace::new(vec![0; CONFIG_SIZE]).with_writable(ACTUAL..CONFIG_SIZE).changing();
        Self { backing, config, interrupt: Arc::default(), complained: false }
    }

    /// The host's hand on it.
    pub fn control(&self) -> Control {
        Control { config: self.config.clone(), interrupt: self.interrupt.clone() }
    }

    /// Gives back the pages whose numbers a request has; those beyond [`MAX_PAGES`] stay.
    fn inflate(&mut self, memory: &Memory, chain: Chain) -> Result<(), Error> {
        let mut numbers = [0; MAX_PAGES * 4];
        let length = chain.reader(memory)?.read(&mut numbers).map_err(|_| Error::InvalidChain)?;
        let numbers = numbers[..length].as_chunks().0.iter().map(|&number| u32::from_le_bytes(number));
        for (first, count) in runs(numbers.collect()) {
            self.give_back(memory, u64::from(first) * PAGE, count * PAGE)?;
        }
        Ok(())
    }

    /// Gives back what a report's buffers are; what is beyond [`MAX_RANGES`] and [`MAX_REPORT`] stays.
    fn report(&mut self, memory: &Memory, chain: Chain) -> Result<(), Error> {
        let mut left = MAX_REPORT;
        for descriptor in chain.writable().take(MAX_RANGES) {
            let length = left.min(descriptor.len().into());
            self.give_back(memory, descriptor.addr().0, length)?;
            left -= length;
        }
        Ok(())
    }

    /// Gives back the host's pages that are wholly in a range.
    fn give_back(&mut self, memory: &Memory, address: u64, length: u64) -> Result<(), Error> {
        let size = page_size() as u64;
        let end = address.checked_add(length).ok_or(Error::AddressOverflow)?;
        let start = address.checked_next_multiple_of(size).ok_or(Error::AddressOverflow)?;
        let length = (end - end % size).saturating_sub(start) as usize;
        let advice = match self.backing {
            Backing::Private => Advice::LinuxDontNeed,
            Backing::Shared => Advice::LinuxRemove,
        };
        for part in memory.get_slices(GuestAddress(start), length) {
            let part = part.map_err(Error::GuestMemory)?;
            // SAFETY: this is a part of the guest's memory, which stays mapped while it is borrowed. Nobody has a
            // reference to it, and all who use it expect its contents to change at any time.
            let given = unsafe { madvise(part.ptr_guard_mut().as_ptr().cast(), part.len(), advice) };
            if let Err(errno) = given
                && !self.complained
            {
                tracing::warn!("the host does not take back memory of the guest: {errno}");
                self.complained = true;
            }
        }
        Ok(())
    }
}

/// Successive numbers, as the first of them and how many.
fn runs(mut numbers: Vec<u32>) -> Vec<(u32, u64)> {
    numbers.sort_unstable();
    numbers.dedup();
    let runs = numbers.chunk_by(|&one, &next| next - one == 1);
    runs.map(|run| (run[0], run.len() as u64)).collect()
}

impl Device for Balloon {
    fn kind(&self) -> Kind {
        Kind::Balloon
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn features(&self) -> u64 {
        DEFLATE_ON_OOM | PAGE_REPORTING
    }

    fn config(&self) -> ConfigSpace {
        self.config.clone()
    }

    fn start(&mut self, io: &mut Io) -> Result<(), DeviceError> {
        if let Some(queue) = io.queues.first() {
            let interrupt = self.interrupt.get_or_init(|| queue.interrupt().clone());
            // The target may have been set while nobody could be told, and the driver may have looked before that.
            if field(&self.config, NUM_PAGES) != field(&self.config, ACTUAL) {
                interrupt.config_changed();
            }
        }
        Ok(())
    }

    fn queue_ready(&mut self, io: &mut Io, queue: usize) -> Result<(), DeviceError> {
        let memory = io.memory.clone();
        io.queues[queue].drain(&memory, |chain| {
            match queue {
                INFLATE => self.inflate(&memory, chain),
                REPORTING => self.report(&memory, chain),
                // Memory is there whenever the guest touches it: nothing has to be done for a balloon that shrinks.
                _ => Ok(()),
            }
            .map_err(|reason| DeviceError::Queue { queue, reason })?;
            Ok(Served::Done(0))
        })
    }

    /// The configuration space, as the guest sees it.
    fn save(&mut self) -> Result<Vec<u8>, DeviceError> {
        Ok(self.config.bytes())
    }

    fn restore(&mut self, state: &[u8]) -> Result<(), DeviceError> {
        // Any numbers do: the guest can have written the one, and is merely asked for the other.
        let state: &[u8; CONFIG_SIZE] =
            state.try_into().map_err(|_| DeviceError::State("it is not the configuration of a balloon"))?;
        self.config.update(|bytes| bytes.copy_from_slice(state));
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::io::Write as _;
    use std::os::unix::fs::MetadataExt as _;

    use vm_memory::{Bytes as _, FileOffset, GuestMemoryMmap, GuestRegionMmap, MmapRegion};

    use super::*;
    use crate::virtio::driver::{Driver, MEMORY, Piece};

    /// Where the memory that the tests give back begins: two regions of this size, one at the other's end.
    const SPARE: u64 = MEMORY as u64;
    const REGION: usize = 1 << 20;
    const BORDER: u64 = SPARE + REGION as u64;
    const END: u64 = BORDER + REGION as u64;
    const DEFLATE: usize = 1;

    /// A machine whose spare memory the guest has filled with 0x55, which is a file's of 0x66 where there is one.
    fn machine(backing: Backing, file: Option<(&File, i32)>) -> (Balloon, Driver) {
        let region = |address, size, file: Option<FileOffset>, flags| {
            let access = libc::PROT_READ | libc::PROT_WRITE;
            let mapping = MmapRegion::build(file, size, access, flags).unwrap();
            GuestRegionMmap::new(mapping, GuestAddress(address)).unwrap()
        };
        let anonymous = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
        let mut regions = vec![region(0, MEMORY, None, anonymous)];
        for (address, offset) in [(SPARE, 0), (BORDER, REGION as u64)] {
            let flags = file.map_or(anonymous, |(_, flags)| flags);
            let file = file.map(|(file, _)| FileOffset::new(file.try_clone().unwrap(), offset));
            regions.push(region(address, REGION, file, flags));
        }
        let memory: Memory = GuestMemoryMmap::from_regions(regions).unwrap().into();
        memory.write_slice(&[0x55; 2 * REGION], GuestAddress(SPARE)).unwrap();
        let balloon = Balloon::new(backing);
        let driver = Driver::with_memory(&balloon, memory);
        (balloon, driver)
    }

    fn file() -> File {
        let mut file = tempfile::tempfile_in("/dev/shm").unwrap();
        file.write_all(&[0x66; 2 * REGION]).unwrap();
        file
    }

    fn report(driver: &mut Driver, address: u64, length: u32) {
        driver.put(REPORTING, &[Piece::Raw { address, length, flags: 2, next: 0 }]);
    }

    /// The first bytes of pages from here on.
    fn pages<const N: usize>(driver: &Driver, address: u64) -> [u8; N] {
        let byte = |page| driver.io.memory.read_obj(GuestAddress(address + page as u64 * PAGE)).unwrap();
        std::array::from_fn(byte)
    }

    fn resident(driver: &Driver, address: u64) -> bool {
        let slice = driver.io.memory.get_slice(GuestAddress(address), PAGE as usize).unwrap();
        let mut state = 0u8;
        // SAFETY: asks about one page of a mapping, which is one byte of the answer.
        let result = unsafe { libc::mincore(slice.ptr_guard_mut().as_ptr().cast(), slice.len(), &raw mut state) };
        assert_eq!(result, 0);
        state & 1 == 1
    }

    #[test]
    fn reported_memory_is_the_hosts_again() {
        let (mut balloon, mut driver) = machine(Backing::Private, None);
        assert!(resident(&driver, SPARE));
        report(&mut driver, SPARE, 4 * PAGE as u32);
        // Across the border of two regions, and not a byte of a page that is not wholly named.
        report(&mut driver, BORDER - 2 * PAGE + 1, 3 * PAGE as u32 + 1);
        balloon.queue_ready(&mut driver.io, REPORTING).unwrap();
        assert!(driver.used(REPORTING).is_some_and(|(_, written)| written == 0));
        assert!(driver.used(REPORTING).is_some());
        let left = [0, 1, 2, 3, 4].map(|page| resident(&driver, SPARE + page * PAGE));
        assert_eq!(left, [false, false, false, false, true]);
        assert_eq!(pages(&driver, BORDER - 3 * PAGE), [0x55, 0x55, 0, 0, 0x55]);
    }

    #[test]
    fn a_private_mapping_has_its_files_pages_again() {
        let file = file();
        let (mut balloon, mut driver) = machine(Backing::Private, Some((&file, libc::MAP_PRIVATE)));
        report(&mut driver, SPARE + PAGE, PAGE as u32);
        balloon.queue_ready(&mut driver.io, REPORTING).unwrap();
        assert_eq!(pages(&driver, SPARE), [0x55, 0x66, 0x55]);
    }

    #[test]
    fn a_shared_file_gets_a_hole() {
        let file = file();
        let (mut balloon, mut driver) = machine(Backing::Shared, Some((&file, libc::MAP_SHARED)));
        let before = file.metadata().unwrap().blocks();
        report(&mut driver, SPARE + PAGE, 64 * PAGE as u32);
        balloon.queue_ready(&mut driver.io, REPORTING).unwrap();
        assert_eq!(before - file.metadata().unwrap().blocks(), 64 * PAGE / 512);
        assert_eq!(pages(&driver, SPARE), [0x55, 0]);
        assert_eq!(pages(&driver, SPARE + 64 * PAGE), [0, 0x55]);
    }

    #[test]
    fn memory_that_the_host_does_not_take_stays() {
        // A hole cannot be made in private memory.
        let (mut balloon, mut driver) = machine(Backing::Shared, None);
        report(&mut driver, SPARE, PAGE as u32);
        balloon.queue_ready(&mut driver.io, REPORTING).unwrap();
        assert!(driver.used(REPORTING).is_some());
        assert_eq!(pages(&driver, SPARE), [0x55]);
    }

    #[test]
    fn the_balloon_takes_the_pages_it_names_and_lets_go_of_them() {
        let (mut balloon, mut driver) = machine(Backing::Private, None);
        let first = (SPARE / PAGE) as u32;
        let numbers: Vec<u8> = [2, 5, 1, 2].iter().flat_map(|page| (first + page).to_le_bytes()).collect();
        driver.put(INFLATE, &[Piece::Readable(&numbers[..7]), Piece::Readable(&numbers[7..])]);
        balloon.queue_ready(&mut driver.io, INFLATE).unwrap();
        assert!(driver.used(INFLATE).is_some());
        assert_eq!(pages(&driver, SPARE), [0x55, 0, 0, 0x55, 0x55, 0, 0x55]);
        driver.put(DEFLATE, &[Piece::Readable(&numbers)]);
        balloon.queue_ready(&mut driver.io, DEFLATE).unwrap();
        assert!(driver.used(DEFLATE).is_some());

        // Half a number is none, and no request takes more than Linux's largest.
        let many: Vec<u8> = (0..300).rev().flat_map(|page| (first + 10 + page % 200).to_le_bytes()).collect();
        driver.put(INFLATE, &[Piece::Readable(&numbers[..3])]);
        driver.put(INFLATE, &[Piece::Readable(&many)]);
        balloon.queue_ready(&mut driver.io, INFLATE).unwrap();
        assert_eq!(pages(&driver, SPARE + 209 * PAGE), [0, 0x55]);
        assert_eq!(pages(&driver, SPARE), [0x55]);
    }

    #[test]
    fn only_the_guests_memory_is_given_back() {
        for (queue, address, length) in [
            (REPORTING, END, PAGE as u32),
            (REPORTING, END - PAGE, 2 * PAGE as u32),
            (REPORTING, 1 << 40, u32::MAX),
            (REPORTING, u64::MAX - PAGE, u32::MAX),
            (REPORTING, u64::MAX - PAGE + 2, PAGE as u32 - 2),
        ] {
            let (mut balloon, mut driver) = machine(Backing::Private, None);
            report(&mut driver, address, length);
            let end = balloon.queue_ready(&mut driver.io, queue);
            assert!(matches!(end, Err(DeviceError::Queue { queue: REPORTING, .. })), "{address:x} {length:x}: {end:?}");
        }
        let (mut balloon, mut driver) = machine(Backing::Private, None);
        driver.put(INFLATE, &[Piece::Readable(&u32::MAX.to_le_bytes())]);
        let end = balloon.queue_ready(&mut driver.io, INFLATE);
        assert!(matches!(end, Err(DeviceError::Queue { queue: INFLATE, .. })), "{end:?}");
    }

    #[test]
    fn a_report_of_all_numbers_of_ranges_is_cut_short() {
        let (mut balloon, mut driver) = machine(Backing::Private, None);
        let at = 6 << 20;
        for index in 0..40u64 {
            let next = if index == 39 { [2, 0, 0, 0] } else { [3, 0, index as u8 + 1, 0] };
            let range = [&(SPARE + 2 * index * PAGE).to_le_bytes()[..], &(PAGE as u32).to_le_bytes(), &next].concat();
            driver.io.memory.write_slice(&range, GuestAddress(at + index * 16)).unwrap();
        }
        driver.put(REPORTING, &[Piece::Raw { address: at, length: 40 * 16, flags: 4, next: 0 }]);
        balloon.queue_ready(&mut driver.io, REPORTING).unwrap();
        assert!(driver.used(REPORTING).is_some());
        assert_eq!(pages(&driver, SPARE + 61 * PAGE), [0x55, 0, 0x55, 0x55]);
    }

    #[test]
    fn the_driver_is_told_of_a_target_and_both_outlast_a_snapshot() {
        let (mut balloon, mut driver) = machine(Backing::Private, None);
        let control = balloon.control();
        control.set_target(7);
        balloon.start(&mut driver.io).unwrap();
        // It was set when there was nobody to be told.
        assert!(driver.line.clear());
        control.set_target(1000);
        assert!(driver.line.clear());
        assert_eq!(driver.interrupt.reasons(), 2);
        balloon.config().write(NUM_PAGES as u64, &[9; 4]);
        balloon.config().write(ACTUAL as u64, &600u32.to_le_bytes());
        assert_eq!((control.target(), control.actual()), (1000, 600));

        let saved = balloon.save().unwrap();
        let (mut second, mut driver) = machine(Backing::Private, None);
        second.restore(&saved).unwrap();
        let control = second.control();
        assert_eq!((control.target(), control.actual()), (1000, 600));
        second.start(&mut driver.io).unwrap();
        assert!(driver.line.clear());
        control.set_target(600);
        assert!(driver.line.clear());
        second.start(&mut driver.io).unwrap();
        assert!(!driver.line.clear());

        for damaged in [&saved[..7], &[&saved[..], &[0]].concat(), &[]] {
            assert!(matches!(second.restore(damaged), Err(DeviceError::State(_))), "{damaged:?}");
        }
    }
}
