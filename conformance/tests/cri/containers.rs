//! Containers: how they begin and end, and what is told of it.

use anyhow::{Context, Result, ensure};
use conformance::cri::v1::{self, ContainerState};
use conformance::cri::{Container, Cri};
use conformance::suite::expect_equal;
use conformance::{Case, Outcome, case};

use crate::{SLEEP, resources};

pub(crate) fn cases() -> Vec<Case<Cri>> {
    vec![
        case!(exit_codes_and_reasons),
        case!(states_and_times),
        case!(out_of_memory_is_told),
        case!(a_grace_period_is_given),
        case!(no_patience_without_end),
        case!(a_running_container_is_removed),
        case!(a_created_container_is_removed),
        case!(starting_twice_fails),
        case!(containers_are_listed_by_their_labels),
        case!(environment_folder_and_arguments),
        case!(memory_is_updated).only_on(crate::MOST),
    ]
}

fn exit_codes_and_reasons(c: &Cri) -> Result<Outcome> {
    let pod = c.pod()?;
    let mut outcome = Outcome::new();
    for code in [0, 1, 126, 255] {
        let status = pod.start("main", &["sh", "-c", &format!("exit {code}")])?.wait()?;
        expect_equal("exit code", status.exit_code, code)?;
        outcome = outcome.see(&format!("{code}: reason"), status.reason);
    }
    let status = pod.start("main", &["sh", "-c", "kill -SEGV $$"])?.wait()?;
    Ok(outcome.see("by a signal", status.exit_code).see("by a signal: reason", status.reason))
}

fn states_and_times(c: &Cri) -> Result<Outcome> {
    let pod = c.pod()?;
    let container = pod.create("main", SLEEP)?;
    let created = container.status()?;
    expect_equal("state", created.state(), ContainerState::ContainerCreated)?;
    container.start()?;
    let running = container.status()?;
    expect_equal("state", running.state(), ContainerState::ContainerRunning)?;
    container.stop(0)?;
    let ended = container.status()?;
    expect_equal("state", ended.state(), ContainerState::ContainerExited)?;
    ensure!(
        0 < ended.created_at && ended.created_at < ended.started_at && ended.started_at < ended.finished_at,
        "created {}, started {}, finished {}",
        ended.created_at,
        ended.started_at,
        ended.finished_at
    );
    expect_equal("times while it ran", (running.started_at, running.finished_at), (ended.started_at, 0))?;
    Ok(Outcome::new().see("code", ended.exit_code).see("reason", ended.reason))
}

fn out_of_memory_is_told(c: &Cri) -> Result<Outcome> {
    let pod = c.pod()?;
    let beside = pod.start("beside", SLEEP)?;
    // The shell becomes what takes the memory, so that what is killed is the container's first process.
    let container = pod.start_with("main", &["sh", "-c", "exec tail -c 300m /dev/zero"], |config| {
        resources(config).memory_limit_in_bytes = 64 << 20;
    })?;
    let status = container.wait()?;
    expect_equal("exit code and reason", (status.exit_code, status.reason.as_str()), (137, "OOMKilled"))?;
    expect_equal("state of another", beside.status()?.state(), ContainerState::ContainerRunning)?;
    Ok(Outcome::new().see("code", status.exit_code).see("reason", status.reason))
}

const CAREFUL: &str = "trap 'echo asked; exit 7' TERM; echo ready; while :; do sleep 0.1; done";

fn a_grace_period_is_given(c: &Cri) -> Result<Outcome> {
    let pod = c.pod()?;
    let container = pod.start("main", &["sh", "-c", CAREFUL])?;
    container.expect_log("ready")?;
    container.stop(60)?;
    let status = container.status()?;
    expect_equal("exit code", status.exit_code, 7)?;
    container.expect_log("asked")?;
    Ok(Outcome::new().see("code", status.exit_code).see("reason", status.reason))
}

fn no_patience_without_end(c: &Cri) -> Result<Outcome> {
    let pod = c.pod()?;
    let container = pod.start("main", &["sh", "-c", "trap '' TERM; echo ready; while :; do sleep 0.1; done"])?;
    container.expect_log("ready")?;
    container.stop(1)?;
    let status = container.status()?;
    expect_equal("exit code", status.exit_code, 137)?;
    Ok(Outcome::new().see("code", status.exit_code).see("reason", status.reason))
}

fn a_running_container_is_removed(c: &Cri) -> Result<Outcome> {
    let pod = c.pod()?;
    let container = pod.start("main", SLEEP)?;
    container.remove()?;
    ensure!(container.status().is_err(), "a removed container is still known");
    Ok(Outcome::new().see("ready", pod.is_ready()?))
}

fn a_created_container_is_removed(c: &Cri) -> Result<Outcome> {
    let pod = c.pod()?;
    let container = pod.create("main", SLEEP)?;
    container.remove()?;
    ensure!(container.status().is_err(), "a removed container is still known");
    Ok(Outcome::new().see("ready", pod.is_ready()?))
}

fn starting_twice_fails(c: &Cri) -> Result<Outcome> {
    let pod = c.pod()?;
    let container = pod.start("main", SLEEP)?;
    let again = container.start().err().context("a running container started")?;
    container.stop(0)?;
    let after = container.start().err().context("a container that ended started")?;
    let kind = |error: anyhow::Error| error.to_string().split(':').next().unwrap_or_default().to_owned();
    Ok(Outcome::new().see("while it runs", kind(again)).see("after its end", kind(after)))
}

fn containers_are_listed_by_their_labels(c: &Cri) -> Result<Outcome> {
    let pod = c.pod()?;
    let labelled = |name: &str, value: &str| {
        let (key, value) = ("rvm.example/kind".to_owned(), value.to_owned());
        pod.start_with(name, SLEEP, |config| drop(config.labels.insert(key, value)))
    };
    let (one, two) = (labelled("one", "a")?, labelled("two", "b")?);
    let listed = |value: &str, state: Option<ContainerState>| -> Result<Vec<String>> {
        let filter = v1::ContainerFilter {
            pod_sandbox_id: pod.id.clone(),
            label_selector: [("rvm.example/kind".to_owned(), value.to_owned())].into(),
            state: state.map(|state| v1::ContainerStateValue { state: state.into() }),
            ..Default::default()
        };
        let request = v1::ListContainersRequest { filter: Some(filter) };
        let list = c.client().call(async |mut c| c.list_containers(request).await)?;
        Ok(list.containers.into_iter().map(|container| container.id).collect())
    };
    expect_equal("those of kind a", listed("a", None)?, vec![one.id.clone()])?;
    two.stop(0)?;
    expect_equal("those of kind b that run", listed("b", Some(ContainerState::ContainerRunning))?, vec![])?;
    let ended = listed("b", Some(ContainerState::ContainerExited))?;
    expect_equal("those of kind b that ended", &ended, &vec![two.id.clone()])?;
    Ok(Outcome::new().see("ended", ended.len()))
}

fn environment_folder_and_arguments(c: &Cri) -> Result<Outcome> {
    let pod = c.pod()?;
    let output = pod.sh_with("", |config| {
        config.command = vec!["sh".to_owned(), "-c".to_owned()];
        config.args = vec!["echo \"$ONE|$TWO|$PATH|$(pwd)|$0|$1\"".to_owned(), "zero".to_owned(), "o n e".to_owned()];
        config.working_dir = "/made/for/it".to_owned();
        config.envs = [("ONE", "1"), ("TWO", "a = b")]
            .map(|(key, value)| v1::KeyValue { key: key.to_owned(), value: value.to_owned() })
            .into();
    })?;
    expect_equal("output", output.text(), "1|a = b|/bin|/made/for/it|zero|o n e")?;
    Ok(Outcome::new().see_output("run", &output))
}

fn memory_is_updated(c: &Cri) -> Result<Outcome> {
    const TAKE_100M: &str = "head -c 100m /dev/zero | tail -c 100m | wc -c";
    let pod = c.pod()?;
    let container = pod.start_with("main", SLEEP, |config| resources(config).memory_limit_in_bytes = 64 << 20)?;
    let before = container.sh(TAKE_100M)?;
    ensure!(before.text() != "104857600", "a hundred megabytes fit into 64");
    update(c, &container, 256 << 20)?;
    let after = container.sh(TAKE_100M)?;
    expect_equal("what fits then", after.text(), "104857600")?;
    Ok(Outcome::new().see("after", after.text()).see("state", container.status()?.state().as_str_name()))
}

fn update(c: &Cri, container: &Container<'_>, memory: i64) -> Result<()> {
    let linux = v1::LinuxContainerResources { memory_limit_in_bytes: memory, ..Default::default() };
    let request = v1::UpdateContainerResourcesRequest {
        container_id: container.id.clone(),
        linux: Some(linux),
        ..Default::default()
    };
    c.client().call(async |mut c| c.update_container_resources(request).await).map(drop)
}
