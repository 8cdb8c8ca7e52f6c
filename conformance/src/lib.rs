//! What the suites in `tests/` and the benchmark share.
//!
//! A suite is a list of [`Case`]s. Each is a small function that drives one runtime
//! and returns what it saw as an [`Outcome`]. It runs with runc first, which proves
//! the test, then with runvm; whatever differs fails unless `differences.toml` gives
//! the reason. See `README.md` beside this crate.

pub mod bundle;
pub mod census;
pub mod cni;
pub mod command;
pub mod containerd;
pub mod cri;
pub mod differences;
pub mod docker;
pub mod enclosure;
pub mod engine;
pub mod image;
pub mod judge;
pub mod lifecycles;
pub mod machine;
pub mod nameserver;
pub mod outcome;
pub mod podman;
pub mod runtime;
pub mod suite;
pub mod tap;
pub mod terminal;

pub use command::{Cmd, Output};
pub use outcome::Outcome;
pub use runtime::Runtime;
pub use suite::Case;
pub use terminal::Terminal;
