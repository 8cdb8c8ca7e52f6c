//! What each thread of a machine may ask of the host's kernel.
//!
//! Whoever finds a flaw in a device runs as the thread that serves it. So each thread gives up all system calls but
//! those that its role takes, before the guest runs; a thread that makes another one takes its whole process with it.
//! `calls` has the lists, role by role.
//!
//! The threads share one memory, and who has taken over one of them may come to run in any other: the wall is what the
//! widest of the lists leaves, that of files. The others stand where an attack begins.

mod calls;
mod search;

use std::collections::BTreeMap;
use std::io;
use std::sync::Arc;

use rustix::thread::CapabilitySet;
use seccompiler::{
    BackendError, BpfProgram, Error, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter,
    SeccompRule, apply_filter,
};

use crate::virtio::Kind;

/// What a thread is there for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// Has the machine, and waits for its end; lets it rest, and saves it. Everything else was done before.
    Owner,
    /// Runs a processor, and answers for registers of devices.
    Vcpu,
    /// Serves a device.
    Device(Kind),
}

/// What whoever serves files keeps of its capabilities: to make files for the guest's users with the guest's modes.
pub const FILE_CAPABILITIES: CapabilitySet = CapabilitySet::CHOWN
    .union(CapabilitySet::DAC_OVERRIDE)
    .union(CapabilitySet::FOWNER)
    .union(CapabilitySet::FSETID)
    .union(CapabilitySet::SETGID)
    .union(CapabilitySet::SETUID)
    .union(CapabilitySet::MKNOD)
    .union(CapabilitySet::SETFCAP);

/// What a thread does to itself before it serves anything of the guest's.
pub type Confinement = Arc<dyn Fn(Role) -> io::Result<()> + Send + Sync>;

/// Leaves the calling thread the system calls that its role takes, for good. Threads that it starts have the same.
///
/// # Errors
/// Where the host's kernel has no filters of system calls.
pub fn restrict(role: Role) -> Result<(), Error> {
    // What rustix asks the kernel when it is first needed, and no role may.
    rustix::param::page_size();
    apply_filter(&program(role)?)
}

fn program(role: Role) -> Result<BpfProgram, BackendError> {
    let mut allowed = Allowed::default();
    calls::of(role, &mut allowed)?;
    let (with_any, under_conditions): (BTreeMap<_, _>, BTreeMap<_, _>) =
        allowed.0.into_iter().partition(|(_, rules)| rules.is_empty());
    let mut program = search::passing(with_any.into_keys().map(|call| call as u32))?;
    let filter = SeccompFilter::new(
        under_conditions,
        // The thread alone would leave a machine behind that lacks a part, and to an attacker another try.
        SeccompAction::KillProcess,
        SeccompAction::Allow,
        std::env::consts::ARCH.try_into()?,
    )?;
    program.extend(BpfProgram::try_from(filter)?);
    Ok(program)
}

/// What an argument of a system call has to be.
type Condition = Result<SeccompCondition, BackendError>;

/// System calls, and for some of them under which conditions.
#[derive(Default)]
struct Allowed(BTreeMap<libc::c_long, Vec<SeccompRule>>);

impl Allowed {
    /// With any arguments.
    fn calls(&mut self, calls: &[libc::c_long]) {
        self.0.extend(calls.iter().map(|&call| (call, Vec::new())));
    }

    /// Under all of these conditions, or those of an earlier one.
    fn only<const N: usize>(&mut self, call: libc::c_long, conditions: [Condition; N]) -> Result<(), BackendError> {
        let conditions = conditions.into_iter().collect::<Result<_, _>>()?;
        self.0.entry(call).or_default().push(SeccompRule::new(conditions)?);
        Ok(())
    }
}

/// The argument with this index is this number, of 32 bits.
fn is(index: u8, number: u32) -> Condition {
    SeccompCondition::new(index, SeccompCmpArgLen::Dword, SeccompCmpOp::Eq, number.into())
}

/// The argument with this index has none of these bits.
fn lacks(index: u8, bits: u32) -> Condition {
    SeccompCondition::new(index, SeccompCmpArgLen::Dword, SeccompCmpOp::MaskedEq(bits.into()), 0)
}

/// The argument with this index points nowhere.
fn null(index: u8) -> Condition {
    SeccompCondition::new(index, SeccompCmpArgLen::Qword, SeccompCmpOp::Eq, 0)
}

/// Works as a thread of this role does: what the role does not allow ends the tests' process.
#[cfg(test)]
pub(crate) fn in_role<T: Send>(role: Role, work: impl FnOnce() -> T + Send) -> T {
    let confined = || {
        restrict(role).unwrap();
        work()
    };
    std::thread::scope(|scope| scope.spawn(confined).join().unwrap())
}
