//! Where the time of runvm's starts goes, by what the runtime and the agent log at
//! debug level: the host's lines carry `mono_us`, the guest's `guest_us` since its boot.

use std::path::Path;

use anyhow::{Context, Result};
use conformance::image;
use rustix::time::{ClockId, clock_gettime};
use serde_json::Value;

use crate::contender::Contender;
use crate::report::percentile;
use crate::world::World;

const ROUNDS: usize = 5;

/// Prints each stage with its median time since the command, and since the stage before.
pub(crate) fn print(world: &World, runvm: &Contender, start: &str) -> Result<()> {
    // A template may have to be made first.
    run(world, runvm)?;
    let runs = (0..ROUNDS).map(|_| run(world, runvm)).collect::<Result<Vec<_>>>()?;
    let first = runs.first().context("there were rounds")?;
    println!("\n{:<28}{:>10}{:>10}", format!("{start}, stage by stage"), "at ms", "took ms");
    let mut before = 0.0;
    for stage in first {
        let mut times: Vec<f64> = runs
            .iter()
            .flatten()
            .filter(|other| other.name == stage.name && other.guest == stage.guest)
            .map(|other| other.at)
            .collect();
        times.sort_by(f64::total_cmp);
        let at = percentile(&times, 50);
        if stage.guest {
            println!("  guest: {:<19}{at:>10.1}", stage.name);
        } else {
            println!("{:<28}{at:>10.1}{:>10.1}", stage.name, at - before);
            before = at;
        }
    }
    println!("(median of {ROUNDS}; the guest's times count from its own boot)");
    Ok(())
}

struct Stage {
    name: String,
    /// Milliseconds since the command, or since the guest's boot.
    at: f64,
    guest: bool,
}

fn run(world: &World, runvm: &Contender) -> Result<Vec<Stage>> {
    let bundle = world.bundle(image::BUSYBOX, &["true"])?;
    let log = std::env::temp_dir().join(&bundle.id);
    let options = ["--debug", "--log-format", "json", "--log"].map(Path::new);
    let begin = microseconds();
    let output = bundle.run_with(runvm, &[&options[..], &[&log]].concat()).ok();
    let end = microseconds();
    let text = std::fs::read_to_string(&log)?;
    output?;
    let mut stages: Vec<Stage> = text.lines().filter_map(|line| stage(line, begin)).collect();
    stages.push(Stage { name: "command ended".to_owned(), at: (end - begin) / 1000.0, guest: false });
    Ok(stages)
}

fn stage(line: &str, begin: f64) -> Option<Stage> {
    let line: Value = serde_json::from_str(line).ok()?;
    let name = line["stage"].as_str()?.to_owned();
    let host = line["mono_us"].as_f64().map(|at| (at - begin, false));
    let (at, guest) = host.or_else(|| line["guest_us"].as_f64().map(|at| (at, true)))?;
    Some(Stage { name, at: at / 1000.0, guest })
}

fn microseconds() -> f64 {
    let now = clock_gettime(ClockId::Monotonic);
    now.tv_sec as f64 * 1e6 + now.tv_nsec as f64 / 1e3
}
