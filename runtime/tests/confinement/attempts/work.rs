//! What a thread has to be able to do whatever happens: its filter must not end it then.

use std::fs;
use std::io;
use std::sync::mpsc;

use nix::libc;

use super::in_vain;
use crate::attacker::Outcome;
use crate::ground::Map;

/// Something that is to succeed.
pub struct Work {
    /// What it is.
    pub name: &'static str,
    /// Does it.
    pub make: fn(&Map) -> io::Result<()>,
    /// How it ends.
    pub ends: Outcome,
    /// The only role that can, if it is one.
    role: Option<&'static str>,
}

impl Work {
    /// Whether the role has to do it.
    pub fn is_of(&self, role: &str) -> bool {
        self.role.is_none_or(|only| only == role)
    }
}

/// All of it.
pub const WORK: [Work; 5] = [
    Work { name: "get memory and give it back", make: use_memory, ends: Outcome::Done, role: None },
    Work { name: "hear of another thread", make: hear, ends: Outcome::Done, role: None },
    Work { name: "look at the clock", make: look_at_the_clock, ends: Outcome::Done, role: None },
    Work { name: "panic", make: panic, ends: Outcome::Killed(libc::SIGABRT), role: None },
    Work { name: "write a file of an export", make: write, ends: Outcome::Done, role: Some("fs") },
];

/// Small pieces come from the heap and large ones from the kernel, and both are moved when they grow.
fn use_memory(_: &Map) -> io::Result<()> {
    for pieces in [1 << 16, 1 << 6] {
        let mut memory: Vec<Vec<u8>> = (0..pieces).map(|_| vec![1; (1 << 26) / pieces]).collect();
        memory.iter_mut().for_each(|piece| piece.resize(piece.len() * 2, 2));
        std::hint::black_box(&memory);
    }
    Ok(())
}

fn hear(_: &Map) -> io::Result<()> {
    let (sender, receiver) = mpsc::channel();
    sender.send(()).map_err(io::Error::other)?;
    receiver.recv().map_err(io::Error::other)
}

fn look_at_the_clock(_: &Map) -> io::Result<()> {
    let text = runvm::log::timestamp();
    if text.is_empty() || runvm::log::monotonic_us() == 0 { Err(in_vain()) } else { Ok(()) }
}

/// As a release does, in which a panic ends the process.
fn panic(_: &Map) -> io::Result<()> {
    std::process::abort()
}

fn write(map: &Map) -> io::Result<()> {
    let path = map.writable.join("written");
    fs::write(&path, "by the guest")?;
    if fs::read(&path)? == b"by the guest" { Ok(()) } else { Err(in_vain()) }
}
