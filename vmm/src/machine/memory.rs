//! The guest's memory: where it lies for the guest, and what it is for the host.

use std::fs::File;
use std::sync::Arc;

use thiserror::Error;
use vm_memory::mmap::MmapRegionError;
use vm_memory::{
    FileOffset, GuestAddress, GuestMemory as _, GuestMemoryMmap, GuestMemoryRegion as _, GuestRegionMmap, MmapRegion,
};

use crate::Memory;

/// Below 4 GiB there is memory up to here; beyond are devices.
pub const LOW_END: u64 = 0xc000_0000;
/// Memory that finds no place below goes here.
pub const HIGH_START: u64 = 0x1_0000_0000;

const PROTECTION: i32 = libc::PROT_READ | libc::PROT_WRITE;
/// Lazily: the host gives a page when it is first touched, and lets more be promised than there is.
const LAZY: i32 = libc::MAP_PRIVATE | libc::MAP_NORESERVE;

/// Memory that cannot be had.
#[derive(Debug, Error)]
pub enum MemoryError {
    /// Not a whole number of MiB, or nothing at all.
    #[error("a machine has a whole number of MiB of memory, not {0} bytes")]
    Size(u64),
    /// The host refuses.
    #[error("the host gives no {0} bytes of address space for the guest's memory")]
    Map(u64, #[source] MmapRegionError),
    /// Regions that are none.
    #[error("the guest's memory does not fit together: {0}")]
    Regions(String),
}

/// Where `size` bytes of memory lie: (guest-physical address, length) of each region.
///
/// # Errors
/// [`MemoryError::Size`].
pub fn layout(size: u64) -> Result<Vec<(u64, u64)>, MemoryError> {
    if size == 0 || !size.is_multiple_of(1 << 20) {
        return Err(MemoryError::Size(size));
    }
    let low = size.min(LOW_END);
    let high = size - low;
    Ok([(0, low), (HIGH_START, high)].into_iter().filter(|&(_, length)| length > 0).collect())
}

/// Fresh memory. With `huge` the host gives it in large pages where it can: quicker to touch, and more of it.
///
/// # Errors
/// [`MemoryError`].
pub fn anonymous(size: u64, huge: bool) -> Result<Memory, MemoryError> {
    let mut regions = Vec::new();
    for (start, length) in layout(size)? {
        let mapping = map(None, length, LAZY | libc::MAP_ANONYMOUS)?;
        if huge {
            advise_huge(&mapping);
        }
        regions.push(region(start, mapping)?);
    }
    assemble(regions)
}

/// Memory that begins as the contents of `file`, the regions one after the other, and never writes to it.
///
/// # Errors
/// [`MemoryError`].
pub fn private_copy(size: u64, file: File) -> Result<Memory, MemoryError> {
    let file = Arc::new(file);
    let mut regions = Vec::new();
    let mut offset = 0;
    for (start, length) in layout(size)? {
        let mapping = map(Some(FileOffset::from_arc(file.clone(), offset)), length, LAZY)?;
        regions.push(region(start, mapping)?);
        offset += length;
    }
    assemble(regions)
}

/// How much memory there is, in bytes.
pub fn size(memory: &Memory) -> u64 {
    memory.iter().map(|region| region.len()).sum()
}

fn map(file: Option<FileOffset>, length: u64, flags: i32) -> Result<MmapRegion, MemoryError> {
    let bytes = usize::try_from(length).map_err(|_| MemoryError::Size(length))?;
    MmapRegion::build(file, bytes, PROTECTION, flags).map_err(|error| MemoryError::Map(length, error))
}

fn region(start: u64, mapping: MmapRegion) -> Result<GuestRegionMmap, MemoryError> {
    GuestRegionMmap::new(mapping, GuestAddress(start))
        .ok_or_else(|| MemoryError::Regions("a region is beyond all addresses".to_owned()))
}

fn assemble(regions: Vec<GuestRegionMmap>) -> Result<Memory, MemoryError> {
    let memory = GuestMemoryMmap::from_regions(regions).map_err(|error| MemoryError::Regions(error.to_string()))?;
    Ok(Arc::new(memory))
}

fn advise_huge(mapping: &MmapRegion) {
    // SAFETY: the range is the mapping's own, and the advice changes none of its contents. Where the host does not know
    // it, the guest is as it would be without.
    unsafe { libc::madvise(mapping.as_ptr().cast(), mapping.size(), libc::MADV_HUGEPAGE) };
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write as _;
    use vm_memory::Bytes as _;

    #[test]
    fn memory_lies_around_the_devices() {
        assert_eq!(layout(1 << 20).unwrap(), [(0, 1 << 20)]);
        assert_eq!(layout(LOW_END).unwrap(), [(0, LOW_END)]);
        assert_eq!(layout(LOW_END + (1 << 20)).unwrap(), [(0, LOW_END), (HIGH_START, 1 << 20)]);
        assert!(layout(0).is_err() && layout(4096).is_err());
    }

    #[test]
    fn more_than_the_host_has_is_promised() {
        let memory = anonymous(1 << 40, false).unwrap();
        assert_eq!(size(&memory), 1 << 40);
        memory.write_obj(7u8, GuestAddress(HIGH_START + (1 << 39))).unwrap();
    }

    #[test]
    fn a_copy_leaves_the_file_alone() {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&vec![1; 1 << 20]).unwrap();
        let memory = private_copy(1 << 20, file.try_clone().unwrap()).unwrap();
        memory.write_obj(2u8, GuestAddress(5)).unwrap();
        let again = private_copy(1 << 20, file).unwrap();
        assert_eq!(again.read_obj::<u8>(GuestAddress(5)).unwrap(), 1);
        assert_eq!(memory.read_obj::<u8>(GuestAddress(6)).unwrap(), 1);
    }
}
