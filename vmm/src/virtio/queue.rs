//! A queue, with its two notifications.

use virtio_queue::{DescriptorChain, Queue, QueueOwnedT as _, QueueT as _};

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

/// A queue that the driver has made ready.
#[derive(Debug)]
pub struct VirtQueue {
    index: usize,
    queue: Queue,
    kick: Event,
    interrupt: Interrupt,
}

impl VirtQueue {
    /// A queue that the driver has set up. `kick` is written when the driver has filled it.
    pub fn new(index: usize, queue: Queue, kick: Event, interrupt: Interrupt) -> Self {
        Self { index, queue, kick, interrupt }
    }

    /// Whether the driver uses it.
    pub fn ready(&self) -> bool {
        self.queue.ready()
    }

    /// Serves the chains that are in the queue, at most as many as it can hold at once, and tells the driver of
    /// them; whether chains that can be served may be left.
    ///
    /// Where some are left the queue is kicked, so that the device is called again after others had their turn.
    ///
    /// # Errors
    /// What `serve` answers, and [`DeviceError::Queue`].
    pub fn drain(
        &mut self,
        memory: &Memory,
        mut serve: impl FnMut(Chain) -> Result<Served, DeviceError>,
    ) -> Result<(), DeviceError> {
        let mut budget = self.queue.size();
        let mut blocked = false;
        loop {
            self.queue.disable_notification(&**memory).map_err(self.malformed())?;
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
            let more = self.queue.enable_notification(&**memory).map_err(self.malformed())?;
            if blocked || !more {
                break;
            }
            if budget == 0 {
                self.kick();
                break;
            }
        }
        self.notify(memory)
    }

    /// Takes the next chain; none where the queue is empty. Each has to be answered by [`VirtQueue::push`] or
    /// [`VirtQueue::put_back`].
    ///
    /// # Errors
    /// [`DeviceError::Queue`].
    pub fn pop(&mut self, memory: &Memory) -> Result<Option<Chain>, DeviceError> {
        if !self.queue.ready() {
            return Ok(None);
        }
        // `pop_descriptor_chain` alone would hide a malformed ring behind an empty one.
        let mut chains =
            self.queue.iter(memory.clone()).map_err(|reason| DeviceError::Queue { queue: self.index, reason })?;
        Ok(chains.next())
    }

    /// Undoes the last [`VirtQueue::pop`].
    pub fn put_back(&mut self) {
        self.queue.set_next_avail(self.queue.next_avail().wrapping_sub(1));
    }

    /// Gives a chain back to the driver, with this many bytes written into it.
    ///
    /// # Errors
    /// [`DeviceError::Queue`].
    pub fn push(&mut self, memory: &Memory, head: u16, written: u32) -> Result<(), DeviceError> {
        self.queue.add_used(&**memory, head, written).map_err(self.malformed())
    }

    /// Tells the driver of what was pushed, if it wants to know.
    ///
    /// # Errors
    /// [`DeviceError::Queue`].
    pub fn notify(&mut self, memory: &Memory) -> Result<(), DeviceError> {
        if self.queue.needs_notification(&**memory).map_err(self.malformed())? {
            self.interrupt.queue_used();
        }
        Ok(())
    }

    /// Asks the driver to tell of new chains, or not; whether there are some already.
    ///
    /// # Errors
    /// [`DeviceError::Queue`].
    pub fn want_kicks(&mut self, memory: &Memory, wanted: bool) -> Result<bool, DeviceError> {
        if wanted {
            self.queue.enable_notification(&**memory).map_err(self.malformed())
        } else {
            self.queue.disable_notification(&**memory).map_err(self.malformed())?;
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

    /// The queue as the registers know it.
    pub(super) fn into_queue(self) -> Queue {
        self.queue
    }

    fn malformed(&self) -> impl Fn(virtio_queue::Error) -> DeviceError + use<> {
        let queue = self.index;
        move |reason| DeviceError::Queue { queue, reason }
    }
}
