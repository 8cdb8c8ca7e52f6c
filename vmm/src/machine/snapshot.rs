//! Machines in files: a machine at rest, written down so that another process can let it go on.
//!
//! Two files. The state file begins with [`MAGIC`], the version of the format, the length of the body in bytes and its
//! CRC-32, each little endian; the body is the machine's processors and devices, and which pieces of its memory the other
//! file has. That is the guest's memory, region after region, with holes for what is zero or free; clones never write
//! to it. Whatever comes back from either is as untrusted as a guest.

use std::collections::BTreeSet;
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::unix::fs::FileExt as _;

use serde::{Deserialize, Serialize};
use thiserror::Error;
use vm_memory::Address as _;

use super::memory::{BLOCK, Block, Content, Filling, Kept, PIECE, Pieces};
use super::origin::Origin;
use super::pagemap::{Page, PageMap};
use super::x86::host::Host;
use super::x86::state::{VcpuState, VmState};
use super::{Flavour, MAX_VCPUS, memory};
use crate::Memory;
use crate::virtio::transport::SavedTransport;

const MAGIC: [u8; 8] = *b"RUNVM-VM";
/// To be raised whenever the body's form or meaning changes.
const VERSION: u32 = 6;
const HEADER: usize = 24;
/// No machine has more beside its memory.
const MAX_BODY: u64 = 256 << 20;

const NO_MEMORY: &str = "its memory cannot be had";

/// What is needed to boot, and never again; memory after it that a guest maps in small pages anyway.
const FIRST: Block = Block(0);

static ZERO: [u8; PIECE] = [0; PIECE];

/// A machine at rest, without its memory.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Saved {
    pub flavour: Flavour,
    /// In bytes.
    pub memory: u64,
    /// What the memory file has of it.
    pub contents: Vec<Content>,
    /// Where the descriptions of its processors are from.
    pub host: Host,
    pub vcpus: Vec<VcpuState>,
    pub vm: VmState,
    pub devices: Vec<SavedTransport>,
}

/// Files that hold no machine, or take none.
#[derive(Debug, Error)]
pub enum SnapshotError {
    /// Reading or writing failed.
    #[error("cannot {step}")]
    File {
        /// Completes "cannot …".
        step: &'static str,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// Not a snapshot.
    #[error("the file is no snapshot of a machine")]
    Foreign,
    /// A snapshot of another version of this program.
    #[error("the snapshot has version {0} of the format, and this program reads version {VERSION}")]
    Version(u32),
    /// A snapshot that is not as it was written.
    #[error("the snapshot is damaged: {0}")]
    Damaged(&'static str),
    /// The machine cannot be written down.
    #[error("the machine's state cannot be written down")]
    Encode(#[source] postcard::Error),
    /// A snapshot of a machine that this host, or this configuration, cannot take over.
    #[error("the snapshot is of another kind of machine: its {0} differ")]
    Mismatch(&'static str),
}

impl Saved {
    pub fn write(&self, mut file: impl Write) -> Result<(), SnapshotError> {
        let body = postcard::to_stdvec(self).map_err(SnapshotError::Encode)?;
        let write = failed("write the machine's state");
        file.write_all(&header(&body)).and_then(|()| file.write_all(&body)).map_err(write)
    }

    pub fn read(mut file: impl Read) -> Result<Self, SnapshotError> {
        let mut header = [0; HEADER];
        match file.read_exact(&mut header) {
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Err(SnapshotError::Foreign),
            read => read.map_err(failed("read the machine's state"))?,
        }
        let (magic, rest) = header.split_at(8);
        let (version, rest) = rest.split_at(4);
        let (length, checksum) = rest.split_at(8);
        if magic != MAGIC {
            return Err(SnapshotError::Foreign);
        }
        let version = little_endian(version) as u32;
        if version != VERSION {
            return Err(SnapshotError::Version(version));
        }
        let length = little_endian(length);
        if length > MAX_BODY {
            return Err(SnapshotError::Damaged("it is longer than any"));
        }
        let mut body = Vec::new();
        file.take(length + 1).read_to_end(&mut body).map_err(failed("read the machine's state"))?;
        if body.len() as u64 != length {
            return Err(SnapshotError::Damaged("its length is not what it says"));
        }
        if u64::from(crc32fast::hash(&body)) != little_endian(checksum) {
            return Err(SnapshotError::Damaged("its checksum is wrong"));
        }
        let saved: Self =
            postcard::from_bytes(&body).map_err(|_| SnapshotError::Damaged("its fields are not those"))?;
        if saved.vcpus.is_empty() || saved.vcpus.len() > MAX_VCPUS as usize {
            return Err(SnapshotError::Damaged("its number of processors is none"));
        }
        memory::layout(saved.memory).map_err(|_| SnapshotError::Damaged("its memory has no possible size"))?;
        Ok(saved)
    }
}

/// What a state file begins with that has this body.
fn header(body: &[u8]) -> [u8; HEADER] {
    let mut header = [0; HEADER];
    header[..8].copy_from_slice(&MAGIC);
    header[8..12].copy_from_slice(&VERSION.to_le_bytes());
    header[12..20].copy_from_slice(&(body.len() as u64).to_le_bytes());
    header[20..].copy_from_slice(&crc32fast::hash(body).to_le_bytes());
    header
}

/// The devices in a state file, for fuzzers.
///
/// # Errors
/// [`SnapshotError`].
#[cfg(feature = "driver")]
pub fn saved_devices(file: impl Read) -> Result<Vec<SavedTransport>, SnapshotError> {
    Saved::read(file).map(|saved| saved.devices)
}

/// A state file of this body, whose length and checksum are true, for fuzzers.
#[cfg(feature = "driver")]
pub fn state_file(body: &[u8]) -> Vec<u8> {
    [&header(body), body].concat()
}

fn little_endian(bytes: &[u8]) -> u64 {
    bytes.iter().rev().fold(0, |value, &byte| value << 8 | u64::from(byte))
}

/// Writes memory into an empty file, and tells what: all that is not zero, nor left over of what the guest has copied since
/// its `origin`. Blocks that were `trimmed` may be there although no page of theirs is.
pub(super) fn write_memory(
    memory: &Memory,
    origin: &Origin,
    trimmed: &BTreeSet<Block>,
    pages: &PageMap,
    file: &File,
) -> Result<Vec<Content>, SnapshotError> {
    write_contents(memory, origin, trimmed, pages, file).map_err(failed("write the guest's memory"))
}

fn write_contents(
    memory: &Memory,
    origin: &Origin,
    trimmed: &BTreeSet<Block>,
    pages: &PageMap,
    file: &File,
) -> io::Result<Vec<Content>> {
    let size = memory::size(memory);
    file.set_len(size)?;
    let copies = origin.copies()?;
    let mut written = Vec::new();
    let mut bytes = vec![0; BLOCK as usize];
    for block in Block::all(size) {
        let part = block.of(memory).ok_or(io::ErrorKind::InvalidInput)?;
        if !trimmed.contains(&block) && !pages.pages(&part)?.any(Page::is_kept) {
            continue;
        }
        let bytes = &mut bytes[..part.len()];
        part.copy_to(bytes);
        let pieces = meaningful(block, bytes, origin)?;
        if pieces == Pieces::default() {
            continue;
        }
        let constant = bytes.len() as u64 == BLOCK && origin.is_constant(block.address(), bytes, &copies)?;
        // The host keeps a file in the pieces that it was written in.
        let (kept, pieces, at_once) = match block {
            _ if constant => (Kept::Constant, Pieces::ALL, bytes.len()),
            FIRST => (Kept::Seldom(pieces), pieces, PIECE),
            _ => (Kept::Pieces(pieces), pieces, PIECE),
        };
        for run in pieces.runs() {
            let run = run.start..run.end.min(bytes.len());
            for offset in run.clone().step_by(at_once) {
                let end = run.end.min(offset + at_once);
                file.write_all_at(&bytes[offset..end], block.offset() + offset as u64)?;
            }
        }
        written.push(Content { block, kept });
    }
    Ok(written)
}

/// The pieces of a block that a clone needs.
fn meaningful(block: Block, bytes: &[u8], origin: &Origin) -> io::Result<Pieces> {
    let mut pieces = 0;
    for (index, piece) in (0..).zip(bytes.chunks(PIECE)) {
        let address = block.address().unchecked_add(index * PIECE as u64);
        if piece != &ZERO[..piece.len()] && !origin.is_left_over(address, piece)? {
            pieces |= 1 << index;
        }
    }
    Ok(Pieces(pieces))
}

/// The memory of a snapshot for a clone, which is there once the filling is complete.
pub(super) fn read_memory(size: u64, contents: &[Content], file: &File) -> Result<(Memory, Filling), SnapshotError> {
    let length = file.metadata().map_err(failed("read the guest's memory"))?.len();
    if length != size {
        return Err(SnapshotError::Damaged("its memory has another length"));
    }
    if !contents.is_sorted_by(|one, next| one.block < next.block) {
        return Err(SnapshotError::Damaged("its memory is not in order"));
    }
    memory::from_file(size, file, contents).map_err(|_| SnapshotError::Damaged(NO_MEMORY))
}

/// That its memory is there.
pub(super) fn await_memory(filling: Filling) -> Result<(), SnapshotError> {
    filling.complete().map_err(|_| SnapshotError::Damaged(NO_MEMORY))
}

fn failed(step: &'static str) -> impl FnOnce(io::Error) -> SnapshotError {
    move |source| SnapshotError::File { step, source }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::machine::origin::Piece;
    use crate::machine::pagemap::PAGE;
    use std::os::unix::fs::MetadataExt as _;
    use vm_memory::{Bytes as _, GuestAddress};

    #[test]
    fn memory_goes_through_a_sparse_file() {
        let memory = memory::anonymous(64 << 20, false).unwrap();
        let places = [0, 4095, 4096, (1 << 20) + 7, (64 << 20) - 1];
        for (value, place) in (1u8..).zip(places) {
            memory.write_obj(value, GuestAddress(place)).unwrap();
        }
        let _: u8 = memory.read_obj(GuestAddress(10 << 20)).unwrap();
        let origin = Origin::new(64 << 20, &[], Vec::new()).unwrap();
        let write = |memory: &Memory| {
            let file = tempfile::tempfile().unwrap();
            let contents = write_memory(memory, &origin, &BTreeSet::new(), &PageMap::open().unwrap(), &file).unwrap();
            (file, contents)
        };
        let (file, contents) = write(&memory);
        let expected = [(0, Kept::Seldom(Pieces(1 << 16 | 1))), (31, Kept::Pieces(Pieces(1 << 31)))];
        let expected = expected.map(|(block, kept)| Content { block: Block(block), kept });
        assert_eq!(contents, expected);
        assert!(file.metadata().unwrap().blocks() * 512 <= 4 * PIECE as u64);
        let read = |contents: &[Content], file: &File| {
            let (memory, filling) = read_memory(64 << 20, contents, file)?;
            await_memory(filling).map(|()| memory)
        };
        let again = read(&contents, &file).unwrap();
        for (value, place) in (1u8..).zip(places) {
            assert_eq!(again.read_obj::<u8>(GuestAddress(place)).unwrap(), value);
        }
        again.write_obj(9u8, GuestAddress(12_345)).unwrap();
        let (second, contents) = write(&again);
        let third = read(&contents, &second).unwrap();
        assert_eq!(third.read_obj::<u8>(GuestAddress(12_345)).unwrap(), 9);
        assert_eq!(third.read_obj::<u8>(GuestAddress(4096)).unwrap(), 3);
        let twice = [contents[0], contents[0]];
        assert!(matches!(read(&twice, &second), Err(SnapshotError::Damaged(_))));
        file.set_len(1 << 20).unwrap();
        assert!(matches!(read(&contents, &file), Err(SnapshotError::Damaged(_))));
    }

    #[test]
    fn what_is_constant_is_written_at_once_and_what_is_left_over_is_not() {
        const SIZE: u64 = 5 * BLOCK;
        let archive: Vec<u8> = (0..2 * BLOCK as usize / PAGE).flat_map(|page| [page as u8 | 1; PAGE]).collect();
        let file = tempfile::tempfile().unwrap();
        file.write_all_at(&archive, 0).unwrap();
        let piece = Piece { address: 2 * BLOCK, file: &file, offset: 0, length: 2 * BLOCK, copied: true };
        let read_only = 0..BLOCK;
        let origin = Origin::new(SIZE, &[piece], vec![read_only]).unwrap();
        let memory = memory::anonymous(SIZE, false).unwrap();
        // The kernel's, with something between two segments; the archive's copy, and what it was copied from, of which
        // something is in use again; and a copy that something was written to.
        memory.write_obj(1u8, GuestAddress(70_000)).unwrap();
        let (half, rest) = archive.split_at(BLOCK as usize);
        memory.write_slice(half, GuestAddress(BLOCK)).unwrap();
        memory.write_slice(&archive, GuestAddress(2 * BLOCK)).unwrap();
        memory.write_obj(2u8, GuestAddress(3 * BLOCK + PIECE as u64)).unwrap();
        memory.write_slice(rest, GuestAddress(4 * BLOCK)).unwrap();
        memory.write_obj(2u8, GuestAddress(5 * BLOCK - 1)).unwrap();
        let (pages, file) = (PageMap::open().unwrap(), tempfile::tempfile().unwrap());
        let contents = write_memory(&memory, &origin, &BTreeSet::new(), &pages, &file).unwrap();
        let pieces = |pieces| Kept::Pieces(Pieces(pieces));
        let expected = [(0, Kept::Constant), (1, Kept::Constant), (3, pieces(1 << 1)), (4, pieces(u32::MAX))];
        assert_eq!(contents, expected.map(|(block, kept)| Content { block: Block(block), kept }));
        let (again, filling) = read_memory(SIZE, &contents, &file).unwrap();
        await_memory(filling).unwrap();
        let of = |memory: &Memory, address: u64| memory.read_obj::<u8>(GuestAddress(address)).unwrap();
        for address in [0, 70_000, BLOCK, 2 * BLOCK - 1, 3 * BLOCK + PIECE as u64, 4 * BLOCK, 5 * BLOCK - 1] {
            assert_eq!(of(&again, address), of(&memory, address), "at {address:#x}");
        }
        assert_eq!(of(&again, 2 * BLOCK), 0);
        // Written down once more: the pages that are a file's need not be there.
        let constant = [0, 1].map(Block).into();
        let origin = Origin::of_template(SIZE, &file).unwrap();
        let contents = write_memory(&again, &origin, &constant, &pages, &tempfile::tempfile().unwrap()).unwrap();
        assert_eq!(contents.iter().map(|content| content.block.0).collect::<Vec<_>>(), [0, 1, 3, 4]);
    }

    #[test]
    fn what_is_no_snapshot_is_refused() {
        let body = b"no machine at all";
        let file = [&header(body)[..], body].concat();
        assert!(matches!(Saved::read(&file[..]), Err(SnapshotError::Damaged("its fields are not those"))));
        assert!(matches!(Saved::read(&file[..10]), Err(SnapshotError::Foreign)));
        assert!(matches!(Saved::read(&file[..30]), Err(SnapshotError::Damaged("its length is not what it says"))));
        let changed = |place: usize, value| {
            let mut file = file.clone();
            file[place] = value;
            Saved::read(&file[..]).unwrap_err()
        };
        assert!(matches!(changed(0, 0), SnapshotError::Foreign));
        assert!(matches!(changed(8, 9), SnapshotError::Version(9)));
        assert!(matches!(changed(19, 9), SnapshotError::Damaged("it is longer than any")));
        assert!(matches!(changed(26, 0), SnapshotError::Damaged("its checksum is wrong")));
    }
}
