//! A device's interrupt: a bit that says why, and a descriptor that KVM turns into the interrupt itself.
//!
//! Reading the bit and taking it back are two exits for each interrupt. A driver that has agreed to
//! [`super::transport::QUEUE_INTERRUPTS`] looks at its queues instead, so for used buffers no bit is set.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use crate::Event;

/// The reason "a queue has used buffers".
pub const QUEUE: u32 = 1;
/// The reason "the configuration has changed".
pub const CONFIG: u32 = 2;

/// An interrupt line. Clones are the same line.
#[derive(Clone, Debug)]
pub struct Interrupt {
    reasons: Arc<AtomicU32>,
    line: Arc<Event>,
    /// Whether the driver expects a reason for used buffers, too.
    explained: bool,
}

impl Interrupt {
    /// A line whose descriptor is still to be given to KVM.
    ///
    /// # Errors
    /// Where there are no descriptors left.
    pub fn new() -> io::Result<Self> {
        Ok(Self { reasons: Arc::default(), line: Arc::new(Event::new()?), explained: true })
    }

    /// The same line, of which the driver takes each interrupt for one of its queues'.
    #[must_use]
    pub fn unexplained(&self) -> Self {
        Self { explained: false, ..self.clone() }
    }

    /// Whether used buffers are a reason of their own.
    pub fn is_explained(&self) -> bool {
        self.explained
    }

    /// The descriptor: a write is an interrupt.
    pub fn line(&self) -> &Event {
        &self.line
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

    /// Raises it again where the driver has not acknowledged it: on its way to the guest's interrupt controller it is in
    /// nobody's saved state.
    pub fn repeat(&self) {
        if self.reasons() != 0 {
            self.line.raise();
        }
    }

    fn raise(&self, reason: u32) {
        self.reasons.fetch_or(reason, Ordering::AcqRel);
        self.line.raise();
    }
}
