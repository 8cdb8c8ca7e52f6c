//! How large a VM is: it follows the container's limits.
//!
//! Processors: as many as the CPU quota or the cpuset needs, rounded up; without either, as many as the host has.
//! Memory: the container's limit and what the guest's kernel needs beside it, rounded up so that containers of about
//! the same size have machines of the same, and one template; without a limit 2 GiB, or the host's memory where that is
//! less. The host gives a page only when the guest first touches it.

use std::fs;

use oci_spec::runtime::Spec;
use serde::{Deserialize, Serialize};

const MIB: u64 = 1 << 20;
/// What the guest needs besides its containers.
const GUEST_OVERHEAD: u64 = 128 * MIB;
/// Machines with a limit differ by at least this much.
const SMALLEST_STEP: u64 = 128 * MIB;
/// Without a limit.
const DEFAULT_MEMORY: u64 = 2048 * MIB;
/// Of a CPU quota, in microseconds.
const DEFAULT_PERIOD: u64 = 100_000;
/// How the annotations begin by which containerd's CRI tells what the containers of a pod are going to ask for.
const POD_RESOURCES: &str = "io.kubernetes.cri.sandbox-";
/// More make a start slower, and few containers faster.
const MAX_VCPUS: u32 = 8;

/// A VM's size.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Size {
    /// Virtual processors.
    pub vcpus: u32,
    /// Bytes of memory, a multiple of 1 MiB.
    pub memory: u64,
}

impl Size {
    /// The size for a container.
    pub fn of(spec: &Spec) -> Self {
        Self::on(spec, host_processors(), host_memory())
    }

    /// The size for the pod of this sandbox container: what Kubernetes says of all its containers together, in containerd's
    /// annotations. Where it says nothing, as much as a container without limits has.
    pub fn of_pod(sandbox: &Spec) -> Self {
        let annotation = |name: &str| sandbox.annotations().as_ref()?.get(&format!("{POD_RESOURCES}{name}"));
        let number = |name| annotation(name)?.parse::<u64>().ok().filter(|&number| number > 0);
        let vcpus = number("cpu-quota").and_then(|quota| {
            let period = number("cpu-period").unwrap_or(DEFAULT_PERIOD);
            u32::try_from(quota.div_ceil(period)).ok()
        });
        Self::for_limits(vcpus, number("memory"))
    }

    /// The size for containers with these limits: processors, and bytes of memory.
    pub fn for_limits(vcpus: Option<u32>, memory: Option<u64>) -> Self {
        let host = host_processors();
        Self { vcpus: vcpus.unwrap_or(host).clamp(1, host.min(MAX_VCPUS)), memory: memory_for(memory, host_memory()) }
    }

    /// As many of its processors, in the form of cpuset(7), as a list of the host's has.
    ///
    /// # Errors
    /// The list, where it is none.
    pub fn cpus_for(self, list: &str) -> Result<String, String> {
        match count_cpus(list).ok_or_else(|| list.to_owned())?.min(self.vcpus) {
            1 => Ok("0".to_owned()),
            count => Ok(format!("0-{}", count - 1)),
        }
    }

    fn on(spec: &Spec, host_processors: u32, host_memory: u64) -> Self {
        let resources = spec.linux().as_ref().and_then(|linux| linux.resources().as_ref());
        let cpu = resources.and_then(|resources| resources.cpu().as_ref());
        let quota = cpu.and_then(|cpu| {
            let quota = u64::try_from(cpu.quota()?).ok().filter(|&quota| quota > 0)?;
            let period = cpu.period().filter(|&period| period > 0).unwrap_or(DEFAULT_PERIOD);
            u32::try_from(quota.div_ceil(period)).ok()
        });
        let set = cpu.and_then(|cpu| count_cpus(cpu.cpus().as_deref()?));
        let vcpus = [quota, set].into_iter().flatten().fold(host_processors, u32::min).clamp(1, MAX_VCPUS);

        let limit = resources
            .and_then(|resources| resources.memory().as_ref())
            .and_then(|memory| u64::try_from(memory.limit()?).ok())
            .filter(|&limit| limit > 0);
        Self { vcpus, memory: memory_for(limit, host_memory) }
    }
}

fn memory_for(limit: Option<u64>, host_memory: u64) -> u64 {
    let Some(limit) = limit else { return DEFAULT_MEMORY.min(host_memory).div_ceil(MIB) * MIB };
    // A limit beyond the host's memory is as good as none, but larger than the default all the same.
    let memory = limit.min(host_memory).saturating_add(GUEST_OVERHEAD);
    let step = (memory.next_power_of_two() / 16).max(SMALLEST_STEP);
    memory.div_ceil(step) * step
}

/// The number of processors in a list such as `0-2,7`.
fn count_cpus(list: &str) -> Option<u32> {
    let mut count = 0u32;
    for range in list.trim().split(',').filter(|range| !range.is_empty()) {
        let (first, last) = range.split_once('-').unwrap_or((range, range));
        let (first, last): (u32, u32) = (first.trim().parse().ok()?, last.trim().parse().ok()?);
        count = count.checked_add(last.checked_sub(first)?.checked_add(1)?)?;
    }
    (count > 0).then_some(count)
}

fn host_processors() -> u32 {
    std::thread::available_parallelism().map_or(1, |count| count.get() as u32)
}

fn host_memory() -> u64 {
    let info = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let kib = info
        .lines()
        .find_map(|line| line.strip_prefix("MemTotal:")?.trim().strip_suffix("kB")?.trim().parse::<u64>().ok());
    kib.map_or(DEFAULT_MEMORY, |kib| kib * 1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn size(resources: &str) -> Size {
        let text = format!(r#"{{"ociVersion":"1.0.2","linux":{{"resources":{resources}}}}}"#);
        Size::on(&serde_json::from_str(&text).unwrap(), 4, 16 << 30)
    }

    #[test]
    fn without_limits_the_defaults_hold() {
        assert_eq!(size("{}"), Size { vcpus: 4, memory: 2 << 30 });
    }

    #[test]
    fn limits_are_followed() {
        for (resources, vcpus) in [
            (r#"{"cpu":{"quota":150000,"period":100000}}"#, 2),
            (r#"{"cpu":{"quota":50000}}"#, 1),
            (r#"{"cpu":{"quota":-1}}"#, 4),
            (r#"{"cpu":{"cpus":"0-1,3"}}"#, 3),
            (r#"{"cpu":{"cpus":"0-1,3","quota":100000,"period":100000}}"#, 1),
            (r#"{"cpu":{"quota":9900000,"period":100000}}"#, 4),
            (r#"{"cpu":{"cpus":"3-1"}}"#, 4),
        ] {
            assert_eq!(size(resources).vcpus, vcpus, "{resources}");
        }
        assert_eq!(size(r#"{"memory":{"limit":67108864}}"#).memory, 256 * MIB);
        assert_eq!(size(r#"{"memory":{"limit":134217728}}"#).memory, 256 * MIB);
        assert_eq!(size(r#"{"memory":{"limit":134217729}}"#).memory, 384 * MIB);
        assert_eq!(size(r#"{"memory":{"limit":3221225472}}"#).memory, 3328 * MIB);
        assert_eq!(size(r#"{"memory":{"limit":-1}}"#).memory, 2 << 30);
        assert_eq!(size(r#"{"memory":{"limit":9000000000000000000}}"#).memory, 18 << 30);
    }

    #[test]
    fn a_pod_is_as_large_as_its_containers_together() {
        let pod = |annotations: &str| {
            let text = format!(r#"{{"ociVersion":"1.0.2","annotations":{{{annotations}}}}}"#);
            Size::of_pod(&serde_json::from_str(&text).unwrap())
        };
        let limits = r#""io.kubernetes.cri.sandbox-memory":"134217728","io.kubernetes.cri.sandbox-cpu-quota":"50000""#;
        assert_eq!(pod(limits), Size { vcpus: 1, memory: 256 << 20 });
        let none = r#""io.kubernetes.cri.sandbox-memory":"0","io.kubernetes.cri.sandbox-cpu-quota":"x""#;
        assert_eq!(pod(none), pod(""));
    }
}
