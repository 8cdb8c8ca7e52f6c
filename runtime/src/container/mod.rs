//! What the verbs do to a container.

mod create;
mod delete;
mod events;
mod exec;
mod pause;
mod update;

use std::os::fd::AsFd as _;
use std::path::Path;
use std::{fs, io};

use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open};

use crate::error::{Error, Result};
use crate::host::{descriptor, hooks};
use crate::monitor::{self, Globals, KILL_SENT, single_threaded};
use crate::state::{Container, Phase, Status};
use pause::Guest;

pub use create::{Create, Running, create};
pub use delete::delete;
pub use events::{Event, events, statistics};
pub use exec::{Changes, Exec, ProcessSource, exec, start_process};
pub use pause::{pause, resume};
pub use update::{limits_of_guest, update};

/// Runs the program of a created container.
///
/// # Errors
/// [`Error::CannotStart`] where it is not created; the monitor's.
pub fn start(globals: &Globals, id: &str) -> Result<()> {
    let mut container = Container::open(&globals.root, id)?;
    match container.status() {
        Status::Created => {}
        status => return Err(Error::CannotStart(status)),
    }
    single_threaded(monitor::start(container.dir()))?;
    container.record.phase = Phase::Running;
    container.save()?;
    let poststart = container.record.hooks.iter().filter_map(|hooks| hooks.poststart().as_ref()).flatten();
    // It was started, and a short program may have ended since: the hooks are those of a running container.
    let done = hooks::run("poststart", poststart, &oci_state_as(&container, Status::Running)?);
    if done.is_err()
        && let Some(monitor) = container.record.monitor
    {
        monitor.signal(Signal::KILL).map_err(Error::system("stop the container"))?;
    }
    Ok(done?)
}

/// Sends a signal to the container's first process, or to all. One that is paused gets it when it is resumed, but for
/// SIGKILL, which ends the pause.
///
/// # Errors
/// [`Error::NotRunning`] where it has none.
pub fn kill(globals: &Globals, id: &str, signal: u32, all: bool) -> Result<()> {
    let guest = match Guest::of(globals, id) {
        // None of all processes is left that would want it.
        Err(Error::NotRunning) if all => return Ok(()),
        guest => guest?,
    };
    let kills = signal == Signal::KILL.as_raw() as u32;
    match guest.ask(async |agent| Ok(agent.signal_process(id, "", signal, all).await?)) {
        Ok(()) if kills => {
            // Nobody has to believe that it was: its monitor waits for the end.
            let monitor = guest.container.record.monitor;
            guest.release();
            monitor.map_or(Ok(()), |monitor| monitor.signal(KILL_SENT)).map_err(Error::system("tell the monitor"))
        }
        Err(Error::Agent(error)) if error.is_not_found() => Err(Error::Finished),
        // It ended while it was being asked.
        Err(_) if guest.container.status() == Status::Stopped => Err(Error::NotRunning),
        // A guest that answers nothing is not spared: the VM goes with its monitor.
        Err(error) if kills => {
            tracing::warn!("the guest does not take the signal ({error}): its VM is killed");
            let monitor = guest.container.record.monitor.ok_or(Error::NotRunning)?;
            monitor.signal(Signal::KILL).map_err(Error::system("kill the monitor"))
        }
        sent => sent,
    }
}

/// The PIDs on the host that stand for the container's processes: the monitor, and the proxies of its execs.
///
/// # Errors
/// That of the record.
pub fn host_pids(container: &Container) -> Result<Vec<u32>> {
    let mut pids = Vec::new();
    if let Some(monitor) = container.record.monitor.filter(|monitor| monitor.alive()) {
        pids.push(monitor.pid);
    }
    pids.extend(container.execs()?.into_iter().map(|exec| exec.pid));
    Ok(pids)
}

/// The container's state as the OCI runtime specification has it, which hooks get on their stdin.
fn oci_state(container: &Container) -> Result<Vec<u8>> {
    // The specification knows no paused containers.
    let status = match container.status() {
        Status::Paused => Status::Running,
        status => status,
    };
    oci_state_as(container, status)
}

fn oci_state_as(container: &Container, status: Status) -> Result<Vec<u8>> {
    let record = &container.record;
    let state = hooks::State {
        oci_version: &record.oci_version,
        id: &record.id,
        status: status.name(),
        pid: record.monitor.filter(|_| status != Status::Stopped).map(|monitor| monitor.pid),
        bundle: &record.bundle,
        annotations: &record.annotations,
    };
    serde_json::to_vec(&state).map_err(|error| Error::system("write the state")(error))
}

/// Hands a descriptor of a process to the engine, which then need not trust in its PID.
fn send_pidfd(socket: &Path, pid: u32) -> Result<()> {
    let pid = i32::try_from(pid).ok().and_then(Pid::from_raw).ok_or_else(|| io::Error::other("the process has no PID"));
    let sent = pid.and_then(|pid| {
        let descriptor = pidfd_open(pid, PidfdFlags::empty())?;
        descriptor::send(socket, descriptor.as_fd(), b"pidfd")
    });
    sent.map_err(Error::file("send a descriptor to --pidfd-socket", socket))
}

/// Writes a PID for the engine: whole, or not at all.
fn write_pid_file(path: &Path, pid: u32) -> Result<()> {
    let temporary = path.with_file_name(format!(".{}", path.file_name().unwrap_or_default().to_string_lossy()));
    fs::write(&temporary, pid.to_string())
        .and_then(|()| fs::rename(&temporary, path))
        .map_err(Error::file("write --pid-file", path))
}
