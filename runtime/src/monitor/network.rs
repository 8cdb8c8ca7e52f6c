//! What `start` asks of the monitor, whose network namespace and whose guest it is: to connect what has come since
//! `create`.
//!
//! Whoever connects to the socket is answered with one line: that it is done, or why not.

use std::io;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{UnixListener, UnixStream};

use crate::agent::AgentError;
use crate::error::{Error, Result, sentence};
use crate::host::folder_socket::FolderSocket;
use crate::sandbox::LateNetwork;

const NAME: &str = "network.sock";
const DONE: &str = "done\n";
/// More than the agent may take.
const LIMIT: Duration = Duration::from_secs(40);
/// The longest line, in bytes.
const MAX_LINE: u64 = 8 << 10;

/// Answers for as long as the runtime runs.
///
/// # Errors
/// Those of bind(2).
pub(super) fn serve(folder: &Path, late_network: Arc<LateNetwork>) -> io::Result<()> {
    let listener = FolderSocket::new(folder, NAME).listen()?;
    tokio::spawn(answer(listener, late_network));
    Ok(())
}

/// One after the other: the second finds what is left by the first.
async fn answer(listener: UnixListener, late_network: Arc<LateNetwork>) {
    loop {
        match listener.accept().await {
            Ok((mut connection, _)) => {
                let line = match late_network.connect().await {
                    Ok(()) => DONE.to_owned(),
                    Err(error) => sentence(&error) + "\n",
                };
                // Who has gone does not need it.
                let _ = connection.write_all(line.as_bytes()).await;
            }
            Err(error) => {
                tracing::warn!("the monitor's socket for `start`: {error}");
                tokio::task::yield_now().await;
            }
        }
    }
}

/// Has the monitor of the container with this folder do it.
///
/// # Errors
/// [`Error::Monitor`] with its sentence; [`Error::Agent`] where it does not answer.
pub async fn connect(folder: &Path) -> Result<()> {
    let asking = async {
        let connection: UnixStream = FolderSocket::new(folder, NAME).connect().await?;
        let mut line = String::new();
        connection.take(MAX_LINE).read_to_string(&mut line).await?;
        Ok(line)
    };
    let line = tokio::time::timeout(LIMIT, asking).await.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()));
    match line.map_err(AgentError::Channel)?.as_str() {
        DONE => Ok(()),
        "" => Err(AgentError::Channel(io::ErrorKind::UnexpectedEof.into()).into()),
        reason => Err(Error::Monitor(reason.trim_end().to_owned())),
    }
}
