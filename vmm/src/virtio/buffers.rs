//! A request's buffers, as input and output of files.
//!
//! The kernel reads files straight into the guest's memory and writes them straight from it, without a copy of ours in
//! between. The readers and writers that do so are virtiofsd's: its server takes no others, and a disk's needs are the
//! same. They want the memory in a type of their own, which [`IoMemory`] is.

use vhost_user_backend::bitmap::BitmapMmapRegion;
use virtiofsd::descriptor_utils::{Error, Reader, Writer};
use vm_memory::{GuestMemory as _, GuestMemoryMmap, GuestMemoryRegion as _, GuestRegionMmap, MmapRegion};

use super::{Chain, DeviceError};
use crate::Memory;

/// Memory as virtiofsd's readers and writers take it. Nobody has asked its bitmaps to keep a log, so they keep none.
pub(super) type LoggedMemory = GuestMemoryMmap<BitmapMmapRegion>;

/// The most buffers that one system call takes. A request with more of them than that is refused by the kernel.
pub const MAX_BUFFERS: u16 = 1024;

/// The guest's memory, for transfers between it and files.
#[derive(Debug)]
pub struct IoMemory {
    regions: LoggedMemory,
    /// Owns what `regions` points into.
    _memory: Memory,
}

impl IoMemory {
    /// The same memory.
    ///
    /// # Errors
    /// [`DeviceError::Host`] where the memory has no pages.
    pub fn new(memory: &Memory) -> Result<Self, DeviceError> {
        let mut regions = Vec::new();
        for region in memory.iter() {
            // SAFETY: this is a mapping that is there as long as `memory` is, which the result keeps.
            let mapping =
                unsafe { MmapRegion::build_raw(region.as_ptr(), region.size(), region.prot(), region.flags()) }
                    .map_err(|error| impossible(&error))?;
            regions.extend(GuestRegionMmap::new(mapping, region.start_addr()));
        }
        let regions = LoggedMemory::from_regions(regions).map_err(|error| impossible(&error))?;
        Ok(Self { regions, _memory: memory.clone() })
    }

    /// What the guest has given the device to read and to write. They stay what they are, whatever the guest does to the
    /// queue later; what is in them changes at any time.
    ///
    /// # Errors
    /// Where a buffer is not in the guest's memory.
    pub fn buffers(&self, chain: &Chain) -> Result<(Reader<'_>, Writer<'_>), Error> {
        Ok((Reader::new(&self.regions, chain.clone())?, Writer::new(&self.regions, chain.clone())?))
    }
}

fn impossible(error: &dyn std::error::Error) -> DeviceError {
    DeviceError::host("use the guest's memory")(std::io::Error::other(error.to_string()))
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::io::{Read as _, Seek as _, Write as _};

    use super::*;
    use crate::virtio::driver::{Driver, Piece};
    use crate::virtio::{Device, Io, Kind};

    struct Nothing;

    impl Device for Nothing {
        fn kind(&self) -> Kind {
            Kind::Block
        }

        fn queue_sizes(&self) -> &[u16] {
            &[16]
        }

        fn queue_ready(&mut self, _: &mut Io, _: usize) -> Result<(), DeviceError> {
            Ok(())
        }
    }

    fn chain(driver: &mut Driver, pieces: &[Piece<'_>]) -> Chain {
        driver.put(0, pieces);
        let memory = driver.io.memory.clone();
        driver.io.queues[0].pop(&memory).unwrap().unwrap()
    }

    #[test]
    fn files_are_read_into_the_guest_and_written_from_it() {
        let mut driver = Driver::new(&Nothing);
        let mut file: File = tempfile::tempfile().unwrap();
        let memory = IoMemory::new(&driver.io.memory).unwrap();

        let request = chain(&mut driver, &[Piece::Readable(b"head"), Piece::Readable(b"tail")]);
        let (mut reader, _) = memory.buffers(&request).unwrap();
        assert_eq!(reader.write_to_file_at(&file, 8, 2, None).unwrap(), 8);
        let mut content = Vec::new();
        file.rewind().unwrap();
        file.read_to_end(&mut content).unwrap();
        assert_eq!(content, b"\0\0headtail");

        let request = driver.put(0, &[Piece::Writable(3), Piece::Writable(4)]);
        let chain = driver.io.queues[0].pop(&driver.io.memory.clone()).unwrap().unwrap();
        let (_, mut writer) = memory.buffers(&chain).unwrap();
        assert_eq!(writer.read_from_file_at(&file, 7, 2, None).unwrap(), 7);
        writer.write_all(b"").unwrap();
        assert_eq!(driver.written(&request), b"headtai");
    }

    #[test]
    fn buffers_outside_the_memory_are_refused() {
        let mut driver = Driver::new(&Nothing);
        let memory = IoMemory::new(&driver.io.memory).unwrap();
        for (address, length, flags) in
            [(1 << 40, 1, 0), (u64::MAX, 1, 2), (8 << 20, 1, 0), ((8 << 20) - 1, 2, 2), (0, u32::MAX, 0)]
        {
            let chain = chain(&mut driver, &[Piece::Raw { address, length, flags, next: 0 }]);
            assert!(memory.buffers(&chain).is_err(), "{address:x} {length}");
        }
    }
}
