//! The guest's log, written into ours. What it says is not believed, and neither is that it ends.

use serde_json::Value;
use tokio::io::{AsyncBufReadExt as _, AsyncRead, AsyncReadExt as _, BufReader};
use tracing::Level;

use crate::log;

/// The longest line that is passed on, in bytes.
const MAX_LINE: u64 = 8192;
/// How much is written in all, in bytes: where it goes may be the host's memory, as under Docker.
const MAX_LOG: usize = 1 << 20;
/// What a line of ours has beside the guest's message, in bytes.
const FRAME: usize = 128;

/// Passes lines on until the stream ends, or was long enough; each is marked as the guest's.
pub async fn pass_on(stream: impl AsyncRead + Unpin) {
    let mut lines = BufReader::new(stream);
    let mut line = Vec::new();
    let mut left = MAX_LOG;
    while let Ok(1..) = (&mut lines).take(MAX_LINE).read_until(b'\n', &mut line).await {
        let Some(rest) = left.checked_sub(write(&line)) else {
            tracing::warn!("guest: no more of its log is passed on than {} KiB", MAX_LOG >> 10);
            return;
        };
        left = rest;
        line.clear();
    }
}

/// Writes a line; how much of the log it takes.
fn write(line: &[u8]) -> usize {
    let parsed: Value = serde_json::from_slice(line).unwrap_or_default();
    let text =
        |field: &str| parsed.get(field).and_then(Value::as_str).unwrap_or_default().replace(char::is_control, " ");
    let (message, stage) = (text("message"), text("stage"));
    let guest_us = parsed.get("guest_us").and_then(Value::as_u64).unwrap_or(0);
    let length = message.len() + stage.len() + FRAME;
    match text("level").as_str() {
        // An error of the guest's is no error of the command, whose last one engines show.
        "error" => tracing::warn!(guest_us, "guest: {message}"),
        "warn" => tracing::info!(guest_us, "guest: {message}"),
        _ if !tracing::enabled!(Level::DEBUG) => return 0,
        _ if stage.is_empty() => tracing::debug!(guest_us, "guest: {message}"),
        _ => tracing::debug!(guest_us, stage, mono_us = log::monotonic_us(), "guest: {message}"),
    }
    length
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn lines_without_end_come_to_one() {
        let line = br#"{"level":"error","message":"x"}"#;
        let lines = [&line[..], b"\n"].concat().repeat(MAX_LOG);
        let mut rest = &lines[..];
        pass_on(&mut rest).await;
        let read = (lines.len() - rest.len()) / (line.len() + 1);
        assert!((MAX_LOG / FRAME / 2..2 * MAX_LOG / FRAME).contains(&read), "{read} lines");
    }

    #[tokio::test]
    async fn what_is_not_written_does_not_count() {
        let lines = br#"{"level":"info","message":"x"}"#.repeat(MAX_LOG / 10);
        let mut rest = &lines[..];
        pass_on(&mut rest).await;
        assert!(rest.is_empty());
    }
}
