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

#[cfg(test)]
mod tests {
    use tokio::io::duplex;
    use tokio::net::TcpListener;

    use super::*;

    #[tokio::test]
    async fn questions_are_asked_as_they_came_and_answered_by_number() {
        let udp = UdpSocket::bind("127.0.0.1:0").await.unwrap();
        let resolver = SocketAddrV4::new(Ipv4Addr::LOCALHOST, udp.local_addr().unwrap().port());
        let tcp = TcpListener::bind(resolver).await.unwrap();
        let (ours, mut guest) = duplex(4096);
        let relay = tokio::spawn(relay_to(resolver, ours));

        for (number, transport) in [(1, Transport::Udp), (2, Transport::Tcp)] {
            Message { number, transport, payload: b"who?".to_vec() }.write(&mut guest).await.unwrap();
        }
        let (mut connection, _) = tcp.accept().await.unwrap();
        let mut question = [0; 6];
        connection.read_exact(&mut question).await.unwrap();
        assert_eq!(&question, b"\x00\x04who?");
        connection.write_all(b"\x00\x06by TCP").await.unwrap();
        // The later question is answered first.
        let answer = Message { number: 2, transport: Transport::Tcp, payload: b"by TCP".to_vec() };
        assert_eq!(Message::read(&mut guest).await.unwrap(), Some(answer));

        let (length, asking) = udp.recv_from(&mut question).await.unwrap();
        assert_eq!(&question[..length], b"who?");
        udp.send_to(b"by UDP", asking).await.unwrap();
        let answer = Message { number: 1, transport: Transport::Udp, payload: b"by UDP".to_vec() };
        assert_eq!(Message::read(&mut guest).await.unwrap(), Some(answer));

        drop(guest);
        relay.await.unwrap().unwrap();
    }

    #[tokio::test]
    async fn without_a_resolver_the_answer_is_empty() {
        // Bound and let go: nobody listens there.
        let free = UdpSocket::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap().port();
        let (ours, mut guest) = duplex(4096);
        tokio::spawn(relay_to(SocketAddrV4::new(Ipv4Addr::LOCALHOST, free), ours));
        for transport in [Transport::Udp, Transport::Tcp] {
            Message { number: 7, transport, payload: b"who?".to_vec() }.write(&mut guest).await.unwrap();
            let answer = Message::read(&mut guest).await.unwrap().unwrap();
            assert_eq!((answer.number, answer.payload.len()), (7, 0));
        }
    }

    #[tokio::test]
    async fn what_is_no_question_ends_the_relay() {
        let (ours, mut guest) = duplex(4096);
        guest.write_all(&[0, 0, 0, 1, 9, 0, 0]).await.unwrap();
        let error = relay(ours).await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::InvalidData);
    }
}
