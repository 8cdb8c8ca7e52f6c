//! How fast bytes come out of a container.

use std::io::Read;
use std::net::{Ipv4Addr, TcpListener};
use std::os::fd::AsFd;
use std::process::Stdio;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use conformance::Cmd;
use conformance::command::{ended_within, readable_within};
use conformance::docker::HOST4;

/// How long a stream may stand still.
const PATIENCE: Duration = Duration::from_secs(60);

/// Megabytes per second from a program's standard output, from the first byte to the last.
pub(crate) fn from_stdout(cmd: Cmd, expected: u64) -> Result<f64> {
    let mut child = cmd.into_command().stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::null()).spawn()?;
    let mut stdout = child.stdout.take().context("stdout is a pipe")?;
    let speed = drain(&mut stdout, expected);
    drop(stdout);
    if !ended_within(&child, PATIENCE)? {
        child.kill()?;
    }
    child.wait()?;
    speed
}

/// Megabytes per second from a container that connects to the bridge and sends.
pub(crate) fn over_tcp(expected: u64, sender: impl FnOnce(Ipv4Addr, u16) -> Cmd) -> Result<f64> {
    let listener = TcpListener::bind((HOST4, 0))?;
    let cmd = sender(HOST4, listener.local_addr()?.port());
    let receiver = std::thread::spawn(move || {
        ensure!(readable_within(listener.as_fd(), PATIENCE)?, "the container never connected");
        let (mut stream, _) = listener.accept()?;
        drain(&mut stream, expected)
    });
    let sent = cmd.ok();
    let speed = receiver.join().unwrap_or_else(|_| anyhow::bail!("the receiver panicked"));
    sent?;
    speed
}

fn drain<R: Read + AsFd>(source: &mut R, expected: u64) -> Result<f64> {
    let mut buffer = vec![0; 1 << 20];
    let mut begin = None;
    let mut received = 0;
    loop {
        ensure!(readable_within(source.as_fd(), PATIENCE)?, "the stream stands still after {received} bytes");
        let count = source.read(&mut buffer)?;
        let begin = *begin.get_or_insert_with(Instant::now);
        if count == 0 {
            ensure!(received == expected, "{received} bytes arrived, not {expected}");
            return Ok(received as f64 / 1e6 / begin.elapsed().as_secs_f64());
        }
        received += count as u64;
    }
}
