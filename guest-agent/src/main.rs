//! PID 1 of a runvm guest: sets the guest up as the host says, and runs containers in it.
//!
//! The agent has one thread. What may block, or must change a process for good, is done by copies of it
//! ([`child`]).

mod boot;
mod child;
mod container;
mod dispatch;
mod dns;
mod error;
mod log;
mod loopback;
mod memory;
mod network;
mod processors;
mod readiness;
mod reaper;
mod sandbox;
mod serial;
mod service;
mod stdio;
mod sync;
mod user_namespace;
mod vsock;

use std::convert::Infallible;
use std::error::Error;
use std::pin::pin;
use std::sync::Arc;

use futures::StreamExt as _;
use runvm_protocol::mux;
use tokio::io::BufStream;

use self::dispatch::Dispatcher;
use self::processors::Late;
use self::reaper::Reaper;
use self::serial::Serial;

/// The kernel hands out what arrived in one buffer of a page at a time.
const SERIAL_READ: usize = 4096;

fn main() {
    std::panic::set_hook(Box::new(|panic| {
        eprintln!("runvm-agent: {panic}");
        if child::is_child() {
            child::exit(101);
        }
        boot::end_guest();
    }));
    let Err(error) = boot();
    eprintln!("runvm-agent: {}", chain(error.as_ref()));
    boot::end_guest();
}

fn boot() -> Result<Infallible, Box<dyn Error>> {
    stdio::reserve()?;
    boot::prepare()?;
    let parameters = boot::Parameters::load();
    log::init(parameters.log_level);
    log::stage("agent main");
    boot::grant()?;
    processors::stay_on_one()?;
    memory::settle();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let reaper = Reaper::default();
        let late = if parameters.late_processors { Late::bring_up(&reaper)? } else { Late::default() };
        let (dispatcher, _server) = Dispatcher::start(reaper.clone(), late).await?;
        tokio::select! {
            error = reaper.run() => Err(error.into()),
            served = serve(Arc::new(dispatcher), parameters.vsock_port) => served,
        }
    })
}

/// Serves the streams that the host opens, by whichever channel they come.
async fn serve(dispatcher: Arc<Dispatcher>, vsock_port: Option<u32>) -> Result<Infallible, Box<dyn Error>> {
    match vsock_port {
        Some(port) => serve_vsock(dispatcher, port).await,
        None => serve_serial(dispatcher).await,
    }
}

async fn serve_vsock(dispatcher: Arc<Dispatcher>, port: u32) -> Result<Infallible, Box<dyn Error>> {
    let listener = vsock::Listener::bind(port)?;
    log::stage("channel ready");
    let accepting = async {
        loop {
            match listener.accept().await {
                Ok(stream) => {
                    let dispatcher = dispatcher.clone();
                    tokio::spawn(async move { dispatcher.serve(stream).await });
                }
                Err(error) => return Err::<Infallible, _>(error),
            }
        }
    };
    let ((), never) = tokio::try_join!(vsock::knock(port), accepting)?;
    Ok(never)
}

/// Serves the serial port, and after its end the next.
async fn serve_serial(dispatcher: Arc<Dispatcher>) -> Result<Infallible, Box<dyn Error>> {
    loop {
        let serial = Serial::open().await?;
        log::stage("channel ready");
        // The multiplexer writes a frame's head and its body apart: each write is a notification of the VMM.
        let line = BufStream::with_capacity(SERIAL_READ, mux::SERIAL_WRITE, serial);
        let mut streams = pin!(mux::guest(line));
        while let Some(stream) = streams.next().await {
            match stream {
                Ok(stream) => {
                    let dispatcher = dispatcher.clone();
                    tokio::spawn(async move { dispatcher.serve(stream).await });
                }
                Err(error) => tracing::warn!("the channel ended: {error}"),
            }
        }
    }
}

fn chain(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(source) = next {
        text = format!("{text}: {source}");
        next = source.source();
    }
    text
}
