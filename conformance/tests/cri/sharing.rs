//! What the containers of a pod share, and what not; what of the host's they cannot have.

use std::path::Path;

use anyhow::{Context, Result, ensure};
use conformance::cri::v1::{self, NamespaceMode};
use conformance::cri::{Container, Cri, pod_security, security};
use conformance::suite::expect_equal;
use conformance::{Case, Outcome, case};

use crate::SLEEP;

pub(crate) fn cases() -> Vec<Case<Cri>> {
    vec![
        case!(roots_are_not_shared),
        case!(shared_memory_is_shared),
        case!(message_queues_are_shared),
        case!(processes_are_not_shared),
        case!(processes_are_shared_if_asked_for),
        case!(a_debugger_joins_a_container).only_on(crate::MOST),
        case!(a_host_name_is_shared),
        case!(the_network_of_the_host).only_on(crate::BY_CONTAINER),
        case!(the_processes_of_the_host),
        case!(the_ipc_of_the_host),
    ]
}

fn roots_are_not_shared(c: &Cri) -> Result<Outcome> {
    let pod = c.pod()?;
    let (one, two) = (pod.start("one", SLEEP)?, pod.start("two", SLEEP)?);
    one.sh("echo mine >/file")?;
    let other = two.sh("cat /file")?;
    ensure!(other.code != 0, "a container sees another's files: {}", other.stdout);
    Ok(Outcome::new().see_output("other", &other))
}

fn shared_memory_is_shared(c: &Cri) -> Result<Outcome> {
    let pod = c.pod()?;
    let (one, two) = (pod.start("one", SLEEP)?, pod.start("two", SLEEP)?);
    one.sh("echo shared >/dev/shm/segment")?;
    let other = two.sh("cat /dev/shm/segment; stat -f -c %T /dev/shm; df /dev/shm | awk 'NR == 2 { print $2 }'")?;
    ensure!(other.stdout.starts_with("shared\n"), "another container does not see it: {}", other.stderr);
    one.stop(0)?;
    one.remove()?;
    let kept = two.sh("cat /dev/shm/segment")?;
    expect_equal("what is kept", kept.text(), "shared")?;
    Ok(Outcome::new().see_output("other", &other))
}

fn message_queues_are_shared(c: &Cri) -> Result<Outcome> {
    let pod = c.pod()?;
    let (one, two) = (pod.start("one", SLEEP)?, pod.start("two", SLEEP)?);
    // A queue is of the IPC namespace, whichever container's /dev/mqueue it is made by.
    one.sh("touch /dev/mqueue/queue")?;
    let other = two.sh("ls /dev/mqueue")?;
    expect_equal("queues", other.text(), "queue")?;
    Ok(Outcome::new().see_output("other", &other))
}

fn processes_are_not_shared(c: &Cri) -> Result<Outcome> {
    let pod = c.pod()?;
    pod.start("one", &["sleep", "1111"])?;
    let two = pod.start("two", SLEEP)?;
    let first = two.sh("tr '\\0' ' ' </proc/1/cmdline")?;
    expect_equal("the first process", first.text(), "sleep 1000")?;
    let others = two.sh("ps | grep -c '[s]leep 1'")?;
    expect_equal("what sleeps", others.text(), "1")?;
    Ok(Outcome::new().see_output("others", &others))
}

fn processes_are_shared_if_asked_for(c: &Cri) -> Result<Outcome> {
    let shared = |config: &mut v1::ContainerConfig| {
        security(config).namespace_options.get_or_insert_default().set_pid(NamespaceMode::Pod);
    };
    let pod = c.pod_with(|config| {
        pod_security(config).namespace_options.get_or_insert_default().set_pid(NamespaceMode::Pod);
    })?;
    let one = pod.start_with("one", &["sleep", "1111"], shared)?;
    let two = pod.start_with("two", SLEEP, shared)?;
    let own = two.sh("tr '\\0' ' ' </proc/1/cmdline")?;
    ensure!(own.text() != "sleep 1000", "the container's process is the first of its pod's");
    // A word in brackets does not find itself.
    let pid = two.until("ps | awk '/[s]leep 1111/ { print $1; found = 1 } END { exit !found }'")?;
    // A process reaches into another container's root, as debuggers do.
    one.sh("echo mine >/file")?;
    let file = two.sh(&format!("cat /proc/{}/root/file", pid.text()))?;
    expect_equal("the other's file", file.text(), "mine")?;
    two.exec(&["kill", "-KILL", pid.text()])?;
    let status = one.wait()?;
    expect_equal("exit code of what another killed", status.exit_code, 137)?;
    Ok(Outcome::new().see("code", status.exit_code).see("ready", pod.is_ready()?))
}

fn a_debugger_joins_a_container(c: &Cri) -> Result<Outcome> {
    let pod = c.pod()?;
    let target = pod.start("target", &["sleep", "1111"])?;
    let debugger = pod.start_with("debugger", SLEEP, |config| {
        let options = security(config).namespace_options.get_or_insert_default();
        options.set_pid(NamespaceMode::Target);
        options.target_id.clone_from(&target.id);
    })?;
    let first = debugger.sh("tr '\\0' ' ' </proc/1/cmdline")?;
    // Its target's, or that of the pod: never its own.
    ensure!(["sleep 1111", "/pause -P"].contains(&first.text()), "the first process is {:?}", first.text());
    // Before its target: runc's shim now and then breaks off when it is to kill what has just ended with its namespace.
    debugger.stop(0)?;
    Ok(Outcome::new().see("the first process", first.text()))
}

fn a_host_name_is_shared(c: &Cri) -> Result<Outcome> {
    let pod = c.pod_with(|config| config.hostname = "of-all".to_owned())?;
    let names = [pod.sh("hostname")?, pod.sh("hostname")?];
    expect_equal("names", (names[0].text(), names[1].text()), ("of-all", "of-all"))?;
    Ok(Outcome::new().see("name", names[0].text()))
}

/// Starts a pod that wants a namespace of the host's: what came of it.
fn of_the_host(
    c: &Cri,
    choose: fn(&mut v1::NamespaceOption),
    probe: fn(&Container<'_>) -> Result<bool>,
) -> Result<Outcome> {
    let pod = c.pod_with(|config| {
        // The kubelet gives no name of its own to a pod in the host's network.
        config.hostname = String::new();
        choose(pod_security(config).namespace_options.get_or_insert_default());
    });
    match pod {
        Ok(pod) => {
            let container = pod.start_with("main", SLEEP, |config| {
                choose(security(config).namespace_options.get_or_insert_default());
            })?;
            ensure!(probe(&container)?, "the container is not where the host is");
            Ok(Outcome::new().see("the pod", "runs"))
        }
        Err(error) => Ok(Outcome::new().see("the pod", error)),
    }
}

/// Whether a container has the namespace that this process has.
fn same_namespace(container: &Container<'_>, kind: &str) -> Result<bool> {
    let own = std::fs::read_link(Path::new("/proc/self/ns").join(kind))?;
    let output = container.exec(&["readlink", &format!("/proc/self/ns/{kind}")])?;
    Ok(output.text() == own.to_str().context("a namespace's name is plain")?)
}

fn the_network_of_the_host(c: &Cri) -> Result<Outcome> {
    of_the_host(c, |options| options.set_network(NamespaceMode::Node), |container| same_namespace(container, "net"))
}

fn the_processes_of_the_host(c: &Cri) -> Result<Outcome> {
    of_the_host(c, |options| options.set_pid(NamespaceMode::Node), |container| same_namespace(container, "pid"))
}

fn the_ipc_of_the_host(c: &Cri) -> Result<Outcome> {
    of_the_host(c, |options| options.set_ipc(NamespaceMode::Node), |container| same_namespace(container, "ipc"))
}
