//! Name look-ups of the guest, passed on to the engine's resolver.
//!
//! The resolver listens on the loopback of the network namespace, out of the guest's reach. The agent listens
//! there in the guest and sends here what it is asked; see [`runvm_protocol::dns`] for the stream. What a guest can
//! do by this is ask that resolver, [`MAX_IN_FLIGHT`] questions at once.

use std::io;
use std::net::{Ipv4Addr, SocketAddrV4};
use std::time::Duration;

use futures::{StreamExt as _, stream};
use runvm_protocol::dns::{MAX_IN_FLIGHT, Message, RESOLVER, Transport};
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};
use tokio::net::{TcpStream, UdpSocket};

const PORT: u16 = 53;

/// Longer than Docker's resolver takes to try all the servers it knows; whoever asked has given up by then.
const PATIENCE: Duration = Duration::from_secs(20);

/// Answers the look-ups that come in on a stream until it ends.
///
/// # Errors
/// Those of the stream, and `InvalidData` for what is not a look-up.
pub async fn relay(stream: impl AsyncRead + AsyncWrite + Send) -> io::Result<()> {
    relay_to(SocketAddrV4::new(RESOLVER, PORT), stream).await
}

async fn relay_to(resolver: SocketAddrV4, stream: impl AsyncRead + AsyncWrite + Send) -> io::Result<()> {
    let (reader, writer) = tokio::io::split(stream);
    let (reader, mut writer) = (Box::pin(reader), Box::pin(writer));
    let queries = stream::unfold(reader, |mut reader| async {
        let query = Message::read(&mut reader).await.transpose()?;
        Some((query, reader))
    });
    let mut answers = queries
        .map(async |query| Ok::<_, io::Error>(answer(resolver, query?).await))
        .buffer_unordered(MAX_IN_FLIGHT)
        .boxed();
    while let Some(answer) = answers.next().await {
        answer?.write(&mut writer).await?;
    }
    Ok(())
}

/// What the resolver says, or nothing.
async fn answer(resolver: SocketAddrV4, query: Message) -> Message {
    let Message { number, transport, payload } = query;
    let asked = async {
        match transport {
            Transport::Udp => ask_by_udp(resolver, &payload).await,
            Transport::Tcp => ask_by_tcp(resolver, &payload).await,
        }
    };
    let payload = match tokio::time::timeout(PATIENCE, asked).await {
        Ok(Ok(payload)) => payload,
        Ok(Err(error)) => {
            tracing::debug!("no answer of the resolver: {error}");
            Vec::new()
        }
        Err(_) => Vec::new(),
    };
    Message { number, transport, payload }
}

async fn ask_by_udp(resolver: SocketAddrV4, query: &[u8]) -> io::Result<Vec<u8>> {
    let socket = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).await?;
    socket.connect(resolver).await?;
    socket.send(query).await?;
    let mut answer = Vec::with_capacity(usize::from(u16::MAX));
    socket.recv_buf(&mut answer).await?;
    answer.shrink_to_fit();
    Ok(answer)
}

async fn ask_by_tcp(resolver: SocketAddrV4, query: &[u8]) -> io::Result<Vec<u8>> {
    let length = u16::try_from(query.len()).map_err(io::Error::other)?;
    let mut connection = TcpStream::connect(resolver).await?;
    connection.write_all(&[&length.to_be_bytes(), query].concat()).await?;
    let mut answer = vec![0; usize::from(connection.read_u16().await?)];
    connection.read_exact(&mut answer).await?;
    Ok(answer)
}
