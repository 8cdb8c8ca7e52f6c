//! What a VM's owner and its process say to each other.

use std::path::PathBuf;

use runvm_vmm::machine::Flavour;
use serde::{Deserialize, Serialize};

use crate::share::{Export, SetupError};

/// The descriptors that the process gets beside its stdio: the doorway, a tap for each network device, and a template's
/// state and memory where the machine begins as one or becomes one.
pub(super) const FIRST_DESCRIPTOR: i32 = 3;

/// How many devices there are before the network's.
pub(super) const FIRST_NIC: usize = 4;

/// What a VM's process is to make.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Description {
    pub flavour: Flavour,
    pub vcpus: u32,
    /// In bytes.
    pub memory: u64,
    pub exports: Vec<Export>,
    /// The addresses of the network devices, which are the last devices.
    pub macs: Vec<[u8; 6]>,
    /// How many of those the guest is not told of.
    pub spare: usize,
    pub beginning: Beginning,
}

/// How a machine begins.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) enum Beginning {
    /// With its kernel's first instruction.
    Boot {
        kernel: PathBuf,
        initramfs: PathBuf,
        parameters: String,
        console: Option<PathBuf>,
        /// Whether it is to be written into the template's files once its agent listens.
        save: bool,
    },
    /// Where a template ended.
    Restore,
}

/// What a VM's process says once: the guest's agent listens, or why there is none.
pub(super) type Report = Result<Saving, Failure>;

/// What became of the template.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) enum Saving {
    /// There was to be none.
    NotAsked,
    /// It is written.
    Done,
    /// It is not; why, as a clause.
    Failed(String),
}

/// Why there is no machine, fit to cross between processes.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) enum Failure {
    /// The user's files.
    Share(SetupError),
    /// The guest switched its machine off before its agent listened.
    GaveUp,
    /// Everything else, as a clause.
    Machine(String),
}

impl Description {
    /// How many descriptors there are.
    pub(super) fn descriptors(&self) -> i32 {
        let files = match &self.beginning {
            Beginning::Boot { save: false, .. } => 0,
            Beginning::Boot { save: true, .. } | Beginning::Restore => 2,
        };
        1 + self.macs.len() as i32 + files
    }
}
