//! The disk, over an image in memory.

use std::fs::File;
use std::os::unix::fs::FileExt as _;

use arbitrary::{Result, Unstructured};
use runvm_vmm::virtio::block::{Block, SECTOR};
use rustix::fs::{MemfdFlags, Mode, OFlags, memfd_create, open};

use crate::bench::{self, Subject};
use crate::guest::{Piece, length, raw};

/// How many sectors the image has: a few, or more than any request takes.
const SECTORS: [u64; 4] = [0, 8, 128, 1 << 31];

/// Does what the input says.
pub fn run(data: &[u8]) {
    bench::run::<Image>(data);
}

struct Image {
    file: File,
    sectors: u64,
    read_only: bool,
}

#[expect(clippy::expect_used, reason = "a fuzzer ends where the host has no memory")]
impl Subject for Image {
    type Device = Block;

    fn new(u: &mut Unstructured<'_>) -> Result<Self> {
        let sectors = *u.choose(&SECTORS)?;
        let file = File::from(memfd_create("image", MemfdFlags::CLOEXEC).expect("memory"));
        file.set_len(sectors * SECTOR).expect("memory");
        if sectors > 0 {
            file.write_all_at(&[0x5a; SECTOR as usize], 0).expect("memory");
        }
        // A guest may fill its disk, but not the fuzzer's memory.
        let read_only = sectors > SECTORS[2] || u.ratio(1, 4)?;
        Ok(Self { file, sectors, read_only })
    }

    fn device(&mut self) -> Block {
        self.file.set_len(self.sectors * SECTOR).expect("memory");
        let mode = if self.read_only { OFlags::RDONLY } else { OFlags::RDWR };
        let path = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&self.file));
        let image = open(path, mode | OFlags::CLOEXEC, Mode::empty()).expect("the image");
        Block::new(image.into(), "fuzz").expect("a disk")
    }

    fn request(&mut self, u: &mut Unstructured<'_>, _: usize) -> Result<Vec<Piece>> {
        if u.ratio(1, 8)? {
            return raw(u);
        }
        let kind: u32 = if u.ratio(1, 16)? { u.arbitrary()? } else { *u.choose(&[0, 1, 4, 8, 11, 13])? };
        let mut header = kind.to_le_bytes().to_vec();
        header.extend([0; 4]);
        header.extend(self.sector(u)?.to_le_bytes());
        let mut pieces = vec![Piece::Readable(header)];
        for _ in 0..u.int_in_range(0..=3)? {
            let bytes = if u.ratio(3, 4)? { 512 * u.int_in_range(0..=4)? } else { length(u)? };
            pieces.push(match kind {
                1 => Piece::Readable(vec![0xc3; bytes.min(0x1_0000) as usize]),
                11 | 13 => {
                    let sectors = if u.ratio(1, 8)? { u.arbitrary()? } else { u.int_in_range(0..=9u32)? };
                    let flags = u.int_in_range(0..=2u32)?;
                    let range = [&self.sector(u)?.to_le_bytes()[..], &sectors.to_le_bytes(), &flags.to_le_bytes()];
                    Piece::Readable(range.concat())
                }
                _ => Piece::Writable(bytes),
            });
        }
        pieces.push(Piece::Writable(1));
        Ok(pieces)
    }

    /// Somebody changes the size of the image.
    fn event(&mut self, u: &mut Unstructured<'_>, _: &mut Block) -> Result<()> {
        let sectors = *u.choose(&SECTORS)?;
        self.file.set_len(sectors * SECTOR + u.int_in_range(0..=1)?).expect("memory");
        Ok(())
    }
}

impl Image {
    fn sector(&self, u: &mut Unstructured<'_>) -> Result<u64> {
        Ok(match u.int_in_range(0..=3)? {
            0 => u.arbitrary()?,
            1 => self.sectors.wrapping_sub(u.int_in_range(0..=2)?),
            _ => u.int_in_range(0..=8)?,
        })
    }
}
