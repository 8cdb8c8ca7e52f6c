//! The connections of a shim: it sees their clients leave. One leaves who closes the connection, or the stream that it is
//! for: containerd 2.1 opens a connection for each of its streams, and forgets it.

use std::collections::BTreeMap;
use std::io;
use std::pin::Pin;
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll};

use futures::stream::unfold;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::watch;
use ttrpc::asynchronous::transport::Listener;

use crate::sync::lock;

/// How much of what a connection began with is remembered, in bytes.
const BEGINNING: usize = 1024;
/// A message's length, its stream, its kind and its flags: ttrpc's PROTOCOL.md.
const HEADER: usize = 10;
/// The kind of data, and the flags of "no more" and "nothing".
const CLOSING: [u8; 2] = [3, 1 | 4];

/// Those that are open.
#[derive(Clone, Default)]
pub struct Connections(Arc<Mutex<Register>>);

#[derive(Default)]
struct Register {
    open: BTreeMap<u64, Opened>,
    accepted: u64,
}

#[derive(Default)]
struct Opened {
    beginning: Vec<u8>,
    /// The last bytes that came.
    ending: Vec<u8>,
    left: watch::Sender<bool>,
}

impl Opened {
    fn read(&mut self, bytes: &[u8]) {
        let wanted = BEGINNING - self.beginning.len();
        self.beginning.extend(bytes.iter().take(wanted));
        self.ending.extend_from_slice(&bytes[bytes.len().saturating_sub(HEADER)..]);
        self.ending.drain(..self.ending.len().saturating_sub(HEADER));
        let left = matches!(self.ending[..], [0, 0, 0, 0, _, _, _, _, kind, flags] if [kind, flags] == CLOSING);
        self.left.send_if_modified(|before| std::mem::replace(before, left) != left);
    }
}

impl Connections {
    /// What ttrpc accepts connections from.
    pub fn accept(&self, listener: UnixListener) -> Listener {
        Listener::new(unfold((listener, self.clone()), |(listener, connections)| async {
            let connection = listener.accept().await.map(|(stream, _)| Connection::new(stream, &connections));
            Some((connection, (listener, connections)))
        }))
    }

    /// Returns when all clients have left.
    pub async fn none(&self) {
        self.left(&[]).await;
    }

    /// Returns when those have left who began with a message that has these bytes in it: ttrpc does not tell by which
    /// connection it was asked.
    pub async fn left(&self, message: &[u8]) {
        let stays = |opened: &&Opened| {
            let began_so = message.is_empty() || opened.beginning.windows(message.len()).any(|bytes| bytes == message);
            began_so && !*opened.left.borrow()
        };
        loop {
            let staying = lock(&self.0).open.values().find(stays).map(|opened| opened.left.subscribe());
            let Some(mut staying) = staying else { return };
            // An error is the end of the connection.
            let _ = staying.wait_for(|&left| left).await;
        }
    }
}

struct Connection {
    stream: UnixStream,
    number: u64,
    connections: Connections,
}

impl Connection {
    fn new(stream: UnixStream, connections: &Connections) -> Self {
        let mut register = lock(&connections.0);
        register.accepted += 1;
        let number = register.accepted;
        register.open.insert(number, Opened::default());
        Self { stream, number, connections: connections.clone() }
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        lock(&self.connections.0).open.remove(&self.number);
    }
}

impl AsyncRead for Connection {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buffer.filled().len();
        let polled = Pin::new(&mut self.stream).poll_read(context, buffer);
        if let Some(opened) = lock(&self.connections.0).open.get_mut(&self.number) {
            opened.read(&buffer.filled()[before..]);
        }
        polled
    }
}

impl AsyncWrite for Connection {
    fn poll_write(mut self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(context, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use tokio::io::AsyncWriteExt as _;
    use ttrpc::asynchronous::Server;

    use super::*;

    #[tokio::test]
    async fn clients_are_seen_to_leave() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("socket");
        let connections = Connections::default();
        let mut server = Server::new().add_listener(connections.accept(UnixListener::bind(&path).unwrap()));
        server.start().await.unwrap();
        let (mut one, mut other) =
            (UnixStream::connect(&path).await.unwrap(), UnixStream::connect(&path).await.unwrap());
        // The header of a message that is not whole yet, and a piece of it.
        one.write_all(&[&[0, 0, 2, 0, 0, 0, 0, 1, 1, 0], &b"a name"[..]].concat()).await.unwrap();
        while !lock(&connections.0).open.values().any(|opened| opened.beginning.ends_with(b"name")) {
            tokio::task::yield_now().await;
        }
        let passes = async |message: &[u8]| {
            tokio::time::timeout(Duration::from_millis(50), connections.left(message)).await.is_ok()
        };
        assert!(!passes(b"name").await && passes(b"no name").await && !passes(b"").await);
        server.stop_listen().await;
        drop(one);
        connections.left(b"name").await;
        assert!(!passes(b"").await, "the other is there");
        other.write_all(&[0, 0, 0, 0, 0, 0, 0, 3, 3, 5]).await.unwrap();
        connections.none().await;
    }
}
