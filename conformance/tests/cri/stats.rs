//! What the kubelet asks for the whole time: usage, and events.

use std::collections::BTreeSet;
use std::fs;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use conformance::census::Process;
use conformance::command::eventually;
use conformance::cri::{Container, Cri, v1};
use conformance::suite::expect_equal;
use conformance::{Case, Outcome, case};

use crate::SLEEP;

pub(crate) fn cases() -> Vec<Case<Cri>> {
    vec![
        case!(a_container_tells_of_its_use),
        case!(all_containers_of_a_pod_tell_of_their_use),
        case!(a_pod_tells_of_its_use).only_on(&["containerd-1.7", "containerd-2"]),
        case!(a_pod_keeps_to_its_overhead),
        case!(what_happens_is_told).only_on(&["containerd-1.7", "containerd-2"]),
    ]
}

/// Holds thirty megabytes and a processor.
const BUSY: &[&str] = &["sh", "-c", "x=$(head -c 30m /dev/zero | tr '\\0' x); echo ready; while :; do :; done"];

fn stats(c: &Cri, container: &Container<'_>) -> Result<v1::ContainerStats> {
    let request = v1::ContainerStatsRequest { container_id: container.id.clone() };
    c.client().call(async |mut c| c.container_stats(request).await)?.stats.context("no stats")
}

fn memory(stats: &v1::ContainerStats) -> u64 {
    stats.memory.as_ref().and_then(|memory| memory.working_set_bytes).unwrap_or_default().value
}

fn time(stats: &v1::ContainerStats) -> u64 {
    stats.cpu.as_ref().and_then(|cpu| cpu.usage_core_nano_seconds).unwrap_or_default().value
}

fn a_container_tells_of_its_use(c: &Cri) -> Result<Outcome> {
    let pod = c.pod()?;
    let container = pod.start("main", BUSY)?;
    let idle = pod.start("idle", SLEEP)?;
    container.expect_log("ready")?;
    let first = stats(c, &container)?;
    ensure!((30 << 20..500 << 20).contains(&memory(&first)), "it uses {} bytes of memory", memory(&first));
    ensure!(memory(&stats(c, &idle)?) < 20 << 20, "what sleeps uses {} bytes of memory", memory(&stats(c, &idle)?));
    eventually(Duration::from_secs(30), "a second of a processor's time to be told", || {
        Ok((time(&stats(c, &container)?) > time(&first) + 1_000_000_000).then_some(()))
    })?;
    let attributes = first.attributes.context("no attributes")?;
    expect_equal("ID", attributes.id, container.id)?;
    Ok(Outcome::new().see("name", attributes.metadata.unwrap_or_default().name))
}

fn all_containers_of_a_pod_tell_of_their_use(c: &Cri) -> Result<Outcome> {
    let pod = c.pod()?;
    let mut expected = vec![pod.start("one", SLEEP)?.id, pod.start("two", SLEEP)?.id];
    pod.sh("true")?;
    let filter = v1::ContainerStatsFilter { pod_sandbox_id: pod.id.clone(), ..Default::default() };
    let request = v1::ListContainerStatsRequest { filter: Some(filter) };
    let list = c.client().call(async |mut c| c.list_container_stats(request).await)?.stats;
    let running = list.iter().filter(|stats| memory(stats) > 0);
    let mut ids: Vec<_> = running.filter_map(|stats| Some(stats.attributes.as_ref()?.id.clone())).collect();
    ids.sort();
    expected.sort();
    expect_equal("those that run", ids, expected)?;
    Ok(Outcome::new().see("listed", list.len()))
}

fn a_pod_tells_of_its_use(c: &Cri) -> Result<Outcome> {
    let pod = c.pod()?;
    let container = pod.start("main", BUSY)?;
    container.expect_log("ready")?;
    let ask = || -> Result<v1::LinuxPodSandboxStats> {
        let request = v1::PodSandboxStatsRequest { pod_sandbox_id: pod.id.clone() };
        let stats = c.client().call(async |mut c| c.pod_sandbox_stats(request).await)?.stats;
        stats.context("no stats")?.linux.context("no stats of Linux")
    };
    let stats = ask()?;
    let memory = stats.memory.and_then(|memory| memory.working_set_bytes).unwrap_or_default().value;
    ensure!(memory > 30 << 20, "the pod uses {memory} bytes of memory");
    let network = stats.network.and_then(|network| network.default_interface).context("no network")?;
    expect_equal("containers", stats.containers.len(), 1)?;
    eventually(Duration::from_secs(30), "half a processor to be told", || {
        let cpu = ask()?.cpu.and_then(|cpu| cpu.usage_core_nano_seconds).unwrap_or_default().value;
        Ok((cpu > 500_000_000).then_some(()))
    })?;
    let processes = stats.process.and_then(|process| process.process_count).unwrap_or_default().value;
    ensure!(processes > 0, "a pod of no processes");
    Ok(Outcome::new().see("interface", network.name))
}

/// What the RuntimeClass in packaging/kubernetes adds to the containers' limits.
const OVERHEAD: u64 = 160 << 20;

/// A container that holds memory and fills the page cache, up to its limit, takes no more of the host than Kubernetes
/// reckons with.
fn a_pod_keeps_to_its_overhead(c: &Cri) -> Result<Outcome> {
    const LIMIT: u64 = 128 << 20;
    let limits = v1::LinuxContainerResources { memory_limit_in_bytes: LIMIT as i64, ..Default::default() };
    let pod = c.pod_with(|config| config.linux.get_or_insert_default().resources = Some(limits))?;
    let script = "x=$(head -c 30m /dev/zero | tr '\\0' x); head -c 400m /dev/zero > /file; \
                  cat /file /bin/* > /dev/null; rm /file; echo full; sleep 1000; :";
    let container = pod.start_with("main", &["sh", "-c", script], |config| {
        crate::resources(config).memory_limit_in_bytes = LIMIT as i64;
    })?;
    container.expect_log("full")?;
    let members = members_of(pod.cgroups()?)?;
    let all = Process::all()?;
    let taken = all.iter().filter(|process| members.contains(&process.pid)).filter_map(Process::pss).sum::<u64>();
    ensure!((30 << 20..LIMIT + OVERHEAD).contains(&taken), "the pod takes {} MiB", taken >> 20);
    let said: Vec<_> = container.lines()?.into_iter().map(|line| line.content).collect();
    Ok(Outcome::new().see("said", said.concat()))
}

/// The processes of cgroups and those below them.
fn members_of(mut groups: Vec<PathBuf>) -> Result<BTreeSet<i32>> {
    let mut members = BTreeSet::new();
    while let Some(group) = groups.pop() {
        let Ok(listed) = fs::read_to_string(group.join("cgroup.procs")) else { continue };
        members.extend(listed.lines().filter_map(|pid| pid.parse::<i32>().ok()));
        groups.extend(fs::read_dir(group)?.flatten().map(|entry| entry.path()).filter(|path| path.is_dir()));
    }
    Ok(members)
}

fn what_happens_is_told(c: &Cri) -> Result<Outcome> {
    let mut events = c.client().call(async |mut c| c.get_container_events(v1::GetEventsRequest {}).await)?;
    let pod = c.pod()?;
    let container = pod.start("main", SLEEP)?;
    container.stop(0)?;
    container.remove()?;
    let mut seen = Vec::new();
    while seen.last().is_none_or(|last| last != "CONTAINER_DELETED_EVENT") {
        let event = c.client().next(&mut events, Duration::from_secs(30))?.context("the events ended")?;
        if event.container_id == container.id {
            seen.push(event.container_event_type().as_str_name().to_owned());
        }
    }
    expect_equal("how many", seen.len(), 4)?;
    Ok(Outcome::new().see("events", seen.join(" ")))
}
