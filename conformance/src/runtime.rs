//! The runtimes under test.

use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use serde::Deserialize;

use crate::Cmd;
use crate::suite::next_number;

/// A runtime, and for runvm the accelerator it is told to use.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Runtime {
    /// The distribution's runc: it judges the tests.
    Runc,
    /// runvm on the machine's KVM.
    Kvm,
    /// runvm on QEMU's emulation.
    Tcg,
}

impl Runtime {
    /// All of them, the judge first.
    pub const ALL: [Self; 3] = [Self::Runc, Self::Kvm, Self::Tcg];

    /// The name under which engines know it and the suites report on it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Runc => "runc",
            Self::Kvm => "runvm-kvm",
            Self::Tcg => "runvm-tcg",
        }
    }

    /// The program.
    pub fn program(self) -> PathBuf {
        match self {
            Self::Runc => PathBuf::from("/usr/sbin/runc"),
            Self::Kvm | Self::Tcg => dist().join("bin/runvm"),
        }
    }

    /// The options that come before the verb.
    pub fn options(self) -> &'static [&'static str] {
        match self {
            Self::Runc => &[],
            Self::Kvm => &["--accel", "kvm"],
            Self::Tcg => &["--accel", "tcg"],
        }
    }

    /// A program in `folder` that calls it with its options, for a place that takes a program only.
    pub fn script(self, folder: &Path) -> Result<PathBuf> {
        let path = folder.join(self.name());
        if !path.exists() {
            let text = format!("#!/bin/sh\nexec {} {} \"$@\"\n", self.program().display(), self.options().join(" "));
            let draft = folder.join(format!("{}-{}", self.name(), next_number()));
            std::fs::write(&draft, text)?;
            std::fs::set_permissions(&draft, std::fs::Permissions::from_mode(0o755))?;
            std::fs::rename(&draft, &path)?;
        }
        Ok(path)
    }

    /// Whether this is runc.
    pub fn is_runc(self) -> bool {
        self == Self::Runc
    }
}

/// The program by which containerd drives runvm without runc's shim.
pub fn shim() -> PathBuf {
    dist().join("bin/containerd-shim-runvm-v2")
}

/// The folder that `make build` lays out like an install prefix.
pub fn dist() -> PathBuf {
    let default = || Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/dist");
    let dist = std::env::var_os("RUNVM_DIST").map_or_else(default, PathBuf::from);
    std::fs::canonicalize(&dist).unwrap_or(dist)
}

/// What of runvm this machine can be held to.
#[derive(Debug, Clone, Copy, Default)]
pub struct Available {
    /// runvm on KVM.
    pub kvm: bool,
    /// runvm on TCG.
    pub tcg: bool,
}

impl Available {
    /// Asks `runvm check`; nothing when `RUNVM_ONLY_RUNC` is set, no TCG when `RUNVM_WITHOUT_TCG` is.
    pub fn find() -> Result<Self> {
        if !runvm_is_tested()? {
            return Ok(Self::default());
        }
        let kvm = accelerator(&Runtime::Kvm.program())?.starts_with("kvm");
        Ok(Self { kvm, tcg: !asked("RUNVM_WITHOUT_TCG") })
    }

    /// Whether `runtime` can run here.
    pub fn has(self, runtime: Runtime) -> bool {
        match runtime {
            Runtime::Runc => true,
            Runtime::Kvm => self.kvm,
            Runtime::Tcg => self.tcg,
        }
    }
}

/// Whether runvm is to be tested, which `RUNVM_ONLY_RUNC` forbids; an error if it is and was not built.
pub fn runvm_is_tested() -> Result<bool> {
    if asked("RUNVM_ONLY_RUNC") {
        return Ok(false);
    }
    for program in [Runtime::Kvm.program(), shim()] {
        if !program.exists() {
            bail!("there is no {}: run `make build`, or set RUNVM_DIST or RUNVM_ONLY_RUNC=1", program.display());
        }
    }
    Ok(true)
}

fn asked(name: &str) -> bool {
    std::env::var_os(name).is_some_and(|value| value != "0")
}

#[derive(Deserialize)]
struct Check {
    accelerator: Option<String>,
}

/// What runvm would choose by itself; empty when it finds nothing.
fn accelerator(program: &Path) -> Result<String> {
    let output = Cmd::new(program).args(["check", "--json"]).run()?;
    let check: Check = serde_json::from_str(&output.stdout)
        .with_context(|| format!("`runvm check --json` printed no JSON:\n{}{}", output.stdout, output.stderr))?;
    Ok(check.accelerator.unwrap_or_default())
}
