//! What there is on the host, before and after: processes, mounts, links, cgroups, files.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use rustix::io::Errno;
use rustix::process::{Pid, Signal, kill_process};

use crate::Cmd;
use crate::enclosure::{Enclosure, cgroup_hierarchies};

/// How long what is ending may take to be gone.
const PATIENCE: Duration = Duration::from_secs(10);

/// What engines and tools keep under /run between two containers.
const OF_ENGINES: [&str; 6] =
    ["/run/rvm", "/run/docker", "/run/containerd", "/run/xtables.lock", "/run/runc", "/run/mount"];

/// What runvm may keep under /run between two containers: the folder of its records, and
/// the answer of its KVM probe, which holds until the machine boots again.
const OF_RUNVM: [&str; 2] = ["/run/runvm", "/run/runvm.accelerator"];

/// The folder of named network namespaces, which `ip` makes a mount of; a name in it
/// would be one too.
const NETNS: &str = "/run/netns";

/// Everything that a container could leave behind.
#[derive(Debug, Default)]
pub struct Census(BTreeSet<String>);

impl Census {
    /// Looks around.
    pub fn take() -> Result<Self> {
        let mut found = BTreeSet::new();
        found.extend(processes()?);
        found.extend(mounts()?);
        found.extend(links()?);
        found.extend(cgroups()?);
        for root in ["/run", "/dev/shm"] {
            files(Path::new(root), &mut found);
        }
        files(&std::env::temp_dir(), &mut found);
        Ok(Self(found))
    }

    /// What is there now and was not then.
    pub fn new_since(&self, before: &Self) -> Vec<String> {
        self.0.difference(&before.0).cloned().collect()
    }

    /// Fails if there is more now than there was; what is about to end may end.
    pub fn expect_nothing_new(&self) -> Result<()> {
        expect_nothing(|| Ok(Self::take()?.new_since(self)))
    }

    /// Fails if anything carries this name: a container's ID, or how several begin.
    pub fn expect_no_trace_of(name: &str) -> Result<()> {
        expect_nothing(|| Ok(Self::take()?.0.into_iter().filter(|found| found.contains(name)).collect()))
    }
}

fn expect_nothing(look: impl Fn() -> Result<Vec<String>>) -> Result<()> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let left = look()?;
        if left.is_empty() {
            return Ok(());
        }
        if Instant::now() > deadline {
            bail!("left behind:\n{}", left.join("\n"));
        }
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// A process that can be seen from here.
#[derive(Debug, Clone)]
pub struct Process {
    /// Its number.
    pub pid: i32,
    /// Its parent's number.
    pub parent: i32,
    /// The name the kernel has for it.
    pub name: String,
    /// Its command line, words separated by blanks.
    pub line: String,
}

impl Process {
    /// All processes of this PID namespace, zombies too.
    pub fn all() -> Result<Vec<Self>> {
        let mut all = Vec::new();
        for entry in fs::read_dir("/proc")?.flatten() {
            let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse().ok()) else { continue };
            // A process that ends meanwhile is no process any more.
            all.extend(Self::read(pid));
        }
        Ok(all)
    }

    fn read(pid: i32) -> Option<Self> {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        let (start, rest) = stat.rsplit_once(')')?;
        let name = start.split_once('(')?.1.to_owned();
        let parent = rest.split_whitespace().nth(1)?.parse().ok()?;
        let line = fs::read(format!("/proc/{pid}/cmdline")).ok()?;
        let line = String::from_utf8_lossy(&line).replace('\0', " ").trim_end().to_owned();
        Some(Self { pid, parent, name, line })
    }

    /// Its share of the host's memory, in bytes: pages shared by n processes count 1/n.
    pub fn pss(&self) -> Option<u64> {
        let rollup = fs::read_to_string(format!("/proc/{}/smaps_rollup", self.pid)).ok()?;
        let line = rollup.lines().find(|line| line.starts_with("Pss:"))?;
        Some(line.split_whitespace().nth(1)?.parse::<u64>().ok()? * 1024)
    }

    /// How many descriptors it has; none where it has ended.
    pub fn descriptors(&self) -> Option<usize> {
        Some(fs::read_dir(format!("/proc/{}/fd", self.pid)).ok()?.count())
    }

    /// The most of its own and of shared memory that it has had, in bytes.
    pub fn peak(&self) -> Option<u64> {
        let status = fs::read_to_string(format!("/proc/{}/status", self.pid)).ok()?;
        let line = status.lines().find(|line| line.starts_with("VmHWM:"))?;
        Some(line.split_whitespace().nth(1)?.parse::<u64>().ok()? * 1024)
    }

    /// Sends it a signal. It may have ended meanwhile.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        let pid = Pid::from_raw(self.pid).context("a process has a number")?;
        match kill_process(pid, signal) {
            Err(Errno::SRCH) | Ok(()) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }

    /// This process's descendants among `all`, itself included.
    pub fn family<'a>(&self, all: &'a [Self]) -> Vec<&'a Self> {
        let mut family: Vec<&Self> = all.iter().filter(|process| process.pid == self.pid).collect();
        let mut next = 0;
        while let Some(parent) = family.get(next).map(|process| process.pid) {
            family.extend(all.iter().filter(|process| process.parent == parent));
            next += 1;
        }
        family
    }
}

fn processes() -> Result<impl Iterator<Item = String>> {
    let own = rustix::process::getpid().as_raw_nonzero().get();
    let all = Process::all()?.into_iter().filter(move |process| process.pid != 1 && process.pid != own);
    Ok(all.map(|process| format!("process {} ({}) {}", process.pid, process.name, process.line)))
}

/// Mounts of this namespace: bound network namespaces are among them.
fn mounts() -> Result<Vec<String>> {
    /// Docker's handle on the host's own network namespace, which it never lets go.
    const OF_DOCKER: [&str; 2] = ["/run/rvm/docker", "/netns/default"];
    let mounts = fs::read_to_string("/proc/self/mounts")?;
    let expected = |place: &str| place == NETNS || place.starts_with(OF_DOCKER[0]) && place.ends_with(OF_DOCKER[1]);
    let others = mounts.lines().filter(|line| !line.split(' ').nth(1).is_some_and(expected));
    Ok(others.map(|line| format!("mount {line}")).collect())
}

fn links() -> Result<Vec<String>> {
    let output = Cmd::new("ip").args(["-oneline", "link", "show"]).ok()?;
    let name = |line: &str| Some(line.split(": ").nth(1)?.split('@').next()?.to_owned());
    Ok(output.stdout.lines().filter_map(name).map(|name| format!("link {name}")).collect())
}

/// Cgroups below the one that all containers of this run get as their parent, and those
/// elsewhere that carry its name, as the IDs of this run do. Others on the machine are none
/// of our business.
fn cgroups() -> Result<Vec<String>> {
    let parent = Enclosure::around().map(|enclosure| enclosure.cgroup()[1..].to_owned()).unwrap_or_default();
    let mut found = Vec::new();
    for hierarchy in cgroup_hierarchies()? {
        let mut todo = vec![hierarchy.clone()];
        while let Some(group) = todo.pop() {
            todo.extend(folders(&group));
            let Ok(inside) = group.strip_prefix(&hierarchy) else { continue };
            let inside = inside.to_string_lossy();
            if inside.contains(&parent) && inside != parent {
                found.push(format!("cgroup {}", group.display()));
            }
        }
    }
    Ok(found)
}

fn folders(path: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(path).into_iter().flatten().flatten();
    entries.filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir())).map(|entry| entry.path()).collect()
}

/// Whether a path lies in a folder that an engine gave to its runtime for its state.
fn of_a_runtime(path: &Path) -> bool {
    let Some(owner) = path.parent().and_then(Path::parent).and_then(Path::file_name) else { return false };
    let owner = owner.to_string_lossy();
    owner == "runc" || owner.starts_with("runtime-")
}

fn files(folder: &Path, found: &mut BTreeSet<String>) {
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        let path = entry.path();
        let of_engine = OF_ENGINES.iter().any(|known| path.starts_with(known)) && !of_a_runtime(&path);
        let known = OF_RUNVM.iter().chain([&NETNS]).any(|known| path == Path::new(known));
        if !of_engine && !known {
            found.insert(format!("file {}", path.display()));
        }
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            files(&path, found);
        }
    }
}
