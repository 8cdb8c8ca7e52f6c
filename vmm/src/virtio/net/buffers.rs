//! The guest's buffers, as pieces of memory that one system call reads or writes.

use std::collections::VecDeque;

use virtio_queue::Error;
use virtio_queue::desc::split::Descriptor;
use vm_memory::{Bytes as _, GuestMemory as _, VolatileSlice};

use super::tap::{HEADER, MAX_PIECES};
use crate::Memory;
use crate::virtio::{Chain, DeviceError, VirtQueue};

/// Where a header says how many buffers its frame is in, in two bytes.
const NUM_BUFFERS: usize = 10;

/// The memory that descriptors name, appended to `pieces`; how many bytes. None where all pieces would be more than
/// [`MAX_PIECES`].
///
/// # Errors
/// Where they name what is not in the guest's memory.
pub fn append_pieces<'m>(
    memory: &'m Memory,
    descriptors: impl Iterator<Item = Descriptor>,
    pieces: &mut VecDeque<VolatileSlice<'m>>,
) -> Result<Option<usize>, Error> {
    let mut length = 0;
    for descriptor in descriptors {
        for piece in memory.get_slices(descriptor.addr(), descriptor.len() as usize) {
            let piece = piece.map_err(Error::GuestMemory)?;
            if pieces.len() == MAX_PIECES {
                return Ok(None);
            }
            // It cannot overflow: a chain ends before its descriptors sum up to more than 32 bits.
            length += piece.len();
            pieces.push_back(piece);
        }
    }
    Ok(Some(length))
}

/// Buffers that are taken out of the receive queue ahead of the frames, since a frame's length is known only when it is
/// there. What is left has to go back: [`ReceiveBuffers::put_back`].
pub struct ReceiveBuffers<'m> {
    memory: &'m Memory,
    queue: usize,
    /// How much has to be there before a frame may be read.
    needed: usize,
    available: usize,
    pieces: VecDeque<VolatileSlice<'m>>,
    chains: VecDeque<Buffer>,
}

struct Buffer {
    head: u16,
    length: usize,
    pieces: usize,
}

impl<'m> ReceiveBuffers<'m> {
    /// None yet, of the queue with this index. `needed` is what the largest frame takes, its header included.
    pub fn new(memory: &'m Memory, queue: usize, needed: usize) -> Self {
        Self { memory, queue, needed, available: 0, pieces: VecDeque::new(), chains: VecDeque::new() }
    }

    /// Takes as many buffers as a frame may need; whether there are as many. If not, the driver will kick.
    ///
    /// # Errors
    /// [`DeviceError::Queue`].
    pub fn gather(&mut self, queue: &mut VirtQueue) -> Result<bool, DeviceError> {
        while self.available < self.needed {
            match queue.pop(self.memory)? {
                Some(chain) => self.add(chain).map_err(|reason| DeviceError::Queue { queue: self.queue, reason })?,
                // This has to be asked while the buffers are out of the queue: the driver kicks when it adds to what
                // had been taken then.
                None if queue.want_kicks(self.memory, true)? => {}
                None => return Ok(false),
            }
        }
        Ok(true)
    }

    fn add(&mut self, chain: Chain) -> Result<(), Error> {
        let head = chain.head_index();
        let before = self.pieces.len();
        let length = append_pieces(self.memory, chain.writable(), &mut self.pieces)?;
        // Section 5.1.6.3.1: a buffer holds at least a header.
        let length = length.filter(|&length| length >= HEADER).ok_or(Error::InvalidChain)?;
        self.available += length;
        self.chains.push_back(Buffer { head, length, pieces: self.pieces.len() - before });
        Ok(())
    }

    /// Where the next frame goes.
    pub fn pieces(&self) -> impl Iterator<Item = &VolatileSlice<'m>> {
        self.pieces.iter()
    }

    /// Gives the driver the buffers that a frame with its header, so long together, was read into.
    ///
    /// # Errors
    /// [`DeviceError::Queue`].
    pub fn fill(&mut self, queue: &mut VirtQueue, length: usize) -> Result<(), DeviceError> {
        let mut left = length;
        let mut used = Vec::new();
        for buffer in &self.chains {
            let written = left.min(buffer.length);
            used.push((buffer.head, written as u32));
            left -= written;
            if left == 0 {
                break;
            }
        }
        self.write(NUM_BUFFERS, &(used.len() as u16).to_le_bytes())
            .map_err(|reason| DeviceError::Queue { queue: self.queue, reason })?;
        for buffer in self.chains.drain(..used.len()) {
            self.available -= buffer.length;
            self.pieces.drain(..buffer.pieces);
        }
        // Only now, and at once: the driver expects all buffers of a frame as soon as it sees the first.
        queue.push_all(self.memory, &used)
    }

    /// Writes what may lie across pieces.
    fn write(&self, mut offset: usize, mut bytes: &[u8]) -> Result<(), Error> {
        for piece in &self.pieces {
            if offset >= piece.len() {
                offset -= piece.len();
                continue;
            }
            let written = piece.write(bytes, offset).map_err(Error::VolatileMemoryError)?;
            bytes = &bytes[written..];
            offset = 0;
            if bytes.is_empty() {
                break;
            }
        }
        Ok(())
    }

    /// Puts the buffers that no frame came for back into the queue.
    pub fn put_back(self, queue: &mut VirtQueue) {
        self.chains.iter().for_each(|_| queue.put_back());
    }
}
