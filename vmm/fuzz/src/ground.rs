//! The memory of a guest, between pages that nothing may touch: whatever reaches beyond ends the fuzzer.

use std::ptr::{NonNull, null_mut};
use std::sync::Arc;

use runvm_vmm::Memory;
use rustix::mm::{MapFlags, MprotectFlags, ProtFlags, mmap_anonymous, mprotect, munmap};
use vm_memory::{GuestAddress, GuestMemoryMmap, GuestRegionMmap, MmapRegion};

/// The regions, as (address, length): two that touch, and one behind a hole and beyond 32 bits.
pub const REGIONS: [(u64, usize); 3] = [(0, LOW), (LOW as u64, LOW), (HIGH, HIGH_LENGTH)];
/// The length of each of the first two regions.
pub const LOW: usize = 1 << 20;
/// Where the last one begins.
pub const HIGH: u64 = 1 << 32;
const HIGH_LENGTH: usize = 1 << 16;

/// What lies between the regions in the fuzzer's own address space, and around them.
const GUARD: usize = 1 << 16;
const TOTAL: usize = 4 * GUARD + 2 * LOW + HIGH_LENGTH;

/// A guest's memory. It has to outlast all that uses it.
pub struct Ground {
    /// As devices see it.
    pub memory: Memory,
    start: NonNull<u8>,
}

#[expect(clippy::expect_used, reason = "a fuzzer ends where the host has no memory")]
impl Ground {
    /// Zeros.
    pub fn new() -> Self {
        // SAFETY: a mapping where nothing is yet.
        let start = unsafe { mmap_anonymous(null_mut(), TOTAL, ProtFlags::empty(), MapFlags::PRIVATE) };
        let start = NonNull::new(start.expect("address space").cast::<u8>()).expect("a mapping");
        let mut offset = GUARD;
        let regions = REGIONS.map(|(address, length)| {
            // SAFETY: `TOTAL` is the sum of all regions and guards.
            let host = unsafe { start.as_ptr().add(offset) };
            offset += length + GUARD;
            // SAFETY: the pages are this mapping's, and nobody uses them yet.
            unsafe { mprotect(host.cast(), length, MprotectFlags::READ | MprotectFlags::WRITE) }.expect("memory");
            let (access, flags) = (ProtFlags::READ | ProtFlags::WRITE, MapFlags::PRIVATE);
            // SAFETY: the pages stay mapped until this `Ground` is dropped, which outlasts all that uses them.
            let region = unsafe { MmapRegion::build_raw(host, length, access.bits() as i32, flags.bits() as i32) };
            GuestRegionMmap::new(region.expect("a region"), GuestAddress(address)).expect("an address")
        });
        let memory = GuestMemoryMmap::from_regions(regions.into()).expect("regions that do not overlap");
        Self { memory: Arc::new(memory), start }
    }
}

impl Drop for Ground {
    fn drop(&mut self) {
        // SAFETY: it is our mapping, and all that used it is gone.
        let _ = unsafe { munmap(self.start.as_ptr().cast(), TOTAL) };
    }
}
