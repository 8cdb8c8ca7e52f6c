//! The cgroup of one container.

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
        resources.map_or(Ok(()), |resources| self.update(resources))
    }

    /// Changes the limits.
    pub(crate) fn update(&self, resources: &LinuxResources) -> Result<(), String> {
        let options = ControllerOpt { resources, freezer_state: None, oom_score_adj: None, disable_oom_killer: false };
        let manager = Manager::new(CGROUP_ROOT.into(), self.relative.clone()).map_err(|error| error.to_string())?;
        manager.apply(&options).map_err(|error| error.to_string())
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

    /// Whether the kernel has killed a process for want of memory.
    pub(crate) fn oom_killed(&self) -> bool {
        let events = fs::read_to_string(self.path.join("memory.events")).unwrap_or_default();
        events.lines().filter_map(|line| line.strip_prefix("oom_kill ")).any(|count| count != "0")
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
        let file = readiness::watch(File::open(self.path.join("cgroup.events"))?.into(), Interest::PRIORITY)?;
        loop {
            let mut buffer = [0; 256];
            let read = rustix::io::pread(file.get_ref(), &mut buffer, 0)?;
            if buffer[..read].split(|&byte| byte == b'\n').any(|present| present == line.as_bytes()) {
                return Ok(());
            }
            file.ready(Interest::PRIORITY).await?.clear_ready();
        }
    }
}
