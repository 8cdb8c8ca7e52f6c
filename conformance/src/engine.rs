//! A private daemon: started with its own folders, stopped by its own PID.

use std::path::{Path, PathBuf};
use std::process::Child;
use std::time::Duration;

use anyhow::{Context, Result};
use rustix::process::{Pid, Signal, kill_process};

use crate::command::{Cmd, ended_within, eventually};

/// How long a daemon may take to come up or to go.
const LIMIT: Duration = Duration::from_secs(60);

/// A running daemon.
pub struct Daemon {
    child: Child,
    log: PathBuf,
}

impl Daemon {
    /// Starts a daemon whose messages go to `log` and waits until `ready` succeeds.
    pub fn start(cmd: Cmd, log: &Path, ready: impl Fn() -> Cmd) -> Result<Self> {
        let line = cmd.line();
        let mut daemon = Self { child: cmd.spawn_logged(log)?, log: log.to_owned() };
        let answer = eventually(LIMIT, "the daemon's first answer", || {
            if let Some(status) = daemon.child.try_wait()? {
                anyhow::bail!("the daemon ended at once ({status})");
            }
            Ok((ready().run()?.code == 0).then_some(()))
        });
        answer.with_context(|| format!("`{line}` does not come up\n{}", daemon.last_words()))?;
        Ok(daemon)
    }

    /// The end of the daemon's log.
    pub fn last_words(&self) -> String {
        let log = std::fs::read_to_string(&self.log).unwrap_or_default();
        let lines: Vec<_> = log.lines().collect();
        lines[lines.len().saturating_sub(20)..].join("\n")
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = kill_process(Pid::from_child(&self.child), Signal::TERM);
        if !matches!(ended_within(&self.child, LIMIT), Ok(true)) {
            let _ = self.child.kill();
        }
        let _ = self.child.wait();
    }
}
