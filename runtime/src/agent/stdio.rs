//! A guest process's stdio, joined to descriptors of the host: one stream each, never a request.

use std::io;
use std::os::fd::{AsFd, OwnedFd};

use runvm_protocol::agent as wire;
use tokio::fs::File;
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};
use tokio::sync::watch;
use tokio::task::JoinSet;

use super::preserved::Preserved;
use super::{ANSWER_LIMIT, Agent, AgentError, Output};
use crate::host::terminal::{self, Size};
use crate::vmm::ByteStream;

/// How much is read and written at once, in bytes.
const PIECE: usize = 128 * 1024;

/// What a process's stdin is read from.
pub type Source = Box<dyn AsyncRead + Send + Unpin>;
/// What a process's output is written to.
pub type Sink = Box<dyn AsyncWrite + Send + Unpin>;

/// The host's side of a process's stdio. Of what there is none of, the process has its `/dev/null`.
#[derive(Default)]
pub struct Descriptors {
    /// Where it reads.
    pub stdin: Option<Source>,
    /// Where it writes; with a terminal, all that it does.
    pub stdout: Option<Sink>,
    /// Where it complains.
    pub stderr: Option<Sink>,
    /// That of its terminal.
    pub size: Size,
    /// What else it has open, from descriptor 3 on.
    pub preserved: Vec<Preserved>,
}

impl Descriptors {
    /// The stdio of this process. `/dev/null` is left out: the guest has its own.
    ///
    /// # Errors
    /// Those of dup(2).
    pub fn inherited(terminal: bool) -> io::Result<Self> {
        let duplicate = |descriptor: &dyn AsFd| -> io::Result<Option<OwnedFd>> {
            match is_null(descriptor.as_fd()) {
                true => Ok(None),
                false => descriptor.as_fd().try_clone_to_owned().map(Some),
            }
        };
        Ok(Self {
            stdin: duplicate(&io::stdin())?.map(|descriptor| file(descriptor) as Source),
            stdout: duplicate(&io::stdout())?.map(|descriptor| file(descriptor) as Sink),
            // A terminal has one output.
            stderr: if terminal { None } else { duplicate(&io::stderr())?.map(|descriptor| file(descriptor) as Sink) },
            size: if terminal { terminal::size(io::stdin()) } else { Size::default() },
            preserved: Vec::new(),
        })
    }

    /// Both directions of a terminal.
    ///
    /// # Errors
    /// Those of dup(2).
    pub fn terminal(slave: &OwnedFd) -> io::Result<Self> {
        Ok(Self {
            stdin: Some(file(slave.try_clone()?)),
            stdout: Some(file(slave.try_clone()?)),
            stderr: None,
            size: terminal::size(slave),
            preserved: Vec::new(),
        })
    }

    /// The same with these descriptors from 3 on.
    ///
    /// # Errors
    /// Those of dup(2).
    pub fn with(mut self, preserved: Vec<OwnedFd>) -> io::Result<Self> {
        self.preserved = preserved.into_iter().map(Preserved::new).collect::<io::Result<_>>()?;
        Ok(self)
    }
}

fn is_null(descriptor: impl AsFd) -> bool {
    let null = rustix::fs::makedev(1, 3);
    rustix::fs::fstat(descriptor)
        .is_ok_and(|stat| stat.st_rdev == null && rustix::fs::FileType::from_raw_mode(stat.st_mode).is_char_device())
}

/// The joined streams of one process.
pub struct Relay {
    stdin: Option<Joined<Source>>,
    stdout: Option<Joined<Sink>>,
    stderr: Option<Joined<Sink>>,
    inputs: Vec<Joined<Source>>,
    outputs: Vec<Joined<Sink>>,
    /// As long as this is open, the guest's process has somebody to run for.
    lifeline: Option<ByteStream>,
}

/// An end on the host and the stream that it is joined to.
type Joined<End> = (End, ByteStream);

/// What there may be of an end and its stream, and the stream's key, which is empty where there is none.
struct Joint<End> {
    joined: Option<Joined<End>>,
    key: String,
}

async fn join<End>(agent: &Agent, end: Option<End>, key: String) -> Result<Joint<End>, AgentError> {
    let Some(end) = end else { return Ok(Joint { joined: None, key: String::new() }) };
    let stream = agent.open_stdio(&key).await?;
    Ok(Joint { joined: Some((end, stream)), key })
}

impl Relay {
    /// Opens the streams of a process; `key` tells its streams from any other's. The answer names them to the agent.
    ///
    /// # Errors
    /// [`AgentError`].
    pub async fn open(
        agent: &Agent,
        key: &str,
        descriptors: Descriptors,
        lifeline: bool,
    ) -> Result<(Self, wire::Stdio), AgentError> {
        let (stdin, stdout, stderr, lifeline) = tokio::try_join!(
            join(agent, descriptors.stdin, format!("{key}/stdin")),
            join(agent, descriptors.stdout, format!("{key}/stdout")),
            join(agent, descriptors.stderr, format!("{key}/stderr")),
            join(agent, lifeline.then_some(()), format!("{key}/life")),
        )?;
        let (mut inputs, mut outputs, mut preserved) = (Vec::new(), Vec::new(), Vec::new());
        for (index, Preserved { source, sink }) in descriptors.preserved.into_iter().enumerate() {
            let (input, output) = tokio::try_join!(
                join(agent, source, format!("{key}/in/{index}")),
                join(agent, sink, format!("{key}/out/{index}")),
            )?;
            inputs.extend(input.joined);
            outputs.extend(output.joined);
            preserved.push(wire::Preserved { input: input.key, output: output.key, ..Default::default() });
        }
        let named = wire::Stdio {
            terminal_rows: descriptors.size.rows.into(),
            terminal_columns: descriptors.size.columns.into(),
            stdin: stdin.key,
            stdout: stdout.key,
            stderr: stderr.key,
            lifeline: lifeline.key,
            preserved,
            ..Default::default()
        };
        let relay = Self {
            stdin: stdin.joined,
            stdout: stdout.joined,
            stderr: stderr.joined,
            inputs,
            outputs,
            lifeline: lifeline.joined.map(|((), stream)| stream),
        };
        Ok((relay, named))
    }

    /// Begins to move bytes.
    pub fn start(self) -> RunningRelay {
        let mut carriers = JoinSet::new();
        for (input, stream) in self.stdin.into_iter().chain(self.inputs) {
            carriers.spawn(send(input, stream));
        }
        let mut carry = |output: Option<Joined<Sink>>| {
            output.map(|(sink, stream)| {
                let (report, carried) = watch::channel(Carried::default());
                carriers.spawn(receive(stream, sink, report));
                carried
            })
        };
        let (stdout, stderr) = (carry(self.stdout), carry(self.stderr));
        let preserved = self.outputs.into_iter().filter_map(|output| carry(Some(output))).collect();
        RunningRelay { stdout, stderr, preserved, _carriers: carriers, _lifeline: self.lifeline }
    }
}

/// The moving streams of one process. They rest once this is gone.
pub struct RunningRelay {
    stdout: Option<watch::Receiver<Carried>>,
    stderr: Option<watch::Receiver<Carried>>,
    /// They end with the process.
    preserved: Vec<watch::Receiver<Carried>>,
    _carriers: JoinSet<()>,
    _lifeline: Option<ByteStream>,
}

impl RunningRelay {
    /// Returns when that much output has been written, or all that there is, however slow its reader is. A guest that
    /// owes some is waited for as for any answer.
    pub async fn drained(&self, output: Output) {
        for (carried, wanted) in [(&self.stdout, output.stdout), (&self.stderr, output.stderr)] {
            if let Some(carried) = carried {
                drain(carried.clone(), Some(wanted)).await;
            }
        }
        for carried in &self.preserved {
            drain(carried.clone(), None).await;
        }
    }

    /// Returns when all who could write have closed their ends, which children of the process may do much later than it.
    pub async fn closed(&self) {
        for carried in [&self.stdout, &self.stderr].into_iter().flatten() {
            // An error means the same: the carrier has ended.
            let _ = carried.clone().wait_for(|carried| carried.ended).await;
        }
    }
}

/// Waits for that much of an output, or for its end.
async fn drain(mut carried: watch::Receiver<Carried>, wanted: Option<u64>) {
    loop {
        let before = carried.borrow().bytes;
        let arrived = carried.wait_for(|carried| carried.ended || wanted.is_some_and(|wanted| carried.bytes >= wanted));
        // An error means that the carrier has ended: nothing more will come.
        if tokio::time::timeout(ANSWER_LIMIT, arrived).await.is_ok() {
            return;
        }
        let now = carried.borrow();
        if now.bytes == before && !now.writing {
            tracing::warn!("the guest owes output, and does not send it: {} bytes have come", now.bytes);
            return;
        }
    }
}

/// How far an output has come.
#[derive(Debug, Default)]
struct Carried {
    bytes: u64,
    /// Its reader is waited for, and not the guest.
    writing: bool,
    ended: bool,
}

pub(super) fn file(descriptor: OwnedFd) -> Box<File> {
    // Any kind of file must do, and the descriptions are shared with other processes, so they stay blocking: the reads
    // and writes are made on threads of the runtime's pool.
    let mut file = File::from_std(descriptor.into());
    file.set_max_buf_size(PIECE);
    Box::new(file)
}

async fn send(mut input: Source, mut stream: ByteStream) {
    let mut piece = vec![0; PIECE];
    loop {
        match input.read(&mut piece).await {
            Ok(length @ 1..) => {
                if stream.write_all(&piece[..length]).await.is_err() || stream.flush().await.is_err() {
                    return;
                }
            }
            // A terminal whose master is closed answers with an error: the same end.
            Ok(0) | Err(_) => {
                let _ = stream.shutdown().await;
                return;
            }
        }
    }
}

async fn receive(mut stream: ByteStream, mut output: Sink, report: watch::Sender<Carried>) {
    let mut piece = vec![0; PIECE];
    while let Ok(length @ 1..) = stream.read(&mut piece).await {
        report.send_modify(|carried| carried.writing = true);
        if output.write_all(&piece[..length]).await.is_err() || output.flush().await.is_err() {
            // Dropping the stream resets it, and the guest's process gets the SIGPIPE that it would have got here.
            break;
        }
        report.send_modify(|carried| {
            carried.bytes += length as u64;
            carried.writing = false;
        });
    }
    report.send_modify(|carried| carried.ended = true);
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::{DuplexStream, duplex};

    /// A guest's stream, the host's end of it being carried into a pipe: the stream, the pipe's reader, the report.
    fn carrying() -> (DuplexStream, io::PipeReader, watch::Receiver<Carried>) {
        let (ours, guest) = duplex(PIECE);
        let (reader, writer) = io::pipe().unwrap();
        let (report, carried) = watch::channel(Carried::default());
        tokio::spawn(receive(Box::new(ours), file(writer.into()), report));
        (guest, reader, carried)
    }

    #[tokio::test(start_paused = true)]
    async fn output_that_a_guest_owes_is_not_waited_for_without_end() {
        let (mut guest, _reader, carried) = carrying();
        guest.write_all(b"some").await.unwrap();
        drain(carried.clone(), Some(u64::MAX)).await;
        assert_eq!(carried.borrow().bytes, 4);
    }

    #[tokio::test]
    async fn a_reader_is_waited_for_as_long_as_it_takes() {
        use std::io::Read as _;
        let (mut guest, mut reader, mut carried) = carrying();
        let output = vec![b'x'; PIECE];
        guest.write_all(&output).await.unwrap();
        carried.wait_for(|carried| carried.writing).await.unwrap();
        tokio::time::pause();
        let draining = tokio::spawn(drain(carried, Some(PIECE as u64)));
        // The pipe holds less, and time goes by.
        tokio::time::advance(10 * ANSWER_LIMIT).await;
        assert!(!draining.is_finished());
        tokio::time::resume();
        let read = tokio::task::spawn_blocking(move || reader.read_exact(&mut vec![0; PIECE]));
        read.await.unwrap().unwrap();
        draining.await.unwrap();
    }
}
