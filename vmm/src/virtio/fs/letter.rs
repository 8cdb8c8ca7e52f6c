//! A request that comes from us and not from the guest.
//!
//! The server reads requests from a queue's chains and from nothing else, so this is a queue with one chain in it, in
//! memory that no guest sees.

use std::io;
use std::sync::Arc;

use virtio_queue::{DescriptorChain, Queue, QueueT as _};
use virtiofsd::descriptor_utils::{Reader, Writer};
use vm_memory::{ByteValued, Bytes as _, GuestAddress};

use super::super::DeviceError;
use super::super::buffers::LoggedMemory;

/// How much room there is for a request, and for its answer.
pub(super) const ROOM: u32 = 1024;

const DESCRIPTORS: GuestAddress = GuestAddress(0);
const AVAILABLE: GuestAddress = GuestAddress(0x100);
const USED: GuestAddress = GuestAddress(0x200);
const REQUEST: GuestAddress = GuestAddress(0x400);
const ANSWER: GuestAddress = GuestAddress(0x800);
const SIZE: usize = 0x1000;

const NEXT: u16 = 1;
const WRITE: u16 = 2;

/// A request and room for its answer.
pub(super) struct Letter {
    memory: Arc<LoggedMemory>,
    chain: DescriptorChain<Arc<LoggedMemory>>,
}

impl Letter {
    /// One with this request, of at most [`ROOM`] bytes.
    pub(super) fn new(request: &[u8]) -> Result<Self, DeviceError> {
        Self::write(request).map_err(DeviceError::host("make room for a request"))
    }

    fn write(request: &[u8]) -> io::Result<Self> {
        let length = u32::try_from(request.len()).ok().filter(|&length| length <= ROOM);
        let length = length.ok_or(io::ErrorKind::InvalidInput)?;
        let memory = Arc::new(LoggedMemory::from_ranges(&[(GuestAddress(0), SIZE)]).map_err(io::Error::other)?);
        let write = |bytes: &[u8], address| memory.write_slice(bytes, address).map_err(io::Error::other);
        write(request, REQUEST)?;
        write(&[descriptor(REQUEST, length, NEXT), descriptor(ANSWER, ROOM, WRITE)].concat(), DESCRIPTORS)?;
        // One chain is available, which begins at descriptor 0.
        write(&[0u16, 1, 0].map(u16::to_le_bytes).concat(), AVAILABLE)?;

        let mut queue = Queue::new(2).map_err(io::Error::other)?;
        queue.set_desc_table_address(Some(DESCRIPTORS.0 as u32), Some(0));
        queue.set_avail_ring_address(Some(AVAILABLE.0 as u32), Some(0));
        queue.set_used_ring_address(Some(USED.0 as u32), Some(0));
        queue.set_ready(true);
        let chain = queue.pop_descriptor_chain(memory.clone()).ok_or(io::ErrorKind::InvalidData)?;
        Ok(Self { memory, chain })
    }

    /// The request, from its beginning.
    pub(super) fn reader(&self) -> io::Result<Reader<'_>> {
        Reader::new(&self.memory, self.chain.clone()).map_err(io::Error::other)
    }

    /// The room for the answer, whatever is in it.
    pub(super) fn writer(&self) -> io::Result<Writer<'_>> {
        Writer::new(&self.memory, self.chain.clone()).map_err(io::Error::other)
    }

    /// What was written there.
    pub(super) fn answer<T: ByteValued + Default>(&self) -> io::Result<T> {
        let mut answer = T::default();
        self.memory.read_slice(answer.as_mut_slice(), ANSWER).map_err(io::Error::other)?;
        Ok(answer)
    }
}

fn descriptor(address: GuestAddress, length: u32, flags: u16) -> Vec<u8> {
    [&address.0.to_le_bytes()[..], &length.to_le_bytes(), &flags.to_le_bytes(), &1u16.to_le_bytes()].concat()
}
