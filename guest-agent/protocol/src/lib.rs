//! The wire between runvm on the host and its agent in the guest.
//!
//! There is one channel to a guest, and any number of byte streams on it, each opened by the host for one
//! of the [`ports`]. Where the machine has a socket device, each is a connection to [`VSOCK_PORT`]; where it offers
//! a single serial line, [`mux`] makes streams of it.
//!
//! The two ends do not trust each other: whatever is read here has a bound.

pub mod dns;
pub mod mux;
pub mod ports;

/// The messages of `proto/agent.proto`.
#[allow(warnings, reason = "generated")]
pub mod agent {
    include!(concat!(env!("OUT_DIR"), "/agent.rs"));
}

/// The service of `proto/agent.proto`: the client for the host, the trait and the server for the agent.
#[allow(warnings, reason = "generated")]
pub mod agent_ttrpc {
    include!(concat!(env!("OUT_DIR"), "/agent_ttrpc.rs"));
}

/// The virtio-serial port, as `/sys/class/virtio-ports/*/name` shows it, that carries the channel.
pub const SERIAL_PORT_NAME: &str = "runvm.agent";

/// The vsock port of the guest that carries the channel where the machine has a socket device: each connection of the
/// host's is one stream. The guest connects once to the same port of the host's, and is refused, to say that it listens.
/// The number is a privileged one, which only the guest's root may take.
pub const VSOCK_PORT: u32 = 1023;

/// The virtio-fs tag of the share.
pub const SHARE_TAG: &str = "runvm";

/// Where the guest mounts the share. Container `ID` finds its root at `rootfs/ID` below it, its volumes at
/// `mounts/ID/N` and `fresh/ID/N`.
pub const SHARE_MOUNT_POINT: &str = "/run/runvm/share";

/// The number of the first descriptor that a process is handed beside its stdio.
pub const PRESERVED_FIRST: i32 = 3;

/// How many there may be.
pub const MAX_PRESERVED: u32 = 64;

/// Where the guest has the memory that its containers share by names: the `/dev/shm` of a pod.
pub const SHARED_MEMORY: &str = "/run/runvm/shm";
