//! The `runvm` command.

use std::process::ExitCode;

fn main() -> ExitCode {
    runvm::cli::main()
}
