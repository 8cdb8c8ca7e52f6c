//! A pod: one VM, and the containers that share it.
//!
//! The process that has a [`Pod`] owns the VM, as a monitor does that of its one container: the VM ends with it. It
//! stands for the pod on the host, too: it is in the pod's network namespace, and its PID is what engines and hooks are
//! told. Containers come and go in any order; the VM stays until [`Pod::end`], or until it ends by itself.

mod files;

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use oci_spec::runtime::{Hook, Hooks, LinuxMemory, Spec};
use tokio::sync::{Notify, watch};

use crate::agent::{Agent, AgentError, Creation, Descriptors, Listening, Plan, Relay, Streams};
use crate::bundle::{self, Bundle, GuestSpec, Membership, NetworkNamespace};
use crate::error::{Error, Result, sentence};
use crate::host::cgroup::{self, Cgroup};
use crate::host::hooks;
use crate::log;
use crate::network::loopback::{self, Loopback};
use crate::network::namespace;
use crate::sandbox::{Config, LateNetwork, Sandbox, SandboxError, Size};
use crate::share::{Export, ShareError};
use crate::state::Status;
use crate::vmm::{self, VmmError};
use files::{Files, Table};

/// How long a VM may take to end once its channel is closed.
const END_NOTICE: Duration = Duration::from_secs(5);

/// What holds for a pod's VM.
#[derive(Clone, Debug)]
pub struct Options {
    /// What is asked of the VM.
    pub vm: vmm::Options,
    /// Where its processes log.
    pub log: log::Options,
    /// Where the guest's console goes.
    pub console: Option<PathBuf>,
}

/// A VM that is to have no container at first.
#[derive(Clone, Debug)]
pub struct Empty {
    /// The guest's host name.
    pub hostname: String,
    /// Where its network is.
    pub network: NetworkNamespace,
    /// Its size.
    pub size: Size,
    /// The cgroup that the VM's is made in, in a form of `linux.cgroupsPath`.
    pub cgroup_parent: String,
}

/// A running VM and its containers. It ends with the process, whose first thread is in its network namespace.
pub struct Pod {
    agent: Agent,
    late_network: Arc<LateNetwork>,
    size: Size,
    files: Files,
    /// The container whose namespaces the others share; without one they share the guest's.
    sandbox: Option<String>,
    members: Mutex<HashMap<String, Arc<Member>>>,
    end: watch::Receiver<Option<String>>,
    told_to_end: Arc<Notify>,
    _loopback: Option<Loopback>,
}

/// A container of the pod, as the host knows it.
struct Member {
    bundle: PathBuf,
    oci_version: String,
    annotations: HashMap<String, String>,
    hooks: Hooks,
    /// Its places in the share.
    places: Vec<PathBuf>,
}

impl Pod {
    /// Boots a VM for its first container, and creates that. The calling thread, which has to be the process's first, is
    /// put into the container's network namespace for good.
    ///
    /// # Errors
    /// [`Error`]; then nothing of the VM is left.
    pub async fn boot(
        options: &Options,
        id: &str,
        bundle: &Bundle,
        membership: Membership,
        descriptors: Descriptors,
    ) -> Result<(Self, Relay)> {
        let size = match membership {
            Membership::Sandbox => Size::of_pod(&bundle.spec),
            Membership::Alone | Membership::Member => Size::of(&bundle.spec),
        };
        let mut table = Table::default();
        let mut guest = prepare(bundle, &table.next_place(), size)?;
        let (places, exports) = table.enter(&mut guest);
        let cgroup = Arc::new(Cgroup::create(&bundle.spec, id, size.memory)?);
        let member = Member::new(bundle, places);
        let plan = Plan::of(&descriptors);
        let booted = async {
            namespace::take_up(&bundle.network_namespace()).await.map_err(SandboxError::from)?;
            member.run_creating_hooks(id).await?;
            let first = Creation::new(id, &guest, None, plan).map_err(SandboxError::from)?;
            boot(options, size, &cgroup, exports, bundle.spec.hostname().clone(), Some(first)).await
        };
        let (sandbox, streams) = remove_after_failure(&cgroup, booted.await)?;
        let pod = Self::around(
            sandbox,
            cgroup,
            size,
            table,
            Some(id.to_owned()).filter(|_| membership == Membership::Sandbox),
        )
        .await?;
        pod.remember(id, member);
        Ok((pod, Relay::join(descriptors, streams)))
    }

    /// Boots a VM without a container. The calling thread is put into the network namespace as by [`Self::boot`].
    ///
    /// # Errors
    /// [`Error`]; then nothing of the VM is left.
    pub async fn boot_empty(options: &Options, id: &str, empty: Empty) -> Result<Self> {
        let cgroup = Arc::new(Cgroup::create_below(&empty.cgroup_parent, id)?);
        let booted = async {
            namespace::take_up(&empty.network).await.map_err(SandboxError::from)?;
            boot(options, empty.size, &cgroup, Vec::new(), Some(empty.hostname), None).await
        };
        let (sandbox, _) = remove_after_failure(&cgroup, booted.await)?;
        Self::around(sandbox, cgroup, empty.size, Table::default(), None).await
    }

    async fn around(
        sandbox: Sandbox,
        cgroup: Arc<Cgroup>,
        size: Size,
        table: Table,
        first: Option<String>,
    ) -> Result<Self> {
        let files = Files::new(sandbox.files()?, table);
        let agent = sandbox.agent.clone();
        let late_network = sandbox.late_network.clone();
        let told_to_end = Arc::new(Notify::new());
        let (ended, end) = watch::channel(None);
        tokio::spawn(keep(sandbox, cgroup, told_to_end.clone(), ended));
        let loopback = loopback::hand_on(agent.clone()).await;
        let loopback =
            loopback.inspect_err(|error| tracing::info!("the guest's loopback is not forwarded to: {error}"));
        Ok(Self {
            agent,
            late_network,
            size,
            files,
            sandbox: first,
            members: Mutex::default(),
            end,
            told_to_end,
            _loopback: loopback.ok(),
        })
    }

    /// The PID that stands for the pod on the host: this process's.
    pub fn pid(&self) -> u32 {
        std::process::id()
    }

    /// The connection to the guest's agent.
    pub fn agent(&self) -> &Agent {
        &self.agent
    }

    /// The VM's size.
    pub fn size(&self) -> Size {
        self.size
    }

    /// Creates a further container, whose program waits for its start. Its stdio is carried once the relay is started.
    ///
    /// # Errors
    /// [`Error`]; then nothing of the container is left.
    pub async fn create(&self, id: &str, bundle: &Bundle, descriptors: Descriptors) -> Result<Relay> {
        let mut guest = prepare(bundle, &self.files.next_place().await, self.size)?;
        let places = self.files.take_in(&mut guest).await;
        let places = places.map_err(|error| SandboxError::from(VmmError::from(ShareError::from(error))))?;
        let member = Member::new(bundle, places);
        let created = async {
            member.run_creating_hooks(id).await?;
            self.make(id, &guest, self.sandbox.as_deref(), descriptors).await
        };
        match created.await {
            Ok(relay) => {
                self.remember(id, member);
                Ok(relay)
            }
            Err(error) => {
                self.files.take_out(&self.agent, &member.places).await;
                Err(error)
            }
        }
    }

    async fn make(
        &self,
        id: &str,
        guest: &GuestSpec,
        sandbox: Option<&str>,
        descriptors: Descriptors,
    ) -> Result<Relay> {
        let plan = Plan::of(&descriptors);
        let created = async {
            let creation = Creation::new(id, guest, sandbox, plan)?;
            self.agent.create_container(&creation, Listening::already()).await
        };
        match created.await {
            Ok(streams) => Ok(Relay::join(descriptors, streams)),
            Err(error) => Err(self.explain(error).await),
        }
    }

    fn remember(&self, id: &str, member: Member) {
        self.members.lock().unwrap_or_else(PoisonError::into_inner).insert(id.to_owned(), Arc::new(member));
    }

    /// Runs a created container's program.
    ///
    /// # Errors
    /// [`Error`]; after that of a `poststart` hook the container is being killed.
    pub async fn start(&self, id: &str) -> Result<()> {
        self.late_network.connect().await?;
        if let Err(error) = self.agent.start_container(id).await {
            return Err(self.explain(error).await);
        }
        let member = self.members.lock().unwrap_or_else(PoisonError::into_inner).get(id).cloned();
        let Some(member) = member else { return Ok(()) };
        let hooks = member.hooks.poststart().clone().unwrap_or_default();
        let done = member.run_hooks("poststart", hooks, id, Status::Running).await;
        if done.is_err() {
            let killed = rustix::process::Signal::KILL.as_raw().unsigned_abs();
            if let Err(error) = self.agent.signal_process(id, "", killed, true).await {
                tracing::warn!("a container whose poststart hook failed is not killed: {}", sentence(&error));
            }
        }
        done
    }

    /// Removes what is left of a container that has ended, or was never started. A guest that does not let go of it keeps
    /// nobody from forgetting it: what it holds goes with its VM.
    pub async fn delete(&self, id: &str) {
        match self.agent.delete_container(id).await {
            Err(error) if !error.is_end_of_guest() && !error.is_not_found() => {
                tracing::warn!("the guest keeps what is left of container {id}: {}", sentence(&error));
            }
            _ => {}
        }
        let member = self.members.lock().unwrap_or_else(PoisonError::into_inner).remove(id);
        let Some(member) = member else { return };
        self.files.take_out(&self.agent, &member.places).await;
        for hook in member.hooks.poststop().clone().unwrap_or_default() {
            // One that fails keeps neither the others nor the container's end from happening.
            if let Err(error) = member.run_hooks("poststop", vec![hook], id, Status::Stopped).await {
                tracing::warn!("{}", sentence(&error));
            }
        }
    }

    /// What is to be told of an agent's error: the channel ends when the VM does, and then the VM's end is the better story.
    pub async fn explain(&self, error: AgentError) -> Error {
        if !error.is_end_of_guest() {
            return error.into();
        }
        match tokio::time::timeout(END_NOTICE, self.ended()).await {
            Ok(reason) => SandboxError::Gone(reason).into(),
            Err(_) => error.into(),
        }
    }

    /// Waits until the VM is no more, and its cgroup removed; why, as a clause.
    pub async fn ended(&self) -> String {
        let mut end = self.end.clone();
        match end.wait_for(Option::is_some).await {
            Ok(reason) => reason.clone().unwrap_or_default(),
            Err(_) => "its keeper ended".to_owned(),
        }
    }

    /// Has the VM end.
    pub fn abandon(&self) {
        self.told_to_end.notify_one();
    }

    /// Ends the VM, and waits until nothing of it is left.
    pub async fn end(&self) {
        self.abandon();
        self.ended().await;
    }

    /// Removes what a pod leaves on the host whose process was killed: the first container's cgroup. All else goes with
    /// the process.
    ///
    /// # Errors
    /// [`Error::Cgroup`].
    pub fn clean_up(id: &str, spec: &Spec) -> Result<()> {
        Ok(cgroup::remove(&Cgroup::find(spec, id))?)
    }

    /// The same for a pod that began [empty](Self::boot_empty), with the cgroup that its own is in.
    ///
    /// # Errors
    /// [`Error::Cgroup`].
    pub fn clean_up_below(parent: &str, id: &str) -> Result<()> {
        Ok(cgroup::remove(&Cgroup::find_below(parent, id))?)
    }
}

impl Member {
    fn new(bundle: &Bundle, places: Vec<PathBuf>) -> Self {
        Self {
            bundle: bundle.path.clone(),
            oci_version: bundle.spec.version().clone(),
            annotations: bundle.spec.annotations().clone().unwrap_or_default(),
            hooks: bundle.spec.hooks().clone().unwrap_or_default(),
            places,
        }
    }

    /// The hooks that belong between the making of the namespaces and the container's.
    async fn run_creating_hooks(&self, id: &str) -> Result<()> {
        for (kind, hooks) in hooks::creating(&self.hooks) {
            self.run_hooks(kind, hooks.to_vec(), id, Status::Creating).await?;
        }
        Ok(())
    }

    /// Runs hooks in threads of their own, since they may take their time. Of a container's namespaces the host has that
    /// of the network, in which this process is, and so are they.
    async fn run_hooks(&self, kind: &'static str, hooks: Vec<Hook>, id: &str, status: Status) -> Result<()> {
        if hooks.is_empty() {
            return Ok(());
        }
        let pid = std::process::id();
        let state = hooks::State {
            oci_version: &self.oci_version,
            id,
            status: status.name(),
            pid: Some(pid).filter(|_| status != Status::Stopped),
            bundle: &self.bundle,
            annotations: &self.annotations,
        };
        let state = serde_json::to_vec(&state).map_err(|error| Error::system("write the state")(error))?;
        let run = move || match kind {
            "createContainer" => hooks::run_inside(kind, &hooks, &state, pid),
            _ => hooks::run(kind, &hooks, &state),
        };
        let done = tokio::task::spawn_blocking(run)
            .await
            .map_err(|error| Error::system("run a hook")(std::io::Error::from(error)))?;
        Ok(done?)
    }
}

/// Takes a bundle apart for a VM of this size.
fn prepare(bundle: &Bundle, place: &str, size: Size) -> Result<GuestSpec> {
    let memory = bundle.spec.linux().as_ref().and_then(|linux| linux.resources().as_ref()?.memory().as_ref());
    if let Some(limit) = memory.and_then(LinuxMemory::limit)
        && u64::try_from(limit).is_ok_and(|limit| limit > size.memory)
    {
        return Err(Error::PodTooSmall { limit, memory: size.memory });
    }
    let guest = bundle::split(bundle, place)?;
    bundle::mount_points::make(bundle)?;
    bundle::remark(&bundle.spec);
    Ok(guest)
}

async fn boot(
    options: &Options,
    size: Size,
    cgroup: &Arc<Cgroup>,
    exports: Vec<Export>,
    hostname: Option<String>,
    first: Option<Creation>,
) -> Result<(Sandbox, Streams)> {
    let config = Config {
        vm: options.vm.clone(),
        size,
        exports,
        hostname: hostname.unwrap_or_default(),
        user_namespace: None,
        log: options.log.clone(),
        console: options.console.clone(),
        cgroup: Some(cgroup.clone()),
        first,
    };
    let mut sandbox = Sandbox::boot(config, None).await?;
    match sandbox.begun().await {
        Ok(streams) => Ok((sandbox, streams)),
        Err(error) => {
            let error = sandbox.explain(error).await;
            if let Err(panic) = tokio::task::spawn_blocking(move || sandbox.end()).await {
                tracing::warn!("the VM's end is not waited for: {panic}");
            }
            Err(error.into())
        }
    }
}

fn remove_after_failure<T>(cgroup: &Cgroup, outcome: Result<T>) -> Result<T> {
    if outcome.is_err()
        && let Err(error) = cgroup::remove(cgroup.folders())
    {
        tracing::warn!("after a VM that did not boot: {}", sentence(&error));
    }
    outcome
}

/// Holds a VM to its end, and removes what it leaves.
async fn keep(
    mut sandbox: Sandbox,
    cgroup: Arc<Cgroup>,
    told_to_end: Arc<Notify>,
    ended: watch::Sender<Option<String>>,
) {
    let reason = tokio::select! {
        reason = sandbox.ended() => reason,
        () = told_to_end.notified() => "it was told to".to_owned(),
    };
    let removed = tokio::task::spawn_blocking(move || {
        sandbox.end();
        cgroup::remove(cgroup.folders())
    });
    if let Ok(Err(error)) = removed.await {
        tracing::warn!("{}", sentence(&error));
    }
    ended.send_replace(Some(reason));
}
