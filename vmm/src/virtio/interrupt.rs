//! A device's interrupt: a bit that says why, and a line to the guest.
//!
//! Reading the bit and taking it back are two exits for each interrupt. A driver that has agreed to
//! [`super::transport::QUEUE_INTERRUPTS`] looks at its queues instead, so for used buffers no bit is set.

use std::fmt::Debug;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use crate::Event;

/// The reason "a queue has used buffers".
pub const QUEUE: u32 = 1;
/// The reason "the configuration has changed".
pub const CONFIG: u32 = 2;

/// The way to the guest.
pub trait Line: Debug + Send + Sync {
    /// Interrupts it. Once this returns, the interrupt is in the state of the guest's interrupt controllers, which a
    /// machine is saved with.
    fn raise(&self);
}

/// For drivers that are no guests.
impl Line for Event {
    fn raise(&self) {
        self.raise();
    }
}

/// A device's interrupt. Clones are the same one.
#[derive(Clone, Debug)]
pub struct Interrupt {
    reasons: Arc<AtomicU32>,
    line: Arc<dyn Line>,
    /// Whether the driver expects a reason for used buffers, too.
    explained: bool,
}

impl Interrupt {
    /// One on this line, for no reason yet.
    pub fn new(line: Arc<dyn Line>) -> Self {
        Self { reasons: Arc::default(), line, explained: true }
    }

    /// The same for a driver that takes each for one of its queues'.
    #[must_use]
    pub fn unexplained(&self) -> Self {
        Self { explained: false, ..self.clone() }
    }

    /// Tells the driver that a queue has used buffers.
    pub fn queue_used(&self) {
        self.raise(if self.explained { QUEUE } else { 0 });
    }

    /// Tells the driver that the configuration has changed.
    pub fn config_changed(&self) {
        self.raise(CONFIG);
    }

    /// Why there was an interrupt: bits that stay until they are acknowledged.
    pub fn reasons(&self) -> u32 {
        self.reasons.load(Ordering::Acquire)
    }

    /// Takes reasons back.
    pub fn acknowledge(&self, reasons: u32) {
        self.reasons.fetch_and(!reasons, Ordering::AcqRel);
    }

    /// Sets the reasons as they were when the machine was saved.
    pub fn restore(&self, reasons: u32) {
        self.reasons.store(reasons & (QUEUE | CONFIG), Ordering::Release);
    }

    fn raise(&self, reason: u32) {
        self.reasons.fetch_or(reason, Ordering::AcqRel);
        self.line.raise();
    }
}
