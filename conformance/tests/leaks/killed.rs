//! `kill -9` of each part in turn.

use anyhow::{Context, Result, ensure};
use conformance::bundle::{Bundle, Hand};
use conformance::census::{Census, Process};
use conformance::suite::expect_equal;
use conformance::{Case, Outcome, case};
use rustix::process::{Pid, Signal, kill_process};

pub(crate) fn cases() -> Vec<Case<Hand>> {
    vec![
        case!(the_monitor).tcg().alone(),
        case!(the_vmm).tcg().alone(),
        case!(the_daemon_that_serves_files).tcg().alone(),
        case!(the_monitor_of_a_created_container).alone(),
        case!(the_monitor_of_a_paused_container).alone(),
        case!(the_vmm_under_an_exec).alone(),
        case!(the_vmm_under_a_run).alone(),
        case!(all_at_once).alone(),
        case!(a_create_on_its_way).alone(),
        case!(many_containers_one_after_another).alone(),
    ]
}

/// A part of a running container.
#[derive(Clone, Copy)]
enum Part {
    Monitor,
    Vmm,
    Files,
}

impl Part {
    /// The process that is this part of a container. runc has but one for all of them.
    /// The built-in VMM serves files itself.
    fn of(self, h: &Hand, bundle: &Bundle) -> Result<Process> {
        let family = bundle.family()?;
        let first = family.first().context("the first process is there")?;
        if h.runtime().is_runc() {
            return Ok(first.clone());
        }
        let part = family.iter().find(|process| match self {
            Self::Monitor => process.pid == first.pid,
            Self::Vmm => process.name.starts_with("qemu") || is_builtin(process),
            Self::Files => process.line.contains("share-daemon") || is_builtin(process),
        });
        part.cloned().with_context(|| format!("the part is not among the processes below {}", first.line))
    }
}

/// Whether this is a machine of the built-in VMM: `runvm … vm`.
fn is_builtin(process: &Process) -> bool {
    process.line.ends_with(" vm")
}

fn kill(process: &Process) -> Result<()> {
    let pid = Pid::from_raw(process.pid).context("a PID is not 0")?;
    Ok(kill_process(pid, Signal::KILL)?)
}

/// A container whose part is killed is stopped, can be deleted, and is gone.
fn survive(h: &Hand, part: Part, prepare: impl FnOnce(&Bundle) -> Result<()>) -> Result<Outcome> {
    let before = Census::take()?;
    let bundle = h.bundle("echo ready; sleep 1000")?;
    prepare(&bundle)?;
    kill(&part.of(h, &bundle)?)?;
    bundle.expect_stopped()?;
    let late = bundle.call("kill").arg("KILL").run()?;
    ensure!(late.stderr.contains("container not running"), "another sentence: {}", late.stderr);
    let deleted = bundle.call("delete").run()?;
    expect_equal("exit code of delete", (deleted.code, deleted.stderr.as_str()), (0, ""))?;
    before.expect_nothing_new()?;
    Ok(Outcome::new().see("kill", late.code).see_output("delete", &deleted))
}

fn running(bundle: &Bundle) -> Result<()> {
    bundle.start()?;
    bundle.expect_written("ready")
}

fn the_monitor(h: &Hand) -> Result<Outcome> {
    survive(h, Part::Monitor, running)
}

fn the_vmm(h: &Hand) -> Result<Outcome> {
    survive(h, Part::Vmm, running)
}

fn the_daemon_that_serves_files(h: &Hand) -> Result<Outcome> {
    survive(h, Part::Files, running)
}

fn the_monitor_of_a_created_container(h: &Hand) -> Result<Outcome> {
    survive(h, Part::Monitor, |bundle| bundle.create())
}

fn the_monitor_of_a_paused_container(h: &Hand) -> Result<Outcome> {
    // runc's frozen process takes the signal only when it thaws.
    survive(h, Part::Monitor, |bundle| {
        running(bundle)?;
        bundle.call("pause").ok()?;
        if h.runtime().is_runc() {
            bundle.call("resume").ok()?;
        }
        Ok(())
    })
}

fn the_vmm_under_an_exec(h: &Hand) -> Result<Outcome> {
    let before = Census::take()?;
    let bundle = h.bundle("echo ready; sleep 1000")?;
    running(&bundle)?;
    let exec = bundle.exec("", "echo ready >/exec; sleep 1000");
    let victim = Part::Vmm.of(h, &bundle)?;
    let code = std::thread::scope(|scope| -> Result<i32> {
        let exec = scope.spawn(move || exec.run());
        conformance::command::eventually(std::time::Duration::from_secs(30), "the exec", || {
            Ok(bundle.inside("exec").exists().then_some(()))
        })?;
        kill(&victim)?;
        Ok(exec.join().unwrap_or_else(|_| anyhow::bail!("panicked"))?.code)
    })?;
    ensure!(code != 0, "an exec whose container was killed succeeded");
    bundle.expect_stopped()?;
    bundle.call("delete").ok()?;
    before.expect_nothing_new()?;
    Ok(Outcome::new().see("exit code of exec", code))
}

fn the_vmm_under_a_run(h: &Hand) -> Result<Outcome> {
    let before = Census::take()?;
    let bundle = h.bundle("echo ready >/run; sleep 1000")?;
    let code = std::thread::scope(|scope| -> Result<i32> {
        let run = bundle.run();
        let run = scope.spawn(move || run.run());
        conformance::command::eventually(std::time::Duration::from_secs(30), "the run", || {
            Ok(bundle.inside("run").exists().then_some(()))
        })?;
        kill(&Part::Vmm.of(h, &bundle)?)?;
        Ok(run.join().unwrap_or_else(|_| anyhow::bail!("panicked"))?.code)
    })?;
    expect_equal("exit code", code, 137)?;
    before.expect_nothing_new()?;
    Ok(Outcome::new().see("exit code of run", code))
}

fn all_at_once(h: &Hand) -> Result<Outcome> {
    let before = Census::take()?;
    let bundle = h.bundle("echo ready; sleep 1000")?;
    running(&bundle)?;
    let parts = [Part::Vmm, Part::Files, Part::Monitor].map(|part| part.of(h, &bundle));
    for part in parts {
        // Where the first takes the others with it, they are gone already.
        let _ = kill(&part?);
    }
    bundle.expect_stopped()?;
    let deleted = bundle.call("delete").run()?;
    expect_equal("exit code of delete", deleted.code, 0)?;
    before.expect_nothing_new()?;
    Ok(Outcome::new().see_output("delete", &deleted))
}

/// `create` killed at several moments; what it began must not stay.
fn a_create_on_its_way(h: &Hand) -> Result<Outcome> {
    let before = Census::take()?;
    // runc leaves its cgroups where it is killed before it has written its record.
    let moments: &[u64] = if h.runtime().is_runc() { &[1000] } else { &[5, 20, 60, 120, 200, 400] };
    for &milliseconds in moments {
        let bundle = h.bundle("sleep 1000")?;
        let mut create = bundle.call("create").current_dir(&bundle.path).into_command();
        create
            .stdin(std::process::Stdio::null())
            .stdout(std::process::Stdio::null())
            .stderr(std::process::Stdio::null());
        let mut create = create.spawn()?;
        std::thread::sleep(std::time::Duration::from_millis(milliseconds));
        create.kill()?;
        create.wait()?;
        // As an engine does after a create that failed.
        bundle.call("delete --force").ok()?;
    }
    before.expect_nothing_new()?;
    Ok(Outcome::new().see("left", 0))
}

fn many_containers_one_after_another(h: &Hand) -> Result<Outcome> {
    let before = Census::take()?;
    let bundle = h.bundle("exit 3")?;
    for _ in 0..5 {
        expect_equal("exit code", bundle.run().run()?.code, 3)?;
    }
    before.expect_nothing_new()?;
    Ok(Outcome::new().see("left", 0))
}
