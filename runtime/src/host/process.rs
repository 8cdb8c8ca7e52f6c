//! Processes of the host: telling one from a later one with its PID, ending it, and starting one that ends with its
//! owner.

use std::fmt;
use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::process::CommandExt as _;
use std::process::Command;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::retry_on_intr;
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use rustix::thread::{CpuSet, sched_getaffinity, sched_getcpu, sched_setaffinity};
use serde::{Deserialize, Serialize};

/// The processors that there are.
const ONLINE: &str = "/sys/devices/system/cpu/online";
/// How long a parent may take to learn of its child's end.
const NOTICE: Timespec = Timespec { tv_sec: 0, tv_nsec: 200_000_000 };

/// A process, told apart from any later one with the same PID by when it began.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProcessIdentity {
    /// Its PID.
    pub pid: u32,
    /// Clock ticks from the machine's boot to its start: field 22 of proc_pid_stat(5).
    started: u64,
}

/// As in names of files.
impl fmt::Display for ProcessIdentity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}-{}", self.pid, self.started)
    }
}

impl ProcessIdentity {
    fn number(&self) -> Option<Pid> {
        i32::try_from(self.pid).ok().and_then(Pid::from_raw)
    }

    /// What was written as a name; none for what is no such name.
    pub fn from_name(name: &str) -> Option<Self> {
        let (pid, started) = name.split_once('-')?;
        Some(Self { pid: pid.parse().ok()?, started: started.parse().ok()? })
    }

    /// The identity of the process with a PID; also a zombie, whose threads may still be ending, has one.
    pub fn of(pid: u32) -> Option<Self> {
        stat(pid).map(|(started, _)| Self { pid, started })
    }

    /// Whether it lives; a zombie does not.
    pub fn alive(&self) -> bool {
        stat(self.pid).is_some_and(|(started, state)| started == self.started && !matches!(state, 'Z' | 'X'))
    }

    /// Sends a signal; one that is gone is no error.
    ///
    /// # Errors
    /// That of pidfd_send_signal(2).
    pub fn signal(&self, signal: Signal) -> io::Result<()> {
        let Some(pidfd) = self.pidfd()? else { return Ok(()) };
        match pidfd_send_signal(pidfd, signal) {
            Err(rustix::io::Errno::SRCH) => Ok(()),
            sent => Ok(sent?),
        }
    }

    /// Waits until it and all its threads have ended, for at most `limit`; whether they have.
    ///
    /// # Errors
    /// Those of pidfd_open(2) and poll(2).
    pub fn await_end(&self, limit: Duration) -> io::Result<bool> {
        let Some(pidfd) = self.pidfd()? else { return Ok(true) };
        let deadline = Instant::now() + limit;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let timeout = Timespec::try_from(left).ok();
            match poll(&mut [PollFd::new(&pidfd, PollFlags::IN)], timeout.as_ref()) {
                Err(rustix::io::Errno::INTR) => {}
                ready => return Ok(ready? > 0),
            }
        }
    }

    /// Waits as [`Self::await_end`] does, and then until its parent has taken note of its end, where the kernel tells of
    /// that (Linux 6.9), but not for long.
    ///
    /// # Errors
    /// Those of pidfd_open(2) and poll(2).
    pub fn await_departure(&self, limit: Duration) -> io::Result<()> {
        let Some(pidfd) = self.pidfd()? else { return Ok(()) };
        if self.await_end(limit)? {
            // A descriptor whose process is gone hangs up, which nobody has to ask for.
            retry_on_intr(|| poll(&mut [PollFd::new(&pidfd, PollFlags::empty())], Some(&NOTICE)))?;
        }
        Ok(())
    }

    /// A descriptor of the process.
    ///
    /// # Errors
    /// Those of pidfd_open(2); [`io::ErrorKind::NotFound`] when it is gone.
    pub fn open(&self) -> io::Result<OwnedFd> {
        self.pidfd()?.ok_or_else(|| io::ErrorKind::NotFound.into())
    }

    /// A descriptor of the process; none when it is gone.
    fn pidfd(&self) -> io::Result<Option<OwnedFd>> {
        let Some(pid) = self.number() else { return Ok(None) };
        match pidfd_open(pid, PidfdFlags::empty()) {
            // Linux before 6.15 calls a PID invalid that is gone, and still is a session's or a process group's.
            Err(rustix::io::Errno::SRCH | rustix::io::Errno::INVAL) => Ok(None),
            // Between reading the record and opening, the PID may have gone to another process.
            pidfd => Ok(Some(pidfd?).filter(|_| Self::of(self.pid) == Some(*self))),
        }
    }
}

/// When a process began, and its state.
fn stat(pid: u32) -> Option<(u64, char)> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The second field, the name in brackets, may hold anything.
    let mut fields = stat.rsplit_once(')')?.1.split_ascii_whitespace();
    let state = fields.next()?.chars().next()?;
    let started = fields.nth(18)?.parse().ok()?;
    Some((started, state))
}

/// Makes the kernel kill the command's process when the thread that starts it ends, so that it cannot outlive its
/// owner.
pub fn end_with_owner(command: &mut Command) -> &mut Command {
    let owner = rustix::process::getpid();
    let arm = move || {
        rustix::process::set_parent_process_death_signal(Some(Signal::KILL))?;
        // The owner may have ended before the line above.
        match rustix::process::getppid() {
            Some(parent) if parent == owner => Ok(()),
            _ => Err(io::Error::from_raw_os_error(rustix::io::Errno::OWNERDEAD.raw_os_error())),
        }
    };
    // SAFETY: between fork and exec `arm` makes system calls only, it allocates nothing and takes no lock.
    unsafe { command.pre_exec(arm) }
}

/// Has a process that was just started go on on another processor than the caller's, where both may run on any. Linux starts
/// it on the caller's where it thinks of none as idle, as on a host that is a VM itself and halts, and leaves it there until
/// the caller sleeps.
pub fn send_elsewhere(process: ProcessIdentity) {
    let Some(process) = process.number() else { return };
    let Ok(own) = sched_getaffinity(None) else { return };
    // Who is to run on some only is not to lose that; and whose set comes from a cgroup is to follow its changes.
    if !fs::read_to_string(ONLINE).is_ok_and(|online| is_all(&own, &online)) {
        return;
    }
    let (mut any, mut others) = (CpuSet::new(), own);
    (0..CpuSet::MAX_CPU).for_each(|cpu| any.set(cpu));
    others.unset(sched_getcpu());
    // There may be no other, and the process may have ended.
    let _ = sched_setaffinity(Some(process), &others).and_then(|()| sched_setaffinity(Some(process), &any));
}

/// Whether a set has all processors of such a list, if that is a simple one: cpu(5) of sysfs, "0-7".
fn is_all(set: &CpuSet, online: &str) -> bool {
    let last = online.trim().strip_prefix("0-").and_then(|last| last.parse::<u32>().ok());
    last.is_some_and(|last| u64::from(set.count()) == u64::from(last) + 1)
}

/// This program, for a process of its own that does another part of the work.
pub fn own_program() -> Command {
    let mut command = Command::new("/proc/self/exe");
    command.arg0("runvm");
    command
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_is_told_from_its_successor() {
        let own = ProcessIdentity::of(std::process::id()).unwrap();
        assert!(own.alive());
        assert!(!ProcessIdentity { started: own.started + 1, ..own }.alive());
    }

    #[test]
    fn a_process_that_is_sent_elsewhere_may_run_where_it_might() {
        let mut child = Command::new("sleep").arg("60").spawn().unwrap();
        let pid = Pid::from_child(&child);
        send_elsewhere(ProcessIdentity::of(child.id()).unwrap());
        assert_eq!(sched_getaffinity(Some(pid)).unwrap(), sched_getaffinity(None).unwrap());
        child.kill().unwrap();
        child.wait().unwrap();
    }

    #[test]
    fn only_who_may_run_anywhere_is_sent() {
        let set = |cpus: &[usize]| {
            let mut set = CpuSet::new();
            cpus.iter().for_each(|&cpu| set.set(cpu));
            set
        };
        assert!(is_all(&set(&[0, 1]), "0-1\n"));
        for (cpus, online) in [(&[0][..], "0-1"), (&[0], "0"), (&[0, 1], "0-1,3"), (&[0, 1], ""), (&[0, 1], "0-")] {
            assert!(!is_all(&set(cpus), online), "{cpus:?} of {online}");
        }
    }

    #[test]
    fn the_end_of_a_process_is_awaited() {
        let mut child = Command::new("sleep").arg("60").spawn().unwrap();
        let identity = ProcessIdentity::of(child.id()).unwrap();
        assert!(!identity.await_end(Duration::from_millis(1)).unwrap());
        identity.signal(Signal::KILL).unwrap();
        assert!(identity.await_end(Duration::from_secs(10)).unwrap());
        assert_eq!(ProcessIdentity::from_name(&identity.to_string()), Some(identity));
        let parent = std::thread::spawn(move || child.wait().unwrap());
        identity.await_departure(Duration::from_secs(10)).unwrap();
        parent.join().unwrap();
        identity.await_departure(Duration::from_secs(10)).unwrap();
        identity.signal(Signal::KILL).unwrap();
    }

    #[test]
    fn a_helper_ends_with_its_owner() {
        let mut grandchild = Command::new("sleep");
        grandchild.arg("60");
        let (sender, receiver) = std::sync::mpsc::channel();
        let owner = std::thread::spawn(move || {
            let child = end_with_owner(&mut grandchild).spawn().unwrap();
            sender.send(child).unwrap();
        });
        let mut child = receiver.recv().unwrap();
        owner.join().unwrap();
        assert!(!child.wait().unwrap().success());
    }
}
