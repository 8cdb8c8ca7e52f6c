//! What clones of one template do not have in common.

use std::collections::HashSet;
use std::path::PathBuf;
use std::time::{Duration, SystemTime};

use anyhow::{Context, Result, ensure};
use conformance::bundle::Hand;
use conformance::suite::expect_equal;
use conformance::{Case, Cmd, Outcome, case};
use serde_json::{Value, json};

use super::{Templates, copy, limit};
use crate::veth::Veth;

/// So many start at the same time.
const CLONES: usize = 50;
/// How long all of them may take together.
const LIMIT: Duration = Duration::from_secs(300);
/// How far a clone's clock may be off the host's, both ways.
const CLOCK_ERROR: u128 = 500_000_000;
const SECOND: u64 = 1_000_000_000;

pub(super) fn cases() -> Vec<Case<Hand>> {
    vec![case!(fifty_clones_share_nothing).alone(), case!(a_clone_knows_the_time)]
}

/// `probe.c`, as a program that needs nothing of an image.
fn probe(h: &Hand) -> Result<PathBuf> {
    let program = h.folder().join("probe");
    let source = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/hand/templates/probe.c");
    Cmd::new("gcc").args(["-O1", "-static", "-o"]).arg(&program).arg(source).ok()?;
    Ok(program)
}

fn now() -> Result<u128> {
    Ok(SystemTime::now().duration_since(SystemTime::UNIX_EPOCH)?.as_nanos())
}

fn fifty_clones_share_nothing(h: &Hand) -> Result<Outcome> {
    let templates = Templates::of(h);
    let probe = probe(h)?;
    let mut veths = Vec::new();
    let mut bundles = Vec::new();
    // One more, which boots and makes the template.
    for _ in 0..=CLONES {
        let veth = Veth::make()?;
        let bundle = h.bundle_with(&["/probe"], |config| {
            limit(config, 64, 1);
            veth.give_to(config);
        })?;
        copy(&probe, &bundle.inside("probe"))?;
        let mut config: Value = serde_json::from_slice(&std::fs::read(bundle.path.join("config.json"))?)?;
        config["hostname"] = json!(bundle.id);
        bundle.configure(&config)?;
        veths.push(veth);
        bundles.push(bundle);
    }
    let (origin, bundles) = bundles.split_last().context("there are bundles")?;
    let origin = templates.run(origin)?;
    let begun = now()?;
    let ran = std::thread::scope(|scope| {
        let runs: Vec<_> =
            bundles.iter().map(|bundle| scope.spawn(|| templates.run_as(bundle, |cmd| cmd.limit(LIMIT)))).collect();
        runs.into_iter().map(|run| run.join().unwrap_or_else(|_| anyhow::bail!("panicked"))).collect::<Result<Vec<_>>>()
    })?;
    let ended = now()?;

    let mut seen = vec![serde_json::from_str::<Value>(origin.output.text())?];
    for ((ran, bundle), veth) in ran.iter().zip(bundles).zip(&veths) {
        if templates.asked() {
            ran.expect_forked()?;
        }
        let told: Value = serde_json::from_str(ran.output.text())?;
        let clock = u128::from(told["realtime"].as_u64().context("a clock")?);
        ensure!(
            begun - CLOCK_ERROR < clock && clock < ended + CLOCK_ERROR,
            "{clock} is not within {begun} and {ended}"
        );
        expect_equal("MAC address", told["mac"].as_str(), Some(veth.mac()))?;
        expect_equal("host name", told["hostname"].as_str(), Some(bundle.id.as_str()))?;
        seen.push(told);
    }
    // Bytes of one source must not come back from another either.
    let mut sources = vec!["getrandom", "/dev/urandom", "AT_RANDOM", "uuid", "hostname", "mac"];
    // Containers of runc are all in one boot.
    sources.extend(templates.asked().then_some("boot_id"));
    let mut values = HashSet::new();
    for (source, told) in sources.iter().flat_map(|source| seen.iter().map(move |told| (source, told))) {
        let value = told[source].as_str().unwrap_or_default();
        ensure!(value.len() >= 16 && values.insert(value), "{source} {value:?} is no clone's own");
    }
    veths.iter().try_for_each(Veth::remove)?;
    Ok(Outcome::new().see("containers", ran.len()).see("exit codes", ran.iter().all(|ran| ran.output.code == 0)))
}

fn a_clone_knows_the_time(h: &Hand) -> Result<Outcome> {
    let templates = Templates::of(h);
    let probe = probe(h)?;
    let bundle = h.bundle("/probe; sleep 2; /probe")?;
    copy(&probe, &bundle.inside("probe"))?;
    // The template's own time stands still while the first container lives.
    templates.run(&bundle)?;
    let begun = now()?;
    let ran = templates.run(&bundle)?;
    let ended = now()?;
    if templates.asked() {
        ran.expect_forked()?;
    }
    let told: Vec<Value> = ran.output.text().lines().map(serde_json::from_str).collect::<Result<_, _>>()?;
    let [first, second] = [0, 1].map(|index| {
        let clock = |name: &str| told.get(index).and_then(|told: &Value| told[name].as_u64()).unwrap_or(0);
        (clock("realtime"), clock("monotonic"))
    });
    let (earliest, latest) = (begun - CLOCK_ERROR, ended + CLOCK_ERROR);
    ensure!(earliest < u128::from(first.0), "the time of day is {} before {begun}", first.0);
    ensure!(u128::from(second.0) < latest, "the time of day is {} after {ended}", second.0);
    let (day, run) = (second.0.saturating_sub(first.0), second.1.saturating_sub(first.1));
    ensure!((2 * SECOND..10 * SECOND).contains(&run), "two seconds of sleep were {run} ns");
    ensure!(day.abs_diff(run) < SECOND / 5, "by one clock {day} ns went by, by another {run} ns");
    Ok(Outcome::new().see("exit", ran.output.code))
}
