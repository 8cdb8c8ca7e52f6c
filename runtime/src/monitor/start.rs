//! `start`, which the monitor does: its are the network namespace, the guest, and a connection to the agent already.
//!
//! Whoever connects to the socket is answered with one line: that the program runs, or why not.

use std::io;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::Mutex;

use crate::agent::{Agent, AgentError};
use crate::error::{Error, Result, sentence};
use crate::host::folder_socket::FolderSocket;
use crate::sandbox::{LateNetwork, SandboxError};

const NAME: &str = "start.sock";
const DONE: &str = "done\n";
/// More than the agent may take, for the network and then the program.
const LIMIT: Duration = Duration::from_secs(70);
/// The longest line, in bytes.
const MAX_LINE: u64 = 8 << 10;

/// A created container whose program is to be run.
pub(super) struct Start {
    pub id: String,
    pub agent: Agent,
    pub late_network: Arc<LateNetwork>,
}

impl Start {
    /// Answers for as long as the runtime runs.
    ///
    /// # Errors
    /// Those of bind(2).
    pub fn serve(self, folder: &Path) -> io::Result<Answering> {
        let listener = FolderSocket::new(folder, NAME).listen()?;
        let answering = Answering::default();
        tokio::spawn(self.answer(listener, answering.clone()));
        Ok(answering)
    }

    /// One after the other: the second finds what the first has done.
    async fn answer(self, listener: UnixListener, answering: Answering) {
        loop {
            match listener.accept().await {
                Ok((mut connection, _)) => {
                    let _answering = answering.0.lock().await;
                    let line = match self.run().await {
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

    /// Connects what has come into the network namespace since `create`, and runs the program.
    async fn run(&self) -> std::result::Result<(), SandboxError> {
        self.late_network.connect().await?;
        Ok(self.agent.start_container(&self.id).await?)
    }
}

/// Whether a `start` has yet to be answered.
#[derive(Clone, Default)]
pub(super) struct Answering(Arc<Mutex<()>>);

impl Answering {
    /// Waits until none has: a short program may have ended before.
    pub async fn over(&self) {
        drop(self.0.lock().await);
    }
}

/// Has the monitor of the container with this folder run its program.
///
/// # Errors
/// [`Error::Monitor`] with its sentence; [`Error::Agent`] where it does not answer.
pub async fn start(folder: &Path) -> Result<()> {
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
