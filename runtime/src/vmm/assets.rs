//! The files that an installation brings: the guest's kernels and its initramfs.

use std::env;
use std::path::{Path, PathBuf};

use thiserror::Error;

use super::probe::{Accelerator, Kvm};

/// Names the folder of the files, instead of the installation's.
pub const OVERRIDE: &str = "RUNVM_ASSETS";

/// A file that is not there.
#[derive(Debug, Error)]
#[error("{what} {path} is missing: install runvm's files again, or set {OVERRIDE} to their folder", path = path.display())]
pub struct AssetError {
    what: &'static str,
    path: PathBuf,
}

/// The folder of the files.
#[derive(Clone, Debug)]
pub struct Assets(PathBuf);

impl Assets {
    /// The folder named by [`OVERRIDE`], else `lib/runvm` beside the program's `bin`, else the system's.
    pub fn find() -> Self {
        if let Some(folder) = env::var_os(OVERRIDE) {
            return Self(folder.into());
        }
        let beside = env::current_exe().ok().and_then(|program| Some(program.parent()?.parent()?.join("lib/runvm")));
        Self(beside.filter(|folder| folder.is_dir()).unwrap_or_else(|| "/usr/lib/runvm".into()))
    }

    /// The kernel that boots with this accelerator.
    ///
    /// # Errors
    /// [`AssetError`] where it is missing.
    pub fn kernel(&self, accelerator: Accelerator) -> Result<PathBuf, AssetError> {
        match accelerator {
            Accelerator::Kvm(Kvm::Pvm) => self.file("the guest kernel for PVM hosts", "vmlinux-pvm"),
            Accelerator::Kvm(Kvm::Ordinary) | Accelerator::Tcg => self.file("the guest kernel", "vmlinux"),
        }
    }

    /// The archive that holds the agent.
    ///
    /// # Errors
    /// [`AssetError`] where it is missing.
    pub fn initramfs(&self) -> Result<PathBuf, AssetError> {
        self.file("the guest's initramfs", "initramfs.cpio")
    }

    /// The folder.
    pub fn folder(&self) -> &Path {
        &self.0
    }

    fn file(&self, what: &'static str, name: &str) -> Result<PathBuf, AssetError> {
        let path = self.0.join(name);
        if path.is_file() { Ok(path) } else { Err(AssetError { what, path }) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_file_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let assets = Assets(dir.path().to_owned());
        std::fs::write(dir.path().join("vmlinux"), "").unwrap();
        assert!(assets.kernel(Accelerator::Tcg).is_ok());
        let message = assets.kernel(Accelerator::Kvm(Kvm::Pvm)).unwrap_err().to_string();
        assert!(message.contains("vmlinux-pvm") && message.contains(OVERRIDE), "{message}");
    }
}
