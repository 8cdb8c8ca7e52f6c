//! runc, as far as this machine's root may go.
//!
//! `--privileged` asks for every capability, and runc gives up where root itself lacks
//! one, as in many containers and cloud machines. That says nothing about runvm, whose
//! guest has them all. To be able to judge there too, runc is started by a script that
//! takes out of a bundle what this machine cannot give.

use std::fmt::Write as _;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use crate::Cmd;
use crate::runtime::Runtime;

/// The script.
pub struct Judge(PathBuf);

impl Judge {
    /// The name by which an engine knows it: engines keep "runc" for their own.
    pub const NAME: &'static str = "runc-judge";

    /// Writes the script into a folder.
    pub fn write(folder: &Path) -> Result<Self> {
        let mut script = "#!/bin/sh\n".to_owned();
        for name in missing_capabilities()? {
            // An engine's shim runs the runtime in the bundle's folder.
            writeln!(script, r#"[ ! -e config.json ] || sed -i 's/,"{name}"//g; s/"{name}",\?//g' config.json"#)?;
        }
        writeln!(script, "exec {} \"$@\"", Runtime::Runc.program().display())?;
        let path = folder.join(Self::NAME);
        std::fs::write(&path, script)?;
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755))?;
        Ok(Self(path))
    }

    /// What to start in the place of runc.
    pub fn program(&self) -> &Path {
        &self.0
    }
}

fn missing_capabilities() -> Result<Vec<String>> {
    let status = std::fs::read_to_string("/proc/self/status")?;
    let bound =
        status.lines().find_map(|line| line.strip_prefix("CapBnd:")).context("no CapBnd in /proc/self/status")?;
    let bound = u64::from_str_radix(bound.trim(), 16)?;
    // In the order of the kernel's numbers.
    let names = Cmd::new("setpriv").arg("--list-caps").ok()?;
    let missing = names.stdout.lines().enumerate().filter(|(number, _)| bound >> number & 1 == 0);
    Ok(missing.map(|(_, name)| format!("CAP_{}", name.to_uppercase())).collect())
}
