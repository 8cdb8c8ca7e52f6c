//! Programs that log, of `binary://` addresses: they read a process's output from descriptors 3 and 4, and say by the
//! end of 5 that they do.

use std::io;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::process::Stdio;
use std::time::Duration;

use command_fds::{CommandFdExt as _, FdMapping};
use runvm::agent::Sink;
use thiserror::Error;
use tokio::io::AsyncReadExt as _;
use tokio::net::unix::pipe;
use tokio::process::{Child, Command};
use tokio::time::timeout;

/// How long one may take to be ready, and to end once there is nothing more to read: what containerd's shim for runc gives.
const READY_LIMIT: Duration = Duration::from_secs(10);
const END_LIMIT: Duration = Duration::from_secs(12);

/// A program that does not log.
#[derive(Debug, Error)]
#[error("cannot log by {path}", path = .path.display())]
pub struct LoggerError {
    path: PathBuf,
    source: io::Error,
}

/// A program and its arguments.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Program {
    pub path: PathBuf,
    pub arguments: Vec<String>,
}

/// One that runs. It is killed where this is dropped.
pub struct Logger(Child);

impl Program {
    /// Starts it, and waits until it reads: the ends that the output goes to.
    pub async fn start(
        &self,
        id: &str,
        namespace: &str,
        terminal: bool,
    ) -> Result<(Logger, Sink, Option<Sink>), LoggerError> {
        let failed = |source| LoggerError { path: self.path.clone(), source };
        self.try_start(id, namespace, terminal).await.map_err(failed)
    }

    async fn try_start(&self, id: &str, namespace: &str, terminal: bool) -> io::Result<(Logger, Sink, Option<Sink>)> {
        let (stdout, stdout_end) = io::pipe()?;
        let (stderr, stderr_end) = io::pipe()?;
        let (ready, ready_end) = io::pipe()?;
        let mut command = std::process::Command::new(&self.path);
        command.args(&self.arguments).env_clear();
        command.env("CONTAINER_ID", id).env("CONTAINER_NAMESPACE", namespace);
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        let mapping = |descriptor: OwnedFd, number| FdMapping { parent_fd: descriptor, child_fd: number };
        command
            .fd_mappings(vec![mapping(stdout.into(), 3), mapping(stderr.into(), 4), mapping(ready_end.into(), 5)])
            .map_err(io::Error::other)?;
        let mut command = Command::from(command);
        let child = command.kill_on_drop(true).spawn()?;
        // It holds the program's ends.
        drop(command);
        let mut ready = pipe::Receiver::from_owned_fd(ready.into())?;
        timeout(READY_LIMIT, ready.read(&mut [0])).await??;
        let stdout = Sink::Pipe(pipe::Sender::from_owned_fd(stdout_end.into())?);
        let stderr = match terminal {
            true => None,
            false => Some(Sink::Pipe(pipe::Sender::from_owned_fd(stderr_end.into())?)),
        };
        Ok((Logger(child), stdout, stderr))
    }
}

impl Logger {
    /// Waits for its end, which comes when it has read all; for a while.
    pub async fn finish(mut self) {
        if timeout(END_LIMIT, self.0.wait()).await.is_err() {
            tracing::warn!("a program that logs does not end, and is killed");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::AsyncWriteExt as _;

    #[tokio::test]
    async fn a_program_reads_all_output() {
        let folder = tempfile::tempdir().unwrap();
        let log = folder.path().join("log");
        let script = format!("exec 5>&-; cat <&3 >{0}; echo $CONTAINER_NAMESPACE/$CONTAINER_ID >>{0}", log.display());
        let program = Program { path: "/bin/sh".into(), arguments: vec!["-c".into(), script] };
        let (logger, stdout, stderr) = program.start("a", "n", false).await.unwrap();
        stdout.into_writer().write_all(b"text\n").await.unwrap();
        drop(stderr);
        logger.finish().await;
        assert_eq!(std::fs::read_to_string(log).unwrap(), "text\nn/a\n");
    }

    #[tokio::test]
    async fn a_program_that_is_not_there_is_named() {
        let program = Program { path: "/no/such".into(), arguments: Vec::new() };
        let error = program.start("a", "n", true).await.err().unwrap();
        assert_eq!(error.to_string(), "cannot log by /no/such");
    }
}
