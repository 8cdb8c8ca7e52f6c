//! What a template depends on.

use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;

use runvm_vmm::machine::Flavour;
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

/// All that has to be the same for a machine to be forked from a template. What the processor is like is not among it:
/// that is compared when the machine is restored.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Shape {
    /// The host's boot: clocks and drivers of another one differ.
    pub boot: String,
    /// The program, which is the VMM too.
    pub program: FileIdentity,
    /// The guest's kernel.
    pub kernel: FileIdentity,
    /// The archive with the agent.
    pub initramfs: FileIdentity,
    /// The kernel's parameters.
    pub parameters: String,
    /// The device of KVM, which is another once KVM was loaded anew.
    pub kvm: FileIdentity,
    /// The kind of KVM.
    pub flavour: Flavour,
    /// Processors.
    pub vcpus: u32,
    /// Memory, in bytes.
    pub memory: u64,
    /// Network devices.
    pub nics: usize,
    /// Network devices that the guest is not told of.
    #[serde(default)]
    pub spare_nics: usize,
}

impl Shape {
    /// The name that a template of this shape has.
    pub fn key(&self) -> String {
        // A map of plain fields, which has a text.
        let text = serde_json::to_vec(self).unwrap_or_default();
        Sha256::digest(text).iter().take(8).map(|byte| format!("{byte:02x}")).collect()
    }
}

/// A file, told from every other and from itself before any change.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileIdentity {
    device: u64,
    inode: u64,
    size: u64,
    modified: (i64, i64),
    changed: (i64, i64),
}

impl FileIdentity {
    /// The identity of the file at this path.
    ///
    /// # Errors
    /// Those of stat(2).
    pub fn of(path: &Path) -> io::Result<Self> {
        let status = fs::metadata(path)?;
        Ok(Self {
            device: status.dev(),
            inode: status.ino(),
            size: status.size(),
            modified: (status.mtime(), status.mtime_nsec()),
            changed: (status.ctime(), status.ctime_nsec()),
        })
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    pub(in crate::template) fn shape(vcpus: u32) -> Shape {
        let file = FileIdentity::of(Path::new("/proc/self/exe")).unwrap();
        Shape {
            boot: "boot".into(),
            program: file,
            kernel: file,
            initramfs: file,
            parameters: "quiet".into(),
            kvm: file,
            flavour: Flavour::Pvm,
            vcpus,
            memory: 1 << 30,
            nics: 1,
            spare_nics: 0,
        }
    }

    #[test]
    fn each_shape_has_its_own_key() {
        assert_eq!(shape(1).key(), shape(1).key());
        assert_ne!(shape(1).key(), shape(2).key());
        assert_eq!(shape(1).key().len(), 16);
    }

    #[test]
    fn a_file_that_was_touched_is_another() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("kernel");
        fs::write(&path, "a").unwrap();
        let before = FileIdentity::of(&path).unwrap();
        assert_eq!(FileIdentity::of(&path).unwrap(), before);
        fs::write(dir.path().join("new"), "a").unwrap();
        fs::rename(dir.path().join("new"), &path).unwrap();
        assert_ne!(FileIdentity::of(&path).unwrap(), before);
    }
}
