//! Name look-ups that the guest hands to the host.
//!
//! An engine's resolver (Docker's listens on 127.0.0.11) lives inside the network namespace, where a guest's
//! loopback does not reach. So the agent listens on that address in the guest, and carries each message over
//! one stream to the host, which asks the real resolver and sends back the answer under the same number.
//!
//! On the stream a message is: number (u32), transport (u8: 0 UDP, 1 TCP), length (u16), payload; big endian.

use tokio::io::{self, AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

/// Where Docker's resolver listens.
pub const RESOLVER: std::net::Ipv4Addr = std::net::Ipv4Addr::new(127, 0, 0, 11);

/// How many look-ups may wait for their answer at once; a guest that asks for more waits.
pub const MAX_IN_FLIGHT: usize = 128;

/// How a look-up came, and must be passed on: answers over UDP are cut short where TCP's are not.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Transport {
    /// One datagram.
    Udp,
    /// One length-prefixed message.
    Tcp,
}

/// A query or an answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Message {
    /// Chosen by the guest; an answer carries its query's.
    pub number: u32,
    /// How the query came.
    pub transport: Transport,
    /// The DNS message, without TCP's length prefix; empty where the resolver gave no answer.
    pub payload: Vec<u8>,
}

impl Message {
    /// Writes the message.
    ///
    /// # Errors
    /// `InvalidInput` for a payload over 65,535 bytes; those of the stream.
    pub async fn write(&self, stream: &mut (impl AsyncWrite + Unpin)) -> io::Result<()> {
        let length = u16::try_from(self.payload.len())
            .map_err(|_| io::Error::new(io::ErrorKind::InvalidInput, "a DNS message has at most 65,535 bytes"))?;
        stream.write_u32(self.number).await?;
        stream
            .write_u8(match self.transport {
                Transport::Udp => 0,
                Transport::Tcp => 1,
            })
            .await?;
        stream.write_u16(length).await?;
        stream.write_all(&self.payload).await?;
        stream.flush().await
    }

    /// Reads a message; `None` where the stream ends before one begins.
    ///
    /// # Errors
    /// `InvalidData` for an unknown transport; those of the stream, `UnexpectedEof` within a message.
    pub async fn read(stream: &mut (impl AsyncRead + Unpin)) -> io::Result<Option<Self>> {
        let number = match stream.read_u32().await {
            Ok(number) => number,
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(None),
            Err(error) => return Err(error),
        };
        let transport = match stream.read_u8().await? {
            0 => Transport::Udp,
            1 => Transport::Tcp,
            _ => return Err(io::Error::new(io::ErrorKind::InvalidData, "unknown DNS transport")),
        };
        let mut payload = vec![0; usize::from(stream.read_u16().await?)];
        stream.read_exact(&mut payload).await?;
        Ok(Some(Self { number, transport, payload }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn messages_survive_the_stream() {
        let (mut guest, mut host) = io::duplex(1 << 17);
        for (transport, length) in [(Transport::Udp, 0), (Transport::Tcp, 65_535)] {
            let message = Message { number: 7, transport, payload: vec![b'x'; length] };
            message.write(&mut guest).await.unwrap();
            assert_eq!(Message::read(&mut host).await.unwrap(), Some(message));
        }
        drop(guest);
        assert_eq!(Message::read(&mut host).await.unwrap(), None);
    }

    #[tokio::test]
    async fn an_unknown_transport_and_a_cut_message_are_errors() {
        let (mut guest, mut host) = io::duplex(64);
        guest.write_all(&[0, 0, 0, 1, 9, 0, 0]).await.unwrap();
        assert_eq!(Message::read(&mut host).await.unwrap_err().kind(), io::ErrorKind::InvalidData);

        let (mut guest, mut host) = io::duplex(64);
        guest.write_all(&[0, 0, 0, 1, 0, 0, 9, b'x']).await.unwrap();
        drop(guest);
        assert_eq!(Message::read(&mut host).await.unwrap_err().kind(), io::ErrorKind::UnexpectedEof);
    }
}
