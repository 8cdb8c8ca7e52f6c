//! runvm under containerd, by its shim for runc and `ctr`, held against runc.

mod run;
mod task;

use std::process::ExitCode;

use conformance::containerd::{Ctr, Engine};
use conformance::enclosure::run_inside;
use conformance::suite::{Suite, run};

fn main() -> ExitCode {
    let cases = [run::cases(), task::cases()];
    run_inside(&[&["setup.sh"], &["images.sh", "busybox"]], |enclosure| {
        let suite = Suite {
            name: "ctr",
            engine: "",
            shim: false,
            cases: cases.into_iter().flatten().collect(),
            open: Ctr::open,
        };
        run(suite, || Engine::start(enclosure))
    })
}
