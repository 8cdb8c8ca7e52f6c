//! What can go wrong.

use std::io::{self, Read as _, Write as _};
use std::net::Shutdown;
use std::str::FromStr;
use std::time::Duration;

use vsock::{VMADDR_CID_HOST, VsockStream};

use crate::wire::{self, DATA, RESPONSE};

/// Longer than the host waits for an answer.
const LATE: Duration = Duration::from_secs(33);
/// How much is written at once.
const PIECE: usize = 64 << 10;
/// How many ask the host at once.
const STORMING: u32 = 8;
/// The longest message that ttrpc takes.
const LONGEST: u32 = 4 << 20;

/// A way to be evil.
#[derive(Clone, Copy)]
pub(crate) enum Fault {
    /// None: what it is at stays as it is.
    Silent,
    /// The right answer when nobody waits for it any more.
    Late(Duration),
    /// An answer that is not true.
    Lie,
    /// A few bytes that mean nothing.
    Garbage,
    /// Bytes that mean nothing, without end.
    Flood,
    /// One line without end.
    Line,
    /// Lines of a log without end.
    Lines,
    /// Messages without end for the stream that waits for one, none the last.
    Data,
    /// A message of 4 GiB is said to follow, and bytes do without end.
    Huge,
    /// The longest message that may be is said to follow, and nothing does.
    Longest,
    /// No, with a sentence of megabytes in which there is all that a terminal and a log obey.
    Refuse,
    /// Nothing more is said, but all is heard.
    HalfClose,
    /// The stream is closed.
    Close,
    /// PID 1 ends.
    Exit,
    /// The host is asked for connections without end.
    Storm,
}

impl FromStr for Fault {
    type Err = io::Error;

    fn from_str(word: &str) -> io::Result<Self> {
        Ok(match word {
            "silent" => Self::Silent,
            "late" => Self::Late(LATE),
            "lie" => Self::Lie,
            "garbage" => Self::Garbage,
            "flood" => Self::Flood,
            "line" => Self::Line,
            "lines" => Self::Lines,
            "data" => Self::Data,
            "huge" => Self::Huge,
            "longest" => Self::Longest,
            "refuse" => Self::Refuse,
            "half-close" => Self::HalfClose,
            "close" => Self::Close,
            "exit" => Self::Exit,
            "storm" => Self::Storm,
            _ => return Err(io::ErrorKind::InvalidData.into()),
        })
    }
}

impl Fault {
    /// What goes wrong before the agent says that it listens.
    pub(crate) fn at_knock(self) {
        match self {
            Self::Silent => rest(),
            Self::Exit => std::process::exit(1),
            _ => {}
        }
    }

    /// What goes wrong on a stream of the host's, of whose requests this is the number of the last.
    pub(crate) fn commit(self, stream: &mut VsockStream, request: u32) -> io::Result<()> {
        match self {
            Self::Silent | Self::Late(_) | Self::Lie => {}
            Self::Garbage => stream.write_all(&garbage())?,
            Self::Flood => repeat(stream, &garbage())?,
            Self::Line => repeat(stream, &[b'x'; PIECE])?,
            Self::Lines => repeat(stream, br#"{"level":"error","message":"\n\u001b[2Jlevel=error msg=x"}"#.as_slice())?,
            Self::Data => repeat(stream, &wire::message(DATA, request, &[0; PIECE]))?,
            Self::Huge => {
                stream.write_all(&wire::header(u32::MAX, RESPONSE, request))?;
                repeat(stream, &[0; PIECE])?;
            }
            Self::Longest => stream.write_all(&wire::header(LONGEST, RESPONSE, request))?,
            Self::Refuse => {
                let sentence = "no\n\x1b[2J\r\tlevel=error ".repeat(LONGEST as usize / 32);
                stream.write_all(&wire::refusal(request, &sentence))?;
            }
            Self::HalfClose => {
                stream.shutdown(Shutdown::Write)?;
                // To be heard takes somebody who listens.
                while stream.read(&mut [0; PIECE])? > 0 {}
            }
            // Another may have it too.
            Self::Close => return stream.shutdown(Shutdown::Both),
            Self::Exit => std::process::exit(1),
            Self::Storm => storm(),
        }
        rest()
    }
}

/// Writes the same again and again until the host has enough.
fn repeat(stream: &mut VsockStream, bytes: &[u8]) -> io::Result<()> {
    let bytes = if bytes.len() < PIECE { [bytes, b"\n"].concat().repeat(PIECE / bytes.len()) } else { bytes.to_vec() };
    loop {
        stream.write_all(&bytes)?;
    }
}

fn garbage() -> Vec<u8> {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let bytes = std::iter::repeat_with(|| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 24) as u8
    });
    bytes.take(PIECE).collect()
}

/// Asks for every port of the host's, from several threads, for good. All are refused.
fn storm() {
    for first in 0..STORMING {
        std::thread::spawn(move || {
            let mut port = first;
            loop {
                let _ = VsockStream::connect_with_cid_port(VMADDR_CID_HOST, port);
                port = port.wrapping_add(STORMING);
            }
        });
    }
}

fn rest() -> ! {
    loop {
        std::thread::park();
    }
}
