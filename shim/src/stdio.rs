//! A process's stdio as containerd names it: fifos, files, programs that log, and streams of the shim's own.
//!
//! A fifo of output is opened once its reader has come: whoever opens one for reading after its last writer has left waits
//! for ever, and engines open theirs while the process may already be at its end. From then on it is held open for reading,
//! too: its reader may go and come again, and what was written meanwhile is there. One of input is held open for writing
//! until `CloseIO`, so that it does not end with the first client that leaves.

mod logger;

use std::fs::{DirBuilder, File, OpenOptions};
use std::io;
use std::os::unix::fs::{DirBuilderExt as _, FileTypeExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::time::Duration;

use percent_encoding::percent_decode_str;
use runvm::agent::{Descriptors, Sink};
use runvm::host::terminal::Size;
use rustix::fs::OFlags;
use rustix::io::Errno;
use thiserror::Error;
use tokio::net::unix::pipe;
use tokio::task::spawn_blocking;
use tokio::time::timeout;

use crate::streams::{Claim, OpenInput, StreamError, Streams};

use logger::Program;

pub use logger::{Logger, LoggerError};

/// How long the reader of an output is waited for before the process begins without one.
const READER_LIMIT: Duration = Duration::from_secs(10);

/// What containerd names.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Stdio {
    /// Where the process reads; empty for nothing, as the others.
    pub stdin: String,
    /// Where it writes.
    pub stdout: String,
    /// Where it complains.
    pub stderr: String,
    /// Whether it has a terminal, whose bytes the first two carry.
    pub terminal: bool,
}

/// The same, opened.
#[derive(Default)]
pub struct Opened {
    /// The ends that the process is joined to.
    pub descriptors: Descriptors,
    /// What keeps stdin from ending.
    pub stdin: Option<OpenStdin>,
    /// Its streams.
    pub claims: Vec<Claim>,
    /// The program that takes the output.
    pub logger: Option<Logger>,
}

/// As long as this is there a stdin does not end with the client that leaves.
pub enum OpenStdin {
    /// The fifo, for writing.
    Fifo(#[expect(dead_code, reason = "it is open")] File),
    /// The stream.
    Stream(#[expect(dead_code, reason = "it is open")] OpenInput),
}

/// Why a stdio cannot be used.
#[derive(Debug, Error)]
pub enum StdioError {
    /// A file or a fifo.
    #[error("cannot open {path}", path = .0.display())]
    Open(PathBuf, #[source] io::Error),
    /// A scheme that is not known.
    #[error("the stdio {0} is not supported: give fifos, a file:// or binary:// address, or streams of this shim's")]
    Scheme(String),
    /// A program that logs.
    #[error(transparent)]
    Logger(#[from] LoggerError),
    /// A stream.
    #[error(transparent)]
    Stream(#[from] StreamError),
}

impl Stdio {
    /// Opens all of it, for the container `id` in containerd's `namespace`.
    ///
    /// # Errors
    /// [`StdioError`].
    pub async fn open(&self, id: &str, namespace: &str, size: Size, streams: &Streams) -> Result<Opened, StdioError> {
        let mut opened = Opened::default();
        opened.descriptors.size = size;
        if let Some(stream) = streams.named(&self.stdin) {
            let (source, open, claim) = streams.input(&stream)?;
            opened.descriptors.stdin = Some(source);
            opened.stdin = Some(OpenStdin::Stream(open));
            opened.claims.push(claim);
        } else if !self.stdin.is_empty() {
            let path = Path::new(&self.stdin);
            let input = pipe::OpenOptions::new().open_receiver(path);
            opened.descriptors.stdin = Some(Box::new(input.map_err(open_error(path))?));
            // Its reader is the one above.
            opened.stdin = Some(OpenStdin::Fifo(open_for_writing(path).map_err(open_error(path))?));
        }
        let stderr = if self.terminal { "" } else { self.stderr.as_str() };
        match Output::parse(&self.stdout)? {
            // It takes both.
            Output::Program(program) => {
                let (logger, stdout, stderr) = program.start(id, namespace, self.terminal).await?;
                opened.descriptors.stdout = Some(stdout);
                opened.descriptors.stderr = stderr;
                opened.logger = Some(logger);
            }
            Output::File(path) => {
                opened.descriptors.stdout = Some(append(&path, true)?);
                opened.descriptors.stderr = (!self.terminal).then(|| append(&path, true)).transpose()?;
            }
            stdout => {
                opened.descriptors.stdout = stdout.open(streams, &mut opened.claims).await?;
                opened.descriptors.stderr = Output::parse(stderr)?.open(streams, &mut opened.claims).await?;
            }
        }
        Ok(opened)
    }
}

/// Where output goes.
#[derive(Debug, PartialEq, Eq)]
enum Output {
    Nowhere,
    /// A fifo, or a file that is there.
    Path(PathBuf),
    /// A file, that is made where it is not there.
    File(PathBuf),
    Program(Program),
    /// A stream of a shim's.
    Stream(String),
}

impl Output {
    fn parse(text: &str) -> Result<Self, StdioError> {
        if text.is_empty() {
            return Ok(Self::Nowhere);
        }
        let (scheme, rest) = text.split_once("://").unwrap_or(("fifo", text));
        let (path, query) = rest.split_once('?').unwrap_or((rest, ""));
        let decoded = || PathBuf::from(decode(path));
        match scheme {
            "fifo" if rest == text => Ok(Self::Path(text.into())),
            "fifo" => Ok(Self::Path(decoded())),
            "file" => Ok(Self::File(decoded())),
            "binary" => Ok(Self::Program(Program { path: decoded(), arguments: arguments(query) })),
            "ttrpc+unix" => Ok(Self::Stream(text.to_owned())),
            _ => Err(StdioError::Scheme(text.to_owned())),
        }
    }

    async fn open(&self, streams: &Streams, claims: &mut Vec<Claim>) -> Result<Option<Sink>, StdioError> {
        match self {
            Self::Stream(address) => {
                let stream = streams.named(address).ok_or_else(|| StdioError::Scheme(address.clone()))?;
                let (sink, claim) = streams.output(&stream)?;
                claims.push(claim);
                Ok(Some(sink))
            }
            Self::Path(path) if is_fifo(path) => {
                Ok(Some(Sink::Pipe(open_to_reader(path).await.map_err(open_error(path))?)))
            }
            Self::Path(path) => append(path, false).map(Some),
            Self::File(path) => append(path, true).map(Some),
            Self::Nowhere | Self::Program(_) => Ok(None),
        }
    }
}

fn decode(text: &str) -> String {
    percent_decode_str(text).decode_utf8_lossy().into_owned()
}

/// The query's names and values, one after another: a program's arguments.
fn arguments(query: &str) -> Vec<String> {
    let pairs = query.split('&').filter(|pair| !pair.is_empty());
    let words = pairs.flat_map(|pair| match pair.split_once('=') {
        Some((name, value)) => vec![name, value],
        None => vec![pair],
    });
    words.filter(|word| !word.is_empty()).map(|word| decode(&word.replace('+', " "))).collect()
}

fn is_fifo(path: &Path) -> bool {
    path.metadata().is_ok_and(|metadata| metadata.file_type().is_fifo())
}

/// Opens a fifo that has a reader, or that none comes for in time.
async fn open_to_reader(fifo: &Path) -> io::Result<pipe::Sender> {
    let hold = || pipe::OpenOptions::new().read_write(true).open_sender(fifo);
    let opened = match open_for_writing(fifo) {
        Err(error) if error.raw_os_error() == Some(Errno::NXIO.raw_os_error()) => {
            let path = fifo.to_owned();
            let mut opening = spawn_blocking(move || OpenOptions::new().write(true).open(path));
            let Ok(opened) = timeout(READER_LIMIT, &mut opening).await else {
                tracing::warn!("nobody reads {}", fifo.display());
                let held = hold()?;
                // It finds a reader now. Were it left alone it might come to its opening after all others had closed theirs.
                opening.await??;
                return Ok(held);
            };
            opened?
        }
        opened => opened,
    };
    // As long as this is open the reader does not find the last writer gone.
    let _first = opened?;
    hold()
}

/// Opens a fifo that has a reader; an error where it has none.
fn open_for_writing(fifo: &Path) -> io::Result<File> {
    let flags = i32::try_from(OFlags::NONBLOCK.bits()).unwrap_or(0);
    OpenOptions::new().write(true).custom_flags(flags).open(fifo)
}

fn append(path: &Path, make: bool) -> Result<Sink, StdioError> {
    if make && let Some(folder) = path.parent() {
        DirBuilder::new().recursive(true).mode(0o755).create(folder).map_err(open_error(folder))?;
    }
    let file = OpenOptions::new().append(true).create(make).mode(0o644).open(path).map_err(open_error(path))?;
    Ok(Sink::File(file.into()))
}

fn open_error(path: &Path) -> impl FnOnce(io::Error) -> StdioError {
    let path = path.to_owned();
    move |error| StdioError::Open(path, error)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write as _;
    use tokio::io::{AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};

    #[test]
    fn addresses_are_told_apart() {
        let parse = |text: &str| Output::parse(text).unwrap();
        assert_eq!(parse(""), Output::Nowhere);
        assert_eq!(parse("/run/x%20"), Output::Path("/run/x%20".into()));
        assert_eq!(parse("fifo:///run/x"), Output::Path("/run/x".into()));
        assert_eq!(parse("file:///var/log/a%20b"), Output::File("/var/log/a b".into()));
        let program = Program { path: "/bin/l".into(), arguments: vec!["k".into(), "v w".into(), "x".into()] };
        assert_eq!(parse("binary:///bin/l?k=v+w&x="), Output::Program(program));
        assert_eq!(parse("ttrpc+unix:///s?streaming_id=x"), Output::Stream("ttrpc+unix:///s?streaming_id=x".into()));
        assert!(Output::parse("grpc+vsock://1:2?streaming_id=y").unwrap_err().to_string().contains("not supported"));
    }

    fn fifo(folder: &Path, name: &str) -> String {
        let path = folder.join(name);
        let mode = rustix::fs::Mode::from_raw_mode(0o600);
        rustix::fs::mknodat(rustix::fs::CWD, &path, rustix::fs::FileType::Fifo, mode, 0).unwrap();
        path.to_str().unwrap().to_owned()
    }

    async fn open(stdout: &str) -> Opened {
        let stdio = Stdio { stdout: stdout.to_owned(), ..Stdio::default() };
        stdio.open("a", "n", Size::default(), &Streams::default()).await.unwrap()
    }

    fn stdout(opened: &mut Opened) -> Box<dyn AsyncWrite + Send + Unpin> {
        opened.descriptors.stdout.take().unwrap().into_writer()
    }

    #[tokio::test]
    async fn a_reader_that_comes_after_the_end_finds_all() {
        let folder = tempfile::tempdir().unwrap();
        let path = fifo(folder.path(), "out");
        let writing = tokio::spawn({
            let path = path.clone();
            async move {
                let mut opened = open(&path).await;
                stdout(&mut opened).write_all(b"all").await.unwrap();
            }
        });
        tokio::task::yield_now().await;
        let read = spawn_blocking(|| std::fs::read(path)).await.unwrap().unwrap();
        writing.await.unwrap();
        assert_eq!(read, b"all");
    }

    #[tokio::test]
    async fn a_reader_of_a_fifo_may_go_and_come_again() {
        let folder = tempfile::tempdir().unwrap();
        let path = fifo(folder.path(), "out");
        let reader = || pipe::OpenOptions::new().open_receiver(&path).unwrap();
        let first = reader();
        let mut opened = open(&path).await;
        drop(first);
        let mut out = stdout(&mut opened);
        for text in [b"early", b"later"] {
            out.write_all(text).await.unwrap();
            let mut bytes = [0; 5];
            reader().read_exact(&mut bytes).await.unwrap();
            assert_eq!(&bytes, text);
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_process_begins_also_without_a_reader() {
        let folder = tempfile::tempdir().unwrap();
        let path = fifo(folder.path(), "out");
        let opening = tokio::spawn({
            let path = path.clone();
            async move { open(&path).await }
        });
        tokio::task::yield_now().await;
        assert!(!opening.is_finished());
        tokio::time::advance(READER_LIMIT).await;
        let mut opened = opening.await.unwrap();
        let mut out = stdout(&mut opened);
        out.write_all(b"some").await.unwrap();
        let mut bytes = [0; 4];
        pipe::OpenOptions::new().open_receiver(&path).unwrap().read_exact(&mut bytes).await.unwrap();
        assert_eq!(&bytes, b"some");
    }

    #[tokio::test]
    async fn input_ends_when_it_is_closed_and_not_when_a_client_leaves() {
        let folder = tempfile::tempdir().unwrap();
        let stdio = Stdio { stdin: fifo(folder.path(), "in"), ..Stdio::default() };
        let mut opened = stdio.open("a", "n", Size::default(), &Streams::default()).await.unwrap();
        let mut input = opened.descriptors.stdin.take().unwrap();
        let mut bytes = [0; 4];
        for text in [b"once", b"more"] {
            OpenOptions::new().write(true).open(&stdio.stdin).unwrap().write_all(text).unwrap();
            input.read_exact(&mut bytes).await.unwrap();
            assert_eq!(&bytes, text);
        }
        drop(opened.stdin.take());
        assert_eq!(input.read(&mut bytes).await.unwrap(), 0);
    }

    #[tokio::test]
    async fn a_file_gets_both_outputs() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("deep/log");
        let stdio = Stdio { stdout: format!("file://{}", path.display()), ..Stdio::default() };
        let descriptors = stdio.open("a", "n", Size::default(), &Streams::default()).await.unwrap().descriptors;
        for sink in [descriptors.stdout.unwrap(), descriptors.stderr.unwrap()] {
            let mut sink = sink.into_writer();
            sink.write_all(b"x\n").await.unwrap();
            sink.flush().await.unwrap();
        }
        assert_eq!(std::fs::read_to_string(path).unwrap(), "x\nx\n");
    }
}
