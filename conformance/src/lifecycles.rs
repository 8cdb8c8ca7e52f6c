//! Lifecycles one after another: how many, and what they may take.

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};

/// How many lifecycles there are, unless [`COUNT`] says otherwise.
const LIFECYCLES: usize = 50;
/// The variable with their number.
const COUNT: &str = "RUNVM_LIFECYCLES";
/// How much slower the last fifth may be than the first, by its median, and how much in any case: machines are noisy.
const SLOWER: u32 = 2;
const NOISE: Duration = Duration::from_millis(200);

/// Goes through as many lifecycles as are wanted, the last of which have to be as quick as the first.
pub fn one_after_another(mut lifecycle: impl FnMut() -> Result<()>) -> Result<()> {
    let times = (0..count()?).map(|_| {
        let begun = Instant::now();
        lifecycle()?;
        Ok(begun.elapsed())
    });
    expect_as_quick(&times.collect::<Result<Vec<_>>>()?)
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
