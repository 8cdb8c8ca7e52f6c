//! Standing for one process of a guest: signals go in, its terminal follows its size, and its end comes out.

use std::os::fd::OwnedFd;

use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::task::JoinSet;

use crate::agent::{Agent, AgentError, Exit, KILL_LIMIT, Relay};
use crate::host::{idle, terminal};

/// The signals that are passed on. SIGKILL and SIGSTOP cannot be caught: the first one's effect is that the guest's
/// process loses its lifeline.
const FORWARDED: [SignalKind; 7] = [
    SignalKind::hangup(),
    SignalKind::interrupt(),
    SignalKind::quit(),
    SignalKind::user_defined1(),
    SignalKind::user_defined2(),
    SignalKind::terminate(),
    SignalKind::alarm(),
];

/// What the monitor is told by when its guest has taken a SIGKILL for the container's first process. It ends a monitor
/// that does not attend yet, which is as well.
pub const KILL_SENT: rustix::process::Signal = rustix::process::Signal::POWER;

/// A process of a guest.
#[derive(Clone)]
pub struct Process {
    /// The way to it.
    pub agent: Agent,
    /// Its container.
    pub container_id: String,
    /// Its exec; empty for the container's first process.
    pub exec_id: String,
}

/// The exit status of a process whose VM went away: what a SIGKILL gives.
pub const KILLED: u8 = 137;

/// Stands for the process until it has ended and its output has been written. `terminal` is the one whose size it follows.
///
/// # Errors
/// [`AgentError`] where the guest is gone, or keeps a process that was killed.
pub async fn attend(process: Process, relay: Relay, terminal: Option<&OwnedFd>) -> Result<Exit, AgentError> {
    let relay = relay.start();
    let mut errands = JoinSet::new();
    errands.spawn(idle::give_back_when_idle());
    for kind in FORWARDED {
        if let Ok(signals) = signal(kind) {
            errands.spawn(forward(process.clone(), signals, kind.as_raw_value()));
        }
    }
    if let Some(Ok(terminal)) = terminal.map(OwnedFd::try_clone) {
        errands.spawn(follow_size(process.clone(), terminal));
    }
    let exit = tokio::select! {
        exit = process.agent.wait_process(&process.container_id, &process.exec_id) => exit?,
        () = overdue() => return Err(AgentError::Undead),
    };
    relay.drained(exit.output).await;
    Ok(exit)
}

/// Returns when the end of the process is overdue: it was killed, and what only the guest could delay has not come.
async fn overdue() {
    let Ok(mut sent) = signal(SignalKind::from_raw(KILL_SENT.as_raw())) else { return std::future::pending().await };
    if sent.recv().await.is_none() {
        return std::future::pending().await;
    }
    tokio::time::sleep(KILL_LIMIT).await;
}

async fn forward(process: Process, mut signals: Signal, number: i32) {
    let Ok(number) = u32::try_from(number) else { return };
    while signals.recv().await.is_some() {
        if let Err(error) = process.agent.signal_process(&process.container_id, &process.exec_id, number, false).await {
            tracing::debug!("signal {number} is not passed on: {error}");
        }
    }
}

async fn follow_size(process: Process, terminal: OwnedFd) {
    let Ok(mut changes) = signal(SignalKind::window_change()) else { return };
    loop {
        let size = terminal::size(&terminal);
        if size != terminal::Size::default() {
            let resized =
                process.agent.resize_terminal(&process.container_id, &process.exec_id, size.rows, size.columns).await;
            if let Err(error) = resized {
                tracing::debug!("the terminal keeps its size: {error}");
            }
        }
        if changes.recv().await.is_none() {
            return;
        }
    }
}
