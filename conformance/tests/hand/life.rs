//! A container's life, verb by verb.

use anyhow::{Result, ensure};
use conformance::bundle::Hand;
use conformance::suite::expect_equal;
use conformance::{Case, Outcome, Terminal, case};

pub(crate) fn cases() -> Vec<Case<Hand>> {
    vec![
        case!(create_start_state_delete).tcg(),
        case!(run_passes_streams_and_code).tcg(),
        case!(run_in_the_bundle_that_spec_writes).tcg(),
        case!(run_in_the_background),
        case!(run_keeps_nothing),
        case!(kill_by_name_and_by_number),
        case!(kill_of_what_has_ended),
        case!(delete_refuses_what_runs),
        case!(delete_by_force),
        case!(delete_of_nothing),
        case!(list_shows_containers),
        case!(pause_and_resume),
        case!(an_id_may_be_used_again),
        case!(start_twice_is_refused),
        case!(kill_of_all_processes),
        case!(a_folder_without_a_record),
        case!(an_emptied_state_root),
        case!(checkpoints_are_refused),
    ]
}

fn create_start_state_delete(h: &Hand) -> Result<Outcome> {
    let bundle = h.bundle("echo started; until [ -e /go ]; do sleep 0.1; done; echo done")?;
    let pid_file = h.folder().join("pid");
    bundle.in_background(&format!("create --pid-file {}", pid_file.display()))?;
    let created = bundle.state()?;
    expect_equal("status after create", created["status"].as_str(), Some("created"))?;
    expect_equal("output before start", bundle.written("out")?.as_str(), "")?;
    let pid = std::fs::read_to_string(pid_file)?;
    expect_equal("PID in its file", pid.trim(), &created["pid"].to_string())?;
    ensure!(std::path::Path::new("/proc").join(pid.trim()).exists(), "there is no process {pid}");

    bundle.call("start").ok()?;
    bundle.expect_written("started")?;
    let running = bundle.state()?;
    std::fs::write(bundle.inside("go"), "")?;
    bundle.expect_stopped()?;
    let stopped = bundle.state()?;
    let deleted = bundle.call("delete").run()?;
    bundle.expect_no_trace()?;
    Ok(Outcome::new()
        .see("bundle", created["bundle"].as_str() == bundle.path.to_str())
        .see("id", created["id"].as_str() == Some(&bundle.id))
        .see("version", created["ociVersion"].is_string())
        .see("running", &running["status"])
        .see("stopped", &stopped["status"])
        .see("stopped PID", &stopped["pid"])
        .see("output", bundle.written("out")?)
        .see_output("delete", &deleted)
        .see("state after delete", bundle.call("state").run()?.code))
}

fn run_passes_streams_and_code(h: &Hand) -> Result<Outcome> {
    let bundle = h.bundle("echo out; echo err >&2; wc -c; exit 37")?;
    let output = bundle.run().input(vec![b'x'; 1_000_003]).run()?;
    expect_equal("output and code", (output.text(), output.code), ("out\n1000003", 37))?;
    ensure!(output.stderr.lines().any(|line| line == "err"), "stderr is lost: {}", output.stderr);
    Ok(Outcome::new().see_output("run", &output))
}

fn run_in_the_bundle_that_spec_writes(h: &Hand) -> Result<Outcome> {
    let bundle = h.bundle("")?;
    std::fs::remove_file(bundle.path.join("config.json"))?;
    h.call("spec").current_dir(&bundle.path).ok()?;
    let mut terminal = Terminal::open(h.call("run --bundle").arg(&bundle.path).arg(&bundle.id), 24, 80)?;
    terminal.send("touch /new; echo $((40 + 2)); exit 7\n")?;
    terminal.expect("42")?;
    let (code, shown) = terminal.finish()?;
    expect_equal("exit code", code, 7)?;
    // runc's template has a read-only root.
    Ok(Outcome::new().see("exit", code).see("read-only root", shown.contains("Read-only file system")))
}

fn run_in_the_background(h: &Hand) -> Result<Outcome> {
    let bundle = h.bundle("echo started; sleep 1000")?;
    let output = bundle.in_background("run --detach")?;
    expect_equal("exit code", output.code, 0)?;
    bundle.expect_written("started")?;
    let status = bundle.status()?;
    bundle.call("delete --force").ok()?;
    bundle.expect_no_trace()?;
    Ok(Outcome::new().see("exit", output.code).see("status", status))
}

fn run_keeps_nothing(h: &Hand) -> Result<Outcome> {
    let bundle = h.bundle("echo kept >/written")?;
    let output = bundle.run().run()?;
    bundle.expect_no_trace()?;
    let written = std::fs::read_to_string(bundle.inside("written"))?;
    expect_equal("what was written into the root", written.as_str(), "kept\n")?;
    Ok(Outcome::new().see_output("run", &output))
}

fn kill_by_name_and_by_number(h: &Hand) -> Result<Outcome> {
    let script = "trap 'echo usr1' USR1; trap 'echo hup; exit 4' HUP; echo ready; while :; do sleep 0.1; done";
    let bundle = h.bundle(script)?;
    bundle.start()?;
    bundle.expect_written("ready")?;
    bundle.call("kill").arg("SIGUSR1").ok()?;
    bundle.expect_written("usr1")?;
    bundle.call("kill").arg("1").ok()?;
    bundle.expect_written("hup")?;
    bundle.expect_stopped()?;
    Ok(Outcome::new().see("output", bundle.written("out")?).see("then", bundle.status()?))
}

fn kill_of_what_has_ended(h: &Hand) -> Result<Outcome> {
    let bundle = h.bundle("exit 0")?;
    bundle.start()?;
    bundle.expect_stopped()?;
    let output = bundle.call("kill").arg("KILL").run()?;
    expect_equal("exit code", output.code, 1)?;
    // Engines look for these words.
    ensure!(output.stderr.contains("container not running"), "another sentence: {}", output.stderr);
    Ok(Outcome::new().see("exit", output.code))
}

fn delete_refuses_what_runs(h: &Hand) -> Result<Outcome> {
    let bundle = h.bundle("sleep 1000")?;
    bundle.start()?;
    let output = bundle.call("delete").run()?;
    expect_equal("exit code", output.code, 1)?;
    ensure!(output.stderr.contains(&bundle.id), "the sentence does not name the container: {}", output.stderr);
    Ok(Outcome::new().see("exit", output.code).see("then", bundle.status()?))
}

fn delete_by_force(h: &Hand) -> Result<Outcome> {
    let bundle = h.bundle("sleep 1000")?;
    bundle.start()?;
    let output = bundle.call("delete --force").run()?;
    bundle.expect_no_trace()?;
    let created = h.bundle("sleep 1000")?;
    created.create()?;
    created.call("delete --force").ok()?;
    created.expect_no_trace()?;
    Ok(Outcome::new().see_output("delete", &output))
}

fn delete_of_nothing(h: &Hand) -> Result<Outcome> {
    let bundle = h.bundle("")?;
    let plain = bundle.call("delete").run()?;
    ensure!(plain.stderr.contains("does not exist"), "another sentence: {}", plain.stderr);
    let force = bundle.call("delete --force").run()?;
    expect_equal("exit code with --force", force.code, 0)?;
    Ok(Outcome::new().see("plain", plain.code).see("force", force.code).see("state", bundle.call("state").run()?.code))
}

fn list_shows_containers(h: &Hand) -> Result<Outcome> {
    let bundle = h.bundle("sleep 1000")?;
    bundle.start()?;
    let quiet = h.list("--quiet")?;
    ensure!(quiet.stdout.lines().any(|id| id == bundle.id), "not listed: {}", quiet.stdout);
    let table = h.list("")?;
    let line = table.stdout.lines().find(|line| line.starts_with(&bundle.id)).unwrap_or_default();
    let json = h.list("--format json")?;
    let json: Vec<serde_json::Value> = serde_json::from_str(&json.stdout)?;
    let entry = json.iter().find(|entry| entry["id"].as_str() == Some(&bundle.id)).cloned().unwrap_or_default();
    Ok(Outcome::new()
        .see("status in the table", line.split_whitespace().nth(2).unwrap_or_default())
        .see("title", table.stdout.lines().next().unwrap_or_default().split_whitespace().collect::<Vec<_>>().join(" "))
        .see("status in JSON", &entry["status"])
        .see("bundle in JSON", entry["bundle"].as_str() == bundle.path.to_str()))
}

fn pause_and_resume(h: &Hand) -> Result<Outcome> {
    let bundle = h.bundle("sleep 1000")?;
    bundle.start()?;
    bundle.call("pause").ok()?;
    let paused = bundle.status()?;
    expect_equal("status", paused.as_str(), "paused")?;
    let twice = bundle.call("pause").run()?;
    bundle.call("resume").ok()?;
    let output = bundle.exec("", "echo goes on").run()?;
    expect_equal("output", output.text(), "goes on")?;
    Ok(Outcome::new()
        .see("paused", paused)
        .see("twice", twice.code)
        .see("then", bundle.status()?)
        .see("resume of what runs", bundle.call("resume").run()?.code))
}

fn an_id_may_be_used_again(h: &Hand) -> Result<Outcome> {
    let bundle = h.bundle("echo again >>/runs; wc -l </runs")?;
    bundle.run().ok()?;
    let output = bundle.run().ok()?;
    expect_equal("runs", output.text(), "2")?;
    Ok(Outcome::new().see_output("second", &output))
}

fn start_twice_is_refused(h: &Hand) -> Result<Outcome> {
    let bundle = h.bundle("sleep 1000")?;
    bundle.start()?;
    let output = bundle.call("start").run()?;
    expect_equal("exit code", output.code, 1)?;
    Ok(Outcome::new().see("exit", output.code).see("then", bundle.status()?))
}

fn kill_of_all_processes(h: &Hand) -> Result<Outcome> {
    let script = "(trap 'echo child; exit' USR1; echo ready; while :; do sleep 0.1; done) &
                  trap 'echo parent' USR1; while :; do sleep 0.1; done";
    let bundle = h.bundle(script)?;
    bundle.start()?;
    bundle.expect_written("ready")?;
    bundle.call("kill --all").arg("USR1").ok()?;
    bundle.expect_written("child")?;
    bundle.expect_written("parent")?;
    let killed = bundle.call("kill -a").arg("9").run()?;
    bundle.expect_stopped()?;
    // Engines do this after the end of a container, to make sure.
    let again = bundle.call("kill --all").arg("9").run()?;
    Ok(Outcome::new().see("killed", killed.code).see("again", again.code))
}

fn a_folder_without_a_record(h: &Hand) -> Result<Outcome> {
    let bundle = h.bundle("exit 0")?;
    let root = h.folder().join("root");
    std::fs::create_dir_all(root.join(&bundle.id))?;
    let with_root = |verb: &str| bundle.call(&format!("--root {} {verb}", root.display())).current_dir(&bundle.path);
    let deleted = with_root("delete --force").run()?;
    let run = with_root("run").run()?;
    Ok(Outcome::new().see("delete", deleted.code).see("run", run.code))
}

/// The host was restarted: neither the processes are there nor what the runtime has noted of them.
fn an_emptied_state_root(h: &Hand) -> Result<Outcome> {
    let bundle = h.bundle("echo started; sleep 1000")?;
    let root = h.folder().join("root");
    let words = |verb: &str| format!("--root {} {verb}", root.display());
    bundle.in_background(&words("run --detach"))?;
    let state: serde_json::Value = serde_json::from_str(&bundle.call(&words("state")).ok()?.stdout)?;
    let pid = state["pid"].to_string();
    conformance::Cmd::new("kill").args(["-9", &pid]).ok()?;
    conformance::Cmd::new("tail").args(["--pid", &pid, "-f", "/dev/null"]).ok()?;
    std::fs::remove_dir_all(&root)?;

    let list = h.call(&words("list --quiet")).run()?;
    expect_equal("list", list.text(), "")?;
    let state = bundle.call(&words("state")).run()?;
    let deleted = bundle.call(&words("delete --force")).run()?;
    let again = bundle.in_background(&words("run --detach"))?;
    expect_equal("exit of another run", again.code, 0)?;
    bundle.expect_written("started")?;
    bundle.call(&words("delete --force")).ok()?;
    bundle.expect_no_trace()?;
    Ok(Outcome::new().see("list", list.code).see("state", state.code).see("delete", deleted.code))
}

fn checkpoints_are_refused(h: &Hand) -> Result<Outcome> {
    let bundle = h.bundle("sleep 1000")?;
    bundle.start()?;
    // runc has no CRIU here.
    let checkpoint = bundle.call("checkpoint --image-path /tmp --leave-running").run()?;
    let restore = bundle.call("restore --detach --image-path /tmp").run()?;
    Ok(Outcome::new()
        .see("checkpoint", checkpoint.code)
        .see("restore", restore.code)
        .see("the container", bundle.status()?))
}
