//! Keeping the host from bringing in more of a file than is touched.
//!
//! Where a page of a file is touched Linux maps the 64 KiB around it as well, or all of a larger piece that it keeps in one:
//! that spares most programs faults. Who is idle touches few pages here and there, and sixteen times as much would count as
//! used. Memory that a userfaultfd watches for writes comes page by page, so that none goes unseen. That is all it is for:
//! nobody is ever asked about a fault. With `WP_ASYNC` the kernel itself answers those of this kind, and with
//! `UFFD_USER_MODE_ONLY` no other kind that somebody could register for holds the kernel up.

use std::io;
use std::os::fd::OwnedFd;

use linux_raw_sys::general::{
    UFFD_API, UFFD_FEATURE_WP_ASYNC, UFFD_USER_MODE_ONLY, UFFDIO_REGISTER_MODE_WP, uffdio_api, uffdio_range,
    uffdio_register,
};
use linux_raw_sys::ioctl::{UFFDIO_API, UFFDIO_REGISTER};
use rustix::ioctl::{Opcode, Updater, ioctl};
use rustix::mm::{UserfaultfdFlags, userfaultfd};

/// Watches memory as long as it is there.
#[derive(Debug)]
pub struct Watch(OwnedFd);

impl Watch {
    /// One that watches nothing yet.
    ///
    /// # Errors
    /// Where the host has none, as Linux before 6.7.
    pub fn new() -> io::Result<Self> {
        let flags = UserfaultfdFlags::CLOEXEC | UserfaultfdFlags::from_bits_retain(UFFD_USER_MODE_ONLY);
        // SAFETY: it does nothing to any memory before that is registered.
        let watch = unsafe { userfaultfd(flags) }?;
        let mut wanted = uffdio_api { api: UFFD_API.into(), features: UFFD_FEATURE_WP_ASYNC.into(), ioctls: 0 };
        // SAFETY: the request takes this structure, and may write to it.
        let request = unsafe { Updater::<{ UFFDIO_API as Opcode }, _>::new(&mut wanted) };
        // SAFETY: it does nothing to any memory.
        unsafe { ioctl(&watch, request) }?;
        Ok(Self(watch))
    }

    /// Has the pages of `length` bytes from `start` on, which are whole ones, come one by one from now on, until something
    /// else is mapped in their place.
    ///
    /// # Errors
    /// Where the host cannot; then they come as ever.
    pub fn over(&self, start: usize, length: usize) -> io::Result<()> {
        let range = uffdio_range { start: start as u64, len: length as u64 };
        let mut wanted = uffdio_register { range, mode: UFFDIO_REGISTER_MODE_WP.into(), ioctls: 0 };
        // SAFETY: the request takes this structure, and may write to it.
        let request = unsafe { Updater::<{ UFFDIO_REGISTER as Opcode }, _>::new(&mut wanted) };
        // SAFETY: it changes no contents of memory, nor whether a page may be touched: nothing is ever write-protected.
        Ok(unsafe { ioctl(&self.0, request) }?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::machine::PageMap;
    use rustix::fs::{MemfdFlags, memfd_create};
    use std::io::Write as _;
    use vm_memory::{Bytes as _, FileOffset, MmapRegion, VolatileMemory as _};

    const PAGE: usize = 4096;
    const SIZE: usize = 64 * PAGE;

    /// How many of its pages this process has mapped.
    fn mapped(region: &MmapRegion) -> usize {
        let pages = PageMap::open().unwrap().pages(&region.as_volatile_slice()).unwrap();
        pages.filter(|page| page.is_present()).count()
    }

    #[test]
    fn only_what_is_touched_is_mapped() {
        // Not a file on a disk: of one that it keeps in large pieces, Linux maps single pages where such a piece crosses the
        // end of a page table.
        let mut file = std::fs::File::from(memfd_create("runvm-test", MemfdFlags::CLOEXEC).unwrap());
        file.write_all(&[7; SIZE]).unwrap();
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        let region =
            MmapRegion::<()>::build(Some(FileOffset::new(file, 0)), SIZE, protection, libc::MAP_PRIVATE).unwrap();
        let memory = region.as_volatile_slice();
        let touch = |page: usize| assert_eq!(memory.read_obj::<u8>(page * PAGE).unwrap(), 7);
        let Ok(watch) = Watch::new() else { panic!("the host has no watch: this test takes Linux 6.7") };
        watch.over(region.as_ptr().addr(), SIZE / 2).unwrap();
        touch(3);
        assert_eq!(mapped(&region), 1);
        memory.write_obj(8u8, 20 * PAGE).unwrap();
        assert_eq!((mapped(&region), memory.read_obj::<u8>(20 * PAGE + 1).unwrap()), (2, 7));
        // The other half is as ever.
        touch(40);
        assert!(mapped(&region) > 3);
    }
}
