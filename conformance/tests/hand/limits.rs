//! What a container may use, what it does use, and when that is too much.

use std::io::{BufRead as _, BufReader};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use conformance::bundle::{Bundle, Hand};
use conformance::command::eventually;
use conformance::suite::expect_equal;
use conformance::{Case, Outcome, case};
use serde_json::{Value, json};

pub(crate) fn cases() -> Vec<Case<Hand>> {
    vec![
        case!(update_by_options).tcg(),
        case!(update_by_a_file),
        case!(update_leaves_what_is_not_named),
        case!(what_finds_no_memory_ends_soon).tcg(),
        case!(copies_of_a_process_take_what_they_write_to),
        case!(update_holds),
        case!(update_below_what_is_used),
        case!(update_beyond_the_machine),
        case!(update_of_what_is_no_limit),
        case!(update_needs_a_running_container),
        case!(statistics_are_the_containers).tcg(),
        case!(events_come_and_end).alone(),
        case!(events_of_what_does_not_run),
        case!(a_guest_that_wants_all_memory_harms_itself),
    ]
}

/// Prints a limit, by its file in a cgroup of version 1 or 2, whichever is there.
fn limit_inside(bundle: &Bundle, controller: &str, v1: &str, v2: &str) -> Result<String> {
    let root = "/sys/fs/cgroup";
    let script = format!("cat {root}/{controller}/{v1} 2>/dev/null || cat {root}/{v2}");
    Ok(bundle.exec("", &script).ok()?.text().to_owned())
}

fn memory_inside(bundle: &Bundle) -> Result<String> {
    limit_inside(bundle, "memory", "memory.limit_in_bytes", "memory.max")
}

fn pids_inside(bundle: &Bundle) -> Result<String> {
    limit_inside(bundle, "pids", "pids.max", "pids.max")
}

/// The quota, in version 2 the first word of two.
fn quota_inside(bundle: &Bundle) -> Result<String> {
    let quota = limit_inside(bundle, "cpu", "cpu.cfs_quota_us", "cpu.max")?;
    Ok(quota.split(' ').next().unwrap_or_default().to_owned())
}

/// The quota of the container's cgroup on the host.
fn quota_outside(bundle: &Bundle) -> Result<String> {
    let config: Value = serde_json::from_slice(&std::fs::read(bundle.path.join("config.json"))?)?;
    let cgroup = config["linux"]["cgroupsPath"].as_str().unwrap_or_default().trim_start_matches('/').to_owned();
    let root = Path::new("/sys/fs/cgroup");
    let files = [root.join("cpu").join(&cgroup).join("cpu.cfs_quota_us"), root.join(&cgroup).join("cpu.max")];
    let file: &PathBuf = files.iter().find(|file| file.exists()).context("there is no cgroup on the host")?;
    Ok(std::fs::read_to_string(file)?.split_whitespace().next().unwrap_or_default().to_owned())
}

fn limited(h: &Hand) -> Result<Bundle<'_>> {
    let resources = json!({"memory": {"limit": 64 << 20}, "pids": {"limit": 50}});
    let bundle = h.bundle_with(&["sleep", "1000"], |config| config["linux"]["resources"] = resources)?;
    bundle.start()?;
    Ok(bundle)
}

fn update_by_options(h: &Hand) -> Result<Outcome> {
    let bundle = limited(h)?;
    let options =
        "--memory 80m --memory-reservation 20m --pids-limit 60 --cpu-quota 50000 --cpu-period 100000 --cpu-share 512";
    let output = bundle.call(&format!("update {options}")).run()?;
    expect_equal("memory", memory_inside(&bundle)?.as_str(), "83886080")?;
    expect_equal("processes", pids_inside(&bundle)?.as_str(), "60")?;
    expect_equal("quota", quota_inside(&bundle)?.as_str(), "50000")?;
    expect_equal("quota on the host", quota_outside(&bundle)?.as_str(), "50000")?;
    Ok(Outcome::new().see_output("update", &output).see("then", bundle.status()?))
}

fn update_by_a_file(h: &Hand) -> Result<Outcome> {
    let bundle = limited(h)?;
    let file = h.folder().join("resources.json");
    // Docker names all that it knows, and means by 0 that it stays.
    let all = json!({
        "memory": {"limit": 72 << 20, "reservation": 0, "swap": 0},
        "cpu": {"shares": 0, "quota": 40000, "period": 0, "realtimeRuntime": 0, "realtimePeriod": 0, "cpus": "", "mems": ""},
        "blockIO": {"weight": 0},
    });
    std::fs::write(&file, all.to_string())?;
    // The other options count for nothing beside it.
    bundle.call(&format!("update --pids-limit 7 --resources {}", file.display())).ok()?;
    let by_file = (memory_inside(&bundle)?, pids_inside(&bundle)?, quota_inside(&bundle)?);
    expect_equal("by the file", by_file, ("75497472".into(), "50".into(), "40000".into()))?;
    let stdin = bundle.call("update -r -").input(r#"{"cpu":{"quota":30000},"pids":{"limit":55}}"#).run()?;
    expect_equal("by stdin", (quota_inside(&bundle)?, pids_inside(&bundle)?), ("30000".into(), "55".into()))?;
    let damaged = bundle.call("update -r -").input(r#"{"cpu":{"quota":"#).run()?;
    Ok(Outcome::new().see_output("update", &stdin).see("damaged", damaged.code))
}

fn update_leaves_what_is_not_named(h: &Hand) -> Result<Outcome> {
    let bundle = limited(h)?;
    bundle.call("update --cpu-quota 50000").ok()?;
    bundle.call("update --cpu-period 50000").ok()?;
    let after = (memory_inside(&bundle)?, pids_inside(&bundle)?, quota_inside(&bundle)?, quota_outside(&bundle)?);
    expect_equal("limits", after, ("67108864".into(), "50".into(), "50000".into(), "50000".into()))?;
    Ok(Outcome::new().see("then", bundle.status()?))
}

/// Takes 40 MiB. A kernel that is interrupted while it frees what the first victim had may look for a second one, which
/// must not be the container's first process.
const TAKE_40M: &str = "echo 1000 >/proc/self/oom_score_adj; head -c 40m /dev/zero | tail -c 40m | wc -c";

fn what_finds_no_memory_ends_soon(h: &Hand) -> Result<Outcome> {
    const SOON: Duration = Duration::from_secs(30);
    let bundle = h.bundle_with(&["sleep", "1000"], |config| {
        config["linux"]["resources"] = json!({"memory": {"limit": 24 << 20, "swap": 24 << 20}});
    })?;
    bundle.start()?;
    // The pages of programs that are evicted and read again can keep a kernel busy for long, and do not each time.
    for _ in 0..4 {
        let output = bundle.exec("", TAKE_40M).limit(SOON).run()?;
        ensure!(!output.stdout.contains("41943040"), "40 MiB in 24: {}", output.stdout);
    }
    Ok(Outcome::new().see("then", bundle.status()?))
}

/// Forty shells have a variable in common that forty times would not fit.
fn copies_of_a_process_take_what_they_write_to(h: &Hand) -> Result<Outcome> {
    let script = "x=$(head -c 700000 /dev/zero | tr '\\0' x); mkfifo /gate; exec 3<>/gate; i=0; \
        while [ $i -lt 40 ]; do (read -r line; echo there) </gate 3>&- & i=$((i+1)); done; exec 3>&-; wait";
    let bundle = h.bundle_with(&["sleep", "1000"], |config| {
        config["linux"]["resources"] = json!({"memory": {"limit": 24 << 20, "swap": 24 << 20}});
    })?;
    bundle.start()?;
    let output = bundle.exec("", script).run()?;
    expect_equal("answers", output.stdout.lines().filter(|line| *line == "there").count(), 40)?;
    Ok(Outcome::new().see("code", output.code))
}

fn update_holds(h: &Hand) -> Result<Outcome> {
    let bundle = limited(h)?;
    expect_equal("before", bundle.exec("", TAKE_40M).run()?.text(), "41943040")?;
    bundle.call("update --memory 24m --memory-swap 24m").ok()?;
    let after = bundle.exec("", TAKE_40M).run()?;
    ensure!(!after.stdout.contains("41943040"), "40 MiB in 24: {}", after.stdout);
    bundle.call("update --pids-limit 5").ok()?;
    let forks = bundle.exec("", "for i in 1 2 3 4 5 6 7 8; do sleep 2 & done; echo all started").run();
    ensure!(!forks.is_ok_and(|forks| forks.stdout.contains("all started")), "eight processes where five are allowed");
    Ok(Outcome::new().see("then", bundle.status()?))
}

fn update_below_what_is_used(h: &Hand) -> Result<Outcome> {
    // What tail has read it holds until somebody reads it, and the first byte comes after all of it.
    let script = "head -c 30m /dev/zero | tail -c 30m | (head -c 1 >/dev/null; echo ready; sleep 1000)";
    let bundle = h.bundle_with(&["sh", "-c", script], |config| {
        config["linux"]["resources"] = json!({"memory": {"limit": 64 << 20, "swap": 64 << 20}});
    })?;
    bundle.start()?;
    bundle.expect_written("ready")?;
    let output = bundle.call("update --memory 10m --memory-swap 10m").run()?;
    Ok(Outcome::new().see("refused", output.code != 0).see("then", bundle.status()?))
}

fn update_beyond_the_machine(h: &Hand) -> Result<Outcome> {
    let bundle = limited(h)?;
    let output = bundle.call("update --memory 32g --memory-swap 32g").run()?;
    let status = bundle.status()?;
    if output.code != 0 {
        ensure!(output.stderr.contains("the container's VM has"), "another sentence: {}", output.stderr);
        expect_equal("memory", memory_inside(&bundle)?.as_str(), "67108864")?;
    }
    Ok(Outcome::new().see("exit", output.code).see("then", status))
}

fn update_of_what_is_no_limit(h: &Hand) -> Result<Outcome> {
    let bundle = limited(h)?;
    let code = |words: &str| Ok::<_, anyhow::Error>(bundle.call(&format!("update {words}")).run()?.code);
    let outcome = Outcome::new()
        .see("size", code("--memory much")?)
        .see("processors", code("--cpuset-cpus 4000")?)
        .see("caches", code("--l3-cache-schema L3:0=ffff")?)
        .see("file", code("--resources /no/such/file")?);
    expect_equal("memory", memory_inside(&bundle)?.as_str(), "67108864")?;
    Ok(outcome)
}

fn update_needs_a_running_container(h: &Hand) -> Result<Outcome> {
    let bundle = h.bundle("exit 0")?;
    bundle.start()?;
    bundle.expect_stopped()?;
    let output = bundle.call("update --pids-limit 7").run()?;
    ensure!(output.stderr.contains("container not running"), "another sentence: {}", output.stderr);
    Ok(Outcome::new().see("exit", output.code))
}

fn statistics_are_the_containers(h: &Hand) -> Result<Outcome> {
    let bundle = limited(h)?;
    bundle.exec("", "i=0; while [ $i -lt 200000 ]; do i=$((i+1)); done").ok()?;
    let output = bundle.call("events --stats").ok()?;
    let event: Value = serde_json::from_str(&output.stdout)?;
    let number = |pointer: &str| event.pointer(pointer).and_then(Value::as_u64).with_context(|| pointer.to_owned());
    ensure!(number("/data/cpu/usage/total")? > 20_000_000, "less than 20 ms of processor time: {event}");
    ensure!((1..64 << 20).contains(&number("/data/memory/usage/usage")?), "more memory than its limit: {event}");
    ensure!(event.pointer("/data/memory/raw").is_some_and(Value::is_object), "no details: {event}");
    let data = event["data"].as_object().context("there is no data")?;
    Ok(Outcome::new()
        .see("type", &event["type"])
        .see("id", event["id"].as_str() == Some(&bundle.id))
        .see("fields", data.keys().cloned().collect::<Vec<_>>().join(" "))
        .see("memory limit", number("/data/memory/usage/limit")?)
        .see("processes", number("/data/pids/current")?)
        .see("processes limit", number("/data/pids/limit")?))
}

fn events_come_and_end(h: &Hand) -> Result<Outcome> {
    let bundle = limited(h)?;
    let mut events = bundle.call("events --interval 200ms").into_command().stdout(Stdio::piped()).spawn()?;
    let mut lines = BufReader::new(events.stdout.take().context("the events are piped")?).lines();
    let mut next = |kind: &str| -> Result<Value> {
        loop {
            let line = lines.next().with_context(|| format!("the events end before one of type {kind}"))??;
            let event: Value = serde_json::from_str(&line)?;
            if event["type"] == kind {
                return Ok(event);
            }
        }
    };
    next("stats")?;
    let killed = bundle.exec("", "exec tail -c 300m /dev/zero").run()?;
    let oom = next("oom")?;
    next("stats")?;
    bundle.call("delete --force").ok()?;
    if h.runtime().is_runc() {
        // Its events go on for as long as its cgroup's file system remembers.
        events.kill()?;
    }
    eventually(Duration::from_secs(20), "the end of the events", || Ok(events.try_wait()?.map(drop)))?;
    Ok(Outcome::new().see("killed", killed.code).see("id", oom["id"].as_str() == Some(&bundle.id)))
}

fn events_of_what_does_not_run(h: &Hand) -> Result<Outcome> {
    let bundle = h.bundle("exit 0")?;
    bundle.start()?;
    bundle.expect_stopped()?;
    Ok(Outcome::new()
        .see("statistics", bundle.call("events --stats").run()?.code)
        .see("events", bundle.call("events").run()?.code)
        .see("no interval", bundle.call("events --interval 0s").run()?.code))
}

fn a_guest_that_wants_all_memory_harms_itself(h: &Hand) -> Result<Outcome> {
    let resources = json!({"memory": {"limit": 48 << 20, "swap": 48 << 20}});
    let hungry =
        h.bundle_with(&["tail", "-c", "300m", "/dev/zero"], |config| config["linux"]["resources"] = resources)?;
    let bundle = limited(h)?;
    let output = hungry.run().run()?;
    expect_equal("the other", bundle.exec("", "echo goes on").run()?.text(), "goes on")?;
    hungry.expect_no_trace()?;
    Ok(Outcome::new().see("exit", output.code))
}
