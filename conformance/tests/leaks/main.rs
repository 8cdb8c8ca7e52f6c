//! Nothing stays when a part of a container is killed from under it.
//!
//! runc has one part only, the container's first process; runvm has the monitor in its
//! place, the VMM and the daemon that serves files.

mod killed;

use std::process::ExitCode;

use conformance::bundle::{Hand, Workshop};
use conformance::enclosure::run_inside;
use conformance::suite::{Suite, run};

fn main() -> ExitCode {
    let cases = killed::cases();
    run_inside(&[&["setup.sh"], &["images.sh", "busybox"]], |enclosure| {
        run(Suite { name: "leaks", cases, open: Hand::open }, || Workshop::open(enclosure))
    })
}
