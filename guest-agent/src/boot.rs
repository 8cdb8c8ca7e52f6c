//! What a kernel leaves to PID 1: mounts, limits, the end.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use rustix::fs::{CWD, Mode};
use rustix::io::Errno;
use rustix::mount::{MountFlags, mount, mount_bind, mount_move};
use rustix::process::{Resource, Rlimit, setrlimit};
use rustix::system::RebootCommand;
use tracing::level_filters::LevelFilter;

use crate::container;

/// Where the unified cgroup hierarchy is.
pub(crate) const CGROUP_ROOT: &str = "/sys/fs/cgroup";

/// The cgroup, below the root, that holds the containers' cgroups.
pub(crate) const CONTAINERS_CGROUP: &str = "runvm";

/// As many open files as engines grant.
const OPEN_FILES: u64 = 1 << 20;

/// A VM is sized by its container's limit, and programs reserve more than they use: what is too much is decided by that
/// limit when memory is touched, as on a host, not by the machine's size when it is asked for.
const OVERCOMMIT: (&str, &str) = ("/proc/sys/vm/overcommit_memory", "1");

/// A step of the boot that did not work.
#[derive(Debug, thiserror::Error)]
#[error("cannot {step}")]
pub(crate) struct BootError {
    step: String,
    #[source]
    source: io::Error,
}

/// The parameters for the agent on the kernel's command line.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Parameters {
    /// `runvm.log=LEVEL`.
    pub(crate) log_level: LevelFilter,
    /// `runvm.vsock=PORT`: the channel is vsock, on this port. Without it, it is the virtio-serial port.
    pub(crate) vsock_port: Option<u32>,
    /// `runvm.processors=late`: the kernel has left all but the first off, for the agent to bring up.
    pub(crate) late_processors: bool,
}

impl Parameters {
    /// Reads them from the kernel; `/proc` must be mounted.
    pub(crate) fn load() -> Self {
        Self::parse(&fs::read_to_string("/proc/cmdline").unwrap_or_default())
    }

    fn parse(command_line: &str) -> Self {
        let last = |name| command_line.split_ascii_whitespace().filter_map(|word| word.strip_prefix(name)).next_back();
        Self {
            log_level: last("runvm.log=").and_then(|level| level.parse().ok()).unwrap_or(LevelFilter::INFO),
            vsock_port: last("runvm.vsock=").and_then(|port| port.parse().ok()),
            late_processors: last("runvm.processors=") == Some("late"),
        }
    }
}

/// Makes of the initramfs a system in which containers can run.
pub(crate) fn prepare() -> Result<(), BootError> {
    rustix::process::umask(Mode::from_raw_mode(0o022));
    leave_rootfs().map_err(failed("move the root"))?;
    let nosuid = MountFlags::NOSUID | MountFlags::NOEXEC | MountFlags::NODEV;
    mount_at("/proc", "proc", nosuid, "")?;
    mount_at("/sys", "sysfs", nosuid, "")?;
    mount_at("/dev", "devtmpfs", MountFlags::NOSUID | MountFlags::NOEXEC, "mode=0755")?;
    mount_at("/dev/pts", "devpts", MountFlags::NOSUID | MountFlags::NOEXEC, "mode=0620,ptmxmode=0666")?;
    mount_at("/run", "tmpfs", MountFlags::NOSUID | MountFlags::NODEV, "mode=0755")?;
    // Without this a process waits 20 ms to enter a cgroup.
    mount_at(CGROUP_ROOT, "cgroup2", nosuid, "favordynmods")?;
    Ok(())
}

/// Gives the containers' cgroups every controller that the kernel has, and the containers the limits that engines
/// run theirs with.
pub(crate) fn grant() -> Result<(), BootError> {
    let root = Path::new(CGROUP_ROOT);
    let containers = root.join(CONTAINERS_CGROUP);
    fs::create_dir_all(&containers).map_err(failed("create the containers' cgroup"))?;
    let controllers = fs::read_to_string(root.join("cgroup.controllers")).map_err(failed("read cgroup.controllers"))?;
    let enabling: String = controllers.split_ascii_whitespace().map(|name| format!("+{name} ")).collect();
    for cgroup in [root, &containers] {
        fs::write(cgroup.join("cgroup.subtree_control"), &enabling).map_err(failed("enable cgroup controllers"))?;
    }
    container::devices::allow_all(&containers).map_err(failed("load a program for the containers' cgroup"))?;
    fs::write(OVERCOMMIT.0, OVERCOMMIT.1).map_err(failed("allow overcommitment"))?;
    let limit = Rlimit { current: Some(OPEN_FILES), maximum: Some(OPEN_FILES) };
    setrlimit(Resource::Nofile, limit).map_err(|errno| failed("raise the limit of open files")(errno.into()))?;
    setrlimit(Resource::Nproc, Rlimit { current: None, maximum: None })
        .map_err(|errno| failed("raise the limit of processes")(errno.into()))
}

/// Ends the guest. A VMM run for one boot sees a reboot as its end.
pub(crate) fn end_guest() -> ! {
    loop {
        if rustix::system::reboot(RebootCommand::Restart).is_err() {
            // Not PID 1 of a machine of its own, as in tests.
            std::process::abort();
        }
    }
}

/// The initial root cannot be left by `pivot_root`, as containers do: a copy of its mount on top of it can.
fn leave_rootfs() -> io::Result<()> {
    let copy = make_dir("/root")?;
    mount_bind("/", &copy)?;
    rustix::process::chdir(&copy)?;
    mount_move(".", "/")?;
    rustix::process::chroot(".")?;
    rustix::process::chdir("/")?;
    Ok(())
}

fn mount_at(target: &str, kind: &str, flags: MountFlags, data: &str) -> Result<(), BootError> {
    let mounted = make_dir(target).and_then(|target| {
        let data = std::ffi::CString::new(data).map_err(io::Error::other)?;
        Ok(mount(kind, &target, kind, flags, data.as_c_str())?)
    });
    mounted.map_err(|source| BootError { step: format!("mount {kind} at {target}"), source })
}

fn make_dir(path: &str) -> io::Result<PathBuf> {
    match rustix::fs::mkdirat(CWD, path, Mode::from_raw_mode(0o755)) {
        Ok(()) | Err(Errno::EXIST) => Ok(path.into()),
        Err(errno) => Err(errno.into()),
    }
}

/// Says of which step an error is.
pub(crate) fn failed(step: &str) -> impl Fn(io::Error) -> BootError {
    move |source| BootError { step: step.to_owned(), source }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_valid_level_counts() {
        assert_eq!(Parameters::parse("quiet runvm.log=debug panic=-1\n").log_level, LevelFilter::DEBUG);
        assert_eq!(Parameters::parse("runvm.log=debug runvm.log=warn").log_level, LevelFilter::WARN);
        assert_eq!(Parameters::parse("runvm.log=loud").log_level, LevelFilter::INFO);
        assert_eq!(Parameters::parse("").log_level, LevelFilter::INFO);
    }

    #[test]
    fn the_channel_is_vsock_where_it_has_a_port() {
        assert_eq!(Parameters::parse("quiet runvm.vsock=1 runvm.vsock=1023").vsock_port, Some(1023));
        assert_eq!(Parameters::parse("runvm.vsock=").vsock_port, None);
        assert_eq!(Parameters::parse("quiet").vsock_port, None);
    }

    #[test]
    fn processors_that_are_off_stay_so_unless_they_are_late() {
        assert!(Parameters::parse("maxcpus=1 runvm.processors=late").late_processors);
        assert!(!Parameters::parse("maxcpus=1").late_processors);
    }
}
