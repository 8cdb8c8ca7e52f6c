//! Connections of the host to what listens on the guest's loopback.

use std::io;
use std::net::{Ipv4Addr, Ipv6Addr};
use std::time::Duration;

use runvm_protocol::ports;
use tokio::io::{AsyncRead, AsyncWrite, copy_bidirectional};
use tokio::net::TcpStream;
use tokio::time::timeout;

/// How long the host may take to name a port.
const PATIENCE: Duration = Duration::from_secs(10);

/// Connects the stream to the port that it names, until both ends are done.
pub(crate) async fn connect(mut stream: impl AsyncRead + AsyncWrite + Unpin) -> io::Result<()> {
    let port = timeout(PATIENCE, ports::named_port(&mut stream)).await??;
    let mut connection = match TcpStream::connect((Ipv4Addr::LOCALHOST, port)).await {
        Ok(connection) => connection,
        Err(_) => TcpStream::connect((Ipv6Addr::LOCALHOST, port)).await?,
    };
    copy_bidirectional(&mut stream, &mut connection).await.map(drop)
}
