//! An OOM kill in a guest, told in the host's cgroup of the container, where engines look for one.
//!
//! containerd's shim for runc waits for it at the cgroup of the container's PID: with version 1 by an eventfd of
//! `memory.oom_control`, with version 2 at `memory.events`. Neither can be written; the kernel counts there what it does
//! itself. So when the container has ended and its VM is gone, a process is started in the cgroup for the kernel to kill:
//! it asks for more than a limit that is set for that moment. Nothing else is in the cgroup but the monitor, which has
//! little, and the kernel is told to choose the other.

use std::ffi::CStr;
use std::fs;
use std::io;
use std::os::unix::process::{CommandExt as _, ExitStatusExt as _};
use std::path::{Path, PathBuf};
use std::process::{Child, ExitStatus, Stdio};
use std::time::Duration;

use rustix::fs::{Mode, OFlags, open};
use rustix::mm::{MlockAllFlags, mlockall};

use super::process::{ProcessIdentity, end_with_owner, own_program};

/// The verb that makes this program the process that is killed.
pub const VERB: &str = "oom-victim";
/// A cgroup's files, by its version.
const VERSIONS: [Files; 2] = [
    Files { limit: "memory.limit_in_bytes", usage: "memory.usage_in_bytes", reclaim: "memory.force_empty" },
    Files { limit: "memory.max", usage: "memory.current", reclaim: "memory.reclaim" },
];
/// How much there is between what is used and the limit, in bytes: enough that the monitor never comes to it.
const ROOM: u64 = 16 << 20;
/// More is not used where there is no VM any more, and would take long to ask for.
const MOST: u64 = 1 << 30;
/// How long the kernel may take to find and kill it.
const LIMIT: Duration = Duration::from_secs(2);
const SCORE: &CStr = c"/proc/self/oom_score_adj";

struct Files {
    limit: &'static str,
    usage: &'static str,
    reclaim: &'static str,
}

/// Has the kernel note an OOM kill in the cgroup with these folders, of which the caller has to be the only process.
///
/// # Errors
/// Those of the cgroup's files, and of starting a process. `ResourceBusy` where somebody else is in the cgroup.
pub fn note(folders: &[PathBuf]) -> io::Result<()> {
    let found = folders.iter().find_map(|folder| {
        let files = VERSIONS.iter().find(|files| folder.join(files.limit).exists())?;
        Some((folder, files))
    });
    let Some((folder, files)) = found else { return Ok(()) };
    expect_alone(folder)?;
    // What the host's kernel keeps of the container's files would make room for a long time. Not all kernels have this.
    let _ = fs::write(folder.join(files.reclaim), MOST.to_string());
    let used: u64 = fs::read_to_string(folder.join(files.usage))?.trim().parse().map_err(io::Error::other)?;
    if used > MOST {
        return Err(io::ErrorKind::FileTooLarge.into());
    }
    let limit = folder.join(files.limit);
    let before = fs::read_to_string(&limit)?;
    fs::write(&limit, (used + ROOM).to_string())?;
    let ended = start(used + 2 * ROOM).and_then(|victim| await_end(victim, &limit, before.trim()));
    fs::write(&limit, before.trim())?;
    match ended?.signal() {
        Some(_) => Ok(()),
        None => Err(io::Error::other("the kernel let it live")),
    }
}

fn expect_alone(folder: &Path) -> io::Result<()> {
    let processes = fs::read_to_string(folder.join("cgroup.procs"))?;
    let has_children = fs::read_dir(folder)?.flatten().any(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()));
    match processes.trim() == std::process::id().to_string() && !has_children {
        true => Ok(()),
        false => Err(io::ErrorKind::ResourceBusy.into()),
    }
}

fn start(bytes: u64) -> io::Result<Child> {
    let mut program = own_program();
    program.arg(VERB).arg(bytes.to_string()).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    let offer = || {
        let score = open(SCORE, OFlags::WRONLY | OFlags::CLOEXEC, Mode::empty())?;
        rustix::io::write(&score, b"1000")?;
        Ok(())
    };
    // SAFETY: between fork and exec `offer` makes system calls only, it allocates nothing and takes no lock.
    unsafe { program.pre_exec(offer) };
    end_with_owner(&mut program).spawn()
}

/// Waits for the victim's end. Where the kernel has it wait for memory instead, it is not used any further.
fn await_end(mut victim: Child, limit: &Path, before: &str) -> io::Result<ExitStatus> {
    if ProcessIdentity::of(victim.id()).map_or(Ok(true), |victim| victim.await_end(LIMIT))? {
        return victim.wait();
    }
    fs::write(limit, before)?;
    victim.kill()?;
    victim.wait()?;
    Err(io::ErrorKind::TimedOut.into())
}

/// What the victim does; it comes to an end only where it is not killed.
pub fn victim(bytes: usize) {
    // Memory that can be swapped out is not missed; where it may not be held, it is only asked for.
    let _ = mlockall(MlockAllFlags::CURRENT | MlockAllFlags::FUTURE);
    std::hint::black_box(vec![1_u8; bytes]);
}
