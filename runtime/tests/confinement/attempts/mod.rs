//! All that an attacker tries, and what little a thread has to be able to do.

mod files;
mod kernel;
mod network;
mod processes;
mod work;

use std::io;

use crate::ground::Map;
pub use work::WORK;

/// Something that is to be refused.
pub struct Attempt {
    /// What it is.
    pub name: &'static str,
    /// Makes it; whatever it returns, without an error it has succeeded.
    pub make: fn(&Map) -> io::Result<()>,
    /// Not every host has what it takes.
    pub not_everywhere: bool,
}

/// All attempts.
pub const ATTEMPTS: [&[Attempt]; 4] = [files::ATTEMPTS, network::ATTEMPTS, processes::ATTEMPTS, kernel::ATTEMPTS];

const fn attempt(name: &'static str, make: fn(&Map) -> io::Result<()>) -> Attempt {
    Attempt { name, make, not_everywhere: false }
}

/// One that fails without confinement too, on some hosts.
const fn sometimes(name: &'static str, make: fn(&Map) -> io::Result<()>) -> Attempt {
    Attempt { name, make, not_everywhere: true }
}

/// An error without a number of the kernel's: what was done had no effect.
fn in_vain() -> io::Error {
    io::Error::other("it had no effect")
}
