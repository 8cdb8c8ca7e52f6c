//! Where requests are answered, by whichever thread comes with them.
//!
//! Requests of a guest are answered from the host's caches, in less time than it takes to wake a thread, and to interrupt a
//! processor and wake another in turn: half a millisecond, where a megabyte is copied in less. So the processor that tells of
//! a request serves it itself, and its guest goes on with the answer in hand. What waits for a disk is left to the device's
//! thread, and the processor is free for others meanwhile.

use std::collections::VecDeque;
use std::io::Write as _;
use std::mem::size_of;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use virtiofsd::Error as FuseError;
use virtiofsd::filesystem::{FileSystem, SerializableFileSystem};
use virtiofsd::fuse::{InHeader, Opcode, OutHeader};
use virtiofsd::server::Server;
use vm_memory::{ByteValued as _, Bytes as _};

use super::super::buffers::IoMemory;
use super::super::{Attendant, Chain, DeviceError, Io, VirtQueue};
use super::guard::Guard;
use super::letter::Letter;
use super::lookout::Lookout;
use super::{REQUESTS, apart};
use crate::Memory;

/// How many requests one thread serves before others have their turn: a pause, or what else the processor has to do.
/// Requests of a megabyte are no rarity.
pub(super) const BATCH: usize = 16;

/// The largest request, and the largest answer, in bytes: the megabyte that virtiofsd grants, and the headers before it.
/// What a chain has beyond is left alone, lest a single one keep the device for as long as gigabytes take.
pub(super) const MAX_MESSAGE: usize = (1 << 20) + 4096;

/// What writes back what the host's caches hold takes as long as it takes.
const SLOW: [u32; 4] = [Opcode::Fsync as u32, Opcode::Fsyncdir as u32, Opcode::Syncfs as u32, Opcode::Fallocate as u32];

/// The server and the queues that its requests come by.
pub(super) struct Desk<F: FileSystem + Send + Sync> {
    pub(super) server: Server<Guard<F>>,
    /// None while no driver uses the device.
    session: Mutex<Option<Arc<Session>>>,
    /// Left to the device's thread, at most as many as a queue holds.
    backlog: Mutex<VecDeque<Task>>,
    /// Takes answers for which the guest has left no room.
    nowhere: Letter,
    /// None where requests are only served when there is word of them.
    pub(super) lookout: Option<Lookout>,
}

/// A driver's use of the device.
struct Session {
    guest: Memory,
    memory: IoMemory,
    queues: Vec<VirtQueue>,
}

/// A request that was taken out of a queue.
struct Task {
    session: Arc<Session>,
    queue: usize,
    chain: Chain,
}

impl<F: FileSystem + SerializableFileSystem + Send + Sync + 'static> Desk<F> {
    pub(super) fn new(server: Server<Guard<F>>, lookout: Option<Lookout>) -> Result<Self, DeviceError> {
        let nowhere = Letter::new(&[])?;
        Ok(Self { server, session: Mutex::default(), backlog: Mutex::default(), nowhere, lookout })
    }

    /// A driver has made the queues ready.
    pub(super) fn open(&self, io: &Io) -> Result<(), DeviceError> {
        let session =
            Session { guest: io.memory.clone(), memory: IoMemory::new(&io.memory)?, queues: io.queues.clone() };
        *lock(&self.session) = Some(Arc::new(session));
        Ok(())
    }

    /// Serves what processors have left, and what is in a queue, in the device's own thread.
    pub(super) fn work(&self, queue: usize) -> Result<(), DeviceError> {
        self.clear()?;
        self.take_from(queue, |task| self.serve(task))?;
        if queue == REQUESTS { self.look_out() } else { Ok(()) }
    }

    /// Looks for requests, if the thread is called for that.
    fn look_out(&self) -> Result<(), DeviceError> {
        let Some(session) = lock(&self.session).clone() else { return Ok(()) };
        let Some(lookout) = self.lookout.as_ref() else { return Ok(()) };
        let Some(mut post) = lookout.begin() else { return Ok(()) };
        let queue = &session.queues[REQUESTS];
        let begun = Instant::now();
        let mut last = begun;
        queue.want_kicks(&session.guest, false)?;
        while post.holds() && last.elapsed() < lookout.spans.patience {
            if last.duration_since(begun) > lookout.spans.shift {
                post.goes_on();
                queue.kick();
                break;
            }
            if let Some(task) = untold(&session)? {
                self.serve(task)?;
                last = Instant::now();
            } else {
                post.pause();
            }
        }
        drop(post);
        if queue.want_kicks(&session.guest, true)? {
            queue.kick();
        }
        Ok(())
    }

    /// Serves what processors have left.
    pub(super) fn clear(&self) -> Result<(), DeviceError> {
        loop {
            let task = lock(&self.backlog).pop_front();
            let Some(task) = task else { return Ok(()) };
            self.serve(task)?;
        }
    }

    /// Nobody uses the device any more.
    pub(super) fn close(&self) {
        *lock(&self.session) = None;
        lock(&self.backlog).clear();
    }

    /// Takes some requests out of a queue.
    fn take_from(
        &self,
        queue: usize,
        mut take: impl FnMut(Task) -> Result<(), DeviceError>,
    ) -> Result<(), DeviceError> {
        let Some(session) = lock(&self.session).clone() else { return Ok(()) };
        let Some(source) = session.queues.get(queue) else { return Ok(()) };
        for _ in 0..BATCH {
            let Some(chain) = source.take(&session.guest)? else { return Ok(()) };
            take(Task { session: session.clone(), queue, chain })?;
        }
        source.kick();
        Ok(())
    }

    /// Serves a request in the thread of the processor that tells of it, unless it would wait there.
    fn serve_told(&self, task: Task) -> Result<(), DeviceError> {
        if !task.is_slow() {
            return self.serve(task);
        }
        self.leave(task).or_else(|task| self.serve(task))
    }

    /// Serves what the thread that looks has not got to, if a processor tells of it all the same.
    fn stand_in(&self, lookout: &Lookout) -> Result<(), DeviceError> {
        let Some(session) = lock(&self.session).clone() else { return Ok(()) };
        let mut missed = false;
        for _ in 0..BATCH {
            let Some(task) = untold(&session)? else { break };
            self.serve_told(task)?;
            missed = true;
        }
        lookout.told_all_the_same(missed);
        Ok(())
    }

    /// Has the device's thread look for requests.
    fn call(&self) {
        if let Some(session) = lock(&self.session).as_ref() {
            session.queues[REQUESTS].kick();
        }
    }

    /// Leaves a request to the device's thread; gives it back where that has enough to do.
    fn leave(&self, task: Task) -> Result<(), Task> {
        let queue = &task.session.queues[task.queue];
        let mut backlog = lock(&self.backlog);
        if backlog.len() >= usize::from(super::REQUEST_QUEUE_SIZE) {
            return Err(task);
        }
        let queue = queue.clone();
        backlog.push_back(task);
        drop(backlog);
        queue.kick();
        Ok(())
    }

    fn serve(&self, task: Task) -> Result<(), DeviceError> {
        let Task { session, queue, chain } = task;
        let written = self.answer(&session.memory, &chain);
        session.queues[queue].give(&session.guest, chain.head_index(), written)
    }

    /// Answers a request; how much was written into it.
    fn answer(&self, memory: &IoMemory, chain: &Chain) -> u32 {
        let Ok((mut reader, mut writer)) = memory.buffers(chain) else { return 0 };
        // Each keeps what is before; the rest is dropped here, and there may be none.
        let _ = (reader.split_at(MAX_MESSAGE), writer.split_at(MAX_MESSAGE));
        // The server takes it for granted that there is room for an answer's header, but there is none where the guest
        // wants no answer.
        let served = if writer.available_bytes() < size_of::<OutHeader>() {
            let Ok(nowhere) = self.nowhere.writer() else { return 0 };
            self.server.handle_message(reader, nowhere, None::<&mut ()>).map(|_| 0)
        } else {
            self.server.handle_message(reader, writer, None::<&mut ()>)
        };
        match served {
            Ok(written) => u32::try_from(written).unwrap_or(0),
            Err(error) => refuse(memory, chain, &error).unwrap_or(0),
        }
    }
}

impl<F: FileSystem + SerializableFileSystem + Send + Sync + 'static> Attendant for Desk<F> {
    fn enter(&self) -> Result<(), DeviceError> {
        apart()
    }

    fn attend(&self, queue: usize) -> Result<(), DeviceError> {
        let lookout = self.lookout.as_ref().filter(|_| queue == REQUESTS);
        let attended = match lookout {
            Some(lookout) if lookout.looking() => self.stand_in(lookout),
            _ => self.take_from(queue, |task| self.serve_told(task)),
        };
        if lookout.is_some_and(Lookout::told) {
            self.call();
        }
        attended.inspect_err(|_| self.close())
    }
}

/// Takes the next request out of its queue without asking to be told of others.
fn untold(session: &Arc<Session>) -> Result<Option<Task>, DeviceError> {
    let chain = session.queues[REQUESTS].pop(&session.guest)?;
    Ok(chain.map(|chain| Task { session: session.clone(), queue: REQUESTS, chain }))
}

impl Task {
    /// Whether it waits for a disk. The guest may change the request after this look: then its processor waits.
    fn is_slow(&self) -> bool {
        let Some(first) = self.chain.clone().next() else { return false };
        let header: [u32; 2] = self.session.guest.read_obj(first.addr()).unwrap_or_default();
        let [_, opcode] = header.map(u32::from_le);
        SLOW.contains(&opcode)
    }
}

/// Answers a request that the server can make nothing of, or whose answer it has no room for.
fn refuse(memory: &IoMemory, chain: &Chain, error: &FuseError) -> Option<u32> {
    tracing::debug!("the guest's request to its file system is malformed: {error}");
    let (mut reader, mut writer) = memory.buffers(chain).ok()?;
    let errno = match error {
        FuseError::EncodeMessage(_) | FuseError::FlushMessage(_) => libc::EIO,
        _ => libc::EINVAL,
    };
    let length = size_of::<OutHeader>() as u32;
    let header: InHeader = reader.read_obj().ok()?;
    let answer = OutHeader { len: length, error: -errno, unique: header.unique };
    writer.write_all(answer.as_slice()).ok()?;
    Some(length)
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
