//! How a container's processes share the processors and disks of the guest.

use std::io;

use libcontainer::oci_spec::runtime::{
    IOPriorityClass, LinuxIOPriority, LinuxSchedulerFlag, LinuxSchedulerPolicy, Process, Scheduler,
};

use super::process::failed;

/// ioprio_set(2): one process, and where the class is in the number.
const IOPRIO_WHO_PROCESS: libc::c_int = 1;
const IOPRIO_CLASS_SHIFT: u32 = 13;

/// Sets what the process asks for, for the calling one.
pub(super) fn set(process: &Process) -> Result<(), String> {
    if let Some(priority) = process.io_priority() {
        set_io(priority).map_err(failed("set process.ioPriority"))?;
    }
    if let Some(scheduler) = process.scheduler() {
        set_scheduler(scheduler).map_err(failed("set process.scheduler"))?;
    }
    Ok(())
}

fn set_io(priority: &LinuxIOPriority) -> io::Result<()> {
    let class = match priority.class() {
        IOPriorityClass::IoprioClassRt => 1,
        IOPriorityClass::IoprioClassBe => 2,
        IOPriorityClass::IoprioClassIdle => 3,
    };
    let number = (class << IOPRIO_CLASS_SHIFT) | priority.priority();
    // SAFETY: it takes numbers only.
    done(unsafe { libc::syscall(libc::SYS_ioprio_set, IOPRIO_WHO_PROCESS, 0, number) })
}

/// sched_setattr(2).
fn set_scheduler(scheduler: &Scheduler) -> io::Result<()> {
    let policy = match scheduler.policy() {
        LinuxSchedulerPolicy::SchedOther => libc::SCHED_OTHER,
        LinuxSchedulerPolicy::SchedFifo => libc::SCHED_FIFO,
        LinuxSchedulerPolicy::SchedRr => libc::SCHED_RR,
        LinuxSchedulerPolicy::SchedBatch => libc::SCHED_BATCH,
        // Reserved by Linux, which refuses it.
        LinuxSchedulerPolicy::SchedIso => 4,
        LinuxSchedulerPolicy::SchedIdle => libc::SCHED_IDLE,
        LinuxSchedulerPolicy::SchedDeadline => libc::SCHED_DEADLINE,
    };
    let flag = |flag: &LinuxSchedulerFlag| match flag {
        LinuxSchedulerFlag::SchedResetOnFork => libc::SCHED_FLAG_RESET_ON_FORK,
        LinuxSchedulerFlag::SchedFlagReclaim => libc::SCHED_FLAG_RECLAIM,
        LinuxSchedulerFlag::SchedFlagDLOverrun => libc::SCHED_FLAG_DL_OVERRUN,
        LinuxSchedulerFlag::SchedFlagKeepPolicy => libc::SCHED_FLAG_KEEP_POLICY,
        LinuxSchedulerFlag::SchedFlagKeepParams => libc::SCHED_FLAG_KEEP_PARAMS,
        LinuxSchedulerFlag::SchedFlagUtilClampMin => libc::SCHED_FLAG_UTIL_CLAMP_MIN,
        LinuxSchedulerFlag::SchedFlagUtilClampMax => libc::SCHED_FLAG_UTIL_CLAMP_MAX,
    };
    let attributes = libc::sched_attr {
        size: size_of::<libc::sched_attr>() as u32,
        sched_policy: policy as u32,
        sched_flags: scheduler.flags().iter().flatten().map(flag).fold(0, |all, one| all | one as u64),
        sched_nice: scheduler.nice().unwrap_or_default(),
        sched_priority: u32::try_from(scheduler.priority().unwrap_or_default()).map_err(io::Error::other)?,
        sched_runtime: scheduler.runtime().unwrap_or_default(),
        sched_deadline: scheduler.deadline().unwrap_or_default(),
        sched_period: scheduler.period().unwrap_or_default(),
    };
    // SAFETY: the attributes are there for the call, which only reads them, and say how long they are.
    done(unsafe { libc::syscall(libc::SYS_sched_setattr, 0, &raw const attributes, 0) })
}

fn done(result: libc::c_long) -> io::Result<()> {
    if result == -1 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_thread_can_be_idle() {
        let scheduler: Scheduler = serde_json::from_str(r#"{"policy": "SCHED_IDLE"}"#).unwrap();
        let priority = r#"{"class": "IOPRIO_CLASS_IDLE", "priority": 0}"#;
        let priority: LinuxIOPriority = serde_json::from_str(priority).unwrap();
        std::thread::spawn(move || {
            set_scheduler(&scheduler).unwrap();
            set_io(&priority).unwrap();
            // SAFETY: it takes a number only.
            assert_eq!(unsafe { libc::sched_getscheduler(0) }, libc::SCHED_IDLE);
            // SAFETY: it takes numbers only.
            assert_eq!(unsafe { libc::syscall(libc::SYS_ioprio_get, 1, 0) } >> IOPRIO_CLASS_SHIFT, 3);
        })
        .join()
        .unwrap();
    }
}
