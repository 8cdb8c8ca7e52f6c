//! What a container uses: its cgroup's files, as the host asks for them.

use std::collections::HashMap;
use std::fs;

use runvm_protocol::agent::{BlockDeviceStatistics, ContainerStatisticsResponse};

use super::cgroup::Cgroup;

/// Reads the statistics. A file that cannot be read has nothing to tell.
pub(super) fn of(cgroup: &Cgroup) -> ContainerStatisticsResponse {
    let cpu = cgroup.table("cpu.stat");
    let cpu = |name: &str| cpu.get(name).copied().unwrap_or(0);
    let io = fs::read_to_string(cgroup.path().join("io.stat")).unwrap_or_default();
    ContainerStatisticsResponse {
        cpu_usage_us: cpu("usage_usec"),
        cpu_user_us: cpu("user_usec"),
        cpu_system_us: cpu("system_usec"),
        cpu_periods: cpu("nr_periods"),
        cpu_throttled_periods: cpu("nr_throttled"),
        cpu_throttled_us: cpu("throttled_usec"),
        memory_usage: cgroup.number("memory.current").unwrap_or(0),
        memory_peak: cgroup.number("memory.peak").unwrap_or(0),
        memory_limit: cgroup.number("memory.max"),
        memory_limit_hits: cgroup.table("memory.events").get("max").copied().unwrap_or(0),
        memory_details: cgroup.table("memory.stat"),
        pids: cgroup.number("pids.current").unwrap_or(0),
        pids_limit: cgroup.number("pids.max"),
        block_devices: io.lines().filter_map(block_device).collect(),
        oom_kills: cgroup.oom_kills(),
        ..Default::default()
    }
}

/// Reads a line of `io.stat`, such as `254:0 rbytes=4096 wbytes=0 rios=1 wios=0 dbytes=0 dios=0`.
fn block_device(line: &str) -> Option<BlockDeviceStatistics> {
    let (device, numbers) = line.split_once(' ')?;
    let (major, minor) = device.split_once(':')?;
    let numbers: HashMap<_, u64> = numbers
        .split_ascii_whitespace()
        .filter_map(|pair| pair.split_once('='))
        .filter_map(|(name, number)| Some((name, number.parse().ok()?)))
        .collect();
    let number = |name| numbers.get(name).copied().unwrap_or(0);
    Some(BlockDeviceStatistics {
        major: major.parse().ok()?,
        minor: minor.parse().ok()?,
        read_bytes: number("rbytes"),
        written_bytes: number("wbytes"),
        reads: number("rios"),
        writes: number("wios"),
        ..Default::default()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_is_a_device() {
        let device = block_device("254:1 rbytes=4096 wbytes=7 rios=1 wios=2 dbytes=0 dios=0").unwrap();
        assert_eq!((device.major, device.minor, device.read_bytes, device.writes), (254, 1, 4096, 2));
        assert_eq!(block_device("254:1"), None);
        assert_eq!(block_device("a:1 rbytes=1"), None);
    }
}
