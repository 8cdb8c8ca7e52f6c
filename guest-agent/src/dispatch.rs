//! Hands each stream that the host opens to the part of the agent that it is for.

use std::sync::Arc;
use std::time::Duration;

use futures::stream;
use runvm_protocol::ports;
use tokio::sync::mpsc;
use tokio::time::timeout;
use ttrpc::r#async::Server;
use ttrpc::r#async::transport::Listener;

use crate::container::Containers;
use crate::processors::Late;
use crate::reaper::Reaper;
use crate::stdio::{HeldStreams, HostStream, Stream};
use crate::{dns, log, loopback, service};

/// How long the host may take to say what a stream is for.
const PATIENCE: Duration = Duration::from_secs(10);

/// What the agent offers on its streams, whichever channel they come by.
pub(crate) struct Dispatcher {
    control: mpsc::Sender<std::io::Result<Stream>>,
    held: HeldStreams,
}

impl Dispatcher {
    /// Starts the services, which run as long as the server is kept.
    pub(crate) async fn start(reaper: Reaper, processors: Late) -> ttrpc::Result<(Self, Server)> {
        let held = HeldStreams::default();
        let containers = Arc::new(Containers::new(reaper, processors, held.clone()));
        let (control, connections) = mpsc::channel(16);
        let connections = stream::unfold(connections, |mut connections| async move {
            connections.recv().await.map(|connection| (connection, connections))
        });
        let mut server =
            Server::new().add_listener(Listener::new(connections)).register_service(service::methods(containers));
        server.start().await?;
        Ok((Self { control, held }, server))
    }

    /// Serves one stream as long as it is its own matter.
    pub(crate) async fn serve(&self, mut stream: impl HostStream + 'static) {
        match timeout(PATIENCE, ports::announced(&mut stream)).await {
            Ok(Ok(ports::CONTROL)) => {
                // The server takes connections as long as the agent runs.
                let _ = self.control.send(Ok(Box::new(stream))).await;
            }
            Ok(Ok(ports::STDIO)) => self.hold(stream).await,
            Ok(Ok(ports::LOG)) => log::serve(stream).await,
            Ok(Ok(ports::DNS)) => dns::serve(stream).await,
            Ok(Ok(ports::LOOPBACK)) => {
                if let Err(error) = loopback::connect(stream).await {
                    tracing::debug!("a connection of the host's ends: {error}");
                }
            }
            Ok(Ok(other)) => tracing::warn!("a stream for the unknown port {other}"),
            Ok(Err(error)) => tracing::debug!("a stream ended before it was announced: {error}"),
            Err(_) => tracing::warn!("a stream was not announced in time"),
        }
    }

    async fn hold(&self, mut stream: impl HostStream + 'static) {
        let key = match timeout(PATIENCE, ports::stdio_key(&mut stream)).await {
            Ok(Ok(key)) => key,
            Ok(Err(error)) => return tracing::warn!("a stdio stream has no key: {error}"),
            Err(_) => return tracing::warn!("a stdio stream was not named in time"),
        };
        let Some(place) = self.held.reserve(&key) else {
            return tracing::warn!("there is no room for the stdio stream {key:?}");
        };
        // What follows the answer is the process's.
        match ports::acknowledge_stdio(&mut stream).await {
            // It may have waited long enough.
            Ok(()) => drop(place.send(Box::new(stream))),
            Err(error) => tracing::debug!("a stdio stream ended before it was held: {error}"),
        }
    }
}
