//! `update`: runc's words for limits.

use std::io::{self, Read as _};
use std::path::PathBuf;

use clap::Args;
use oci_spec::runtime::{
    LinuxBlockIo, LinuxCpu, LinuxCpuBuilder, LinuxMemory, LinuxMemoryBuilder, LinuxPids, LinuxResources,
};

use crate::error::{Error, Result};

/// The largest file of limits that is read, in bytes.
const MAX_RESOURCES: u64 = 4 << 20;

/// `update`'s. What is not given, or given as 0, stays as it is.
#[derive(Debug, Args)]
#[command(allow_negative_numbers = true)]
pub struct UpdateArgs {
    /// File with `linux.resources` as JSON, `-` for stdin; then the other options count for nothing.
    #[arg(short, long, value_name = "FILE")]
    resources: Option<PathBuf>,
    /// Weight of the container's input and output, 10 to 1000.
    #[arg(long, value_name = "WEIGHT", default_value_t = 0)]
    blkio_weight: u16,
    /// Microseconds after which the quota is given anew.
    #[arg(long, value_name = "US", default_value_t = 0)]
    cpu_period: u64,
    /// Microseconds of processor time in a period; -1 for no quota.
    #[arg(long, value_name = "US", default_value_t = 0)]
    cpu_quota: i64,
    /// Weight against other containers.
    #[arg(long, value_name = "SHARES", default_value_t = 0)]
    cpu_share: u64,
    /// Refused: a guest's cgroups have no real-time limits.
    #[arg(long, value_name = "US", default_value_t = 0)]
    cpu_rt_period: u64,
    /// Refused: a guest's cgroups have no real-time limits.
    #[arg(long, value_name = "US", default_value_t = 0)]
    cpu_rt_runtime: i64,
    /// The host's processors that are used, such as 0-2,7; the guest uses as many of its own.
    #[arg(long, value_name = "LIST", default_value = "", hide_default_value = true)]
    cpuset_cpus: String,
    /// The host's memory nodes that are used.
    #[arg(long, value_name = "LIST", default_value = "", hide_default_value = true)]
    cpuset_mems: String,
    /// Bytes, or a number with k, m, g or t; no more than the VM has; -1 for no limit.
    #[arg(long, value_name = "SIZE", default_value = "0", hide_default_value = true, value_parser = size)]
    memory: i64,
    /// What the container keeps when memory is short.
    #[arg(long, value_name = "SIZE", default_value = "0", hide_default_value = true, value_parser = size)]
    memory_reservation: i64,
    /// Accepted for runc's sake: a guest has no swap.
    #[arg(long, value_name = "SIZE", default_value = "0", hide_default_value = true, value_parser = size)]
    memory_swap: i64,
    /// Accepted for runc's sake, which ignores it too.
    #[arg(long, hide = true)]
    kernel_memory: Option<String>,
    /// Accepted for runc's sake, which ignores it too.
    #[arg(long, hide = true)]
    kernel_memory_tcp: Option<String>,
    /// Number of processes and threads; -1 for no limit.
    #[arg(long, value_name = "N", default_value_t = 0)]
    pids_limit: i64,
    /// Refused: what it divides is the host's.
    #[arg(long, value_name = "SCHEMA", default_value = "", hide_default_value = true)]
    l3_cache_schema: String,
    /// Refused: what it divides is the host's.
    #[arg(long, value_name = "SCHEMA", default_value = "", hide_default_value = true)]
    mem_bw_schema: String,
    /// Container ID.
    pub id: String,
}

impl UpdateArgs {
    /// The limits that are asked for.
    ///
    /// # Errors
    /// [`Error::Usage`] for what a guest cannot have, and for a file that says something else.
    pub fn into_resources(self) -> Result<LinuxResources> {
        if !self.l3_cache_schema.is_empty() || !self.mem_bw_schema.is_empty() {
            return Err(Error::Usage(
                "--l3-cache-schema and --mem-bw-schema: a VM's share of the host's caches is not managed".to_owned(),
            ));
        }
        match &self.resources {
            Some(file) => read(file),
            None => Ok(self.given()),
        }
    }

    fn given(self) -> LinuxResources {
        let cpu: Option<LinuxCpu> = LinuxCpuBuilder::default()
            .shares(self.cpu_share)
            .quota(self.cpu_quota)
            .period(self.cpu_period)
            .realtime_runtime(self.cpu_rt_runtime)
            .realtime_period(self.cpu_rt_period)
            .cpus(self.cpuset_cpus)
            .mems(self.cpuset_mems)
            .build()
            .ok();
        let memory: Option<LinuxMemory> =
            LinuxMemoryBuilder::default().limit(self.memory).reservation(self.memory_reservation).build().ok();
        let mut block_io = LinuxBlockIo::default();
        block_io.set_weight(Some(self.blkio_weight));
        let mut pids = LinuxPids::default();
        pids.set_limit(self.pids_limit);
        let mut resources = LinuxResources::default();
        resources.set_cpu(cpu).set_memory(memory).set_block_io(Some(block_io)).set_pids(Some(pids));
        resources
    }
}

fn read(file: &PathBuf) -> Result<LinuxResources> {
    let text = if file.as_os_str() == "-" {
        let mut text = String::new();
        io::stdin().take(MAX_RESOURCES).read_to_string(&mut text).map(|_| text)
    } else {
        crate::bundle::read_bounded(file, MAX_RESOURCES)
    };
    let text = text.map_err(Error::file("read --resources", file))?;
    serde_json::from_str(&text)
        .map_err(|error| Error::Usage(format!("--resources {}: not linux.resources: {error}", file.display())))
}

/// A number of bytes as runc takes it: 64m, 1.5GiB, -1.
fn size(text: &str) -> std::result::Result<i64, String> {
    if text == "-1" {
        return Ok(-1);
    }
    let invalid = || format!("invalid size: '{text}'");
    let digits = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    let unit = unit.trim_start().to_ascii_lowercase();
    let unit = unit.strip_suffix("ib").or_else(|| unit.strip_suffix('b')).unwrap_or(&unit);
    let shift = match unit {
        "" => 0,
        "k" => 10,
        "m" => 20,
        "g" => 30,
        "t" => 40,
        "p" => 50,
        _ => return Err(invalid()),
    };
    let number: f64 = number.parse().map_err(|_| invalid())?;
    let bytes = number * (1_u64 << shift) as f64;
    // Larger than any memory, and no whole numbers for a float any more.
    if bytes < i64::MAX as f64 { Ok(bytes as i64) } else { Err(invalid()) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::args::{Cli, Verb};
    use clap::Parser as _;

    fn update(words: &str) -> UpdateArgs {
        match Cli::try_parse_from(format!("runvm update {words} id").split(' ')).unwrap().verb {
            Verb::Update(args) => args,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn options_become_resources() {
        let resources = update("--cpu-quota -1 --memory 1.5g --pids-limit 7").into_resources().unwrap();
        assert_eq!(resources.cpu().as_ref().unwrap().quota(), Some(-1));
        assert_eq!(resources.memory().as_ref().unwrap().limit(), Some(3 << 29));
        assert_eq!(resources.pids().as_ref().unwrap().limit(), 7);
    }

    #[test]
    fn a_file_comes_first() {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), r#"{"memory":{"limit":5}}"#).unwrap();
        let resources = update(&format!("--pids-limit 7 -r {}", file.path().display())).into_resources().unwrap();
        assert_eq!(resources.memory().as_ref().unwrap().limit(), Some(5));
        assert!(resources.pids().is_none());
    }

    #[test]
    fn sizes_have_units() {
        for (text, bytes) in [("0", 0), ("-1", -1), ("64m", 64 << 20), ("2 KiB", 2048), ("1.5K", 1536), ("7b", 7)] {
            assert_eq!(size(text), Ok(bytes), "{text}");
        }
        for text in ["", "m", "-2", "1x", "1..2", "99999999p", "1 2"] {
            assert!(size(text).is_err(), "{text}");
        }
    }
}
