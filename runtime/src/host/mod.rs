//! What runvm does to the host: cgroups, hooks, processes and what they inherit.

pub mod cgroup;
pub mod hooks;
pub mod process;
pub mod terminal;
