//! A copy of this process does its work with what it keeps, and ends with what that says. Only a process with one thread can be
//! copied, which those of Rust's own test harness are not.

use std::io::{self, Read as _, Write as _};
use std::os::fd::AsRawFd as _;
use std::os::unix::net::UnixStream;
use std::os::unix::process::ExitStatusExt as _;

use runvm::host::fork::Forked;

fn main() -> io::Result<()> {
    has_what_it_keeps()?;
    a_panic_ends_it()?;
    is_killed()
}

fn has_what_it_keeps() -> io::Result<()> {
    let (mut ours, theirs) = UnixStream::pair()?;
    let work = || match ((&theirs).write_all(b"kept"), rustix::io::fcntl_getfd(&ours)) {
        (Ok(()), Err(_)) => 7,
        _ => 8,
    };
    let mut copy = Forked::start(&[theirs.as_raw_fd()], work)?;
    assert_ne!(copy.id(), std::process::id());
    assert_eq!(copy.wait()?.code(), Some(7), "it can write, and the other end is closed");
    copy.kill();
    assert_eq!(copy.wait()?.code(), Some(7), "it had ended already");
    drop(theirs);
    let mut said = String::new();
    ours.read_to_string(&mut said)?;
    assert_eq!(said, "kept");
    Ok(())
}

fn a_panic_ends_it() -> io::Result<()> {
    // As a panic does, without its words.
    let mut copy = Forked::start(&[], || std::panic::resume_unwind(Box::new(())))?;
    assert_eq!(copy.wait()?.code(), Some(101));
    Ok(())
}

fn is_killed() -> io::Result<()> {
    let (ours, theirs) = UnixStream::pair()?;
    let work = || {
        // Until its parent writes, which it does not.
        let _ = (&theirs).read(&mut [0]);
        0
    };
    let mut copy = Forked::start(&[theirs.as_raw_fd()], work)?;
    copy.kill();
    assert_eq!(copy.wait()?.signal(), Some(9));
    drop(ours);
    Ok(())
}
