//! Between a process's stdin, stdout and stderr and the host's streams.

mod held;
mod preserved;
mod relay;

use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::Arc;

use runvm_protocol::mux::ByteStream;
use runvm_protocol::{MAX_PRESERVED, agent};
use rustix::fs::{Gid, Mode, OFlags, Uid};
use rustix::pipe::PipeFlags;
use rustix::termios::Winsize;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::watch;

use crate::readiness;
use crate::reaper::Exit;

pub(crate) use held::{HeldStreams, NotHeld};
pub(crate) use preserved::reserve;
pub(crate) use relay::hang_up;

use preserved::{Connection, Preserved};

/// The capacity of a pipe: fewer and larger steps for those who write a lot.
const PIPE_SIZE: usize = 256 * 1024;

/// Why a process cannot be connected.
#[derive(Debug, thiserror::Error)]
pub(crate) enum StdioError {
    #[error(transparent)]
    NotHeld(#[from] NotHeld),
    #[error("cannot make the process's stdio")]
    Io(#[from] io::Error),
}

/// What the agent needs of a stream that the host has opened, whichever channel it came by.
pub(crate) trait HostStream: AsyncRead + AsyncWrite + Unpin + Send + Sync {
    /// Whether the host has let go of both directions, not only of its writing.
    fn is_gone(&self) -> bool;

    /// The socket that it is, if it is one.
    fn socket(&self) -> Option<BorrowedFd<'_>> {
        None
    }
}

/// Any such stream.
pub(crate) type Stream = Box<dyn HostStream>;

impl HostStream for ByteStream {
    fn is_gone(&self) -> bool {
        self.get_ref().is_closed()
    }
}

/// The host's streams for one process.
pub(crate) struct Streams {
    stdin: Option<Stream>,
    stdout: Option<Stream>,
    stderr: Option<Stream>,
    pub(crate) lifeline: Option<Stream>,
    preserved: Vec<Preserved>,
    connections: Vec<Connection>,
}

impl Streams {
    /// Takes the streams that the request names.
    pub(crate) async fn take(held: &HeldStreams, stdio: &agent::Stdio) -> Result<Self, NotHeld> {
        Ok(Self {
            stdin: held.take(&stdio.stdin).await?,
            stdout: held.take(&stdio.stdout).await?,
            stderr: held.take(&stdio.stderr).await?,
            lifeline: held.take(&stdio.lifeline).await?,
            preserved: {
                let mut preserved = Vec::new();
                for named in stdio.preserved.iter().take(MAX_PRESERVED as usize) {
                    preserved.push(Preserved::take(held, named).await?);
                }
                preserved
            },
            connections: Vec::new(),
        })
    }

    /// Makes what the process finds from descriptor 3 on.
    pub(crate) fn connect_preserved(&mut self, owner: Owner) -> io::Result<Vec<OwnedFd>> {
        let mut ends = Vec::new();
        for preserved in self.preserved.drain(..) {
            let (connection, end) = preserved.connect(owner)?;
            self.connections.extend(connection);
            ends.push(end);
        }
        Ok(ends)
    }

    /// Begins to carry what was made for that, of a process that is there.
    pub(crate) fn attach_preserved(&mut self, exit: &Exit) -> io::Result<()> {
        self.connections.drain(..).try_for_each(|connection| connection.attach(exit))
    }
}

/// The user and the group that own what a process gets: programs reopen `/dev/stdout`.
pub(crate) type Owner = (Uid, Gid);

/// The ends of the pipes that the process gets.
pub(crate) struct ChildEnds {
    pub(crate) stdin: OwnedFd,
    pub(crate) stdout: OwnedFd,
    pub(crate) stderr: OwnedFd,
}

/// The agent's ends of the pipes: `None` where the process has `/dev/null`.
pub(crate) struct Pipes {
    stdin: Option<OwnedFd>,
    stdout: Option<OwnedFd>,
    stderr: Option<OwnedFd>,
}

impl Pipes {
    /// Makes pipes for the streams that there are.
    pub(crate) fn new(streams: &Streams, owner: Owner) -> io::Result<(Self, ChildEnds)> {
        let (stdin, child_stdin) = match streams.stdin {
            Some(_) => {
                let (read, write) = pipe()?;
                (Some(write), owned_by(read, owner)?)
            }
            None => (None, null()?),
        };
        let output = |wanted: bool| {
            Ok::<_, io::Error>(if wanted {
                let (read, write) = pipe()?;
                (Some(read), owned_by(write, owner)?)
            } else {
                (None, null()?)
            })
        };
        let (stdout, child_stdout) = output(streams.stdout.is_some())?;
        let (stderr, child_stderr) = output(streams.stderr.is_some())?;
        let child = ChildEnds { stdin: child_stdin, stdout: child_stdout, stderr: child_stderr };
        Ok((Self { stdin, stdout, stderr }, child))
    }
}

/// The agent's end of a pseudo terminal.
#[derive(Clone)]
pub(crate) struct Terminal(Arc<AsyncFd<OwnedFd>>);

impl Terminal {
    /// Takes over a master that a process made.
    pub(crate) fn new(master: OwnedFd) -> io::Result<Self> {
        Ok(Self(pollable(master, Interest::READABLE | Interest::WRITABLE)?))
    }

    /// Says how large the host's terminal is.
    pub(crate) fn resize(&self, size: Winsize) -> io::Result<()> {
        Ok(rustix::termios::tcsetwinsize(self.0.get_ref(), size)?)
    }
}

/// A size as the kernel wants it; what does not fit is cut.
pub(crate) fn window(rows: u32, columns: u32) -> Winsize {
    let cut = |number: u32| u16::try_from(number).unwrap_or(u16::MAX);
    Winsize { ws_row: cut(rows), ws_col: cut(columns), ws_xpixel: 0, ws_ypixel: 0 }
}

/// How many bytes of an output the host has been handed, once everything is that the process wrote until its end.
#[derive(Clone)]
pub(crate) struct Handover(watch::Receiver<Option<u64>>);

impl Handover {
    /// Waits for the process's end, and for its output to be handed over.
    pub(crate) async fn bytes(&self) -> u64 {
        let mut bytes = self.0.clone();
        bytes.wait_for(Option::is_some).await.ok().and_then(|bytes| *bytes).unwrap_or_default()
    }
}

/// A process's connection to the host.
#[derive(Clone, Default)]
pub(crate) struct Attached {
    pub(crate) terminal: Option<Terminal>,
    pub(crate) stdout: Option<Handover>,
    pub(crate) stderr: Option<Handover>,
}

impl Attached {
    /// Connects pipes.
    pub(crate) fn pipes(streams: Streams, pipes: Pipes, exit: &Exit) -> io::Result<Self> {
        if let (Some(stream), Some(pipe)) = (streams.stdin, pipes.stdin) {
            let pipe = pollable(pipe, Interest::WRITABLE)?;
            tokio::spawn(relay::input(stream, pipe));
        }
        let output = |stream: Option<Stream>, pipe: Option<OwnedFd>| match (stream, pipe) {
            (Some(stream), Some(pipe)) => Ok(Some(hand_over(stream, pollable(pipe, Interest::READABLE)?, exit))),
            _ => Ok::<_, io::Error>(None),
        };
        let (stdout, stderr) = (output(streams.stdout, pipes.stdout)?, output(streams.stderr, pipes.stderr)?);
        Ok(Self { terminal: None, stdout, stderr })
    }

    /// How many bytes of stdout and of stderr the host has been handed, once that is all.
    pub(crate) async fn handed_over(&self) -> (u64, u64) {
        let bytes = async |output: &Option<Handover>| match output {
            Some(output) => output.bytes().await,
            None => 0,
        };
        (bytes(&self.stdout).await, bytes(&self.stderr).await)
    }

    /// Connects a terminal.
    pub(crate) fn terminal(streams: Streams, terminal: Terminal, exit: &Exit) -> Self {
        if let Some(stream) = streams.stdin {
            tokio::spawn(relay::input(stream, terminal.0.clone()));
        }
        let stdout = streams.stdout.map(|stream| hand_over(stream, terminal.0.clone(), exit));
        Self { terminal: Some(terminal), stdout, stderr: None }
    }
}

fn hand_over(stream: Stream, source: Arc<AsyncFd<OwnedFd>>, exit: &Exit) -> Handover {
    let (report, handed) = watch::channel(None);
    tokio::spawn(relay::output(source, stream, exit.clone(), report, relay::Until::End));
    Handover(handed)
}

fn pollable(file: OwnedFd, interest: Interest) -> io::Result<Arc<AsyncFd<OwnedFd>>> {
    rustix::io::ioctl_fionbio(&file, true)?;
    Ok(Arc::new(readiness::watch(file, interest)?))
}

fn pipe() -> io::Result<(OwnedFd, OwnedFd)> {
    let (read, write) = rustix::pipe::pipe_with(PipeFlags::CLOEXEC)?;
    rustix::pipe::fcntl_setpipe_size(&write, PIPE_SIZE)?;
    Ok((read, write))
}

fn owned_by(file: OwnedFd, (uid, gid): Owner) -> io::Result<OwnedFd> {
    rustix::fs::fchown(&file, Some(uid), Some(gid))?;
    Ok(file)
}

fn null() -> io::Result<OwnedFd> {
    Ok(rustix::fs::open("/dev/null", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty())?)
}
