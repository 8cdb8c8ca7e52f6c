//! The guest's memory: where it lies for the guest, and what it is for the host.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::{AsRawFd as _, RawFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread::{self, JoinHandle};

use nix::sys::resource::{UsageWho, getrusage};
use serde::{Deserialize, Serialize};
use thiserror::Error;
use vm_memory::mmap::MmapRegionError;
use vm_memory::{
    Bytes as _, GuestAddress, GuestMemory as _, GuestMemoryMmap, GuestMemoryRegion as _, GuestRegionMmap, MmapRegion,
    VolatileMemory as _, VolatileSlice,
};

use super::elsewhere;
use crate::Memory;

/// Below 4 GiB there is memory up to here; beyond are devices.
pub const LOW_END: u64 = 0xc000_0000;
/// Memory that finds no place below goes here.
pub const HIGH_START: u64 = 0x1_0000_0000;

const PROTECTION: i32 = libc::PROT_READ | libc::PROT_WRITE;
/// Lazily: the host gives a page when it is first touched, and lets more be promised than there is.
const LAZY: i32 = libc::MAP_PRIVATE | libc::MAP_NORESERVE;

/// What memory is kept in files by, in bytes: the size of a large page.
pub const BLOCK: u64 = 2 << 20;

/// A block of memory in a file. In files the regions come one after the other.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Block(
    /// The how-manieth.
    pub u32,
);

impl Block {
    /// Where it is in a file, in bytes.
    pub fn offset(self) -> u64 {
        u64::from(self.0) * BLOCK
    }

    /// Where it is for the guest. No block lies in two regions.
    pub fn address(self) -> GuestAddress {
        let offset = self.offset();
        GuestAddress(if offset < LOW_END { offset } else { HIGH_START + (offset - LOW_END) })
    }

    /// What it is for the host; none where this memory has no such block. The last one of all may be shorter.
    pub fn of(self, memory: &Memory) -> Option<VolatileSlice<'_>> {
        let (region, start) = memory.to_region_addr(self.address())?;
        let length = BLOCK.min(region.len() - start.0);
        region.get_slice(start, length as usize).ok()
    }

    /// All of memory of that size, in bytes.
    pub fn all(size: u64) -> impl Iterator<Item = Self> {
        (0..size.div_ceil(BLOCK) as u32).map(Self)
    }
}

/// In what a block is kept in a file, in bytes. The host keeps a file in memory in the pieces that it was written in, and may
/// map all of one where a page of it is touched; it maps as much around it anyway (`fault_around_bytes`).
pub const PIECE: usize = 64 << 10;
const _: () = assert!(BLOCK as usize / PIECE == u32::BITS as usize, "a block's pieces have a bit each");

/// A block that a file has something of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Content {
    /// Which.
    pub block: Block,
    /// What of it.
    pub kept: Kept,
}

/// What a file has of a block, and how a clone gets it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Kept {
    /// All of it, written at once. The guest is not expected to write to it, so clones have it in common with the file, where
    /// the host keeps that in large pages.
    Constant,
    /// Some of it, which is copied.
    Pieces(Pieces),
    /// Some of it, which stays in the file until the guest comes to it: page by page, and it is expected to come to hardly any.
    Seldom(Pieces),
}

/// A bit for each [`PIECE`] of a block, the lowest for the first. The others are zero.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pieces(pub u32);

impl Content {
    /// Whether a clone may have it in the file, and none of its pages.
    pub fn is_mapped(self) -> bool {
        !matches!(self.kept, Kept::Pieces(_))
    }

    /// Brings it into fresh memory.
    fn bring(self, memory: &Memory, file: &File) -> Result<(), MemoryError> {
        let wrong = || MemoryError::Block(self.block.0);
        let part = self.block.of(memory).ok_or_else(wrong)?;
        let offset = self.block.offset() as i64;
        let pieces = match self.kept {
            Kept::Constant if share(&part, file, offset).map_err(MemoryError::File)? => return Ok(()),
            Kept::Constant => Pieces::ALL,
            Kept::Pieces(pieces) | Kept::Seldom(pieces) => pieces,
        };
        let seldom = matches!(self.kept, Kept::Seldom(_));
        if !seldom {
            // A large page takes the host's kernel milliseconds, in which nobody maps anything, a thread's stack for example,
            // if it is the kernel that comes to it first.
            part.write_obj(0_u8, 0).map_err(|_| wrong())?;
        }
        for run in pieces.runs() {
            let end = part.len().min(run.end);
            let length = end.checked_sub(run.start).ok_or_else(wrong)?;
            let part = part.subslice(run.start, length).map_err(|_| wrong())?;
            let bring = if seldom { lay_over } else { copy };
            bring(&part, file, offset + run.start as i64).map_err(MemoryError::File)?;
        }
        Ok(())
    }
}

impl Pieces {
    /// A whole block.
    pub const ALL: Self = Self(u32::MAX);

    /// As ranges of the block; successive pieces are one.
    pub fn runs(self) -> impl Iterator<Item = Range<usize>> {
        // All 32 bits may go at once.
        let mut rest = u64::from(self.0);
        let mut start = 0;
        std::iter::from_fn(move || {
            let skipped = (rest != 0).then(|| rest.trailing_zeros())?;
            rest >>= skipped;
            let count = rest.trailing_ones();
            rest >>= count;
            let first = start + skipped;
            start = first + count;
            Some(first as usize * PIECE..start as usize * PIECE)
        })
    }
}

/// Memory that cannot be had.
#[derive(Debug, Error)]
pub enum MemoryError {
    /// Not a whole number of MiB, or nothing at all.
    #[error("a machine has a whole number of MiB of memory, not {0} bytes")]
    Size(u64),
    /// The host refuses.
    #[error("the host gives no {0} bytes of address space for the guest's memory")]
    Map(u64, #[source] MmapRegionError),
    /// A file's contents that cannot be had.
    #[error("cannot read the guest's memory")]
    File(#[source] io::Error),
    /// A block that lies beyond its end.
    #[error("the guest's memory has no block {0}")]
    Block(u32),
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
        let mapping = map(length)?;
        if huge {
            advise_huge(&mapping.as_volatile_slice());
        }
        regions.push(region(start, mapping)?);
    }
    assemble(regions)
}

/// Memory that begins as this content of `file`; it is there once the [`Filling`] is complete. What the guest may write to is
/// copied: a large page at once is quicker than many of its small ones whenever the guest comes to one.
///
/// # Errors
/// [`MemoryError`].
pub fn from_file(size: u64, file: &File, contents: &[Content]) -> Result<(Memory, Filling), MemoryError> {
    let memory = anonymous(size, true)?;
    let file = file.try_clone().map_err(MemoryError::File)?;
    let work = Arc::new(Work { memory: memory.clone(), file, contents: contents.to_vec(), next: AtomicUsize::new(0) });
    let helper = thread::Builder::new().spawn({
        let work = work.clone();
        move || work.take_part()
    });
    let helper = helper.map_err(MemoryError::File)?;
    elsewhere::send(&helper);
    Ok((memory, Filling { work, helper: Some(helper) }))
}

/// The copying of a file into memory, by a thread of its own and who waits for it.
#[derive(Debug)]
pub struct Filling {
    work: Arc<Work>,
    helper: Option<JoinHandle<Result<(), MemoryError>>>,
}

impl Filling {
    /// Takes part in it until all is there.
    ///
    /// # Errors
    /// [`MemoryError::File`], [`MemoryError::Block`].
    pub fn complete(mut self) -> Result<(), MemoryError> {
        self.work.take_part()?;
        match self.helper.take().map(JoinHandle::join) {
            Some(Err(_)) => Err(MemoryError::File(io::ErrorKind::Interrupted.into())),
            Some(Ok(result)) => result,
            None => Ok(()),
        }
    }
}

impl Drop for Filling {
    /// Nothing is copied any more when it is gone.
    fn drop(&mut self) {
        self.work.next.store(usize::MAX / 2, Ordering::Relaxed);
        if let Some(helper) = self.helper.take() {
            // What it has to say interests nobody now.
            let _ = helper.join();
        }
    }
}

#[derive(Debug)]
struct Work {
    memory: Memory,
    file: File,
    contents: Vec<Content>,
    next: AtomicUsize,
}

impl Work {
    fn take_part(&self) -> Result<(), MemoryError> {
        while let Some(content) = self.contents.get(self.next.fetch_add(1, Ordering::Relaxed)) {
            content.bring(&self.memory, &self.file)?;
        }
        Ok(())
    }
}

/// How much memory there is, in bytes.
pub fn size(memory: &Memory) -> u64 {
    memory.iter().map(|region| region.len()).sum()
}

fn map(length: u64) -> Result<MmapRegion, MemoryError> {
    let bytes = usize::try_from(length).map_err(|_| MemoryError::Size(length))?;
    MmapRegion::build(None, bytes, PROTECTION, LAZY | libc::MAP_ANONYMOUS)
        .map_err(|error| MemoryError::Map(length, error))
}

/// Lays a part of a file over memory: nobody sees it change, nor the file.
pub(super) fn lay_over(part: &VolatileSlice, file: &File, offset: i64) -> io::Result<()> {
    map_over(part, 0, file.as_raw_fd(), offset)
}

/// Maps something else in memory's place, as all memory is mapped: see mmap(2).
fn map_over(part: &VolatileSlice, flags: i32, descriptor: RawFd, offset: i64) -> io::Result<()> {
    let (address, flags) = (part.ptr_guard_mut().as_ptr().cast(), LAZY | libc::MAP_FIXED | flags);
    // SAFETY: what is mapped over is memory of the region that `part` borrows, which unmaps all of its range in the end.
    let mapped = unsafe { libc::mmap(address, part.len(), PROTECTION, flags, descriptor, offset) };
    if mapped == libc::MAP_FAILED { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Has memory be a part of a file as long as nobody writes to it, if the host maps that as a large page: whether it does. If
/// not the memory is fresh, as it was.
fn share(part: &VolatileSlice, file: &File, offset: i64) -> io::Result<bool> {
    lay_over(part, file, offset)?;
    // What the host has to read first it reads into a large page then.
    advise_huge(part);
    let touch = |place| part.read_obj::<u8>(place).map_err(io::Error::other);
    touch(0)?;
    let before = faults()?;
    touch(part.len() - 1)?;
    if faults()? == before {
        return Ok(true);
    }
    map_over(part, libc::MAP_ANONYMOUS, -1, 0)?;
    advise_huge(part);
    Ok(false)
}

/// How often this thread has come to a page that was not mapped.
fn faults() -> io::Result<i64> {
    let usage = getrusage(UsageWho::RUSAGE_THREAD)?;
    Ok(usage.minor_page_faults() + usage.major_page_faults())
}

fn copy(part: &VolatileSlice, file: &File, offset: i64) -> io::Result<()> {
    let address = part.ptr_guard_mut().as_ptr().cast();
    // SAFETY: the memory is the slice's, and nobody has a reference to it.
    match unsafe { libc::pread(file.as_raw_fd(), address, part.len(), offset) } {
        -1 => Err(io::Error::last_os_error()),
        read if read.cast_unsigned() == part.len() => Ok(()),
        _ => Err(io::ErrorKind::UnexpectedEof.into()),
    }
}

fn region(start: u64, mapping: MmapRegion) -> Result<GuestRegionMmap, MemoryError> {
    GuestRegionMmap::new(mapping, GuestAddress(start))
        .ok_or_else(|| MemoryError::Regions("a region is beyond all addresses".to_owned()))
}

fn assemble(regions: Vec<GuestRegionMmap>) -> Result<Memory, MemoryError> {
    let memory = GuestMemoryMmap::from_regions(regions).map_err(|error| MemoryError::Regions(error.to_string()))?;
    Ok(Arc::new(memory))
}

/// Where the host does not know the advice, the guest is as it would be without.
fn advise_huge(part: &VolatileSlice) {
    let _ = advise(part, libc::MADV_HUGEPAGE);
}

/// madvise(2).
pub(super) fn advise(part: &VolatileSlice, advice: libc::c_int) -> io::Result<()> {
    // SAFETY: the range is mapped as long as `part` is borrowed. The memory is private to the machine, and its users know
    // that it may be dropped: nobody has a reference into it.
    let advised = unsafe { libc::madvise(part.ptr_guard_mut().as_ptr().cast(), part.len(), advice) };
    if advised == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write as _;

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
    fn memory_from_a_file_leaves_it_alone() {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&vec![1; 5 << 20]).unwrap();
        let hole = 30;
        let pieces = |pieces| Kept::Pieces(Pieces(pieces));
        let contents = [(0, pieces(!(1 << hole))), (2, pieces(u32::MAX >> 16))];
        let contents = contents.map(|(block, kept)| Content { block: Block(block), kept });
        let filled = |size: u64, contents: &[Content]| {
            let (memory, filling) = from_file(size, &file, contents)?;
            filling.complete().map(|()| memory)
        };
        let (one, other) = (filled(5 << 20, &contents).unwrap(), filled(5 << 20, &contents).unwrap());
        let read = |memory: &Memory, address| memory.read_obj::<u8>(GuestAddress(address)).unwrap();
        let places = [(0, 1), ((2 << 20) - 1, 1), (2 << 20, 0), ((4 << 20) - 1, 0), ((5 << 20) - 1, 1)];
        let (start, end) = (hole * PIECE as u64, (hole + 1) * PIECE as u64);
        for (address, value) in places.into_iter().chain([(start - 1, 1), (start, 0), (end - 1, 0), (end, 1)]) {
            assert_eq!(read(&one, address), value, "at {address:#x}");
            one.write_obj(value + 1, GuestAddress(address)).unwrap();
            assert_eq!((read(&one, address), read(&other, address)), (value + 1, value), "at {address:#x}");
        }
        assert!(matches!(filled(2 << 20, &contents), Err(MemoryError::Block(2))));
        file.set_len(4 << 20).unwrap();
        assert!(matches!(filled(5 << 20, &contents), Err(MemoryError::File(_))));
        drop(from_file(5 << 20, &file, &contents).unwrap());
    }

    #[test]
    fn what_is_constant_may_be_written_to_all_the_same() {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&vec![1; BLOCK as usize]).unwrap();
        let places = [0, 70_000, BLOCK - 1];
        // Whether the host has it in a large page depends on where it lies: what it is like does not.
        for size in [BLOCK, BLOCK / 2] {
            file.set_len(size).unwrap();
            let contents = [Content { block: Block(0), kept: Kept::Constant }];
            let (memory, filling) = from_file(size, &file, &contents).unwrap();
            filling.complete().unwrap();
            let places = places.map(|place| place.min(size - 1));
            for place in places {
                assert_eq!(memory.read_obj::<u8>(GuestAddress(place)).unwrap(), 1, "at {place} of {size}");
            }
            memory.write_obj(2u8, GuestAddress(70_000)).unwrap();
            assert_eq!(places.map(|place| memory.read_obj::<u8>(GuestAddress(place)).unwrap()), [1, 2, 1]);
        }
        let mut kept = [0];
        std::os::unix::fs::FileExt::read_exact_at(&file, &mut kept, 70_000).unwrap();
        assert_eq!(kept, [1]);
    }

    #[test]
    fn blocks_beyond_the_devices_are_told_by_their_number() {
        let block = |offset: u64| Block((offset / BLOCK) as u32);
        assert_eq!(block(LOW_END - BLOCK).address(), GuestAddress(LOW_END - BLOCK));
        assert_eq!(block(LOW_END).address(), GuestAddress(HIGH_START));
    }
}
