//! runvm's own virtual machine monitor.
//!
//! This crate knows machines and devices, and nothing of containers. A machine is a KVM virtual machine with plain
//! memory, an interrupt controller, processors and virtio devices over MMIO; no firmware, no PCI, no ACPI. All of its
//! devices are served in the process that owns it, each by a thread of its own.
//!
//! Everything that a guest writes, into registers or into memory, is hostile: it can end or damage its own machine, and
//! reach nothing beyond what its devices were given.

pub mod confinement;
pub mod door;
mod event;
pub mod machine;
pub mod virtio;
mod watch;

pub use event::Event;
pub use watch::Watch;

/// A guest's memory, as its devices see it.
pub type Memory = std::sync::Arc<vm_memory::GuestMemoryMmap>;
