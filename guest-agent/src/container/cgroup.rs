//! The cgroup of one container.

use std::collections::HashMap;
use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};

use libcgroups::common::{CgroupManager as _, ControllerOpt};
use libcgroups::v2::manager::Manager;
use libcontainer::oci_spec::runtime::LinuxResources;
use rustix::process::{Pid, Signal};
use tokio::io::Interest;

use crate::boot::{CGROUP_ROOT, CONTAINERS_CGROUP};
use crate::readiness;

/// A container's cgroup; it exists from the container's creation to its deletion.
#[derive(Clone, Debug)]
pub(crate) struct Cgroup {
    /// Below the root of the hierarchy.
    relative: PathBuf,
    path: PathBuf,
}

impl Cgroup {
    /// The cgroup of the container with this (valid) identifier.
    pub(crate) fn of(container_id: &str) -> Self {
        let relative = Path::new("/").join(CONTAINERS_CGROUP).join(container_id);
        let path = Path::new(CGROUP_ROOT).join(CONTAINERS_CGROUP).join(container_id);
        Self { relative, path }
    }

    /// The path as the specification has it.
    pub(crate) fn relative(&self) -> &Path {
        &self.relative
    }

    /// Where it is mounted.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Makes it, with its limits.
    pub(crate) fn create(&self, resources: Option<&LinuxResources>) -> Result<(), String> {
        fs::create_dir(&self.path).map_err(|error| format!("cannot make the container's cgroup: {error}"))?;
        let limited = resources.map_or(Ok(()), |resources| self.update(resources));
        limited.map_err(|error| format!("cannot set linux.resources: {error}"))
    }

    /// Changes the limits.
    pub(crate) fn update(&self, resources: &LinuxResources) -> Result<(), String> {
        let options = ControllerOpt { resources, freezer_state: None, oom_score_adj: None, disable_oom_killer: false };
        let manager = Manager::new(CGROUP_ROOT.into(), self.relative.clone()).map_err(|error| error.to_string())?;
        manager.apply(&options).map_err(|error| error.to_string())
    }

    /// Has the kernel take back so much memory that no more than `limit` bytes are used: it kills where a limit is set
    /// below the use. What cannot be done is said in runc's words.
    pub(crate) fn make_room(&self, limit: i64) -> Result<(), String> {
        let Ok(limit) = u64::try_from(limit) else { return Ok(()) };
        let usage = || self.number("memory.current").unwrap_or(0);
        let excess = usage().saturating_sub(limit);
        if excess > 0 {
            // It fails where it takes back less, which the next line tells.
            let _ = fs::write(self.path.join("memory.reclaim"), excess.to_string());
        }
        match usage() {
            usage if usage <= limit => Ok(()),
            usage => {
                let peak = self.number("memory.peak").unwrap_or(0);
                Err(format!("unable to set memory limit to {limit} (current usage: {usage}, peak usage: {peak})"))
            }
        }
    }

    /// Freezes or thaws every process.
    pub(crate) async fn freeze(&self, frozen: bool) -> io::Result<()> {
        fs::write(self.path.join("cgroup.freeze"), if frozen { "1" } else { "0" })?;
        self.wait_for(if frozen { "frozen 1" } else { "frozen 0" }).await
    }

    /// Sends a signal to every process.
    pub(crate) fn signal_all(&self, signal: i32) -> io::Result<()> {
        if signal == Signal::KILL.as_raw() {
            return fs::write(self.path.join("cgroup.kill"), "1");
        }
        for process in self.processes()? {
            // SAFETY: it takes numbers only. The process may have ended since; its number is not given away so soon.
            unsafe { libc::kill(process.as_raw_nonzero().get(), signal) };
        }
        Ok(())
    }

    /// The processes, those in cgroups that the container itself has made included.
    pub(crate) fn processes(&self) -> io::Result<Vec<Pid>> {
        let mut processes = Vec::new();
        for cgroup in self.tree()? {
            let numbers = fs::read_to_string(cgroup.join("cgroup.procs")).unwrap_or_default();
            processes.extend(numbers.lines().filter_map(|line| line.parse().ok()).filter_map(Pid::from_raw));
        }
        Ok(processes)
    }

    /// How many processes the kernel has killed for want of memory.
    pub(crate) fn oom_kills(&self) -> u64 {
        let events = self.table("memory.events");
        events.get("oom_kill").copied().unwrap_or(0)
    }

    /// Waits until there are more of them than `known`.
    pub(crate) async fn await_oom_kill(&self, known: u64) -> io::Result<()> {
        self.watch("memory.events", || self.oom_kills() > known).await
    }

    /// Ends what still runs, and removes the cgroup.
    pub(crate) async fn remove(&self) -> io::Result<()> {
        if !self.path.exists() {
            return Ok(());
        }
        fs::write(self.path.join("cgroup.kill"), "1")?;
        self.wait_for("populated 0").await?;
        for cgroup in self.tree()?.iter().rev() {
            fs::remove_dir(cgroup)?;
        }
        Ok(())
    }

    /// The cgroup and all below it, parents first.
    fn tree(&self) -> io::Result<Vec<PathBuf>> {
        let mut tree = vec![self.path.clone()];
        let mut next = 0;
        while let Some(cgroup) = tree.get(next) {
            let children: Vec<_> = fs::read_dir(cgroup)?
                .flatten()
                .filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()))
                .map(|entry| entry.path())
                .collect();
            tree.extend(children);
            next += 1;
        }
        Ok(tree)
    }

    /// Waits until `cgroup.events` has the line.
    async fn wait_for(&self, line: &str) -> io::Result<()> {
        let has_line = || {
            let events = fs::read_to_string(self.path.join("cgroup.events")).unwrap_or_default();
            events.lines().any(|present| present == line)
        };
        self.watch("cgroup.events", has_line).await
    }

    /// Waits until something is so that the kernel tells of by a file of events.
    async fn watch(&self, file: &str, is_so: impl Fn() -> bool) -> io::Result<()> {
        let file = readiness::watch(File::open(self.path.join(file))?.into(), Interest::PRIORITY)?;
        loop {
            // The kernel tells of what has come since this descriptor was last read.
            rustix::io::pread(file.get_ref(), &mut [0; 1], 0)?;
            if is_so() {
                return Ok(());
            }
            file.ready(Interest::PRIORITY).await?.clear_ready();
        }
    }

    /// What one of the cgroup's files of one number says; nothing for "max".
    pub(crate) fn number(&self, file: &str) -> Option<u64> {
        fs::read_to_string(self.path.join(file)).ok()?.trim().parse().ok()
    }

    /// What one of the cgroup's files of names and numbers says.
    pub(crate) fn table(&self, file: &str) -> HashMap<String, u64> {
        let text = fs::read_to_string(self.path.join(file)).unwrap_or_default();
        let pair = |line: &str| {
            let (name, number) = line.split_once(' ')?;
            Some((name.to_owned(), number.parse().ok()?))
        };
        text.lines().filter_map(pair).collect()
    }
}
