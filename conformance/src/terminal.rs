//! A program on a real pseudo-terminal, as a user sits at it.

use std::io::{Read, Write};
use std::os::fd::AsFd;
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use rustix::termios::{Winsize, tcsetwinsize};

use crate::command::{Cmd, code, ended_within, readable_within};

/// How long a terminal waits for what it expects.
const LIMIT: Duration = Duration::from_secs(60);

/// The master side of a terminal whose foreground program is a [`Cmd`].
pub struct Terminal {
    master: std::fs::File,
    child: Child,
    seen: String,
    expected: usize,
}

impl Terminal {
    /// Starts the program with a terminal of `rows` and `columns` as its own.
    pub fn open(cmd: Cmd, rows: u16, columns: u16) -> Result<Self> {
        let master = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC)?;
        grantpt(&master)?;
        unlockpt(&master)?;
        tcsetwinsize(&master, winsize(rows, columns))?;
        let name = ptsname(&master, Vec::new())?.into_string()?;
        let slave = std::fs::OpenOptions::new().read(true).write(true).open(&name)?;

        let program = cmd.into_command();
        // Only a controlling terminal passes a resize and ^C on as signals.
        let child = std::process::Command::new("setsid")
            .args(["--ctty", "--wait"])
            .arg(program.get_program())
            .args(program.get_args())
            .envs(program.get_envs().filter_map(|(key, value)| Some((key, value?))))
            .env("TERM", "dumb")
            .stdin(Stdio::from(slave.try_clone()?))
            .stdout(Stdio::from(slave.try_clone()?))
            .stderr(Stdio::from(slave))
            .spawn()
            .context("cannot start a program on a terminal")?;
        Ok(Self { master: master.into(), child, seen: String::new(), expected: 0 })
    }

    /// Types these characters.
    pub fn send(&mut self, keys: &str) -> Result<()> {
        Ok(self.master.write_all(keys.as_bytes())?)
    }

    /// Changes the window's size.
    pub fn resize(&self, rows: u16, columns: u16) -> Result<()> {
        Ok(tcsetwinsize(&self.master, winsize(rows, columns))?)
    }

    /// Changes the window's size, until `text` appears after what was expected before. The clients of engines tell a
    /// container its first size before they listen for others, and nothing tells when they do.
    pub fn resize_until(&mut self, rows: u16, columns: u16, text: &str) -> Result<()> {
        const PATIENCE: Duration = Duration::from_secs(2);
        let deadline = Instant::now() + LIMIT;
        while Instant::now() < deadline {
            self.resize(rows, columns)?;
            if self.shows(text, Instant::now() + PATIENCE)? {
                return Ok(());
            }
            self.resize(rows, columns - 1)?;
        }
        self.never_showed(text)
    }

    /// Waits until `text` appears after what was expected before.
    pub fn expect(&mut self, text: &str) -> Result<()> {
        if self.shows(text, Instant::now() + LIMIT)? { Ok(()) } else { self.never_showed(text) }
    }

    fn never_showed(&self, text: &str) -> Result<()> {
        bail!("the terminal never showed {text:?} but\n{}", self.seen);
    }

    /// Whether `text` appears in time after what was expected before.
    fn shows(&mut self, text: &str, deadline: Instant) -> Result<bool> {
        loop {
            if let Some(at) = self.seen[self.expected..].find(text) {
                self.expected += at + text.len();
                return Ok(true);
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() || !self.read(left)? {
                return Ok(false);
            }
        }
    }

    /// Waits for the program's end and returns its exit code and all that was shown.
    pub fn finish(mut self) -> Result<(i32, String)> {
        let deadline = Instant::now() + LIMIT;
        while self.read(deadline.saturating_duration_since(Instant::now()))? {}
        if !ended_within(&self.child, deadline.saturating_duration_since(Instant::now()))? {
            bail!("the program on the terminal did not end; it showed\n{}", self.seen);
        }
        let status = self.child.wait()?;
        Ok((code(status), std::mem::take(&mut self.seen).replace('\r', "")))
    }

    /// Reads once; false when there is nothing more to come in time.
    fn read(&mut self, limit: Duration) -> Result<bool> {
        if !readable_within(self.master.as_fd(), limit)? {
            return Ok(false);
        }
        let mut buffer = [0; 4096];
        match self.master.read(&mut buffer) {
            Ok(0) => Ok(false),
            Ok(count) => {
                self.seen.push_str(&String::from_utf8_lossy(&buffer[..count]));
                Ok(true)
            }
            // The kernel's word for "every slave is closed".
            Err(e) if e.raw_os_error() == Some(rustix::io::Errno::IO.raw_os_error()) => Ok(false),
            Err(e) => Err(e.into()),
        }
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        // Closing the master would hang it up as well, but only if it listens.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn winsize(rows: u16, columns: u16) -> Winsize {
    Winsize { ws_row: rows, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 }
}
