//! Measures runvm beside runc, crun and runsc on the same bundles: `make bench`.
//!
//! The runtimes take turns within every measure, so that a noisy moment of the machine
//! meets them all. A table goes to standard output, the numbers to `target/bench.json`.

mod contender;
mod measure;
mod report;
mod stages;
mod stream;
mod world;

use std::process::ExitCode;

use anyhow::Result;
use conformance::enclosure::{Enclosure, run_inside};

use crate::contender::Contender;
use crate::report::Report;
use crate::world::World;

fn main() -> ExitCode {
    let scripts: &[&[&str]] =
        &[&["setup.sh", "bench"], &["images.sh", "busybox"], &["images.sh", "debian"], &["images.sh", "pause"]];
    run_inside(scripts, bench)
}

fn bench(enclosure: &Enclosure) -> Result<ExitCode> {
    let contenders = Contender::all(enclosure.work())?;
    let world = World::make(enclosure, &contenders)?;
    let mut report = Report::new(&contenders);
    // Names of measures may be given; all are taken otherwise.
    let wanted: Vec<String> = std::env::args().skip(1).collect();
    for measure in
        measure::ALL.iter().filter(|measure| wanted.is_empty() || wanted.iter().any(|name| name == measure.name))
    {
        report.add(measure.take(&world, &contenders));
    }
    report.print()?;
    for (name, start) in [("runvm-cold", "cold start"), ("runvm", "forked start")] {
        if let Some(runvm) = contenders.iter().find(|contender| contender.name == name) {
            stages::print(&world, runvm, start)?;
        }
    }
    let path = report.write()?;
    println!("\nwritten to {}", path.display());
    Ok(ExitCode::SUCCESS)
}
