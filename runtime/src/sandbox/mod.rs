//! One VM and what hangs on it: the machine, the share and the agent, from boot to end.

pub mod guest_log;
mod size;

use std::future::{pending, poll_fn};
use std::io;
use std::path::PathBuf;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use futures::future::{Future as _, maybe_done};
use oci_spec::runtime::LinuxIdMapping;
use runvm_protocol::agent as wire;
use runvm_protocol::{SHARE_MOUNT_POINT, SHARE_TAG, ports};
use thiserror::Error;
use tokio::sync::{Mutex, oneshot};
use tokio::task::JoinSet;

use crate::agent::{self, Agent, AgentError, Creation, Listening, Streams};
use crate::error::sentence;
use crate::host::cgroup::Cgroup;
use crate::host::process::ProcessIdentity;
use crate::host::user_namespace::IdMappings;
use crate::log;
use crate::network::late::Spares;
use crate::network::{self, Network, NetworkError};
use crate::share::{Export, Served};
use crate::template::{self, TemplateError};
use crate::vmm::probe::{self, Accelerator, Choice, NoKvm, Wanted};
use crate::vmm::{self, Blank, Channel, Machine, Nic, Vm, VmmError};

pub use size::Size;

/// How long a guest may take from the machine's start to its agent's first answer.
const BOOT_LIMIT: Duration = Duration::from_secs(60);
/// How long a guest may take that is there already.
const FORK_LIMIT: Duration = Duration::from_secs(10);
/// How long a VM may take to end once its channel is closed.
const END_NOTICE: Duration = Duration::from_secs(5);
/// How long the VM's killed processes may take to go.
const END_LIMIT: Duration = Duration::from_secs(10);
/// How much entropy the guest is given, in bytes.
const ENTROPY: usize = 64;

/// Why there is no sandbox.
#[derive(Debug, Error)]
pub enum SandboxError {
    /// KVM was demanded.
    #[error(transparent)]
    NoKvm(#[from] NoKvm),
    /// No machine.
    #[error(transparent)]
    Vmm(#[from] VmmError),
    /// No network.
    #[error(transparent)]
    Network(#[from] NetworkError),
    /// The guest did not come up.
    #[error("the guest did not boot ({accelerator}): {reason}")]
    Boot {
        /// With what.
        accelerator: Accelerator,
        /// What was seen.
        reason: String,
    },
    /// The agent refused.
    #[error(transparent)]
    Agent(#[from] AgentError),
    /// The VMM or the share's daemon ended under a running guest.
    #[error("the VM is gone: {0}")]
    Gone(String),
}

/// What a sandbox is made of.
#[derive(Clone, Debug)]
pub struct Config {
    /// What is asked of the VM.
    pub vm: vmm::Options,
    /// Processors and memory.
    pub size: Size,
    /// The host's files.
    pub exports: Vec<Export>,
    /// The guest's host name.
    pub hostname: String,
    /// The mappings of the user namespace that is the containers', if they have one.
    pub user_namespace: Option<IdMappings>,
    /// Where helpers of this program log.
    pub log: log::Options,
    /// Where the guest's console goes.
    pub console: Option<PathBuf>,
    /// The cgroup of the VM's processes, where that is not this process's own.
    pub cgroup: Option<Arc<Cgroup>>,
    /// The container that it is made for.
    pub first: Option<Creation>,
}

/// A booted VM whose agent answers.
pub struct Sandbox {
    vm: Vm,
    /// The connection to the agent.
    pub agent: Agent,
    /// For the interfaces that come after the boot.
    pub late_network: Arc<LateNetwork>,
    /// What was asked for before the guest was there. It ends with this.
    begun: JoinSet<Result<Streams, AgentError>>,
}

impl Sandbox {
    /// Boots a VM, in a process that has begun if there is one. It must be called in the container's network namespace, whose
    /// interfaces are handed on. [`Self::begun`] has to follow, also where there is no first container.
    ///
    /// # Errors
    /// [`SandboxError`]; then nothing of the VM is left.
    pub async fn boot(mut config: Config, blank: Option<Blank>) -> Result<Self, SandboxError> {
        let blank = match blank {
            None => Blank::ahead(&config.vm, &config.log, config.cgroup.as_ref())?,
            blank => blank,
        };
        let choice = probe::choose(config.vm.accelerator)?;
        log::stage("probed");
        let network = network::scan().await?;
        log::stage("network scanned");
        let failure = match Self::boot_over(&mut config, &network, choice.accelerator, blank).await {
            Err(SandboxError::Boot { reason, .. })
                if config.vm.accelerator == Wanted::Auto && choice.accelerator != Accelerator::Tcg =>
            {
                reason
            }
            booted => return booted,
        };
        let Choice { accelerator, reason } = probe::kvm_failed(&failure);
        tracing::warn!("starting without KVM: {reason}");
        Self::boot_with(&config, &network, accelerator, None).await
    }

    /// Boots once more where the machine's template turns out to be of no use, which is removed.
    async fn boot_over(
        config: &mut Config,
        network: &Network,
        accelerator: Accelerator,
        blank: Option<Blank>,
    ) -> Result<Self, SandboxError> {
        let (key, reason) = match Self::boot_with(config, network, accelerator, blank).await {
            Err(SandboxError::Vmm(VmmError::Template(TemplateError::Useless { key, reason })))
                if config.vm.templates == template::Use::Auto =>
            {
                (key, reason)
            }
            booted => return booted,
        };
        tracing::warn!("a template is of no use and is removed: {reason}");
        match config.vm.store().remove(&key) {
            // Another process came to the same end.
            Ok(()) | Err(TemplateError::Unknown(_)) => {}
            Err(error) => {
                tracing::warn!("it stays, and this machine does without: {}", sentence(&error));
                config.vm.templates = template::Use::Off;
            }
        }
        Self::boot_with(config, network, accelerator, None).await
    }

    async fn boot_with(
        config: &Config,
        network: &Network,
        accelerator: Accelerator,
        blank: Option<Blank>,
    ) -> Result<Self, SandboxError> {
        let mut nics = Vec::new();
        for (index, interface) in network.interfaces.iter().enumerate() {
            let tap = network::attach(interface, network.resolver).await?;
            nics.push(Nic { tap: tap.fd, mac: network::device_mac(index) });
        }
        let (spares, spare_nics) = spare_nics(nics.len(), config.vm.needs_qemu(accelerator))?;
        log::stage("taps made");
        let backend = config.vm.backend(accelerator);
        let (early, channel) = oneshot::channel();
        let configuring = async {
            match channel.await {
                Ok(channel) => configure(config, network, channel).await,
                // There is no machine, which whoever makes it tells.
                Err(_) => pending().await,
            }
        };
        // It goes on while the machine is made: what is first said to the agent is there when it listens.
        let mut configured = pin!(maybe_done(configuring));
        let machine = Machine {
            accelerator,
            vcpus: config.size.vcpus,
            memory: config.size.memory,
            exports: config.exports.clone(),
            nics,
            spare_nics,
            console: config.console.clone(),
            log: config.log.clone(),
            cgroup: config.cgroup.clone(),
            blank,
        };
        let mut booting = pin!(tokio::time::timeout(BOOT_LIMIT, backend.boot(machine, early)));
        let silent = |limit: Duration| format!("no answer of its agent within {} s", limit.as_secs());
        let booted = poll_fn(|context| {
            let _ = configured.as_mut().poll(context);
            booting.as_mut().poll(context)
        });
        let mut vm = match booted.await.map_err(|_| SandboxError::Boot { accelerator, reason: silent(BOOT_LIMIT) })? {
            Err(VmmError::Machine(reason)) => return Err(SandboxError::Boot { accelerator, reason }),
            Err(error @ VmmError::GaveUp) => {
                return Err(SandboxError::Boot { accelerator, reason: error.to_string() });
            }
            vm => vm?,
        };
        let limit = if vm.template.is_some() { FORK_LIMIT } else { BOOT_LIMIT };
        let ended = tokio::select! {
            biased;
            _ = tokio::time::timeout(limit, configured.as_mut()) => None,
            reason = vm.ended() => {
                // It may have answered before.
                let _ = tokio::time::timeout(END_NOTICE, configured.as_mut()).await;
                Some(reason)
            }
        };
        let configured = match (configured.take_output(), ended) {
            (Some(Ok(configured)), _) => Some(Ok(configured)),
            (_, Some(reason)) => Some(Err(SandboxError::Boot { accelerator, reason })),
            (configured, None) => configured,
        };
        let reason = match configured {
            Some(Err(SandboxError::Boot { reason, .. })) => reason,
            Some(Err(SandboxError::Agent(AgentError::Channel(_)))) => {
                match tokio::time::timeout(END_NOTICE, vm.ended()).await {
                    Ok(reason) => reason,
                    Err(_) => "its agent closed the channel".to_owned(),
                }
            }
            Some(configured) => {
                let (agent, begun) = configured?;
                log::stage("guest ready");
                probe::proved(accelerator);
                let late_network = LateNetwork {
                    agent: agent.clone(),
                    spares: Mutex::new(spares),
                    whereabouts: vm.spare_nics.clone(),
                };
                return Ok(Self { agent, vm, late_network: Arc::new(late_network), begun });
            }
            None => silent(limit),
        };
        Err(match vm.template.take() {
            Some(key) => VmmError::from(TemplateError::Useless { key, reason }).into(),
            None => SandboxError::Boot { accelerator, reason },
        })
    }

    /// Waits until all is done that was begun before the guest was there: its clock tells the time, and its first container
    /// is created, whose streams these are. Without one there are none.
    ///
    /// # Errors
    /// [`AgentError`].
    pub async fn begun(&mut self) -> Result<Streams, AgentError> {
        match self.begun.join_next().await {
            Some(Ok(done)) => done,
            Some(Err(error)) => Err(AgentError::Channel(io::Error::other(error))),
            None => Ok(Streams::default()),
        }
    }

    /// The processes that make up the VM.
    pub fn processes(&self) -> Vec<ProcessIdentity> {
        self.vm.processes()
    }

    /// The files that the guest sees.
    ///
    /// # Errors
    /// [`VmmError::Start`] where the VM is gone.
    pub fn files(&self) -> Result<Served, SandboxError> {
        Ok(self.vm.files().map_err(VmmError::Start)?)
    }

    /// The way to the agent.
    pub fn channel(&self) -> Arc<dyn Channel> {
        self.vm.channel.clone()
    }

    /// How many streams there may be to the agent at once.
    pub fn streams(&self) -> usize {
        self.vm.streams
    }

    /// What is to be told of an agent's error: the channel ends when the VM does, and then the VM's end is the better story.
    pub async fn explain(&mut self, error: AgentError) -> SandboxError {
        if !error.is_end_of_guest() {
            return error.into();
        }
        match tokio::time::timeout(END_NOTICE, self.vm.ended()).await {
            Ok(reason) => SandboxError::Gone(reason),
            Err(_) => error.into(),
        }
    }

    /// Ends the VM, whose memory the host has when this returns.
    pub fn end(self) {
        let processes = self.processes();
        drop(self);
        for process in processes {
            if !process.await_end(END_LIMIT).unwrap_or(false) {
                tracing::warn!("a process of the VM does not end");
            }
        }
    }

    /// Waits until the VM is no more; why, as a clause.
    pub async fn ended(&mut self) -> String {
        self.vm.ended().await
    }
}

/// What a machine with so many interfaces has for those that come after its boot: none, if there are some already. They
/// are taps at once for a VMM that looks.
///
/// # Errors
/// Where there is no /dev/net/tun.
pub fn spare_nics(interfaces: usize, taps: bool) -> Result<(Spares, Vec<Nic>), NetworkError> {
    if interfaces > 0 {
        return Ok(Default::default());
    }
    let (spares, ends) = Spares::make(taps)?;
    let nics = ends.into_iter().enumerate().map(|(index, tap)| Nic { tap, mac: network::device_mac(index) });
    Ok((spares, nics.collect()))
}

/// What a guest can be given of interfaces that come after its boot.
pub struct LateNetwork {
    agent: Agent,
    spares: Mutex<Spares>,
    /// Where the guest finds the devices.
    whereabouts: Vec<String>,
}

impl LateNetwork {
    /// Gives it those that have come into the calling thread's network namespace; once there were some, no more are taken.
    ///
    /// # Errors
    /// [`NetworkError::TooLate`], and those of netlink and of the agent. They stay to be connected then.
    pub async fn connect(&self) -> Result<(), SandboxError> {
        let mut spares = self.spares.lock().await;
        let Some(network) = spares.tie().await? else { return Ok(()) };
        let mut request = wire::ConfigureNetworkRequest::from(&network);
        for (interface, whereabouts) in request.interfaces.iter_mut().zip(&self.whereabouts) {
            interface.whereabouts.clone_from(whereabouts);
        }
        connect(&self.agent, &network, request, Listening::already()).await?;
        *spares = Spares::default();
        Ok(())
    }
}

/// Has a guest use the network that it was given.
async fn connect(
    agent: &Agent,
    network: &Network,
    request: wire::ConfigureNetworkRequest,
    listens: Listening,
) -> Result<(), AgentError> {
    agent.configure_network(request, listens).await?;
    if network.resolver {
        let stream = agent.open(ports::DNS).await?;
        tokio::spawn(async move {
            if let Err(error) = network::dns::relay(stream).await {
                tracing::debug!("name look-ups of the guest end: {error}");
            }
        });
    }
    Ok(())
}

/// Asks the agent for all that a start takes, and has its first answers. It does one after the other, so that nothing
/// waits for an answer to come out of the guest and the next request to go in. What takes longer than they is begun.
async fn configure(
    config: &Config,
    network: &Network,
    channel: Arc<dyn Channel>,
) -> Result<(Agent, JoinSet<Result<Streams, AgentError>>), SandboxError> {
    let agent = Agent::connect(channel).await?;
    let (listens, listening) = Listening::not_yet();
    let request = sandbox_request(config)?;
    let sandbox = async {
        agent.configure_sandbox(request).await?;
        log::stage("agent answers");
        // Everybody who waits for it may have given up.
        let _ = listens.send(true);
        tokio::spawn(guest_log::pass_on(agent.open(ports::LOG).await?));
        Ok(())
    };
    let network = connect(&agent, network, network.into(), listening.clone());
    let mut begun = JoinSet::new();
    begun.spawn(begin(agent.clone(), config.first.clone(), listening));
    tokio::try_join!(sandbox, network)?;
    Ok((agent, begun))
}

/// Sets the clock of an agent that listens, and has it make its first container.
async fn begin(agent: Agent, first: Option<Creation>, listening: Listening) -> Result<Streams, AgentError> {
    let clock = async {
        listening.clone().here().await;
        agent.set_clock().await
    };
    let created = async {
        match &first {
            Some(creation) => agent.create_container(creation, listening.clone()).await,
            None => Ok(Streams::default()),
        }
    };
    tokio::try_join!(clock, created).map(|((), streams)| streams)
}

fn sandbox_request(config: &Config) -> Result<wire::ConfigureSandboxRequest, AgentError> {
    let mut entropy = vec![0; ENTROPY];
    rustix::rand::getrandom(&mut entropy, rustix::rand::GetRandomFlags::empty())
        .map_err(|error| AgentError::Channel(error.into()))?;
    let IdMappings { uids, gids } = config.user_namespace.clone().unwrap_or_default();
    Ok(wire::ConfigureSandboxRequest {
        hostname: config.hostname.clone(),
        entropy,
        shares: vec![wire::Share {
            tag: SHARE_TAG.to_owned(),
            mount_point: SHARE_MOUNT_POINT.to_owned(),
            ..Default::default()
        }],
        uid_mappings: uids.iter().map(id_mapping).collect(),
        gid_mappings: gids.iter().map(id_mapping).collect(),
        realtime_ns: agent::realtime_ns(),
        ..Default::default()
    })
}

fn id_mapping(mapping: &LinuxIdMapping) -> wire::IdMapping {
    wire::IdMapping {
        container_id: mapping.container_id(),
        host_id: mapping.host_id(),
        size: mapping.size(),
        ..Default::default()
    }
}
