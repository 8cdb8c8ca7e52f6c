//! Virtual machines: what runvm needs of one, the backends that make one, and the choice of the accelerator.
//!
//! Nothing above this module knows a backend. A backend gets a [`Machine`] and answers with a [`Vm`]: a process that
//! ends with its owner, and a [`Channel`] to the agent inside.

pub mod assets;
pub mod builtin;
mod configuration;
mod options;
mod parameters;
pub mod probe;
mod qemu;

use std::any::Any;
use std::io;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use thiserror::Error;
use tokio::io::unix::AsyncFd;
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, Interest};
use tokio::process::Child;
use tokio::sync::oneshot;

use crate::host::cgroup::{Cgroup, CgroupError};
use crate::host::process::ProcessIdentity;
use crate::log;
use crate::share::{self, Export, Served, ShareError};
use crate::template::TemplateError;
pub use builtin::{Blank, Builtin};
pub use configuration::{Configuration, ConfigurationError};
pub use options::{Arguments, Options};
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
    /// The host's files that the guest sees.
    pub exports: Vec<Export>,
    /// Network devices.
    pub nics: Vec<Nic>,
    /// Network devices that the guest learns of when something is to be connected to them.
    pub spare_nics: Vec<Nic>,
    /// Where the guest's console goes; none makes the fastest start.
    pub console: Option<PathBuf>,
    /// Where the VM's processes log.
    pub log: log::Options,
    /// The cgroup that the VM's processes are born in, where that is not this process's own.
    pub cgroup: Option<Arc<Cgroup>>,
    /// A process for the built-in VMM's machine, where one has begun.
    pub blank: Option<Blank>,
}

impl Machine {
    /// Those that the guest is told of, and the others.
    fn all_nics(&self) -> impl Iterator<Item = &Nic> {
        self.nics.iter().chain(&self.spare_nics)
    }
}

/// Has a process of a VM be born where it belongs. To be called before the command's descriptors are arranged.
fn settle(command: &mut Command, cgroup: Option<&Arc<Cgroup>>) -> Result<(), VmmError> {
    Ok(cgroup.map_or(Ok(()), |cgroup| cgroup.adopt(command))?)
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
    /// The files cannot be shared.
    #[error(transparent)]
    Share(#[from] ShareError),
    /// A template is missing or out of reach.
    #[error(transparent)]
    Template(#[from] TemplateError),
    /// The built-in VMM has no machine for this guest; why, as a clause.
    #[error("there is no machine: {0}")]
    Machine(String),
    /// The built-in VMM is for KVM alone.
    #[error("the built-in VMM needs KVM: use `--vmm qemu`, or leave the choice to runvm")]
    NotKvm,
    /// The guest switched its machine off before its agent listened.
    #[error("its guest gave up before the agent listened")]
    GaveUp,
    /// Templates are the built-in VMM's.
    #[error("only machines of the built-in VMM, which needs KVM, have templates")]
    NoTemplates,
    /// Its processes have no place.
    #[error(transparent)]
    Cgroup(#[from] CgroupError),
    /// The VMM cannot be started.
    #[error("cannot start the VMM")]
    Start(#[source] io::Error),
}

/// Where the way to a machine's agent is told.
pub type Early = oneshot::Sender<Arc<dyn Channel>>;

/// A backend.
#[async_trait]
pub trait Vmm: Send + Sync {
    /// Starts a machine. Its guest may still be booting when this returns. The way to its agent is sent to `early` as soon
    /// as streams can be opened, which may be before: the agent has what is sent to it by then when it comes to listen.
    ///
    /// # Errors
    /// [`VmmError`].
    async fn boot(&self, machine: Machine, early: Early) -> Result<Vm, VmmError>;
}

/// A running machine. It ends when this is dropped, and with the thread that started its process.
pub struct Vm {
    /// The VMM's process.
    process: Child,
    identity: ProcessIdentity,
    /// Serves the files, where that is not the VMM's own business.
    share: Option<share::Daemon>,
    words: Words,
    /// The name of the template that it was forked from.
    pub template: Option<String>,
    /// The way to its agent.
    pub channel: Arc<dyn Channel>,
    /// How many streams the channel has at once.
    pub streams: usize,
    /// Where the guest finds the network devices of which it was not told, as for its kernel's parameter
    /// `virtio_mmio.device`.
    pub spare_nics: Vec<String>,
}

/// What a VMM says at its end, to be read once it has ended.
type Words = Option<Box<dyn AsyncRead + Send + Sync + Unpin>>;

/// How much of what the VMM said at its end is told, in bytes.
const MAX_LAST_WORDS: u64 = 2048;

impl Vm {
    /// The processes that make it up.
    pub fn processes(&self) -> Vec<ProcessIdentity> {
        let share = self.share.as_ref().and_then(|share| ProcessIdentity::of(share.pid()));
        std::iter::once(self.identity).chain(share).collect()
    }

    /// The share that its guest sees.
    ///
    /// # Errors
    /// Those of pidfd_open(2) and dup(2).
    pub fn files(&self) -> io::Result<Served> {
        let server = match &self.share {
            Some(share) => share.pidfd().try_clone_to_owned()?,
            None => self.identity.open()?,
        };
        Ok(Served::by(server))
    }

    /// Waits until it is no more; why, as a clause.
    pub async fn ended(&mut self) -> String {
        let Self { process, share, words, .. } = self;
        tokio::select! {
            reason = last_words(process, words) => reason,
            () = share_ended(share.as_ref()) => "its virtio-fs daemon ended".to_owned(),
        }
    }
}

async fn share_ended(share: Option<&share::Daemon>) {
    let Some(share) = share else { return std::future::pending().await };
    // Where the descriptor cannot be watched, the VMM shows the end: it does not outlive its share's connection for long.
    // SAFETY: the descriptor stays open and the same as long as `share` is borrowed, which outlives the registration.
    match unsafe { AsyncFd::register_with_interest(share.pidfd(), Interest::READABLE) } {
        Ok(pidfd) => drop(pidfd.readable().await),
        Err(_) => std::future::pending().await,
    }
}

/// Waits for the VMM's end; how it ended and what it said.
async fn last_words(process: &mut Child, words: &mut Words) -> String {
    let status = process.wait().await;
    let mut said = Vec::new();
    if let Some(words) = words.take() {
        let mut words = words.take(MAX_LAST_WORDS);
        // A descendant may hold the pipe open: what is there is read, no more is waited for.
        let _ = tokio::time::timeout(Duration::from_secs(1), words.read_to_end(&mut said)).await;
    }
    let said = String::from_utf8_lossy(&said).replace(char::is_control, " ");
    match status {
        Ok(status) if said.trim().is_empty() => format!("the VMM ended ({status})"),
        Ok(status) => format!("the VMM ended ({status}): {}", said.trim()),
        Err(error) => format!("the VMM cannot be waited for: {error}"),
    }
}

/// Any number of byte streams to the agent.
#[async_trait]
pub trait Channel: Send + Sync {
    /// Opens a stream, whose port is still to be announced.
    async fn open(&self) -> io::Result<ByteStream>;
}

/// A stream to the agent.
pub type ByteStream = Box<dyn AsyncStream>;

/// What a stream can do, and what else it may be: a socket.
pub trait AsyncStream: AsyncRead + AsyncWrite + Send + Sync + Unpin + Any {}
impl<T: AsyncRead + AsyncWrite + Send + Sync + Unpin + Any> AsyncStream for T {}
