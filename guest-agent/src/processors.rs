//! The guest's processors: which of them run what, and those that come late.

use std::fs::{self, File};
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, RawFd};
use std::path::Path;

use rustix::thread::{CpuSet, sched_setaffinity};

use crate::boot::{BootError, failed};
use crate::child;
use crate::reaper::{Exit, Reaper};

/// Where the kernel tells of its processors.
const PROCESSORS: &str = "/sys/devices/system/cpu";

/// Keeps the agent, and all that it does for a container, on one processor, where the interrupts of its devices are too:
/// waking another costs more than there is to do, above all where the host has no more processors than its guests.
pub(crate) fn stay_on_one() -> Result<(), BootError> {
    let mut one = CpuSet::new();
    one.set(0);
    sched_setaffinity(None, &one).map_err(|errno| failed("stay on one processor")(errno.into()))
}

/// Lets the calling process run on all processors again.
pub(crate) fn use_all() -> rustix::io::Result<()> {
    let mut all = CpuSet::new();
    (0..CpuSet::MAX_CPU).for_each(|processor| all.set(processor));
    sched_setaffinity(None, &all)
}

/// The processors that the kernel has left off, which come while the agent does something else: a kernel with one
/// processor has booted sooner.
#[derive(Default)]
pub(crate) struct Late(Option<Exit>);

impl Late {
    /// Has them come.
    pub(crate) fn bring_up(reaper: &Reaper) -> Result<Self, BootError> {
        let switches = switches().map_err(failed("find the processors"))?;
        let numbers: Vec<RawFd> = switches.iter().map(AsRawFd::as_raw_fd).collect();
        // It has copies of the files.
        let helper = child::beside(numbers, switch_on).map_err(failed("bring up the processors"))?;
        Ok(Self(Some(reaper.watch(helper))))
    }

    /// Waits until they are there.
    pub(crate) async fn arrival(&self) {
        if let Some(exit) = &self.0
            && exit.status().await != 0
        {
            tracing::warn!("not all of the guest's processors have come up");
        }
    }
}

/// What each processor but the first is switched on by.
fn switches() -> io::Result<Vec<File>> {
    let present = fs::read_to_string(Path::new(PROCESSORS).join("present"))?;
    let switch = |number| File::options().write(true).open(format!("{PROCESSORS}/cpu{number}/online"));
    (1..=last(&present)).map(switch).collect()
}

/// The last of a list of processors, like `0-3`.
fn last(list: &str) -> usize {
    list.trim_end().rsplit([',', '-']).next().and_then(|number| number.parse().ok()).unwrap_or_default()
}

fn switch_on(switches: &Vec<RawFd>) -> i32 {
    let mut failures = 0;
    for &switch in switches {
        // SAFETY: it is open in this process, which uses it for nothing else.
        let switch = unsafe { BorrowedFd::borrow_raw(switch) };
        failures |= i32::from(rustix::io::write(switch, b"1").is_err());
    }
    failures
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_processor_is_found() {
        for (list, number) in [("0\n", 0), ("0-1\n", 1), ("0-3,8-63\n", 63), ("", 0)] {
            assert_eq!(last(list), number, "{list:?}");
        }
    }
}
