//! Nothing stays when a part of a container is killed from under it, nor of many containers one after another or at once,
//! nor where verbs meet.
//!
//! runc has one part only, the container's first process; runvm has the monitor in its
//! place, the VMM, and where the VMM is QEMU the daemon that serves files.

mod killed;
mod many;
mod races;

use std::process::ExitCode;

use conformance::bundle::{Hand, Workshop};
use conformance::enclosure::run_inside;
use conformance::suite::{Suite, run};

fn main() -> ExitCode {
    let cases = [killed::cases(), many::cases(), races::cases()].into_iter().flatten().collect();
    run_inside(&[&["setup.sh"], &["images.sh", "busybox"]], |enclosure| {
        run(Suite { name: "leaks", engine: "", shim: false, cases, open: Hand::open }, || Workshop::open(enclosure))
    })
}
