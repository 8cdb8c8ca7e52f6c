//! What dies or stops answering, and what is to be had of a pod then.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use conformance::census::{Census, Process};
use conformance::command::eventually;
use conformance::cri::v1::ContainerState;
use conformance::cri::{Container, Cri, Pod, Release, pod_security, security};
use conformance::enclosure::remove_cgroup;
use conformance::suite::expect_equal;
use conformance::{Case, Outcome, case};
use rustix::process::{Pid, Signal, kill_process};

use crate::SLEEP;

pub(crate) fn cases() -> Vec<Case<Cri>> {
    vec![
        case!(containerd_is_started_anew).alone(),
        case!(the_shim_is_killed),
        case!(the_shim_of_three_containers_is_killed).only_on(crate::MOST),
        case!(the_machine_is_killed),
        case!(the_machine_is_stopped).only_on(crate::MOST),
        case!(the_kernel_panics).only_on(crate::MOST),
    ]
}

fn containerd_is_started_anew(c: &Cri) -> Result<Outcome> {
    let pod = c.pod()?;
    let (one, two) = (pod.start("one", SLEEP)?, pod.start("two", &["sh", "-c", "sleep 3; exit 5"])?);
    one.sh("echo kept >/file")?;
    c.engine().restart()?;
    expect_equal("state", one.status()?.state(), ContainerState::ContainerRunning)?;
    ensure!(pod.is_ready()?, "the pod is not ready any more");
    let output = one.sh("cat /file; exit 3")?;
    expect_equal("output and code", (output.text(), output.code), ("kept", 3))?;
    expect_equal("the exit code of another", two.wait()?.exit_code, 5)?;
    let third = pod.sh("echo third")?;
    expect_equal("what a new one prints", third.text(), "third")?;
    one.stop(0)?;
    expect_equal("exit code", one.status()?.exit_code, 137)?;
    Ok(Outcome::new().see_output("exec", &output).see_output("third", &third))
}

/// The shim of a pod.
fn shim(c: &Cri, pod: &Pod<'_>) -> Result<Process> {
    let program = if c.runtime().is_runc() { "containerd-shim-runc-v2" } else { "containerd-shim-runvm-v2" };
    let is_it = |process: &Process| process.line.contains(program) && process.line.contains(&pod.id);
    Process::all()?.into_iter().find(is_it).with_context(|| format!("the pod has no {program}"))
}

/// The shim and what it has started: with runvm the virtual machine and its helpers, with runc the containers' processes.
fn family(shim: &Process) -> Result<Vec<Process>> {
    let family: Vec<_> = shim.family(&Process::all()?).into_iter().cloned().collect();
    ensure!(family.len() > 1, "the shim has no children");
    Ok(family)
}

/// What holds a virtual machine, or, with runc, all that runs in the pod.
fn machine(c: &Cri, shim: &Process) -> Result<Vec<Process>> {
    let rest: Vec<_> = family(shim)?.into_iter().filter(|process| process.pid != shim.pid).collect();
    if c.runtime().is_runc() {
        return Ok(rest);
    }
    let has_one = |process: &Process| {
        let files = std::fs::read_dir(format!("/proc/{}/fd", process.pid)).into_iter().flatten().flatten();
        let mut targets = files.filter_map(|file| std::fs::read_link(file.path()).ok());
        targets.any(|target| target.to_string_lossy() == "anon_inode:kvm-vm")
    };
    let machines: Vec<_> = rest.into_iter().filter(has_one).collect();
    expect_equal("virtual machines of the pod", machines.len(), 1)?;
    Ok(machines)
}

/// Waits until the engine has seen the end of these containers; which codes it tells.
fn all_end(containers: &[Container<'_>]) -> Result<String> {
    let mut codes = Vec::new();
    for container in containers {
        let code = container.wait()?.exit_code;
        ensure!(code != 0, "a container that was killed ended well");
        codes.push(code.to_string());
    }
    Ok(codes.join(" "))
}

/// Waits until the engine has seen the end of the pod.
fn pod_ends(pod: &Pod<'_>) -> Result<()> {
    eventually(Duration::from_secs(60), "the pod not to be ready", || Ok((!pod.is_ready()?).then_some(())))
}

/// Removes the pod, after which nothing on the host may tell of it: neither its name nor one of `processes`.
fn nothing_is_left(c: &Cri, pod: &Pod<'_>, containers: &[Container<'_>], processes: &[Process]) -> Result<()> {
    pod.stop()?;
    pod.remove()?;
    if c.runtime().is_runc() && matches!(c.engine().release(), Release::Sid | Release::SidBySandbox) {
        // containerd 2 leaves runc's shim, or what that ran, when the other has died; that is not for runvm to do as well.
        for process in Process::all()?.iter().filter(|process| is_one_of(process, processes)) {
            process.signal(Signal::KILL)?;
        }
        clear_cgroup(pod)?;
        for id in containers.iter().map(|container| &container.id).chain([&pod.id]) {
            // There is one for what was left only.
            let _ = std::fs::remove_dir_all(Path::new("/run/containerd/runc/k8s.io").join(id));
        }
    }
    Census::expect_no_trace_of(&pod.id)?;
    eventually(Duration::from_secs(10), "the pod's processes to be gone", || {
        Ok((!Process::all()?.iter().any(|process| is_one_of(process, processes))).then_some(()))
    })
}

/// Ends what is in a pod's cgroup, and removes it.
fn clear_cgroup(pod: &Pod<'_>) -> Result<()> {
    for group in pod.cgroups()? {
        eventually(Duration::from_secs(10), "the pod's cgroups to be empty", || {
            for inner in std::fs::read_dir(&group).into_iter().flatten().flatten() {
                let members = std::fs::read_to_string(inner.path().join("cgroup.procs")).unwrap_or_default();
                for pid in members.lines().filter_map(|line| Pid::from_raw(line.parse().ok()?)) {
                    // It may have ended meanwhile.
                    let _ = kill_process(pid, Signal::KILL);
                }
            }
            remove_cgroup(&group);
            Ok((!group.exists()).then_some(()))
        })?;
    }
    Ok(())
}

/// Whether this is one of them, and no other process that was given its number.
fn is_one_of(process: &Process, processes: &[Process]) -> bool {
    processes.iter().any(|other| process.pid == other.pid && process.line == other.line)
}

fn kill_the_shim(c: &Cri, names: &[&str]) -> Result<Outcome> {
    let pod = c.pod()?;
    let containers = names.iter().map(|name| pod.start(name, SLEEP)).collect::<Result<Vec<_>>>()?;
    let shim = shim(c, &pod)?;
    let processes = family(&shim)?;
    shim.signal(Signal::KILL)?;
    all_end(&containers)?;
    pod_ends(&pod)?;
    nothing_is_left(c, &pod, &containers, &processes)?;
    // Another pod is none the worse for it.
    let output = c.pod()?.sh("echo well")?;
    expect_equal("what another pod says", output.text(), "well")?;
    Ok(Outcome::new().see_output("another", &output))
}

fn the_shim_is_killed(c: &Cri) -> Result<Outcome> {
    kill_the_shim(c, &["main"])
}

fn the_shim_of_three_containers_is_killed(c: &Cri) -> Result<Outcome> {
    kill_the_shim(c, &["one", "two", "three"])
}

fn the_machine_is_killed(c: &Cri) -> Result<Outcome> {
    let pod = c.pod()?;
    let containers = [pod.start("one", SLEEP)?, pod.start("two", SLEEP)?];
    let shim = shim(c, &pod)?;
    let processes = family(&shim)?;
    for process in machine(c, &shim)? {
        process.signal(Signal::KILL)?;
    }
    let codes = all_end(&containers)?;
    pod_ends(&pod)?;
    nothing_is_left(c, &pod, &containers, &processes)?;
    Ok(Outcome::new().see("codes", codes))
}

fn the_machine_is_stopped(c: &Cri) -> Result<Outcome> {
    let pod = c.pod()?;
    let containers = [pod.start("one", SLEEP)?, pod.start("two", SLEEP)?];
    let shim = shim(c, &pod)?;
    let processes = family(&shim)?;
    // A guest that hangs is silent; so is one whose processors do not run.
    for process in machine(c, &shim)? {
        process.signal(Signal::STOP)?;
    }
    containers[0].stop(0)?;
    let code = containers[0].status()?.exit_code;
    pod.stop()?;
    all_end(&containers)?;
    nothing_is_left(c, &pod, &containers, &processes)?;
    Ok(Outcome::new().see("code", code))
}

fn the_kernel_panics(c: &Cri) -> Result<Outcome> {
    let pod = c.pod_with(|config| pod_security(config).privileged = true)?;
    let start = |name| pod.start_with(name, SLEEP, |config| security(config).privileged = true);
    let containers = [start("one")?, start("two")?];
    let shim = shim(c, &pod)?;
    let processes = family(&shim)?;
    if c.runtime().is_runc() {
        // The kernel would be this machine's: its processes end as they would if they had one of their own.
        for process in machine(c, &shim)? {
            process.signal(Signal::KILL)?;
        }
    } else {
        // No answer is to be expected of what does this.
        let _ = containers[0].exec_within(&["sh", "-c", "echo c >/proc/sysrq-trigger"], 10);
    }
    let codes = all_end(&containers)?;
    pod_ends(&pod)?;
    nothing_is_left(c, &pod, &containers, &processes)?;
    Ok(Outcome::new().see("codes", codes))
}
