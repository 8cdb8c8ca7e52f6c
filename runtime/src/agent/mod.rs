//! The host's end of the channel to a guest's agent.
//!
//! The guest is hostile: each answer is waited for with a bound, and what it says is passed on as data only.

pub mod preserved;
mod splice;
mod stdio;
mod streams;
mod tunnel;

use std::future::{Future, ready};
use std::io;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use runvm_protocol::agent::{self as wire, ProcessRequest};
use runvm_protocol::agent_ttrpc::AgentClient;
use runvm_protocol::ports;
use thiserror::Error;
use tokio::sync::watch;
use ttrpc::asynchronous::transport::Socket;
use ttrpc::context::{self, Context};

use crate::bundle::GuestSpec;
use crate::log;
use crate::vmm::{ByteStream, Channel};

pub use stdio::{Descriptors, Relay, RunningRelay, Sink, Source};
pub use streams::{Plan, Streams};
pub use tunnel::{MonitorSocket, Tunnel};

/// How long a guest may take for an answer, except to the question when a process ends.
const ANSWER_LIMIT: Duration = Duration::from_secs(30);
/// How long a guest may take to tell the end of a process that it has killed.
pub const KILL_LIMIT: Duration = Duration::from_secs(10);
/// The longest sentence of a guest that is passed on, in bytes.
const MAX_SENTENCE: usize = 4096;

/// Why the agent did not do what it was asked.
#[derive(Debug, Error)]
pub enum AgentError {
    /// It said why.
    #[error("{message}")]
    Refused {
        /// The kind, by ttrpc's codes.
        code: ttrpc::Code,
        /// Its sentence.
        message: String,
    },
    /// It did not answer.
    #[error("the guest does not answer (request {request}, waited {} s): its VM hangs or was overloaded", ANSWER_LIMIT.as_secs())]
    Silent {
        /// The method.
        request: &'static str,
    },
    /// It does not say that a process has ended that cannot live any more.
    #[error("the guest does not tell the end of a process that was killed {} s ago", KILL_LIMIT.as_secs())]
    Undead,
    /// The channel is gone.
    #[error("the channel to the guest is closed")]
    Channel(#[source] io::Error),
}

impl AgentError {
    /// Whether what was asked for is not there, a process that has ended above all.
    pub fn is_not_found(&self) -> bool {
        matches!(self, Self::Refused { code: ttrpc::Code::NOT_FOUND, .. })
    }

    /// Whether the guest is gone, and with it all that ran in it.
    pub fn is_end_of_guest(&self) -> bool {
        matches!(self, Self::Channel(_))
    }

    fn from_ttrpc(error: ttrpc::Error) -> Self {
        match error {
            ttrpc::Error::RpcStatus(status) => {
                let mut message = status.message().replace(char::is_control, " ");
                message.truncate(message.floor_char_boundary(MAX_SENTENCE));
                Self::Refused { code: status.code(), message }
            }
            other => Self::Channel(io::Error::other(other.to_string())),
        }
    }
}

type Result<T> = std::result::Result<T, AgentError>;

/// A connection to the agent.
#[derive(Clone)]
pub struct Agent {
    channel: Arc<dyn Channel>,
    client: AgentClient,
}

/// How a process of the guest ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Exit {
    /// 0 to 255; 128 and more for a signal.
    pub status: u8,
    /// The guest's kernel killed a process of the container for want of memory.
    pub oom_killed: bool,
    /// How much of its output was handed over. Its streams may stay open: a child in the background can hold them.
    pub output: Output,
}

/// Bytes of a process's output.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Output {
    /// On stdout, or on the terminal.
    pub stdout: u64,
    /// On stderr.
    pub stderr: u64,
}

impl Agent {
    /// Connects for control. This returns before the agent has shown that it is there; the first call does.
    ///
    /// # Errors
    /// [`AgentError::Channel`].
    pub async fn connect(channel: Arc<dyn Channel>) -> Result<Self> {
        let stream = open(&*channel, ports::CONTROL).await?;
        let client = AgentClient::new(ttrpc::asynchronous::Client::new(Socket::new(stream)));
        Ok(Self { channel, client })
    }

    /// Opens a stream for one of the [`ports`].
    ///
    /// # Errors
    /// [`AgentError::Channel`].
    pub async fn open(&self, port: u32) -> Result<ByteStream> {
        open(&*self.channel, port).await
    }

    /// Opens a stream that a request names by `key`.
    ///
    /// # Errors
    /// [`AgentError::Channel`]; [`AgentError::Silent`] where the way to the agent does not take it in time.
    async fn open_stdio(&self, key: &str) -> Result<ByteStream> {
        let opening = async {
            let mut stream = self.channel.open().await.map_err(AgentError::Channel)?;
            ports::announce_stdio(&mut stream, key).await.map_err(AgentError::Channel)?;
            Ok(stream)
        };
        within("stdio", ready(()), opening).await
    }

    /// Prepares the guest; the first thing it is asked. The guest may still be booting: the bound is the caller's.
    ///
    /// # Errors
    /// [`AgentError`], as for all that follow.
    pub async fn configure_sandbox(&self, request: wire::ConfigureSandboxRequest) -> Result<()> {
        let answer = self.client.configure_sandbox(unlimited(), &request).await;
        answer.map(drop).map_err(AgentError::from_ttrpc)
    }

    /// Has the guest's clock tell the host's time.
    ///
    /// # Errors
    /// [`AgentError`].
    pub async fn set_clock(&self) -> Result<()> {
        let request = wire::SetClockRequest { realtime_ns: realtime_ns(), ..Default::default() };
        ask("SetClock", self.client.set_clock(unlimited(), &request)).await.map(drop)
    }

    /// Sets up the guest's network, of an agent that need not listen yet.
    ///
    /// # Errors
    /// [`AgentError`].
    pub async fn configure_network(&self, request: wire::ConfigureNetworkRequest, listens: Listening) -> Result<()> {
        let configured = self.client.configure_network(unlimited(), &request);
        ask_from("ConfigureNetwork", listens.here(), configured).await.map(drop)
    }

    /// Creates a container up to the point where only its program is left to run; the streams of its first process. The
    /// agent need not listen yet: its answers are waited for, with a bound, once it does.
    ///
    /// # Errors
    /// [`AgentError`].
    pub async fn create_container(&self, creation: &Creation, listens: Listening) -> Result<Streams> {
        // Not the ID, which may be longer than a key.
        let key = format!("init-{}", log::monotonic_us());
        let (mut streams, stdio) = Streams::open(self, &key, &creation.plan).await?;
        let request = wire::CreateContainerRequest { stdio: Some(stdio).into(), ..creation.request.clone() };
        let created = self.client.create_container(unlimited(), &request);
        tokio::try_join!(
            ask_from("CreateContainer", listens.clone().here(), created),
            within("stdio", listens.here(), streams.held())
        )?;
        Ok(streams)
    }

    /// Runs a created container's program.
    ///
    /// # Errors
    /// [`AgentError`].
    pub async fn start_container(&self, id: &str) -> Result<()> {
        ask("StartContainer", self.client.start_container(unlimited(), &container(id))).await.map(drop)
    }

    /// Freezes a container.
    ///
    /// # Errors
    /// [`AgentError`].
    pub async fn pause_container(&self, id: &str) -> Result<()> {
        ask("PauseContainer", self.client.pause_container(unlimited(), &container(id))).await.map(drop)
    }

    /// Lets a frozen container go on.
    ///
    /// # Errors
    /// [`AgentError`].
    pub async fn resume_container(&self, id: &str) -> Result<()> {
        ask("ResumeContainer", self.client.resume_container(unlimited(), &container(id))).await.map(drop)
    }

    /// Removes what is left of a container that has ended, or was never started.
    ///
    /// # Errors
    /// [`AgentError`].
    pub async fn delete_container(&self, id: &str) -> Result<()> {
        ask("DeleteContainer", self.client.delete_container(unlimited(), &container(id))).await.map(drop)
    }

    /// Has the guest let go of files of the share: `paths` are the guest's.
    ///
    /// # Errors
    /// [`AgentError`].
    pub async fn release_files(&self, paths: Vec<String>) -> Result<()> {
        let request = wire::ReleaseFilesRequest { paths, ..Default::default() };
        ask("ReleaseFiles", self.client.release_files(unlimited(), &request)).await.map(drop)
    }

    /// The processes of a container, by their PIDs in the guest.
    ///
    /// # Errors
    /// [`AgentError`].
    pub async fn list_processes(&self, id: &str) -> Result<Vec<wire::ProcessInfo>> {
        let listing = ask("ListProcesses", self.client.list_processes(unlimited(), &container(id))).await?;
        Ok(listing.processes)
    }

    /// Changes a container's limits: `resources` is `linux.resources` as JSON, in the guest's terms.
    ///
    /// # Errors
    /// [`AgentError`].
    pub async fn update_container(&self, id: &str, resources: Vec<u8>) -> Result<()> {
        let request = wire::UpdateContainerRequest { container_id: id.to_owned(), resources, ..Default::default() };
        ask("UpdateContainer", self.client.update_container(unlimited(), &request)).await.map(drop)
    }

    /// What a container uses.
    ///
    /// # Errors
    /// [`AgentError`].
    pub async fn statistics(&self, id: &str) -> Result<wire::ContainerStatisticsResponse> {
        ask("ContainerStatistics", self.client.container_statistics(unlimited(), &container(id))).await
    }

    /// Waits, without a bound, until the guest's kernel has killed more processes of a container for want of memory than
    /// are known, or the container has ended.
    ///
    /// # Errors
    /// [`AgentError`]; the channel's end when the VM ends.
    pub async fn await_out_of_memory(&self, id: &str, known: u64) -> Result<wire::AwaitOutOfMemoryResponse> {
        let request = wire::AwaitOutOfMemoryRequest { container_id: id.to_owned(), known, ..Default::default() };
        self.client.await_out_of_memory(unlimited(), &request).await.map_err(AgentError::from_ttrpc)
    }

    /// Runs a further process in a container; its streams, by which `key` tells them from any other's.
    ///
    /// # Errors
    /// [`AgentError`].
    pub async fn exec_process(&self, request: wire::ExecProcessRequest, key: &str, plan: &Plan) -> Result<Streams> {
        let (mut streams, stdio) = Streams::open(self, key, plan).await?;
        let request = wire::ExecProcessRequest { stdio: Some(stdio).into(), ..request };
        let running = ask("ExecProcess", self.client.exec_process(unlimited(), &request));
        tokio::try_join!(running, within("stdio", ready(()), streams.held()))?;
        Ok(streams)
    }

    /// Sends a signal to a process: the container's first one where `exec_id` is empty; to every process of the
    /// container with `all`.
    ///
    /// # Errors
    /// [`AgentError`]; [`AgentError::is_not_found`] where it has ended.
    pub async fn signal_process(&self, id: &str, exec_id: &str, signal: u32, all: bool) -> Result<()> {
        let request = wire::SignalProcessRequest {
            container_id: id.to_owned(),
            exec_id: exec_id.to_owned(),
            signal,
            all,
            ..Default::default()
        };
        ask("SignalProcess", self.client.signal_process(unlimited(), &request)).await.map(drop)
    }

    /// Tells a process's terminal its size.
    ///
    /// # Errors
    /// [`AgentError`].
    pub async fn resize_terminal(&self, id: &str, exec_id: &str, rows: u16, columns: u16) -> Result<()> {
        let request = wire::ResizeTerminalRequest {
            container_id: id.to_owned(),
            exec_id: exec_id.to_owned(),
            rows: rows.into(),
            columns: columns.into(),
            ..Default::default()
        };
        ask("ResizeTerminal", self.client.resize_terminal(unlimited(), &request)).await.map(drop)
    }

    /// Waits, without a bound, until a process has ended and its output was handed over.
    ///
    /// # Errors
    /// [`AgentError`]; the channel's end when the VM ends.
    pub async fn wait_process(&self, id: &str, exec_id: &str) -> Result<Exit> {
        let request = ProcessRequest { container_id: id.to_owned(), exec_id: exec_id.to_owned(), ..Default::default() };
        let waiting = self.client.wait_process(unlimited(), &request).await;
        let response = waiting.map_err(AgentError::from_ttrpc)?;
        // A status beyond a byte is no status: only a hostile agent sends it.
        let status = u8::try_from(response.exit_status).unwrap_or(u8::MAX);
        let output = Output { stdout: response.stdout_bytes, stderr: response.stderr_bytes };
        Ok(Exit { status, oom_killed: response.oom_killed, output })
    }
}

/// The host's time, in nanoseconds since the Unix epoch.
pub fn realtime_ns() -> u64 {
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    u64::try_from(now.as_nanos()).unwrap_or(u64::MAX)
}

/// What a container is made of, to be asked of any agent.
#[derive(Clone, Debug)]
pub struct Creation {
    request: wire::CreateContainerRequest,
    plan: Plan,
}

impl Creation {
    /// What it shares it shares with the container `sandbox`, or where there is none with the guest.
    ///
    /// # Errors
    /// [`AgentError::Channel`] where the container cannot be told of.
    pub fn new(id: &str, guest: &GuestSpec, sandbox: Option<&str>, plan: Plan) -> Result<Self> {
        let spec = serde_json::to_vec(&guest.spec).map_err(|error| AgentError::Channel(error.into()))?;
        let request = wire::CreateContainerRequest {
            container_id: id.to_owned(),
            spec,
            shared_namespaces: guest.shared_namespaces.iter().map(ToString::to_string).collect(),
            sandbox_id: sandbox.unwrap_or_default().to_owned(),
            shared_memory: guest.shared_memory.unwrap_or_default(),
            ..Default::default()
        };
        Ok(Self { request, plan })
    }
}

/// Whether an agent has shown that it listens.
#[derive(Clone)]
pub struct Listening(watch::Receiver<bool>);

impl Listening {
    /// It does not yet; who finds out says so by the sender.
    pub fn not_yet() -> (watch::Sender<bool>, Self) {
        let (sender, receiver) = watch::channel(false);
        (sender, Self(receiver))
    }

    /// It does.
    pub fn already() -> Self {
        Self(watch::channel(true).1)
    }

    /// Returns once it does, or nobody will find out.
    pub async fn here(mut self) {
        let _ = self.0.wait_for(|listens| *listens).await;
    }
}

fn container(id: &str) -> wire::ContainerRequest {
    wire::ContainerRequest { container_id: id.to_owned(), ..Default::default() }
}

/// The bound is [`ask`]'s, which holds for sending too.
fn unlimited() -> Context {
    context::with_timeout(0)
}

async fn ask<T>(request: &'static str, answer: impl Future<Output = ttrpc::Result<T>>) -> Result<T> {
    ask_from(request, ready(()), answer).await
}

/// As [`ask`], for an answer that is waited for only so long from a moment on.
async fn ask_from<T>(
    request: &'static str,
    moment: impl Future<Output = ()>,
    answer: impl Future<Output = ttrpc::Result<T>>,
) -> Result<T> {
    within(request, moment, async { answer.await.map_err(AgentError::from_ttrpc) }).await
}

/// Waits for an answer, from a moment on only so long.
async fn within<T>(
    request: &'static str,
    moment: impl Future<Output = ()>,
    answer: impl Future<Output = Result<T>>,
) -> Result<T> {
    let overdue = async {
        moment.await;
        tokio::time::sleep(ANSWER_LIMIT).await;
    };
    tokio::select! {
        biased;
        answer = answer => answer,
        () = overdue => Err(AgentError::Silent { request }),
    }
}

async fn open(channel: &dyn Channel, port: u32) -> Result<ByteStream> {
    let mut stream = channel.open().await.map_err(AgentError::Channel)?;
    ports::announce(&mut stream, port).await.map_err(AgentError::Channel)?;
    Ok(stream)
}
