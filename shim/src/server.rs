//! The process that stands for a pod: it serves containerd until it is asked to end.

use std::io;
use std::os::fd::{BorrowedFd, FromRawFd as _, OwnedFd, RawFd};
use std::os::unix::net::UnixListener;
use std::sync::Arc;
use std::time::Duration;

use runvm::host::idle;
use runvm::log;
use rustix::process::setsid;
use thiserror::Error;
use tokio::signal::unix::{SignalKind, signal};
use ttrpc::asynchronous::Server;

use crate::bootstrap::{Address, Flags};
use crate::connections::Connections;
use crate::events::{Events, Way};
use crate::options::{Environment, OptionsError};
use crate::service;
use crate::streams::Streams;
use crate::task::Tasks;

/// The descriptor of the socket that `start` listens on.
pub const LISTENER: RawFd = 3;
/// How long the end of a shim waits for containerd to hang up, which it does once it has its answer.
const PARTING: Duration = Duration::from_secs(1);
/// containerd's fifo for the log, in the bundle.
const LOG: &str = "log";

/// Why a shim does not serve.
#[derive(Debug, Error)]
pub enum ServerError {
    /// The operating system refuses.
    #[error("cannot {action}")]
    System {
        /// What was tried.
        action: &'static str,
        /// Why it failed.
        source: io::Error,
    },
    /// What is asked of the VMs cannot be found out.
    #[error(transparent)]
    Options(#[from] OptionsError),
    /// ttrpc refuses.
    #[error("cannot serve containerd")]
    Serve(#[from] ttrpc::Error),
}

fn failed<E: Into<io::Error>>(action: &'static str) -> impl FnOnce(E) -> ServerError {
    move |source| ServerError::System { action, source: source.into() }
}

/// Serves to the end.
pub fn serve(flags: &Flags) -> Result<(), ServerError> {
    // Signals to containerd's process group are not the shim's.
    setsid().map_err(failed("make a session"))?;
    let log = log_options(flags).map_err(failed("find the bundle"))?;
    log::init(&log).map_err(failed("open the log"))?;
    let listener = inherited_listener().map_err(failed("take over the socket from start"))?;
    let environment = Environment::read()?;
    // One thread: a pod's network namespace is that of the process, and a VM ends with the thread that started it.
    let runtime =
        tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(failed("start the runtime"))?;
    let served = runtime.block_on(run(flags, environment, log, listener));
    runtime.shutdown_background();
    if let Some(address) = Address::parse(&flags.socket)
        && let Err(error) = address.remove()
    {
        tracing::warn!("the socket stays: {error}");
    }
    served
}

fn log_options(flags: &Flags) -> io::Result<log::Options> {
    let bundle = std::env::current_dir()?;
    Ok(log::Options { file: Some(bundle.join(LOG)), format: log::Format::Text, debug: flags.debug })
}

fn inherited_listener() -> io::Result<UnixListener> {
    // SAFETY: the number is looked at by the system only, and an invalid one is its error to report.
    let borrowed = unsafe { BorrowedFd::borrow_raw(LISTENER) };
    let flags = rustix::io::fcntl_getfd(borrowed)?;
    rustix::io::fcntl_setfd(borrowed, flags | rustix::io::FdFlags::CLOEXEC)?;
    // SAFETY: the descriptor is open, and this, at the process's begin, is its only owner.
    let socket = unsafe { OwnedFd::from_raw_fd(LISTENER) };
    Ok(socket.into())
}

async fn run(
    flags: &Flags,
    environment: Environment,
    log: log::Options,
    listener: UnixListener,
) -> Result<(), ServerError> {
    let (events, delivery) = Events::begin(&flags.namespace, Way::find(&flags.publish_binary, &flags.address));
    let connections = Connections::default();
    let streams = Streams::at(&flags.socket, &connections);
    let tasks = Arc::new(Tasks::new(&flags.namespace, environment, log, events, streams));
    listener.set_nonblocking(true).map_err(failed("listen"))?;
    let listener = tokio::net::UnixListener::from_std(listener).map_err(failed("listen"))?;
    let mut server = Server::new().add_listener(connections.accept(listener)).register_service(service::all(&tasks));
    server.start().await?;
    log::stage("shim serves");
    tokio::spawn(idle::give_back_when_idle());
    let mut terminate = signal(SignalKind::terminate()).map_err(failed("wait for signals"))?;
    let mut interrupt = signal(SignalKind::interrupt()).map_err(failed("wait for signals"))?;
    let asked = tokio::select! {
        () = tasks.over() => true,
        _ = terminate.recv() => false,
        _ = interrupt.recv() => false,
    };
    tasks.end().await;
    server.stop_listen().await;
    // The server would leave who asked without an answer.
    if asked && tokio::time::timeout(PARTING, connections.none()).await.is_err() {
        tracing::debug!("somebody stays connected");
    }
    server.shutdown().await?;
    // The services hold the tasks, and those the queue of events.
    drop((server, tasks));
    delivery.finish().await;
    Ok(())
}
