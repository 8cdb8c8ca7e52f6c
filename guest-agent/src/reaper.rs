//! Collects every process that ends below PID 1, and tells those who wait for one.

use std::collections::HashMap;
use std::io;
use std::sync::{Arc, Mutex};

use rustix::process::{Pid, WaitOptions, WaitStatus};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;

use crate::sync::lock;

/// Statuses of unknown processes kept while a process is being made.
const MAX_UNCLAIMED: usize = 1024;

/// The one that waits for processes. Copies share their state.
#[derive(Clone, Default)]
pub(crate) struct Reaper(Arc<Mutex<State>>);

#[derive(Default)]
struct State {
    watched: HashMap<i32, watch::Sender<Option<u32>>>,
    /// How many processes are being made whose numbers are not known yet ...
    expecting: usize,
    /// ... and what ended in the meantime, as they may.
    unclaimed: HashMap<i32, u32>,
}

/// The end of one process.
#[derive(Clone)]
pub(crate) struct Exit(watch::Receiver<Option<u32>>);

impl Exit {
    /// Waits for the end: 0..255, or 128 + signal.
    pub(crate) async fn status(&self) -> u32 {
        let mut status = self.0.clone();
        match status.wait_for(Option::is_some).await {
            Ok(status) => status.unwrap_or_default(),
            // The reaper lives as long as PID 1.
            Err(_) => u32::MAX,
        }
    }

    /// Whether the process has ended: until then its number is not given to another.
    pub(crate) fn happened(&self) -> bool {
        self.0.borrow().is_some()
    }
}

/// Keeps the statuses of unknown processes for one that is being made.
pub(crate) struct Expectation(Reaper);

impl Expectation {
    /// Watches the process, which may have ended by now.
    pub(crate) fn fulfil(self, pid: Pid) -> Exit {
        self.0.watch(pid)
    }
}

impl Drop for Expectation {
    fn drop(&mut self) {
        let mut state = lock(&self.0.0);
        state.expecting -= 1;
        if state.expecting == 0 {
            state.unclaimed.clear();
        }
    }
}

impl Reaper {
    /// Watches a process. It must be a child that is not reaped yet, or one under an [`Expectation`].
    pub(crate) fn watch(&self, pid: Pid) -> Exit {
        let pid = pid.as_raw_nonzero().get();
        let mut state = lock(&self.0);
        let (sender, receiver) = watch::channel(state.unclaimed.remove(&pid));
        if receiver.borrow().is_none() {
            state.watched.insert(pid, sender);
        }
        Exit(receiver)
    }

    /// Announces a process whose number will be known only after it may have ended.
    pub(crate) fn expect(&self) -> Expectation {
        lock(&self.0).expecting += 1;
        Expectation(self.clone())
    }

    /// Reaps for ever.
    pub(crate) async fn run(self) -> io::Error {
        let mut children = match signal(SignalKind::child()) {
            Ok(children) => children,
            Err(error) => return error,
        };
        loop {
            while let Ok(Some((pid, status))) = rustix::process::wait(WaitOptions::NOHANG) {
                self.ended(pid.as_raw_nonzero().get(), exit_status(status));
            }
            if children.recv().await.is_none() {
                return io::Error::other("the kernel's signals are gone");
            }
        }
    }

    /// Notes the end of a process.
    pub(crate) fn ended(&self, pid: i32, status: u32) {
        let mut state = lock(&self.0);
        if let Some(watcher) = state.watched.remove(&pid) {
            watcher.send_replace(Some(status));
        } else if state.expecting > 0 && state.unclaimed.len() < MAX_UNCLAIMED {
            state.unclaimed.insert(pid, status);
        }
    }
}

fn exit_status(status: WaitStatus) -> u32 {
    let code = status.exit_status().or_else(|| status.terminating_signal().map(|signal| 128 + signal));
    code.and_then(|code| u32::try_from(code).ok()).unwrap_or(255)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pid(number: i32) -> Pid {
        Pid::from_raw(number).unwrap()
    }

    #[tokio::test]
    async fn the_end_of_a_watched_process_is_told() {
        let reaper = Reaper::default();
        let exit = reaper.watch(pid(10));
        assert!(!exit.happened());
        reaper.ended(11, 1);
        reaper.ended(10, 137);
        assert_eq!(exit.status().await, 137);
        assert!(exit.happened());
    }

    #[tokio::test]
    async fn an_expected_process_may_end_before_it_is_known() {
        let reaper = Reaper::default();
        let expected = reaper.expect();
        reaper.ended(12, 3);
        assert_eq!(expected.fulfil(pid(12)).status().await, 3);
        assert!(lock(&reaper.0).unclaimed.is_empty());
    }

    #[test]
    fn unknown_processes_leave_nothing() {
        let reaper = Reaper::default();
        reaper.ended(13, 0);
        assert!(lock(&reaper.0).unclaimed.is_empty());
        let expected = reaper.expect();
        for number in 0..2 * MAX_UNCLAIMED {
            reaper.ended(i32::try_from(number).unwrap() + 1, 0);
        }
        assert_eq!(lock(&reaper.0).unclaimed.len(), MAX_UNCLAIMED);
        drop(expected);
        assert!(lock(&reaper.0).unclaimed.is_empty());
    }
}
