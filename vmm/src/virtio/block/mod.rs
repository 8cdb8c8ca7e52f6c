//! Disks: virtio-blk over a raw image, the specification's section 5.2.
//!
//! The image is a file or a disk of the host's; how it was opened says whether the guest may write. Its sectors go straight
//! between it and the guest's memory, one request after another in the device's thread.

#[cfg(test)]
mod tests;

use std::fs::File;
use std::io::{self, Read as _, Seek as _, SeekFrom, Write as _};

use rustix::fs::{FallocateFlags, OFlags, fallocate, fcntl_getfl};
use thiserror::Error;
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_RO, VIRTIO_BLK_F_SEG_MAX,
    VIRTIO_BLK_F_SIZE_MAX, VIRTIO_BLK_F_WRITE_ZEROES, VIRTIO_BLK_ID_BYTES, VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK,
    VIRTIO_BLK_S_UNSUPP, VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN,
    VIRTIO_BLK_T_OUT, VIRTIO_BLK_T_WRITE_ZEROES, VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP,
};
use virtiofsd::descriptor_utils::{Reader, Writer};
use virtiofsd::oslib::WritevFlags;

use super::buffers::IoMemory;
use super::{Chain, ConfigSpace, Device, DeviceError, Io, Kind, Served};

/// What images are counted in, in bytes.
pub const SECTOR: u64 = 512;

const QUEUE_SIZE: u16 = 256;
/// The most pieces of data in a request, beside its header and its status.
const MAX_SEGMENTS: u32 = QUEUE_SIZE as u32 - 2;
/// The most bytes in a piece, and in all of a request's: what no disk takes long for.
const MAX_SEGMENT: u32 = 1 << 16;
const MAX_DATA: usize = (MAX_SEGMENTS * MAX_SEGMENT) as usize;
/// How many requests are served before the guest is told and the machine may be paused.
const BATCH: u16 = 16;

/// The most ranges that one request discards or zeroes, and the most sectors in each: what no file system takes long for.
const MAX_RANGES: u32 = 16;
const MAX_RANGE: u32 = 1 << 22;
/// Holes have whole pages, in sectors.
const HOLE: u32 = 8;
const RANGE_LENGTH: usize = 16;

/// An image that is none.
#[derive(Debug, Error)]
pub enum BlockError {
    /// It ends amid a sector.
    #[error("the disk image has {0} bytes, which is no multiple of {SECTOR}")]
    Size(u64),
    /// It is open for writing alone.
    #[error("the disk image is not open for reading")]
    Unreadable,
    /// Its size cannot be told.
    #[error("cannot look at the disk image")]
    Inspect(#[from] io::Error),
}

/// A virtio-blk device.
#[derive(Debug)]
pub struct Block {
    image: File,
    sectors: u64,
    read_only: bool,
    id: [u8; VIRTIO_BLK_ID_BYTES as usize],
    config: ConfigSpace,
    memory: Option<IoMemory>,
    /// Whether every write has to last before it is answered, as the driver knows of no flush.
    through: bool,
}

/// Why a request fails.
enum Failure {
    Unsupported,
    Io,
}

impl From<io::Error> for Failure {
    fn from(error: io::Error) -> Self {
        tracing::debug!("the guest's request to its disk fails: {error}");
        if error.kind() == io::ErrorKind::Unsupported { Self::Unsupported } else { Self::Io }
    }
}

impl Block {
    /// A disk with this image, and what the guest is told of which disk it is (of that the first 20 bytes).
    ///
    /// # Errors
    /// [`BlockError`].
    pub fn new(mut image: File, id: &str) -> Result<Self, BlockError> {
        let size = image.seek(SeekFrom::End(0))?;
        if !size.is_multiple_of(SECTOR) {
            return Err(BlockError::Size(size));
        }
        let mode = fcntl_getfl(&image).map_err(io::Error::from)? & OFlags::ACCMODE;
        if mode == OFlags::WRONLY {
            return Err(BlockError::Unreadable);
        }
        let mut bytes = [0; VIRTIO_BLK_ID_BYTES as usize];
        bytes.iter_mut().zip(id.bytes()).for_each(|(into, from)| *into = from);
        let sectors = size / SECTOR;
        Ok(Self {
            image,
            sectors,
            read_only: mode == OFlags::RDONLY,
            id: bytes,
            config: ConfigSpace::new(layout(sectors)),
            memory: None,
            through: false,
        })
    }

    /// Serves a request; how much was written into it.
    fn serve(&self, memory: &IoMemory, chain: &Chain) -> u32 {
        let Ok((reader, mut writer)) = memory.buffers(chain) else { return 0 };
        let Some(room) = writer.available_bytes().checked_sub(1) else { return 0 };
        let Ok(mut status) = writer.split_at(room) else { return 0 };
        let code = match self.answer(reader, &mut writer) {
            Ok(()) => VIRTIO_BLK_S_OK,
            Err(Failure::Unsupported) => VIRTIO_BLK_S_UNSUPP,
            Err(Failure::Io) => VIRTIO_BLK_S_IOERR,
        };
        let told = status.write_all(&[code as u8]).is_ok();
        // What is said to be written has no gap (section 2.7.8.2), so the status counts only behind all of the data.
        let written = writer.bytes_written();
        u32::try_from(written + usize::from(told && written == room)).unwrap_or(0)
    }

    fn answer(&self, mut reader: Reader<'_>, writer: &mut Writer<'_>) -> Result<(), Failure> {
        let kind = u32::from_le_bytes(take(&mut reader)?);
        let _reserved: [u8; 4] = take(&mut reader)?;
        let sector = u64::from_le_bytes(take(&mut reader)?);
        match kind {
            VIRTIO_BLK_T_IN => self.read(sector, writer),
            VIRTIO_BLK_T_FLUSH => Ok(self.image.sync_data()?),
            VIRTIO_BLK_T_GET_ID => {
                let length = self.id.len().min(writer.available_bytes());
                Ok(writer.write_all(&self.id[..length])?)
            }
            VIRTIO_BLK_T_OUT | VIRTIO_BLK_T_DISCARD | VIRTIO_BLK_T_WRITE_ZEROES if self.read_only => Err(Failure::Io),
            VIRTIO_BLK_T_OUT => self.write(sector, reader),
            VIRTIO_BLK_T_DISCARD | VIRTIO_BLK_T_WRITE_ZEROES => self.clear(kind, reader),
            _ => Err(Failure::Unsupported),
        }
    }

    fn read(&self, sector: u64, writer: &mut Writer<'_>) -> Result<(), Failure> {
        let mut left = writer.available_bytes();
        let mut offset = self.offset_of(sector, left)?;
        while left > 0 {
            match writer.read_from_file_at(&self.image, left, offset, None)? {
                // Somebody has made the image shorter.
                0 => return Err(Failure::Io),
                read => offset += read as u64,
            }
            left = writer.available_bytes();
        }
        Ok(())
    }

    fn write(&self, sector: u64, mut reader: Reader<'_>) -> Result<(), Failure> {
        let flags = self.through.then_some(WritevFlags::RWF_DSYNC);
        let mut left = reader.available_bytes();
        let mut offset = self.offset_of(sector, left)?;
        while left > 0 {
            match reader.write_to_file_at(&self.image, left, offset, flags)? {
                0 => return Err(Failure::Io),
                written => offset += written as u64,
            }
            left = reader.available_bytes();
        }
        Ok(())
    }

    /// Discards ranges of sectors, or makes them zero.
    fn clear(&self, kind: u32, mut reader: Reader<'_>) -> Result<(), Failure> {
        let length = reader.available_bytes();
        if length == 0 || !length.is_multiple_of(RANGE_LENGTH) || length > MAX_RANGES as usize * RANGE_LENGTH {
            return Err(Failure::Io);
        }
        for _ in 0..length / RANGE_LENGTH {
            let sector = u64::from_le_bytes(take(&mut reader)?);
            let sectors = u32::from_le_bytes(take(&mut reader)?);
            let flags = u32::from_le_bytes(take(&mut reader)?);
            let how = match (kind, flags) {
                (VIRTIO_BLK_T_DISCARD, 0) => FallocateFlags::PUNCH_HOLE,
                (VIRTIO_BLK_T_WRITE_ZEROES, VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP) => FallocateFlags::PUNCH_HOLE,
                (VIRTIO_BLK_T_WRITE_ZEROES, 0) => FallocateFlags::ZERO_RANGE,
                _ => return Err(Failure::Unsupported),
            };
            if sectors > MAX_RANGE {
                return Err(Failure::Io);
            }
            let bytes = u64::from(sectors) * SECTOR;
            let offset = self.offset(sector, bytes)?;
            if bytes > 0 {
                fallocate(&self.image, how | FallocateFlags::KEEP_SIZE, offset, bytes).map_err(io::Error::from)?;
            }
        }
        if self.through {
            self.image.sync_data()?;
        }
        Ok(())
    }

    /// [`Self::offset`], of what a request reads or writes.
    fn offset_of(&self, sector: u64, data: usize) -> Result<u64, Failure> {
        if data > MAX_DATA { Err(Failure::Io) } else { self.offset(sector, data as u64) }
    }

    /// Where in the image so many bytes begin, if all of them are in it.
    fn offset(&self, sector: u64, bytes: u64) -> Result<u64, Failure> {
        let end = bytes.is_multiple_of(SECTOR).then(|| sector.checked_add(bytes / SECTOR)).flatten();
        end.filter(|&end| end <= self.sectors).map(|_| sector * SECTOR).ok_or(Failure::Io)
    }
}

/// The next bytes of a request.
fn take<const LENGTH: usize>(reader: &mut Reader<'_>) -> io::Result<[u8; LENGTH]> {
    let mut bytes = [0; LENGTH];
    reader.read_exact(&mut bytes)?;
    Ok(bytes)
}

/// The configuration space, section 5.2.4. What belongs to features that are not offered is zero.
fn layout(sectors: u64) -> Vec<u8> {
    let mut bytes = vec![0; 60];
    bytes[..8].copy_from_slice(&sectors.to_le_bytes());
    let fields = [
        (8, MAX_SEGMENT),
        (12, MAX_SEGMENTS),
        (20, SECTOR as u32),
        // Discarding: the most sectors, the most ranges, the alignment.
        (36, MAX_RANGE),
        (40, MAX_RANGES),
        (44, HOLE),
        // Zeroing: the same, and that it may make holes.
        (48, MAX_RANGE),
        (52, MAX_RANGES),
        (56, 1),
    ];
    for (at, value) in fields {
        bytes[at..at + 4].copy_from_slice(&u32::to_le_bytes(value));
    }
    bytes
}

impl Device for Block {
    fn kind(&self) -> Kind {
        Kind::Block
    }

    fn queue_sizes(&self) -> &[u16] {
        &[QUEUE_SIZE]
    }

    fn features(&self) -> u64 {
        let sizes = 1 << VIRTIO_BLK_F_SIZE_MAX | 1 << VIRTIO_BLK_F_SEG_MAX | 1 << VIRTIO_BLK_F_BLK_SIZE;
        let always = sizes | 1 << VIRTIO_BLK_F_FLUSH;
        let writable = 1 << VIRTIO_BLK_F_DISCARD | 1 << VIRTIO_BLK_F_WRITE_ZEROES;
        always | if self.read_only { 1 << VIRTIO_BLK_F_RO } else { writable }
    }

    fn config(&self) -> ConfigSpace {
        self.config.clone()
    }

    fn start(&mut self, io: &mut Io) -> Result<(), DeviceError> {
        self.through = io.features & 1 << VIRTIO_BLK_F_FLUSH == 0;
        self.memory = Some(IoMemory::new(&io.memory)?);
        Ok(())
    }

    fn queue_ready(&mut self, io: &mut Io, queue: usize) -> Result<(), DeviceError> {
        let Some(memory) = &self.memory else { return Ok(()) };
        let guest = io.memory.clone();
        io.queues[queue].drain_some(&guest, BATCH, |chain| Ok(Served::Done(self.serve(memory, &chain))))
    }

    /// The image's size: the guest relies on it.
    fn save(&mut self) -> Result<Vec<u8>, DeviceError> {
        Ok(self.sectors.to_le_bytes().to_vec())
    }

    fn restore(&mut self, state: &[u8]) -> Result<(), DeviceError> {
        if state == self.sectors.to_le_bytes() {
            Ok(())
        } else {
            Err(DeviceError::State("it is of a disk of another size"))
        }
    }
}
