//! The programs of the OCI's runtime-tools.

use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use conformance::Cmd;
use conformance::enclosure::{cgroup_hierarchies, remove_cgroup};
use conformance::tap::Assertions;

use crate::contender::Contender;

/// The slowest takes a quarter of a minute.
const LIMIT: Duration = Duration::from_secs(120);

/// The topmost of the cgroups in which the programs' containers are.
const CGROUPS: [&str; 2] = ["cgrouptest", "testdir"];

/// What every program is held to, beside its own assertions.
const ENDS_WELL: &str = "ends well, and says so where it says nothing else";

/// One program.
pub(crate) struct Program {
    path: PathBuf,
    name: String,
}

impl Program {
    /// All programs in the folder that `validation/build.sh` has made.
    pub(crate) fn all(tools: &Path) -> Result<Vec<Self>> {
        let folder = tools.join("programs");
        let mut programs = Vec::new();
        for entry in std::fs::read_dir(&folder).with_context(|| format!("cannot read {}", folder.display()))? {
            let path = entry?.path();
            let name = path.file_name().context("a program has a name")?.to_string_lossy().into_owned();
            programs.push(Self { path, name });
        }
        ensure!(!programs.is_empty(), "there is no program in {}", folder.display());
        programs.sort_by(|one, other| one.name.cmp(&other.name));
        Ok(programs)
    }

    /// Its name.
    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    /// Runs it against a runtime.
    pub(crate) fn run(&self, contender: &Contender) -> Result<Assertions> {
        // All that look at cgroups use the same.
        static OF_CGROUPS: Mutex<()> = Mutex::new(());
        let of_cgroups = self.name.contains("cgroup") || self.name.ends_with("_resources");
        let _alone = of_cgroups.then(|| OF_CGROUPS.lock().unwrap_or_else(PoisonError::into_inner));
        let tools = self.path.ancestors().nth(2).context("the programs lie in a folder")?;
        let program = Cmd::new(&self.path).current_dir(tools).env("RUNTIME", &contender.script);
        let output = program.env("TMPDIR", contender.bundles()).limit(LIMIT).run()?;
        let mut found = Assertions::parse(&output.stdout);
        // Those of hooks make no assertion, and report an error in a note.
        let error = found.is_empty() && output.stdout.contains("\"error\": ");
        found.add(ENDS_WELL, output.code == 0 && !error);
        Ok(found)
    }
}

/// Removes what the programs and the runtimes leave of the programs' cgroups.
pub(crate) fn remove_cgroups() -> Result<()> {
    for hierarchy in cgroup_hierarchies()? {
        CGROUPS.iter().for_each(|name| remove_cgroup(&hierarchy.join(name)));
    }
    Ok(())
}
