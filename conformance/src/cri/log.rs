//! The CRI's log files: each line has a time, a stream, a tag and what was printed.

use std::path::Path;

use anyhow::{Context, Result, ensure};

/// One line of a log file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Line {
    /// When it was printed, as RFC 3339 has it, to the nanosecond.
    pub time: String,
    /// `stdout` or `stderr`.
    pub stream: String,
    /// Whether the line ended here: else the next line of the stream goes on with it.
    pub full: bool,
    /// What was printed, without the line's end.
    pub content: String,
}

impl Line {
    fn parse(line: &str) -> Result<Self> {
        let mut words = line.splitn(4, ' ');
        let mut word = || words.next().with_context(|| format!("{line:?} is no line of a CRI log"));
        let (time, stream, tag, content) = (word()?, word()?, word()?, word()?);
        ensure!(matches!(stream, "stdout" | "stderr"), "{line:?} names no stream");
        ensure!(matches!(tag, "F" | "P"), "{line:?} has no tag");
        let full = tag == "F";
        Ok(Self { time: time.to_owned(), stream: stream.to_owned(), full, content: content.to_owned() })
    }
}

/// Reads a log file.
pub fn read(path: &Path) -> Result<Vec<Line>> {
    let text = std::fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
    let text = String::from_utf8_lossy(&text);
    // What is about to be written may be there in part.
    let whole = text.rfind('\n').map_or("", |end| &text[..end]);
    whole.lines().map(Line::parse).collect()
}

/// What was printed to one of the streams.
pub fn text(lines: &[Line], stream: &str) -> String {
    let lines = lines.iter().filter(|line| line.stream == stream);
    lines.map(|line| format!("{}{}", line.content, if line.full { "\n" } else { "" })).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_partial_line_goes_on() {
        let lines = ["2026-01-02T03:04:05.000000006Z stdout P one ", "2026-01-02T03:04:05.000000007Z stdout F line"];
        let lines: Vec<_> = lines.into_iter().map(|line| Line::parse(line).unwrap()).collect();
        assert_eq!(text(&lines, "stdout"), "one line\n");
        assert_eq!(text(&lines, "stderr"), "");
    }

    #[test]
    fn other_text_is_no_line() {
        assert!(Line::parse("2026-01-02T03:04:05.000000006Z stdout X what").is_err());
        assert!(Line::parse("nothing").is_err());
    }
}
