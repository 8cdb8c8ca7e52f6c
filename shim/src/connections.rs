//! The connections of a shim: it sees when the last of them is closed.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};

use futures::stream::unfold;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::watch;
use ttrpc::asynchronous::transport::Listener;

/// How many connections are open.
pub struct Open(watch::Receiver<usize>);

impl Open {
    /// Returns when all are closed.
    pub async fn none(mut self) {
        // Without anybody who counts them there are none either.
        let _ = self.0.wait_for(|&open| open == 0).await;
    }
}

/// What ttrpc accepts connections from, and who sees them close.
pub fn count(listener: UnixListener) -> (Listener, Open) {
    let (count, open) = watch::channel(0);
    let accepted = unfold((listener, count), |(listener, count)| async {
        let connection = listener.accept().await.map(|(stream, _)| Connection::new(stream, count.clone()));
        Some((connection, (listener, count)))
    });
    (Listener::new(accepted), Open(open))
}

struct Connection {
    stream: UnixStream,
    count: watch::Sender<usize>,
}

impl Connection {
    fn new(stream: UnixStream, count: watch::Sender<usize>) -> Self {
        count.send_modify(|open| *open += 1);
        Self { stream, count }
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        self.count.send_modify(|open| *open -= 1);
    }
}

impl AsyncRead for Connection {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(context, buffer)
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
    use super::*;
    use ttrpc::asynchronous::Server;

    #[tokio::test]
    async fn the_last_connection_is_seen_to_close() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("socket");
        let (listener, mut open) = count(UnixListener::bind(&path).unwrap());
        let mut server = Server::new().add_listener(listener);
        server.start().await.unwrap();
        let (one, other) = (UnixStream::connect(&path).await.unwrap(), UnixStream::connect(&path).await.unwrap());
        open.0.wait_for(|&open| open == 2).await.unwrap();
        server.stop_listen().await;
        drop(one);
        open.0.wait_for(|&open| open == 1).await.unwrap();
        drop(other);
        open.none().await;
    }
}
