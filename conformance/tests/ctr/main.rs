//! runvm under containerd, by `ctr`, held against runc: under its shim for runc, then by runvm's own.

mod run;
mod task;

use std::process::ExitCode;
use std::sync::Arc;

use anyhow::Result;
use conformance::Runtime;
use conformance::containerd::{Ctr, Engine};
use conformance::enclosure::run_inside;
use conformance::suite::{Suite, run};

/// How a case gets its runtime.
type Open = fn(&Arc<Engine>, Runtime) -> Result<Ctr>;

fn main() -> ExitCode {
    run_inside(&[&["setup.sh"], &["images.sh", "busybox"]], |enclosure| {
        let mut failed = false;
        for shim in [false, true] {
            let cases = [run::cases(), task::cases()].into_iter().flatten().collect();
            let (engine, open) = if shim { ("by-shim", Ctr::open_by_shim as Open) } else { ("", Ctr::open as Open) };
            let suite = Suite { name: "ctr", engine, shim, cases, open };
            failed |= run(suite, || Engine::start(enclosure))? != ExitCode::SUCCESS;
        }
        Ok(if failed { ExitCode::FAILURE } else { ExitCode::SUCCESS })
    })
}
