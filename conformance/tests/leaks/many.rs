//! Lifecycles one after another, forked from one template where there are templates: nothing stays, and the last are no
//! slower than the first.

use std::collections::BTreeSet;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use conformance::bundle::Hand;
use conformance::census::Census;
use conformance::suite::expect_equal;
use conformance::{Case, Outcome, case};

/// How many lifecycles there are, unless [`COUNT`] says otherwise.
const LIFECYCLES: usize = 50;
/// The variable with their number.
const COUNT: &str = "RUNVM_LIFECYCLES";
/// How much slower the last fifth may be than the first, by its median, and how much in any case: machines are noisy.
const SLOWER: u32 = 2;
const NOISE: Duration = Duration::from_millis(200);

pub(crate) fn cases() -> Vec<Case<Hand>> {
    vec![
        case!(lifecycles_leave_nothing_and_stay_as_quick).alone(),
        case!(lifecycles_in_steps_leave_nothing_and_stay_as_quick).alone(),
    ]
}

fn lifecycles_leave_nothing_and_stay_as_quick(h: &Hand) -> Result<Outcome> {
    let count = count()?;
    let folder = h.folder().join("templates");
    let log = h.folder().join("log");
    let bundle = h.bundle("echo ran; exit 3")?;
    let run = || bundle.call(&format!("--debug --log {} run", log.display())).current_dir(&bundle.path);
    let lifecycle = || {
        let begun = Instant::now();
        let output = run().env("RUNVM_TEMPLATE_DIR", &folder).run()?;
        expect_equal("output and exit code", (output.text(), output.code), ("ran", 3))?;
        anyhow::Ok(begun.elapsed())
    };
    // What is made once, a template above all, is there before the first that counts.
    lifecycle()?;
    let before = Census::take()?;
    let templates = files(&folder)?;
    let mut times = Vec::new();
    for _ in 0..count {
        // The log of one is as long as that of another.
        std::fs::remove_file(&log)?;
        times.push(lifecycle()?);
        if !h.runtime().is_runc() {
            let log = std::fs::read_to_string(&log)?;
            ensure!(!log.contains("machine booted"), "not forked:\n{log}");
        }
    }
    before.expect_nothing_new()?;
    expect_equal("files of templates", files(&folder)?, templates)?;
    expect_as_quick(&times)?;
    Ok(Outcome::new().see("left", 0))
}

/// The same as an engine does it, verb by verb, with an exec in between.
fn lifecycles_in_steps_leave_nothing_and_stay_as_quick(h: &Hand) -> Result<Outcome> {
    let count = count()?;
    let bundle = h.bundle("read word; exit 3")?;
    let lifecycle = || {
        let begun = Instant::now();
        bundle.create()?;
        expect_equal("output of exec", bundle.exec("", "echo ran").ok()?.text(), "ran")?;
        bundle.call("start").ok()?;
        bundle.expect_stopped()?;
        bundle.call("delete").ok()?;
        anyhow::Ok(begun.elapsed())
    };
    lifecycle()?;
    let before = Census::take()?;
    let times = (0..count).map(|_| lifecycle()).collect::<Result<Vec<_>>>()?;
    before.expect_nothing_new()?;
    expect_as_quick(&times)?;
    Ok(Outcome::new().see("left", 0))
}

/// How many lifecycles are wanted.
fn count() -> Result<usize> {
    let count = match std::env::var(COUNT) {
        Ok(count) => count.parse().with_context(|| format!("{COUNT}={count} is no number"))?,
        Err(_) => LIFECYCLES,
    };
    ensure!(count >= 5, "{COUNT}={count} has no first and last fifth");
    Ok(count)
}

fn expect_as_quick(times: &[Duration]) -> Result<()> {
    let fifth = times.len() / 5;
    let (first, last) = (median(&times[..fifth]), median(&times[times.len() - fifth..]));
    ensure!(last < first * SLOWER + NOISE, "at first a lifecycle took {first:?}, in the end {last:?}");
    Ok(())
}

fn median(times: &[Duration]) -> Duration {
    let mut times = times.to_vec();
    times.sort_unstable();
    times.get(times.len() / 2).copied().unwrap_or_default()
}

/// Everything in a folder, which need not be there.
fn files(folder: &Path) -> Result<BTreeSet<String>> {
    let mut found = BTreeSet::new();
    let mut todo = vec![folder.to_owned()];
    while let Some(folder) = todo.pop().filter(|folder| folder.exists()) {
        for entry in std::fs::read_dir(folder)? {
            let entry = entry?;
            found.insert(entry.path().display().to_string());
            if entry.file_type()?.is_dir() {
                todo.push(entry.path());
            }
        }
    }
    Ok(found)
}
