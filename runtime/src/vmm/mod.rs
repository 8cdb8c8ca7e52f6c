//! Virtual machines: what runvm needs of one, the backends that make one, and the choice of the accelerator.
//!
//! Nothing above this module knows a backend. A backend gets a [`Machine`] and answers with a [`Vm`]: a process that
//! ends with its owner, and a [`Channel`] to the agent inside.

pub mod assets;
pub mod probe;
mod qemu;

use std::io;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::Arc;

use async_trait::async_trait;
use thiserror::Error;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::process::Child;

use crate::host::process::ProcessIdentity;
use probe::Accelerator;
pub use qemu::Qemu;

/// The parts of a machine.
#[derive(Debug)]
pub struct Machine {
    /// What executes the guest's instructions.
    pub accelerator: Accelerator,
    /// Virtual processors, at least 1.
    pub vcpus: u32,
    /// Memory in bytes, a multiple of 1 MiB.
    pub memory: u64,
    /// The virtio-fs daemon's vhost-user connection.
    pub share: OwnedFd,
    /// Network devices.
    pub nics: Vec<Nic>,
    /// Where the guest's console goes; none makes the fastest start.
    pub console: Option<PathBuf>,
}

/// A network device over a tap of the host.
#[derive(Debug)]
pub struct Nic {
    /// The tap, with virtio-net headers.
    pub tap: OwnedFd,
    /// The address that the guest finds it by.
    pub mac: [u8; 6],
}

/// Why there is no machine.
#[derive(Debug, Error)]
pub enum VmmError {
    /// A file of the installation is missing.
    #[error(transparent)]
    Asset(#[from] assets::AssetError),
    /// The backend's program is missing.
    #[error("{program} is not in PATH: install the package {package}")]
    Program {
        /// The program's name.
        program: &'static str,
        /// The distribution's package that has it.
        package: &'static str,
    },
    /// The VMM cannot be started.
    #[error("cannot start the VMM")]
    Start(#[source] io::Error),
}

/// A backend.
pub trait Vmm: Send + Sync {
    /// Starts a machine. The guest boots while this returns.
    ///
    /// # Errors
    /// [`VmmError`].
    fn boot(&self, machine: Machine) -> Result<Vm, VmmError>;
}

/// A running machine.
pub struct Vm {
    /// The VMM's process.
    pub process: Child,
    /// The same, for records.
    pub identity: ProcessIdentity,
    /// The way to its agent.
    pub channel: Arc<dyn Channel>,
}

/// Any number of byte streams to the agent.
#[async_trait]
pub trait Channel: Send + Sync {
    /// Opens a stream, whose port is still to be announced.
    async fn open(&self) -> io::Result<ByteStream>;
}

/// A stream to the agent.
pub type ByteStream = Box<dyn AsyncStream>;

/// What a stream can do.
pub trait AsyncStream: AsyncRead + AsyncWrite + Send + Sync + Unpin {}
impl<T: AsyncRead + AsyncWrite + Send + Sync + Unpin> AsyncStream for T {}
