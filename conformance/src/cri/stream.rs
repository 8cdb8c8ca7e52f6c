//! The CRI's streaming server, by WebSocket: exec, attach and port forwarding.
//!
//! Each message's first byte is the number of a channel. What `kubectl` does by SPDY, another client may do by this; it is the
//! same server behind it.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use serde::Deserialize;
use tungstenite::protocol::Role;
use tungstenite::{Message, WebSocket};

use crate::Output;

/// How long a stream waits for what it expects.
const LIMIT: Duration = Duration::from_secs(60);

/// The channels of exec and attach.
const STDIN: u8 = 0;
const STDOUT: u8 = 1;
const STDERR: u8 = 2;
const ERROR: u8 = 3;
const RESIZE: u8 = 4;

/// A conversation with a process.
pub struct Stream {
    socket: WebSocket<TcpStream>,
    stdout: Vec<u8>,
    stderr: Vec<u8>,
    status: Vec<u8>,
    expected: usize,
}

/// How a process ended, as the error channel says.
#[derive(Deserialize)]
struct Status {
    status: String,
    #[serde(default)]
    message: String,
    details: Option<Details>,
}

#[derive(Deserialize)]
struct Details {
    causes: Vec<Cause>,
}

#[derive(Deserialize)]
struct Cause {
    reason: String,
    message: String,
}

impl Stream {
    /// Connects to what `Exec` or `Attach` answered.
    pub fn open(url: &str) -> Result<Self> {
        let socket = connect(url)?;
        Ok(Self { socket, stdout: Vec::new(), stderr: Vec::new(), status: Vec::new(), expected: 0 })
    }

    /// Writes to the process's standard input.
    pub fn send(&mut self, bytes: impl AsRef<[u8]>) -> Result<()> {
        send(&mut self.socket, STDIN, bytes.as_ref())
    }

    /// Tells the process of its window's size.
    pub fn resize(&mut self, rows: u16, columns: u16) -> Result<()> {
        let size = serde_json::json!({ "Width": columns, "Height": rows });
        send(&mut self.socket, RESIZE, size.to_string().as_bytes())
    }

    /// Reads until the standard output goes on with this, which may have come before.
    pub fn expect(&mut self, text: &str) -> Result<()> {
        loop {
            let stdout = String::from_utf8_lossy(&self.stdout[self.expected..]).into_owned();
            if let Some(start) = stdout.find(text) {
                self.expected += start + text.len();
                return Ok(());
            }
            ensure!(self.receive()?, "the stream ended without {text:?}: {stdout:?}");
        }
    }

    /// Reads to the end: the exit code and what was printed.
    pub fn finish(mut self) -> Result<Output> {
        while self.receive()? {}
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        let code = if self.status.is_empty() { 0 } else { exit_code(&self.status)? };
        Ok(Output { code, stdout: text(&self.stdout), stderr: text(&self.stderr) })
    }

    /// Takes one message; false at the end.
    fn receive(&mut self) -> Result<bool> {
        let Some((channel, data)) = receive(&mut self.socket)? else { return Ok(false) };
        match channel {
            STDOUT => self.stdout.extend(data),
            STDERR => self.stderr.extend(data),
            ERROR => self.status.extend(data),
            _ => bail!("a message on channel {channel}"),
        }
        Ok(true)
    }
}

fn exit_code(status: &[u8]) -> Result<i32> {
    let text = String::from_utf8_lossy(status);
    let status: Status = serde_json::from_str(&text).with_context(|| format!("{text:?} is no status"))?;
    if status.status == "Success" {
        return Ok(0);
    }
    let causes = status.details.map(|details| details.causes).unwrap_or_default();
    let code = causes.iter().find(|cause| cause.reason == "ExitCode").with_context(|| status.message.clone())?;
    Ok(code.message.parse()?)
}

/// A connection to a port of a pod.
pub struct Forwarded(WebSocket<TcpStream>);

impl Forwarded {
    /// Connects to what `PortForward` answered, and there to this port.
    pub fn open(url: &str, port: u16) -> Result<Self> {
        let mut socket = connect(&format!("{url}?port={port}"))?;
        // Data and errors each begin with the port's number.
        for channel in [0, 1] {
            let (got, number) = receive(&mut socket)?.context("the stream ended before it began")?;
            ensure!((got, number.as_slice()) == (channel, &port.to_le_bytes()), "channel {got} begins with {number:?}");
        }
        Ok(Self(socket))
    }

    /// Sends these bytes and reads until what came has `text`.
    pub fn ask(mut self, question: &[u8], text: &str) -> Result<String> {
        send(&mut self.0, 0, question)?;
        let mut answer = String::new();
        while !answer.contains(text) {
            let (channel, data) = receive(&mut self.0)?.with_context(|| format!("it ended with {answer:?}"))?;
            let data = String::from_utf8_lossy(&data);
            ensure!(channel == 0, "port forwarding failed: {data}");
            answer.push_str(&data);
        }
        Ok(answer)
    }
}

fn connect(url: &str) -> Result<WebSocket<TcpStream>> {
    let rest = url.strip_prefix("http://").with_context(|| format!("{url} is not of HTTP"))?;
    let (host, path) = rest.split_once('/').with_context(|| format!("{url} has no path"))?;
    let mut stream = TcpStream::connect(host).with_context(|| format!("cannot connect to {url}"))?;
    stream.set_read_timeout(Some(LIMIT))?;
    // The key proves to a browser that the server meant it; nobody is to be convinced here.
    write!(
        stream,
        "GET /{path} HTTP/1.1\r\nHost: {host}\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\
         Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\
         Sec-WebSocket-Protocol: v4.channel.k8s.io\r\n\r\n"
    )?;
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        let mut byte = [0];
        stream.read_exact(&mut byte).with_context(|| format!("{url} answered {:?}", String::from_utf8_lossy(&head)))?;
        head.extend(byte);
    }
    ensure!(head.starts_with(b"HTTP/1.1 101"), "{url} answered {:?}", String::from_utf8_lossy(&head));
    Ok(WebSocket::from_raw_socket(stream, Role::Client, None))
}

fn send(socket: &mut WebSocket<TcpStream>, channel: u8, data: &[u8]) -> Result<()> {
    let message: Vec<u8> = [channel].iter().chain(data).copied().collect();
    Ok(socket.send(Message::binary(message))?)
}

/// The next message with something in it; `None` at the end.
fn receive(socket: &mut WebSocket<TcpStream>) -> Result<Option<(u8, Vec<u8>)>> {
    use tungstenite::Error;
    loop {
        match socket.read() {
            Ok(Message::Binary(data)) => {
                let (channel, data) = data.split_first().context("an empty message")?;
                // Each channel begins with a message of nothing.
                if !data.is_empty() {
                    return Ok(Some((*channel, data.to_vec())));
                }
            }
            Ok(Message::Close(_)) | Err(Error::ConnectionClosed | Error::AlreadyClosed) => return Ok(None),
            Ok(_) => {}
            Err(error) => return Err(error.into()),
        }
    }
}
