//! What a machine's memory began as, and giving back to the host what it still has in common with that.
//!
//! A machine gets its memory in large pages, and a clone its template's copied, since small pages one at a time would cost
//! its start dearly. Most of them never change, and much of a large page is never used. So once a machine has nothing to
//! do its memory is compared with what it began as: the files of its kernel and initramfs, its template's, or nothing. A
//! block of which enough is unchanged is replaced by those files' pages, which the host has once for all machines, and
//! by small pages of its own for what differs. What a guest unpacks of its initramfs lies in other places than the archive,
//! and is looked for by its contents.

use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::ops::Range;

use vm_memory::{Address as _, GuestAddress, GuestMemory as _, GuestMemoryRegion as _, VolatileSlice};

use super::memory::{self, Block, MemoryError, advise};
use super::pagemap::PAGE;
use crate::{Memory, Watch};

/// From how many unchanged pages on a block is replaced. The others come to the guest one by one, so few are not worth it.
const WORTH: usize = 64;

/// A part of memory that begins as a part of a file, all at whole pages.
#[derive(Clone, Copy, Debug)]
pub(super) struct Piece<'a> {
    /// Where it is for the guest.
    pub address: u64,
    /// The file, and where it is in that.
    pub file: &'a File,
    pub offset: u64,
    /// In bytes.
    pub length: u64,
    /// Whether the guest copies it to wherever it likes, page by page, and needs it no more once all is copied.
    pub copied: bool,
}

/// What memory began as: in the same places, and zero where it is of no file. The files have to stay as they are.
#[derive(Debug)]
pub(super) struct Origin {
    memory: Memory,
    /// Where pieces begin and end for the guest, in order: one mapping of the host's lies between two of them.
    seams: Vec<u64>,
    /// The pieces that the guest copies: address and length.
    copied: Vec<(GuestAddress, usize)>,
    /// Where the guest only reads.
    constant: Vec<Range<u64>>,
    /// Over the blocks that are replaced; none where the host has none.
    watch: Option<Watch>,
}

impl Origin {
    /// The origin of `size` bytes of memory that began as these pieces, of which the guest only reads `constant`.
    pub fn new(size: u64, pieces: &[Piece<'_>], constant: Vec<Range<u64>>) -> Result<Self, MemoryError> {
        let memory = memory::anonymous(size, false)?;
        for piece in pieces {
            let length = usize::try_from(piece.length).map_err(|_| MemoryError::Size(size))?;
            let part = memory.get_slice(GuestAddress(piece.address), length).map_err(|_| MemoryError::Size(size))?;
            memory::lay_over(&part, piece.file, piece.offset as i64).map_err(MemoryError::File)?;
        }
        for region in memory.iter() {
            let all = region.as_volatile_slice().map_err(|_| MemoryError::Size(size))?;
            // A page that the guest comes to brings no others with it, nor does one that differs.
            advise(&all, libc::MADV_NOHUGEPAGE).map_err(MemoryError::File)?;
        }
        let mut seams: Vec<_> = pieces.iter().flat_map(|piece| [piece.address, piece.address + piece.length]).collect();
        seams.sort_unstable();
        let copied = pieces.iter().filter(|piece| piece.copied);
        let copied = copied.map(|piece| (GuestAddress(piece.address), piece.length as usize)).collect();
        Ok(Self { memory, seams, copied, constant, watch: Watch::new().ok() })
    }

    /// The origin of a clone's memory: the whole of its template's file, region after region.
    pub fn of_template(size: u64, file: &File) -> Result<Self, MemoryError> {
        let mut offset = 0;
        let pieces = memory::layout(size)?.into_iter().map(|(address, length)| {
            let piece = Piece { address, file, offset, length, copied: false };
            offset += length;
            piece
        });
        Self::new(size, &pieces.collect::<Vec<_>>(), Vec::new())
    }

    /// Where the guest may have its copies from, by their contents.
    pub fn copies(&self) -> io::Result<Copies> {
        let mut copies = Copies::default();
        let mut page = [0; PAGE];
        for &(address, length) in &self.copied {
            let all = self.memory.get_slice(address, length).map_err(io::Error::other)?;
            for offset in (0..length).step_by(PAGE) {
                page_of(&all, offset)?.copy_to(&mut page);
                copies.0.insert(crc32fast::hash(&page), address.unchecked_add(offset as u64));
            }
        }
        self.forget_copied()?;
        Ok(copies)
    }

    /// Whether the guest is not expected to write to memory with these contents: all of it is where it only reads, or copies
    /// of pieces.
    pub fn is_constant(&self, address: GuestAddress, contents: &[u8], copies: &Copies) -> io::Result<bool> {
        for (address, page) in (address.0..).step_by(PAGE).zip(contents.as_chunks().0) {
            let only_read = self.constant.iter().any(|range| range.contains(&address));
            if !only_read && self.find(page, copies)?.is_none() {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Whether memory is what is left of a piece that the guest has copied, and means nothing any more.
    pub fn is_left_over(&self, address: GuestAddress, contents: &[u8]) -> io::Result<bool> {
        let end = address.unchecked_add(contents.len() as u64);
        if !self.copied.iter().any(|&(start, length)| start <= address && end <= start.unchecked_add(length as u64)) {
            return Ok(false);
        }
        let origin = self.memory.get_slice(address, contents.len()).map_err(io::Error::other)?;
        let mut page = [0; PAGE];
        for (index, contents) in contents.chunks(PAGE).enumerate() {
            page_of(&origin, index * PAGE)?.copy_to(&mut page);
            if page[..] != *contents {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Replaces a block by its origin, by what was copied into it and by what differs, if that is worth it: whether it was.
    /// Nobody else may use the memory meanwhile.
    ///
    /// # Errors
    /// Where the host cannot; then all or a part of the block is as it was.
    pub fn replace(&self, block: Block, memory: &Memory, copies: &Copies) -> io::Result<bool> {
        let (Some(used), Some(origin)) = (block.of(memory), block.of(&self.memory)) else { return Ok(false) };
        let mut own = Vec::new();
        let mut copied: Vec<Run> = Vec::new();
        let mut page = [0; PAGE];
        for offset in differing(&used, &origin)? {
            page_of(&used, offset)?.copy_to(&mut page);
            match self.find(&page, copies)? {
                Some(from) => match copied.last_mut().filter(|run| run.goes_on(offset, from)) {
                    Some(run) => run.length += PAGE,
                    None => copied.push(Run { offset, from, length: PAGE }),
                },
                None => own.push(offset),
            }
        }
        // The look at it has brought all of it in, which would count as used from now on.
        advise(&origin, libc::MADV_DONTNEED)?;
        self.forget_copied()?;
        if used.len() / PAGE < own.len() + WORTH {
            return Ok(false);
        }
        for offset in own {
            page_of(&used, offset)?.copy_to(&mut page);
            page_of(&origin, offset)?.copy_from(&page);
        }
        let replaced = self.mappings(block, used.len()).into_iter().try_for_each(|(offset, length)| {
            put_in_place(&part(&origin, offset, length)?, &part(&used, offset, length)?)
        });
        // Whatever has become of the block, its copies have to be there; and the origin as it was, where pages were left in it.
        let replaced = replaced.and(advise(&origin, libc::MADV_DONTNEED));
        for Run { offset, from, length } in copied {
            let (from, to) =
                (self.memory.get_slice(from, length).map_err(io::Error::other)?, part(&used, offset, length)?);
            if put_in_place(&from, &to).is_err() {
                from.copy_to_volatile_slice(to);
            }
        }
        replaced?;
        if let Some(watch) = &self.watch {
            // Without it the block takes more than it needs, and is right all the same.
            let _ = watch.over(used.ptr_guard_mut().as_ptr().addr(), used.len());
        }
        Ok(true)
    }

    /// The page of a copied piece that is the same as this one.
    fn find(&self, page: &[u8; PAGE], copies: &Copies) -> io::Result<Option<GuestAddress>> {
        let Some(&address) = copies.0.get(&crc32fast::hash(page)) else { return Ok(None) };
        let candidate = self.memory.get_slice(address, PAGE).map_err(io::Error::other)?;
        let mut same = [0; PAGE];
        candidate.copy_to(&mut same);
        Ok((same == *page).then_some(address))
    }

    /// Has the pages of copied pieces be as untouched.
    fn forget_copied(&self) -> io::Result<()> {
        self.copied.iter().try_for_each(|&(address, length)| {
            advise(&self.memory.get_slice(address, length).map_err(io::Error::other)?, libc::MADV_DONTNEED)
        })
    }

    /// The mappings that a block consists of: offset and length.
    fn mappings(&self, block: Block, length: usize) -> Vec<(usize, usize)> {
        let start = block.address().0;
        let inside = self.seams.iter().filter_map(|seam| seam.checked_sub(start)).map(|seam| seam as usize);
        let mut ends: Vec<_> = inside.filter(|&seam| seam > 0 && seam < length).chain([length]).collect();
        ends.dedup();
        let starts = [0].into_iter().chain(ends.clone());
        starts.zip(ends).map(|(start, end)| (start, end - start)).collect()
    }
}

/// The pages that a guest copies, by their checksums: what has the same one has to be looked at.
#[derive(Debug, Default)]
pub(super) struct Copies(HashMap<u32, GuestAddress>);

/// Successive pages of a block that are the same as successive ones of a piece.
struct Run {
    /// In the block.
    offset: usize,
    from: GuestAddress,
    length: usize,
}

impl Run {
    fn goes_on(&self, offset: usize, from: GuestAddress) -> bool {
        self.offset + self.length == offset && self.from.0 + self.length as u64 == from.0
    }
}

/// The offsets of the pages that are not the same in both.
fn differing(one: &VolatileSlice<'_>, other: &VolatileSlice<'_>) -> io::Result<Vec<usize>> {
    let (mut left, mut right) = ([0; PAGE], [0; PAGE]);
    let mut differing = Vec::new();
    for offset in (0..one.len()).step_by(PAGE) {
        page_of(one, offset)?.copy_to(&mut left);
        page_of(other, offset)?.copy_to(&mut right);
        if left != right {
            differing.push(offset);
        }
    }
    Ok(differing)
}

fn page_of<'a>(all: &VolatileSlice<'a>, offset: usize) -> io::Result<VolatileSlice<'a>> {
    part(all, offset, PAGE)
}

fn part<'a>(all: &VolatileSlice<'a>, offset: usize, length: usize) -> io::Result<VolatileSlice<'a>> {
    all.subslice(offset, length).map_err(io::Error::other)
}

/// Whether any of a block has come into memory, or is a file's: mincore(2). It is wrong of pages that are swapped out, which
/// are better left alone.
pub(super) fn is_there(block: Block, memory: &Memory) -> io::Result<bool> {
    let Some(part) = block.of(memory) else { return Ok(false) };
    let mut pages = vec![0u8; part.len().div_ceil(PAGE)];
    // SAFETY: the range is mapped as long as `part` is borrowed, and the vector has a byte for each of its pages.
    let told = unsafe { libc::mincore(part.ptr_guard_mut().as_ptr().cast(), part.len(), pages.as_mut_ptr()) };
    if told == 0 { Ok(pages.iter().any(|page| page & 1 != 0)) } else { Err(io::Error::last_os_error()) }
}

/// Moves the pages of `from` into the place of those of `to`. What is left of `from` is as it was first mapped.
fn put_in_place(from: &VolatileSlice<'_>, to: &VolatileSlice<'_>) -> io::Result<()> {
    let flags = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED | libc::MREMAP_DONTUNMAP;
    let [from_address, to_address] = [from, to].map(|part| part.ptr_guard_mut().as_ptr().cast());
    // SAFETY: both ranges are mapped as long as they are borrowed, have one length, and stay mapped; both are memory to
    // which nobody has a reference.
    let moved = unsafe { libc::mremap(from_address, from.len(), to.len(), flags, to_address) };
    if moved == libc::MAP_FAILED { Err(io::Error::last_os_error()) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use vm_memory::Bytes as _;

    use super::super::pagemap::{Page, PageMap};
    use super::*;

    const SIZE: u64 = 3 * memory::BLOCK;

    fn file(length: u64) -> File {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&vec![7; length as usize]).unwrap();
        file
    }

    /// How many bytes of it the host keeps for this process alone.
    fn private(memory: &Memory) -> u64 {
        count(memory, |page| page.is_present() && !page.is_of_a_file())
    }

    /// How many bytes of it are mapped, a file's and others.
    fn mapped(memory: &Memory) -> u64 {
        count(memory, Page::is_present)
    }

    /// Counts page by page: smaps(5) speaks of mappings, and what other tests have mapped beside it may be in one with it.
    fn count(memory: &Memory, which: impl Fn(Page) -> bool) -> u64 {
        let part = memory.get_slice(GuestAddress(0), SIZE as usize).unwrap();
        let pages = PageMap::open().unwrap().pages(&part).unwrap();
        pages.filter(|&page| which(page)).count() as u64 * PAGE as u64
    }

    #[test]
    fn what_is_unchanged_is_given_back_and_the_rest_stays() {
        let file = file(2 * memory::BLOCK);
        let piece =
            Piece { address: memory::BLOCK, file: &file, offset: memory::BLOCK, length: memory::BLOCK, copied: false };
        let origin = Origin::new(SIZE, &[piece], Vec::new()).unwrap();
        let replace = |block, memory| origin.replace(block, memory, &Copies::default()).unwrap();
        let memory = memory::anonymous(SIZE, true).unwrap();
        // The first is nothing but a page, the second the file's but for two, and the third was never there.
        memory.write_obj(1u8, GuestAddress(5000)).unwrap();
        memory.write_slice(&vec![7; memory::BLOCK as usize], GuestAddress(memory::BLOCK)).unwrap();
        for offset in [0, memory::BLOCK - 1] {
            memory.write_obj(9u8, GuestAddress(memory::BLOCK + offset)).unwrap();
        }
        let before = private(&memory);
        for (index, replaced) in [true, true, false].into_iter().enumerate() {
            let block = Block(index as u32);
            assert_eq!(is_there(block, &memory).unwrap(), replaced, "{index}");
            assert!(!replaced || replace(block, &memory), "{index}");
        }
        let after = private(&memory);
        assert!(before >= memory::BLOCK && after == 3 * PAGE as u64, "{before} {after}");
        let byte = |address| memory.read_obj::<u8>(GuestAddress(address)).unwrap();
        let expected =
            [(5000, 1), (0, 0), (memory::BLOCK, 9), (memory::BLOCK + 1, 7), (2 * memory::BLOCK - 1, 9), (SIZE - 1, 0)];
        for (address, value) in expected {
            assert_eq!(byte(address), value, "at {address:#x}");
        }

        // It is the guest's memory as before: written to, and given back once more.
        memory.write_obj(3u8, GuestAddress(memory::BLOCK + 100_000)).unwrap();
        assert!(replace(Block(1), &memory));
        assert_eq!((byte(memory::BLOCK + 100_000), byte(memory::BLOCK), byte(memory::BLOCK + 200_000)), (3, 9, 7));
        drop(origin);
        assert_eq!(byte(memory::BLOCK + 300_000), 7);
    }

    #[test]
    fn what_has_changed_altogether_stays_as_it_is() {
        let origin = Origin::of_template(SIZE, &file(SIZE)).unwrap();
        let memory = memory::anonymous(SIZE, true).unwrap();
        memory.write_slice(&vec![8; memory::BLOCK as usize], GuestAddress(0)).unwrap();
        for block in [0, 9].map(Block) {
            assert!(!origin.replace(block, &memory, &Copies::default()).unwrap());
        }
    }

    #[test]
    fn what_was_copied_is_given_back_wherever_it_is() {
        const PAGES: usize = 100;
        let mut file = tempfile::tempfile().unwrap();
        let bytes: Vec<u8> = (0..PAGES * PAGE).map(|place| (place / PAGE + place % 7) as u8).collect();
        file.write_all(&bytes).unwrap();
        let length = bytes.len() as u64;
        // In the middle of a block: before and behind it there is nothing.
        let address = 2 * memory::BLOCK + length;
        let origin =
            Origin::new(SIZE, &[Piece { address, file: &file, offset: 0, length, copied: true }], Vec::new()).unwrap();
        assert_eq!(
            origin.mappings(Block(2), memory::BLOCK as usize),
            [
                (0, PAGES * PAGE),
                (PAGES * PAGE, PAGES * PAGE),
                (2 * PAGES * PAGE, memory::BLOCK as usize - 2 * PAGES * PAGE)
            ]
        );
        let memory = memory::anonymous(SIZE, true).unwrap();
        memory.write_slice(&bytes, GuestAddress(address)).unwrap();
        // In two parts, which change places, and of which a page is not quite the same.
        let (one, other) = bytes.split_at(40 * PAGE);
        let copy = [other, one].concat();
        memory.write_slice(&copy, GuestAddress(10 * PAGE as u64)).unwrap();
        memory.write_obj(255u8, GuestAddress(20 * PAGE as u64 + 5)).unwrap();
        let copies = origin.copies().unwrap();
        for block in [0, 2].map(Block) {
            assert!(origin.replace(block, &memory, &copies).unwrap());
        }
        assert_eq!((private(&memory), mapped(&memory)), (PAGE as u64, PAGE as u64));
        let mut read = vec![0; bytes.len()];
        memory.read_slice(&mut read, GuestAddress(address)).unwrap();
        assert!(read == bytes);
        memory.read_slice(&mut read, GuestAddress(10 * PAGE as u64)).unwrap();
        assert_eq!(std::mem::replace(&mut read[10 * PAGE + 5], copy[10 * PAGE + 5]), 255);
        assert!(read == copy);
        // The guest writes where it likes, and the file is as it was; the next time it is found once more.
        memory.write_obj(1u8, GuestAddress(11 * PAGE as u64)).unwrap();
        assert!(origin.replace(Block(0), &memory, &origin.copies().unwrap()).unwrap());
        assert_eq!(private(&memory), 2 * PAGE as u64);
        let byte: u8 = memory.read_obj(GuestAddress(address + 41 * PAGE as u64)).unwrap();
        assert_eq!(byte, bytes[41 * PAGE]);
    }

    #[test]
    fn a_file_that_ends_too_soon_begins_nothing() {
        let file = file(100);
        let piece = Piece { address: SIZE, file: &file, offset: 0, length: memory::BLOCK, copied: false };
        assert!(Origin::new(SIZE, &[piece], Vec::new()).is_err(), "it lies outside the memory");
    }
}
