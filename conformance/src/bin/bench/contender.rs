//! The runtimes that are measured.

use std::path::PathBuf;

use anyhow::{Result, ensure};
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
}

impl Contender {
    /// runc, crun and runsc of the distribution, and runvm.
    pub(crate) fn all() -> Result<Vec<Self>> {
        let runvm = dist().join("bin/runvm");
        ensure!(runvm.exists(), "there is no {}: run `make build`, or set RUNVM_DIST", runvm.display());
        Ok(vec![
            Self { name: "runc", program: "/usr/sbin/runc".into(), options: &[], alone: &[] },
            Self { name: "crun", program: "/usr/bin/crun".into(), options: &[], alone: &[] },
            Self {
                name: "runsc",
                program: "/usr/bin/runsc".into(),
                // The distribution's runsc knows no cgroup v1 beside v2, and its other
                // platform wants a KVM with hardware's help.
                options: &["--ignore-cgroups", "--platform=ptrace"],
                alone: &["--network=none"],
            },
            Self { name: "runvm", program: runvm, options: &[], alone: &[] },
        ])
    }
}
