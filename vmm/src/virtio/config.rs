//! Configuration spaces: the few bytes that say what a device is like.

use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// A device's configuration space: one for its registers and for the device, which may be changing it.
#[derive(Clone, Debug, Default)]
pub struct ConfigSpace(Arc<Mutex<Space>>);

#[derive(Debug, Default)]
struct Space {
    bytes: Vec<u8>,
    /// What the guest may write.
    writable: Range<usize>,
    /// Whether the device may change it.
    changing: bool,
    /// Counts the device's changes, so that a driver can tell a torn read.
    generation: u32,
}

impl ConfigSpace {
    /// One with these bytes.
    pub fn new(bytes: Vec<u8>) -> Self {
        Self(Arc::new(Mutex::new(Space { bytes, ..Default::default() })))
    }

    /// Lets the guest write these bytes.
    #[must_use]
    pub fn with_writable(self, range: Range<usize>) -> Self {
        self.space().writable = range;
        self
    }

    /// Lets the device change it while a driver uses it. Interrupts of such a device cost more: see
    /// [`super::transport::QUEUE_INTERRUPTS`].
    #[must_use]
    pub fn changing(self) -> Self {
        self.space().changing = true;
        self
    }

    /// Whether the device may change it.
    pub fn is_changing(&self) -> bool {
        self.space().changing
    }

    /// The guest's read: what lies beyond the end is zero.
    pub fn read(&self, offset: u64, into: &mut [u8]) {
        let space = self.space();
        let from = usize::try_from(offset).ok().and_then(|offset| space.bytes.get(offset..)).unwrap_or_default();
        let length = from.len().min(into.len());
        into[..length].copy_from_slice(&from[..length]);
        into[length..].fill(0);
    }

    /// The guest's write: what it may not write stays.
    pub fn write(&self, offset: u64, from: &[u8]) {
        let mut space = self.space();
        let Ok(start) = usize::try_from(offset) else { return };
        let Some(end) = start.checked_add(from.len()) else { return };
        if start >= space.writable.start && end <= space.writable.end.min(space.bytes.len()) {
            space.bytes[start..end].copy_from_slice(from);
        }
    }

    /// The device's own change, of a space that is [`ConfigSpace::changing`]. It has to raise [`super::Interrupt::config_changed`] afterwards.
    pub fn update(&self, change: impl FnOnce(&mut [u8])) {
        let mut space = self.space();
        debug_assert!(space.changing, "no driver would hear of it");
        change(&mut space.bytes);
        space.generation = space.generation.wrapping_add(1);
    }

    /// All of it, as the guest would read it.
    pub fn bytes(&self) -> Vec<u8> {
        self.space().bytes.clone()
    }

    /// The number of the device's changes.
    pub fn generation(&self) -> u32 {
        self.space().generation
    }

    fn space(&self) -> MutexGuard<'_, Space> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_guest_reads_zeros_beyond_and_writes_only_what_it_may() {
        let space = ConfigSpace::new(vec![1, 2, 3, 4]).with_writable(2..4).changing();
        let mut seen = [9; 4];
        space.read(2, &mut seen);
        assert_eq!(seen, [3, 4, 0, 0]);
        space.read(u64::MAX, &mut seen);
        assert_eq!(seen, [0; 4]);
        for (offset, bytes) in [(0, vec![7]), (1, vec![7, 7]), (3, vec![7, 7]), (u64::MAX, vec![7])] {
            space.write(offset, &bytes);
            assert_eq!(space.bytes(), [1, 2, 3, 4], "{offset}");
        }
        space.write(2, &[8, 9]);
        assert_eq!(space.bytes(), [1, 2, 8, 9]);
        assert_eq!(space.generation(), 0);
        space.update(|bytes| bytes[0] = 5);
        assert_eq!((space.bytes()[0], space.generation()), (5, 1));
    }
}
