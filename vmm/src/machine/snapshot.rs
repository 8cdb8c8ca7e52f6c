//! Machines in files: a machine at rest, written down so that another process can let it go on.
//!
//! Two files. The state file begins with [`MAGIC`], the version of the format, the length of the body in bytes and its
//! CRC-32, each little endian; the body is the machine's processors and devices. The memory file is the guest's memory,
//! region after region, with holes where it is zero; clones map it, and never write to it. Whatever comes back from
//! either is as untrusted as a guest.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::unix::fs::FileExt as _;

use serde::{Deserialize, Serialize};
use thiserror::Error;
use vm_memory::{Bytes as _, GuestMemory as _, GuestMemoryRegion as _, GuestRegionMmap, MemoryRegionAddress};

use super::x86::state::{VcpuState, VmState};
use super::{Flavour, MAX_VCPUS, memory};
use crate::Memory;
use crate::virtio::transport::SavedTransport;

const MAGIC: [u8; 8] = *b"RUNVM-VM";
/// To be raised whenever the body's form or meaning changes.
const VERSION: u32 = 1;
const HEADER: usize = 24;
/// No machine has more beside its memory.
const MAX_BODY: u64 = 256 << 20;

const PAGE: usize = 4096;
/// How much is looked at and written at once.
const CHUNK: usize = 64 * PAGE;

/// A machine at rest, without its memory.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Saved {
    pub flavour: Flavour,
    /// In bytes.
    pub memory: u64,
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

/// Writes memory into an empty file: what is zero becomes a hole.
pub(super) fn write_memory(memory: &Memory, file: &File) -> Result<(), SnapshotError> {
    let write = failed("write the guest's memory");
    write_regions(memory, file).map_err(write)
}

fn write_regions(memory: &Memory, file: &File) -> io::Result<()> {
    file.set_len(memory::size(memory))?;
    let mut base = 0;
    let mut chunk = vec![0; CHUNK];
    for region in memory.iter() {
        let resident = Residence::of(region);
        for start in (0..region.len()).step_by(CHUNK) {
            if !resident.any(start, CHUNK) {
                continue;
            }
            let length = CHUNK.min((region.len() - start) as usize);
            let chunk = &mut chunk[..length];
            region.read_slice(chunk, MemoryRegionAddress(start)).map_err(io::Error::other)?;
            write_pages(file, base + start, chunk)?;
        }
        base += region.len();
    }
    Ok(())
}

/// Writes those pages of a chunk that are not zero, neighbours together.
fn write_pages(file: &File, offset: u64, chunk: &[u8]) -> io::Result<()> {
    let zero = [0; PAGE];
    let full: Vec<_> = chunk.chunks(PAGE).map(|page| page != &zero[..page.len()]).collect();
    let mut page = 0;
    while page < full.len() {
        let run = full[page..].iter().take_while(|&&full| full).count();
        if run > 0 {
            let bytes = &chunk[page * PAGE..((page + run) * PAGE).min(chunk.len())];
            file.write_all_at(bytes, offset + (page * PAGE) as u64)?;
        }
        page += run.max(1);
    }
    Ok(())
}

/// Opens the memory of a snapshot for a clone.
pub(super) fn map_memory(size: u64, file: File) -> Result<Memory, SnapshotError> {
    let length = file.metadata().map_err(failed("read the guest's memory"))?.len();
    if length != size {
        return Err(SnapshotError::Damaged("its memory has another length"));
    }
    memory::private_copy(size, file).map_err(|_| SnapshotError::Damaged("its memory cannot be mapped"))
}

/// Which pages of fresh memory have ever been touched.
struct Residence(Option<Vec<u8>>);

impl Residence {
    fn of(region: &GuestRegionMmap) -> Self {
        // Of a mapped file it would tell what the page cache holds.
        if region.file_offset().is_some() {
            return Self(None);
        }
        let length = region.len() as usize;
        let mut pages = vec![0; length.div_ceil(PAGE)];
        // SAFETY: the range is the region's mapping, and the vector has a byte for each of its pages.
        let asked = unsafe { libc::mincore(region.as_ptr().cast(), length, pages.as_mut_ptr()) };
        Self((asked == 0).then_some(pages))
    }

    fn any(&self, start: u64, length: usize) -> bool {
        let Some(pages) = &self.0 else { return true };
        let first = start as usize / PAGE;
        pages.iter().skip(first).take(length.div_ceil(PAGE)).any(|page| page & 1 == 1)
    }
}

fn failed(step: &'static str) -> impl FnOnce(io::Error) -> SnapshotError {
    move |source| SnapshotError::File { step, source }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::MetadataExt as _;
    use vm_memory::GuestAddress;

    #[test]
    fn memory_goes_through_a_sparse_file() {
        let memory = memory::anonymous(64 << 20, false).unwrap();
        let places = [0, 4095, 4096, (1 << 20) + 7, (64 << 20) - 1];
        for (value, place) in (1u8..).zip(places) {
            memory.write_obj(value, GuestAddress(place)).unwrap();
        }
        let file = tempfile::tempfile().unwrap();
        write_memory(&memory, &file).unwrap();
        assert!(file.metadata().unwrap().blocks() * 512 < 1 << 20);
        let again = map_memory(64 << 20, file.try_clone().unwrap()).unwrap();
        for (value, place) in (1u8..).zip(places) {
            assert_eq!(again.read_obj::<u8>(GuestAddress(place)).unwrap(), value);
        }
        again.write_obj(9u8, GuestAddress(12_345)).unwrap();
        let second = tempfile::tempfile().unwrap();
        write_memory(&again, &second).unwrap();
        let third = map_memory(64 << 20, second).unwrap();
        assert_eq!(third.read_obj::<u8>(GuestAddress(12_345)).unwrap(), 9);
        assert_eq!(third.read_obj::<u8>(GuestAddress(4096)).unwrap(), 3);
        file.set_len(1 << 20).unwrap();
        assert!(matches!(map_memory(64 << 20, file), Err(SnapshotError::Damaged(_))));
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
