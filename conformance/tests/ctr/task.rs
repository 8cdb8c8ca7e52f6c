//! `ctr task`: a container in the background, and what is done to it.

use anyhow::{Context, Result, ensure};
use conformance::containerd::Ctr;
use conformance::suite::expect_equal;
use conformance::{Case, Outcome, Terminal, case};

pub(crate) fn cases() -> Vec<Case<Ctr>> {
    vec![
        case!(a_task_is_listed_killed_and_removed).tcg(),
        case!(a_signal_meets_its_handler),
        case!(exec_has_output_and_exit_code).tcg(),
        case!(exec_takes_stdin_to_its_end),
        case!(exec_has_a_terminal),
        case!(exec_of_what_is_not_there),
        case!(pause_and_resume),
        case!(processes_are_listed),
        case!(metrics_tell_of_memory),
        case!(a_task_that_ended_is_stopped),
        case!(several_tasks_at_once),
        case!(twenty_at_once).alone(),
    ]
}

const SLEEP: &[&str] = &["sleep", "1000"];

fn a_task_is_listed_killed_and_removed(c: &Ctr) -> Result<Outcome> {
    let task = c.start("", SLEEP)?;
    let running = task.status()?;
    expect_equal("status", running.as_str(), "RUNNING")?;
    task.task("kill --signal SIGKILL").ok()?;
    task.expect_status("STOPPED")?;
    let code = task.remove()?;
    expect_equal("exit code told at removal", code, 137)?;
    Ok(Outcome::new().see("running", running).see("code", code).see("then", task.status()?))
}

fn a_signal_meets_its_handler(c: &Ctr) -> Result<Outcome> {
    let task = c.start("", &["sh", "-c", "trap 'exit 9' HUP; touch /ready; while :; do sleep 0.1; done"])?;
    task.exec("", &["sh", "-c", "until [ -e /ready ]; do sleep 0.1; done"]).ok()?;
    task.task("kill --signal SIGHUP").ok()?;
    task.expect_status("STOPPED")?;
    let code = task.remove()?;
    expect_equal("exit code", code, 9)?;
    Ok(Outcome::new().see("code", code))
}

fn exec_has_output_and_exit_code(c: &Ctr) -> Result<Outcome> {
    let task = c.start("", SLEEP)?;
    let output = task.exec("", &["sh", "-c", "tr '\\0' ' ' </proc/1/cmdline; echo err >&2; exit 6"]).run()?;
    expect_equal("output and code", (output.text(), output.code), ("sleep 1000", 6))?;
    Ok(Outcome::new().see_output("exec", &output))
}

fn exec_takes_stdin_to_its_end(c: &Ctr) -> Result<Outcome> {
    let task = c.start("", SLEEP)?;
    let output = task.exec("", &["wc", "-c"]).input(vec![b'x'; 1_000_003]).run()?;
    expect_equal("bytes", output.text(), "1000003")?;
    Ok(Outcome::new().see_output("exec", &output))
}

fn exec_has_a_terminal(c: &Ctr) -> Result<Outcome> {
    let task = c.start("", SLEEP)?;
    let script = "until [ \"$(stty size 2>/dev/null)\" = '33 99' ]; do sleep 0.1; done; tty; exit 5";
    let (code, shown) = Terminal::open(task.exec("--tty", &["sh", "-c", script]), 33, 99)?.finish()?;
    ensure!(shown.starts_with("/dev/pts/"), "no terminal: {shown}");
    Ok(Outcome::new().see("exit", code).see("shown", shown))
}

fn exec_of_what_is_not_there(c: &Ctr) -> Result<Outcome> {
    let task = c.start("", SLEEP)?;
    let output = task.exec("", &["no-such-program"]).run()?;
    ensure!(output.code != 0, "a program that is not there ran");
    Ok(Outcome::new()
        .see("exit", output.code)
        .see("names it", output.stderr.contains("no-such-program"))
        .see("the task", task.status()?))
}

fn pause_and_resume(c: &Ctr) -> Result<Outcome> {
    let task = c.start("", SLEEP)?;
    task.task("pause").ok()?;
    let paused = task.status()?;
    expect_equal("status", paused.as_str(), "PAUSED")?;
    task.task("resume").ok()?;
    let output = task.exec("", &["echo", "goes on"]).run()?;
    expect_equal("output", output.text(), "goes on")?;
    Ok(Outcome::new().see("paused", paused).see("then", task.status()?))
}

fn processes_are_listed(c: &Ctr) -> Result<Outcome> {
    let task = c.start("", SLEEP)?;
    let output = task.task("ps").run()?;
    let pid = output.stdout.lines().nth(1).and_then(|line| line.split_whitespace().next()).context("no process")?;
    ensure!(std::path::Path::new("/proc").join(pid).exists(), "{pid} is no process of the host");
    Ok(Outcome::new().see("exit", output.code))
}

fn metrics_tell_of_memory(c: &Ctr) -> Result<Outcome> {
    let task = c.start("", SLEEP)?;
    let output = task.task("metrics").run()?;
    let usage = output.stdout.lines().find(|line| line.starts_with("memory.usage_in_bytes"));
    let usage = usage.or_else(|| output.stdout.lines().find(|line| line.starts_with("memory.usage")));
    let bytes: u64 = usage.and_then(|line| line.split_whitespace().nth(1)).unwrap_or_default().parse().unwrap_or(0);
    ensure!(bytes > 0, "no memory in use: {}{}", output.stdout, output.stderr);
    Ok(Outcome::new().see("exit", output.code))
}

fn a_task_that_ended_is_stopped(c: &Ctr) -> Result<Outcome> {
    let task = c.start("", &["sh", "-c", "exit 11"])?;
    task.expect_status("STOPPED")?;
    let code = task.remove()?;
    expect_equal("exit code", code, 11)?;
    Ok(Outcome::new().see("code", code))
}

fn several_tasks_at_once(c: &Ctr) -> Result<Outcome> {
    let tasks = (0..3).map(|_| c.start("", SLEEP)).collect::<Result<Vec<_>>>()?;
    let mut outcome = Outcome::new();
    for (number, task) in tasks.iter().enumerate() {
        let output = task.exec("", &["sh", "-c", &format!("echo {number} >/n; cat /n")]).run()?;
        expect_equal("output", output.text(), &number.to_string())?;
        outcome = outcome.see_output(&number.to_string(), &output);
    }
    Ok(outcome)
}

fn twenty_at_once(c: &Ctr) -> Result<Outcome> {
    let outputs = std::thread::scope(|scope| {
        let run = |number: usize| move || c.sh("", &format!("echo {number}; exit {number}")).run();
        let threads: Vec<_> = (0..20).map(|number| scope.spawn(run(number))).collect();
        threads.into_iter().map(|thread| thread.join().ok().context("a thread panicked")?).collect::<Result<Vec<_>>>()
    })?;
    for (number, output) in outputs.iter().enumerate() {
        expect_equal("code", output.code, i32::try_from(number)?)?;
        expect_equal("output", output.text(), &number.to_string())?;
    }
    Ok(Outcome::new().see("how many", outputs.len()))
}
