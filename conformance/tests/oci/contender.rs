//! The runtimes that are validated.

use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};
use conformance::enclosure::Enclosure;
use conformance::{Cmd, Runtime};

/// The programs kill as soon as they have started, and expect that a shell has set its traps by then. Whether it has is
/// chance, with runc too, and nothing tells.
const BEFORE_KILL: &str = r#"[ "$1" != kill ] || sleep 0.5"#;

/// A runtime, as the programs call it: by one word.
pub(crate) struct Contender {
    pub(crate) name: &'static str,
    /// What it is to the other suites; crun is nothing to them.
    pub(crate) runtime: Option<Runtime>,
    /// A script that starts it with a state root of its own.
    pub(crate) script: PathBuf,
    bundles: PathBuf,
}

impl Contender {
    /// runc, crun and runvm, in this order.
    pub(crate) fn all(enclosure: &Enclosure) -> [Self; 3] {
        let contender = |name, runtime| Self {
            name,
            runtime,
            script: enclosure.work().join("oci").join(name),
            // Where every user may go: some root of a container is none of the host's.
            bundles: enclosure.sockets().join("oci").join(name),
        };
        [
            contender(Runtime::Runc.name(), Some(Runtime::Runc)),
            contender("crun", None),
            contender(Runtime::Kvm.name(), Some(Runtime::Kvm)),
        ]
    }

    /// Writes the script.
    pub(crate) fn prepare(&self) -> Result<()> {
        let program = self.runtime.map_or_else(|| PathBuf::from("/usr/bin/crun"), Runtime::program);
        let options = self.runtime.map(Runtime::options).unwrap_or_default().join(" ");
        let root = self.script.with_extension("state");
        let (program, state) = (program.display(), root.display());
        let script = format!("#!/bin/sh\n{BEFORE_KILL}\nexec {program} --root {state} {options} \"$@\"\n");
        std::fs::create_dir_all(&root)?;
        std::fs::create_dir_all(&self.bundles)?;
        std::fs::write(&self.script, script)?;
        std::fs::set_permissions(&self.script, std::fs::Permissions::from_mode(0o755))?;
        Ok(())
    }

    /// Where the programs make their bundles.
    pub(crate) fn bundles(&self) -> &Path {
        &self.bundles
    }

    /// Deletes the containers that the programs have left.
    pub(crate) fn clean_up(&self) -> Result<()> {
        let left = Cmd::new(&self.script).args(["list", "--quiet"]).ok()?;
        for id in left.stdout.split_whitespace() {
            let delete = Cmd::new(&self.script).args(["delete", "--force", id]).ok();
            delete.with_context(|| format!("cannot delete what a program left of {}", self.name))?;
        }
        Ok(())
    }
}
