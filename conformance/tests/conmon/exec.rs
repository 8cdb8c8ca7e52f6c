//! Further processes: probes, and what somebody asks for.

use anyhow::Result;
use conformance::bundle::Hand;
use conformance::suite::expect_equal;
use conformance::{Case, Outcome, Terminal, case};
use serde_json::json;

use crate::scene::{Scene, without_times};

pub(crate) fn cases() -> Vec<Case<Hand>> {
    vec![
        case!(a_probe_has_its_code_and_its_output).tcg(),
        case!(a_probe_has_its_time),
        case!(a_probe_of_what_is_not_there),
        case!(an_exec_has_both_streams_and_its_code),
        case!(an_exec_has_a_terminal),
        case!(an_exec_ends_with_its_container),
    ]
}

fn sleeper(h: &Hand) -> Result<Scene<'_>> {
    let scene = Scene::sh(h, "exec sleep 1000")?;
    scene.bundle.call("start").ok()?;
    Ok(scene)
}

fn a_probe_has_its_code_and_its_output(h: &Hand) -> Result<Outcome> {
    let scene = sleeper(h)?;
    let process = scene.process(&["sh", "-c", "echo healthy; echo nearly >&2; exit 4"])?;
    let (message, log) = scene.exec_sync(&process, "--timeout 30")?;
    expect_equal("exit code", message.exit_code, 4)?;
    let mut lines: Vec<_> = log.lines().filter_map(|line| line.split_once(' ')).map(|(_, rest)| rest).collect();
    lines.sort_unstable();
    expect_equal("log", lines.join("\n").as_str(), "stderr F nearly\nstdout F healthy")?;
    Ok(Outcome::new().see("code", message.exit_code).see("message", message.message))
}

fn a_probe_has_its_time(h: &Hand) -> Result<Outcome> {
    let scene = sleeper(h)?;
    let process = scene.process(&["sh", "-c", "echo begun; exec sleep 999"])?;
    let (message, log) = scene.exec_sync(&process, "--timeout 2")?;
    expect_equal("message", (message.exit_code, message.message.as_str()), (-1, "command timed out"))?;
    // What has had its time is gone, and the container is not.
    let script = "while ps | grep -q '[s]leep 999'; do sleep 0.1; done; echo gone";
    let left = scene.exec(&scene.process(&["sh", "-c", script])?)?.run()?;
    Ok(Outcome::new().see("log", without_times(&log)).see_output("left", &left))
}

fn a_probe_of_what_is_not_there(h: &Hand) -> Result<Outcome> {
    let scene = sleeper(h)?;
    let (message, _) = scene.exec_sync(&scene.process(&["/bin/not-there"])?, "--timeout 30")?;
    Ok(Outcome::new().see("code", message.exit_code))
}

fn an_exec_has_both_streams_and_its_code(h: &Hand) -> Result<Outcome> {
    let scene = sleeper(h)?;
    let mut process = scene.process(&["sh", "-c", "cat; id -u; echo $WORD >&2; exit 6"])?;
    process["user"] = json!({ "uid": 1000, "gid": 1000 });
    process["env"] = json!(["PATH=/bin", "WORD=word"]);
    let output = scene.exec(&process)?.input("typed\n").run()?;
    expect_equal("stdout", (output.stdout.as_str(), output.code), ("typed\n1000\n", 6))?;
    Ok(Outcome::new().see_output("exec", &output))
}

/// CRI-O gives the runtime a terminal of its own as its standard streams.
fn an_exec_has_a_terminal(h: &Hand) -> Result<Outcome> {
    let scene = sleeper(h)?;
    let script = "until [ \"$(stty size)\" = '44 122' ]; do sleep 0.1; done; tty; read line; exit 5";
    let mut process = scene.process(&["sh", "-c", script])?;
    process["terminal"] = json!(true);
    let mut terminal = Terminal::open(scene.exec(&process)?, 33, 99)?;
    terminal.resize(44, 122)?;
    terminal.expect("/dev/pts/")?;
    terminal.send("\n")?;
    let (code, _) = terminal.finish()?;
    expect_equal("exit code", code, 5)?;
    Ok(Outcome::new().see("code", code))
}

fn an_exec_ends_with_its_container(h: &Hand) -> Result<Outcome> {
    let scene = sleeper(h)?;
    let exec = scene.exec(&scene.process(&["sh", "-c", "echo ready; sleep 1000"])?)?;
    let mut terminal = Terminal::open(exec, 24, 80)?;
    terminal.expect("ready")?;
    scene.call("kill", &["KILL"])?;
    let (code, _) = terminal.finish()?;
    Ok(Outcome::new().see("code", code).see("container", scene.wait()?))
}
