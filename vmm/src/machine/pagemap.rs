//! What the host says of each page of this process's memory.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt as _;

use vm_memory::VolatileSlice;

/// In bytes.
pub(super) const PAGE: usize = 4096;

/// What this process has ever touched of its memory: `/proc/self/pagemap`. It is open only while it is needed, as it can
/// tell where on the host the pages are.
#[derive(Debug)]
pub struct PageMap(File);

/// A page's entry: Documentation/admin-guide/mm/pagemap.rst.
#[derive(Clone, Copy)]
pub(crate) struct Page(u64);

impl PageMap {
    /// Opens it.
    ///
    /// # Errors
    /// Where there is no `/proc`.
    pub fn open() -> io::Result<Self> {
        File::open("/proc/self/pagemap").map(Self)
    }

    /// The pages of a part of memory, which begins and ends with whole ones.
    pub(crate) fn pages(&self, part: &VolatileSlice<'_>) -> io::Result<impl Iterator<Item = Page> + use<>> {
        let mut entries = vec![[0; size_of::<u64>()]; part.len() / PAGE];
        let first = part.ptr_guard().as_ptr().addr() / PAGE;
        self.0.read_exact_at(entries.as_flattened_mut(), (first * size_of::<u64>()) as u64)?;
        Ok(entries.into_iter().map(|entry| Page(u64::from_ne_bytes(entry))))
    }
}

impl Page {
    /// Whether it is there, or swapped out.
    pub(super) fn is_kept(self) -> bool {
        self.0 & (0b11 << 62) != 0
    }

    /// Whether it is there.
    #[cfg(test)]
    pub(crate) fn is_present(self) -> bool {
        self.0 & (1 << 63) != 0
    }

    /// Whether it is a file's, or memory that may be shared.
    #[cfg(test)]
    pub(super) fn is_of_a_file(self) -> bool {
        self.0 & (1 << 61) != 0
    }
}
