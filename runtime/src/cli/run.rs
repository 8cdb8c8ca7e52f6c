//! `run`: create, start, wait and delete in one command.

use std::io;
use std::os::fd::AsFd as _;

use tokio::signal::unix::{SignalKind, signal};

use super::args::RunArgs;
use crate::container;
use crate::error::{Error, Result};
use crate::host::fork::Forked;
use crate::host::terminal::{self, RawTerminal};
use crate::monitor::{self, Globals, single_threaded};

pub fn run(globals: &Globals, args: RunArgs) -> Result<u8> {
    let (detach, keep) = (args.detach, args.keep);
    let create = args.create.into_create()?;
    let console_socket = create.console_socket.is_some();
    let running = container::create(globals, &create)?;
    if detach && running.terminal && !console_socket {
        container::delete(globals, &create.id, true)?;
        return Err(Error::Usage("a detached container with a terminal needs --console-socket".to_owned()));
    }
    if let Err(error) = container::start(globals, &create.id) {
        container::delete(globals, &create.id, true)?;
        return Err(error);
    }
    if detach {
        return Ok(0);
    }
    let own_terminal = running.terminal && !console_socket;
    let status = {
        let _raw = match own_terminal {
            true => RawTerminal::new(io::stdin()).map_err(Error::system("set up the terminal"))?,
            false => None,
        };
        await_end(&create.id, running, own_terminal)
    };
    if !keep {
        container::delete(globals, &create.id, true)?;
    }
    status
}

/// Waits for the monitor, which ends with the container's status; meanwhile its signals and its terminal's size are this
/// command's.
fn await_end(id: &str, running: container::Running, own_terminal: bool) -> Result<u8> {
    let folder = running.folder;
    let id = id.to_owned();
    single_threaded(async move {
        let mut forwarding = tokio::task::JoinSet::new();
        let monitor = running.monitor.id();
        for kind in [SignalKind::hangup(), SignalKind::interrupt(), SignalKind::quit(), SignalKind::terminate()] {
            let mut signals = signal(kind).map_err(Error::system("catch signals"))?;
            forwarding.spawn(async move {
                while signals.recv().await.is_some() {
                    pass_to(monitor, kind);
                }
            });
        }
        if own_terminal {
            forwarding.spawn(async move {
                if let Err(error) = follow_size(&id, &folder).await {
                    tracing::debug!("the terminal keeps its size: {error}");
                }
            });
        }
        wait(running.monitor).await
    })
}

async fn wait(mut monitor: Forked) -> Result<u8> {
    let status = tokio::task::spawn_blocking(move || monitor.wait()).await;
    let status = status
        .map_err(|error| Error::system("wait for the container")(io::Error::other(error)))?
        .map_err(Error::system("wait for the container"))?;
    let code = std::os::unix::process::ExitStatusExt::signal(&status).map(|signal| 128 + signal).or(status.code());
    Ok(code.and_then(|code| u8::try_from(code).ok()).unwrap_or(u8::MAX))
}

fn pass_to(monitor: u32, kind: SignalKind) {
    let signal = rustix::process::Signal::from_named_raw(kind.as_raw_value());
    let process = crate::host::process::ProcessIdentity::of(monitor);
    if let (Some(signal), Some(process)) = (signal, process) {
        // A monitor that has ended needs no signal.
        let _ = process.signal(signal);
    }
}

async fn follow_size(id: &str, folder: &std::path::Path) -> Result<()> {
    let agent = monitor::connect(folder).await?;
    let mut changes = signal(SignalKind::window_change()).map_err(Error::system("catch signals"))?;
    loop {
        let size = terminal::size(io::stdin().as_fd());
        agent.resize_terminal(id, "", size.rows, size.columns).await?;
        changes.recv().await;
    }
}
