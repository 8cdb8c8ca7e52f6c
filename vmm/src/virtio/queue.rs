//! A queue, with its two notifications.

use std::mem;
use std::sync::atomic::{Ordering, fence};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use virtio_queue::{DescriptorChain, Error, Queue, QueueOwnedT as _, QueueT as _};
use vm_memory::{Bytes as _, GuestAddress};

use super::{DeviceError, Interrupt};
use crate::{Event, Memory};

/// A request of the guest's: buffers to read, then buffers to write.
pub type Chain = DescriptorChain<Memory>;

/// What became of a chain.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Served {
    /// It is done; so many bytes were written into it.
    Done(u32),
    /// It cannot be served now, and no later one either: it goes back to the queue.
    NotNow,
}

/// A queue that the driver has made ready. Clones are the same queue, for several threads to serve it.
#[derive(Clone, Debug)]
pub struct VirtQueue {
    index: usize,
    state: Arc<Mutex<State>>,
    kick: Arc<Event>,
    interrupt: Interrupt,
}

#[derive(Debug)]
struct State {
    /// As made by default, which is not ready, once the registers have it back.
    queue: Queue,
    /// The used ring's index when the driver was last told, or was found not to want to know.
    notified: u16,
}

impl State {
    fn pop(&mut self, memory: &Memory) -> Result<Option<Chain>, Error> {
        if !self.queue.ready() {
            return Ok(None);
        }
        // `pop_descriptor_chain` alone would hide a malformed ring behind an empty one.
        Ok(self.queue.iter(memory.clone())?.next())
    }

    fn take_notice(&mut self, memory: &Memory) -> Result<bool, Error> {
        let used = self.queue.next_used();
        let notified = mem::replace(&mut self.notified, used);
        Ok(used != notified && notification_wanted(&self.queue, memory, notified, used)?)
    }
}

impl VirtQueue {
    /// A queue that the driver has set up. `kick` is written when the driver has filled it.
    pub fn new(index: usize, queue: Queue, kick: Event, interrupt: Interrupt) -> Self {
        let state = State { notified: queue.next_used(), queue };
        Self { index, state: Arc::new(Mutex::new(state)), kick: Arc::new(kick), interrupt }
    }

    /// Whether the driver uses it.
    pub fn ready(&self) -> bool {
        self.state().queue.ready()
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Serves the chains that are in the queue, at most as many as it can hold at once, and tells the driver of
    /// them.
    ///
    /// Where some are left the queue is kicked, so that the device is called again after others had their turn.
    ///
    /// # Errors
    /// What `serve` answers, and [`DeviceError::Queue`].
    pub fn drain(
        &self,
        memory: &Memory,
        serve: impl FnMut(Chain) -> Result<Served, DeviceError>,
    ) -> Result<(), DeviceError> {
        let size = self.state().queue.size();
        self.drain_some(memory, size, serve)
    }

    /// [`VirtQueue::drain`] for chains that take their time: serves at most `budget` of them at once.
    ///
    /// # Errors
    /// Those of [`VirtQueue::drain`].
    pub fn drain_some(
        &self,
        memory: &Memory,
        budget: u16,
        serve: impl FnMut(Chain) -> Result<Served, DeviceError>,
    ) -> Result<(), DeviceError> {
        self.drain_untold(memory, budget, serve)?;
        self.notify(memory)
    }

    /// [`VirtQueue::drain_some`] without a word to the driver.
    ///
    /// # Errors
    /// Those of [`VirtQueue::drain`].
    pub fn drain_untold(
        &self,
        memory: &Memory,
        mut budget: u16,
        mut serve: impl FnMut(Chain) -> Result<Served, DeviceError>,
    ) -> Result<(), DeviceError> {
        let mut blocked = false;
        loop {
            self.want_kicks(memory, false)?;
            let before = budget;
            while budget > 0 && !blocked {
                let Some(chain) = self.pop(memory)? else { break };
                let head = chain.head_index();
                match serve(chain)? {
                    Served::Done(written) => self.push(memory, head, written)?,
                    Served::NotNow => {
                        self.put_back();
                        blocked = true;
                    }
                }
                budget -= 1;
            }
            let more = self.want_kicks(memory, true)?;
            if blocked || !more {
                return Ok(());
            }
            // Where there were none and now are some, our own notes to the driver may lie on its index and make it so,
            // time and again.
            if budget == 0 || budget == before {
                self.kick();
                return Ok(());
            }
        }
    }

    /// Takes the next chain; none where the queue is empty. Each has to be answered by [`VirtQueue::push`] or
    /// [`VirtQueue::put_back`].
    ///
    /// # Errors
    /// [`DeviceError::Queue`].
    pub fn pop(&self, memory: &Memory) -> Result<Option<Chain>, DeviceError> {
        self.state().pop(memory).map_err(self.malformed())
    }

    /// Undoes the last [`VirtQueue::pop`].
    pub fn put_back(&self) {
        let queue = &mut self.state().queue;
        queue.set_next_avail(queue.next_avail().wrapping_sub(1));
    }

    /// Gives a chain back to the driver, with this many bytes written into it.
    ///
    /// # Errors
    /// [`DeviceError::Queue`].
    pub fn push(&self, memory: &Memory, head: u16, written: u32) -> Result<(), DeviceError> {
        self.state().queue.add_used(&**memory, head, written).map_err(self.malformed())
    }

    /// Gives several chains back, each with the number of bytes written into it. The driver sees all of them or none.
    ///
    /// # Errors
    /// [`DeviceError::Queue`].
    pub fn push_all(&self, memory: &Memory, used: &[(u16, u32)]) -> Result<(), DeviceError> {
        let Some((&(last, written), others)) = used.split_last() else { return Ok(()) };
        let queue = &mut self.state().queue;
        if used.iter().any(|&(head, _)| head >= queue.size()) {
            return Err(self.malformed()(Error::InvalidDescriptorIndex));
        }
        let mut position = queue.next_used();
        for &(head, written) in others {
            write_used(queue, memory, position, head, written).map_err(self.malformed())?;
            position = position.wrapping_add(1);
        }
        // The last one publishes all of them: the ring's index is written after it, and once.
        queue.set_next_used(position);
        queue.add_used(&**memory, last, written).map_err(self.malformed())
    }

    /// Tells the driver of what was pushed, if it wants to know.
    ///
    /// # Errors
    /// [`DeviceError::Queue`].
    pub fn notify(&self, memory: &Memory) -> Result<(), DeviceError> {
        if self.take_notice(memory)? {
            self.interrupt.queue_used();
        }
        Ok(())
    }

    /// Whether the driver wants to know of what was pushed. Whoever asks has to tell it: an interrupt is for all of a
    /// device's queues.
    ///
    /// # Errors
    /// [`DeviceError::Queue`].
    pub fn take_notice(&self, memory: &Memory) -> Result<bool, DeviceError> {
        self.state().take_notice(memory).map_err(self.malformed())
    }

    /// Takes the next chain in the name of one of several threads that serve the queue at once: the driver is asked to
    /// tell of the chain after it, which another may take. Each has to be answered by [`VirtQueue::give`].
    ///
    /// # Errors
    /// [`DeviceError::Queue`].
    pub fn take(&self, memory: &Memory) -> Result<Option<Chain>, DeviceError> {
        let mut state = self.state();
        if !state.queue.ready() {
            return Ok(None);
        }
        let chain = state.pop(memory).map_err(self.malformed())?;
        let more = state.queue.enable_notification(&**memory).map_err(self.malformed())?;
        if chain.is_none() && more {
            // It came in between.
            self.kick();
        }
        Ok(chain)
    }

    /// Gives a chain back to the driver, with this many bytes written into it, and tells it if it wants to know. Nothing
    /// happens where the driver has reset the queue meanwhile.
    ///
    /// # Errors
    /// [`DeviceError::Queue`].
    pub fn give(&self, memory: &Memory, head: u16, written: u32) -> Result<(), DeviceError> {
        let mut state = self.state();
        if !state.queue.ready() {
            return Ok(());
        }
        state.queue.add_used(&**memory, head, written).map_err(self.malformed())?;
        if state.take_notice(memory).map_err(self.malformed())? {
            self.interrupt.queue_used();
        }
        Ok(())
    }

    /// Asks the driver to tell of new chains, or not; whether there are some already.
    ///
    /// # Errors
    /// [`DeviceError::Queue`].
    pub fn want_kicks(&self, memory: &Memory, wanted: bool) -> Result<bool, DeviceError> {
        let queue = &mut self.state().queue;
        if wanted {
            queue.enable_notification(&**memory).map_err(self.malformed())
        } else {
            queue.disable_notification(&**memory).map_err(self.malformed())?;
            Ok(false)
        }
    }

    /// Has the device called for this queue again.
    pub fn kick(&self) {
        self.kick.raise();
    }

    /// The interrupt of the device.
    pub fn interrupt(&self) -> &Interrupt {
        &self.interrupt
    }

    /// What is written when the driver has filled the queue.
    pub(super) fn kick_descriptor(&self) -> &Event {
        &self.kick
    }

    /// The queue as the registers know it. There is nothing in it any more for whoever has a clone.
    pub fn into_queue(self) -> Queue {
        mem::take(&mut self.state().queue)
    }

    fn malformed(&self) -> impl Fn(Error) -> DeviceError + use<> {
        let queue = self.index;
        move |reason| DeviceError::Queue { queue, reason }
    }
}

/// Writes an element of the used ring, which the driver does not look at until the ring's index passes it.
fn write_used(queue: &Queue, memory: &Memory, position: u16, head: u16, written: u32) -> Result<(), Error> {
    let offset = 4 + 8 * u64::from(position % queue.size());
    let place = queue.used_ring().checked_add(offset).ok_or(Error::AddressOverflow)?;
    let element = u64::from(written) << 32 | u64::from(head);
    memory.write_obj(element.to_le(), GuestAddress(place)).map_err(Error::GuestMemory)
}

/// Whether the driver wants to know that the used ring's index went from `old` to `new`: the specification's section
/// 2.7.7.2. [`Queue::needs_notification`] counts the calls of `add_used`, which [`VirtQueue::push_all`] makes fewer of
/// than it uses chains.
fn notification_wanted(queue: &Queue, memory: &Memory, old: u16, new: u16) -> Result<bool, Error> {
    if !queue.event_idx_enabled() {
        return Ok(true);
    }
    // The driver writes what it waits for and then looks at the index; we wrote the index and look at the former.
    fence(Ordering::SeqCst);
    let offset = 4 + 2 * u64::from(queue.size());
    let place = queue.avail_ring().checked_add(offset).ok_or(Error::AddressOverflow)?;
    let awaited: u16 = memory.load(GuestAddress(place), Ordering::Relaxed).map_err(Error::GuestMemory)?;
    Ok(new.wrapping_sub(u16::from_le(awaited)).wrapping_sub(1) < new.wrapping_sub(old))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::virtio::Device as _;
    use crate::virtio::driver::{Driver, Piece};
    use crate::virtio::rng::Rng;

    #[test]
    fn rings_that_overlap_keep_nobody_for_ever() {
        let mut driver = Driver::new(&Rng);
        driver.put(0, &[Piece::Writable(1)]);
        Rng.queue_ready(&mut driver.io, 0).unwrap();
        // What says whether the driver shall kick is now the index of what it offers, which one chain is behind already.
        let memory = driver.io.memory.clone();
        let mut queue = driver.io.queues.remove(0).into_queue();
        queue.set_used_ring_address(Some(queue.avail_ring() as u32 + 4), None);
        queue.set_avail_ring_address(Some(queue.avail_ring() as u32 + 2), None);
        assert_eq!(queue.used_ring(), queue.avail_ring() + 2);
        let queue = VirtQueue::new(0, queue, Event::new().unwrap(), driver.interrupt.clone());
        queue.drain(&memory, |_| panic!("there is none")).unwrap();
        assert!(queue.kick_descriptor().clear(), "it is looked at again later");
    }

    #[test]
    fn chains_that_go_back_together_are_seen_together() {
        let mut driver = Driver::new(&Rng);
        let heads: Vec<_> = (0..4).map(|_| driver.put(0, &[Piece::Writable(1)]).head).collect();
        let memory = driver.io.memory.clone();
        let queue = &mut driver.io.queues[0];
        while queue.pop(&memory).unwrap().is_some() {}
        // An impossible one among them, wherever it is, and the driver sees none.
        for bad in [[16, heads[1]], [heads[0], u16::MAX]] {
            assert!(queue.push_all(&memory, &bad.map(|head| (head, 1))).is_err());
        }
        queue.notify(&memory).unwrap();
        assert!(!driver.line.clear());
        assert_eq!(driver.used(0), None);

        let queue = &mut driver.io.queues[0];
        queue.push_all(&memory, &[]).unwrap();
        queue.push_all(&memory, &[(heads[0], 5), (heads[1], 6), (heads[2], 7)]).unwrap();
        queue.push(&memory, heads[3], 8).unwrap();
        queue.notify(&memory).unwrap();
        assert!(driver.line.clear());
        for (head, written) in heads.into_iter().zip(5..) {
            assert_eq!(driver.used(0), Some((head, written)));
        }
    }
}
