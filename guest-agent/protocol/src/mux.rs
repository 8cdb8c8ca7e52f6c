//! Many byte streams over one: yamux, with the host as the only side that opens streams.
//!
//! Each stream has its own window, so that a slow reader slows its writer and nobody else, and all windows
//! together are bounded.

use std::future::poll_fn;
use std::io;
use std::task::Poll;

use futures::StreamExt as _;
use futures::channel::{mpsc, oneshot};
use futures::stream::{self, Stream};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio_util::compat::{Compat, FuturesAsyncReadCompatExt as _, TokioAsyncReadCompatExt as _};
use yamux::{Config, Connection, Mode};

/// How many streams there may be at once: three for each process, and a few more.
pub const MAX_STREAMS: usize = 256;

/// yamux's first window of a stream, in bytes. The bound of all windows must leave each stream this much.
const FIRST_WINDOW: usize = 256 * 1024;

/// How much larger the windows of busy streams may grow, all together: what a stream carries in one round trip is
/// bounded by its window, and a busy machine's round trips are long.
const GROWTH: usize = 4 * 1024 * 1024;

/// The most that a guest's kernel writes to a serial port at once.
pub const SERIAL_WRITE: usize = 32 * 1024;

/// What yamux puts before a frame.
const HEADER: usize = 12;

/// How much of a stream goes into one frame: a serial line moves it in one piece.
const FRAME: usize = SERIAL_WRITE - HEADER;

/// One stream: reads end when the other side has shut down its writing.
pub type ByteStream = Compat<yamux::Stream>;

type Opening = oneshot::Sender<io::Result<ByteStream>>;

/// The host's handle: opens streams as long as the [`Driver`] runs.
#[derive(Clone)]
pub struct Opener(mpsc::Sender<Opening>);

impl Opener {
    /// Opens a stream. The other side learns of it with the first byte written.
    ///
    /// # Errors
    /// `BrokenPipe` when the channel is gone; `Other` when there are [`MAX_STREAMS`] already.
    pub async fn open(&self) -> io::Result<ByteStream> {
        let (reply, opened) = oneshot::channel();
        let mut requests = self.0.clone();
        futures::SinkExt::send(&mut requests, reply).await.map_err(|_| gone())?;
        opened.await.map_err(|_| gone())?
    }
}

/// What moves the bytes of the host's side; see [`host`].
pub struct Driver<T> {
    connection: Connection<Compat<T>>,
    openings: mpsc::Receiver<Opening>,
    waiting: Option<Opening>,
}

/// The host's side of the channel. The driver must be run (spawned) for anything to move.
pub fn host<T: AsyncRead + AsyncWrite + Unpin>(io: T) -> (Opener, Driver<T>) {
    let (sender, openings) = mpsc::channel(16);
    let connection = Connection::new(io.compat(), config(), Mode::Client);
    (Opener(sender), Driver { connection, openings, waiting: None })
}

impl<T: AsyncRead + AsyncWrite + Unpin> Driver<T> {
    /// Runs until the channel ends. A stream that the guest opens is dropped, which resets it: the guest has no
    /// business opening any.
    ///
    /// # Errors
    /// What ended the channel, if not its orderly end.
    pub async fn run(mut self) -> io::Result<()> {
        poll_fn(|cx| {
            loop {
                if self.waiting.is_none()
                    && let Poll::Ready(Some(opening)) = self.openings.poll_next_unpin(cx)
                {
                    self.waiting = Some(opening);
                }
                if let Some(opening) = self.waiting.take() {
                    match self.connection.poll_new_outbound(cx) {
                        Poll::Ready(stream) => {
                            // A requester that no longer waits drops the stream.
                            let _ = opening.send(stream.map(|stream| stream.compat()).map_err(io::Error::other));
                            continue;
                        }
                        Poll::Pending => self.waiting = Some(opening),
                    }
                }
                match self.connection.poll_next_inbound(cx) {
                    Poll::Ready(Some(Ok(_unwanted))) => {}
                    Poll::Ready(Some(Err(error))) => return Poll::Ready(Err(io::Error::other(error))),
                    Poll::Ready(None) => return Poll::Ready(Ok(())),
                    Poll::Pending => return Poll::Pending,
                }
            }
        })
        .await
    }
}

/// The guest's side of the channel: the streams that the host opens, in order. It must be polled for anything
/// to move, also on the streams already taken.
pub fn guest<T>(io: T) -> impl Stream<Item = io::Result<ByteStream>> + Send
where
    T: AsyncRead + AsyncWrite + Unpin + Send,
{
    let connection = Connection::new(io.compat(), config(), Mode::Server);
    stream::unfold(connection, |mut connection| async move {
        let inbound = poll_fn(|cx| connection.poll_next_inbound(cx)).await?;
        Some((inbound.map(|stream| stream.compat()).map_err(io::Error::other), connection))
    })
}

fn config() -> Config {
    let mut config = Config::default();
    config.set_max_num_streams(MAX_STREAMS);
    config.set_max_connection_receive_window(Some(MAX_STREAMS * FIRST_WINDOW + GROWTH));
    config.set_split_send_size(FRAME);
    // What a process wrote before its end is still to be read after the other side has closed.
    config.set_read_after_close(true);
    config
}

fn gone() -> io::Error {
    io::Error::new(io::ErrorKind::BrokenPipe, "the channel to the guest is closed")
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

    fn echoing_guest(io: tokio::io::DuplexStream) {
        tokio::spawn(async move {
            let mut streams = std::pin::pin!(guest(io));
            while let Some(Ok(mut stream)) = streams.next().await {
                tokio::spawn(async move {
                    let mut seen = Vec::new();
                    stream.read_to_end(&mut seen).await?;
                    stream.write_all(&seen).await?;
                    stream.shutdown().await
                });
            }
        });
    }

    #[tokio::test]
    async fn half_closed_streams_carry_the_answer() {
        let (ours, theirs) = tokio::io::duplex(4096);
        echoing_guest(theirs);
        let (opener, driver) = host(ours);
        tokio::spawn(driver.run());
        let mut tasks = Vec::new();
        for index in 0..20u8 {
            let opener = opener.clone();
            tasks.push(tokio::spawn(async move {
                let mut stream = opener.open().await.unwrap();
                let sent = vec![index; 100_000];
                stream.write_all(&sent).await.unwrap();
                stream.shutdown().await.unwrap();
                let mut back = Vec::new();
                stream.read_to_end(&mut back).await.unwrap();
                assert_eq!(back, sent);
            }));
        }
        for task in tasks {
            task.await.unwrap();
        }
    }

    #[tokio::test]
    async fn a_stalled_stream_stalls_no_other() {
        let (ours, theirs) = tokio::io::duplex(4096);
        let (opener, driver) = host(ours);
        tokio::spawn(driver.run());
        let (report, mut reports) = tokio::sync::mpsc::channel(1);
        tokio::spawn(async move {
            let mut streams = std::pin::pin!(guest(theirs));
            let mut held = Vec::new();
            while let Some(Ok(mut stream)) = streams.next().await {
                if held.is_empty() {
                    held.push(stream); // never read
                    continue;
                }
                let report = report.clone();
                tokio::spawn(async move {
                    let mut seen = Vec::new();
                    let _ = stream.read_to_end(&mut seen).await;
                    let _ = report.send(seen.len()).await;
                });
            }
        });
        let mut stalled = opener.open().await.unwrap();
        let flood = tokio::spawn(async move { stalled.write_all(&vec![0; 64 << 20]).await });
        let mut other = opener.open().await.unwrap();
        other.write_all(&vec![1; 1 << 20]).await.unwrap();
        other.shutdown().await.unwrap();
        assert_eq!(reports.recv().await, Some(1 << 20));
        assert!(!flood.is_finished(), "a stream that nobody reads must not take everything");
        flood.abort();
    }

    #[tokio::test]
    async fn a_guest_that_grants_more_than_counts_is_refused() {
        let (ours, mut theirs) = tokio::io::duplex(64);
        let (_opener, driver) = host(ours);
        // A window update that opens stream 2 and grants it 2^32 - 1 bytes besides its first window.
        theirs.write_all(&[0, 1, 0, 1, 0, 0, 0, 2, 0xff, 0xff, 0xff, 0xff]).await.unwrap();
        tokio::spawn(driver.run());
        // It begins with a ping.
        let mut answers = [0; 2 * HEADER];
        theirs.read_exact(&mut answers).await.unwrap();
        assert_eq!(answers[HEADER..], [0, 3, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1], "go away, for an error of the protocol");
    }

    #[tokio::test]
    async fn opening_on_a_dead_channel_fails() {
        let (ours, theirs) = tokio::io::duplex(64);
        let (opener, driver) = host(ours);
        let running = tokio::spawn(driver.run());
        drop(theirs);
        let _ = running.await.unwrap();
        assert_eq!(opener.open().await.err().map(|error| error.kind()), Some(io::ErrorKind::BrokenPipe));
    }
}
