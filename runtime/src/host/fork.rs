//! A copy of this process that does work of its own.
//!
//! What stands for a container is this program, as is what creates it. A copy knows already what it is to do, and is there
//! in a fraction of the time that the program takes to begin anew.

use std::fs;
use std::io::{self, Error, Write as _};
use std::os::fd::{AsRawFd as _, RawFd};
use std::os::unix::process::ExitStatusExt as _;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process::ExitStatus;

use nix::unistd::{ForkResult, fork};
use rustix::io::retry_on_intr;
use rustix::process::{Pid, Signal, WaitOptions, kill_process, waitpid};

use super::descriptor::close_others;
use crate::log;

/// What a copy ends with whose work panicked, as Rust's own processes do.
const PANICKED: u8 = 101;

/// A copy of this process, and its child. It goes on where this is dropped.
#[derive(Debug)]
pub struct Forked {
    pid: Pid,
    /// How it ended, once that is known: its PID may be another's by then.
    ended: Option<ExitStatus>,
}

impl Forked {
    /// Starts a copy that does `work` and ends with what that says. Of the descriptors it has the stdio, the log's, and those
    /// to `keep`.
    ///
    /// # Errors
    /// Those of fork(2), and where this process has further threads.
    pub fn start(keep: &[RawFd], work: impl FnOnce() -> u8) -> io::Result<Self> {
        if fs::read_dir("/proc/self/task")?.count() != 1 {
            return Err(Error::other("a process with several threads cannot be copied"));
        }
        // What waits to be written would be written by both.
        io::stdout().flush()?;
        // SAFETY: there is one thread, so the copy's memory is whole: nobody else was changing it or held a lock.
        match unsafe { fork() }? {
            ForkResult::Parent { child } => Ok(Self { pid: pid(child)?, ended: None }),
            ForkResult::Child => {
                let status = catch_unwind(AssertUnwindSafe(|| begin(keep).map_or_else(|_| PANICKED, |()| work())));
                std::process::exit(status.unwrap_or(PANICKED).into())
            }
        }
    }

    /// The copy's PID.
    pub fn id(&self) -> u32 {
        self.pid.as_raw_nonzero().get().unsigned_abs()
    }

    /// Waits for its end.
    ///
    /// # Errors
    /// Those of waitpid(2).
    pub fn wait(&mut self) -> io::Result<ExitStatus> {
        if let Some(status) = self.ended {
            return Ok(status);
        }
        let waited = retry_on_intr(|| waitpid(Some(self.pid), WaitOptions::empty()))?;
        let (_, status) = waited.ok_or_else(|| Error::other("waitpid(2) returned without waiting"))?;
        Ok(*self.ended.insert(ExitStatus::from_raw(status.as_raw())))
    }

    /// Ends it.
    pub fn kill(&mut self) {
        if self.ended.is_none() {
            // It is there until it has been waited for, and its parent may always send it a signal.
            let _ = kill_process(self.pid, Signal::KILL);
            let _ = self.wait();
        }
    }
}

fn pid(child: nix::unistd::Pid) -> io::Result<Pid> {
    Pid::from_raw(child.as_raw()).ok_or_else(|| Error::other("fork(2) returned no PID"))
}

fn begin(keep: &[RawFd]) -> io::Result<()> {
    let log = log::descriptor().map(|descriptor| descriptor.as_raw_fd());
    let keep: Vec<_> = keep.iter().copied().chain(log).collect();
    // SAFETY: what owns the others belongs to the work of who was copied, which the copy never returns to, and whose
    // values it does not drop.
    unsafe { close_others(&keep) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_with_several_threads_is_not_copied() {
        std::thread::scope(|scope| {
            scope.spawn(|| assert!(Forked::start(&[], || 0).is_err()));
        });
    }
}
