//! `linux.timeOffsets`: a container whose clocks tell another time since boot.

use std::fs;

use libcontainer::oci_spec::runtime::Linux;
use rustix::thread::UnshareFlags;

use super::process::failed;

/// Makes a time namespace with the offsets, which the calling process enters when it becomes its program.
pub(super) fn shift(linux: &Linux) -> Result<(), String> {
    let Some(offsets) = linux.time_offsets().as_ref().filter(|offsets| !offsets.is_empty()) else { return Ok(()) };
    // SAFETY: the table of descriptors is not among the flags.
    unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWTIME) }.map_err(failed("make a time namespace"))?;
    let line = |(clock, offset): (&String, &libcontainer::oci_spec::runtime::LinuxTimeOffset)| {
        format!("{clock} {} {}\n", offset.secs().unwrap_or_default(), offset.nanosecs().unwrap_or_default())
    };
    let lines: String = offsets.iter().map(line).collect();
    fs::write("/proc/self/timens_offsets", lines).map_err(failed("set linux.timeOffsets"))
}
