//! A container's life: its streams, its end, and the verbs on it.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use conformance::command::eventually;
use conformance::podman::Podman;
use conformance::suite::expect_equal;
use conformance::{Case, Outcome, Terminal, case};
use rustix::process::{Pid, Signal, kill_process};

pub(crate) fn cases() -> Vec<Case<Podman>> {
    vec![
        case!(foreground_keeps_both_outputs_apart).tcg(),
        case!(stdin_from_a_pipe_reaches_its_end),
        case!(a_terminal_has_a_size_and_follows_a_resize),
        case!(codes_are_passed_on),
        case!(programs_that_cannot_be_started),
        case!(detached_output_is_in_the_log),
        case!(attach_joins_both_ways),
        case!(inspect_tells_the_state),
        case!(stop_lets_a_program_end_by_itself),
        case!(stop_kills_what_does_not_listen),
        case!(kill_sends_the_signal_asked_for),
        case!(create_then_start_attached),
        case!(a_stopped_container_starts_again),
        case!(restart_keeps_the_files),
        case!(pause_freezes_and_unpause_goes_on),
        case!(remove_by_force_while_running),
        case!(pid_files_name_who_stands_for_it),
        case!(killed_from_the_host),
        case!(a_killed_conmon_leaves_a_container_that_can_be_removed),
        case!(an_unhealthy_container_says_so),
    ]
}

const PATIENCE: Duration = Duration::from_secs(30);

fn foreground_keeps_both_outputs_apart(p: &Podman) -> Result<Outcome> {
    let output = p.sh("", "echo to stdout; echo to stderr >&2").run()?;
    expect_equal("stdout", output.stdout.as_str(), "to stdout\n")?;
    expect_equal("stderr", output.stderr.as_str(), "to stderr\n")?;
    Ok(Outcome::new().see_output("run", &output))
}

fn stdin_from_a_pipe_reaches_its_end(p: &Podman) -> Result<Outcome> {
    let output = p.sh("-i", "cat >/all; wc -c </all; sha256sum </all").input(vec![b'x'; 300_001]).run()?;
    ensure!(output.stdout.starts_with("300001\n"), "lost bytes: {}", output.stdout);
    let without = p.run("", &["wc", "-c"]).input("nobody reads this").run()?;
    expect_equal("bytes read without -i", without.text(), "0")?;
    Ok(Outcome::new().see_output("with", &output).see_output("without", &without))
}

fn a_terminal_has_a_size_and_follows_a_resize(p: &Podman) -> Result<Outcome> {
    // Podman sets the size just after the start, so the container may have to wait.
    let script = "until [ \"$(stty size 2>/dev/null)\" = '33 99' ]; do sleep 0.1; done;
                  trap 'stty size; [ \"$(stty size)\" = \"44 122\" ] && exit 4' WINCH;
                  tty; while :; do sleep 0.1; done";
    let mut terminal = Terminal::open(p.sh("-it", script), 33, 99)?;
    terminal.expect("/dev/pts/0")?;
    terminal.resize_until(44, 122, "44 122")?;
    let (code, _) = terminal.finish()?;
    expect_equal("exit code", code, 4)?;
    Ok(Outcome::new().see("exit", code))
}

fn codes_are_passed_on(p: &Podman) -> Result<Outcome> {
    let mut outcome = Outcome::new();
    for code in [0, 1, 125, 255] {
        let output = p.sh("", &format!("exit {code}")).run()?;
        expect_equal("exit code", output.code, code)?;
        outcome = outcome.see_output(&format!("exit {code}"), &output);
    }
    Ok(outcome)
}

fn programs_that_cannot_be_started(p: &Podman) -> Result<Outcome> {
    let absent = p.run("", &["/bin/not-there"]).run()?;
    let folder = p.run("", &["/etc"]).run()?;
    expect_equal("exit codes", (absent.code, folder.code), (127, 126))?;
    for output in [&absent, &folder] {
        ensure!(output.stderr.trim().lines().count() == 1, "not one sentence: {}", output.stderr);
    }
    Ok(Outcome::new().see("absent", last_words(&absent.stderr)).see("folder", last_words(&folder.stderr)))
}

/// What Podman itself makes of the runtime's sentence.
fn last_words(stderr: &str) -> &str {
    stderr.trim().rsplit_once(": ").map_or(stderr, |(_, words)| words)
}

fn detached_output_is_in_the_log(p: &Podman) -> Result<Outcome> {
    let container = p.start_sh("", "echo out; echo err >&2; exit 3")?;
    let code = container.wait()?;
    let logs = container.podman("logs").ok()?;
    let tail = container.podman("logs --tail 1").ok()?;
    expect_equal("the log", (code, logs.text(), logs.stderr.trim()), (3, "out", "err"))?;
    Ok(Outcome::new().see("code", code).see_output("logs", &logs).see_output("tail", &tail))
}

fn attach_joins_both_ways(p: &Podman) -> Result<Outcome> {
    let container = p.start_sh("-i -t", "read line; echo got $line; exit 8")?;
    let mut terminal = Terminal::open(container.podman("attach"), 24, 80)?;
    terminal.send("hello\n")?;
    terminal.expect("got hello")?;
    terminal.finish()?;
    let code = container.wait()?;
    expect_equal("exit code", code, 8)?;
    Ok(Outcome::new().see("exit", code))
}

fn inspect_tells_the_state(p: &Podman) -> Result<Outcome> {
    let container = p.start("", &["sleep", "1000"])?;
    let running = container.inspect("{{.State.Status}} {{.State.Running}} {{.State.OOMKilled}}")?;
    let pid: i32 = container.inspect("{{.State.Pid}}")?.parse()?;
    ensure!(std::path::Path::new(&format!("/proc/{pid}")).exists(), "no process has the PID {pid}");
    container.podman("kill").ok()?;
    container.wait()?;
    Ok(Outcome::new()
        .see("running", running)
        .see("then", container.inspect("{{.State.Status}} {{.State.Pid}} {{.State.ExitCode}}")?))
}

fn stop_lets_a_program_end_by_itself(p: &Podman) -> Result<Outcome> {
    let container = p.start_sh("", "trap 'echo bye; exit 7' TERM; echo ready; while :; do sleep 0.1; done")?;
    container.expect_log("ready")?;
    let begin = Instant::now();
    container.podman("stop --time 25").ok()?;
    ensure!(begin.elapsed() < Duration::from_secs(20), "the program's own end took {:?}", begin.elapsed());
    let code = container.wait()?;
    expect_equal("exit code", code, 7)?;
    Ok(Outcome::new().see("code", code).see_output("logs", &container.podman("logs").ok()?))
}

fn stop_kills_what_does_not_listen(p: &Podman) -> Result<Outcome> {
    let container = p.start_sh("", "trap '' TERM; echo ready; while :; do sleep 0.1; done")?;
    container.expect_log("ready")?;
    let stop = container.podman("stop --time 1").ok()?;
    let code = container.wait()?;
    expect_equal("exit code", code, 137)?;
    Ok(Outcome::new().see("code", code).see("said", stop.stderr.contains("resorting to SIGKILL")))
}

fn kill_sends_the_signal_asked_for(p: &Podman) -> Result<Outcome> {
    let script = "trap 'echo usr1' USR1; trap 'exit 9' HUP; echo ready; while :; do sleep 0.1; done";
    let container = p.start_sh("", script)?;
    container.expect_log("ready")?;
    container.podman("kill --signal USR1").ok()?;
    container.expect_log("usr1")?;
    container.podman("kill --signal HUP").ok()?;
    let code = container.wait()?;
    expect_equal("exit code", code, 9)?;
    Ok(Outcome::new().see("code", code).see("again", container.podman("kill").run()?.code))
}

fn create_then_start_attached(p: &Podman) -> Result<Outcome> {
    let container = p.create("--interactive", &["sh", "-c", "cat; exit 6"])?;
    let output = container.podman("start --attach --interactive").input("typed\n").run()?;
    expect_equal("output", (output.text(), output.code), ("typed", 6))?;
    Ok(Outcome::new().see_output("start", &output))
}

fn a_stopped_container_starts_again(p: &Podman) -> Result<Outcome> {
    let container = p.start_sh("", "echo run >>/runs; wc -l </runs; exit 2")?;
    let first = container.wait()?;
    let second = container.podman("start --attach").run()?;
    expect_equal("runs counted in the kept file", second.text(), "2")?;
    Ok(Outcome::new().see("first", first).see_output("second", &second))
}

fn restart_keeps_the_files(p: &Podman) -> Result<Outcome> {
    let container = p.start_sh("", "cat /kept 2>/dev/null; echo kept >/kept; echo ready; exec sleep 1000")?;
    container.expect_log("ready")?;
    container.podman("restart --time 0").ok()?;
    container.expect_log("kept")?;
    Ok(Outcome::new().see("state", container.inspect("{{.State.Status}}")?))
}

fn pause_freezes_and_unpause_goes_on(p: &Podman) -> Result<Outcome> {
    let container = p.start_sh("", "while :; do echo tick; sleep 0.1; done")?;
    container.expect_log("tick")?;
    container.podman("pause").ok()?;
    let paused = container.inspect("{{.State.Status}}")?;
    expect_equal("state while paused", paused.as_str(), "paused")?;
    let ticks = || Ok::<_, anyhow::Error>(container.podman("logs").ok()?.stdout.lines().count());
    // What was written before the pause may still be on its way to the log.
    std::thread::sleep(Duration::from_millis(500));
    let before = ticks()?;
    std::thread::sleep(Duration::from_millis(700));
    expect_equal("ticks while paused", ticks()?, before)?;
    let exec = container.exec("", &["true"]).run()?;
    container.podman("unpause").ok()?;
    eventually(PATIENCE, "ticks after the pause", || Ok((ticks()? > before).then_some(())))?;
    Ok(Outcome::new().see("exec", exec.code).see("then", container.inspect("{{.State.Status}}")?))
}

fn remove_by_force_while_running(p: &Podman) -> Result<Outcome> {
    let container = p.start("", &["sleep", "1000"])?;
    let without = container.podman("rm").run()?;
    container.podman("rm --force --time 0").ok()?;
    Ok(Outcome::new().see("without", without.code).see("gone", container.podman("container exists").run()?.code))
}

fn pid_files_name_who_stands_for_it(p: &Podman) -> Result<Outcome> {
    let (of_container, of_conmon) = (p.folder().join("pid"), p.folder().join("conmon"));
    let options = format!("--pidfile {} --conmon-pidfile {}", of_container.display(), of_conmon.display());
    let container = p.start(&options, &["sleep", "1000"])?;
    let told = container.inspect("{{.State.Pid}} {{.State.ConmonPid}}")?;
    let read = |path| Ok::<_, anyhow::Error>(std::fs::read_to_string(path)?.trim().to_owned());
    expect_equal("PIDs", format!("{} {}", read(of_container)?, read(of_conmon)?), told)?;
    Ok(Outcome::new().see("same", true))
}

fn killed_from_the_host(p: &Podman) -> Result<Outcome> {
    let container = p.start("", &["sleep", "1000"])?;
    let pid = container.inspect("{{.State.Pid}}")?.parse()?;
    kill_process(Pid::from_raw(pid).context("a running container has a PID")?, Signal::KILL)?;
    let code = container.wait()?;
    expect_equal("exit code", code, 137)?;
    let again = container.podman("start").run()?;
    Ok(Outcome::new().see("code", code).see("start again", again.code))
}

fn a_killed_conmon_leaves_a_container_that_can_be_removed(p: &Podman) -> Result<Outcome> {
    let container = p.start("", &["sleep", "1000"])?;
    let conmon = container.inspect("{{.State.ConmonPid}}")?.parse()?;
    kill_process(Pid::from_raw(conmon).context("a running container has a conmon")?, Signal::KILL)?;
    let exec = container.exec("", &["echo", "still here"]).run()?;
    expect_equal("output of exec", exec.text(), "still here")?;
    let status = container.inspect("{{.State.Status}}")?;
    let removed = container.podman("rm --force --time 0").run()?;
    // Nobody told Podman of the end, and so it has not had the runtime forget the container.
    p.forget(&container.id)?;
    Ok(Outcome::new().see("exec", exec.code).see("status", status).see("removed", removed.code))
}

fn an_unhealthy_container_says_so(p: &Podman) -> Result<Outcome> {
    // Podman leaves the interval to systemd; the check itself is an exec.
    let container = p.start("--health-cmd [\"test\",\"-e\",\"/ok\"] --health-interval disable", &["sleep", "1000"])?;
    let before = container.podman("healthcheck run").run()?;
    container.exec("", &["touch", "/ok"]).ok()?;
    let after = container.podman("healthcheck run").run()?;
    expect_equal("codes", (before.code, after.code), (1, 0))?;
    Ok(Outcome::new().see_output("before", &before).see_output("after", &after))
}
