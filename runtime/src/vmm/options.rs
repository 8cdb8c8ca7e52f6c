//! What the user may say of the VM: on the command line, in the environment, or in the configuration.

use std::path::{Path, PathBuf};

use clap::{Args, ValueEnum};
use serde::Deserialize;

use super::assets::Assets;
use super::configuration::Configuration;
use super::probe::{self, Accelerator};
use super::{Builtin, Qemu, Vmm};
use crate::template::{self, Store};

/// Where templates are kept.
const TEMPLATES: &str = "/var/cache/runvm/templates";

/// What the command line and the environment say. What they do not, the configuration does.
#[derive(Args, Clone, Debug, Default)]
pub struct Arguments {
    /// What runs the guests: KVM where it is usable, only KVM, or QEMU's translator [default: auto].
    #[arg(long, value_enum, env = "RUNVM_ACCEL", value_name = "ACCELERATOR")]
    accel: Option<probe::Wanted>,
    /// The VMM: the built-in one where KVM is usable and QEMU where not, or always one of them [default: auto].
    #[arg(long, value_enum, env = "RUNVM_VMM", value_name = "VMM")]
    vmm: Option<Wanted>,
    /// Fork machines from templates where there are some, never, or only [default: auto].
    #[arg(long, value_enum, env = "RUNVM_TEMPLATE", value_name = "WHEN")]
    template: Option<template::Use>,
    /// Folder of the templates [default: /var/cache/runvm/templates].
    #[arg(long, env = "RUNVM_TEMPLATE_DIR", value_name = "DIR")]
    template_dir: Option<PathBuf>,
}

impl Arguments {
    /// The options, with the configuration's and our own word for what is not said.
    pub fn complete(self, configuration: Configuration) -> Options {
        Options {
            accelerator: self.accel.or(configuration.accel).unwrap_or_default(),
            vmm: self.vmm.or(configuration.vmm).unwrap_or_default(),
            templates: self.template.or(configuration.template).unwrap_or_default(),
            template_dir: self.template_dir.or(configuration.template_dir).unwrap_or_else(|| TEMPLATES.into()),
        }
    }
}

/// What holds for the VM.
#[derive(Clone, Debug, Default)]
pub struct Options {
    /// What runs the guests.
    pub accelerator: probe::Wanted,
    /// The VMM.
    pub vmm: Wanted,
    /// Whether machines are forked.
    pub templates: template::Use,
    /// Folder of the templates.
    pub template_dir: PathBuf,
}

/// Which VMM the user asks for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, ValueEnum)]
#[serde(rename_all = "lowercase")]
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
    /// Whether a machine with this accelerator is QEMU's.
    pub fn needs_qemu(&self, accelerator: Accelerator) -> bool {
        match self.vmm {
            Wanted::Auto => accelerator == Accelerator::Tcg,
            Wanted::Builtin => false,
            Wanted::Qemu => true,
        }
    }

    /// Whether a machine is the built-in VMM's, as far as can be told before anybody has looked at the host.
    pub(super) fn promise_builtin(&self) -> bool {
        let kvm = match self.accelerator {
            probe::Wanted::Auto => Path::new("/dev/kvm").exists(),
            probe::Wanted::Kvm => true,
            probe::Wanted::Tcg => false,
        };
        kvm && self.vmm != Wanted::Qemu
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
