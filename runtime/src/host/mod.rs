//! What runvm does to the host: cgroups, hooks, processes and what they inherit.

mod block_io;
pub mod cgroup;
pub mod descriptor;
pub mod folder_socket;
pub mod fork;
pub mod hooks;
pub mod hostname;
pub mod idle;
pub mod oom;
pub mod process;
pub mod stand_in;
pub mod terminal;
pub mod user_namespace;

/// The ID of the host's current boot.
pub fn boot_id() -> String {
    std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default().trim().to_owned()
}
