//! What the daemon gives up before it reads a byte of the guest's.
//!
//! A guest owns its kernel, so it speaks FUSE to this process as it likes, as any user it likes: it can do to the exports
//! what root can do to files there, and must not get further. Left to the process are the mount namespace of the
//! share, the capabilities of [`FILE_CAPABILITIES`] and the system calls of virtiofsd's filter.

use std::io;
use std::os::fd::OwnedFd;

use nix::sys::resource::{Resource, setrlimit};
use runvm_vmm::confinement::FILE_CAPABILITIES;
use rustix::process::{DumpableBehavior, Signal};
use rustix::stdio::{dup2_stdin, stdin};
use rustix::thread::{CapabilitiesSecureBits, CapabilitySet, CapabilitySets};
use virtiofsd::seccomp::{SeccompAction, enable_seccomp};

use super::SetupError;
use super::tree::step;
use crate::host::descriptor::close_others;

/// Closes what else came from the parent: an engine may have left it open for all its descendants.
///
/// # Errors
/// Where the host's kernel cannot.
pub(crate) fn close_inherited() -> io::Result<()> {
    // SAFETY: nothing in this process holds another descriptor yet: it is called before any is opened.
    unsafe { close_others(&[]) }
}

/// Dies with the parent, and gives up its stdin, which is returned.
pub(crate) fn begin() -> Result<OwnedFd, SetupError> {
    rustix::process::set_parent_process_death_signal(Some(Signal::KILL))
        .map_err(step("tie the process to its parent"))?;
    let control = rustix::io::fcntl_dupfd_cloexec(stdin(), 3).map_err(step("take stdin"))?;
    let null = rustix::fs::open("/dev/null", rustix::fs::OFlags::RDONLY, rustix::fs::Mode::empty());
    null.and_then(dup2_stdin).map_err(step("open /dev/null"))?;
    setrlimit(Resource::RLIMIT_CORE, 0, 0).map_err(step("forbid core dumps"))?;
    Ok(control)
}

/// Gives up what serving files does not need. Threads that are to be confined start after this.
pub(crate) fn drop_privileges() -> Result<(), SetupError> {
    drop_capabilities().map_err(step("drop capabilities"))?;
    // The guest's memory is this process's: it is in no core dump, and nobody else's to read but root's of the host.
    rustix::process::set_dumpable_behavior(DumpableBehavior::NotDumpable).map_err(step("forbid core dumps"))?;
    rustix::thread::set_no_new_privs(true).map_err(step("forbid new privileges"))
}

/// Leaves the calling thread no capability at all.
pub(crate) fn drop_all_capabilities() -> rustix::io::Result<()> {
    let none = CapabilitySet::empty();
    rustix::thread::set_capabilities(None, CapabilitySets { effective: none, permitted: none, inheritable: none })
}

/// Leaves the daemon the system calls that it needs.
pub(super) fn restrict_system_calls() -> Result<(), SetupError> {
    enable_seccomp(SeccompAction::Kill, false).map_err(|error| SetupError::Serve(error.to_string()))
}

fn drop_capabilities() -> rustix::io::Result<()> {
    // Who makes a file as one of the guest's users keeps them: that user may be root of a user namespace in the guest, whose
    // kernel has decided already.
    rustix::thread::set_capabilities_secure_bits(CapabilitiesSecureBits::NO_SETUID_FIXUP)?;
    rustix::thread::clear_ambient_capability_set()?;
    for capability in CapabilitySet::all().difference(FILE_CAPABILITIES).iter() {
        match rustix::thread::remove_capability_from_bounding_set(capability) {
            // One that this kernel does not know, or that the caller's own bounds have taken already.
            Ok(()) | Err(rustix::io::Errno::INVAL) => {}
            Err(errno) => return Err(errno),
        }
    }
    let kept = rustix::thread::capabilities(None)?.permitted & FILE_CAPABILITIES;
    rustix::thread::set_capabilities(
        None,
        CapabilitySets { effective: kept, permitted: kept, inheritable: CapabilitySet::empty() },
    )
}
