//! The three standard streams, and the terminal.

use std::io::{Read, Write};
use std::os::fd::AsFd;
use std::process::{ChildStdout, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use conformance::census::Process;
use conformance::command::{code, ended_within, readable_within};
use conformance::docker::Docker;
use conformance::suite::expect_equal;
use conformance::{Case, Outcome, Terminal, case};

pub(crate) fn cases() -> Vec<Case<Docker>> {
    vec![
        case!(foreground_keeps_both_outputs_apart).tcg(),
        case!(detached_output_is_in_the_log),
        case!(stdin_is_empty_without_interactive),
        case!(stdin_from_a_pipe_reaches_its_end).tcg(),
        case!(what_goes_in_comes_out),
        case!(a_reader_that_stops_early_ends_the_writer),
        case!(a_client_that_does_not_read_hinders_nobody),
        case!(terminal_has_the_size_of_ours),
        case!(terminal_follows_a_resize),
        case!(terminal_interrupts_with_control_c),
        case!(a_gigabyte_arrives_whole_and_costs_no_memory).alone(),
    ]
}

fn foreground_keeps_both_outputs_apart(d: &Docker) -> Result<Outcome> {
    let output = d.sh("", "echo to stdout; echo to stderr >&2").run()?;
    expect_equal("stdout", output.stdout.as_str(), "to stdout\n")?;
    expect_equal("stderr", output.stderr.as_str(), "to stderr\n")?;
    Ok(Outcome::new().see_output("run", &output))
}

fn detached_output_is_in_the_log(d: &Docker) -> Result<Outcome> {
    let container = d.start_sh("", "echo out; echo err >&2; exit 3")?;
    let code = container.wait()?;
    let logs = container.docker("logs").ok()?;
    expect_equal("the log", (logs.text(), logs.stderr.trim()), ("out", "err"))?;
    Ok(Outcome::new().see("code", code).see_output("logs", &logs))
}

fn stdin_is_empty_without_interactive(d: &Docker) -> Result<Outcome> {
    let output = d.run("", &["wc", "-c"]).input("nobody reads this").run()?;
    expect_equal("bytes read", output.text(), "0")?;
    Ok(Outcome::new().see_output("run", &output))
}

fn stdin_from_a_pipe_reaches_its_end(d: &Docker) -> Result<Outcome> {
    let megabytes: Vec<u8> = (0..3_000_001_u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
    let output = d.sh("-i", "cat >/tmp/all; wc -c </tmp/all; sha256sum </tmp/all").input(megabytes).run()?;
    ensure!(output.stdout.starts_with("3000001\n"), "lost bytes: {}", output.stdout);
    Ok(Outcome::new().see_output("run", &output))
}

fn what_goes_in_comes_out(d: &Docker) -> Result<Outcome> {
    // Far more than any buffer on the way holds: both directions have to move at once.
    let text = "0123456789abcde\n".repeat(1 << 20);
    let output = d.run("-i --log-driver none", &["cat"]).input(text.as_str()).run()?;
    ensure!(output.stdout == text, "{} of {} bytes came back, or others", output.stdout.len(), text.len());
    Ok(Outcome::new().see("exit", output.code).see("stderr", output.stderr))
}

fn a_client_that_does_not_read_hinders_nobody(d: &Docker) -> Result<Outcome> {
    let container = d.start("", &["sleep", "1000"])?;
    let mut deaf = container.exec("", &["yes"]).into_command();
    let mut deaf = deaf.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::null()).spawn()?;
    // Time enough to fill every buffer on the way.
    std::thread::sleep(Duration::from_secs(2));
    let output = container.exec("-i", &["wc", "-c"]).input(vec![b'x'; 1_000_000]).run();
    deaf.kill()?;
    deaf.wait()?;
    let output = output?;
    expect_equal("bytes", output.text(), "1000000")?;
    Ok(Outcome::new().see_output("exec", &output))
}

fn a_reader_that_stops_early_ends_the_writer(d: &Docker) -> Result<Outcome> {
    let output = d.sh("-i", "head -n 1").input("first\n".repeat(200_000)).run()?;
    expect_equal("stdout", output.text(), "first")?;
    Ok(Outcome::new().see_output("run", &output))
}

fn terminal_has_the_size_of_ours(d: &Docker) -> Result<Outcome> {
    // The client sets the size just after the start, so the container may have to wait.
    let script = "until [ \"$(stty size 2>/dev/null)\" = '33 99' ]; do sleep 0.1; done; tty; read line; echo got $line";
    let mut terminal = Terminal::open(d.sh("-it", script), 33, 99)?;
    terminal.expect("/dev/pts/0")?;
    terminal.send("hello\n")?;
    let (code, shown) = terminal.finish()?;
    expect_equal("what was shown", shown.as_str(), "/dev/pts/0\nhello\ngot hello\n")?;
    Ok(Outcome::new().see("exit", code).see("shown", shown))
}

fn terminal_follows_a_resize(d: &Docker) -> Result<Outcome> {
    let script = "until [ \"$(stty size 2>/dev/null)\" = '33 99' ]; do sleep 0.1; done;
                  trap 'stty size; [ \"$(stty size)\" = \"44 122\" ] && exit 4' WINCH;
                  echo ready; while :; do sleep 0.1; done";
    let mut terminal = Terminal::open(d.sh("-it", script), 33, 99)?;
    terminal.expect("ready")?;
    terminal.resize_until(44, 122, "44 122")?;
    let (code, _) = terminal.finish()?;
    expect_equal("exit code", code, 4)?;
    Ok(Outcome::new().see("exit", code))
}

fn terminal_interrupts_with_control_c(d: &Docker) -> Result<Outcome> {
    let script = "trap 'echo interrupted; exit 5' INT; echo ready; while :; do sleep 0.1; done";
    let mut terminal = Terminal::open(d.sh("-it", script), 24, 80)?;
    terminal.expect("ready")?;
    terminal.send("\u{3}")?;
    let (code, shown) = terminal.finish()?;
    expect_equal("exit code", code, 5)?;
    Ok(Outcome::new().see("exit", code).see("shown", shown))
}

fn a_gigabyte_arrives_whole_and_costs_no_memory(d: &Docker) -> Result<Outcome> {
    const PIECE: usize = 1 << 20;
    const WARM: usize = 64;
    const ALL: usize = 1024;
    let pattern: Vec<u8> = (0..PIECE as u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
    let file = d.file("pattern", &pattern)?;
    // A word from us after each part: meanwhile the container is idle and can be weighed.
    let script = format!(
        "part() {{ i=0; while [ $i -lt $1 ]; do cat /pattern; i=$((i+1)); done; read go; }}
         part {WARM}; part {}",
        ALL - WARM
    );
    let options =
        format!("-i --log-driver none --volume {file}:/pattern:ro --cidfile {}", d.folder()?.join("id").display());
    let mut client = d.sh(&options, &script).into_command().stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?;
    let mut stdin = client.stdin.take().context("stdin is a pipe")?;
    let mut stdout = client.stdout.take().context("stdout is a pipe")?;

    let mut buffer = vec![0; PIECE];
    let mut take = |pieces: usize| -> Result<()> {
        for number in 0..pieces {
            read_in_time(&mut stdout, &mut buffer)?;
            ensure!(buffer == pattern, "piece {number} of {pieces} is not as it was sent");
        }
        Ok(())
    };
    take(WARM)?;
    let id = std::fs::read_to_string(d.folder()?.join("id"))?;
    let before = weight(&d.processes(&id)?)?;
    stdin.write_all(b"go\n")?;
    take(ALL - WARM)?;
    let after = weight(&d.processes(&id)?)?;
    stdin.write_all(b"go\n")?;
    ensure!(ended_within(&client, Duration::from_secs(30))?, "the client does not end");
    let code = code(client.wait()?);

    let grown = after.saturating_sub(before) >> 20;
    ensure!(grown < 64, "the host's processes grew by {grown} MiB while 960 MiB went through");
    Ok(Outcome::new().see("exit", code))
}

fn read_in_time(pipe: &mut ChildStdout, mut buffer: &mut [u8]) -> Result<()> {
    while !buffer.is_empty() {
        ensure!(readable_within(pipe.as_fd(), Duration::from_secs(30))?, "the stream stands still");
        let count = pipe.read(buffer)?;
        ensure!(count > 0, "the stream ends too early");
        buffer = &mut buffer[count..];
    }
    Ok(())
}

/// The memory, in bytes, of these processes.
fn weight(pids: &[i32]) -> Result<u64> {
    ensure!(!pids.is_empty(), "no process stands for the container");
    let all = Process::all()?;
    Ok(all.iter().filter(|process| pids.contains(&process.pid)).filter_map(Process::pss).sum())
}
