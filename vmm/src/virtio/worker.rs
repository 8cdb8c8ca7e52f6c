//! The thread that serves a device.
//!
//! It is started with the device, before the guest runs, so that it can be confined before it sees anything of the
//! guest's, and it lasts as long as the device: between the driver's reset and its next start it waits. Whatever the
//! device does it does in this thread, being saved and restored included, so nobody else needs to be allowed to.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, Receiver, Sender};
use std::thread::{self, JoinHandle};

use rustix::event::epoll::EventFlags;

use super::poller::RESERVED;
use super::{Device, DeviceError, Io, Kind};
use crate::Event;
use crate::confinement::{Confinement, Role};

const STOP: u64 = RESERVED;
const FIRST_KICK: u64 = RESERVED + 1;

type Call = Box<dyn FnOnce(&mut dyn Device) + Send>;

/// What the thread is to do next.
enum Order {
    Serve(Io),
    Call(Call),
}

/// A device and its thread.
pub struct Worker {
    stop: Event,
    failed: Arc<AtomicBool>,
    orders: Option<Sender<Order>>,
    underway: Receiver<()>,
    ended: Receiver<Io>,
    confined: Receiver<io::Result<()>>,
    serving: bool,
    thread: Option<JoinHandle<()>>,
}

impl Worker {
    /// Starts the thread, which is confined while the caller does something else: see [`Worker::ready`].
    ///
    /// # Errors
    /// Where there can be no thread.
    pub fn spawn(mut device: Box<dyn Device>, confinement: Confinement) -> io::Result<Self> {
        let kind = device.kind();
        let stop = Event::new()?;
        let failed = Arc::new(AtomicBool::new(false));
        let (orders, received) = mpsc::channel();
        let (begun, underway) = mpsc::channel();
        let (answers, ended) = mpsc::channel();
        let (report, confined) = mpsc::channel();
        let thread = {
            let (failed, stop) = (failed.clone(), stop.try_clone()?);
            thread::Builder::new().name(format!("{kind:?}").to_lowercase()).spawn(move || {
                let ready = confinement(Role::Device(kind));
                let go = ready.is_ok();
                if report.send(ready).is_err() || !go {
                    return;
                }
                while let Ok(order) = received.recv() {
                    let mut io = match order {
                        Order::Serve(io) => io,
                        Order::Call(call) => {
                            call(device.as_mut());
                            continue;
                        }
                    };
                    if let Err(error) = serve(device.as_mut(), &mut io, &stop, Begun(&begun)) {
                        report_failure(kind, &error);
                        failed.store(true, Ordering::Release);
                        if let Some(queue) = io.queues.first() {
                            queue.interrupt().config_changed();
                        }
                    }
                    if answers.send(io).is_err() {
                        return;
                    }
                }
            })?
        };
        Ok(Self { stop, failed, orders: Some(orders), underway, ended, confined, serving: false, thread: Some(thread) })
    }

    /// Waits until the thread is confined, which is to be seen before the guest runs.
    ///
    /// # Errors
    /// Where it cannot be confined: then the device is never served.
    pub fn ready(&self) -> io::Result<()> {
        self.confined.recv().map_err(|_| io::Error::other("a device's thread ended at once"))?
    }

    /// Has the device served from now on.
    pub fn serve(&mut self, io: Io) {
        // What nobody waited for when it was served before.
        while self.underway.try_recv().is_ok() {}
        self.serving = self.orders.as_ref().is_some_and(|orders| orders.send(Order::Serve(io)).is_ok());
    }

    /// Waits until the thread has begun to serve the device, if it is to be served.
    pub fn await_begin(&self) {
        if self.serving {
            // A thread that is gone serves nothing, which the driver will see.
            let _ = self.underway.recv();
        }
    }

    /// Waits until the device is not served any more; what it was served with, if it was.
    pub fn halt(&mut self) -> Option<Io> {
        if !std::mem::take(&mut self.serving) {
            return None;
        }
        self.stop.raise();
        let io = self.ended.recv().ok();
        self.failed.store(false, Ordering::Release);
        self.stop.clear();
        io
    }

    /// The device gives up, for somebody else's failure in its place.
    pub fn fail(&self, kind: Kind, error: &DeviceError) {
        report_failure(kind, error);
        self.failed.store(true, Ordering::Release);
    }

    /// Whether the device gave up.
    pub fn failed(&self) -> bool {
        self.failed.load(Ordering::Acquire)
    }

    /// Has the device do something else, and waits until it has; none where it panicked. While the device is served
    /// this waits for its end: call [`Worker::halt`] first.
    pub fn call<T: Send + 'static>(&self, call: impl FnOnce(&mut dyn Device) -> T + Send + 'static) -> Option<T> {
        let (sender, answer) = mpsc::channel();
        let call = Order::Call(Box::new(move |device| {
            // Whoever called waits for it.
            let _ = sender.send(call(device));
        }));
        self.orders.as_ref()?.send(call).ok()?;
        answer.recv().ok()
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        self.halt();
        self.orders = None;
        if let Some(thread) = self.thread.take() {
            // A device that panicked took its thread with it, and its guest's driver waits for ever.
            let _ = thread.join();
        }
    }
}

/// Tells, once it is dropped, that a device is served, or will not be.
struct Begun<'a>(&'a Sender<()>);

impl Drop for Begun<'_> {
    fn drop(&mut self) {
        // Nobody may be waiting.
        let _ = self.0.send(());
    }
}

fn serve(device: &mut dyn Device, io: &mut Io, stop: &Event, begun: Begun<'_>) -> Result<(), DeviceError> {
    io.poller.add(stop, STOP, EventFlags::IN).map_err(DeviceError::host("wait for the machine"))?;
    for (token, queue) in (FIRST_KICK..).zip(&io.queues) {
        io.poller
            .add(queue.kick_descriptor(), token, EventFlags::IN)
            .map_err(DeviceError::host("wait for the guest"))?;
        // What was put into the queue before anybody listened.
        queue.kick();
    }
    device.start(io)?;
    drop(begun);
    loop {
        for ready in io.poller.wait().map_err(DeviceError::host("wait for the guest"))? {
            if ready.token == STOP {
                return device.rest(io);
            }
            if ready.token < RESERVED {
                device.descriptor_ready(io, ready)?;
                continue;
            }
            let Ok(index) = usize::try_from(ready.token - FIRST_KICK) else { continue };
            if let Some(queue) = io.queues.get(index) {
                queue.kick_descriptor().clear();
                if queue.ready() {
                    device.queue_ready(io, index)?;
                }
            }
        }
    }
}

/// Tells whoever runs the machine that a device gives up.
fn report_failure(kind: Kind, error: &DeviceError) {
    let cause = std::error::Error::source(error).map(|source| format!(": {source}")).unwrap_or_default();
    tracing::warn!("the guest's device {kind:?} stops: {error}{cause}");
}
