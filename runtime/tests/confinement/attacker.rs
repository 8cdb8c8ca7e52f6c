//! The attacker's process: it becomes what a VM's process is, and makes each attempt in a copy of itself.

use std::collections::BTreeMap;
use std::io;
use std::process::{Command, ExitCode, Stdio};
use std::thread;

use libtest_mimic::Failed;
use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::{ForkResult, fork};
use runvm::share::Files;
use runvm::vmm::builtin::confinement::{confine, enter};
use runvm_vmm::confinement::Role;
use runvm_vmm::virtio::Kind;
use rustix::mount::MountPropagationFlags;
use rustix::thread::UnshareFlags;
use serde::{Deserialize, Serialize};

use crate::attempts::{ATTEMPTS, WORK};
use crate::ground::{Ground, Map};

/// The argument that makes this program an attacker; the role and the map follow.
pub const WORD: &str = "attacker";
/// The role of none.
pub const UNCONFINED: &str = "unconfined";

/// All roles of a thread.
pub const ROLES: [(&str, Role); 8] = [
    ("owner", Role::Owner),
    ("vcpu", Role::Vcpu),
    ("vsock", Role::Device(Kind::Vsock)),
    ("net", Role::Device(Kind::Net)),
    ("block", Role::Device(Kind::Block)),
    ("rng", Role::Device(Kind::Entropy)),
    ("balloon", Role::Device(Kind::Balloon)),
    ("fs", Role::Device(Kind::FileSystem)),
];

/// What became of an attempt.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Outcome {
    /// It succeeded.
    Done,
    /// An error, by its number.
    Refused(i32),
    /// The process was ended, by the signal with this number.
    Killed(i32),
}

/// Has an attacker in this role try everything; what became of each attempt, by its name.
pub fn run(role: &str, ground: &Ground) -> Result<BTreeMap<String, Outcome>, Failed> {
    let map = serde_json::to_string(&ground.map)?;
    let output = Command::new("/proc/self/exe")
        .args([WORD, role, &map])
        .stdin(Stdio::null())
        .stderr(Stdio::inherit())
        .output()?;
    if !output.status.success() {
        return Err(format!("the attacker ended with {}", output.status).into());
    }
    Ok(serde_json::from_slice(&output.stdout)?)
}

/// The attacker.
pub fn main(role: &str, map: &str) -> ExitCode {
    let role = ROLES.iter().find(|(name, _)| *name == role).map(|&(_, role)| role);
    let outcomes = serde_json::from_str(map).map_err(Into::into).and_then(|map| try_all(role, &map));
    match outcomes.and_then(|outcomes| Ok(serde_json::to_writer(io::stdout(), &outcomes)?)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("the attacker cannot begin: {error}");
            ExitCode::FAILURE
        }
    }
}

fn try_all(role: Option<Role>, map: &Map) -> io::Result<BTreeMap<&'static str, Outcome>> {
    let attempts = ATTEMPTS.iter().flat_map(|attempts| attempts.iter()).map(|attempt| (attempt.name, attempt.make));
    let work = WORK.iter().map(|work| (work.name, work.make));
    attempts.chain(work).map(|(name, make)| Ok((name, try_one(role, map, make)?))).collect()
}

/// Makes an attempt in a process of its own, whose exit code is the error's number.
fn try_one(role: Option<Role>, map: &Map, make: fn(&Map) -> io::Result<()>) -> io::Result<Outcome> {
    // SAFETY: this process has one thread.
    let child = match unsafe { fork() }? {
        ForkResult::Parent { child } => child,
        ForkResult::Child => std::process::exit(attack(role, map.clone(), make)),
    };
    match waitpid(child, None)? {
        WaitStatus::Exited(_, UNPREPARED) => Err(io::Error::other("the process cannot be made like a VM's")),
        WaitStatus::Exited(_, 0) => Ok(Outcome::Done),
        WaitStatus::Exited(_, code) => Ok(Outcome::Refused(code)),
        WaitStatus::Signaled(_, signal, _) => Ok(Outcome::Killed(signal as i32)),
        status => Err(io::Error::other(format!("{status:?}"))),
    }
}

fn attack(role: Option<Role>, map: Map, make: fn(&Map) -> io::Result<()>) -> i32 {
    let Ok((map, _file_system)) = prepare(role, map) else { return UNPREPARED };
    let attack = move || match role.map(confine) {
        Some(Err(_)) => UNPREPARED,
        _ => code(make(&map)),
    };
    match role {
        None | Some(Role::Owner) => attack(),
        Some(_) => thread::spawn(attack).join().unwrap_or(UNPREPARED),
    }
}

/// Becomes what a VM's process is, with what serves the files, which has some of them open. Without a role only what
/// succeeds is to leave no traces.
fn prepare(role: Option<Role>, map: Map) -> io::Result<(Map, Option<Files>)> {
    if role.is_some() {
        let file_system = enter(&map.exports()).map_err(io::Error::other)?;
        return Ok((map.inside(), Some(file_system)));
    }
    // SAFETY: the table of descriptors is not among the flags.
    unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWNS | UnshareFlags::NEWIPC) }?;
    let apart = MountPropagationFlags::PRIVATE | MountPropagationFlags::REC;
    rustix::mount::mount_change("/", apart)?;
    Ok((map, None))
}

/// What an error without a number ends with, and what comes before any attempt.
const NO_NUMBER: i32 = 254;
const UNPREPARED: i32 = 255;

fn code(result: io::Result<()>) -> i32 {
    result.map_or_else(|error| error.raw_os_error().unwrap_or(NO_NUMBER), |()| 0)
}
