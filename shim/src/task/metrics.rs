//! What a container uses, in the form that containerd has for cgroups of the host's version: its clients tell by that
//! what they get. The numbers are the guest's.

use std::path::Path;

use containerd_shim_protos::cgroups::metrics as v1;
use containerd_shim_protos::cgroups_v2::metrics as v2;
use protobuf::MessageFull;
use protobuf::well_known_types::any::Any;
use runvm_protocol::agent::ContainerStatisticsResponse as Statistics;
use rustix::fs::statfs;

use crate::errors::{Error, Result};
use crate::wire;

/// The magic number of the file system of cgroups of version 2.
const CGROUP2: i64 = 0x6367_7270;
/// How many block devices of a guest are told of, at most.
const MAX_DEVICES: usize = 256;

/// Which form.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Form {
    /// `io.containerd.cgroups.v1.Metrics`.
    V1,
    /// `io.containerd.cgroups.v2.Metrics`.
    V2,
}

impl Form {
    /// The host's: the first also where it has both versions, as containerd sees it.
    pub fn of_host() -> Self {
        let mounted = statfs(Path::new("/sys/fs/cgroup"));
        match mounted.is_ok_and(|mounted| mounted.f_type == CGROUP2) {
            true => Self::V2,
            false => Self::V1,
        }
    }

    /// The statistics in this form.
    ///
    /// # Errors
    /// Those of writing the message.
    pub fn of(self, statistics: &Statistics) -> Result<Any> {
        match self {
            Self::V1 => wrapped(&as_v1(statistics)),
            Self::V2 => wrapped(&as_v2(statistics)),
        }
    }
}

fn wrapped<M: MessageFull>(message: &M) -> Result<Any> {
    wire::any(message).map_err(|error| Error::Request { field: "stats", problem: error.to_string() })
}

/// The use of several containers together. Limits do not add up, and are left out.
pub fn sum(all: impl IntoIterator<Item = Statistics>) -> Statistics {
    all.into_iter().fold(Statistics::default(), |mut sum, one| {
        sum.cpu_usage_us = sum.cpu_usage_us.saturating_add(one.cpu_usage_us);
        sum.cpu_user_us = sum.cpu_user_us.saturating_add(one.cpu_user_us);
        sum.cpu_system_us = sum.cpu_system_us.saturating_add(one.cpu_system_us);
        sum.memory_usage = sum.memory_usage.saturating_add(one.memory_usage);
        sum.memory_peak = sum.memory_peak.saturating_add(one.memory_peak);
        sum.pids = sum.pids.saturating_add(one.pids);
        sum.oom_kills = sum.oom_kills.saturating_add(one.oom_kills);
        for (name, value) in one.memory_details {
            let total = sum.memory_details.entry(name).or_default();
            *total = total.saturating_add(value);
        }
        sum
    })
}

fn as_v1(statistics: &Statistics) -> v1::Metrics {
    let nanoseconds = |us: u64| us.saturating_mul(1000);
    let detail = |name: &str| statistics.memory_details.get(name).copied().unwrap_or(0);
    let limit = statistics.memory_limit.unwrap_or(u64::MAX);
    let (cache, rss) = (detail("file"), detail("anon"));
    v1::Metrics {
        pids: Some(v1::PidsStat {
            current: statistics.pids,
            limit: statistics.pids_limit.unwrap_or(0),
            ..Default::default()
        })
        .into(),
        cpu: Some(v1::CPUStat {
            usage: Some(v1::CPUUsage {
                total: nanoseconds(statistics.cpu_usage_us),
                kernel: nanoseconds(statistics.cpu_system_us),
                user: nanoseconds(statistics.cpu_user_us),
                ..Default::default()
            })
            .into(),
            throttling: Some(v1::Throttle {
                periods: statistics.cpu_periods,
                throttled_periods: statistics.cpu_throttled_periods,
                throttled_time: nanoseconds(statistics.cpu_throttled_us),
                ..Default::default()
            })
            .into(),
            ..Default::default()
        })
        .into(),
        memory: Some(v1::MemoryStat {
            cache,
            rss,
            rss_huge: detail("anon_thp"),
            mapped_file: detail("file_mapped"),
            dirty: detail("file_dirty"),
            writeback: detail("file_writeback"),
            pg_fault: detail("pgfault"),
            pg_maj_fault: detail("pgmajfault"),
            inactive_anon: detail("inactive_anon"),
            active_anon: detail("active_anon"),
            inactive_file: detail("inactive_file"),
            active_file: detail("active_file"),
            unevictable: detail("unevictable"),
            hierarchical_memory_limit: limit,
            total_cache: cache,
            total_rss: rss,
            total_rss_huge: detail("anon_thp"),
            total_mapped_file: detail("file_mapped"),
            total_dirty: detail("file_dirty"),
            total_writeback: detail("file_writeback"),
            total_pg_fault: detail("pgfault"),
            total_pg_maj_fault: detail("pgmajfault"),
            total_inactive_anon: detail("inactive_anon"),
            total_active_anon: detail("active_anon"),
            total_inactive_file: detail("inactive_file"),
            total_active_file: detail("active_file"),
            total_unevictable: detail("unevictable"),
            usage: Some(v1::MemoryEntry {
                limit,
                usage: statistics.memory_usage,
                max: statistics.memory_peak,
                failcnt: statistics.memory_limit_hits,
                ..Default::default()
            })
            .into(),
            swap: Some(v1::MemoryEntry::default()).into(),
            kernel: Some(v1::MemoryEntry { usage: detail("kernel"), limit, ..Default::default() }).into(),
            kernel_tcp: Some(v1::MemoryEntry { usage: detail("sock"), limit, ..Default::default() }).into(),
            ..Default::default()
        })
        .into(),
        memory_oom_control: Some(v1::MemoryOomControl { oom_kill: statistics.oom_kills, ..Default::default() }).into(),
        blkio: Some(v1::BlkIOStat {
            io_service_bytes_recursive: block_io(statistics, |d| d.read_bytes, |d| d.written_bytes),
            io_serviced_recursive: block_io(statistics, |d| d.reads, |d| d.writes),
            ..Default::default()
        })
        .into(),
        ..Default::default()
    }
}

type Device = runvm_protocol::agent::BlockDeviceStatistics;

fn block_io(statistics: &Statistics, read: fn(&Device) -> u64, written: fn(&Device) -> u64) -> Vec<v1::BlkIOEntry> {
    let devices = statistics.block_devices.iter().take(MAX_DEVICES);
    let entries = devices.flat_map(|device| {
        [("Read", read(device)), ("Write", written(device))].map(|(operation, value)| v1::BlkIOEntry {
            op: operation.to_owned(),
            major: device.major,
            minor: device.minor,
            value,
            ..Default::default()
        })
    });
    entries.collect()
}

fn as_v2(statistics: &Statistics) -> v2::Metrics {
    let detail = |name: &str| statistics.memory_details.get(name).copied().unwrap_or(0);
    let devices = statistics.block_devices.iter().take(MAX_DEVICES);
    let usage = devices.map(|device| v2::IOEntry {
        major: device.major,
        minor: device.minor,
        rbytes: device.read_bytes,
        wbytes: device.written_bytes,
        rios: device.reads,
        wios: device.writes,
        ..Default::default()
    });
    v2::Metrics {
        pids: Some(v2::PidsStat {
            current: statistics.pids,
            limit: statistics.pids_limit.unwrap_or(0),
            ..Default::default()
        })
        .into(),
        cpu: Some(v2::CPUStat {
            usage_usec: statistics.cpu_usage_us,
            user_usec: statistics.cpu_user_us,
            system_usec: statistics.cpu_system_us,
            nr_periods: statistics.cpu_periods,
            nr_throttled: statistics.cpu_throttled_periods,
            throttled_usec: statistics.cpu_throttled_us,
            ..Default::default()
        })
        .into(),
        memory: Some(v2::MemoryStat {
            anon: detail("anon"),
            file: detail("file"),
            kernel_stack: detail("kernel_stack"),
            slab: detail("slab"),
            sock: detail("sock"),
            shmem: detail("shmem"),
            file_mapped: detail("file_mapped"),
            file_dirty: detail("file_dirty"),
            file_writeback: detail("file_writeback"),
            anon_thp: detail("anon_thp"),
            inactive_anon: detail("inactive_anon"),
            active_anon: detail("active_anon"),
            inactive_file: detail("inactive_file"),
            active_file: detail("active_file"),
            unevictable: detail("unevictable"),
            slab_reclaimable: detail("slab_reclaimable"),
            slab_unreclaimable: detail("slab_unreclaimable"),
            pgfault: detail("pgfault"),
            pgmajfault: detail("pgmajfault"),
            usage: statistics.memory_usage,
            usage_limit: statistics.memory_limit.unwrap_or(u64::MAX),
            max_usage: statistics.memory_peak,
            ..Default::default()
        })
        .into(),
        memory_events: Some(v2::MemoryEvents {
            max: statistics.memory_limit_hits,
            oom_kill: statistics.oom_kills,
            ..Default::default()
        })
        .into(),
        io: Some(v2::IOStat { usage: usage.collect(), ..Default::default() }).into(),
        ..Default::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use protobuf::Message as _;

    fn statistics() -> Statistics {
        let mut statistics = Statistics {
            cpu_usage_us: 5,
            memory_usage: 7,
            pids: 2,
            pids_limit: Some(9),
            block_devices: vec![Device { major: 1, read_bytes: 3, writes: 4, ..Default::default() }],
            ..Default::default()
        };
        statistics.memory_details.insert("anon".into(), 6);
        statistics
    }

    #[test]
    fn clients_get_the_form_of_their_hosts_cgroups() {
        let any = Form::V1.of(&statistics()).unwrap();
        assert_eq!(any.type_url, "io.containerd.cgroups.v1.Metrics");
        let metrics = v1::Metrics::parse_from_bytes(&any.value).unwrap();
        assert_eq!((metrics.cpu.usage.total, metrics.memory.usage.usage, metrics.memory.rss), (5000, 7, 6));
        assert_eq!((metrics.memory.usage.limit, metrics.pids.limit), (u64::MAX, 9));
        let bytes = &metrics.blkio.io_service_bytes_recursive[0];
        assert_eq!((bytes.op.as_str(), bytes.major, bytes.value), ("Read", 1, 3));

        let any = Form::V2.of(&statistics()).unwrap();
        assert_eq!(any.type_url, "io.containerd.cgroups.v2.Metrics");
        let metrics = v2::Metrics::parse_from_bytes(&any.value).unwrap();
        assert_eq!((metrics.cpu.usage_usec, metrics.memory.usage, metrics.memory.anon), (5, 7, 6));
        assert_eq!(metrics.io.usage[0].wios, 4);
    }

    #[test]
    fn containers_add_up() {
        let sum = sum([statistics(), statistics()]);
        assert_eq!((sum.cpu_usage_us, sum.memory_usage, sum.pids, sum.pids_limit), (10, 14, 4, None));
        assert_eq!(sum.memory_details["anon"], 12);
    }
}
