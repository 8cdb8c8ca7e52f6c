//! What a container may use.

use anyhow::{Result, ensure};
use conformance::podman::{Container, Podman};
use conformance::suite::expect_equal;
use conformance::{Case, Outcome, case};

pub(crate) fn cases() -> Vec<Case<Podman>> {
    vec![
        case!(memory_beyond_the_limit_is_refused),
        case!(conmon_notes_an_oom_kill).tcg(),
        case!(limits_are_the_containers),
        case!(limits_can_be_updated),
        case!(processes_are_limited),
        case!(limits_of_the_process),
    ]
}

fn memory_beyond_the_limit_is_refused(p: &Podman) -> Result<Outcome> {
    let script = "head -c 300m /dev/zero | tail -c 300m | wc -c; echo survived";
    let output = p.sh("--memory 64m --memory-swap 64m", script).run()?;
    expect_equal("what was counted", output.stdout.contains("314572800"), false)?;
    Ok(Outcome::new().see_survivor(&output))
}

/// conmon notes it in a file where it runs, which is where Podman 4.3 does not look: `OOMKilled` is false with runc too.
fn conmon_notes_an_oom_kill(p: &Podman) -> Result<Outcome> {
    let container = p.start("--memory 64m --memory-swap 64m", &["tail", "-c", "300m", "/dev/zero"])?;
    let code = container.wait()?;
    expect_equal("exit code", code, 137)?;
    ensure!(p.folder().join("oom").exists(), "conmon has seen no OOM kill");
    Ok(Outcome::new().see("code", code).see("inspect", container.inspect("{{.State.OOMKilled}}")?))
}

/// A limit as the container sees it, by the file's names in cgroups of both versions.
fn limit(container: &Container<'_>, v1: &str, v2: &str) -> Result<String> {
    let script = format!("cd /sys/fs/cgroup; cat {v1} 2>/dev/null || cat {v2}");
    Ok(container.exec_sh("", &script).ok()?.text().to_owned())
}

fn expect_limits(container: &Container<'_>, memory: &str, quota: &str) -> Result<()> {
    expect_equal("memory", limit(container, "memory/memory.limit_in_bytes", "memory.max")?.as_str(), memory)?;
    let found = limit(container, "cpu/cpu.cfs_quota_us", "cpu.max")?;
    expect_equal("quota", found.split(' ').next(), Some(quota))
}

fn limits_are_the_containers(p: &Podman) -> Result<Outcome> {
    let container = p.start("--memory 64m --cpus 0.5 --pids-limit 40", &["sleep", "1000"])?;
    expect_limits(&container, "67108864", "50000")?;
    let pids = limit(&container, "pids/pids.max", "pids.max")?;
    expect_equal("processes", pids.as_str(), "40")?;
    Ok(Outcome::new().see("pids", pids))
}

fn limits_can_be_updated(p: &Podman) -> Result<Outcome> {
    let container = p.start("--memory 64m --memory-swap 64m --cpus 1", &["sleep", "1000"])?;
    let update = container.podman("update --memory 80m --memory-swap 80m --cpus 0.5").run()?;
    expect_equal("exit code", (update.code, update.stderr.as_str()), (0, ""))?;
    expect_limits(&container, "83886080", "50000")?;
    Ok(Outcome::new().see("then", container.inspect("{{.State.Status}}")?))
}

fn processes_are_limited(p: &Podman) -> Result<Outcome> {
    let script = "i=0; while [ $i -lt 30 ]; do sleep 5 & i=$((i+1)); done; echo all started";
    let output = p.sh("--pids-limit 10", script).run()?;
    ensure!(output.stderr.contains("Resource temporarily unavailable"), "thirty processes: {}", output.stderr);
    Ok(Outcome::new().see_output("run", &output))
}

fn limits_of_the_process(p: &Podman) -> Result<Outcome> {
    // Podman sets both as soon as it is asked for one, and more than this machine's root may.
    let options = "--ulimit nofile=100:200 --ulimit nproc=300:400 --sysctl net.ipv4.ip_default_ttl=77 --shm-size 16m";
    let script = "ulimit -n; ulimit -Hn; ulimit -u; cat /proc/sys/net/ipv4/ip_default_ttl;
                  df -k /dev/shm | tail -n 1 | awk '{ print $2 }'";
    let output = p.sh(options, script).run()?;
    expect_equal("limits", output.text(), "100\n200\n300\n77\n16384")?;
    Ok(Outcome::new().see_output("run", &output))
}
