//! The monitor's socket: how the verbs, which are processes of their own, reach the agent.
//!
//! Each connection to the socket is one stream of the channel, byte for byte.

use std::io;
use std::path::Path;
use std::sync::Arc;

use async_trait::async_trait;
use tokio::net::UnixListener;
use tokio::sync::Semaphore;

use crate::host::folder_socket::FolderSocket;
use crate::vmm::{ByteStream, Channel};

const NAME: &str = "agent.sock";
/// How many of the channel's streams are the monitor's own, at most: control, log, look-ups, stdio.
const OWN_STREAMS: usize = 8;

/// The socket in a container's folder.
#[derive(Debug)]
pub struct MonitorSocket(FolderSocket);

impl MonitorSocket {
    /// The socket of the container with this folder.
    pub fn of(folder: &Path) -> Self {
        Self(FolderSocket::new(folder, NAME))
    }

    /// Listens.
    ///
    /// # Errors
    /// Those of bind(2).
    pub fn listen(&self) -> io::Result<UnixListener> {
        self.0.listen()
    }
}

#[async_trait]
impl Channel for MonitorSocket {
    async fn open(&self) -> io::Result<ByteStream> {
        Ok(Box::new(self.0.connect().await?))
    }
}

/// The socket being served.
pub struct Tunnel {
    places: Arc<Semaphore>,
    /// How many there are in all.
    count: u32,
}

impl Tunnel {
    /// Serves the socket for as long as the runtime runs, over a channel of so many streams. A connection that finds none
    /// free waits for one.
    pub fn serve(listener: UnixListener, channel: Arc<dyn Channel>, streams: usize) -> Self {
        let count = u32::try_from(streams.saturating_sub(OWN_STREAMS)).unwrap_or(u32::MAX);
        let places = Arc::new(Semaphore::new(count as usize));
        tokio::spawn(serve(listener, channel, places.clone()));
        Self { places, count }
    }

    /// Waits until nobody is connected, and lets nobody connect from then on.
    pub async fn deserted(&self) {
        match self.places.acquire_many(self.count).await {
            Ok(places) => places.forget(),
            // Nobody closes it.
            Err(_closed) => {}
        }
    }
}

async fn serve(listener: UnixListener, channel: Arc<dyn Channel>, places: Arc<Semaphore>) {
    loop {
        let mut connection = match listener.accept().await {
            Ok((connection, _)) => connection,
            Err(error) => {
                tracing::warn!("the monitor's socket: {error}");
                tokio::task::yield_now().await;
                continue;
            }
        };
        let Ok(place) = places.clone().acquire_owned().await else { return };
        let channel = channel.clone();
        tokio::spawn(async move {
            match channel.open().await {
                Ok(mut stream) => {
                    // An end of either side ends both, which is all there is to know of it.
                    let _ =
                        tokio::io::copy_bidirectional_with_sizes(&mut connection, &mut stream, 65_536, 65_536).await;
                }
                // The verb finds its connection closed.
                Err(error) => tracing::warn!("no stream to the guest for a verb: {error}"),
            }
            drop(place);
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

    struct Echo;

    #[async_trait]
    impl Channel for Echo {
        async fn open(&self) -> io::Result<ByteStream> {
            let (ours, mut theirs) = tokio::io::duplex(1024);
            tokio::spawn(async move {
                let mut seen = Vec::new();
                theirs.read_to_end(&mut seen).await?;
                theirs.write_all(&seen).await
            });
            Ok(Box::new(ours))
        }
    }

    #[tokio::test]
    async fn connections_become_streams() {
        let dir = tempfile::tempdir().unwrap();
        let socket = MonitorSocket::of(dir.path());
        let tunnel = Tunnel::serve(socket.listen().unwrap(), Arc::new(Echo), 2 + OWN_STREAMS);
        let mut stream = socket.open().await.unwrap();
        stream.write_all(b"hello").await.unwrap();
        stream.shutdown().await.unwrap();
        let mut back = String::new();
        stream.read_to_string(&mut back).await.unwrap();
        assert_eq!(back, "hello");
        drop(stream);
        tunnel.deserted().await;
    }
}
