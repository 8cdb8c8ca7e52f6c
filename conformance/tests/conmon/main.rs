//! runvm under conmon, driven as CRI-O does, held against runc.
//!
//! CRI-O starts a conmon for each container and for each probe of the kubelet's, which starts the runtime and tells by files and
//! sockets; all else it has the runtime do itself. So do the cases here, with CRI-O's arguments.

mod exec;
mod life;
mod scene;

use std::process::ExitCode;

use conformance::bundle::{Hand, Workshop};
use conformance::enclosure::run_inside;
use conformance::suite::{Suite, run};

fn main() -> ExitCode {
    let cases = [exec::cases(), life::cases()].into_iter().flatten().collect();
    run_inside(&[&["setup.sh"], &["images.sh", "busybox"]], |enclosure| {
        run(Suite { name: "conmon", engine: "", shim: false, cases, open: Hand::open }, || Workshop::open(enclosure))
    })
}
