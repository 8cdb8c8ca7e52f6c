//! The containers of the guest, and the processes in them.

mod cgroup;
mod clocks;
mod company;
mod connection;
mod copy_up;
mod create;
mod delegation;
pub(crate) mod devices;
mod exec;
mod init;
mod nodes;
mod priority;
mod process;
mod program;
mod propagation;
mod rootfs;
pub(crate) mod spec;
mod statistics;
mod sysctl;

use std::collections::HashMap;
use std::fs;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, OnceLock};

use libcontainer::oci_spec::runtime::{LinuxMemory, Spec};
use runvm_protocol::agent;
use rustix::process::Pid;
use rustix::thread::ThreadNameSpaceType;

use self::cgroup::Cgroup;
use self::company::Company;
use self::connection::Connection;
use self::create::Starter;
use self::exec::{Door, Visitor};
use self::nodes::Nodes;
use self::spec::{GuestSpec, SpecError};
use crate::error::RequestError;
use crate::processors::Late;
use crate::reaper::{Exit, Reaper};
use crate::stdio::{Attached, HeldStreams, Streams, window};
use crate::sync::lock;
use crate::user_namespace::UserNamespace;
use crate::{log, sandbox};

/// With so many processes known, those that have ended are forgotten: a container may be checked by one every few
/// seconds for as long as it runs.
const MAX_EXECS: usize = 256;

/// All containers.
pub(crate) struct Containers {
    reaper: Reaper,
    processors: Late,
    held: HeldStreams,
    user_namespace: OnceLock<Arc<UserNamespace>>,
    /// `None` for one that is being made.
    containers: Mutex<HashMap<String, Option<Arc<Container>>>>,
}

/// One container, from its creation to its deletion.
struct Container {
    cgroup: Cgroup,
    user_namespace: Option<Arc<UserNamespace>>,
    /// The devices that it could not make for itself.
    _nodes: Option<Nodes>,
    starter: Starter,
    door: Door,
    init: Process,
    phase: Mutex<Phase>,
    /// Whether its first process was sent a SIGKILL: it ends, but perhaps not before it is told to start.
    killed: AtomicBool,
    paused: AtomicBool,
    /// `None` for one that is being started.
    execs: Mutex<HashMap<String, Option<Process>>>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Phase {
    Created,
    Running,
}

/// A process that the host knows of.
#[derive(Clone)]
struct Process {
    pid: Pid,
    exit: Exit,
    attached: Attached,
}

impl Containers {
    pub(crate) fn new(reaper: Reaper, processors: Late, held: HeldStreams) -> Self {
        Self { reaper, processors, held, user_namespace: OnceLock::new(), containers: Mutex::default() }
    }

    /// Has the containers that ask for a user namespace be in this one.
    pub(crate) fn use_user_namespace(&self, user_namespace: UserNamespace) {
        // The guest is set up once.
        let _ = self.user_namespace.set(Arc::new(user_namespace));
    }

    /// Creates a container, up to its program. Returns the number of its first process.
    pub(crate) async fn create(&self, request: &agent::CreateContainerRequest) -> Result<u32, RequestError> {
        let id = valid(&request.container_id)?;
        {
            let mut containers = lock(&self.containers);
            if containers.contains_key(id) {
                return Err(RequestError::ContainerExists);
            }
            containers.insert(id.to_owned(), None);
        }
        log::stage("container create begin");
        let made = self.make(id, request).await;
        let mut containers = lock(&self.containers);
        match made {
            Ok(container) => {
                let pid = container.init.number();
                containers.insert(id.to_owned(), Some(Arc::new(container)));
                log::stage("container create end");
                Ok(pid)
            }
            Err(error) => {
                containers.remove(id);
                Err(error)
            }
        }
    }

    async fn make(&self, id: &str, request: &agent::CreateContainerRequest) -> Result<Container, RequestError> {
        let cgroup = Cgroup::of(id);
        let GuestSpec { mut spec, net_sysctls } = GuestSpec::parse(&request.spec, cgroup.relative())?;
        let company = self.company(request, &spec)?;
        if request.shared_memory > 0 {
            sandbox::share_memory(request.shared_memory)?;
        }
        sandbox::see_files(&spec);
        let nodes = match company.user_namespace() {
            Some(namespace) => Nodes::make(id, &mut spec, namespace),
            None => Ok(None),
        };
        let nodes = nodes.map_err(RequestError::system("make linux.devices"))?;
        let streams = Streams::take(&self.held, &request.stdio).await?;
        // The guest's network is the container's.
        sysctl::set(&net_sysctls).map_err(RequestError::Program)?;
        let first = self.first_process(id, &cgroup, &spec, &company, &request.stdio, streams).await;
        let around = |(init, starter)| Container::around(init, starter, &spec, &cgroup, &company, nodes);
        let made = first.and_then(around);
        match &made {
            Ok(container) if company.has_pid_namespace() => container.end_with_first_process(),
            Ok(_) => {}
            Err(_) => {
                let _ = cgroup.remove().await;
            }
        }
        made
    }

    /// Whose namespaces a new container shares.
    fn company(&self, request: &agent::CreateContainerRequest, spec: &Spec) -> Result<Company, RequestError> {
        let namespaces = process::shared_namespaces(&request.shared_namespaces)?;
        let sandbox = match request.sandbox_id.as_str() {
            "" => None,
            id => Some(self.find(id)?.door.first_process().map_err(RequestError::system("share its namespaces"))?),
        };
        Ok(Company::new(namespaces, sandbox, self.user_namespace_for(spec)?))
    }

    async fn first_process(
        &self,
        id: &str,
        cgroup: &Cgroup,
        spec: &Spec,
        company: &Company,
        stdio: &agent::Stdio,
        streams: Streams,
    ) -> Result<(Process, Starter), RequestError> {
        let process = spec.process().clone().unwrap_or_default();
        let (files, connection) = Connection::prepare(&process, company.user_namespace(), stdio, streams)?;
        let created = create::create(&self.reaper, id, cgroup, spec, company, files).await?;
        let process = connection.adopt(created.init, &created.exit, created.master)?;
        Ok((process, created.starter))
    }

    /// Runs the container's program.
    pub(crate) async fn start(&self, id: &str) -> Result<(), RequestError> {
        let container = self.find(id)?;
        if container.killed.load(Ordering::Relaxed) || container.init.exit.happened() {
            return Err(RequestError::Stopped);
        }
        container.change(Phase::Created, Phase::Running, RequestError::AlreadyStarted)?;
        // A program counts them as it begins.
        self.processors.arrival().await;
        container.starter.start().await.map_err(RequestError::system("start the container"))?;
        log::stage("start");
        Ok(())
    }

    /// Freezes every process of the container.
    pub(crate) async fn pause(&self, id: &str) -> Result<(), RequestError> {
        let container = self.find(id)?;
        container.alive()?;
        if container.paused.swap(true, Ordering::Relaxed) {
            return Err(RequestError::NotRunning);
        }
        container.cgroup.freeze(true).await.map_err(RequestError::system("freeze the container"))
    }

    /// Ends a pause.
    pub(crate) async fn resume(&self, id: &str) -> Result<(), RequestError> {
        let container = self.find(id)?;
        if !container.paused.swap(false, Ordering::Relaxed) {
            return Err(RequestError::NotPaused);
        }
        container.cgroup.freeze(false).await.map_err(RequestError::system("thaw the container"))
    }

    /// Removes what is left of a container; one that was never started is ended.
    pub(crate) async fn delete(&self, id: &str) -> Result<(), RequestError> {
        let container = self.find(id)?;
        if !container.init.exit.happened() && *lock(&container.phase) != Phase::Created {
            return Err(RequestError::StillRunning);
        }
        container.cgroup.remove().await.map_err(RequestError::system("remove the container's cgroup"))?;
        lock(&self.containers).remove(id);
        Ok(())
    }

    /// Changes the container's limits.
    pub(crate) fn update(&self, id: &str, resources: &[u8]) -> Result<(), RequestError> {
        let container = self.find(id)?;
        container.alive()?;
        let resources = spec::parse_resources(resources)?;
        if let Some(limit) = resources.memory().as_ref().and_then(LinuxMemory::limit) {
            container.cgroup.make_room(limit).map_err(RequestError::Program)?;
        }
        container.cgroup.update(&resources).map_err(RequestError::Program)
    }

    /// What the container uses.
    pub(crate) fn statistics(&self, id: &str) -> Result<agent::ContainerStatisticsResponse, RequestError> {
        Ok(statistics::of(&self.find(id)?.cgroup))
    }

    /// Waits until more processes were killed for want of memory than the host knows of, or the container has ended.
    pub(crate) async fn await_out_of_memory(
        &self,
        id: &str,
        known: u64,
    ) -> Result<agent::AwaitOutOfMemoryResponse, RequestError> {
        let container = self.find(id)?;
        let ended = tokio::select! {
            more = container.cgroup.await_oom_kill(known) => {
                more.map_err(RequestError::system("watch the container's memory"))?;
                false
            }
            _ = container.init.exit.status() => true,
        };
        let kills = container.cgroup.oom_kills();
        Ok(agent::AwaitOutOfMemoryResponse { kills, ended, ..Default::default() })
    }

    /// The container's processes.
    pub(crate) fn processes(&self, id: &str) -> Result<Vec<agent::ProcessInfo>, RequestError> {
        let container = self.find(id)?;
        let processes = container.cgroup.processes().map_err(RequestError::system("list the container's processes"))?;
        let info = |pid: Pid| agent::ProcessInfo {
            pid: pid.as_raw_nonzero().get().unsigned_abs(),
            command: fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default().trim_end().to_owned(),
            ..Default::default()
        };
        Ok(processes.into_iter().map(info).collect())
    }

    /// Runs a further process in the container. Returns its number.
    pub(crate) async fn exec(&self, request: &agent::ExecProcessRequest) -> Result<u32, RequestError> {
        let container = self.find(&request.container_id)?;
        let exec_id = valid(&request.exec_id)?;
        if container.init.exit.happened() {
            return Err(RequestError::ExecInStopped);
        }
        if container.paused.load(Ordering::Relaxed) {
            return Err(RequestError::ExecInPaused);
        }
        let visitor = Visitor { process: spec::parse_process(&request.process)?, cgroup: request.cgroup.clone() };
        let streams = Streams::take(&self.held, &request.stdio).await?;
        {
            let mut execs = lock(&container.execs);
            if execs.contains_key(exec_id) {
                return Err(RequestError::ExecExists);
            }
            if execs.len() >= MAX_EXECS {
                execs.retain(|_, process| process.as_ref().is_none_or(|process| !process.exit.happened()));
            }
            execs.insert(exec_id.to_owned(), None);
        }
        let entered = self.further_process(&container, &visitor, &request.stdio, streams).await;
        let mut execs = lock(&container.execs);
        execs.remove(exec_id);
        let process = entered?;
        let pid = process.number();
        execs.insert(exec_id.to_owned(), Some(process));
        Ok(pid)
    }

    async fn further_process(
        &self,
        container: &Container,
        visitor: &Visitor,
        stdio: &agent::Stdio,
        streams: Streams,
    ) -> Result<Process, RequestError> {
        let Container { door, user_namespace, .. } = container;
        let (files, connection) = Connection::prepare(&visitor.process, user_namespace.as_ref(), stdio, streams)?;
        let entered = exec::enter(&self.reaper, door, visitor, files).await?;
        connection.adopt(entered.pid, &entered.exit, entered.master)
    }

    /// Sends a signal to one process, or to all of the container.
    pub(crate) fn signal(&self, request: &agent::SignalProcessRequest) -> Result<(), RequestError> {
        let container = self.find(&request.container_id)?;
        let signal = i32::try_from(request.signal).ok().filter(|signal| (0..=64).contains(signal));
        let signal = signal.ok_or(RequestError::Signal(request.signal))?;
        if signal == libc::SIGKILL && (request.all || request.exec_id.is_empty()) {
            container.killed.store(true, Ordering::Relaxed);
        }
        if request.all {
            return container
                .cgroup
                .signal_all(signal)
                .map_err(RequestError::system("signal the container's processes"));
        }
        container.process(&request.exec_id)?.signal(signal)
    }

    /// Waits until the process has ended, and its output been handed over.
    pub(crate) async fn wait(&self, id: &str, exec_id: &str) -> Result<agent::WaitProcessResponse, RequestError> {
        let container = self.find(id)?;
        let process = container.process(exec_id)?;
        let exit_status = process.exit.status().await;
        let (stdout_bytes, stderr_bytes) = process.attached.handed_over().await;
        let oom_killed = container.cgroup.oom_kills() > 0;
        Ok(agent::WaitProcessResponse { exit_status, oom_killed, stdout_bytes, stderr_bytes, ..Default::default() })
    }

    /// Says how large the host's terminal is now.
    pub(crate) fn resize(&self, request: &agent::ResizeTerminalRequest) -> Result<(), RequestError> {
        let process = self.find(&request.container_id)?.process(&request.exec_id)?;
        let terminal = process.attached.terminal.as_ref().ok_or(RequestError::NoTerminal)?;
        terminal.resize(window(request.rows, request.columns)).map_err(RequestError::system("size the terminal"))
    }

    /// The user namespace that the specification asks for.
    fn user_namespace_for(&self, spec: &Spec) -> Result<Option<Arc<UserNamespace>>, SpecError> {
        let Some(linux) = spec.linux() else { return Ok(None) };
        if !process::namespaces(linux).contains(ThreadNameSpaceType::USER) {
            return Ok(None);
        }
        let (uids, gids) = (spec::mappings(linux.uid_mappings()), spec::mappings(linux.gid_mappings()));
        let own = self.user_namespace.get().filter(|namespace| namespace.maps(&uids, &gids));
        own.cloned().map(Some).ok_or(SpecError::UserNamespace)
    }

    fn find(&self, id: &str) -> Result<Arc<Container>, RequestError> {
        lock(&self.containers).get(id).cloned().flatten().ok_or(RequestError::NoContainer)
    }
}

impl Container {
    /// The container of a first process that waits to become its program.
    fn around(
        init: Process,
        starter: Starter,
        spec: &Spec,
        cgroup: &Cgroup,
        company: &Company,
        nodes: Option<Nodes>,
    ) -> Result<Self, RequestError> {
        let linux = spec.linux().as_ref();
        let resources = linux.and_then(|linux| linux.resources().as_ref());
        let rules = resources.and_then(|resources| resources.devices().as_deref()).unwrap_or_default();
        devices::restrict(cgroup.path(), rules).map_err(RequestError::system("restrict the container's devices"))?;
        let namespaces = linux.map_or(ThreadNameSpaceType::empty(), process::namespaces);
        let seccomp = linux.and_then(|linux| linux.seccomp().clone());
        let door = Door::new(init.pid, namespaces, cgroup.clone(), seccomp)
            .map_err(RequestError::system("open the container's first process"))?;
        let (phase, execs) = (Mutex::new(Phase::Created), Mutex::default());
        let (killed, paused) = (AtomicBool::new(false), AtomicBool::new(false));
        let (cgroup, user_namespace) = (cgroup.clone(), company.user_namespace().cloned());
        Ok(Self { cgroup, user_namespace, _nodes: nodes, starter, door, init, phase, killed, paused, execs })
    }

    /// Ends all its processes when the first one has ended, as the kernel does where that is the first of a PID namespace.
    fn end_with_first_process(&self) {
        let (cgroup, exit) = (self.cgroup.clone(), self.init.exit.clone());
        tokio::spawn(async move {
            exit.status().await;
            if let Err(error) = cgroup.signal_all(libc::SIGKILL) {
                tracing::warn!("processes of a container outlive its first one: {error}");
            }
        });
    }

    fn alive(&self) -> Result<(), RequestError> {
        if self.init.exit.happened() { Err(RequestError::NotRunning) } else { Ok(()) }
    }

    fn change(&self, from: Phase, to: Phase, otherwise: RequestError) -> Result<(), RequestError> {
        let mut phase = lock(&self.phase);
        if *phase != from {
            return Err(otherwise);
        }
        *phase = to;
        Ok(())
    }

    /// The process with that identifier; the empty one is the first's.
    fn process(&self, exec_id: &str) -> Result<Process, RequestError> {
        if exec_id.is_empty() {
            return Ok(self.init.clone());
        }
        lock(&self.execs).get(exec_id).cloned().flatten().ok_or(RequestError::NoExec)
    }
}

impl Process {
    fn number(&self) -> u32 {
        self.pid.as_raw_nonzero().get().unsigned_abs()
    }

    fn signal(&self, signal: i32) -> Result<(), RequestError> {
        // A process whose end has not been seen here has not been reaped, so its number is its own.
        if self.exit.happened() {
            return Err(RequestError::Finished);
        }
        // SAFETY: it takes numbers only.
        match unsafe { libc::kill(self.pid.as_raw_nonzero().get(), signal) } {
            0 => Ok(()),
            _ => Err(RequestError::system("signal the process")(std::io::Error::last_os_error())),
        }
    }
}

/// Identifiers are names of files and cgroups.
fn valid(id: &str) -> Result<&str, RequestError> {
    let allowed = |c: char| c.is_ascii_alphanumeric() || "_+-.".contains(c);
    let fits = !id.is_empty() && id.len() <= 255 && id != "." && id != ".." && id.chars().all(allowed);
    if fits { Ok(id) } else { Err(RequestError::Identifier(id.to_owned())) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn identifiers_are_safe_names() {
        assert!(valid("web-1.a_B+").is_ok());
        for id in ["", ".", "..", "a/b", "a b", "ü", &"x".repeat(256)] {
            assert!(matches!(valid(id), Err(RequestError::Identifier(_))), "{id:?}");
        }
    }
}
