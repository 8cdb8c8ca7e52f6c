//! What the suites work with and scripts make: root file systems (`images.sh`), a kernel (`cloud-kernel.sh`), an agent to
//! be afraid of (`evil-agent.sh`), and the OCI's programs (`validation/build.sh`).

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use anyhow::Result;

use crate::Cmd;

/// The small one: one static program under all its names.
pub const BUSYBOX: &str = "busybox";

/// Debian with Python and Node.js.
pub const DEBIAN: &str = "debian";

/// How long the OCI's programs may take to build, where the suite did not build them before.
const BUILD_LIMIT: Duration = Duration::from_secs(600);

/// The tar of an image's root file system, from the cache.
pub fn tar(name: &str) -> Result<PathBuf> {
    // The script asks the package manager for versions, which takes its time.
    static KNOWN: Mutex<BTreeMap<String, PathBuf>> = Mutex::new(BTreeMap::new());
    let mut known = KNOWN.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(path) = known.get(name) {
        return Ok(path.clone());
    }
    let path = PathBuf::from(script("images.sh").arg(name).ok()?.text());
    known.insert(name.to_owned(), path.clone());
    Ok(path)
}

/// Unpacks an image into a new folder.
pub fn unpack(name: &str, folder: &Path) -> Result<()> {
    std::fs::create_dir_all(folder)?;
    Cmd::new("tar")
        .args(["--extract", "--numeric-owner", "--xattrs", "--file"])
        .arg(tar(name)?)
        .arg("--directory")
        .arg(folder)
        .ok()?;
    Ok(())
}

/// The folder of the distribution's kernel for cloud machines: `vmlinuz` and `modules`, from the cache.
pub fn cloud_kernel() -> Result<PathBuf> {
    Ok(PathBuf::from(script("cloud-kernel.sh").ok()?.text()))
}

/// The program of the agent that turns on its host.
pub fn evil_agent() -> Result<PathBuf> {
    Ok(PathBuf::from(script("evil-agent.sh").ok()?.text()))
}

/// The folder of the programs by which the OCI validates runtimes, from the cache.
pub fn validation_tools() -> Result<PathBuf> {
    Ok(PathBuf::from(script("validation/build.sh").limit(BUILD_LIMIT).ok()?.text()))
}

fn script(name: &str) -> Cmd {
    Cmd::new(Path::new(env!("CARGO_MANIFEST_DIR")).join(name))
}
