//! What a container may use.

use anyhow::{Result, ensure};
use conformance::docker::Docker;
use conformance::suite::expect_equal;
use conformance::{Case, Outcome, case};

pub(crate) fn cases() -> Vec<Case<Docker>> {
    vec![
        case!(memory_beyond_the_limit_is_refused).tcg(),
        case!(memory_within_the_limit_is_there),
        case!(memory_without_a_limit_is_shown_and_there),
        case!(a_container_killed_for_memory_says_so),
        case!(an_oom_kill_of_a_child_is_told),
        case!(limits_can_be_updated),
        case!(processor_time_is_limited).alone(),
        case!(processes_are_limited),
        case!(shared_memory_has_its_size),
        case!(an_init_reaps),
        case!(environment_and_host_name),
    ]
}

fn memory_beyond_the_limit_is_refused(d: &Docker) -> Result<Outcome> {
    let script = "head -c 300m /dev/zero | tail -c 300m | wc -c; echo survived";
    let output = d.sh("--memory 64m --memory-swap 64m", script).run()?;
    expect_equal("what was counted", output.stdout.contains("314572800"), false)?;
    Ok(Outcome::new().see_survivor(&output))
}

fn memory_within_the_limit_is_there(d: &Docker) -> Result<Outcome> {
    let script = "head -c 100m /dev/zero | tail -c 100m | wc -c";
    let output = d.sh("--memory 200m --memory-swap 200m", script).run()?;
    expect_equal("what was counted", output.text(), "104857600")?;
    Ok(Outcome::new().see_output("run", &output))
}

fn memory_without_a_limit_is_shown_and_there(d: &Docker) -> Result<Outcome> {
    // `dd` reads all of it into one buffer.
    let script = "awk '/^Mem(Total|Available):/ { print ($2 > 1900000) }' /proc/meminfo
                  dd if=/dev/zero of=/dev/null bs=1500M count=1 2>&1 | head -n 2";
    let output = d.sh("", script).run()?;
    expect_equal("what is shown and there", output.text(), "1\n1\n1+0 records in\n1+0 records out")?;
    Ok(Outcome::new().see_output("run", &output))
}

fn a_container_killed_for_memory_says_so(d: &Docker) -> Result<Outcome> {
    // runc's shim begins to look for kills a moment after the start.
    let container = d.start_sh("--memory 64m --memory-swap 64m", "sleep 1; exec tail -c 300m /dev/zero")?;
    let code = container.wait()?;
    expect_equal("exit code", code, 137)?;
    Ok(Outcome::new().see("code", code).see("state", container.inspect("{{.State.OOMKilled}}")?))
}

fn an_oom_kill_of_a_child_is_told(d: &Docker) -> Result<Outcome> {
    // As above; and runc's shim tells of kills by another way than of the end, which is to be the later one.
    let script = "sleep 1; tail -c 300m /dev/zero; echo goes on; sleep 2; exit 5";
    let container = d.start_sh("--memory 64m --memory-swap 64m", script)?;
    let code = container.wait()?;
    container.expect_log("goes on")?;
    Ok(Outcome::new().see("code", code).see("state", container.inspect("{{.State.OOMKilled}}")?))
}

fn limits_can_be_updated(d: &Docker) -> Result<Outcome> {
    let container = d.start("--memory 64m --memory-swap 64m --cpus 1", &["sleep", "1000"])?;
    container.docker("update --memory 80m --memory-swap 80m --cpus 0.5 --pids-limit 40 --cpu-shares 512").ok()?;
    let limit = |controller: &str, v1: &str, v2: &str| -> Result<String> {
        let script = format!("cd /sys/fs/cgroup; cat {controller}/{v1} 2>/dev/null || cat {v2}");
        Ok(container.exec_sh("", &script).ok()?.text().to_owned())
    };
    expect_equal("memory", limit("memory", "memory.limit_in_bytes", "memory.max")?.as_str(), "83886080")?;
    expect_equal("processes", limit("pids", "pids.max", "pids.max")?.as_str(), "40")?;
    let quota = limit("cpu", "cpu.cfs_quota_us", "cpu.max")?;
    expect_equal("quota", quota.split(' ').next(), Some("50000"))?;
    Ok(Outcome::new().see("then", container.inspect("{{.State.Status}} {{.HostConfig.Memory}}")?))
}

fn processor_time_is_limited(d: &Docker) -> Result<Outcome> {
    // Two busy loops for two seconds get a half of one processor: one second, not four.
    let script = "busy() { timeout 2 sh -c 'while :; do :; done'; }; busy & busy; wait; times";
    let output = d.sh("--cpus 0.5", script).run()?;
    let seconds: f64 = output.stdout.split_whitespace().filter_map(seconds).sum();
    ensure!(seconds > 0.2 && seconds < 1.8, "two busy seconds used {seconds} seconds: {}", output.stdout);
    Ok(Outcome::new().see("exit", output.code))
}

fn processes_are_limited(d: &Docker) -> Result<Outcome> {
    let script = "i=0; while [ $i -lt 30 ]; do sleep 5 & i=$((i+1)); done; echo all started";
    let output = d.sh("--pids-limit 10", script).run()?;
    ensure!(output.stderr.contains("Resource temporarily unavailable"), "thirty processes: {}", output.stderr);
    Ok(Outcome::new().see_output("run", &output))
}

fn shared_memory_has_its_size(d: &Docker) -> Result<Outcome> {
    let output = d
        .sh("--shm-size 16m", "df -k /dev/shm | tail -n 1 | awk '{ print $2 }'; echo x >/dev/shm/x && cat /dev/shm/x")
        .run()?;
    expect_equal("size", output.text(), "16384\nx")?;
    Ok(Outcome::new().see_output("run", &output))
}

fn an_init_reaps(d: &Docker) -> Result<Outcome> {
    let script = "(sleep 0 & exec sleep 0.1) & sleep 0.5; cat /proc/1/comm; grep -c 'State.*Z' /proc/[0-9]*/status | grep -c ':1'";
    let output = d.sh("--init", script).run()?;
    expect_equal("init and zombies", output.text(), "docker-init\n0")?;
    Ok(Outcome::new().see_output("run", &output))
}

fn environment_and_host_name(d: &Docker) -> Result<Outcome> {
    let options = "--env ONE=1 --env EMPTY= --hostname the-name --domainname rvm.example --workdir /tmp";
    let output = d.sh(options, "env | grep -v ^SHLVL | sort; hostname; pwd; cat /proc/sys/kernel/domainname").run()?;
    ensure!(output.stdout.contains("\nONE=1\n"), "{}", output.stdout);
    Ok(Outcome::new().see_output("run", &output))
}

/// A time as `times` prints it: 0m1.250s.
fn seconds(time: &str) -> Option<f64> {
    let (minutes, seconds) = time.strip_suffix('s')?.split_once('m')?;
    Some(minutes.parse::<f64>().ok()? * 60.0 + seconds.parse::<f64>().ok()?)
}
