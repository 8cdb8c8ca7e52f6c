//! What the suites work with and scripts make: root file systems (`images.sh`), a kernel (`cloud-kernel.sh`), an agent to
//! be afraid of (`evil-agent.sh`), the OCI's programs (`validation/build.sh`), and engines of later releases (`later.sh`).

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context, Result};
use serde_json::json;

use crate::Cmd;

/// The small one: one static program under all its names.
pub const BUSYBOX: &str = "busybox";

/// Debian with Python and Node.js.
pub const DEBIAN: &str = "debian";

/// What holds a pod's namespaces, alone.
pub const PAUSE: &str = "pause";
/// Debian with Docker's daemon.
pub const DOCKER: &str = "docker";

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

/// The folder with packages of a later release of the distribution, unpacked, from the cache.
pub fn later(release: &str, packages: &[&str]) -> Result<PathBuf> {
    Ok(PathBuf::from(script("later.sh").arg(release).args(packages).limit(BUILD_LIMIT).ok()?.text()))
}

/// An image in the form that `docker save` gives, which containerd imports.
pub struct Archive<'a> {
    /// Its reference, with a tag.
    pub name: &'a str,
    /// What [`tar`] knows its root file system by.
    pub root: &'a str,
    /// What it runs unless it is told otherwise.
    pub command: &'a [&'a str],
}

impl Archive<'_> {
    /// Writes it into an empty folder.
    pub fn write(&self, folder: &Path) -> Result<PathBuf> {
        let content = folder.join("content");
        std::fs::create_dir(&content)?;
        std::fs::copy(tar(self.root)?, content.join("layer.tar"))?;
        let sum = Cmd::new("sha256sum").arg(content.join("layer.tar")).ok()?;
        let sum = sum.text().split(' ').next().context("sha256sum prints a sum")?;
        let config = json!({
            "os": "linux",
            "architecture": if cfg!(target_arch = "aarch64") { "arm64" } else { "amd64" },
            "config": { "Env": ["PATH=/bin"], "Cmd": self.command },
            "rootfs": { "type": "layers", "diff_ids": [format!("sha256:{sum}")] },
        });
        let manifest = json!([{ "Config": "config.json", "RepoTags": [self.name], "Layers": ["layer.tar"] }]);
        std::fs::write(content.join("config.json"), config.to_string())?;
        std::fs::write(content.join("manifest.json"), manifest.to_string())?;
        let archive = folder.join("image.tar");
        Cmd::new("tar").arg("--create").arg("--file").arg(&archive).arg("--directory").arg(&content).arg(".").ok()?;
        Ok(archive)
    }
}

fn script(name: &str) -> Cmd {
    Cmd::new(Path::new(env!("CARGO_MANIFEST_DIR")).join(name))
}
