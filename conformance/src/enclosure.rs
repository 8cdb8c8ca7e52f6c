//! The private world a suite runs in.
//!
//! The suite's program starts itself again inside fresh PID, network and mount
//! namespaces. Daemons, bridges, packet filters, mounts and sockets are therefore the
//! suite's own, never meet a daemon that the machine already has, and end with the
//! suite however it ends: the kernel kills what is in a PID namespace with its init.
//! What a namespace does not hold, cgroups and files, the outer process removes.

use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, Result, bail};
use rustix::mount::{MountFlags, mount};
use rustix::process::{Pid, Signal, kill_process};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::iterator::Signals;

use crate::Cmd;
use crate::command::code;
use crate::runtime::dist;

/// Where the outer process tells the inner one about its folder.
const WORK: &str = "RUNVM_CONFORMANCE_WORK";

/// A process inside the private world.
pub struct Enclosure {
    work: PathBuf,
}

impl Enclosure {
    /// The private world around this process.
    pub fn around() -> Option<Self> {
        std::env::var_os(WORK).map(|work| Self { work: work.into() })
    }

    /// A folder on disk, removed at the end.
    pub fn work(&self) -> &Path {
        &self.work
    }

    /// A folder for sockets, whose paths must be short.
    pub fn sockets(&self) -> &Path {
        Path::new("/run/rvm")
    }

    /// The cgroup, in every hierarchy, under which all containers of this run belong.
    pub fn cgroup(&self) -> String {
        let name = self.work.file_name().unwrap_or_default().to_string_lossy();
        format!("/{name}")
    }
}

/// Runs `suite` inside a private world and ends as it ends.
///
/// `scripts` are run outside before, in order: they install what the suite needs.
pub fn run_inside(scripts: &[&[&str]], suite: impl FnOnce(&Enclosure) -> Result<ExitCode>) -> ExitCode {
    let result = match Enclosure::around() {
        Some(enclosure) => enter(&enclosure).and_then(|()| suite(&enclosure)),
        // Asking for the list of tests needs no root and no engines.
        None if std::env::args().any(|arg| arg == "--list") => {
            suite(&Enclosure { work: PathBuf::from("/nonexistent") })
        }
        None => prepare(scripts).and_then(|()| start()),
    };
    result.unwrap_or_else(|error| {
        eprintln!("conformance: {error:#}");
        ExitCode::FAILURE
    })
}

fn prepare(scripts: &[&[&str]]) -> Result<()> {
    if !rustix::process::geteuid().is_root() {
        bail!("the suites start engines and make namespaces: run them as root");
    }
    for script in scripts {
        let (name, args) = script.split_first().context("a set-up script needs a name")?;
        let status = std::process::Command::new(Path::new(env!("CARGO_MANIFEST_DIR")).join(name))
            .args(args)
            .stdout(std::process::Stdio::null())
            .status()
            .with_context(|| format!("cannot start conformance/{name}"))?;
        if !status.success() {
            bail!("conformance/{name} failed ({status}); its messages are above");
        }
    }
    Ok(())
}

/// The outer process: starts the inner one, waits for it, removes what it left.
fn start() -> Result<ExitCode> {
    let work = fresh_work_folder()?;
    let mut signals = Signals::new([SIGHUP, SIGINT, SIGTERM])?;
    let mut child = std::process::Command::new("unshare")
        .args(["--fork", "--pid", "--kill-child", "--mount-proc", "--net", "--mount", "--propagation", "private"])
        // A PID namespace needs an init that reaps orphans; the engines bring one.
        .args(["--", "docker-init", "-s", "--"])
        .arg(std::env::current_exe()?)
        .args(std::env::args_os().skip(1))
        .env(WORK, &work)
        .env("PATH", engine_path())
        .env("TMPDIR", work.join("tmp"))
        // The machine's own templates are none of a suite's business.
        .env("RUNVM_TEMPLATE_DIR", work.join("templates"))
        .spawn()
        .context("cannot start `unshare` of util-linux")?;
    let pid = Pid::from_child(&child);
    let handle = signals.handle();
    let watcher = std::thread::spawn(move || {
        for _ in signals.forever() {
            // The child is not reaped before this thread is joined, so the PID is its own.
            let _ = kill_process(init_of(pid).unwrap_or(pid), Signal::KILL);
        }
    });
    let status = wait_unreaped(pid);
    handle.close();
    let _ = watcher.join();
    let status = status.and_then(|()| Ok(child.wait()?));
    clean_up(&work)?;
    Ok(ExitCode::from(u8::try_from(code(status?)).unwrap_or(1)))
}

/// The namespace's init, whose end is told only when all others in the namespace are gone.
fn init_of(unshare: Pid) -> Option<Pid> {
    let unshare = unshare.as_raw_nonzero();
    let children = fs::read_to_string(format!("/proc/{unshare}/task/{unshare}/children")).ok()?;
    Pid::from_raw(children.split_whitespace().next()?.parse().ok()?)
}

/// Waits for a child's end and leaves its PID taken.
fn wait_unreaped(pid: Pid) -> Result<()> {
    use rustix::process::{WaitId, WaitIdOptions, waitid};
    loop {
        match waitid(WaitId::Pid(pid), WaitIdOptions::EXITED | WaitIdOptions::NOWAIT) {
            Ok(_) => return Ok(()),
            Err(rustix::io::Errno::INTR) => {}
            Err(e) => return Err(e.into()),
        }
    }
}

/// Engines look for their helpers in the system's folders, and containerd for runvm's shim
/// among runvm's; a newer client or daemon in /usr/local must not get between.
fn engine_path() -> OsString {
    let mut path = OsString::from("/usr/sbin:/usr/bin:/sbin:/bin:");
    path.push(dist().join("bin"));
    path
}

/// The inner process: makes the private world usable.
fn enter(enclosure: &Enclosure) -> Result<()> {
    // State folders and sockets of engines and runtimes all live under /run.
    for (place, mode) in [("/run", c"mode=755"), ("/dev/shm", c"mode=1777")] {
        mount("tmpfs", place, "tmpfs", MountFlags::NOSUID | MountFlags::NODEV, Some(mode))
            .with_context(|| format!("cannot mount a private {place}"))?;
    }
    Cmd::new("ip").args(["link", "set", "lo", "up"]).ok()?;
    fs::create_dir_all(enclosure.sockets())?;
    Ok(())
}

fn fresh_work_folder() -> Result<PathBuf> {
    // Beside the program, in cargo's target folder: on disk, where overlayfs works.
    let program = fs::canonicalize(std::env::current_exe()?)?;
    let base = program.parent().context("a program lies in a folder")?;
    sweep(base);
    let work = base.join(format!("{PREFIX}{}", std::process::id()));
    fs::create_dir_all(work.join("tmp")).with_context(|| format!("cannot create {}", work.display()))?;
    Ok(work)
}

/// What the names of work folders and of cgroups begin with.
const PREFIX: &str = "rvm-conformance-";

/// Removes what runs left that were killed together with their outer process.
fn sweep(base: &Path) {
    for entry in fs::read_dir(base).into_iter().flatten().flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        let Some(pid) = name.strip_prefix(PREFIX) else { continue };
        if !Path::new("/proc").join(pid).exists() {
            let _ = clean_up(&entry.path());
        }
    }
}

fn clean_up(work: &Path) -> Result<()> {
    let name = work.file_name().context("a work folder has a name")?;
    for hierarchy in cgroup_hierarchies()? {
        remove_cgroup(&hierarchy.join(name));
    }
    Cmd::new("rm").args(["-rf", "--one-file-system", "--"]).arg(work).ok()?;
    Ok(())
}

/// The mount points of all cgroup hierarchies, v1 and v2.
pub fn cgroup_hierarchies() -> Result<Vec<PathBuf>> {
    let mounts = fs::read_to_string("/proc/self/mounts")?;
    Ok(mounts
        .lines()
        .filter_map(|line| {
            let mut words = line.split(' ');
            let (_, place, kind) = (words.next()?, words.next()?, words.next()?);
            matches!(kind, "cgroup" | "cgroup2").then(|| PathBuf::from(place))
        })
        .collect())
}

/// crun refuses cgroup v1 where a v2 hierarchy is mounted beside it. That goes, in this mount
/// namespace only.
pub fn leave_hybrid_cgroups() -> Result<()> {
    const BESIDE_V1: &str = "/sys/fs/cgroup/unified";
    if Path::new(BESIDE_V1).join("cgroup.controllers").exists() {
        Cmd::new("umount").arg(BESIDE_V1).ok()?;
    }
    Ok(())
}

/// Removes a cgroup, and all below it, as far as there are no processes in them.
pub fn remove_cgroup(group: &Path) {
    for entry in fs::read_dir(group).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            remove_cgroup(&entry.path());
        }
    }
    // Busy or gone already: either way there is nothing more to do about it here.
    let _ = fs::remove_dir(group);
}
