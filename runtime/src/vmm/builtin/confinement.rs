//! What the VM's process gives up, all of it before the guest runs.
//!
//! First the process as a whole: its file system is the tree of the exports and nothing else, its namespaces are empty, of
//! its capabilities those are left that making files for the guest takes. Then each of its threads for itself: what its
//! role does not take. docs/architecture.md has the table; `runtime/tests/confinement` shows what an attacker is left with.

use std::io;

use nix::libc;
use runvm_vmm::confinement::{Role, restrict};
use runvm_vmm::virtio::Kind;

use crate::share::{self, Export, Files, SetupError};

/// Leaves the host for the tree of these exports, which is returned ready to be served. The process must have no other
/// thread yet, and what it still needs of the host has to be open.
///
/// # Errors
/// What could not be shared, or not be given up.
pub fn enter(exports: &[Export]) -> Result<Files, SetupError> {
    keep_one_heap();
    // Kernels before 6.4 tell of the auxiliary vector in /proc alone, which is about to go.
    rustix::param::page_size();
    let file_system = share::enter(exports)?;
    share::confine::drop_privileges()?;
    Ok(file_system)
}

/// Leaves the calling thread what its role takes, for good.
///
/// # Errors
/// Where the host's kernel cannot.
pub fn confine(role: Role) -> io::Result<()> {
    if !matches!(role, Role::Vcpu | Role::Device(Kind::FileSystem)) {
        share::confine::drop_all_capabilities()?;
    }
    restrict(role).map_err(io::Error::other)
}

/// Makes all threads use one heap. The C library would give each its own, and once one of them shrinks, open a file in
/// /proc to learn whether it may; besides, most threads need next to nothing.
fn keep_one_heap() {
    #[cfg(target_env = "gnu")]
    // SAFETY: it changes a number that is looked at when a thread first asks for memory.
    unsafe {
        libc::mallopt(libc::M_ARENA_MAX, 1)
    };
}
