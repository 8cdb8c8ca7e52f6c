//! `podman exec`, and looking into a container from outside.

use std::path::Path;

use anyhow::{Result, ensure};
use conformance::podman::Podman;
use conformance::suite::expect_equal;
use conformance::{Case, Outcome, Terminal, case};

pub(crate) fn cases() -> Vec<Case<Podman>> {
    vec![
        case!(exec_runs_in_the_same_container).tcg(),
        case!(exec_passes_codes_on),
        case!(exec_takes_stdin_to_its_end),
        case!(exec_has_a_terminal),
        case!(exec_takes_user_folder_and_environment),
        case!(exec_in_the_background),
        case!(top_shows_processes),
        case!(stats_tell_of_use),
        case!(copy_in_before_and_out_after),
        case!(copy_in_and_out_while_it_runs),
        case!(diff_and_commit_see_what_was_written),
        case!(export_holds_what_was_written),
    ]
}

fn exec_runs_in_the_same_container(p: &Podman) -> Result<Outcome> {
    let container = p.start_sh("", "echo here >/made; exec sleep 1000")?;
    // A program that is just being started has no command line.
    let script = "first() { tr '\\0' ' ' </proc/1/cmdline; }; until [ \"$(first)\" = 'sleep 1000 ' ]; do :; done;
                  cat /made; first; hostname >&2";
    let output = container.exec_sh("", script).run()?;
    expect_equal("output", output.text(), "here\nsleep 1000")?;
    Ok(Outcome::new().see_output("exec", &output))
}

fn exec_passes_codes_on(p: &Podman) -> Result<Outcome> {
    let container = p.start("", &["sleep", "1000"])?;
    let mut outcome = Outcome::new();
    for code in [0, 5, 137, 255] {
        let output = container.exec_sh("", &format!("exit {code}")).run()?;
        expect_equal("exit code", output.code, code)?;
        outcome = outcome.see_output(&format!("exit {code}"), &output);
    }
    let absent = container.exec("", &["/bin/not-there"]).run()?;
    expect_equal("exit code of what is not there", absent.code, 127)?;
    Ok(outcome)
}

fn exec_takes_stdin_to_its_end(p: &Podman) -> Result<Outcome> {
    let container = p.start("", &["sleep", "1000"])?;
    let output = container.exec("-i", &["sha256sum"]).input(vec![7; 300_003]).run()?;
    let without = container.exec("", &["wc", "-c"]).input("unread").run()?;
    expect_equal("bytes without -i", without.text(), "0")?;
    Ok(Outcome::new().see_output("exec", &output))
}

fn exec_has_a_terminal(p: &Podman) -> Result<Outcome> {
    let container = p.start("", &["sleep", "1000"])?;
    let script = "until [ \"$(stty size 2>/dev/null)\" = '40 120' ]; do sleep 0.1; done; tty; read line; exit 5";
    let mut terminal = Terminal::open(container.exec_sh("-it", script), 40, 120)?;
    terminal.expect("/dev/pts/")?;
    terminal.send("\n")?;
    let (code, _) = terminal.finish()?;
    expect_equal("exit code", code, 5)?;
    Ok(Outcome::new().see("exit", code))
}

fn exec_takes_user_folder_and_environment(p: &Podman) -> Result<Outcome> {
    let container = p.start("--env BASE=base", &["sleep", "1000"])?;
    let options = "--user 1000:50 --workdir /tmp --env EXTRA=extra";
    let output = container.exec_sh(options, "id -u; id -g; pwd; echo $BASE $EXTRA").run()?;
    expect_equal("output", output.text(), "1000\n50\n/tmp\nbase extra")?;
    Ok(Outcome::new().see_output("exec", &output))
}

fn exec_in_the_background(p: &Podman) -> Result<Outcome> {
    let container = p.start_sh("", "until [ -e /done ]; do sleep 0.1; done; cat /done")?;
    container.exec_sh("--detach", "echo from exec >/d && mv /d /done").ok()?;
    let code = container.wait()?;
    let logs = container.podman("logs").ok()?;
    expect_equal("log", logs.text(), "from exec")?;
    Ok(Outcome::new().see("code", code).see_output("logs", &logs))
}

fn top_shows_processes(p: &Podman) -> Result<Outcome> {
    let container = p.start("", &["sleep", "1000"])?;
    let top = container.podman("top").run()?;
    let title = top.stdout.lines().next().unwrap_or_default();
    ensure!(title.contains("PID"), "no title: {}{}", top.stdout, top.stderr);
    Ok(Outcome::new().see("exit", top.code).see("shows the container's program", top.stdout.contains("sleep 1000")))
}

fn stats_tell_of_use(p: &Podman) -> Result<Outcome> {
    let container =
        p.start_sh("--memory 200m", "head -c 8m /dev/zero | tail -c 8m >/x; echo ready; exec sleep 1000")?;
    container.expect_log("ready")?;
    let stats = container.podman("stats --no-stream --format {{.MemUsage}};{{.PIDs}}").ok()?;
    let (memory, pids) = stats.text().split_once(';').unwrap_or_default();
    let (used, limit) = memory.split_once(" / ").unwrap_or_default();
    ensure!(used != "0B" && used.ends_with('B'), "no memory in use: {}", stats.stdout);
    ensure!(pids.parse::<u32>().is_ok_and(|pids| pids > 0), "no processes: {}", stats.stdout);
    Ok(Outcome::new().see("limit", limit))
}

fn copy_in_before_and_out_after(p: &Podman) -> Result<Outcome> {
    let container = p.create("", &["sh", "-c", "cat /tmp/in; echo from inside >/tmp/out"])?;
    let from_host = p.file("in", "from the host")?;
    p.podman("cp").arg(&from_host).arg(format!("{}:/tmp/in", container.id)).ok()?;
    let inside = container.podman("start --attach").run()?;
    let to_host = p.folder().join("out");
    p.podman("cp").arg(format!("{}:/tmp/out", container.id)).arg(&to_host).ok()?;
    let outside = std::fs::read_to_string(to_host)?;
    expect_equal("what was copied", (inside.text(), outside.trim()), ("from the host", "from inside"))?;
    Ok(Outcome::new().see_output("inside", &inside).see("outside", outside))
}

/// Podman enters the mount namespace of who stands for the container, whose root must be the container's.
fn copy_in_and_out_while_it_runs(p: &Podman) -> Result<Outcome> {
    let container = p.start("", &["sleep", "1000"])?;
    let (from_host, name) = (p.file("in", "from the host")?, p.name("copied"));
    p.podman("cp").arg(&from_host).arg(format!("{}:/tmp/{name}", container.id)).ok()?;
    let inside = container.exec("", &["cat", &format!("/tmp/{name}")]).run()?;
    ensure!(!Path::new("/tmp").join(name).exists(), "it was copied to the host's /tmp");
    container.exec_sh("", "echo from inside >/tmp/out").ok()?;
    let to_host = p.folder().join("out");
    p.podman("cp").arg(format!("{}:/tmp/out", container.id)).arg(&to_host).ok()?;
    let outside = std::fs::read_to_string(to_host)?;
    expect_equal("what was copied", (inside.text(), outside.trim()), ("from the host", "from inside"))?;
    Ok(Outcome::new().see_output("inside", &inside).see("outside", outside))
}

fn diff_and_commit_see_what_was_written(p: &Podman) -> Result<Outcome> {
    let script = "echo kept >/kept; chown 5:6 /kept; chmod 4711 /kept; rm /etc/group; mv /home/user /home/other";
    let container = p.start_sh("", script)?;
    expect_equal("exit code", container.wait()?, 0)?;
    let diff = container.podman("diff").ok()?;
    let mut lines: Vec<_> = diff.stdout.lines().collect();
    lines.sort_unstable();
    for line in ["A /kept", "D /etc/group", "A /home/other", "D /home/user"] {
        ensure!(lines.contains(&line), "{line:?} is missing in {lines:?}");
    }
    let image = p.name("committed");
    container.podman("commit --quiet").arg(&image).ok()?;
    let output = p.podman("run --rm --network none").args([&image, "stat", "-c", "%a %u %g %s", "/kept"]).run()?;
    expect_equal("the file in the image", output.text(), "4711 5 6 5")?;
    Ok(Outcome::new().see("diff", lines.join("\n")).see_output("run", &output))
}

fn export_holds_what_was_written(p: &Podman) -> Result<Outcome> {
    let container = p.start_sh("", "echo kept >/kept")?;
    container.wait()?;
    let tar = p.folder().join("all.tar");
    p.podman("export --output").arg(&tar).arg(&container.id).ok()?;
    let kept = conformance::Cmd::new("tar").args(["--extract", "--to-stdout", "--file"]).arg(&tar).arg("kept").ok()?;
    expect_equal("the file", kept.text(), "kept")?;
    Ok(Outcome::new().see("kept", kept.text()))
}
