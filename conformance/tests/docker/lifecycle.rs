//! The verbs of Docker's client on a container's life.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use conformance::command::eventually;
use conformance::docker::Docker;
use conformance::suite::expect_equal;
use conformance::{Case, Outcome, Terminal, case};

pub(crate) fn cases() -> Vec<Case<Docker>> {
    vec![
        case!(stop_lets_a_program_end_by_itself).tcg(),
        case!(stop_kills_what_does_not_listen),
        case!(kill_sends_the_signal_asked_for),
        case!(create_then_start_attached),
        case!(stopped_container_starts_again),
        case!(restart_keeps_the_files),
        case!(pause_freezes_and_unpause_goes_on),
        case!(a_paused_container_can_be_killed_and_removed),
        case!(restart_policy_starts_it_again),
        case!(logs_have_a_tail),
        case!(inspect_tells_the_state),
        case!(attach_joins_the_output),
        case!(several_run_at_once),
        case!(remove_by_force_while_running),
        case!(killed_from_the_host),
    ]
}

const PATIENCE: Duration = Duration::from_secs(30);

fn stop_lets_a_program_end_by_itself(d: &Docker) -> Result<Outcome> {
    let container = d.start_sh("", "trap 'echo bye; exit 7' TERM; echo ready; while :; do sleep 0.1; done")?;
    container.expect_log("ready")?;
    let begin = Instant::now();
    container.docker("stop --time 20").ok()?;
    ensure!(begin.elapsed() < Duration::from_secs(15), "the program's own end took {:?}", begin.elapsed());
    let code = container.wait()?;
    expect_equal("exit code", code, 7)?;
    Ok(Outcome::new().see("code", code).see_output("logs", &container.docker("logs").ok()?))
}

fn stop_kills_what_does_not_listen(d: &Docker) -> Result<Outcome> {
    let container = d.start_sh("", "trap '' TERM; echo ready; while :; do sleep 0.1; done")?;
    container.expect_log("ready")?;
    container.docker("stop --time 1").ok()?;
    let code = container.wait()?;
    expect_equal("exit code", code, 137)?;
    Ok(Outcome::new().see("code", code))
}

fn kill_sends_the_signal_asked_for(d: &Docker) -> Result<Outcome> {
    let script = "trap 'echo usr1' USR1; trap 'exit 9' HUP; echo ready; while :; do sleep 0.1; done";
    let container = d.start_sh("", script)?;
    container.expect_log("ready")?;
    container.docker("kill --signal USR1").ok()?;
    container.expect_log("usr1")?;
    container.docker("kill --signal HUP").ok()?;
    let code = container.wait()?;
    expect_equal("exit code", code, 9)?;
    Ok(Outcome::new().see("code", code).see("again", container.docker("kill").run()?.stderr))
}

fn create_then_start_attached(d: &Docker) -> Result<Outcome> {
    let container = d.create("--interactive", &["sh", "-c", "cat; exit 6"])?;
    let output = container.docker("start --attach --interactive").input("typed\n").run()?;
    expect_equal("output", (output.text(), output.code), ("typed", 6))?;
    Ok(Outcome::new().see_output("start", &output))
}

fn stopped_container_starts_again(d: &Docker) -> Result<Outcome> {
    let container = d.start_sh("", "echo run >>/runs; wc -l </runs; exit 2")?;
    let first = container.wait()?;
    let second = container.docker("start --attach").run()?;
    expect_equal("runs counted in the kept file", second.text(), "2")?;
    Ok(Outcome::new().see("first", first).see_output("second", &second))
}

fn restart_keeps_the_files(d: &Docker) -> Result<Outcome> {
    let container = d.start_sh("", "cat /kept 2>/dev/null; echo kept >/kept; echo ready; sleep 1000")?;
    container.expect_log("ready")?;
    container.docker("restart --time 0").ok()?;
    container.expect_log("kept")?;
    Ok(Outcome::new().see("state", container.inspect("{{.State.Status}} {{.RestartCount}}")?))
}

fn a_paused_container_can_be_killed_and_removed(d: &Docker) -> Result<Outcome> {
    let killed = d.start("", &["sleep", "1000"])?;
    killed.docker("pause").ok()?;
    let exec = killed.exec("", &["true"]).run()?;
    let kill = killed.docker("kill").run()?;
    let code = killed.wait()?;
    let removed = d.start("", &["sleep", "1000"])?;
    removed.docker("pause").ok()?;
    let remove = removed.docker("rm --force").run()?;
    Ok(Outcome::new().see("exec", exec.code).see("kill", kill.code).see("code", code).see("remove", remove.code))
}

fn pause_freezes_and_unpause_goes_on(d: &Docker) -> Result<Outcome> {
    let container = d.start_sh("", "while :; do echo tick; sleep 0.1; done")?;
    container.expect_log("tick")?;
    container.docker("pause").ok()?;
    let paused = container.inspect("{{.State.Status}}")?;
    let ticks = || Ok::<_, anyhow::Error>(container.docker("logs").ok()?.stdout.lines().count());
    // What was written before the pause may still be on its way to the log.
    std::thread::sleep(Duration::from_millis(500));
    let before = ticks()?;
    std::thread::sleep(Duration::from_millis(700));
    expect_equal("ticks while paused", ticks()?, before)?;
    container.docker("unpause").ok()?;
    eventually(PATIENCE, "ticks after the pause", || Ok((ticks()? > before).then_some(())))?;
    expect_equal("state while paused", paused.as_str(), "paused")?;
    Ok(Outcome::new().see("paused", paused).see("then", container.inspect("{{.State.Status}}")?))
}

fn restart_policy_starts_it_again(d: &Docker) -> Result<Outcome> {
    let container = d.start_sh("--restart on-failure:2", "echo run; exit 3")?;
    eventually(PATIENCE, "the last restart", || {
        Ok((container.inspect("{{.RestartCount}} {{.State.Status}}")? == "2 exited").then_some(()))
    })?;
    let logs = container.docker("logs").ok()?;
    expect_equal("runs", logs.stdout.lines().count(), 3)?;
    Ok(Outcome::new().see_output("logs", &logs).see("code", container.inspect("{{.State.ExitCode}}")?))
}

fn logs_have_a_tail(d: &Docker) -> Result<Outcome> {
    let container = d.start_sh("", "seq 1 100")?;
    container.wait()?;
    let tail = container.docker("logs --tail 3").ok()?;
    expect_equal("tail", tail.text(), "98\n99\n100")?;
    Ok(Outcome::new().see_output("tail", &tail))
}

fn inspect_tells_the_state(d: &Docker) -> Result<Outcome> {
    let container = d.start("", &["sleep", "1000"])?;
    let running = container.inspect("{{.State.Status}} {{.State.Running}} {{.State.OOMKilled}}")?;
    let pid: i32 = container.inspect("{{.State.Pid}}")?.parse()?;
    ensure!(std::path::Path::new(&format!("/proc/{pid}")).exists(), "no process has the PID {pid}");
    container.docker("kill").ok()?;
    container.wait()?;
    Ok(Outcome::new()
        .see("running", running)
        .see("then", container.inspect("{{.State.Status}} {{.State.Pid}} {{.State.ExitCode}}")?))
}

fn attach_joins_the_output(d: &Docker) -> Result<Outcome> {
    let container = d.start_sh("--interactive --tty", "read line; echo got $line; exit 8")?;
    let mut terminal = Terminal::open(container.docker("attach"), 24, 80)?;
    terminal.send("hello\n")?;
    terminal.expect("got hello")?;
    let (code, _) = terminal.finish()?;
    expect_equal("exit code", code, 8)?;
    Ok(Outcome::new().see("exit", code))
}

fn several_run_at_once(d: &Docker) -> Result<Outcome> {
    const COUNT: usize = 4;
    let containers = (0..COUNT)
        .map(|number| d.start_sh("", &format!("hostname >/mine; echo {number} ready; sleep 1000")))
        .collect::<Result<Vec<_>>>()?;
    let mut names = std::collections::BTreeSet::new();
    for (number, container) in containers.iter().enumerate() {
        container.expect_log(&format!("{number} ready"))?;
        names.insert(container.exec("", &["cat", "/mine"]).ok()?.stdout);
    }
    expect_equal("different host names", names.len(), COUNT)?;
    Ok(Outcome::new().see("names", names.len()))
}

fn remove_by_force_while_running(d: &Docker) -> Result<Outcome> {
    let container = d.start("", &["sleep", "1000"])?;
    let removed = container.docker("container rm --force").run()?;
    expect_equal("exit code", removed.code, 0)?;
    Ok(Outcome::new().see("removed", removed.code).see("gone", container.docker("inspect").run()?.code))
}

fn killed_from_the_host(d: &Docker) -> Result<Outcome> {
    let container = d.start("", &["sleep", "1000"])?;
    let pid: i32 = container.inspect("{{.State.Pid}}")?.parse()?;
    let pid = rustix::process::Pid::from_raw(pid).context("a running container has a PID")?;
    rustix::process::kill_process(pid, rustix::process::Signal::KILL)?;
    let code = container.wait()?;
    expect_equal("exit code", code, 137)?;
    let again = container.docker("start").run()?;
    Ok(Outcome::new().see("code", code).see_output("start again", &again))
}
