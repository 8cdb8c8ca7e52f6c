//! runvm under a real Podman, as a user drives it, held against runc.

mod exec;
mod life;
mod limits;
mod network;
mod pods;
mod surroundings;

use std::process::ExitCode;

use conformance::enclosure::run_inside;
use conformance::podman::{Engine, Podman};
use conformance::suite::{Suite, run};

fn main() -> ExitCode {
    let cases = [exec::cases(), life::cases(), limits::cases(), network::cases(), pods::cases(), surroundings::cases()];
    run_inside(&[&["setup.sh"], &["images.sh", "busybox"]], |enclosure| {
        let suite = Suite {
            name: "podman",
            engine: "",
            shim: false,
            cases: cases.into_iter().flatten().collect(),
            open: Podman::open,
        };
        run(suite, || Engine::start(enclosure))
    })
}
