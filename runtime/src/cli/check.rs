//! `check`: each thing that a guest needs of this machine, whether it is there, and what to do where it is not.

use std::fs;
use std::path::Path;

use serde::Serialize;

use super::print;
use crate::error::{Error, Result};
use crate::monitor::Globals;
use crate::vmm::assets::Assets;
use crate::vmm::probe::{self, Accelerator, Choice, Kvm};
use crate::vmm::{Qemu, VmmError};

/// One requirement.
#[derive(Debug, Serialize)]
struct Requirement {
    name: &'static str,
    met: bool,
    /// A requirement that is not met stops guests, unless it is only wanted.
    required: bool,
    found: String,
    /// What to do; empty where it is met.
    remedy: String,
}

impl Requirement {
    fn new<E: ToString>(
        name: &'static str,
        required: bool,
        found: std::result::Result<String, E>,
        remedy: &str,
    ) -> Self {
        match found {
            Ok(found) => Self { name, met: true, required, found, remedy: String::new() },
            Err(error) => Self { name, met: false, required, found: error.to_string(), remedy: remedy.to_owned() },
        }
    }
}

#[derive(Debug, Serialize)]
struct Report {
    /// Whether guests can be started.
    ready: bool,
    /// What runs them; empty where it is demanded and not usable.
    accelerator: String,
    reason: String,
    requirements: Vec<Requirement>,
}

/// Prints the report; 0 where guests can be started, else 1.
pub fn check(globals: &Globals, json: bool) -> Result<u8> {
    let report = report(globals);
    if json {
        let text = serde_json::to_string_pretty(&report).map_err(|error| Error::system("write the report")(error))?;
        print(&format!("{text}\n"))?;
    } else {
        print(&describe(&report))?;
    }
    Ok(u8::from(!report.ready))
}

fn report(globals: &Globals) -> Report {
    let choice = probe::choose(globals.vm.accelerator);
    let assets = Assets::find();
    let mut requirements = vec![root(), kvm()];
    if let Ok(Choice { accelerator, .. }) = &choice {
        let accelerator = *accelerator;
        let install = "install runvm's files again (`make install`), or set RUNVM_ASSETS to their folder";
        let shown = |path: std::path::PathBuf| path.display().to_string();
        requirements.push(Requirement::new("guest kernel", true, assets.kernel(accelerator).map(shown), install));
        requirements.push(Requirement::new("guest initramfs", true, assets.initramfs().map(shown), install));
    }
    let executes = choice.as_ref().map_or(Accelerator::Tcg, |choice| choice.accelerator);
    requirements.extend([
        qemu(globals.vm.needs_qemu(executes)),
        device("tun device", "/dev/net/tun", "load the module tun"),
        cgroups(),
    ]);
    let (accelerator, reason) = match &choice {
        Ok(choice) => (choice.accelerator.to_string(), choice.reason.clone()),
        Err(error) => (String::new(), error.to_string()),
    };
    let ready = choice.is_ok() && requirements.iter().all(|requirement| requirement.met || !requirement.required);
    Report { ready, accelerator, reason, requirements }
}

fn root() -> Requirement {
    let root = rustix::process::geteuid().is_root();
    let found = if root { Ok("running as root".to_owned()) } else { Err("not running as root") };
    Requirement::new("root", true, found, "run it as root: namespaces and mounts need that")
}

fn kvm() -> Requirement {
    let found = probe::probe().map(|kvm| match kvm {
        Kvm::Ordinary => "/dev/kvm, by VMX or SVM".to_owned(),
        Kvm::Pvm => "/dev/kvm, of the PVM kind".to_owned(),
    });
    let remedy = "load kvm_intel or kvm_amd, or let the hypervisor below this machine nest; without it guests run \
                  under QEMU's translator, several times slower";
    Requirement::new("KVM", false, found, remedy)
}

fn qemu(required: bool) -> Requirement {
    let found = match Qemu::installed() {
        true => Ok("in PATH".to_owned()),
        false => Err(VmmError::Program { program: "qemu-system-x86_64", package: "qemu-system-x86" }),
    };
    Requirement::new("QEMU", required, found, "apt-get install qemu-system-x86: guests without KVM run under it")
}

fn device(name: &'static str, path: &str, remedy: &str) -> Requirement {
    let found = fs::File::options().read(true).write(true).open(Path::new(path)).map(|_| path.to_owned());
    let found = found.map_err(|error| format!("{path} cannot be opened: {error}"));
    Requirement::new(name, true, found, remedy)
}

fn cgroups() -> Requirement {
    let mounted = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    let found = match (mounted.contains(" - cgroup "), mounted.contains(" - cgroup2 ")) {
        (true, _) => Ok("version 1".to_owned()),
        (false, true) => Ok("version 2".to_owned()),
        (false, false) => Err("no hierarchy is mounted"),
    };
    Requirement::new("cgroups", false, found, "mount cgroup2 on /sys/fs/cgroup: limits hold in the guest only")
}

fn describe(report: &Report) -> String {
    let mut text = String::new();
    for requirement in &report.requirements {
        let mark = match (requirement.met, requirement.required) {
            (true, _) => "ok     ",
            (false, true) => "MISSING",
            (false, false) => "without",
        };
        text.push_str(&format!("{mark}  {}: {}\n", requirement.name, requirement.found));
        if !requirement.met {
            text.push_str(&format!("         -> {}\n", requirement.remedy));
        }
    }
    if !report.accelerator.is_empty() {
        text.push_str(&format!("accelerator: {} ({})\n", report.accelerator, report.reason));
    } else {
        text.push_str(&format!("accelerator: none ({})\n", report.reason));
    }
    let slow = report.accelerator == Accelerator::Tcg.to_string();
    text.push_str(match (report.ready, slow) {
        (true, false) => "this machine runs guests\n",
        (true, true) => "this machine runs guests, slowly\n",
        (false, _) => "this machine cannot run guests yet\n",
    });
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_gap_is_shown_with_its_remedy() {
        let requirement = Requirement::new("QEMU", true, Err::<String, _>("not there"), "install it");
        let report =
            Report { ready: false, accelerator: "tcg".into(), reason: "why".into(), requirements: vec![requirement] };
        let text = describe(&report);
        assert!(text.contains("MISSING  QEMU: not there") && text.contains("-> install it"), "{text}");
        assert!(text.contains("cannot run guests"), "{text}");
    }
}
