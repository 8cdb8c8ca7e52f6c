//! Containers that rest, and what can be done with them meanwhile.

use std::time::{Duration, SystemTime};

use anyhow::{Result, ensure};
use conformance::bundle::{Bundle, Hand};
use conformance::suite::expect_equal;
use conformance::{Case, Outcome, case};

pub(crate) fn cases() -> Vec<Case<Hand>> {
    vec![
        case!(nothing_runs_and_all_goes_on).tcg(),
        case!(a_signal_comes_with_the_end_of_the_pause).tcg(),
        case!(a_paused_container_can_be_killed),
        case!(all_of_a_paused_container_can_be_killed),
        case!(a_paused_container_can_be_deleted_by_force),
        case!(a_created_container_can_be_paused),
        case!(exec_in_a_paused_container_is_refused),
        case!(limits_and_statistics_of_a_paused_container),
        case!(what_does_not_run_cannot_be_paused),
    ]
}

const COUNTING: &str = "echo ready; while :; do sleep 0.05; echo tick; done";

fn paused<'a>(h: &'a Hand, script: &str) -> Result<Bundle<'a>> {
    let bundle = h.bundle(script)?;
    bundle.start()?;
    bundle.expect_written("ready")?;
    bundle.call("pause").ok()?;
    Ok(bundle)
}

fn nothing_runs_and_all_goes_on(h: &Hand) -> Result<Outcome> {
    let bundle = paused(h, COUNTING)?;
    let ticks = || Ok::<_, anyhow::Error>(bundle.written("out")?.lines().count());
    // What was written before may still be on its way.
    std::thread::sleep(Duration::from_millis(500));
    let before = ticks()?;
    std::thread::sleep(Duration::from_secs(2));
    expect_equal("ticks in the pause", ticks()?, before)?;
    bundle.call("resume").ok()?;
    conformance::command::eventually(Duration::from_secs(20), "ticks after the pause", || {
        Ok((ticks()? > before + 3).then_some(()))
    })?;
    // Its clock goes on in a pause, as that of any frozen process.
    let seconds = || Ok::<_, anyhow::Error>(SystemTime::now().duration_since(SystemTime::UNIX_EPOCH)?.as_secs());
    let earliest = seconds()?;
    let told: u64 = bundle.exec("", "date +%s").ok()?.text().parse()?;
    let latest = seconds()?;
    ensure!((earliest - 1..=latest + 1).contains(&told), "its clock says {told} between {earliest} and {latest}");
    Ok(Outcome::new().see("then", bundle.status()?))
}

fn a_signal_comes_with_the_end_of_the_pause(h: &Hand) -> Result<Outcome> {
    let bundle = paused(h, "trap 'echo term; exit 3' TERM; echo ready; while :; do sleep 0.1; done")?;
    let sent = bundle.call("kill").arg("TERM").run()?;
    std::thread::sleep(Duration::from_millis(500));
    expect_equal("output in the pause", bundle.written("out")?.as_str(), "ready\n")?;
    let status = bundle.status()?;
    bundle.call("resume").ok()?;
    bundle.expect_written("term")?;
    bundle.expect_stopped()?;
    Ok(Outcome::new().see("sent", sent.code).see("in the pause", status))
}

fn a_paused_container_can_be_killed(h: &Hand) -> Result<Outcome> {
    let bundle = paused(h, COUNTING)?;
    let killed = bundle.call("kill").arg("KILL").run()?;
    bundle.expect_stopped()?;
    bundle.call("delete").ok()?;
    bundle.expect_no_trace()?;
    Ok(Outcome::new().see_output("kill", &killed))
}

fn all_of_a_paused_container_can_be_killed(h: &Hand) -> Result<Outcome> {
    let bundle = paused(h, "sleep 1000 & echo ready; wait")?;
    let killed = bundle.call("kill --all").arg("KILL").run()?;
    // runc leaves them frozen: with version 1 of cgroups they end when they are thawed.
    let _ = bundle.call("resume").run()?;
    bundle.expect_stopped()?;
    Ok(Outcome::new().see("kill", killed.code))
}

fn a_paused_container_can_be_deleted_by_force(h: &Hand) -> Result<Outcome> {
    let bundle = paused(h, COUNTING)?;
    let plain = bundle.call("delete").run()?;
    let force = bundle.call("delete --force").run()?;
    bundle.expect_no_trace()?;
    Ok(Outcome::new().see("plain", plain.code).see_output("force", &force))
}

fn a_created_container_can_be_paused(h: &Hand) -> Result<Outcome> {
    let bundle = h.bundle("echo started; sleep 1000")?;
    bundle.create()?;
    bundle.call("pause").ok()?;
    let paused = bundle.status()?;
    let start = bundle.call("start").run()?;
    bundle.call("resume").ok()?;
    let resumed = bundle.status()?;
    bundle.call("start").ok()?;
    bundle.expect_written("started")?;
    Ok(Outcome::new().see("paused", paused).see("start", start.code).see("resumed", resumed))
}

fn exec_in_a_paused_container_is_refused(h: &Hand) -> Result<Outcome> {
    let bundle = paused(h, COUNTING)?;
    let output = bundle.exec("", "echo inside").run()?;
    ensure!(output.stderr.contains("cannot exec in a paused container"), "another sentence: {}", output.stderr);
    Ok(Outcome::new().see("exit", output.code).see("then", bundle.status()?))
}

fn limits_and_statistics_of_a_paused_container(h: &Hand) -> Result<Outcome> {
    let bundle = paused(h, COUNTING)?;
    let update = bundle.call("update --pids-limit 77").run()?;
    let events = bundle.call("events --stats").ok()?;
    let statistics: serde_json::Value = serde_json::from_str(&events.stdout)?;
    let ticks = bundle.written("out")?;
    std::thread::sleep(Duration::from_millis(500));
    expect_equal("output after the verbs", bundle.written("out")?, ticks)?;
    Ok(Outcome::new()
        .see("update", update.code)
        .see("limit", &statistics["data"]["pids"]["limit"])
        .see("then", bundle.status()?))
}

fn what_does_not_run_cannot_be_paused(h: &Hand) -> Result<Outcome> {
    let bundle = h.bundle("exit 0")?;
    bundle.start()?;
    bundle.expect_stopped()?;
    let pause = bundle.call("pause").run()?;
    ensure!(pause.stderr.contains("container not running"), "another sentence: {}", pause.stderr);
    let resume = bundle.call("resume").run()?;
    ensure!(resume.stderr.contains("container not paused"), "another sentence: {}", resume.stderr);
    Ok(Outcome::new().see("pause", pause.code).see("resume", resume.code))
}
