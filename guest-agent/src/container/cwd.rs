//! The working directory of a container's program. As runc does, it is made where the image and the mounts lack it.
//!
//! It can be made only when the container's file systems are in place and before its program's user is, inside
//! libcontainer's work: so this program runs itself there as a hook.

use std::ffi::OsString;
use std::fs::Permissions;
use std::io;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};

use libcontainer::oci_spec::runtime::{HookBuilder, Mount, Spec};
use pathrs::Root;
use pathrs::error::ErrorKind;
use rustix::fs::{CWD, Mode, OFlags, ResolveFlags};
use rustix::io::Errno;

/// Where the agent's program is.
const PROGRAM: &str = "/init";

/// The first argument by which the program knows what it is run for.
pub(crate) const MAKE: &str = "make-cwd";

/// Has the working directory made, unless it is there.
pub(super) fn provide(spec: &mut Spec) -> io::Result<()> {
    let (Some(root), Some(process)) = (spec.root(), spec.process()) else { return Ok(()) };
    let cwd = process.cwd();
    if !is_missing(root.path(), spec.mounts().as_deref().unwrap_or_default(), cwd) {
        return Ok(());
    }
    let arguments = ["runvm-agent", MAKE, &root.path().to_string_lossy(), &cwd.to_string_lossy()].map(str::to_owned);
    let hook = HookBuilder::default().path(PROGRAM).args(arguments.to_vec()).build().map_err(io::Error::other)?;
    let mut hooks = spec.hooks().clone().unwrap_or_default();
    hooks.set_create_container(Some(vec![hook]));
    spec.set_hooks(Some(hooks));
    Ok(())
}

/// What the hook does: makes the directory below the container's root. Returns the exit code, which is the number of
/// the system's error: libcontainer tells nothing else of a hook.
pub(crate) fn make(arguments: &[OsString]) -> i32 {
    let [root, cwd] = arguments else { return Errno::INVAL.raw_os_error() };
    match Root::open(root).and_then(|root| root.mkdir_all(cwd, &Permissions::from_mode(0o755))) {
        Ok(_) => 0,
        Err(error) => match error.kind() {
            ErrorKind::OsError(Some(errno)) => errno,
            _ => Errno::IO.raw_os_error(),
        },
    }
}

/// The system's error in libcontainer's words on a failed hook.
pub(super) fn failure(text: &str) -> Option<Errno> {
    let (_, code) = text.split_once("NonZeroExitCode(")?;
    code.split_once(')')?.0.parse().ok().map(Errno::from_raw_os_error)
}

/// Whether the directory may be missing once everything is mounted.
fn is_missing(root: &Path, mounts: &[Mount], cwd: &Path) -> bool {
    let covering = mounts.iter().rev().filter(|mount| cwd.starts_with(mount.destination()));
    let Some(mount) = covering.max_by_key(|mount| mount.destination().components().count()) else {
        return is_absent(root, cwd);
    };
    match cwd.strip_prefix(mount.destination()) {
        // The mount makes its own place.
        Ok(below) if below.as_os_str().is_empty() => false,
        Ok(below) => mount.source().as_ref().filter(|_| is_bind(mount)).is_none_or(|source| is_absent(source, below)),
        Err(_) => false,
    }
}

fn is_bind(mount: &Mount) -> bool {
    mount.options().iter().flatten().any(|option| option == "bind" || option == "rbind")
}

fn is_absent(root: &Path, path: &Path) -> bool {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let Ok(root) = rustix::fs::openat(CWD, root, flags, Mode::empty()) else { return false };
    let path: PathBuf = Path::new(".").join(path.strip_prefix("/").unwrap_or(path));
    let found = rustix::fs::openat2(root, path, flags, Mode::empty(), ResolveFlags::IN_ROOT);
    matches!(found, Err(Errno::NOENT))
}

#[cfg(test)]
mod tests {
    use super::*;
    use libcontainer::oci_spec::runtime::MountBuilder;

    fn mount(destination: &str, source: &str, options: &[&str]) -> Mount {
        let options: Vec<_> = options.iter().map(|&option| option.to_owned()).collect();
        MountBuilder::default().destination(destination).source(source).options(options).build().unwrap()
    }

    #[test]
    fn the_reason_is_in_the_exit_code() {
        let arguments = ["/", "/proc/no-such-directory"].map(OsString::from);
        let code = make(&arguments);
        let text = format!("failed to run create container hooks: err=NonZeroExitCode({code})");
        assert_eq!(failure(&text).map(|errno| errno.raw_os_error()), Some(code));
        assert_ne!(code, 0);
        assert_eq!(failure("failed to chdir: e=ENOENT"), None);
    }

    #[test]
    fn a_directory_is_looked_for_where_it_will_be() {
        let root = Path::new("/");
        let mounts = [mount("/data", "/", &["rbind"]), mount("/data/tmp", "tmpfs", &[]), mount("/etc", "x", &[])];
        let missing = |cwd: &str| is_missing(root, &mounts, Path::new(cwd));
        assert!(!missing("/"));
        assert!(!missing("/usr"));
        assert!(missing("/no/such"));
        assert!(!missing("/data"));
        assert!(!missing("/data/etc"), "the mount's source has it");
        assert!(missing("/data/no"));
        assert!(!missing("/data/tmp"));
        assert!(missing("/data/tmp/x"), "a fresh file system has nothing");
        assert!(missing("/etc/x"), "what is mounted covers the root's");
        assert!(!missing("/usr/bin/env"), "a file is not made a directory");
    }
}
