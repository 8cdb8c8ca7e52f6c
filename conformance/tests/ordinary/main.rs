//! An ordinary KVM: runvm by hand in a machine that has one, whatever KVM this machine has.
//!
//! The machine is booted once, for all cases, and reports on each. See [`conformance::machine`].

mod cases;

use std::path::Path;
use std::process::ExitCode;
use std::sync::{Arc, OnceLock};

use anyhow::{Context as _, Result};
use conformance::enclosure::run_inside;
use conformance::machine::{Machine, Session};
use conformance::runtime::{Runtime, runvm_is_tested};
use conformance::{Output, bundle};
use libtest_mimic::{Arguments, Failed, Trial};
use serde_json::{Value, json};

use cases::CASES;

/// One small test.
struct Case {
    name: &'static str,
    /// What the machine's shell runs; `$ID` is the container's ID, and the folder its bundle's.
    script: &'static str,
    /// What the container runs.
    command: &'static [&'static str],
    /// Changes the bundle's configuration.
    configure: fn(&mut Value),
    judge: fn(&Output) -> Result<()>,
}

fn main() -> ExitCode {
    run_inside(&[&["setup.sh"], &["images.sh", "busybox"], &["cloud-kernel.sh"]], |enclosure| {
        let tested = runvm_is_tested()?;
        let session = Arc::new(OnceLock::new());
        let trials = CASES.iter().map(|case| {
            let session = Arc::clone(&session);
            let work = enclosure.work().to_owned();
            Trial::test(format!("ordinary::{}", case.name), move || {
                let session = session.get_or_init(|| play(&work).map_err(|error| format!("{error:#}")));
                judge(case, session.as_ref().map_err(Failed::from)?)
            })
            .with_kind(Runtime::Kvm.name())
            .with_ignored_flag(!tested)
        });
        Ok(libtest_mimic::run(&Arguments::from_args(), trials.collect()).exit_code())
    })
}

/// Boots the machine with all cases.
fn play(work: &Path) -> Result<Session> {
    let template = bundle::template(&work.join("bundle"))?;
    let machine = Machine::assemble(&work.join("machine")).context("cannot put the machine together")?;
    for case in CASES {
        let mut config = template.clone();
        config["process"]["args"] = json!(case.command);
        (case.configure)(&mut config);
        machine.add_case(case.name, case.script, config)?;
    }
    machine.run()
}

fn judge(case: &Case, session: &Session) -> Result<(), Failed> {
    let verdict = session.output(case.name).and_then(|output| (case.judge)(&output));
    verdict.map_err(|error| Failed::from(format!("{error:#}\n{}", session.account(case.name))))
}
