//! The runtime called by hand, with bundles made by hand, held against runc.

mod configuration;
mod life;
mod limits;
mod missing;
mod pauses;
mod processes;
mod refused;
mod report;
mod surroundings;
mod templates;
mod user_namespaces;
mod veth;

use std::process::ExitCode;

use conformance::bundle::{Hand, Workshop};
use conformance::enclosure::run_inside;
use conformance::suite::{Suite, run};

fn main() -> ExitCode {
    let cases = [
        life::cases(),
        pauses::cases(),
        limits::cases(),
        processes::cases(),
        surroundings::cases(),
        configuration::cases(),
        report::cases(),
        refused::cases(),
        missing::cases(),
        templates::cases(),
        user_namespaces::cases(),
    ];
    run_inside(&[&["setup.sh"], &["images.sh", "busybox"]], |enclosure| {
        let suite = Suite {
            name: "hand",
            engine: "",
            shim: false,
            cases: cases.into_iter().flatten().collect(),
            open: Hand::open,
        };
        run(suite, || Workshop::open(enclosure))
    })
}
