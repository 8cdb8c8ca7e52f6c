//! runvm under a real Docker daemon, as a user drives it, held against runc.

mod exec;
mod exit_codes;
mod lifecycle;
mod network;
mod programs;
mod resources;
mod security;
mod stdio;
mod volumes;
mod wall;

use std::process::ExitCode;

use conformance::docker::{Docker, Engine};
use conformance::enclosure::run_inside;
use conformance::suite::{Suite, run};

fn main() -> ExitCode {
    let cases = [
        exec::cases(),
        exit_codes::cases(),
        lifecycle::cases(),
        network::cases(),
        programs::cases(),
        resources::cases(),
        security::cases(),
        stdio::cases(),
        volumes::cases(),
        wall::cases(),
    ];
    let scripts: &[&[&str]] = &[&["setup.sh"], &["images.sh", "busybox"], &["images.sh", "debian"]];
    run_inside(scripts, |enclosure| {
        let suite = Suite {
            name: "docker",
            engine: "",
            shim: false,
            cases: cases.into_iter().flatten().collect(),
            open: Docker::open,
        };
        run(suite, || Engine::start(enclosure))
    })
}
