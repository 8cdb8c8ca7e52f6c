//! What a device waits for.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use rustix::buffer::spare_capacity;
use rustix::event::epoll::{self, CreateFlags, Event, EventData, EventFlags};
#[cfg(any(test, feature = "driver"))]
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;

/// The tokens from here on are the worker's own.
pub(super) const RESERVED: u64 = 1 << 63;

/// How many events one wait takes at most.
const BATCH: usize = 32;

/// A descriptor that is ready.
#[derive(Clone, Copy, Debug)]
pub struct Ready {
    /// What the device registered it under.
    pub token: u64,
    /// What it is ready for.
    pub flags: EventFlags,
}

/// The descriptors that a device waits for. Clones are the same set.
#[derive(Clone, Debug)]
pub struct Poller(Arc<OwnedFd>);

impl Poller {
    /// An empty set.
    ///
    /// # Errors
    /// Where there are no descriptors left.
    pub fn new() -> io::Result<Self> {
        Ok(Self(Arc::new(epoll::create(CreateFlags::CLOEXEC)?)))
    }

    /// Waits for a descriptor from now on, under a token below 2^63.
    ///
    /// # Errors
    /// Where it cannot be waited for, or is in the set.
    pub fn add(&self, descriptor: impl AsFd, token: u64, flags: EventFlags) -> io::Result<()> {
        Ok(epoll::add(&*self.0, descriptor, EventData::new_u64(token), flags)?)
    }

    /// Changes what is waited for.
    ///
    /// # Errors
    /// Where it is not in the set.
    pub fn modify(&self, descriptor: impl AsFd, token: u64, flags: EventFlags) -> io::Result<()> {
        Ok(epoll::modify(&*self.0, descriptor, EventData::new_u64(token), flags)?)
    }

    /// Waits for a descriptor no longer.
    ///
    /// # Errors
    /// Where it is not in the set.
    pub fn remove(&self, descriptor: impl AsFd) -> io::Result<()> {
        Ok(epoll::delete(&*self.0, descriptor)?)
    }

    /// Whether [`Poller::wait`] would return at once.
    #[cfg(any(test, feature = "driver"))]
    pub(super) fn is_ready(&self) -> io::Result<bool> {
        let mut watched = [PollFd::new(&*self.0, PollFlags::IN)];
        Ok(poll(&mut watched, Some(&Timespec::default()))? > 0)
    }

    /// Waits until something is ready.
    pub(super) fn wait(&self) -> io::Result<Vec<Ready>> {
        let mut events: Vec<Event> = Vec::with_capacity(BATCH);
        loop {
            match epoll::wait(&*self.0, spare_capacity(&mut events), None) {
                Ok(_) => break,
                Err(Errno::INTR) => {}
                Err(errno) => return Err(errno.into()),
            }
        }
        Ok(events.iter().map(|event| Ready { token: event.data.u64(), flags: event.flags }).collect())
    }
}
