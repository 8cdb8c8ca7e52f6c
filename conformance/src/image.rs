//! Root file systems, as `images.sh` builds them.

use std::path::{Path, PathBuf};

use anyhow::Result;

use crate::Cmd;

/// The small one: one static program under all its names.
pub const BUSYBOX: &str = "busybox";

/// Debian with Python and Node.js.
pub const DEBIAN: &str = "debian";

/// The tar of an image's root file system, from the cache.
pub fn tar(name: &str) -> Result<PathBuf> {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("images.sh");
    Ok(Cmd::new(script).arg(name).ok()?.text().into())
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
