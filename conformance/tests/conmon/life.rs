//! A container's life.

use std::path::PathBuf;

use anyhow::{Result, ensure};
use conformance::bundle::Hand;
use conformance::command::eventually;
use conformance::suite::expect_equal;
use conformance::{Case, Cmd, Outcome, case};
use serde_json::{Value, json};

use crate::scene::{Scene, expect_line, without_times};

pub(crate) fn cases() -> Vec<Case<Hand>> {
    vec![
        case!(a_container_is_created_and_started_and_ends).tcg(),
        case!(a_program_that_is_not_there_is_told),
        case!(what_cannot_be_created_is_told),
        case!(a_stop_is_a_signal_and_then_another),
        case!(what_has_ended_is_not_found),
        case!(attach_joins_both_ways),
        case!(a_terminal_has_a_size),
        case!(a_log_is_opened_again),
        case!(a_pause_shows_in_the_state),
        case!(limits_are_updated),
        case!(an_oom_kill_is_noted),
        case!(the_cgroup_holds_the_container),
        case!(the_only_container_of_a_pod_has_what_is_pinned).tcg(),
    ]
}

fn a_container_is_created_and_started_and_ends(h: &Hand) -> Result<Outcome> {
    let scene = Scene::new(h, &["sh", "-c", "echo out; echo err >&2; printf 'no end'; exit 3"], |_| {})?;
    let pid = scene.create("")?;
    let written = std::fs::read_to_string(scene.bundle.path.join("pidfile"))?;
    let created = scene.bundle.state()?;
    expect_equal("PID", (created["pid"].as_i64(), written.trim()), (Some(pid.into()), &*pid.to_string()))?;
    expect_equal("status", created["status"].as_str(), Some("created"))?;
    scene.bundle.call("start").ok()?;
    let code = scene.wait()?;
    expect_equal("exit code", code.as_str(), "3")?;
    let log = without_times(&std::fs::read_to_string(scene.log())?);
    for line in ["stdout F out\n", "stderr F err\n", "stdout P no end\n"] {
        ensure!(log.contains(line), "{line:?} is missing in {log:?}");
    }
    scene.bundle.expect_stopped()?;
    let deleted = scene.call("delete --force", &[])?;
    let gone = scene.call("state", &[])?;
    Ok(Outcome::new().see("code", code).see_output("deleted", &deleted).see("gone", gone.code))
}

fn a_program_that_is_not_there_is_told(h: &Hand) -> Result<Outcome> {
    let scene = Scene::new(h, &["/bin/not-there"], |_| {})?;
    let message = scene.try_create("")?;
    ensure!(message.message.contains("no such file or directory"), "{}", message.message);
    Ok(Outcome::new().see("pid", message.pid))
}

fn what_cannot_be_created_is_told(h: &Hand) -> Result<Outcome> {
    let scene = Scene::new(h, &["true"], |config| config["root"]["path"] = json!("not-there"))?;
    let message = scene.try_create("")?;
    ensure!(message.message.contains("not-there"), "{}", message.message);
    Ok(Outcome::new().see("pid", message.pid).see("state", scene.call("state", &[])?.code))
}

fn a_stop_is_a_signal_and_then_another(h: &Hand) -> Result<Outcome> {
    let scene = Scene::sh(h, "trap 'echo heard' TERM; echo ready; while :; do sleep 0.1; done")?;
    scene.bundle.call("start").ok()?;
    scene.expect_log("ready")?;
    let term = scene.call("kill", &["15"])?;
    scene.expect_log("heard")?;
    let kill = scene.call("kill", &["KILL"])?;
    let code = scene.wait()?;
    expect_equal("exit code", code.as_str(), "137")?;
    Ok(Outcome::new().see_output("term", &term).see_output("kill", &kill).see("code", code))
}

/// CRI-O takes two sentences for "it is gone", and any other for a failure.
fn what_has_ended_is_not_found(h: &Hand) -> Result<Outcome> {
    let scene = Scene::sh(h, "exit 0")?;
    scene.bundle.call("start").ok()?;
    scene.wait()?;
    scene.bundle.expect_stopped()?;
    let kill = scene.call("kill", &["KILL"])?;
    let understood = ["no such process", "container not running"].iter().any(|known| kill.stderr.contains(known));
    ensure!(understood, "kill says {}", kill.stderr);
    Ok(Outcome::new().see("code", kill.code))
}

fn attach_joins_both_ways(h: &Hand) -> Result<Outcome> {
    let scene = Scene::new(h, &["sh", "-c", "read line; echo got $line; read line; exit 8"], |_| {})?;
    scene.create("--stdin --leave-stdin-open")?;
    let attached = scene.attach()?;
    scene.bundle.call("start").ok()?;
    attached.send("hello\n")?;
    attached.expect("got hello\n")?;
    drop(attached);
    // The standard input outlives who was attached.
    scene.attach()?.send("more\n")?;
    let code = scene.wait()?;
    expect_equal("exit code", code.as_str(), "8")?;
    Ok(Outcome::new().see("code", code))
}

fn a_terminal_has_a_size(h: &Hand) -> Result<Outcome> {
    let script = "until [ \"$(stty size)\" = '33 99' ]; do sleep 0.1; done; tty; read line; echo got $line";
    let scene = Scene::new(h, &["sh", "-c", script], |config| config["process"]["terminal"] = json!(true))?;
    scene.create("--terminal")?;
    let attached = scene.attach()?;
    scene.bundle.call("start").ok()?;
    scene.control("1 33 99\n")?;
    attached.expect("/dev/pts/0")?;
    attached.send("hello\n")?;
    attached.expect("got hello")?;
    Ok(Outcome::new().see("code", scene.wait()?))
}

fn a_log_is_opened_again(h: &Hand) -> Result<Outcome> {
    let scene = Scene::sh(h, "echo one; until [ -e /go ]; do sleep 0.1; done; echo two")?;
    scene.bundle.call("start").ok()?;
    scene.expect_log("one")?;
    let old = scene.log().with_extension("old");
    std::fs::rename(scene.log(), &old)?;
    scene.control("2 0 0\n")?;
    eventually(std::time::Duration::from_secs(30), "the new log", || Ok(scene.log().exists().then_some(())))?;
    std::fs::write(scene.bundle.inside("/go"), "")?;
    let new = without_times(&scene.expect_log("two")?);
    Ok(Outcome::new().see("old", without_times(&expect_line(&old, "one")?)).see("new", new))
}

fn a_pause_shows_in_the_state(h: &Hand) -> Result<Outcome> {
    let scene = Scene::sh(h, "exec sleep 1000")?;
    scene.bundle.call("start").ok()?;
    let pause = scene.call("pause", &[])?;
    let paused = scene.bundle.status()?;
    let resume = scene.call("resume", &[])?;
    expect_equal("states", (paused.as_str(), scene.bundle.status()?.as_str()), ("paused", "running"))?;
    Ok(Outcome::new().see_output("pause", &pause).see_output("resume", &resume))
}

fn limits_are_updated(h: &Hand) -> Result<Outcome> {
    let limits = |config: &mut Value| config["linux"]["resources"]["memory"] = json!({ "limit": 67_108_864 });
    let scene = Scene::new(h, &["sleep", "1000"], limits)?;
    scene.create("")?;
    scene.bundle.call("start").ok()?;
    let resources = json!({
        "memory": { "limit": 83_886_080 },
        "cpu": { "shares": 512, "quota": 50_000, "period": 100_000, "cpus": "", "mems": "" },
    });
    let update = scene.bundle.call("update --resources -").input(resources.to_string()).run()?;
    expect_equal("exit code", (update.code, update.stderr.as_str()), (0, ""))?;
    let script = "cd /sys/fs/cgroup; cat memory/memory.limit_in_bytes 2>/dev/null || cat memory.max;
                  cat cpu/cpu.cfs_quota_us 2>/dev/null || cut -d ' ' -f 1 cpu.max";
    let seen = scene.bundle.exec("", script).ok()?;
    expect_equal("limits", seen.text(), "83886080\n50000")?;
    Ok(Outcome::new().see_output("seen", &seen))
}

fn an_oom_kill_is_noted(h: &Hand) -> Result<Outcome> {
    let limits = |config: &mut Value| config["linux"]["resources"]["memory"] = json!({ "limit": 67_108_864 });
    let scene = Scene::new(h, &["tail", "-c", "300m", "/dev/zero"], limits)?;
    scene.create("")?;
    scene.bundle.call("start").ok()?;
    let code = scene.wait()?;
    expect_equal("exit code", code.as_str(), "137")?;
    // The first is Podman's from 4.4 on, the second CRI-O's.
    Ok(Outcome::new()
        .see("in the persistent folder", scene.persisted("oom").exists())
        .see("in the bundle", scene.bundle.path.join("oom").exists()))
}

/// CRI-O reads there what a container uses.
fn the_cgroup_holds_the_container(h: &Hand) -> Result<Outcome> {
    let scene = Scene::new(h, &["sleep", "1000"], |_| {})?;
    let pid = scene.create("")?;
    scene.bundle.call("start").ok()?;
    let groups = std::fs::read_to_string(format!("/proc/{pid}/cgroup"))?;
    let of_memory =
        groups.lines().find(|line| line.split(':').nth(1).is_some_and(|names| names == "memory" || names.is_empty()));
    ensure!(of_memory.is_some_and(|line| line.ends_with(&scene.bundle.id)), "not in the cgroup asked for:\n{groups}");
    Ok(Outcome::new().see("there", true))
}

/// A namespace that a file keeps, as CRI-O's `pinns` makes them for a pod without a container that only waits.
struct Pinned(PathBuf);

impl Pinned {
    fn new(h: &Hand, kind: &str, script: &str) -> Result<Self> {
        let path = h.folder().join(kind);
        std::fs::write(&path, "")?;
        Cmd::new("unshare").arg(format!("--{kind}={}", path.display())).args(["sh", "-c", script]).ok()?;
        Ok(Self(path))
    }
}

impl Drop for Pinned {
    fn drop(&mut self) {
        let _ = Cmd::new("umount").arg(&self.0).run();
    }
}

fn the_only_container_of_a_pod_has_what_is_pinned(h: &Hand) -> Result<Outcome> {
    let network =
        "ip link add eth0 type veth peer name other; ip address add 192.0.2.77/24 dev eth0; ip link set eth0 up";
    let pinned = [("net", "network", network), ("uts", "uts", "hostname the-pod"), ("ipc", "ipc", "true")]
        .into_iter()
        .map(|(option, kind, script)| Ok((kind, Pinned::new(h, option, script)?)))
        .collect::<Result<Vec<_>>>()?;
    let script = "hostname; ip -o -4 address show eth0 | tr -s ' ' | cut -d ' ' -f 4";
    let scene = Scene::new(h, &["sh", "-c", script], |config| {
        config.as_object_mut().map(|fields| fields.remove("hostname"));
        config["annotations"] = json!({
            "io.kubernetes.cri-o.ContainerType": "container",
            "io.kubernetes.cri-o.SandboxID": h.folder(),
        });
        for namespace in config["linux"]["namespaces"].as_array_mut().into_iter().flatten() {
            if let Some((_, pinned)) = pinned.iter().find(|(kind, _)| namespace["type"] == *kind) {
                namespace["path"] = json!(pinned.0);
            }
        }
    })?;
    scene.create("")?;
    scene.bundle.call("start").ok()?;
    let code = scene.wait()?;
    let log = without_times(&std::fs::read_to_string(scene.log())?);
    expect_equal("log", log.as_str(), "stdout F the-pod\nstdout F 192.0.2.77/24\n")?;
    Ok(Outcome::new().see("code", code))
}
