//! `containerd-shim-runvm-v2`: what containerd starts for `io.containerd.runvm.v2`.
//!
//! One process stands for each pod, owns its VM, and answers for the containers in it. docs/containerd.md tells how
//! to use it, docs/architecture.md how it fits in.

mod bootstrap;
mod connections;
mod errors;
mod events;

mod mounts;
mod options;
mod server;
mod service;
mod stdio;
mod streams;
mod sync;
mod task;
mod wire;

use std::process::ExitCode;

/// What containerd calls the runtime.
const NAME: &str = "io.containerd.runvm.v2";

fn main() -> ExitCode {
    // The library starts a VM's process by running its own program again, in the name of the command.
    if std::env::args_os().next().is_some_and(|name| name == "runvm") {
        return runvm::cli::main();
    }
    bootstrap::main()
}
