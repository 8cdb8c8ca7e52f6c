//! `ctr run` in the foreground.

use anyhow::{Result, ensure};
use conformance::cni::HOST4;
use conformance::containerd::Ctr;
use conformance::suite::expect_equal;
use conformance::{Case, Outcome, Terminal, case};

pub(crate) fn cases() -> Vec<Case<Ctr>> {
    vec![
        case!(output_and_exit_code).tcg(),
        case!(exit_codes_are_passed_on),
        case!(stdin_reaches_its_end).tcg(),
        case!(a_terminal_works),
        case!(a_missing_program_is_named),
        case!(environment_folder_and_mount),
        case!(a_read_only_root),
        case!(the_default_seccomp_profile),
        case!(capabilities),
        case!(only_a_loopback_without_network),
        case!(a_network_of_cnis),
        case!(host_network),
        case!(memory_is_limited),
    ]
}

fn output_and_exit_code(c: &Ctr) -> Result<Outcome> {
    let output = c.sh("", "echo out; echo err >&2; exit 3").run()?;
    expect_equal("outputs and code", (output.text(), output.stderr.trim(), output.code), ("out", "err", 3))?;
    Ok(Outcome::new().see_output("run", &output))
}

fn exit_codes_are_passed_on(c: &Ctr) -> Result<Outcome> {
    let mut outcome = Outcome::new();
    for code in [0, 1, 126, 255] {
        let output = c.sh("", &format!("exit {code}")).run()?;
        expect_equal("exit code", output.code, code)?;
        outcome = outcome.see_output(&code.to_string(), &output);
    }
    Ok(outcome)
}

fn stdin_reaches_its_end(c: &Ctr) -> Result<Outcome> {
    let output = c.run("", &["sha256sum"]).input(vec![7; 1_000_003]).run()?;
    let alone = conformance::Cmd::new("sha256sum").input(vec![7; 1_000_003]).ok()?;
    expect_equal("sum", output.text(), alone.text())?;
    Ok(Outcome::new().see_output("run", &output))
}

fn a_terminal_works(c: &Ctr) -> Result<Outcome> {
    let script = "until [ \"$(stty size 2>/dev/null)\" = '33 99' ]; do sleep 0.1; done; tty; read line; echo got $line;
                  until [ \"$(stty size)\" = '44 122' ]; do sleep 0.1; done; exit 4";
    let mut terminal = Terminal::open(c.sh("--tty", script), 33, 99)?;
    terminal.expect("/dev/pts/0")?;
    terminal.send("hello\n")?;
    terminal.expect("got hello")?;
    terminal.resize(44, 122)?;
    let (code, shown) = terminal.finish()?;
    expect_equal("exit code", code, 4)?;
    Ok(Outcome::new().see("exit", code).see("shown", shown))
}

fn a_missing_program_is_named(c: &Ctr) -> Result<Outcome> {
    let output = c.run("", &["no-such-program"]).run()?;
    ensure!(output.code != 0, "a program that is not there ran");
    Ok(Outcome::new().see("exit", output.code).see("names it", output.stderr.contains("no-such-program")))
}

fn environment_folder_and_mount(c: &Ctr) -> Result<Outcome> {
    let folder = tempfile::tempdir()?;
    std::fs::write(folder.path().join("file"), "mounted\n")?;
    let options = format!(
        "--env ONE=1 --cwd /tmp --mount type=bind,src={},dst=/mounted,options=rbind:ro",
        folder.path().display()
    );
    let output = c.sh(&options, "echo $ONE; pwd; cat /mounted/file; echo x >/mounted/new").run()?;
    expect_equal("output", output.text(), "1\n/tmp\nmounted")?;
    Ok(Outcome::new().see_output("run", &output))
}

fn a_read_only_root(c: &Ctr) -> Result<Outcome> {
    let output = c.sh("--read-only", "echo x >/new").run()?;
    ensure!(output.stderr.contains("Read-only file system"), "{}", output.stderr);
    Ok(Outcome::new().see_output("run", &output))
}

fn the_default_seccomp_profile(c: &Ctr) -> Result<Outcome> {
    let script = "grep Seccomp: /proc/self/status | tr -s '\\t' ' '; unshare --user echo unshared";
    let with = c.sh("--seccomp", script).run()?;
    ensure!(with.stdout.contains("Seccomp: 2") && with.stderr.contains("not permitted"), "{}", with.stdout);
    let without = c.sh("", script).run()?;
    ensure!(without.stdout.contains("unshared"), "{}", without.stderr);
    Ok(Outcome::new().see_output("with", &with).see_output("without", &without))
}

fn capabilities(c: &Ctr) -> Result<Outcome> {
    let script = "grep -E '^(Cap|NoNewPrivs)' /proc/self/status | tr -s '\\t' ' '";
    let output = c.sh("--cap-add CAP_NET_ADMIN --cap-drop CAP_CHOWN", script).run()?;
    ensure!(output.stdout.contains("CapEff: 00000000a80435fa"), "{}", output.stdout);
    Ok(Outcome::new().see_output("run", &output))
}

fn only_a_loopback_without_network(c: &Ctr) -> Result<Outcome> {
    let output = c.run("", &["ls", "/sys/class/net"]).run()?;
    expect_equal("links", output.text(), "lo")?;
    Ok(Outcome::new().see_output("run", &output))
}

fn a_network_of_cnis(c: &Ctr) -> Result<Outcome> {
    let script = format!(
        "ls /sys/class/net; ip -o address show dev eth0 | grep -c -e 172.31.248. -e fd00:; ip route | grep -c default;
         ping -c 1 -W 10 {HOST4} | grep -o '1 packets received'"
    );
    let output = c.sh("--cni", &script).run()?;
    expect_equal("what was seen", output.text(), "eth0\nlo\n2\n1\n1 packets received")?;
    Ok(Outcome::new().see_output("run", &output))
}

fn host_network(c: &Ctr) -> Result<Outcome> {
    let output = c.run("--net-host", &["echo", "started"]).run()?;
    // What containerd says before the runtime's own sentence.
    let sentence = output.stderr.lines().last().unwrap_or_default();
    let sentence = sentence.rsplit_once("create failed: ").map_or(sentence, |(_, rest)| rest);
    Ok(Outcome::new().see("exit", output.code).see("message", sentence.trim_end_matches(": unknown")))
}

fn memory_is_limited(c: &Ctr) -> Result<Outcome> {
    let options = format!("--memory-limit {}", 64 << 20);
    let output = c.sh(&options, "head -c 300m /dev/zero | tail -c 300m | wc -c; echo survived").run()?;
    ensure!(!output.stdout.contains("314572800"), "three hundred megabytes fit into 64: {}", output.stdout);
    Ok(Outcome::new().see_survivor(&output))
}
