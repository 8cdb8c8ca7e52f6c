//! What the user may say of the VM: options of the command line, handed down to the processes that follow.

use std::path::PathBuf;
use std::process::Command;

use clap::{Args, ValueEnum};

use super::assets::Assets;
use super::probe::{self, Accelerator};
use super::{Builtin, Qemu, Vmm};
use crate::template::{self, Store};

/// Where templates are kept.
const TEMPLATES: &str = "/var/cache/runvm/templates";

/// The options.
#[derive(Args, Clone, Debug, Default)]
pub struct Options {
    /// What runs the guests: KVM where it is usable, only KVM, or QEMU's translator.
    #[arg(long = "accel", value_enum, default_value = "auto", env = "RUNVM_ACCEL", value_name = "ACCELERATOR")]
    pub accelerator: probe::Wanted,
    /// The VMM: the built-in one where KVM is usable and QEMU where not, or always one of them.
    #[arg(long, value_enum, default_value = "auto", env = "RUNVM_VMM", value_name = "VMM")]
    pub vmm: Wanted,
    /// Fork machines from templates where there are some, never, or only.
    #[arg(long = "template", value_enum, default_value = "auto", env = "RUNVM_TEMPLATE", value_name = "WHEN")]
    pub templates: template::Use,
    /// Folder of the templates.
    #[arg(long, default_value = TEMPLATES, env = "RUNVM_TEMPLATE_DIR", value_name = "DIR")]
    pub template_dir: PathBuf,
}

/// Which VMM the user asks for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum Wanted {
    /// The built-in one where KVM is usable, else QEMU.
    #[default]
    Auto,
    /// The built-in one, which needs KVM.
    Builtin,
    /// QEMU, with or without KVM.
    Qemu,
}

impl Options {
    /// Gives a process of this program the same options.
    pub fn hand_down(&self, command: &mut Command) {
        let vmm = match self.vmm {
            Wanted::Auto => "auto",
            Wanted::Builtin => "builtin",
            Wanted::Qemu => "qemu",
        };
        command.args(["--accel", self.accelerator.name(), "--vmm", vmm, "--template", self.templates.name()]);
        command.arg("--template-dir").arg(&self.template_dir);
    }

    /// Whether a machine with this accelerator is QEMU's.
    pub fn needs_qemu(&self, accelerator: Accelerator) -> bool {
        match self.vmm {
            Wanted::Auto => accelerator == Accelerator::Tcg,
            Wanted::Builtin => false,
            Wanted::Qemu => true,
        }
    }

    /// The backend for a machine with this accelerator.
    pub fn backend(&self, accelerator: Accelerator) -> Box<dyn Vmm> {
        let assets = Assets::find();
        if self.needs_qemu(accelerator) {
            Box::new(Qemu::new(assets))
        } else {
            Box::new(Builtin::new(assets, self.templates, self.store()))
        }
    }

    /// Where templates are kept.
    pub fn store(&self) -> Store {
        Store::at(self.template_dir.clone())
    }
}
