//! Further processes in a container.

use std::io::{IoSliceMut, Read as _, Write as _};
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::os::unix::net::UnixListener;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use conformance::bundle::Hand;
use conformance::command::eventually;
use conformance::enclosure::Enclosure;
use conformance::suite::expect_equal;
use conformance::{Case, Cmd, Outcome, Terminal, case};
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};
use serde_json::json;

pub(crate) fn cases() -> Vec<Case<Hand>> {
    vec![
        case!(exec_passes_streams_and_code).tcg(),
        case!(exec_has_a_terminal),
        case!(exec_takes_user_folder_and_environment),
        case!(exec_of_a_process_file),
        case!(exec_leaves_the_groups),
        case!(exec_adds_capabilities),
        case!(exec_in_a_cgroup),
        case!(exec_passes_descriptors).tcg(),
        case!(exec_passes_a_socket),
        case!(run_passes_descriptors),
        case!(a_folder_cannot_be_handed_over),
        case!(exec_has_no_labels),
        case!(exec_in_the_background_has_a_pid),
        case!(a_descriptor_of_a_process_is_handed_over),
        case!(exec_of_what_is_not_there),
        case!(exec_needs_a_running_container),
        case!(ps_lists_processes_of_the_host),
        case!(a_killed_exec_ends_inside),
    ]
}

const SLEEP: &[&str] = &["sleep", "1000"];

fn exec_passes_streams_and_code(h: &Hand) -> Result<Outcome> {
    let bundle = h.bundle_with(SLEEP, |_| {})?;
    bundle.start()?;
    let output = bundle.exec("", "echo out; echo err >&2; wc -c; exit 38").input(vec![b'x'; 500_001]).run()?;
    expect_equal("output and code", (output.text(), output.code), ("out\n500001", 38))?;
    Ok(Outcome::new()
        .see("exit", output.code)
        .see("stdout", &output.stdout)
        .see("stderr", output.stderr.lines().next().unwrap_or_default()))
}

fn exec_has_a_terminal(h: &Hand) -> Result<Outcome> {
    let bundle = h.bundle_with(SLEEP, |_| {})?;
    bundle.start()?;
    let script = "until [ \"$(stty size 2>/dev/null)\" = '44 122' ]; do sleep 0.1; done; tty; exit 5";
    let mut terminal = Terminal::open(bundle.exec("--tty", &format!("echo ready; {script}")), 33, 99)?;
    terminal.expect("ready")?;
    terminal.resize(44, 122)?;
    let (code, shown) = terminal.finish()?;
    ensure!(shown.contains("/dev/pts/"), "no terminal: {shown}");
    Ok(Outcome::new().see("exit", code))
}

fn exec_takes_user_folder_and_environment(h: &Hand) -> Result<Outcome> {
    let bundle = h.bundle_with(SLEEP, |_| {})?;
    bundle.start()?;
    let options = "--user 1000:50 --cwd /tmp --env ONE=1 --additional-gids 4321";
    let output = bundle.exec(options, "id -u; id -g; id -G; pwd; echo $ONE").run()?;
    expect_equal("output", output.text(), "1000\n50\n50 4321\n/tmp\n1")?;
    Ok(Outcome::new().see_output("exec", &output))
}

fn exec_of_a_process_file(h: &Hand) -> Result<Outcome> {
    let bundle = h.bundle_with(SLEEP, |_| {})?;
    bundle.start()?;
    let process = json!({
        "args": ["sh", "-c", "echo $FROM; pwd; id -u; grep core /proc/self/limits | tr -s ' '; grep CapEff /proc/self/status | tr '\t' ' '"],
        "cwd": "/etc",
        "env": ["FROM=a file", "PATH=/bin"],
        "user": { "uid": 1000, "gid": 1000 },
        "rlimits": [{ "type": "RLIMIT_CORE", "soft": 111, "hard": 222 }],
        "capabilities": { "bounding": ["CAP_KILL"] },
    });
    let file = h.folder().join("process.json");
    std::fs::write(&file, process.to_string())?;
    let output = bundle.call(&format!("exec --process {}", file.display())).run()?;
    ensure!(
        output.stdout.starts_with("a file\n/etc\n1000\nMax core file size 111 222 bytes"),
        "{}{}",
        output.stdout,
        output.stderr
    );
    Ok(Outcome::new().see_output("exec", &output))
}

fn exec_leaves_the_groups(h: &Hand) -> Result<Outcome> {
    let user = json!({"uid": 5, "gid": 6, "additionalGids": [7]});
    let bundle = h.bundle_with(SLEEP, |config| config["process"]["user"] = user)?;
    bundle.start()?;
    let output = bundle.exec("--user 1000 --additional-gids 8", "id -u; id -g; id -G").run()?;
    expect_equal("output", output.text(), "1000\n6\n6 7 8")?;
    Ok(Outcome::new().see_output("exec", &output))
}

fn exec_adds_capabilities(h: &Hand) -> Result<Outcome> {
    let bundle = h.bundle_with(SLEEP, |_| {})?;
    bundle.start()?;
    let output = bundle.exec("--cap CAP_NET_RAW --cap CAP_CHOWN", "grep ^Cap /proc/self/status").run()?;
    ensure!(output.stdout.contains("CapEff:"), "no capabilities: {}", output.stdout);
    let of_a_user = bundle.exec("--cap CAP_NET_RAW --user 1000", "grep ^Cap /proc/self/status").run()?;
    Ok(Outcome::new().see_output("root", &output).see("user", of_a_user.stdout))
}

fn exec_in_a_cgroup(h: &Hand) -> Result<Outcome> {
    let bundle = h.bundle_with(SLEEP, |_| {})?;
    bundle.start()?;
    let own = bundle.exec("--cgroup /", "echo inside").run()?;
    expect_equal("the container's own", own.text(), "inside")?;
    let missing = bundle.exec("--cgroup no/such", "echo inside").run()?;
    Ok(Outcome::new().see("own", own.code).see("missing", missing.code))
}

/// The command with what a shell does before it, to its descriptors.
fn after(redirections: &str, command: Cmd) -> std::process::Command {
    let command = command.into_command();
    let mut shell = std::process::Command::new("sh");
    shell
        .args(["-c", &format!("{redirections}; exec \"$@\""), "sh"])
        .arg(command.get_program())
        .args(command.get_args());
    if let Some(folder) = command.get_current_dir() {
        shell.current_dir(folder);
    }
    shell
}

fn exec_passes_descriptors(h: &Hand) -> Result<Outcome> {
    let bundle = h.bundle_with(SLEEP, |_| {})?;
    bundle.start()?;
    let (input, output) = (h.folder().join("input"), h.folder().join("output"));
    std::fs::write(&input, "what is read\n")?;
    let files = format!("exec 3<{} 4>{}", input.display(), output.display());
    let script = "cat <&3 >&4; echo more >&4; exit 4";
    let status = after(&files, bundle.exec("--preserve-fds 2", script)).status()?;
    let written = std::fs::read_to_string(&output)?;
    expect_equal("what was written", written.as_str(), "what is read\nmore\n")?;
    // A detached one has a process of its own that stands for it.
    let status = status.code().unwrap_or(-1);
    let detached = after(&files, bundle.exec("--detach --preserve-fds 2", "cat <&3 >&4")).status()?;
    ensure!(detached.success(), "a detached one fails: {detached}");
    eventually(Duration::from_secs(20), "what a detached one writes", || {
        Ok((std::fs::read_to_string(&output)? == "what is read\n").then_some(()))
    })?;
    let missing = after("exec 3</dev/null", bundle.exec("--preserve-fds 2", "true")).output()?;
    Ok(Outcome::new().see("exit", status).see("missing", missing.status.code().unwrap_or(-1)))
}

fn exec_passes_a_socket(h: &Hand) -> Result<Outcome> {
    let bundle = h.bundle_with(SLEEP, |_| {})?;
    bundle.start()?;
    let (mut ours, theirs) = std::os::unix::net::UnixStream::pair()?;
    ours.set_read_timeout(Some(Duration::from_secs(20)))?;
    let script = "read word <&3; echo got $word >&3; cat <&3 >&3";
    let mut command = after("exec 3<&0 </dev/null", bundle.exec("--preserve-fds 1", script));
    let mut child = command.stdin(OwnedFd::from(theirs)).spawn()?;
    drop(command);
    ours.write_all(b"hello\n")?;
    let mut answer = [0; 10];
    ours.read_exact(&mut answer)?;
    expect_equal("answer", String::from_utf8_lossy(&answer).as_ref(), "got hello\n")?;
    ours.write_all(b"the rest")?;
    // Its end is the process's, which can still answer.
    ours.shutdown(std::net::Shutdown::Write)?;
    let mut rest = String::new();
    ours.read_to_string(&mut rest)?;
    expect_equal("rest", rest.as_str(), "the rest")?;
    Ok(Outcome::new().see("exit", child.wait()?.code().unwrap_or(-1)))
}

fn run_passes_descriptors(h: &Hand) -> Result<Outcome> {
    let bundle = h.bundle("cat <&3 >&4; exit 5")?;
    let (input, output) = (h.folder().join("input"), h.folder().join("output"));
    std::fs::write(&input, "what is read\n")?;
    let files = format!("exec 3<{} 4>{}", input.display(), output.display());
    let mut run = bundle.call("run --preserve-fds 2");
    run = run.current_dir(&bundle.path);
    let status = after(&files, run).status()?;
    let written = std::fs::read_to_string(&output)?;
    expect_equal("what was written", written.as_str(), "what is read\n")?;
    Ok(Outcome::new().see("exit", status.code().unwrap_or(-1)))
}

fn a_folder_cannot_be_handed_over(h: &Hand) -> Result<Outcome> {
    let bundle = h.bundle_with(SLEEP, |_| {})?;
    bundle.start()?;
    let output = after("exec 3</", bundle.exec("--preserve-fds 1", "true")).output()?;
    if !h.runtime().is_runc() {
        let sentence = String::from_utf8_lossy(&output.stderr).into_owned();
        ensure!(sentence.contains("descriptor 3 is a directory"), "another sentence: {sentence}");
    }
    Ok(Outcome::new().see("exit", output.status.code().unwrap_or(-1)))
}

fn exec_has_no_labels(h: &Hand) -> Result<Outcome> {
    let bundle = h.bundle_with(SLEEP, |_| {})?;
    bundle.start()?;
    Ok(Outcome::new()
        .see("AppArmor", bundle.exec("--apparmor no-such-profile", "true").run()?.code)
        .see("SELinux", bundle.exec("--process-label no-such-label", "true").run()?.code))
}

fn exec_in_the_background_has_a_pid(h: &Hand) -> Result<Outcome> {
    let bundle = h.bundle_with(SLEEP, |_| {})?;
    bundle.start()?;
    let pid_file = h.folder().join("pid");
    let words = format!("exec --detach --pid-file {}", pid_file.display());
    let output = bundle.call(&words).args(["sh", "-c", "echo here >/made; sleep 1000"]).run()?;
    expect_equal("exit code", output.code, 0)?;
    let pid = std::fs::read_to_string(pid_file)?;
    ensure!(std::path::Path::new("/proc").join(pid.trim()).exists(), "there is no process {pid}");
    eventually(Duration::from_secs(10), "the file made inside", || Ok(bundle.inside("made").exists().then_some(())))?;
    Ok(Outcome::new().see("exit", output.code))
}

fn a_descriptor_of_a_process_is_handed_over(h: &Hand) -> Result<Outcome> {
    if h.runtime().is_runc() {
        // The distribution's does not know the option.
        return Ok(Outcome::new().see("of a container", "not asked").see("of an exec", "not asked"));
    }
    let enclosure = Enclosure::around().context("the suite runs in an enclosure")?;
    let folder = tempfile::tempdir_in(enclosure.sockets())?;
    let path = folder.path().join("socket");
    let socket = UnixListener::bind(&path)?;
    let bundle = h.bundle_with(SLEEP, |_| {})?;
    let created = bundle.in_background(&format!("create --pidfd-socket {}", path.display()))?;
    expect_equal("create", (created.code, created.stderr.as_str()), (0, ""))?;
    let of_container = bundle.state()?["pid"].as_i64() == Some(process_behind(&receive(&socket)?)?);
    bundle.call("start").ok()?;
    let pid_file = folder.path().join("pid");
    let options = format!("exec --detach --pid-file {} --pidfd-socket {}", pid_file.display(), path.display());
    bundle.call(&options).args(SLEEP).ok()?;
    let of_exec = std::fs::read_to_string(pid_file)?.trim().parse::<i64>()? == process_behind(&receive(&socket)?)?;
    Ok(Outcome::new().see("of a container", of_container).see("of an exec", of_exec))
}

/// The descriptor that the next to connect sends.
fn receive(listener: &UnixListener) -> Result<OwnedFd> {
    let (socket, _) = listener.accept()?;
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let mut name = [0; 64];
    recvmsg(&socket, &mut [IoSliceMut::new(&mut name)], &mut ancillary, RecvFlags::CMSG_CLOEXEC)?;
    let mut received = ancillary.drain().filter_map(|message| match message {
        RecvAncillaryMessage::ScmRights(mut descriptors) => descriptors.next(),
        _ => None,
    });
    received.next().context("no descriptor came")
}

fn process_behind(pidfd: &OwnedFd) -> Result<i64> {
    let text = std::fs::read_to_string(format!("/proc/self/fdinfo/{}", pidfd.as_raw_fd()))?;
    let pid = text.lines().find_map(|line| line.strip_prefix("Pid:")).context("it is of no process")?;
    Ok(pid.trim().parse()?)
}

fn exec_of_what_is_not_there(h: &Hand) -> Result<Outcome> {
    let bundle = h.bundle_with(SLEEP, |_| {})?;
    bundle.start()?;
    let output = bundle.call("exec").arg("no-such-program").run()?;
    ensure!(output.stderr.contains("no-such-program"), "the sentence does not name it: {}", output.stderr);
    Ok(Outcome::new().see("exit", output.code).see("the container", bundle.status()?))
}

fn exec_needs_a_running_container(h: &Hand) -> Result<Outcome> {
    let bundle = h.bundle("exit 0")?;
    bundle.start()?;
    bundle.expect_stopped()?;
    let stopped = bundle.exec("", "true").run()?;
    let missing = h.call("exec no-such-container true").run()?;
    ensure!(missing.stderr.contains("does not exist"), "another sentence: {}", missing.stderr);
    Ok(Outcome::new().see("stopped", stopped.code).see("missing", missing.code))
}

fn ps_lists_processes_of_the_host(h: &Hand) -> Result<Outcome> {
    let bundle = h.bundle_with(SLEEP, |_| {})?;
    bundle.start()?;
    let output = bundle.call("ps --format json").ok()?;
    let pids: Vec<u32> = serde_json::from_str(&output.stdout)?;
    let pid = bundle.state()?["pid"].as_u64().context("the state has a PID")?;
    ensure!(pids.iter().any(|&have| u64::from(have) == pid), "{pid} is not among {pids:?}");
    let table = bundle.call("ps").ok()?;
    ensure!(table.stdout.contains(&pid.to_string()), "{pid} is not in the table: {}", table.stdout);
    Ok(Outcome::new()
        .see("exit", output.code)
        .see("title", table.stdout.lines().next().is_some_and(|title| title.contains("PID"))))
}

fn a_killed_exec_ends_inside(h: &Hand) -> Result<Outcome> {
    let bundle = h.bundle_with(SLEEP, |_| {})?;
    bundle.start()?;
    let pid_file = h.folder().join("pid");
    bundle.call(&format!("exec --detach --pid-file {}", pid_file.display())).args(["sleep", "4242"]).ok()?;
    let inside = "grep -l 4242 /proc/[0-9]*/cmdline 2>/dev/null | grep -cv self";
    let count = || Ok::<_, anyhow::Error>(bundle.exec("", &format!("{inside}; true")).run()?.text().to_owned());
    let before = count()?;
    let pid: i32 = std::fs::read_to_string(pid_file)?.trim().parse()?;
    let pid = rustix::process::Pid::from_raw(pid).context("a PID is not 0")?;
    rustix::process::kill_process(pid, rustix::process::Signal::KILL)?;
    eventually(Duration::from_secs(10), "the end of the process inside", || Ok((count()? < before).then_some(())))?;
    Ok(Outcome::new().see("the container", bundle.status()?))
}
