//! virtiofsd's own messages, in the log of this program, and no more of them than a guest may cause.

use std::sync::atomic::{AtomicUsize, Ordering};

/// A guest can provoke messages at will; a log is the host's disk.
const MAX_MESSAGES: usize = 256;

struct Bridge {
    messages: AtomicUsize,
}

static BRIDGE: Bridge = Bridge { messages: AtomicUsize::new(0) };

/// Sends what the crates below say with `log` to `tracing`.
pub(super) fn init() {
    // Fails only where a logger is set already, which then serves as well.
    let _ = log::set_logger(&BRIDGE).map(|()| log::set_max_level(log::LevelFilter::Warn));
}

impl log::Log for Bridge {
    fn enabled(&self, metadata: &log::Metadata<'_>) -> bool {
        metadata.level() <= log::Level::Warn
    }

    fn log(&self, record: &log::Record<'_>) {
        if !self.enabled(record.metadata()) {
            return;
        }
        match self.messages.fetch_add(1, Ordering::Relaxed) {
            0..MAX_MESSAGES => match record.level() {
                log::Level::Error => tracing::warn!("share: {}", record.args()),
                _ => tracing::info!("share: {}", record.args()),
            },
            MAX_MESSAGES => tracing::warn!("share: further messages are dropped"),
            _ => {}
        }
    }

    fn flush(&self) {}
}
