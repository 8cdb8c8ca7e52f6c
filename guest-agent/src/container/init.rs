//! A container's first process, from its birth in the container's namespaces and cgroup to its program.
//!
//! Like [`super::exec`] it takes the steps itself, in runc's order and with libcontainer's parts: libcontainer's own way
//! is three processes, each a copy of the last, and in a guest that has just been forked a page touched for the first
//! time is what costs.

use std::convert::Infallible;
use std::io::{self, Write as _};
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use libcontainer::container::{ContainerStatus, State};
use libcontainer::hooks;
use libcontainer::oci_spec::runtime::{Linux, LinuxPersonalityDomain, Process, Spec};
use libcontainer::utils::parse_env;
use rustix::fs::{Mode, OFlags};
use rustix::thread::{LinkNameSpaceType, ThreadNameSpaceType, UnshareFlags, move_into_link_name_space};

use super::company::Company;
use super::process::{self, Files, failed, tell};
use super::{clocks, priority, program, rootfs, sysctl};
use crate::child::{self, let_go};
use crate::user_namespace::become_root;

/// personality(2): programs see a machine of 32 bits.
const PER_LINUX32: libc::c_ulong = 8;

/// What the process says when it waits for its program's start; anything else is why it does not.
pub(super) const READY: &str = "ready";

/// The process's ends of what it is directed by. All close when its program runs.
pub(super) struct Reins {
    pub(super) report: OwnedFd,
    pub(super) go: OwnedFd,
    pub(super) console: OwnedFd,
    /// Where a process that precedes it tells its number.
    pub(super) number: OwnedFd,
}

/// The namespaces that the process is born in, as flags of clone(2). That of users is there already, that of cgroups has
/// to wait until it is in its cgroup, and that of time until its clocks are set.
pub(super) fn birth_namespaces(linux: &Linux, company: &Company) -> libc::c_int {
    let others = ThreadNameSpaceType::USER | ThreadNameSpaceType::CONTROL_GROUP | ThreadNameSpaceType::TIME;
    let namespaces = process::namespaces(linux).difference(others | company.namespaces());
    namespaces.bits().cast_signed()
}

/// The life of the process that has to precede the first one where that has a user namespace: its other namespaces are to
/// be made by one who is in it. The limits are set before, as there they could only be lowered.
pub(super) fn precede(
    user_namespace: BorrowedFd<'_>,
    namespaces: libc::c_int,
    spec: &Spec,
    reins: &Reins,
    life: impl FnOnce() -> i32,
) -> i32 {
    let preceded = limit(spec).and_then(|()| {
        move_into_link_name_space(user_namespace, Some(LinkNameSpaceType::User))
            .map_err(failed("enter the user namespace"))?;
        // Through a file of the guest's root, which this one is no more from the next step on.
        shift_clocks(spec)?;
        become_root().map_err(failed("become root of the user namespace"))?;
        let first = child::split_beside(namespaces, || {
            let_go(&reins.number);
            life()
        });
        let number = first.map_err(failed("start a process"))?.as_raw_nonzero().get().to_be_bytes();
        rustix::io::write(&reins.number, &number).map(drop).map_err(failed("report the process"))
    });
    preceded.map_or_else(|sentence| tell(&reins.report, &sentence), |()| 0)
}

/// The process's life up to its program; its exit code, should it not come so far.
pub(super) fn live(id: &str, spec: &Spec, company: &Company, files: &Files, reins: &Reins) -> i32 {
    match limit(spec).and_then(|()| shift_clocks(spec)) {
        Ok(()) => live_within(id, spec, company, files, reins),
        Err(sentence) => tell(&reins.report, &sentence),
    }
}

/// The same, of one that has its limits and clocks.
pub(super) fn live_within(id: &str, spec: &Spec, company: &Company, files: &Files, reins: &Reins) -> i32 {
    let ready = match prepare(spec, company, files, &reins.console) {
        Ok(ready) => ready,
        Err(sentence) => return tell(&reins.report, &sentence),
    };
    tell(&reins.report, &READY);
    let_go(&reins.report);
    match run(id, spec, &ready, &reins.go) {
        Err(sentence) => {
            // The engine has been told that the container runs: its user finds the reason in the container's output.
            let _ = writeln!(io::stderr(), "{sentence}");
            1
        }
    }
}

fn limit(spec: &Spec) -> Result<(), String> {
    process::limit(spec.process().as_ref().ok_or("process is missing")?)
}

fn shift_clocks(spec: &Spec) -> Result<(), String> {
    spec.linux().as_ref().map_or(Ok(()), clocks::shift)
}

/// What is to run, and where its program was found: it is searched once, as by runc.
type Ready<'a> = (&'a Process, PathBuf);

fn prepare<'a>(spec: &'a Spec, company: &Company, files: &Files, console: &OwnedFd) -> Result<Ready<'a>, String> {
    let process = spec.process().as_ref().ok_or("process is missing")?;
    let linux = spec.linux().as_ref().ok_or("linux is missing")?;
    priority::set(process)?;
    rustix::process::setsid().map_err(failed("start a session"))?;
    company.join().map_err(failed("join the namespaces of the sandbox"))?;
    enter_namespaces(spec, linux)?;
    rootfs::enter(spec, linux)?;
    rootfs::make_directory(process.cwd())?;
    process::connect(files, console.as_fd(), process, true)?;
    use_own_null().map_err(failed("use the container's /dev/null"))?;
    if let Some(personality) = linux.personality() {
        let domain = match personality.domain() {
            LinuxPersonalityDomain::PerLinux => 0,
            LinuxPersonalityDomain::PerLinux32 => PER_LINUX32,
        };
        // SAFETY: it takes a number only.
        unsafe { libc::personality(domain) };
    }
    rootfs::protect(spec, linux)?;
    process::settle(process, linux.seccomp().as_ref())?;
    Ok((process, program::find(process)?))
}

/// What is left of the namespaces: that of cgroups, names, and parameters of the kernel that belong to one.
fn enter_namespaces(spec: &Spec, linux: &Linux) -> Result<(), String> {
    let own = process::namespaces(linux);
    if own.contains(ThreadNameSpaceType::CONTROL_GROUP) {
        // SAFETY: the table of descriptors is not among the flags.
        unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWCGROUP) }
            .map_err(failed("make a cgroup namespace"))?;
    }
    // Without a namespace of its own they are the guest's, which is the container's too.
    if let Some(name) = spec.hostname() {
        rustix::system::sethostname(name.as_bytes()).map_err(failed("set hostname"))?;
    }
    if let Some(name) = spec.domainname() {
        rustix::system::setdomainname(name.as_bytes()).map_err(failed("set domainname"))?;
    }
    linux.sysctl().as_ref().map_or(Ok(()), sysctl::set)
}

/// A descriptor of the guest's /dev/null becomes one of the container's.
fn use_own_null() -> rustix::io::Result<()> {
    let guests = |descriptor: BorrowedFd<'_>| {
        rustix::fs::fstat(descriptor).is_ok_and(|data| data.st_rdev == rustix::fs::makedev(1, 3))
    };
    let flags = OFlags::RDWR | OFlags::CLOEXEC;
    let open = || rustix::fs::open("/dev/null", flags, Mode::empty());
    if guests(rustix::stdio::stdin()) {
        rustix::stdio::dup2_stdin(open()?)?;
    }
    if guests(rustix::stdio::stdout()) {
        rustix::stdio::dup2_stdout(open()?)?;
    }
    if guests(rustix::stdio::stderr()) {
        rustix::stdio::dup2_stderr(open()?)?;
    }
    Ok(())
}

/// Waits for the start, and becomes the program.
fn run(id: &str, spec: &Spec, (process, program): &Ready<'_>, go: &OwnedFd) -> Result<Infallible, String> {
    let mut word = [0];
    if !matches!(rustix::io::read(go, &mut word), Ok(1)) {
        // The container is deleted, or the guest ends.
        child::exit(1);
    }
    if let Some(hooks) = spec.hooks() {
        let number = i32::try_from(std::process::id()).ok();
        let bundle = spec.root().as_ref().and_then(|root| root.path().parent()).unwrap_or(Path::new("/"));
        let mut state = State::new(id, ContainerStatus::Created, number, bundle.to_owned());
        state.annotations = spec.annotations().clone();
        let environment = parse_env(process.env().as_deref().unwrap_or_default());
        hooks::run_hooks(hooks.start_container().as_ref(), Some(&state), None, None, Some(&environment))
            .map_err(failed("run hooks.startContainer"))?;
    }
    program::run(program, process)
}
