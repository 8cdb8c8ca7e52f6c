//! The process that stands for the container on the host: the PID that engines are told.
//!
//! `create` starts it; it owns the VM, carries the stdio, forwards signals, and ends with the status of the container's
//! first process. When it ends, however it ends, the VM ends too.

mod attend;
mod handshake;
mod launch;
mod start;

use std::future::Future;
use std::io;
use std::os::fd::OwnedFd;
use std::path::Path;

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit, setsid};
use tokio::runtime::Runtime;

use crate::agent::{Agent, Creation, Descriptors, Exit, MonitorSocket, Plan, Relay, Tunnel};
use crate::bundle::{Bundle, GuestSpec};
use crate::error::{Error, Result, sentence};
use crate::host::cgroup::Cgroup;
use crate::host::stand_in::{self, Standing};
use crate::host::{hostname, oom, terminal};
use crate::log;
use crate::network::namespace;
use crate::sandbox::{Config, Sandbox, SandboxError, Size};
use crate::state::Container;
use crate::vmm::Blank;
use start::Start;

pub use attend::{KILL_SENT, KILLED, Process, attend};
pub use handshake::{Owner, ToOwner};
pub use launch::{Globals, Launched};
pub use start::start;

/// How long the end of a container waits for its execs to take their leave. They end with it: what can delay them is
/// only who reads their output.
const PARTING: std::time::Duration = std::time::Duration::from_secs(2);

/// What a monitor stands for.
#[derive(Clone, Copy, Debug)]
pub struct Charge<'a> {
    /// The container.
    pub id: &'a str,
    /// The container's folder in the state root.
    pub folder: &'a Path,
    /// Its bundle.
    pub bundle: &'a Bundle,
    /// What of that is the guest's.
    pub guest: &'a GuestSpec,
    /// Its cgroup, which the monitor and what follows from it belong to.
    pub cgroup: &'a Cgroup,
    /// The socket that gets the terminal's master.
    pub console_socket: Option<&'a Path>,
    /// The options that come before every verb.
    pub globals: &'a Globals,
}

/// Runs a monitor to its end, in the process that is to be one, with the descriptors that the container's process is handed
/// beside its stdio; the status to exit with.
pub fn main(charge: &Charge<'_>, mut owner: Owner, preserved: Vec<OwnedFd>) -> u8 {
    match stand_for_container(charge, preserved, &mut owner) {
        Ok(status) => status,
        Err(error) => {
            // Before the container is created its creator tells the user; afterwards nobody listens.
            if owner.send(&ToOwner::Failed { message: sentence(&error) }).is_err() {
                tracing::error!("{}", sentence(&error));
            }
            match error {
                Error::Sandbox(SandboxError::Gone(_)) => KILLED,
                _ => 1,
            }
        }
    }
}

fn stand_for_container(charge: &Charge<'_>, preserved: Vec<OwnedFd>, owner: &mut Owner) -> Result<u8> {
    log::stage("monitor main");
    charge.cgroup.join()?;
    raise_limit_of_files().map_err(Error::system("raise the limit of open files"))?;
    // The engine's terminal, and signals to its process group, are not the monitor's.
    setsid().map_err(Error::system("make a session"))?;
    let runtime = runtime()?;
    // It begins while everything else is looked at, and cannot be told of it any sooner.
    let blank = {
        let _inside = runtime.enter();
        Blank::ahead(&charge.globals.vm, &charge.globals.log, None).map_err(SandboxError::from)?
    };
    let bundle = charge.bundle;
    let namespace = bundle.network_namespace();
    single_threaded(async { Ok(namespace::take_up(&namespace).await.map_err(SandboxError::from)?) })?;
    if let Some(name) = bundle.spec.hostname() {
        hostname::adopt(name).map_err(Error::system("take the container's host name"))?;
    }
    let terminal = match charge.console_socket {
        Some(socket) if bundle.terminal() => Some(controlling_terminal(socket)?),
        _ => None,
    };
    owner.send(&ToOwner::Ready).map_err(Error::system("talk to the creator"))?;
    owner.await_go().map_err(Error::system("wait for the creator"))?;
    log::stage("hooks done");
    let streams = Streams { terminal, preserved };
    let work = |standing| to_its_end(runtime, run(charge, blank, streams, owner, standing));
    stand_in::behind(&bundle.rootfs, work).map_err(Error::system("start a thread"))?
}

/// Each stream of each exec is two descriptors here, and who calls runvm by hand may have as few as 1024.
fn raise_limit_of_files() -> io::Result<()> {
    let Rlimit { maximum, .. } = getrlimit(Resource::Nofile);
    Ok(setrlimit(Resource::Nofile, Rlimit { current: maximum, maximum })?)
}

/// Runs to the end of `work` on this thread, and leaves threads that still read stdin to the process's end.
pub fn single_threaded<T>(work: impl Future<Output = Result<T>>) -> Result<T> {
    to_its_end(runtime()?, work)
}

fn runtime() -> Result<Runtime> {
    tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(Error::system("start the runtime"))
}

fn to_its_end<T>(runtime: Runtime, work: impl Future<Output = Result<T>>) -> Result<T> {
    let result = runtime.block_on(work);
    runtime.shutdown_background();
    result
}

/// Hands a terminal to the engine, and becomes the process that is told of its size.
pub fn controlling_terminal(console_socket: &Path) -> Result<OwnedFd> {
    let slave = terminal::for_engine(console_socket)
        .map_err(Error::file("send a terminal to --console-socket", console_socket))?;
    rustix::process::ioctl_tiocsctty(&slave).map_err(Error::system("take the terminal"))?;
    Ok(slave)
}

/// What the container's process is joined to, unless that is this one's stdio.
struct Streams {
    terminal: Option<OwnedFd>,
    preserved: Vec<OwnedFd>,
}

async fn run(
    charge: &Charge<'_>,
    blank: Option<Blank>,
    streams: Streams,
    owner: &mut Owner,
    standing: Standing,
) -> Result<u8> {
    let Streams { terminal, preserved } = streams;
    let Charge { bundle, guest, globals, .. } = charge;
    let descriptors = match &terminal {
        Some(slave) => Descriptors::terminal(slave),
        None => Descriptors::inherited(bundle.terminal()),
    };
    let descriptors = descriptors.and_then(|descriptors| descriptors.with(preserved));
    let descriptors = descriptors.map_err(Error::system("duplicate the stdio"))?;
    let config = Config {
        vm: globals.vm.clone(),
        size: Size::of(&bundle.spec),
        exports: guest.exports.clone(),
        hostname: bundle.spec.hostname().clone().unwrap_or_default(),
        user_namespace: bundle.user_namespace(),
        log: globals.log.clone(),
        console: globals.guest_console.clone(),
        cgroup: None,
        first: Some(Creation::new(charge.id, guest, None, Plan::of(&descriptors))?),
    };
    let mut sandbox = Sandbox::boot(config, blank).await?;
    // The guest is busy now, and the host is not.
    standing.begin();
    let relay = match sandbox.begun().await {
        Ok(streams) => Relay::join(descriptors, streams),
        Err(error) => return Err(sandbox.explain(error).await.into()),
    };
    let listener = MonitorSocket::of(charge.folder).listen().map_err(Error::system("listen for the verbs"))?;
    let tunnel = Tunnel::serve(listener, sandbox.channel(), sandbox.streams());
    let start =
        Start { id: charge.id.to_owned(), agent: sandbox.agent.clone(), late_network: sandbox.late_network.clone() };
    let starting = start.serve(charge.folder).map_err(Error::system("listen for `start`"))?;
    release_stdio().map_err(Error::system("release the stdio"))?;
    standing.wait().map_err(Error::system("stand before the container's root"))?;
    owner.send(&ToOwner::Created { helpers: sandbox.processes() }).map_err(Error::system("talk to the creator"))?;
    owner.dismiss();
    log::stage("container created");

    let process = Process { agent: sandbox.agent.clone(), container_id: charge.id.to_owned(), exec_id: String::new() };
    let end: Result<Exit> = tokio::select! {
        exit = attend(process, relay, terminal.as_ref()) => match exit {
            Ok(exit) => {
                log::stage("container ended");
                Ok(exit)
            }
            // Without the guest's word the container cannot go on.
            Err(error) => Err(match sandbox.explain(error).await {
                SandboxError::Agent(error) => SandboxError::Gone(sentence(&error)),
                gone => gone,
            }
            .into()),
        },
        reason = sandbox.ended() => Err(SandboxError::Gone(reason).into()),
    };
    let parting = async { tokio::join!(starting.over(), let_part(charge.folder, &tunnel)) };
    if tokio::time::timeout(PARTING, parting).await.is_err() {
        tracing::info!("an exec's output is not read: the container ends without waiting for it");
    }
    let exit = end?;
    if exit.oom_killed {
        sandbox.end();
        note_oom(charge);
    }
    Ok(exit.status)
}

/// Lets engines know that the container was short of memory.
fn note_oom(charge: &Charge<'_>) {
    let noted = Container::look(&charge.globals.root, charge.id).map_err(io::Error::other);
    if let Err(error) = noted.and_then(|container| oom::note(&container.record.cgroups)) {
        tracing::info!("a process of the container was killed for want of memory, which engines do not see: {error}");
    }
}

/// Waits until all execs have ended, and their parents know: engines expect of a container that they do so before it
/// does, as the kernel sees to within one PID namespace, and forget them otherwise.
async fn let_part(folder: &Path, tunnel: &Tunnel) {
    let execs = crate::state::execs(folder).unwrap_or_default();
    tunnel.deserted().await;
    if execs.is_empty() {
        return;
    }
    let ended = tokio::task::spawn_blocking(move || {
        execs.iter().for_each(|exec| {
            // What cannot be waited for has ended, or does so in its own time.
            let _ = exec.await_departure(PARTING);
        });
    });
    let _ = ended.await;
}

/// The relay holds copies of the stdio. The inherited descriptors must not keep a pipe open that the container's process
/// has closed.
pub(crate) fn release_stdio() -> io::Result<()> {
    let null = std::fs::File::options().read(true).write(true).open("/dev/null")?;
    rustix::stdio::dup2_stdin(&null)?;
    rustix::stdio::dup2_stdout(&null)?;
    rustix::stdio::dup2_stderr(&null)?;
    Ok(())
}

/// The agent of a running container, for the verbs.
///
/// # Errors
/// [`Error::Agent`] where its monitor does not answer.
pub async fn connect(folder: &Path) -> Result<Agent> {
    Ok(Agent::connect(std::sync::Arc::new(MonitorSocket::of(folder))).await?)
}
