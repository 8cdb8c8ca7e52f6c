//! The log, in the two formats that engines ask runc for: `--log FILE --log-format text|json`.
//!
//! An engine shows its user the last `level=error` line of the JSON form, so each error that ends a command is
//! logged once, as one sentence. The level `debug` adds stage marks: see [`stage`].

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::fd::{AsFd as _, BorrowedFd};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Mutex, OnceLock};

use serde_json::{Map, Value, json};
use tracing::field::{Field, Visit};
use tracing::{Event, Level, Subscriber};
use tracing_subscriber::layer::{Context, Layer, SubscriberExt as _};

/// The file that this process logs to.
static FILE: OnceLock<File> = OnceLock::new();

/// How a line is written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum Format {
    /// `time="…" level=… msg="…" field=…`
    #[default]
    Text,
    /// One JSON object.
    Json,
}

impl Format {
    /// The value of `--log-format` that means this.
    pub fn name(self) -> &'static str {
        match self {
            Self::Text => "text",
            Self::Json => "json",
        }
    }
}

/// Where a log goes, and how.
#[derive(Clone, Debug, Default)]
pub struct Options {
    /// Appended to, created where it is missing; stderr without.
    pub file: Option<PathBuf>,
    /// How a line is written.
    pub format: Format,
    /// Whether debug lines are written too.
    pub debug: bool,
}

impl Options {
    /// Makes another process of this program log to the same place, by its stderr: it can open no file.
    ///
    /// # Errors
    /// Those of opening the file.
    pub fn hand_down_as_stderr(&self, command: &mut Command) -> io::Result<()> {
        command.args(["--log-format", self.format.name()]);
        if self.debug {
            command.arg("--debug");
        }
        // A helper must not hold the stderr of an engine or a user open.
        command.stderr(match &self.file {
            Some(file) => Stdio::from(open(file)?),
            None => Stdio::null(),
        });
        Ok(())
    }
}

/// Sends the log of this process to where the options say.
///
/// # Errors
/// Those of opening the file.
pub fn init(options: &Options) -> io::Result<()> {
    let Options { file, format, debug } = options;
    let out: Box<dyn Write + Send> = match file {
        Some(path) => {
            let file = open(path)?;
            // A second call in one process keeps the first log.
            Box::new(FILE.get_or_init(|| file))
        }
        None => Box::new(io::stderr()),
    };
    // Without a log file stderr is the user's, who is told of a command's end by `main` itself.
    let threshold = match (debug, file) {
        (true, _) => Level::DEBUG,
        (false, Some(_)) => Level::INFO,
        (false, None) => Level::WARN,
    };
    let layer = Lines { out: Mutex::new(out), format: *format, threshold };
    let _ = tracing::subscriber::set_global_default(tracing_subscriber::registry().with(layer));
    Ok(())
}

/// The descriptor of this process's log, where that is a file.
pub fn descriptor() -> Option<BorrowedFd<'static>> {
    FILE.get().map(File::as_fd)
}

fn open(path: &Path) -> io::Result<File> {
    OpenOptions::new().create(true).append(true).open(path)
}

/// Marks, at debug level, that a start has come this far. `make bench` makes its stage table of these lines.
pub fn stage(name: &'static str) {
    tracing::debug!(stage = name, mono_us = monotonic_us(), "reached {name}");
}

/// CLOCK_MONOTONIC in microseconds: the same clock for all processes of the host.
pub fn monotonic_us() -> u64 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    u64::try_from(now.tv_sec).unwrap_or(0) * 1_000_000 + u64::try_from(now.tv_nsec).unwrap_or(0) / 1_000
}

struct Lines {
    out: Mutex<Box<dyn Write + Send>>,
    format: Format,
    threshold: Level,
}

impl<S: Subscriber> Layer<S> for Lines {
    fn enabled(&self, metadata: &tracing::Metadata<'_>, _: Context<'_, S>) -> bool {
        // Libraries speak of their own matters at debug level.
        *metadata.level() <= self.threshold && (metadata.target().contains("runvm") || *metadata.level() <= Level::WARN)
    }

    fn on_event(&self, event: &Event<'_>, _: Context<'_, S>) {
        let mut fields = Fields::default();
        event.record(&mut fields);
        let level = level_name(*event.metadata().level());
        let line = match self.format {
            Format::Json => fields.json(level),
            Format::Text => fields.text(level),
        };
        if let Ok(mut out) = self.out.lock() {
            // A log that cannot be written (a full disk) must not end a container.
            let _ = out.write_all(line.as_bytes());
        }
    }
}

fn level_name(level: Level) -> &'static str {
    match level {
        Level::ERROR => "error",
        Level::WARN => "warning",
        Level::INFO => "info",
        _ => "debug",
    }
}

#[derive(Default)]
struct Fields {
    message: String,
    others: Map<String, Value>,
}

impl Fields {
    fn json(self, level: &str) -> String {
        let mut line = json!({"level": level, "msg": self.message, "time": timestamp()});
        if let Some(object) = line.as_object_mut() {
            object.extend(self.others);
        }
        format!("{line}\n")
    }

    fn text(self, level: &str) -> String {
        let mut line = format!("time={:?} level={level} msg={:?}", timestamp(), self.message);
        for (name, value) in self.others {
            line.push_str(&format!(" {name}={value}"));
        }
        line.push('\n');
        line
    }
}

impl Visit for Fields {
    fn record_debug(&mut self, field: &Field, value: &dyn std::fmt::Debug) {
        match field.name() {
            "message" => self.message = format!("{value:?}"),
            name => {
                self.others.insert(name.to_owned(), format!("{value:?}").into());
            }
        }
    }

    fn record_str(&mut self, field: &Field, value: &str) {
        match field.name() {
            "message" => value.clone_into(&mut self.message),
            name => {
                self.others.insert(name.to_owned(), value.into());
            }
        }
    }

    fn record_u64(&mut self, field: &Field, value: u64) {
        self.others.insert(field.name().to_owned(), value.into());
    }

    fn record_i64(&mut self, field: &Field, value: i64) {
        self.others.insert(field.name().to_owned(), value.into());
    }

    fn record_bool(&mut self, field: &Field, value: bool) {
        self.others.insert(field.name().to_owned(), value.into());
    }
}

/// Now, in UTC, as RFC 3339 has it, with nanoseconds.
pub fn timestamp() -> String {
    jiff::Timestamp::now().to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_carry_level_message_and_fields() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log.json");
        let layer =
            Lines { out: Mutex::new(Box::new(open(&path).unwrap())), format: Format::Json, threshold: Level::INFO };
        tracing::subscriber::with_default(tracing_subscriber::registry().with(layer), || {
            tracing::error!(path = "/x", count = 3, "no \"such\" file");
            tracing::debug!("not asked for");
        });
        let text = std::fs::read_to_string(path).unwrap();
        let line: Value = serde_json::from_str(text.trim()).unwrap();
        assert_eq!(line["level"], "error");
        assert_eq!(line["msg"], "no \"such\" file");
        assert_eq!(line["count"], 3);
        assert_eq!(text.lines().count(), 1);
    }
}
