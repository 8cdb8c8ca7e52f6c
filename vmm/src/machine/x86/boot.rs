//! Putting a kernel into memory and describing the machine to it: Linux's 64-bit boot protocol
//! (Documentation/arch/x86/boot.rst), with the kernel an uncompressed ELF file.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt as _;
use std::thread;

use linux_loader::bootparam::{boot_e820_entry, boot_params};
use linux_loader::loader::{Elf, KernelLoader as _};
use object::LittleEndian;
use object::elf::{FileHeader64, PF_W, PT_LOAD, ProgramHeader64};
use object::read::elf::{FileHeader as _, ProgramHeader as _};
use thiserror::Error;
use vm_memory::{Bytes as _, GuestAddress, GuestMemoryError};

use super::mptable;
use crate::Memory;
use crate::machine::memory::{self, BLOCK};
use crate::machine::origin::Piece;

/// The guest-physical addresses of what is written for the kernel, all in the first MiB. The MP table is at 0.
const GDT: u64 = 0x800;
const ZERO_PAGE: u64 = 0x7000;
const PML4: u64 = 0x9000;
const PDPT: u64 = 0xa000;
const PAGE_DIRECTORY: u64 = 0xb000;
const COMMAND_LINE: u64 = 0x2_0000;
/// The kernel reads no more: COMMAND_LINE_SIZE.
const MAX_COMMAND_LINE: usize = 2048;
/// Where a PC's memory ends before the hole for its BIOS.
const LOW_MEMORY_END: u64 = 0x9_fc00;
const KERNEL_START: u64 = 0x10_0000;

const E820_RAM: u32 = 1;
const BOOT_FLAG: u16 = 0xaa55;
const HEADER_MAGIC: u32 = 0x5372_6448;
const LOADER_UNDEFINED: u8 = 0xff;
const PAGE: u64 = 0x1000;

/// What is booted.
#[derive(Debug)]
pub struct Kernel {
    /// An uncompressed ELF kernel.
    pub image: File,
    /// The initial root.
    pub initramfs: Option<File>,
    /// The kernel's parameters.
    pub command_line: String,
}

/// A kernel that cannot be put into memory.
#[derive(Debug, Error)]
pub enum BootError {
    /// Not a kernel.
    #[error("the guest kernel is no ELF image that can be booted: {0}")]
    Kernel(linux_loader::loader::Error),
    /// Not readable.
    #[error("cannot read the initramfs")]
    Initramfs(#[source] io::Error),
    /// Too large.
    #[error("the initramfs of {size} bytes does not fit into {memory} bytes of memory")]
    TooLarge {
        /// The archive's size in bytes.
        size: u64,
        /// The guest's, in bytes.
        memory: u64,
    },
    /// Too long.
    #[error("the kernel's command line of {0} bytes is longer than {MAX_COMMAND_LINE}")]
    CommandLine(usize),
    /// Too little memory for anything.
    #[error("the guest's memory is too small to boot in")]
    Memory(#[from] GuestMemoryError),
}

/// Where a kernel is entered, and with what.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry {
    /// The first instruction.
    pub instruction: u64,
    /// What RSI holds: the zero page.
    pub parameters: u64,
    /// What CR3 holds: page tables that map the first GiB to itself.
    pub page_tables: u64,
    /// The segment descriptors: address, and length in bytes.
    pub gdt: (u64, u16),
}

/// The segments of the boot protocol: nothing twice, code, data, and a task state.
pub const SEGMENTS: [u64; 4] = [0, 0, 0x00af_9b00_0000_ffff, 0x00cf_9300_0000_ffff];

/// Puts a kernel into memory.
///
/// # Errors
/// [`BootError`].
pub fn load(memory: &Memory, kernel: &mut Kernel, vcpus: u32) -> Result<Entry, BootError> {
    let total = memory::size(memory);
    let Kernel { image, initramfs, .. } = kernel;
    let place = initramfs.as_ref().map(|archive| initramfs_place(archive, image, total)).transpose()?;
    let (loaded, initramfs) = thread::scope(|scope| {
        let archive = initramfs.as_mut().zip(place.clone());
        let load = || archive.map(|(archive, place)| load_initramfs(memory, archive, place)).transpose();
        let loading = thread::Builder::new().spawn_scoped(scope, load).map_err(BootError::Initramfs)?;
        let loaded = Elf::load(&**memory, None, image, Some(GuestAddress(KERNEL_START))).map_err(BootError::Kernel)?;
        let initramfs = loading.join().map_err(|_| BootError::Initramfs(io::ErrorKind::Interrupted.into()))??;
        Ok::<_, BootError>((loaded, initramfs))
    })?;
    if let Some(place) = place.filter(|place| place.start < loaded.kernel_end && kernel_start(image) < place.end) {
        return Err(BootError::TooLarge { size: place.end - place.start, memory: total });
    }
    if kernel.command_line.len() >= MAX_COMMAND_LINE {
        return Err(BootError::CommandLine(kernel.command_line.len()));
    }
    let mut command_line = kernel.command_line.clone().into_bytes();
    command_line.push(0);
    memory.write_slice(&command_line, GuestAddress(COMMAND_LINE))?;
    mptable::write(memory, vcpus)?;
    let parameters = zero_page(total, initramfs.unwrap_or_default(), kernel.command_line.len());
    memory.write_obj(parameters, GuestAddress(ZERO_PAGE))?;
    write_page_tables(memory)?;
    for (address, segment) in (GDT..).step_by(8).zip(SEGMENTS) {
        memory.write_obj(segment, GuestAddress(address))?;
    }
    Ok(Entry {
        instruction: loaded.kernel_load.0,
        parameters: ZERO_PAGE,
        page_tables: PML4,
        gdt: (GDT, SEGMENTS.len() as u16 * 8),
    })
}

/// A part of a kernel's file that is put into memory.
struct Segment {
    address: u64,
    offset: u64,
    length: u64,
    writable: bool,
}

/// None of a file that is no kernel.
fn segments(image: &File) -> Vec<Segment> {
    let mut start = [0; PAGE as usize];
    let headers = image.read_at(&mut start, 0).ok().and_then(|_| {
        let header = FileHeader64::<LittleEndian>::parse(&start[..]).ok()?;
        header.program_headers(LittleEndian, &start[..]).ok()
    });
    let loaded = headers.into_iter().flatten().filter(|header| header.p_type(LittleEndian) == PT_LOAD);
    let segment = |header: &ProgramHeader64<LittleEndian>| Segment {
        address: header.p_paddr(LittleEndian),
        offset: header.p_offset(LittleEndian),
        length: header.p_filesz(LittleEndian),
        writable: header.p_flags(LittleEndian) & PF_W != 0,
    };
    loaded.map(segment).collect()
}

/// What [`load`] puts into that much memory just as it is in the files.
pub(in crate::machine) fn pieces(kernel: &Kernel, memory: u64) -> Result<Vec<Piece<'_>>, BootError> {
    let whole = |segment: Segment| Piece {
        address: segment.address,
        file: &kernel.image,
        offset: segment.offset,
        length: segment.length & !(PAGE - 1),
        copied: false,
    };
    let mut pieces: Vec<_> = segments(&kernel.image).into_iter().map(whole).collect();
    if let Some(file) = &kernel.initramfs {
        let place = initramfs_place(file, &kernel.image, memory)?;
        let length = (place.end - place.start) & !(PAGE - 1);
        pieces.push(Piece { address: place.start, file, offset: 0, length, copied: true });
    }
    pieces.retain(|piece| piece.length > 0 && (piece.address | piece.offset).is_multiple_of(PAGE));
    Ok(pieces)
}

/// Where a kernel only reads: its segments that are not writable, and what is between each of them and the next one.
pub(in crate::machine) fn constant(image: &File) -> Vec<Range<u64>> {
    let mut segments = segments(image);
    segments.sort_by_key(|segment| segment.address);
    let next = segments.iter().skip(1).map(|next| next.address);
    let ranges = segments.iter().zip(next).filter(|(segment, _)| !segment.writable);
    ranges.map(|(segment, next)| segment.address..next).collect()
}

/// The lowest address that a kernel has.
fn kernel_start(image: &File) -> u64 {
    segments(image).iter().map(|segment| segment.address).min().unwrap_or(KERNEL_START)
}

/// Where the archive is put: below the kernel, if there is room, as the memory is the guest's again once it has unpacked it, and
/// what a guest uses is to be close together. If not, at the end of the memory below the devices.
fn initramfs_place(archive: &File, image: &File, total: u64) -> Result<Range<u64>, BootError> {
    let size = archive.metadata().map_err(BootError::Initramfs)?.len();
    if BLOCK + size <= kernel_start(image).min(total) {
        return Ok(BLOCK..BLOCK + size);
    }
    let start = total.min(memory::LOW_END).checked_sub(size).ok_or(BootError::TooLarge { size, memory: total })?;
    let start = start & !(PAGE - 1);
    Ok(start..start + size)
}

/// Puts the archive where it belongs; where that is, and how long it is, for the kernel.
fn load_initramfs(memory: &Memory, archive: &mut File, place: Range<u64>) -> Result<(u32, u32), BootError> {
    let size = place.end - place.start;
    let (Ok(start), Ok(length)) = (u32::try_from(place.start), u32::try_from(size)) else {
        return Err(BootError::TooLarge { size, memory: memory::size(memory) });
    };
    memory.read_exact_volatile_from(GuestAddress(place.start), archive, length as usize)?;
    Ok((start, length))
}

fn zero_page(memory: u64, initramfs: (u32, u32), command_line: usize) -> boot_params {
    let mut page = boot_params::default();
    page.hdr.boot_flag = BOOT_FLAG;
    page.hdr.header = HEADER_MAGIC;
    page.hdr.type_of_loader = LOADER_UNDEFINED;
    page.hdr.cmd_line_ptr = COMMAND_LINE as u32;
    page.hdr.cmdline_size = command_line as u32;
    (page.hdr.ramdisk_image, page.hdr.ramdisk_size) = initramfs;
    let low_end = memory.min(memory::LOW_END);
    let mut ranges = vec![(0, LOW_MEMORY_END), (KERNEL_START, low_end.saturating_sub(KERNEL_START))];
    if memory > memory::LOW_END {
        ranges.push((memory::HIGH_START, memory - memory::LOW_END));
    }
    for (entry, &(addr, size)) in page.e820_table.iter_mut().zip(&ranges) {
        *entry = boot_e820_entry { addr, size, type_: E820_RAM };
    }
    page.e820_entries = ranges.len() as u8;
    page
}

/// Maps the first GiB to itself in pages of 2 MiB.
fn write_page_tables(memory: &Memory) -> Result<(), GuestMemoryError> {
    const TABLE: u64 = 0b11;
    const LARGE_PAGE: u64 = 0b1000_0011;
    memory.write_obj(PDPT | TABLE, GuestAddress(PML4))?;
    memory.write_obj(PAGE_DIRECTORY | TABLE, GuestAddress(PDPT))?;
    let directory: Vec<u8> = (0..512u64).flat_map(|index| (index << 21 | LARGE_PAGE).to_le_bytes()).collect();
    memory.write_slice(&directory, GuestAddress(PAGE_DIRECTORY))
}
