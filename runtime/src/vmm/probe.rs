//! Which accelerator a guest gets: found by trying, never by a file's presence.
//!
//! `/dev/kvm` may be there and of no use. A KVM on a host without VMX or SVM is of the PVM kind, which runs only guest
//! kernels that speak its own interface: its signature is read from a model specific register of a virtual processor.
//! The answer holds for one boot of the host, and is kept in a file under the boot's ID.

use std::fmt;
use std::fs;
use std::path::Path;

use kvm_bindings::{Msrs, kvm_msr_entry};
use kvm_ioctls::Kvm as KvmDevice;
use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::host::boot_id;

/// Where the answer is kept.
const CACHE: &str = "/run/runvm.accelerator";
const DEVICE: &std::ffi::CStr = c"/dev/kvm";

/// The register that holds a PVM host's signature.
const PVM_SIGNATURE_MSR: u32 = 0x4b56_4d11;
const PVM_SIGNATURE: u64 = 0x4d_5650;

/// The two kinds of usable KVM.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Kvm {
    /// Over the processor's VMX or SVM.
    Ordinary,
    /// Without either; needs a guest kernel of its own.
    Pvm,
}

/// What executes a guest's instructions.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Accelerator {
    /// The processor.
    Kvm(Kvm),
    /// QEMU's translator.
    Tcg,
}

impl fmt::Display for Accelerator {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Kvm(Kvm::Ordinary) => "kvm",
            Self::Kvm(Kvm::Pvm) => "kvm-pvm",
            Self::Tcg => "tcg",
        })
    }
}

/// What the user asks for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Wanted {
    /// KVM where it is usable, else TCG.
    #[default]
    Auto,
    /// KVM or nothing.
    Kvm,
    /// QEMU's translator, which needs nothing of the host and is slow.
    Tcg,
}

/// An accelerator, and why it is this one.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Choice {
    /// The accelerator.
    pub accelerator: Accelerator,
    /// One clause.
    pub reason: String,
}

/// KVM was demanded, and is not usable.
#[derive(Debug, Error)]
#[error("KVM is not usable: {0}; `--accel auto` or `--accel tcg` starts guests without it")]
pub struct NoKvm(String);

#[derive(Serialize, Deserialize)]
struct Cached {
    boot: String,
    choice: Choice,
    /// A guest was seen to run so.
    proved: bool,
}

/// Chooses the accelerator.
///
/// # Errors
/// [`NoKvm`] where KVM is demanded and is not usable.
pub fn choose(wanted: Wanted) -> Result<Choice, NoKvm> {
    match wanted {
        Wanted::Tcg => Ok(Choice { accelerator: Accelerator::Tcg, reason: "it was asked for".into() }),
        Wanted::Auto => Ok(automatic()),
        Wanted::Kvm => match probe() {
            Ok(kvm) => Ok(Choice { accelerator: Accelerator::Kvm(kvm), reason: "it was asked for".into() }),
            Err(reason) => Err(NoKvm(reason)),
        },
    }
}

fn automatic() -> Choice {
    // Permission to open the device is the caller's, not the boot's.
    let openable = fs::File::options().read(true).write(true).open(Path::new("/dev/kvm")).is_ok();
    let boot = boot_id();
    if let Some(Cached { choice, .. }) = cached(&boot)
        && (openable || choice.accelerator == Accelerator::Tcg)
    {
        return choice;
    }
    let choice = match probe() {
        Ok(Kvm::Ordinary) => {
            Choice { accelerator: Accelerator::Kvm(Kvm::Ordinary), reason: "/dev/kvm runs guests by VMX or SVM".into() }
        }
        Ok(Kvm::Pvm) => Choice {
            accelerator: Accelerator::Kvm(Kvm::Pvm),
            reason: "/dev/kvm answers with the signature of a PVM host".into(),
        },
        Err(reason) => Choice { accelerator: Accelerator::Tcg, reason: format!("KVM is not usable: {reason}") },
    };
    // A device that is hidden from this caller may be there for the next.
    if openable {
        keep(&boot, &choice, false);
    }
    choice
}

/// Notes that a guest runs with this accelerator.
pub fn proved(accelerator: Accelerator) {
    let boot = boot_id();
    if let Some(cached) = cached(&boot)
        && cached.choice.accelerator == accelerator
        && !cached.proved
    {
        keep(&boot, &cached.choice, true);
    }
}

/// What is left when a guest did not boot with KVM. Where none ever did, KVM promised what it does not keep, and is not
/// asked again in this boot of the host; where one did, this guest alone has to do without.
pub fn kvm_failed(reason: &str) -> Choice {
    let boot = boot_id();
    let choice = Choice { accelerator: Accelerator::Tcg, reason: format!("KVM did not boot a guest: {reason}") };
    if !cached(&boot).is_some_and(|cached| cached.proved) {
        keep(&boot, &choice, false);
    }
    choice
}

/// Asks KVM itself what it is. The error is one clause.
///
/// # Errors
/// Why KVM is not usable.
pub fn probe() -> Result<Kvm, String> {
    let device = KvmDevice::new_with_path(DEVICE).map_err(|error| match error.errno() {
        libc_enoent if libc_enoent == rustix::io::Errno::NOENT.raw_os_error() => "there is no /dev/kvm".to_owned(),
        _ => format!("/dev/kvm cannot be opened: {error}"),
    })?;
    let vm = device.create_vm().map_err(|error| format!("/dev/kvm makes no machine: {error}"))?;
    let vcpu = vm.create_vcpu(0).map_err(|error| format!("/dev/kvm makes no virtual processor: {error}"))?;
    let entry = kvm_msr_entry { index: PVM_SIGNATURE_MSR, ..Default::default() };
    let mut msrs = Msrs::from_entries(&[entry]).map_err(|error| format!("its registers cannot be read: {error:?}"))?;
    let signature = match vcpu.get_msrs(&mut msrs) {
        Ok(1) => msrs.as_slice().first().map(|entry| entry.data),
        _ => None,
    };
    if signature == Some(PVM_SIGNATURE) {
        return Ok(Kvm::Pvm);
    }
    let virtualizes = std::arch::is_x86_feature_detected!("sse2") && processor_virtualizes();
    virtualizes
        .then_some(Kvm::Ordinary)
        .ok_or_else(|| "the processor has neither VMX nor SVM, and /dev/kvm is of no kind that runvm knows".to_owned())
}

fn processor_virtualizes() -> bool {
    let info = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    info.lines()
        .find(|line| line.starts_with("flags"))
        .is_some_and(|flags| flags.split_ascii_whitespace().any(|flag| flag == "vmx" || flag == "svm"))
}

fn cached(boot: &str) -> Option<Cached> {
    let cached: Cached = serde_json::from_str(&fs::read_to_string(CACHE).ok()?).ok()?;
    (!boot.is_empty() && cached.boot == boot).then_some(cached)
}

/// Without the file the next start probes again: losing it costs some milliseconds.
fn keep(boot: &str, choice: &Choice, proved: bool) {
    let cached = Cached { boot: boot.to_owned(), choice: choice.clone(), proved };
    let Ok(text) = serde_json::to_string(&cached) else { return };
    let temporary = format!("{CACHE}.{}", std::process::id());
    if fs::write(&temporary, text).and_then(|()| fs::rename(&temporary, CACHE)).is_err() {
        let _ = fs::remove_file(&temporary);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_asked_for_is_chosen() {
        assert_eq!(choose(Wanted::Tcg).unwrap().accelerator, Accelerator::Tcg);
        match (choose(Wanted::Kvm), probe()) {
            (Ok(choice), Ok(kvm)) => assert_eq!(choice.accelerator, Accelerator::Kvm(kvm)),
            (Err(refusal), Err(reason)) => assert!(refusal.to_string().contains(&reason)),
            disagreement => panic!("{disagreement:?}"),
        }
    }

    #[test]
    fn choices_survive_the_file() {
        let choice = Choice { accelerator: Accelerator::Kvm(Kvm::Pvm), reason: "why".into() };
        let text = serde_json::to_string(&choice).unwrap();
        assert_eq!(serde_json::from_str::<Choice>(&text).unwrap(), choice);
    }
}
