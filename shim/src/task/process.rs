//! One process of a container as containerd sees it: created, running, stopped.

use std::sync::Mutex;
use std::time::{Duration, SystemTime};

use containerd_shim_protos::api::Status;
use oci_spec::runtime::Process as Spec;
use runvm::agent::KILL_LIMIT;
use tokio::sync::{Mutex as Turn, MutexGuard, Notify, watch};
use tokio::task::AbortHandle;

use crate::errors::{Error, Result};
use crate::stdio::{OpenStdin, Stdio};
use crate::streams::Claim;
use crate::sync::lock;

/// How a process ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct End {
    /// 0 to 255.
    pub status: u8,
    /// When.
    pub at: SystemTime,
}

/// What a process is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// It waits for its start.
    Created,
    /// It runs.
    Running,
    /// It has ended.
    Stopped(End),
}

impl Phase {
    /// In containerd's words.
    pub fn name(self) -> &'static str {
        match self {
            Self::Created => "created",
            Self::Running => "running",
            Self::Stopped(_) => "stopped",
        }
    }

    /// The same as a number.
    pub fn status(self) -> Status {
        match self {
            Self::Created => Status::CREATED,
            Self::Running => Status::RUNNING,
            Self::Stopped(_) => Status::STOPPED,
        }
    }
}

/// How far the end of a process has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Output {
    /// More may come.
    Flows,
    /// All that it wrote itself has been handed over.
    Drained,
    /// Nobody can write any more.
    Closed,
}

/// A process.
pub struct Process {
    /// The ID of the exec; empty for the container's first process.
    pub exec_id: String,
    /// As containerd named it.
    pub stdio: Stdio,
    /// What an exec is to run, once it is started.
    pub spec: Option<Spec>,
    phase: watch::Sender<Phase>,
    output: watch::Sender<Output>,
    /// Whoever has it tells of the process, so that its end is told after its start.
    turn: Turn<()>,
    killed: Notify,
    stdin: Mutex<Option<OpenStdin>>,
    streams: Mutex<Vec<Claim>>,
    carrier: Mutex<Option<AbortHandle>>,
}

impl Process {
    /// One that waits for its start.
    pub fn new(exec_id: &str, stdio: Stdio, spec: Option<Spec>) -> Self {
        Self {
            exec_id: exec_id.to_owned(),
            stdio,
            spec,
            phase: watch::Sender::new(Phase::Created),
            output: watch::Sender::new(Output::Flows),
            turn: Turn::default(),
            killed: Notify::new(),
            stdin: Mutex::default(),
            streams: Mutex::default(),
            carrier: Mutex::default(),
        }
    }

    /// What it is.
    pub fn phase(&self) -> Phase {
        *self.phase.borrow()
    }

    /// Waits until it is nobody else's turn to tell of it.
    pub async fn turn(&self) -> MutexGuard<'_, ()> {
        self.turn.lock().await
    }

    /// It runs. One that has ended meanwhile stays so.
    pub fn started(&self) {
        self.phase.send_if_modified(|phase| match phase {
            Phase::Created => {
                *phase = Phase::Running;
                true
            }
            _ => false,
        });
    }

    /// It has ended.
    pub fn stopped(&self, end: End) {
        self.phase.send_replace(Phase::Stopped(end));
    }

    /// Waits for its end.
    pub async fn ended(&self) -> End {
        let mut phase = self.phase.subscribe();
        loop {
            if let Phase::Stopped(end) = *phase.borrow_and_update() {
                return end;
            }
            if phase.changed().await.is_err() {
                // The sending end is this process's own.
                std::future::pending::<()>().await;
            }
        }
    }

    /// How far its output has come.
    pub fn output(&self) -> &watch::Sender<Output> {
        &self.output
    }

    /// Waits until its output has come so far, for at most `limit`.
    pub async fn output_reaches(&self, wanted: Output, limit: Duration) {
        let mut output = self.output.subscribe();
        // An error means that nobody carries it any more.
        let _ = tokio::time::timeout(limit, output.wait_for(|output| *output >= wanted)).await;
    }

    /// A SIGKILL is on its way.
    pub fn killed(&self) {
        self.killed.notify_one();
    }

    /// Returns when its end is overdue: it was killed, and what only the guest could delay has not come.
    pub async fn overdue(&self) {
        self.killed.notified().await;
        tokio::time::sleep(KILL_LIMIT).await;
    }

    /// Keeps its stdin open, and its streams in their places.
    pub fn hold(&self, stdin: Option<OpenStdin>, streams: Vec<Claim>) {
        *lock(&self.stdin) = stdin;
        *lock(&self.streams) = streams;
    }

    /// Lets its stdin end when its last writer leaves.
    pub fn close_stdin(&self) {
        lock(&self.stdin).take();
    }

    /// Whether it has streams.
    pub fn has_streams(&self) -> bool {
        !lock(&self.streams).is_empty()
    }

    /// Returns when nobody takes output from its streams.
    pub async fn streams_part(&self) {
        let parted: Vec<_> = lock(&self.streams).iter().map(Claim::parted).collect();
        for parted in parted {
            parted.await;
        }
    }

    /// Remembers the task that carries its output.
    pub fn carried_by(&self, carrier: AbortHandle) {
        *lock(&self.carrier) = Some(carrier);
    }

    /// Lets go of its stdio.
    pub fn release(&self) {
        self.hold(None, Vec::new());
        if let Some(carrier) = lock(&self.carrier).take() {
            carrier.abort();
        }
    }

    /// Refuses what takes a process that is no more.
    ///
    /// # Errors
    /// [`Error::State`].
    pub fn expect(&self, action: &'static str, allowed: impl FnOnce(Phase) -> bool) -> Result<()> {
        let phase = self.phase();
        if allowed(phase) { Ok(()) } else { Err(Error::State { action, state: phase.name() }) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_process_that_has_ended_stays_so() {
        let process = Process::new("", Stdio::default(), None);
        assert!(process.expect("delete", |phase| phase == Phase::Created).is_ok());
        process.started();
        let error = process.expect("delete", |phase| phase != Phase::Running).unwrap_err();
        assert_eq!(error.to_string(), "cannot delete a running process");
        let end = End { status: 3, at: SystemTime::now() };
        process.stopped(end);
        process.started();
        assert_eq!(process.ended().await, end);
        assert_eq!(process.phase().status(), Status::STOPPED);
    }

    #[tokio::test(start_paused = true)]
    async fn the_end_of_one_that_was_killed_is_overdue_in_time() {
        let process = Process::new("", Stdio::default(), None);
        assert!(tokio::time::timeout(2 * KILL_LIMIT, process.overdue()).await.is_err());
        process.killed();
        process.overdue().await;
    }
}
