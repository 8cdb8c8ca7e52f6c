//! A copy of this process does its work with what it keeps, and ends with what that says. Only a process with one thread can be
//! copied, which those of Rust's own test harness are not.

use std::io::{Read as _, Write as _};
use std::os::fd::AsRawFd as _;
use std::os::unix::net::UnixStream;
use std::os::unix::process::ExitStatusExt as _;

use runvm::host::fork::Forked;

fn main() {
    has_what_it_keeps();
    a_panic_ends_it();
    is_killed();
}

fn has_what_it_keeps() {
    let (mut ours, theirs) = UnixStream::pair().unwrap();
    let work = || {
        (&theirs).write_all(b"kept").unwrap();
        if rustix::io::fcntl_getfd(&ours).is_err() { 7 } else { 8 }
    };
    let mut copy = Forked::start(&[theirs.as_raw_fd()], work).unwrap();
    assert_ne!(copy.id(), std::process::id());
    assert_eq!(copy.wait().unwrap().code(), Some(7), "the other end is closed");
    copy.kill();
    assert_eq!(copy.wait().unwrap().code(), Some(7), "it had ended already");
    drop(theirs);
    let mut said = String::new();
    ours.read_to_string(&mut said).unwrap();
    assert_eq!(said, "kept");
}

fn a_panic_ends_it() {
    // As a panic does, without its words.
    let mut copy = Forked::start(&[], || std::panic::resume_unwind(Box::new(()))).unwrap();
    assert_eq!(copy.wait().unwrap().code(), Some(101));
}

fn is_killed() {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let work = || {
        // Until its parent writes, which it does not.
        let _ = (&theirs).read(&mut [0]);
        0
    };
    let mut copy = Forked::start(&[theirs.as_raw_fd()], work).unwrap();
    copy.kill();
    assert_eq!(copy.wait().unwrap().signal(), Some(9));
    drop(ours);
}
