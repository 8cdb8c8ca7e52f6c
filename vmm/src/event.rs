//! Events between threads and KVM.

use std::io;
use std::os::fd::{AsFd, AsRawFd as _, BorrowedFd};

use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

/// A counter of events, which KVM can raise (a guest's kick) and hear (an interrupt).
#[derive(Debug)]
pub struct Event(EventFd);

impl Event {
    /// One that has not happened.
    ///
    /// # Errors
    /// Where there are no descriptors left.
    pub fn new() -> io::Result<Self> {
        EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).map(Self)
    }

    /// Another descriptor of the same event.
    ///
    /// # Errors
    /// Where there are no descriptors left.
    pub fn try_clone(&self) -> io::Result<Self> {
        self.0.try_clone().map(Self)
    }

    /// Lets it happen.
    pub fn raise(&self) {
        // It fails only where the counter is full: then the event has happened often enough.
        let _ = self.0.write(1);
    }

    /// Lets it not have happened; whether it had.
    pub fn clear(&self) -> bool {
        self.0.read().is_ok()
    }

    /// As KVM's calls want it.
    pub fn for_kvm(&self) -> &EventFd {
        &self.0
    }
}

impl AsFd for Event {
    fn as_fd(&self) -> BorrowedFd<'_> {
        // SAFETY: the descriptor is open as long as `self` is, which the result borrows.
        unsafe { BorrowedFd::borrow_raw(self.0.as_raw_fd()) }
    }
}
