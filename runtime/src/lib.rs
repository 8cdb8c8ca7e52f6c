//! runvm: an OCI container runtime that gives every container its own virtual machine.
//!
//! One module per responsibility; each begins with a page that says what it owns. docs/architecture.md shows
//! how they make processes.

pub mod agent;
pub mod bundle;
pub mod cli;
pub mod container;
pub mod error;
pub mod host;
pub mod log;
pub mod monitor;
pub mod network;
pub mod pod;
pub mod sandbox;
pub mod share;
pub mod state;
pub mod template;
pub mod vmm;
