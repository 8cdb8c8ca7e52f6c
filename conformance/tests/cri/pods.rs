//! Pods: what lives as long as they do, and what ends with them.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use conformance::command::eventually;
use conformance::cri::v1::ContainerState;
use conformance::cri::{Container, Cri, Pod};
use conformance::suite::expect_equal;
use conformance::{Case, Outcome, case};

use crate::SLEEP;

pub(crate) fn cases() -> Vec<Case<Cri>> {
    vec![
        case!(a_pod_runs_a_container),
        case!(a_pod_is_listed_until_it_is_removed),
        case!(stop_and_remove_may_be_repeated),
        case!(a_pod_outlives_its_containers),
        case!(three_containers_in_any_order).only_on(crate::MOST),
        case!(a_container_is_started_again),
        case!(stopping_a_pod_ends_its_containers),
        case!(a_pod_is_stopped_as_soon_as_it_runs),
        case!(removing_a_pod_removes_what_runs_in_it),
        case!(a_container_that_cannot_start_leaves_the_pod_alone),
        case!(several_pods_at_once).only_on(crate::MOST),
        case!(several_containers_at_once).only_on(crate::MOST),
        case!(ten_containers_one_after_another).only_on(crate::MOST),
    ]
}

fn a_pod_runs_a_container(c: &Cri) -> Result<Outcome> {
    let pod = c.pod()?;
    let output = pod.sh("echo out; echo err >&2; exit 3")?;
    expect_equal("outputs and code", (output.text(), output.stderr.trim(), output.code), ("out", "err", 3))?;
    Ok(Outcome::new().see_output("run", &output))
}

fn a_pod_is_listed_until_it_is_removed(c: &Cri) -> Result<Outcome> {
    let pod = c.pod_with(|config| {
        config.annotations.insert("rvm.example/note".to_owned(), "kept".to_owned());
    })?;
    let status = pod.status()?;
    expect_equal("annotations", &status.annotations, &pod.config.annotations)?;
    expect_equal("labels", &status.labels, &pod.config.labels)?;
    expect_equal("metadata", &status.metadata, &pod.config.metadata)?;
    ensure!(status.created_at > 0, "the pod was created at no time");
    let listed = || -> Result<Vec<String>> {
        let pods = c.list()?.into_iter();
        Ok(pods.filter(|item| item.id == pod.id).map(|item| item.state().as_str_name().to_owned()).collect())
    };
    let running = listed()?;
    expect_equal("state", running.as_slice(), &["SANDBOX_READY".to_owned()])?;
    pod.stop()?;
    let stopped = listed()?;
    expect_equal("state", stopped.as_slice(), &["SANDBOX_NOTREADY".to_owned()])?;
    pod.remove()?;
    let removed = listed()?;
    ensure!(removed.is_empty() && pod.status().is_err(), "a removed pod is still known");
    Ok(Outcome::new().see("running", running.join(" ")).see("stopped", stopped.join(" ")))
}

fn stop_and_remove_may_be_repeated(c: &Cri) -> Result<Outcome> {
    let pod = c.pod()?;
    let container = pod.start("main", SLEEP)?;
    for _ in 0..2 {
        container.stop(0)?;
    }
    for _ in 0..2 {
        container.remove()?;
    }
    for _ in 0..2 {
        pod.stop()?;
    }
    for _ in 0..2 {
        pod.remove()?;
    }
    Ok(Outcome::new().see("pods", c.list()?.len()))
}

fn a_pod_outlives_its_containers(c: &Cri) -> Result<Outcome> {
    let pod = c.pod()?;
    let addresses = pod.addresses()?;
    for code in [0, 4] {
        let output = pod.sh(&format!("exit {code}"))?;
        expect_equal("exit code", output.code, code)?;
        ensure!(pod.is_ready()?, "the pod ended with a container");
    }
    let last = pod.start("last", SLEEP)?;
    last.stop(0)?;
    last.remove()?;
    ensure!(pod.is_ready()?, "the pod ended with its last container");
    expect_equal("addresses", pod.addresses()?, addresses)?;
    let output = pod.sh("echo again")?;
    expect_equal("output", output.text(), "again")?;
    Ok(Outcome::new().see_output("run", &output))
}

fn three_containers_in_any_order(c: &Cri) -> Result<Outcome> {
    let mut outcome = Outcome::new();
    // The order in which they are started, the order in which they are stopped, and in which they are removed.
    for (starts, stops, removals) in [([0, 1, 2], [0, 1, 2], [0, 1, 2]), ([2, 0, 1], [1, 2, 0], [2, 0, 1])] {
        let pod = c.pod()?;
        let three = ["one", "two", "three"];
        let containers = three.map(|name| pod.create(name, SLEEP)).into_iter().collect::<Result<Vec<_>>>()?;
        for index in starts {
            containers[index].start()?;
            let output = containers[index].sh(&format!("echo {index} >/mine; cat /mine"))?;
            expect_equal("output", output.text(), &index.to_string())?;
        }
        for (position, index) in stops.into_iter().enumerate() {
            containers[index].stop(0)?;
            let status = containers[index].status()?;
            expect_equal("exit code", status.exit_code, 137)?;
            for &other in &stops[position + 1..] {
                let output = containers[other].sh("cat /mine")?;
                expect_equal("what another has", output.text(), &other.to_string())?;
            }
        }
        for index in removals {
            containers[index].remove()?;
        }
        outcome = outcome.see(&format!("{starts:?} ready"), pod.is_ready()?);
        ensure!(pod.is_ready()?, "the pod ended with its containers");
    }
    Ok(outcome)
}

fn a_container_is_started_again(c: &Cri) -> Result<Outcome> {
    let pod = c.pod()?;
    let beside = pod.start("beside", SLEEP)?;
    let mut seen = Vec::new();
    // The kubelet restarts by a new container of the same name, and removes the old one later.
    for attempt in 0..3 {
        let container = pod.start("main", &["sh", "-c", "ls /mark; touch /mark; exit 1"])?;
        let status = container.wait()?;
        expect_equal("exit code", status.exit_code, 1)?;
        let lines = container.lines()?;
        expect_equal("what the last one left", lines.iter().any(|line| line.content == "/mark"), false)?;
        seen.push(status.reason);
        if attempt == 1 {
            container.remove()?;
        }
    }
    expect_equal("state", beside.status()?.state(), ContainerState::ContainerRunning)?;
    Ok(Outcome::new().see("reasons", seen.join(" ")))
}

fn stopping_a_pod_ends_its_containers(c: &Cri) -> Result<Outcome> {
    let pod = c.pod()?;
    let containers = [pod.start("one", SLEEP)?, pod.start("two", SLEEP)?];
    let created = pod.create("never-started", SLEEP)?;
    pod.stop()?;
    let mut outcome = Outcome::new().see("never started", created.status()?.state().as_str_name());
    for (number, container) in containers.iter().enumerate() {
        let status = container.wait()?;
        expect_equal("exit code", status.exit_code, 137)?;
        outcome = outcome.see(&format!("{number}: reason"), status.reason);
    }
    ensure!(created.start().is_err(), "a container started in a pod that was stopped");
    Ok(outcome)
}

fn a_pod_is_stopped_as_soon_as_it_runs(c: &Cri) -> Result<Outcome> {
    for _ in 0..10 {
        let pod = c.pod()?;
        let container = pod.start("main", SLEEP)?;
        pod.stop()?;
        expect_equal("exit code", container.status()?.exit_code, 137)?;
        pod.remove()?;
    }
    Ok(Outcome::new().see("pods", c.list()?.len()))
}

fn removing_a_pod_removes_what_runs_in_it(c: &Cri) -> Result<Outcome> {
    let pod = c.pod()?;
    let container = pod.start("main", SLEEP)?;
    pod.remove()?;
    ensure!(pod.status().is_err() && container.status().is_err(), "what was removed is still known");
    Ok(Outcome::new().see("pods", c.list()?.len()))
}

fn a_container_that_cannot_start_leaves_the_pod_alone(c: &Cri) -> Result<Outcome> {
    let pod = c.pod()?;
    let beside = pod.start("beside", SLEEP)?;
    let container = pod.create("main", &["no-such-program"])?;
    let error = container.start().err().context("a program that is not there ran")?.to_string();
    ensure!(error.contains("no-such-program"), "the error does not name it: {error}");
    let status = container.status()?;
    expect_equal("state", status.state(), ContainerState::ContainerExited)?;
    expect_equal("state of another", beside.status()?.state(), ContainerState::ContainerRunning)?;
    Ok(Outcome::new().see("exit code", status.exit_code).see("reason", status.reason))
}

fn several_pods_at_once(c: &Cri) -> Result<Outcome> {
    let outputs = std::thread::scope(|scope| {
        let run = |number: usize| move || c.pod()?.sh(&format!("echo {number}"));
        let threads: Vec<_> = (0..4).map(|number| scope.spawn(run(number))).collect();
        let join = |thread: std::thread::ScopedJoinHandle<'_, Result<conformance::Output>>| thread.join();
        threads.into_iter().map(join).collect::<Vec<_>>()
    });
    let mut outcome = Outcome::new();
    for (number, output) in outputs.into_iter().enumerate() {
        let output = output.ok().context("a thread panicked")??;
        expect_equal("output", output.text(), &number.to_string())?;
        outcome = outcome.see_output(&number.to_string(), &output);
    }
    Ok(outcome)
}

fn several_containers_at_once(c: &Cri) -> Result<Outcome> {
    let pod = c.pod()?;
    let start = |number: usize| -> Result<Container<'_>> {
        let container = pod.start(&format!("c{number}"), &["sh", "-c", &format!("echo {number}; exec sleep 1000")])?;
        container.expect_log(&number.to_string())?;
        Ok(container)
    };
    let start = &start;
    let containers = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..6).map(|number| scope.spawn(move || start(number))).collect();
        threads.into_iter().map(|thread| thread.join().ok().context("a thread panicked")?).collect::<Result<Vec<_>>>()
    })?;
    let running = containers.iter().map(Container::status).collect::<Result<Vec<_>>>()?;
    let running = running.iter().filter(|status| status.state() == ContainerState::ContainerRunning).count();
    expect_equal("how many run", running, 6)?;
    stop_all_at_once(&containers)?;
    settled(&pod, &containers)?;
    Ok(Outcome::new().see("running", running).see("ready then", pod.is_ready()?))
}

fn stop_all_at_once(containers: &[Container<'_>]) -> Result<()> {
    std::thread::scope(|scope| {
        let threads: Vec<_> = containers.iter().map(|container| scope.spawn(|| container.stop(0))).collect();
        threads.into_iter().try_for_each(|thread| thread.join().ok().context("a thread panicked")?)
    })
}

fn settled(pod: &Pod<'_>, containers: &[Container<'_>]) -> Result<()> {
    eventually(Duration::from_secs(30), "all containers to have ended", || {
        let mut statuses = containers.iter().map(Container::status);
        let ended = statuses.try_fold(true, |all, status| {
            Ok::<_, anyhow::Error>(all && status?.state() == ContainerState::ContainerExited)
        })?;
        Ok((ended && pod.is_ready()?).then_some(()))
    })
}

fn ten_containers_one_after_another(c: &Cri) -> Result<Outcome> {
    let pod = c.pod()?;
    for number in 0..10 {
        let container = pod.start("main", &["sh", "-c", &format!("echo {number}; exit {number}")])?;
        expect_equal("exit code", container.wait()?.exit_code, number)?;
        container.remove()?;
    }
    Ok(Outcome::new().see("ready", pod.is_ready()?))
}
