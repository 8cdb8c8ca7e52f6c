//! What a stream to the agent is for: the number that its first four bytes (big endian) say.

use tokio::io::{self, AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

/// ttrpc: the service of `proto/agent.proto`.
pub const CONTROL: u32 = 1024;
/// One direction of a process's stdio: see [`announce_stdio`].
pub const STDIO: u32 = 1025;
/// The agent's log, one JSON object a line, from the guest to the host.
pub const LOG: u32 = 1026;
/// Name look-ups of the guest that the host answers: see [`crate::dns`].
pub const DNS: u32 = 1027;

/// A connection to a port of the guest's loopback: see [`name_port`].
pub const LOOPBACK: u32 = 1028;

/// The longest key of a stdio stream, in bytes.
pub const MAX_KEY: usize = 128;

/// The byte that the agent answers when it holds a stdio stream under its key.
const HELD: u8 = 1;

/// Says what a new stream is for.
///
/// # Errors
/// Those of the stream.
pub async fn announce(stream: &mut (impl AsyncWrite + Unpin), port: u32) -> io::Result<()> {
    stream.write_all(&port.to_be_bytes()).await?;
    stream.flush().await
}

/// Reads what a new stream is for.
///
/// # Errors
/// Those of the stream.
pub async fn announced(stream: &mut (impl AsyncRead + Unpin)) -> io::Result<u32> {
    stream.read_u32().await
}

/// Says of a new stream that it is for stdio, and the key by which a request names it. All is said in one piece: each is a
/// packet to the guest, and an interrupt. The request need not wait until the agent holds the stream.
///
/// # Errors
/// `InvalidInput` for a key that is empty or longer than [`MAX_KEY`]; those of the stream.
pub async fn announce_stdio(stream: &mut (impl AsyncWrite + Unpin), key: &str) -> io::Result<()> {
    let length = u8::try_from(key.len()).ok().filter(|&length| length > 0 && usize::from(length) <= MAX_KEY);
    let Some(length) = length else {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "a stdio key has 1 to 128 bytes"));
    };
    let said = [&STDIO.to_be_bytes(), &[length][..], key.as_bytes()].concat();
    stream.write_all(&said).await?;
    stream.flush().await
}

/// Waits until the agent holds a stdio stream: what follows is the process's.
///
/// # Errors
/// `ConnectionRefused` where the agent does not take the stream; those of the stream.
pub async fn await_hold(stream: &mut (impl AsyncRead + Unpin)) -> io::Result<()> {
    match stream.read_u8().await? {
        HELD => Ok(()),
        _ => Err(io::Error::new(io::ErrorKind::ConnectionRefused, "the agent does not take the stream")),
    }
}

/// Says which TCP port of the guest's loopback a stream, already announced, is to be connected to. What follows is what is
/// said on the connection; a stream that ends at once was not connected.
///
/// # Errors
/// Those of the stream.
pub async fn name_port(stream: &mut (impl AsyncWrite + Unpin), port: u16) -> io::Result<()> {
    stream.write_u16(port).await?;
    stream.flush().await
}

/// Reads which port a stream is to be connected to.
///
/// # Errors
/// Those of the stream.
pub async fn named_port(stream: &mut (impl AsyncRead + Unpin)) -> io::Result<u16> {
    stream.read_u16().await
}

/// Reads the key of a stdio stream. The caller stores the stream, then calls [`acknowledge_stdio`].
///
/// # Errors
/// `InvalidData` for a key that is empty, too long or not UTF-8; those of the stream.
pub async fn stdio_key(stream: &mut (impl AsyncRead + Unpin)) -> io::Result<String> {
    let length = usize::from(stream.read_u8().await?);
    if length == 0 || length > MAX_KEY {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "a stdio key has 1 to 128 bytes"));
    }
    let mut key = vec![0; length];
    stream.read_exact(&mut key).await?;
    String::from_utf8(key).map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))
}

/// Tells the host that its stdio stream is held.
///
/// # Errors
/// Those of the stream.
pub async fn acknowledge_stdio(stream: &mut (impl AsyncWrite + Unpin)) -> io::Result<()> {
    stream.write_u8(HELD).await?;
    stream.flush().await
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_stdio_stream_is_named_and_held() {
        let (mut host, mut guest) = io::duplex(256);
        announce_stdio(&mut host, "web/stdin").await.unwrap();
        assert_eq!(announced(&mut guest).await.unwrap(), STDIO);
        assert_eq!(stdio_key(&mut guest).await.unwrap(), "web/stdin");
        acknowledge_stdio(&mut guest).await.unwrap();
        await_hold(&mut host).await.unwrap();
        guest.write_u8(HELD + 1).await.unwrap();
        assert_eq!(await_hold(&mut host).await.unwrap_err().kind(), io::ErrorKind::ConnectionRefused);
    }

    #[tokio::test]
    async fn keys_out_of_bounds_are_refused_by_both_ends() {
        let (mut host, mut guest) = io::duplex(256);
        for key in ["", "k".repeat(MAX_KEY + 1).as_str()] {
            let error = announce_stdio(&mut host, key).await.unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::InvalidInput);
        }
        for length in [0, MAX_KEY as u8 + 1] {
            host.write_u8(length).await.unwrap();
            let error = stdio_key(&mut guest).await.unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::InvalidData);
        }
    }
}
