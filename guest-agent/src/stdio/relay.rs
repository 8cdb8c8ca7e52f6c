//! The loops that carry bytes between a process and the host.

use std::future::pending;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use rustix::fs::FileType;
use rustix::pipe::SpliceFlags;
use tokio::io::unix::AsyncFd;
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWriteExt as _, Interest};
use tokio::sync::watch;

use super::Stream;
use crate::reaper::Exit;

/// How much is carried in one step, and all that is held of a stream here.
const CHUNK: usize = 64 * 1024;

/// Carries the host's bytes to the process until either is done. Letting go of `sink` closes a pipe; a terminal has
/// its other users.
pub(super) async fn input(mut stream: Stream, sink: Arc<AsyncFd<OwnedFd>>) {
    let mut buffer = vec![0; CHUNK];
    while let Ok(read @ 1..) = stream.read(&mut buffer).await {
        if write_all(&sink, &buffer[..read]).await.is_err() {
            return;
        }
    }
}

/// How long an output is carried.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Until {
    /// Until nobody has it open any more.
    End,
    /// Until the process has ended, and all that it wrote is handed over.
    Exit,
}

/// Carries the process's bytes to the host until the process's side ends. Reports how many it has carried when all
/// is done that the process wrote until its end.
///
/// While the process lives, a host that goes away takes the pipe with it, and the process learns of it when it
/// writes. What outlives the process (a child in the background that still holds the pipe) is not punished so: its
/// bytes then go nowhere.
pub(super) async fn output(
    source: Arc<AsyncFd<OwnedFd>>,
    stream: Stream,
    exit: Exit,
    report: watch::Sender<Option<u64>>,
    until: Until,
) {
    let mut host = Some(Host::of(stream, source.get_ref()));
    let mut buffer = vec![0; CHUNK];
    let mut carried = 0;
    // How much of what was in the pipe at the process's end is still to be carried.
    let mut due = None;
    loop {
        let (stream, socket) = match &mut host {
            Some(Host { stream, socket }) => (Some(stream), socket.as_ref()),
            None => (None, None),
        };
        let step = tokio::select! {
            _ = exit.status(), if due.is_none() => {
                due = Some(rustix::io::ioctl_fionread(source.get_ref()).unwrap_or_default());
                Step::Read(0)
            }
            step = source.async_io(Interest::READABLE, |file| Step::take(file, socket, &mut buffer)) => {
                match step {
                    Ok(step @ (Step::Read(1..) | Step::Spliced(1..))) => step,
                    // A terminal that nobody has open says EIO.
                    _ => break,
                }
            }
            () = gone(stream) => {
                host = None;
                Step::Read(0)
            }
        };
        let taken = match step {
            Step::Spliced(spliced) => {
                carried += spliced as u64;
                spliced
            }
            Step::Read(read) => {
                if let Some(Host { stream, .. }) = &mut host {
                    match stream.write_all(&buffer[..read]).await {
                        Ok(()) => carried += read as u64,
                        Err(_) => host = None,
                    }
                }
                read
            }
        };
        if host.is_none() && !exit.happened() {
            break;
        }
        if let Some(due) = &mut due {
            *due = due.saturating_sub(taken as u64);
            if *due == 0 || host.is_none() {
                report.send_replace(Some(carried));
                if until == Until::Exit {
                    break;
                }
            }
        }
    }
    drop(source);
    if let Some(Host { mut stream, .. }) = host {
        let _ = stream.shutdown().await;
    }
    report.send_replace(Some(carried));
}

/// Where an output goes.
struct Host {
    stream: Stream,
    /// The same, where what is in a pipe can go into it without a copy.
    socket: Option<OwnedFd>,
}

impl Host {
    fn of(stream: Stream, source: &OwnedFd) -> Self {
        let socket = stream.socket().filter(|_| is_pipe(source)).and_then(|socket| socket.try_clone_to_owned().ok());
        Self { stream, socket }
    }
}

/// What an output had.
enum Step {
    /// So many bytes are in the buffer.
    Read(usize),
    /// So many are on their way to the host.
    Spliced(usize),
}

impl Step {
    /// `WouldBlock` is the source's alone.
    fn take(source: &OwnedFd, socket: Option<&OwnedFd>, buffer: &mut [u8]) -> io::Result<Self> {
        let splice = |socket| rustix::pipe::splice(source, None, socket, None, CHUNK, SpliceFlags::NONBLOCK);
        match socket.map(splice) {
            Some(Ok(spliced)) => Ok(Self::Spliced(spliced)),
            // There is nothing, or the host has no room, which is waited for with bytes in hand.
            Some(Err(_)) | None => Ok(Self::Read(rustix::io::read(source, buffer)?)),
        }
    }
}

fn is_pipe(file: &OwnedFd) -> bool {
    rustix::fs::fstat(file).is_ok_and(|stat| FileType::from_raw_mode(stat.st_mode) == FileType::Fifo)
}

/// Waits until the host lets go of the stream of an output. It has nothing to say on it.
async fn gone(stream: Option<&mut Stream>) {
    if let Some(stream) = stream {
        while let Ok(1..) = stream.read(&mut [0; 64]).await {}
        if stream.is_gone() {
            return;
        }
    }
    pending().await
}

/// Waits until the host hangs up a lifeline, in whichever way.
pub(crate) async fn hang_up(mut lifeline: impl AsyncRead + Unpin) {
    while let Ok(1..) = lifeline.read(&mut [0; 64]).await {}
}

async fn write_all(sink: &AsyncFd<OwnedFd>, mut bytes: &[u8]) -> io::Result<()> {
    while !bytes.is_empty() {
        let written = sink.async_io(Interest::WRITABLE, |file| Ok(rustix::io::write(file.as_fd(), bytes)?)).await?;
        bytes = &bytes[written..];
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::super::HostStream;
    use super::*;
    use crate::readiness;
    use crate::reaper::Reaper;
    use rustix::pipe::{PipeFlags, pipe_with};
    use rustix::process::Pid;
    use std::io::{Read as _, Write as _};
    use std::os::fd::BorrowedFd;
    use tokio::io::DuplexStream;
    use tokio::net::UnixStream;

    impl HostStream for DuplexStream {
        /// The other end of a duplex pipe closes both directions at once.
        fn is_gone(&self) -> bool {
            true
        }
    }

    impl HostStream for UnixStream {
        fn is_gone(&self) -> bool {
            true
        }

        fn socket(&self) -> Option<BorrowedFd<'_>> {
            Some(self.as_fd())
        }
    }

    /// A pipe with the agent's end first.
    fn pipe(agent_reads: bool) -> (Arc<AsyncFd<OwnedFd>>, std::fs::File) {
        let (read, write) = pipe_with(PipeFlags::CLOEXEC).unwrap();
        let (ours, theirs) = if agent_reads { (read, write) } else { (write, read) };
        rustix::io::ioctl_fionbio(&ours, true).unwrap();
        let interest = if agent_reads { Interest::READABLE } else { Interest::WRITABLE };
        (Arc::new(readiness::watch(ours, interest).unwrap()), theirs.into())
    }

    struct Running {
        process: std::fs::File,
        host: DuplexStream,
        reaper: Reaper,
        handed: watch::Receiver<Option<u64>>,
    }

    const PID: i32 = 7;

    fn start_output(until: Until) -> Running {
        let (source, process) = pipe(true);
        let (stream, host) = tokio::io::duplex(1 << 20);
        let reaper = Reaper::default();
        let exit = reaper.watch(Pid::from_raw(PID).unwrap());
        let (report, handed) = watch::channel(None);
        tokio::spawn(output(source, Box::new(stream), exit, report, until));
        Running { process, host, reaper, handed }
    }

    #[tokio::test]
    async fn output_is_handed_over_when_its_end_is_reached() {
        let mut running = start_output(Until::End);
        running.process.write_all(b"hello").unwrap();
        drop(running.process);
        let mut seen = Vec::new();
        running.host.read_to_end(&mut seen).await.unwrap();
        assert_eq!(seen, b"hello");
        assert_eq!(*running.handed.wait_for(Option::is_some).await.unwrap(), Some(5));
    }

    #[tokio::test]
    async fn what_is_spliced_arrives_whole_at_a_host_with_little_room() {
        let (source, mut process) = pipe(true);
        let (stream, mut host) = UnixStream::pair().unwrap();
        let exit = Reaper::default().watch(Pid::from_raw(PID).unwrap());
        let (report, mut handed) = watch::channel(None);
        tokio::spawn(output(source, Box::new(stream), exit, report, Until::End));
        let written: Vec<u8> = (0..3_000_001_u32).map(|index| (index % 251) as u8).collect();
        let expected = written.clone();
        let writing = tokio::task::spawn_blocking(move || process.write_all(&written));
        let mut seen = Vec::new();
        host.read_to_end(&mut seen).await.unwrap();
        assert!(seen == expected);
        writing.await.unwrap().unwrap();
        assert_eq!(*handed.wait_for(Option::is_some).await.unwrap(), Some(3_000_001));
    }

    #[tokio::test]
    async fn a_child_in_the_background_outlives_the_host() {
        let mut running = start_output(Until::End);
        running.process.write_all(b"last words").unwrap();
        running.reaper.ended(PID, 0);
        assert_eq!(*running.handed.wait_for(Option::is_some).await.unwrap(), Some(10));
        running.process.write_all(b"more").unwrap();
        let mut seen = [0; 14];
        running.host.read_exact(&mut seen).await.unwrap();
        assert_eq!(&seen, b"last wordsmore", "what comes later is still carried");
        drop(running.host);
        for _ in 0..100 {
            tokio::task::yield_now().await;
            running.process.write_all(&[0; 1024]).unwrap();
        }
    }

    #[tokio::test]
    async fn what_outlives_a_process_may_be_cut_off() {
        let mut running = start_output(Until::Exit);
        running.process.write_all(b"last words").unwrap();
        running.reaper.ended(PID, 0);
        let mut seen = Vec::new();
        running.host.read_to_end(&mut seen).await.unwrap();
        assert_eq!(seen, b"last words");
        assert_eq!(running.process.write_all(b"?").unwrap_err().kind(), io::ErrorKind::BrokenPipe);
    }

    #[tokio::test]
    async fn a_process_learns_that_its_reader_has_gone() {
        let mut running = start_output(Until::End);
        drop(running.host);
        let mut reader_gone = running.handed.clone();
        reader_gone.wait_for(Option::is_some).await.unwrap();
        assert_eq!(running.process.write_all(b"?").unwrap_err().kind(), io::ErrorKind::BrokenPipe);
    }

    #[tokio::test]
    async fn the_end_of_the_hosts_input_is_the_processes() {
        let (sink, mut process) = pipe(false);
        let (stream, mut host) = tokio::io::duplex(64);
        let carrying = tokio::spawn(input(Box::new(stream), sink));
        host.write_all(b"input").await.unwrap();
        host.shutdown().await.unwrap();
        carrying.await.unwrap();
        let mut seen = String::new();
        process.read_to_string(&mut seen).unwrap();
        assert_eq!(seen, "input");
    }

    #[tokio::test]
    async fn input_that_nobody_reads_waits_in_its_bounds() {
        let (sink, process) = pipe(false);
        let (stream, mut host) = tokio::io::duplex(64);
        let carrying = tokio::spawn(input(Box::new(stream), sink));
        let flood = tokio::spawn(async move { host.write_all(&vec![0; 8 << 20]).await });
        tokio::task::yield_now().await;
        assert!(!carrying.is_finished() && !flood.is_finished());
        drop(process);
        carrying.await.unwrap();
        assert!(flood.await.unwrap().is_err());
    }
}
