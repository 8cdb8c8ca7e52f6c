//! Fuzz targets for the virtual machine monitor: what a guest, a snapshot or the host's side of a device may do to it; and
//! for what the runtime makes of a guest's agent and of a bundle.
//!
//! A target is a function that takes bytes, and lets them say what a guest and the host do to a device. It may end with
//! whatever error, but must neither panic nor touch what is not its own, and has to end soon. `fuzz_targets/` makes
//! fuzzers of them; here they are ordinary code, with ordinary tests.

pub mod balloon;
mod bench;
pub mod block;
mod board;
pub mod bundle;
pub mod channel;
pub mod fs;
mod ground;
mod guest;
mod jail;
pub mod net;
pub mod registers;
pub mod rng;
pub mod snapshot;
#[cfg(test)]
mod tests;
pub mod vsock;
