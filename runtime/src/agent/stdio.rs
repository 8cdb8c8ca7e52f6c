//! A guest process's stdio, joined to descriptors of the host: one stream each, never a request.

use std::any::Any;
use std::io;
use std::os::fd::{AsFd, OwnedFd};

use tokio::fs::File;
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};
use tokio::net::UnixStream;
use tokio::net::unix::pipe;
use tokio::sync::watch;
use tokio::task::JoinSet;

use super::preserved::Preserved;
use super::splice::{self, Progress};
use super::streams::Streams;
use super::{ANSWER_LIMIT, Output};
use crate::host::terminal::{self, Size};
use crate::vmm::ByteStream;

/// How much is read and written at once, in bytes.
const PIECE: usize = 128 * 1024;

/// What a process's stdin is read from.
pub type Source = Box<dyn AsyncRead + Send + Unpin>;
/// What a process's output is written to.
pub enum Sink {
    /// A file of any kind, which may be shared with other processes, and stays as blocking as it is.
    File(OwnedFd),
    /// A pipe of this process's own.
    Pipe(pipe::Sender),
    /// Anything else.
    Stream(Box<dyn AsyncWrite + Send + Unpin>),
}

impl Sink {
    /// The same, for whoever has the bytes in hand.
    pub fn into_writer(self) -> Box<dyn AsyncWrite + Send + Unpin> {
        match self {
            Self::File(descriptor) => file(descriptor),
            Self::Pipe(pipe) => Box::new(pipe),
            Self::Stream(stream) => stream,
        }
    }
}

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
            stdout: duplicate(&io::stdout())?.map(Sink::File),
            // A terminal has one output.
            stderr: if terminal { None } else { duplicate(&io::stderr())?.map(Sink::File) },
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
            stdout: Some(Sink::File(slave.try_clone()?)),
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

impl Relay {
    /// Joins streams to what they were opened for.
    pub fn join(descriptors: Descriptors, streams: Streams) -> Self {
        let mut relay = Self {
            stdin: descriptors.stdin.zip(streams.stdin),
            stdout: descriptors.stdout.zip(streams.stdout),
            stderr: descriptors.stderr.zip(streams.stderr),
            inputs: Vec::new(),
            outputs: Vec::new(),
            lifeline: streams.lifeline,
        };
        for (Preserved { source, sink }, (input, output)) in descriptors.preserved.into_iter().zip(streams.preserved) {
            relay.inputs.extend(source.zip(input));
            relay.outputs.extend(sink.zip(output));
        }
        relay
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

impl Carried {
    /// So many bytes more are written.
    fn advance(&mut self, length: usize) {
        self.bytes += length as u64;
        self.writing = false;
    }
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

async fn receive(stream: ByteStream, output: Sink, report: watch::Sender<Carried>) {
    // An error is the output's. With it the stream is reset, and the guest's process gets the SIGPIPE that it would have
    // got here.
    let _ = carry(stream, output, &report).await;
    report.send_modify(|carried| carried.ended = true);
}

async fn carry(stream: ByteStream, output: Sink, report: &watch::Sender<Carried>) -> io::Result<()> {
    let any: &dyn Any = &*stream;
    match (output, any.downcast_ref::<UnixStream>()) {
        (Sink::File(pipe), Some(socket)) if is_pipe(&pipe) => splice(socket, pipe, report).await,
        (Sink::Pipe(pipe), Some(socket)) => splice(socket, pipe.into_nonblocking_fd()?, report).await,
        (output, _) => copy(stream, output.into_writer(), report).await,
    }
}

async fn splice(socket: &UnixStream, pipe: OwnedFd, report: &watch::Sender<Carried>) -> io::Result<()> {
    let tell = |progress| {
        report.send_modify(|carried| match progress {
            Progress::Moved(length) => carried.advance(length),
            Progress::Full => carried.writing = true,
            Progress::Changed => {}
        });
    };
    splice::all(socket, pipe, tell).await
}

async fn copy(
    mut stream: ByteStream,
    mut output: impl AsyncWrite + Unpin,
    report: &watch::Sender<Carried>,
) -> io::Result<()> {
    let mut piece = vec![0; PIECE];
    while let Ok(length @ 1..) = stream.read(&mut piece).await {
        report.send_modify(|carried| carried.writing = true);
        output.write_all(&piece[..length]).await?;
        output.flush().await?;
        report.send_modify(|carried| carried.advance(length));
    }
    Ok(())
}

fn is_pipe(descriptor: impl AsFd) -> bool {
    rustix::fs::fstat(descriptor)
        .is_ok_and(|stat| rustix::fs::FileType::from_raw_mode(stat.st_mode) == rustix::fs::FileType::Fifo)
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::duplex;

    /// A guest's stream, the host's end of it being carried into a pipe: the stream, the pipe's reader, the report.
    fn carrying(spliced: bool) -> (ByteStream, io::PipeReader, watch::Receiver<Carried>) {
        let (ours, guest): (ByteStream, ByteStream) = if spliced {
            let (ours, guest) = UnixStream::pair().unwrap();
            (Box::new(ours), Box::new(guest))
        } else {
            let (ours, guest) = duplex(PIECE);
            (Box::new(ours), Box::new(guest))
        };
        let (reader, writer) = io::pipe().unwrap();
        let (report, carried) = watch::channel(Carried::default());
        tokio::spawn(receive(ours, Sink::File(writer.into()), report));
        (guest, reader, carried)
    }

    #[tokio::test(start_paused = true)]
    async fn output_that_a_guest_owes_is_not_waited_for_without_end() {
        for spliced in [false, true] {
            let (mut guest, _reader, carried) = carrying(spliced);
            guest.write_all(b"some").await.unwrap();
            drain(carried.clone(), Some(u64::MAX)).await;
            assert_eq!(carried.borrow().bytes, 4);
        }
    }

    #[tokio::test]
    async fn a_reader_is_waited_for_as_long_as_it_takes() {
        use std::io::Read as _;
        for spliced in [false, true] {
            let (mut guest, mut reader, mut carried) = carrying(spliced);
            // More than a pipe and a socket hold.
            let output = vec![b'x'; 1 << 20];
            let writing = tokio::spawn(async move {
                guest.write_all(&output).await.unwrap();
                guest
            });
            carried.wait_for(|carried| carried.writing).await.unwrap();
            tokio::time::pause();
            let draining = tokio::spawn(drain(carried, Some(1 << 20)));
            // Time goes by.
            tokio::time::advance(10 * ANSWER_LIMIT).await;
            assert!(!draining.is_finished());
            tokio::time::resume();
            let read = tokio::task::spawn_blocking(move || reader.read_exact(&mut vec![0; 1 << 20]));
            read.await.unwrap().unwrap();
            draining.await.unwrap();
            drop(writing.await.unwrap());
        }
    }

    #[tokio::test]
    async fn what_comes_is_what_arrives_and_then_its_end() {
        use std::io::Read as _;
        for spliced in [false, true] {
            let (mut guest, mut reader, mut carried) = carrying(spliced);
            let output: Vec<u8> = (0..3_000_001_u32).map(|index| (index % 251) as u8).collect();
            let read = tokio::task::spawn_blocking(move || {
                let mut seen = Vec::new();
                reader.read_to_end(&mut seen).map(|_| seen)
            });
            for piece in output.chunks(77_777) {
                guest.write_all(piece).await.unwrap();
            }
            drop(guest);
            assert!(read.await.unwrap().unwrap() == output);
            assert_eq!(carried.wait_for(|carried| carried.ended).await.unwrap().bytes, 3_000_001);
        }
    }

    /// Both ends of what is spliced change while it is looked at.
    #[tokio::test]
    async fn nothing_is_overlooked_between_two_that_are_quick() {
        use std::io::{Read as _, Write as _};
        const TOTAL: usize = 64 << 20;
        let (ours, mut guest) = std::os::unix::net::UnixStream::pair().unwrap();
        ours.set_nonblocking(true).unwrap();
        let (mut reader, writer) = io::pipe().unwrap();
        let (report, mut carried) = watch::channel(Carried::default());
        tokio::spawn(receive(Box::new(UnixStream::from_std(ours).unwrap()), Sink::File(writer.into()), report));
        let writing = std::thread::spawn(move || (0..TOTAL / 4096).try_for_each(|_| guest.write_all(&[0; 4096])));
        let reading = std::thread::spawn(move || io::copy(&mut reader.by_ref().take(TOTAL as u64), &mut io::sink()));
        let all = carried.wait_for(|carried| carried.bytes == TOTAL as u64);
        tokio::time::timeout(std::time::Duration::from_secs(120), all).await.unwrap().unwrap();
        writing.join().unwrap().unwrap();
        assert_eq!(reading.join().unwrap().unwrap(), TOTAL as u64);
    }

    #[tokio::test]
    async fn who_writes_for_nobody_learns_it() {
        for spliced in [false, true] {
            let (mut guest, reader, _carried) = carrying(spliced);
            drop(reader);
            guest.write_all(b"some").await.unwrap();
            assert_eq!(guest.read(&mut [0; 1]).await.unwrap_or_default(), 0);
        }
    }
}
