//! The agent's log: JSON lines, held until the host takes them from the log port.
//!
//! PID 1 keeps its lines in memory. The children that make containers are copies of it; their lines come through a
//! pipe (see [`redirect`]), so that one buffer, with one bound, holds everything.

use std::collections::VecDeque;
use std::fmt::{self, Write as _};
use std::fs::File;
use std::io::Write as _;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, OnceLock};

use rustix::time::{ClockId, clock_gettime};
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncBufReadExt as _, AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _, BufReader};
use tokio::sync::Notify;
use tracing::field::{Field, Visit};
use tracing::level_filters::LevelFilter;
use tracing::span;
use tracing::{Event, Metadata, Subscriber};

use crate::sync::lock;

/// The longest line. A pipe takes as much in one piece, so lines of several writers never mix.
const MAX_LINE: usize = 4096;

/// The longest message within a line, which leaves room for escapes and the other members.
const MAX_MESSAGE: usize = 1536;

/// How much the agent holds while no host reads; the oldest lines go first.
const MAX_HELD: usize = 256 * 1024;

static LOG: OnceLock<Log> = OnceLock::new();

/// One line.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Line {
    pub(crate) level: String,
    pub(crate) message: String,
    /// Microseconds since the guest's boot.
    guest_us: u64,
    /// Set where the line marks a stage of the guest's or a container's way up.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    stage: Option<String>,
}

struct Log {
    level: LevelFilter,
    lines: Mutex<Held>,
    /// Woken for every line.
    arrival: Notify,
    /// Set in a child: its lines go here.
    redirected: AtomicBool,
    child: Mutex<Option<File>>,
    kernel: Option<File>,
}

#[derive(Default)]
struct Held {
    lines: VecDeque<Vec<u8>>,
    bytes: usize,
}

impl Held {
    fn push(&mut self, line: Vec<u8>) {
        self.bytes += line.len();
        self.lines.push_back(line);
        while self.bytes > MAX_HELD {
            let Some(oldest) = self.lines.pop_front() else { break };
            self.bytes -= oldest.len();
        }
    }

    fn pop(&mut self) -> Option<Vec<u8>> {
        let line = self.lines.pop_front()?;
        self.bytes -= line.len();
        Some(line)
    }
}

/// Starts logging. At level debug the kernel's log, and with it the console, gets every line too.
pub(crate) fn init(level: LevelFilter) {
    let kernel = (level >= LevelFilter::DEBUG).then(|| File::options().write(true).open("/dev/kmsg").ok()).flatten();
    let log = Log {
        level,
        lines: Mutex::default(),
        arrival: Notify::new(),
        redirected: AtomicBool::new(false),
        child: Mutex::default(),
        kernel,
    };
    if LOG.set(log).is_ok() {
        // Fails only where a subscriber is set already, and nothing else sets one.
        let _ = tracing::subscriber::set_global_default(Collector);
    }
}

/// Marks a stage for whoever wants to know where the time of a start goes.
pub(crate) fn stage(name: &str) {
    tracing::info!(stage = name, "stage");
}

/// In a child of PID 1: sends every further line into `pipe`.
pub(crate) fn redirect(pipe: File) {
    if let Some(log) = LOG.get() {
        *lock(&log.child) = Some(pipe);
        log.redirected.store(true, Ordering::Relaxed);
    }
}

/// Takes over the lines of a child until it closes its end of the pipe.
pub(crate) async fn adopt(pipe: impl AsyncRead + Unpin) {
    let mut reader = BufReader::new(pipe);
    let mut line = Vec::new();
    loop {
        line.clear();
        let read = (&mut reader).take(MAX_LINE as u64).read_until(b'\n', &mut line).await;
        if !matches!(read, Ok(1..)) {
            return;
        }
        let Ok(mut parsed) = serde_json::from_slice::<Line>(&line) else { continue };
        if parsed.level == "error" {
            // It is an error of the request, which the host answers for; to the agent it is but a warning.
            parsed.level = "warn".into();
        }
        if let Some(log) = LOG.get() {
            log.write(&parsed);
        }
    }
}

/// Sends the log to the host until it goes away.
pub(crate) async fn serve(mut stream: impl AsyncWrite + Unpin) {
    let Some(log) = LOG.get() else { return };
    loop {
        let arrival = log.arrival.notified();
        let line = lock(&log.lines).pop();
        let sent = match line {
            Some(line) => stream.write_all(&line).await,
            None => match stream.flush().await {
                Ok(()) => {
                    arrival.await;
                    Ok(())
                }
                error => error,
            },
        };
        if sent.is_err() {
            return;
        }
    }
}

impl Log {
    fn write(&self, line: &Line) {
        let Ok(mut bytes) = serde_json::to_vec(line) else { return };
        bytes.push(b'\n');
        if bytes.len() > MAX_LINE {
            return;
        }
        if self.redirected.load(Ordering::Relaxed) {
            if let Some(pipe) = lock(&self.child).as_mut() {
                // A full pipe means that PID 1 is busy: a line less is better than a container that hangs.
                let _ = pipe.write(&bytes);
            }
        } else {
            self.hold(bytes);
        }
    }

    fn hold(&self, line: Vec<u8>) {
        if let Some(mut kernel) = self.kernel.as_ref() {
            let _ = kernel.write(&line);
        }
        lock(&self.lines).push(line);
        self.arrival.notify_one();
    }
}

/// Turns events into lines. Spans are not kept: an event says what it means by itself.
struct Collector;

impl Subscriber for Collector {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        // What a library warns of is its own matter; what it fails with may be the cause of a failure here.
        let own = metadata.target().starts_with("runvm");
        let shown = |log: &Log| *metadata.level() <= if own { log.level } else { log.level.min(LevelFilter::ERROR) };
        LOG.get().is_some_and(|log| log.level >= LevelFilter::DEBUG || shown(log))
    }

    fn max_level_hint(&self) -> Option<LevelFilter> {
        LOG.get().map(|log| log.level)
    }

    fn event(&self, event: &Event<'_>) {
        let Some(log) = LOG.get() else { return };
        let mut fields = Fields::default();
        event.record(&mut fields);
        log.write(&Line {
            level: event.metadata().level().as_str().to_ascii_lowercase(),
            message: fields.message(),
            guest_us: guest_us(),
            stage: fields.stage,
        });
    }

    fn new_span(&self, _: &span::Attributes<'_>) -> span::Id {
        span::Id::from_u64(1)
    }

    fn record(&self, _: &span::Id, _: &span::Record<'_>) {}
    fn record_follows_from(&self, _: &span::Id, _: &span::Id) {}
    fn enter(&self, _: &span::Id) {}
    fn exit(&self, _: &span::Id) {}
}

#[derive(Default)]
struct Fields {
    message: String,
    others: String,
    stage: Option<String>,
}

impl Fields {
    fn message(&self) -> String {
        let mut text = match (self.message.is_empty(), self.others.is_empty()) {
            (false, false) => format!("{}:{}", self.message, self.others),
            (_, true) => self.message.clone(),
            (true, false) => self.others.trim_start().to_owned(),
        };
        if text.len() > MAX_MESSAGE {
            text.truncate(text.floor_char_boundary(MAX_MESSAGE));
        }
        text
    }
}

impl Visit for Fields {
    fn record_str(&mut self, field: &Field, value: &str) {
        match field.name() {
            "stage" => self.stage = Some(value.to_owned()),
            "message" => self.message = value.to_owned(),
            name => self.record_other(name, &value),
        }
    }

    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        match field.name() {
            "message" => self.message = format!("{value:?}"),
            name => self.record_other(name, value),
        }
    }
}

impl Fields {
    fn record_other(&mut self, name: &str, value: &dyn fmt::Debug) {
        // Writing to a string cannot fail.
        let _ = write!(self.others, " {name}={value:?}");
    }
}

fn guest_us() -> u64 {
    let now = clock_gettime(ClockId::Monotonic);
    u64::try_from(now.tv_sec).unwrap_or_default() * 1_000_000 + u64::try_from(now.tv_nsec).unwrap_or_default() / 1000
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_oldest_lines_make_room() {
        let mut held = Held::default();
        for index in 0..3 * MAX_HELD / 1000 {
            held.push(vec![u8::try_from(index % 250).unwrap(); 1000]);
        }
        assert!(held.bytes <= MAX_HELD);
        assert_eq!(held.bytes, held.lines.iter().map(Vec::len).sum::<usize>());
        assert_ne!(held.pop(), Some(vec![0; 1000]));
    }

    #[test]
    fn fields_follow_the_message() {
        let fields = Fields { message: "mount failed".into(), others: " path=\"/a\"".into(), stage: None };
        assert_eq!(fields.message(), "mount failed: path=\"/a\"");
        let long = Fields { message: "ü".repeat(MAX_MESSAGE), ..Fields::default() };
        assert!(long.message().len() <= MAX_MESSAGE);
    }
}
