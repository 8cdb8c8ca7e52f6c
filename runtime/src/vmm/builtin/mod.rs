//! The built-in VMM: a machine of `runvm-vmm` in a process of its own.
//!
//! The process is this program again, with the verb `vm`. It is told what to make by a [`Description`] on its stdin, and
//! gets all that it cannot open itself as descriptors. Before the guest runs it gives up everything else: see
//! [`confinement`]. What the guest could take over with it is the share that it has already.

mod channel;
pub mod confinement;
mod process;

use std::io::{BufRead as _, BufReader, Write as _};
use std::net::Shutdown;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::Stdio;
use std::sync::Arc;

use command_fds::{CommandFdExt as _, FdMapping};
use runvm_vmm::machine::Flavour;
use serde::{Deserialize, Serialize};
use tokio::process::Command;

use super::assets::Assets;
use super::probe::{Accelerator, Kvm};
use super::{Machine, Vm, Vmm, VmmError, parameters};
use crate::host::process::{ProcessIdentity, end_with_owner, own_program};
use crate::share::{Export, SetupError, ShareError};
use channel::Doorway;
pub use process::main as process_main;

/// The verb that makes this program a VM's process.
pub const VERB: &str = "vm";

/// The descriptors that the process gets beside its stdio: the doorway, then a tap for each network device.
const DOORWAY: i32 = 3;
const FIRST_TAP: i32 = 4;

/// What a VM's process is to make.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct Description {
    flavour: Flavour,
    vcpus: u32,
    /// In bytes.
    memory: u64,
    kernel: PathBuf,
    initramfs: PathBuf,
    parameters: String,
    exports: Vec<Export>,
    /// The addresses of the network devices.
    macs: Vec<[u8; 6]>,
    console: Option<PathBuf>,
}

/// What a VM's process says, once: the machine runs, or why there is none.
type Report = Result<(), Failure>;

/// Why there is no machine, fit to cross between processes.
#[derive(Clone, Debug, Serialize, Deserialize)]
enum Failure {
    /// The user's files.
    Share(SetupError),
    /// Everything else, as a clause.
    Machine(String),
}

/// The backend.
#[derive(Debug)]
pub struct Builtin {
    assets: Assets,
}

impl Builtin {
    /// The backend that boots these kernels.
    pub fn new(assets: Assets) -> Self {
        Self { assets }
    }

    fn describe(&self, machine: &Machine, flavour: Flavour) -> Result<Description, VmmError> {
        Ok(Description {
            flavour,
            vcpus: machine.vcpus,
            memory: machine.memory,
            kernel: self.assets.kernel(machine.accelerator)?,
            initramfs: self.assets.initramfs()?,
            parameters: parameters::builtin(machine),
            exports: machine.exports.clone(),
            macs: machine.nics.iter().map(|nic| nic.mac).collect(),
            console: machine.console.clone(),
        })
    }
}

impl Vmm for Builtin {
    fn boot(&self, machine: Machine) -> Result<Vm, VmmError> {
        let flavour = match machine.accelerator {
            Accelerator::Kvm(Kvm::Ordinary) => Flavour::Ordinary,
            Accelerator::Kvm(Kvm::Pvm) => Flavour::Pvm,
            Accelerator::Tcg => return Err(VmmError::NotKvm),
        };
        let description = self.describe(&machine, flavour)?;
        let (control, theirs) = UnixStream::pair().map_err(VmmError::Start)?;
        let (doorway, door) = Doorway::pair().map_err(VmmError::Start)?;
        let mut program = own_program();
        machine.log.hand_down_as_stderr(&mut program).map_err(VmmError::Start)?;
        let taps = machine.nics.into_iter().map(|nic| nic.tap).zip(FIRST_TAP..);
        let descriptors = std::iter::once((door, DOORWAY)).chain(taps);
        let descriptors = descriptors.map(|(parent_fd, child_fd)| FdMapping { parent_fd, child_fd }).collect();
        program
            .arg(VERB)
            .stdin(OwnedFd::from(theirs))
            .stdout(Stdio::null())
            .fd_mappings(descriptors)
            .map_err(|error| VmmError::Start(std::io::Error::other(error)))?;
        end_with_owner(&mut program);
        let mut command = Command::from(program);
        let process = command.kill_on_drop(true).spawn().map_err(VmmError::Start)?;
        // The command holds the other ends open.
        drop(command);
        let identity = process.id().and_then(ProcessIdentity::of);
        let identity = identity.ok_or_else(|| VmmError::Start(std::io::Error::other("it ended at once")))?;
        let words = converse(control, &description)?;
        Ok(Vm { process, identity, share: None, words, channel: Arc::new(doorway) })
    }
}

/// Tells the process what to make, and waits until it has; what it says later can be read from what is returned.
fn converse(mut control: UnixStream, description: &Description) -> Result<super::Words, VmmError> {
    let text = serde_json::to_vec(description).map_err(|error| VmmError::Start(error.into()))?;
    // Where it has ended in the meantime, its report is missing, which is the better story.
    let _ = control.write_all(&text).and_then(|()| control.shutdown(Shutdown::Write));
    let mut report = String::new();
    let mut reader = BufReader::with_capacity(1, &control);
    reader.read_line(&mut report).map_err(VmmError::Start)?;
    match serde_json::from_str(&report) {
        Ok(Ok(())) => {}
        Ok(Err(Failure::Share(error))) => return Err(ShareError::Setup(error).into()),
        Ok(Err(Failure::Machine(reason))) => return Err(VmmError::Machine(reason)),
        Err(_) => return Err(VmmError::Machine("its process ended without a word".to_owned())),
    }
    control.set_nonblocking(true).map_err(VmmError::Start)?;
    let control = tokio::net::UnixStream::from_std(control).map_err(VmmError::Start)?;
    Ok(Some(Box::new(control)))
}
