//! The runtimes that are measured.

use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use anyhow::{Result, ensure};
use conformance::Runtime;
use conformance::enclosure::leave_hybrid_cgroups;
use conformance::runtime::dist;

/// A runtime and how it is called.
pub(crate) struct Contender {
    /// Its name, in the table and for Docker.
    pub(crate) name: &'static str,
    /// Its program.
    pub(crate) program: PathBuf,
    /// What it needs before every verb.
    pub(crate) options: &'static [&'static str],
    /// What it needs besides for containers without any network, which by hand they all are.
    pub(crate) alone: &'static [&'static str],
    /// What containerd's shims know it by; `None` where it has none of its own.
    pub(crate) shim: Option<Runtime>,
}

impl Contender {
    /// runc, crun and runsc of the distribution, runvm as a user gets it, and runvm without templates. `folder` is for what they need.
    pub(crate) fn all(folder: &Path) -> Result<Vec<Self>> {
        leave_hybrid_cgroups()?;
        let runvm = dist().join("bin/runvm");
        ensure!(runvm.exists(), "there is no {}: run `make build`, or set RUNVM_DIST", runvm.display());
        Ok(vec![
            Self {
                name: "runc",
                program: "/usr/sbin/runc".into(),
                options: &[],
                alone: &[],
                shim: Some(Runtime::Runc),
            },
            Self { name: "crun", program: "/usr/bin/crun".into(), options: &[], alone: &[], shim: None },
            Self {
                name: "runsc",
                program: runsc(folder)?,
                // The distribution's runsc knows no cgroup v1 beside v2, its other platform
                // wants a KVM with hardware's help, and its own network stack does not
                // start on newer kernels.
                options: &["--ignore-cgroups", "--platform=ptrace", "--network=host"],
                alone: &["--network=none"],
                // The distribution does not ship it.
                shim: None,
            },
            Self { name: "runvm", program: runvm.clone(), options: &[], alone: &[], shim: Some(Runtime::Kvm) },
            Self { name: "runvm-cold", program: runvm, options: &["--template=off"], alone: &[], shim: None },
        ])
    }
}

/// runsc starts only where its temporary folder is the system's.
fn runsc(folder: &Path) -> Result<PathBuf> {
    let path = folder.join("runsc");
    std::fs::write(&path, "#!/bin/sh\nTMPDIR=/tmp exec /usr/bin/runsc \"$@\"\n")?;
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755))?;
    Ok(path)
}
