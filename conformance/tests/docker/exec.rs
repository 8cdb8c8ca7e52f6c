//! `docker exec`, and looking into a running container from outside.

use anyhow::{Result, ensure};
use conformance::docker::Docker;
use conformance::suite::expect_equal;
use conformance::{Case, Outcome, Terminal, case};

pub(crate) fn cases() -> Vec<Case<Docker>> {
    vec![
        case!(exec_runs_in_the_same_container).tcg(),
        case!(exec_takes_stdin_to_its_end),
        case!(exec_has_a_terminal).tcg(),
        case!(exec_takes_user_folder_and_environment),
        case!(exec_in_the_background),
        case!(many_execs_at_once),
        case!(exec_ends_with_its_container),
        case!(top_lists_processes),
        case!(stats_tell_of_use),
        case!(copy_in_and_out),
        case!(diff_lists_changes),
        case!(commit_keeps_changes),
    ]
}

fn exec_runs_in_the_same_container(d: &Docker) -> Result<Outcome> {
    let container = d.start_sh("", "echo here >/made; exec sleep 1000")?;
    // A program that is just being started has no command line.
    let script = "first() { tr '\\0' ' ' </proc/1/cmdline; }; until [ \"$(first)\" = 'sleep 1000 ' ]; do :; done;
                  cat /made; first; hostname >&2";
    let output = container.exec_sh("", script).run()?;
    expect_equal("output", output.text(), "here\nsleep 1000")?;
    Ok(Outcome::new().see_output("exec", &output))
}

fn exec_takes_stdin_to_its_end(d: &Docker) -> Result<Outcome> {
    let container = d.start("", &["sleep", "1000"])?;
    let output = container.exec("-i", &["sha256sum"]).input(vec![7; 2_000_003]).run()?;
    let without = container.exec("", &["wc", "-c"]).input("unread").run()?;
    expect_equal("bytes without -i", without.text(), "0")?;
    Ok(Outcome::new().see_output("exec", &output))
}

fn exec_has_a_terminal(d: &Docker) -> Result<Outcome> {
    let container = d.start("", &["sleep", "1000"])?;
    let script = "until [ \"$(stty size 2>/dev/null)\" = '40 120' ]; do sleep 0.1; done; tty; read line; exit 5";
    let mut terminal = Terminal::open(container.exec_sh("-it", script), 33, 99)?;
    terminal.resize_until(40, 120, "/dev/pts/")?;
    terminal.send("\n")?;
    let (code, shown) = terminal.finish()?;
    expect_equal("exit code", code, 5)?;
    Ok(Outcome::new().see("exit", code).see("shown", shown))
}

fn exec_takes_user_folder_and_environment(d: &Docker) -> Result<Outcome> {
    let container = d.start("--env BASE=base", &["sleep", "1000"])?;
    let options = "--user 1000:50 --workdir /tmp --env EXTRA=extra";
    let output = container.exec_sh(options, "id -u; id -g; pwd; echo $BASE $EXTRA").run()?;
    expect_equal("output", output.text(), "1000\n50\n/tmp\nbase extra")?;
    Ok(Outcome::new().see_output("exec", &output))
}

fn exec_in_the_background(d: &Docker) -> Result<Outcome> {
    let container = d.start_sh("", "until [ -e /done ]; do sleep 0.1; done; cat /done")?;
    container.exec_sh("--detach", "echo from exec >/d && mv /d /done").ok()?;
    let code = container.wait()?;
    let logs = container.docker("logs").ok()?;
    expect_equal("log", logs.text(), "from exec")?;
    Ok(Outcome::new().see("code", code).see_output("logs", &logs))
}

fn many_execs_at_once(d: &Docker) -> Result<Outcome> {
    let container = d.start("", &["sleep", "1000"])?;
    let outputs = std::thread::scope(|scope| {
        let execs: Vec<_> = (0..8)
            .map(|number| {
                let exec = container.exec_sh("-i", &format!("read go; echo {number}; exit {number}")).input("go\n");
                scope.spawn(move || exec.run())
            })
            .collect();
        execs
            .into_iter()
            .map(|exec| exec.join().unwrap_or_else(|_| anyhow::bail!("panicked")))
            .collect::<Result<Vec<_>>>()
    })?;
    let mut outcome = Outcome::new();
    for (number, output) in outputs.iter().enumerate() {
        expect_equal("code and output", (output.code, output.text()), (i32::try_from(number)?, &*number.to_string()))?;
        outcome = outcome.see_output(&number.to_string(), output);
    }
    Ok(outcome)
}

fn exec_ends_with_its_container(d: &Docker) -> Result<Outcome> {
    let container = d.start("", &["sleep", "1000"])?;
    let mut terminal = Terminal::open(container.exec_sh("-it", "echo ready; sleep 1000"), 24, 80)?;
    terminal.expect("ready")?;
    container.docker("kill").ok()?;
    let (code, _) = terminal.finish()?;
    expect_equal("exit code", code, 137)?;
    Ok(Outcome::new().see("exit", code))
}

fn top_lists_processes(d: &Docker) -> Result<Outcome> {
    let container = d.start("", &["sleep", "1000"])?;
    let top = container.docker("top").run()?;
    let mut lines = top.stdout.lines();
    ensure!(lines.next().is_some_and(|title| title.contains("PID")), "no title: {}{}", top.stdout, top.stderr);
    ensure!(lines.next().is_some(), "no process: {}", top.stdout);
    Ok(Outcome::new().see("exit", top.code).see("shows the container's program", top.stdout.contains("sleep 1000")))
}

fn stats_tell_of_use(d: &Docker) -> Result<Outcome> {
    let container = d.start_sh("--memory 200m", "head -c 8m /dev/zero | tail -c 8m >/tmp/x; echo ready; sleep 1000")?;
    container.expect_log("ready")?;
    let stats = container.docker("stats --no-stream --format {{.MemUsage}};{{.PIDs}}").ok()?;
    let (memory, pids) = stats.text().split_once(';').unwrap_or_default();
    let (used, limit) = memory.split_once(" / ").unwrap_or_default();
    ensure!(used != "0B" && used.ends_with("iB"), "no memory in use: {}", stats.stdout);
    ensure!(pids.parse::<u32>().is_ok_and(|pids| pids > 0), "no processes: {}", stats.stdout);
    Ok(Outcome::new().see("limit", limit))
}

fn copy_in_and_out(d: &Docker) -> Result<Outcome> {
    let container = d.start("", &["sleep", "1000"])?;
    let from_host = d.file("in", "from the host")?;
    d.docker("cp").arg(&from_host).arg(format!("{}:/tmp/in", container.id)).ok()?;
    let inside = container.exec("", &["cat", "/tmp/in"]).run()?;
    container.exec_sh("", "echo from inside >/tmp/out").ok()?;
    let to_host = d.folder()?.join("out");
    d.docker("cp").arg(format!("{}:/tmp/out", container.id)).arg(&to_host).ok()?;
    let outside = std::fs::read_to_string(to_host)?;
    expect_equal("what was copied", (inside.text(), outside.trim()), ("from the host", "from inside"))?;
    Ok(Outcome::new().see_output("inside", &inside).see("outside", outside))
}

fn diff_lists_changes(d: &Docker) -> Result<Outcome> {
    let script = "mkdir /made; echo x >/made/file; rm /etc/group; echo more >>/etc/passwd; mv /home/user /home/other";
    let container = d.start_sh("", script)?;
    container.wait()?;
    let diff = container.docker("diff").ok()?;
    let mut lines: Vec<_> = diff.stdout.lines().collect();
    lines.sort_unstable();
    for line in ["A /made/file", "D /etc/group", "C /etc/passwd", "A /home/other", "D /home/user"] {
        ensure!(lines.contains(&line), "{line:?} is missing in {lines:?}");
    }
    Ok(Outcome::new().see("diff", lines.join("\n")))
}

fn commit_keeps_changes(d: &Docker) -> Result<Outcome> {
    let script = "echo kept >/kept; chown 5:6 /kept; chmod 4711 /kept; ln -s /kept /link; ln /kept /hard";
    let container = d.start_sh("", script)?;
    container.wait()?;
    let image = d.name("committed");
    container.docker("commit").arg(&image).ok()?;
    let script = "cat /link; stat -c '%a %u %g %h %s' /kept";
    let output = d.docker("run --rm --runtime").args([d.runtime_name(), &image, "sh", "-c", script]).run()?;
    expect_equal("output", output.text(), "kept\n4711 5 6 2 5")?;
    Ok(Outcome::new().see_output("run", &output))
}
