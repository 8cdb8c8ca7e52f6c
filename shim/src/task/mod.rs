//! The containers of a shim, and the VM that they share: what the services do is done here.

mod attend;
mod container;
mod create;
mod metrics;
mod pod_files;
mod process;
mod sandbox;

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime};

use containerd_shim_protos::api::{
    CreateTaskRequest, DeleteResponse, ExecProcessRequest, KillRequest, StateResponse, Status,
};
use containerd_shim_protos::events::task::{
    TaskCreate, TaskDelete, TaskExecAdded, TaskExecStarted, TaskIO, TaskPaused, TaskResumed, TaskStart,
};
use oci_spec::runtime::{LinuxResources, Process as ProcessSpec};
use protobuf::well_known_types::any::Any;
use runvm::agent::AgentError;
use runvm::container::{limits_of_guest, start_process};
use runvm::error::sentence;
use runvm::log;
use runvm::pod::Pod;
use rustix::process::Signal;
use tokio::sync::{Mutex as Turn, Notify};

use crate::errors::{Error, Result};
use crate::events::Events;
use crate::options::Environment;
use crate::stdio::Stdio;
use crate::streams::Streams;
use crate::sync::lock;
use crate::{mounts, wire};

pub use container::Container;
pub use pod_files::SHARED_MEMORY;
pub use process::{End, Phase};
pub use sandbox::CGROUP_PARENT;

use process::{Output, Process};

/// How long the deletion of a process waits for those who read its output.
const OUTPUT_LIMIT: Duration = Duration::from_secs(2);
/// SIGKILL's number.
const KILL: u32 = Signal::KILL.as_raw().unsigned_abs();

/// The VM in its place.
struct Held {
    pod: Arc<Pod>,
    /// Whether it stays when nothing runs in it: a sandbox that containerd ends by itself.
    kept: bool,
}

/// The containers of this shim.
pub struct Tasks {
    namespace: String,
    environment: Environment,
    log: log::Options,
    events: Events,
    streams: Streams,
    pod: Turn<Option<Held>>,
    sandbox: Mutex<Option<sandbox::Record>>,
    containers: Mutex<BTreeMap<String, Arc<Container>>>,
    over: Notify,
}

impl Tasks {
    /// None yet, in containerd's `namespace`.
    pub fn new(namespace: &str, environment: Environment, log: log::Options, events: Events, streams: Streams) -> Self {
        Self {
            namespace: namespace.to_owned(),
            environment,
            log,
            events,
            streams,
            pod: Turn::default(),
            sandbox: Mutex::default(),
            containers: Mutex::default(),
            over: Notify::new(),
        }
    }

    /// Where containerd finds the streams of processes that have no fifos.
    pub fn streams(&self) -> &Streams {
        &self.streams
    }

    /// Waits until the shim is asked to end, having nothing to do any more.
    pub async fn over(&self) {
        self.over.notified().await;
    }

    /// Ends the shim, unless there are containers.
    pub fn shut_down(&self) {
        if lock(&self.containers).is_empty() && lock(&self.sandbox).is_none() {
            self.over.notify_one();
        }
    }

    /// Ends the VM, and with it all that runs. The ends are told.
    pub async fn end(&self) {
        let held = self.pod.lock().await.take();
        if let Some(held) = held {
            held.pod.end().await;
        }
        for container in self.containers() {
            container.init.ended().await;
        }
    }

    fn containers(&self) -> Vec<Arc<Container>> {
        lock(&self.containers).values().cloned().collect()
    }

    /// A container.
    ///
    /// # Errors
    /// [`Error::NoContainer`].
    pub fn container(&self, id: &str) -> Result<Arc<Container>> {
        lock(&self.containers).get(id).cloned().ok_or(Error::NoContainer)
    }

    /// Makes a container from its bundle; its PID.
    ///
    /// # Errors
    /// [`Error`]; then nothing of it is left.
    pub async fn create(self: &Arc<Self>, request: CreateTaskRequest) -> Result<u32> {
        if !request.checkpoint.is_empty() {
            return Err(Error::Unsupported("a container in a VM cannot be restored from a checkpoint"));
        }
        if lock(&self.containers).contains_key(&request.id) {
            return Err(Error::Exists(request.id));
        }
        let made = create::make(self, &request).await?;
        let (container, relay, logger) = (Arc::new(made.container), made.relay, made.logger);
        lock(&self.containers).insert(request.id.clone(), container.clone());
        let pid = container.pod.pid();
        self.events.publish(&TaskCreate {
            container_id: request.id,
            bundle: request.bundle,
            rootfs: request.rootfs,
            io: Some(TaskIO {
                stdin: request.stdin,
                stdout: request.stdout,
                stderr: request.stderr,
                terminal: request.terminal,
                ..Default::default()
            })
            .into(),
            pid,
            ..Default::default()
        });
        self.attend(&container, &container.init, relay.start(), logger);
        Ok(pid)
    }

    /// Runs a created process; its PID.
    ///
    /// # Errors
    /// [`Error::State`] for one that is not created; the guest's.
    pub async fn start(self: &Arc<Self>, id: &str, exec_id: &str) -> Result<u32> {
        let container = self.container(id)?;
        let process = container.process(exec_id)?;
        let _turn = process.turn().await;
        process.expect("start", |phase| phase == Phase::Created)?;
        let pid = container.pod.pid();
        if exec_id.is_empty() {
            container.pod.start(id).await?;
            process.started();
            self.events.publish(&TaskStart { container_id: id.to_owned(), pid, ..Default::default() });
            self.attend_memory(&container);
        } else {
            self.start_exec(&container, &process).await?;
            self.events.publish(&TaskExecStarted {
                container_id: id.to_owned(),
                exec_id: exec_id.to_owned(),
                pid,
                ..Default::default()
            });
        }
        Ok(pid)
    }

    async fn start_exec(self: &Arc<Self>, container: &Arc<Container>, process: &Arc<Process>) -> Result<()> {
        let Some(spec) = &process.spec else { return Err(Error::NoProcess(process.exec_id.clone())) };
        let size = create::console_size(Some(spec));
        let opened = process.stdio.open(&container.id, &self.namespace, size, &self.streams).await?;
        process.hold(opened.stdin, opened.claims);
        let place = container.place(&process.exec_id);
        match start_process(&place, spec, "", opened.descriptors, false).await {
            Ok(relay) => {
                process.started();
                self.attend(container, process, relay.start(), opened.logger);
                Ok(())
            }
            Err(error) => {
                // As with runc one that did not start has ended, and is to be deleted.
                process.stopped(End { status: u8::MAX, at: SystemTime::now() });
                process.release();
                process.output().send_replace(Output::Closed);
                Err(error.into())
            }
        }
    }

    /// Takes in a further process of a container, which waits for its start.
    ///
    /// # Errors
    /// [`Error`].
    pub fn exec(&self, request: ExecProcessRequest) -> Result<()> {
        let container = self.container(&request.id)?;
        let mut spec: ProcessSpec = json(&request.spec, "spec", "the process as JSON")?;
        spec.set_terminal(Some(request.terminal));
        let stdio =
            Stdio { stdin: request.stdin, stdout: request.stdout, stderr: request.stderr, terminal: request.terminal };
        if request.exec_id.is_empty() {
            return Err(Error::Request { field: "exec_id", problem: "is empty".to_owned() });
        }
        container.add(Process::new(&request.exec_id, stdio, Some(spec)))?;
        self.events.publish(&TaskExecAdded {
            container_id: request.id,
            exec_id: request.exec_id,
            ..Default::default()
        });
        Ok(())
    }

    /// What a process is.
    ///
    /// # Errors
    /// [`Error::NoContainer`], [`Error::NoProcess`].
    pub fn state(&self, id: &str, exec_id: &str) -> Result<StateResponse> {
        let container = self.container(id)?;
        let process = container.process(exec_id)?;
        let status = if exec_id.is_empty() { container.status() } else { process.phase().status() };
        let mut state = StateResponse {
            id: container.id.clone(),
            exec_id: exec_id.to_owned(),
            bundle: container.bundle.to_string_lossy().into_owned(),
            pid: container.pod.pid(),
            status: status.into(),
            stdin: process.stdio.stdin.clone(),
            stdout: process.stdio.stdout.clone(),
            stderr: process.stdio.stderr.clone(),
            terminal: process.stdio.terminal,
            ..Default::default()
        };
        if let Phase::Stopped(end) = process.phase() {
            state.exit_status = end.status.into();
            state.exited_at = Some(wire::timestamp(end.at)).into();
        }
        Ok(state)
    }

    /// Waits for the end of a process.
    ///
    /// # Errors
    /// [`Error::NoContainer`], [`Error::NoProcess`].
    pub async fn wait(&self, id: &str, exec_id: &str) -> Result<End> {
        let process = self.container(id)?.process(exec_id)?;
        Ok(process.ended().await)
    }

    /// Sends a signal. A guest that does not answer is not spared: an engine that cannot ask a container to end would
    /// never come to kill it.
    ///
    /// # Errors
    /// [`Error::Finished`] where the process has ended.
    pub async fn kill(&self, request: &KillRequest) -> Result<()> {
        let container = self.container(&request.id)?;
        let process = container.process(&request.exec_id)?;
        match process.phase() {
            Phase::Stopped(_) => return Err(Error::Finished),
            Phase::Created if process.spec.is_some() => {
                return Err(Error::State { action: "kill", state: "created" });
            }
            Phase::Created | Phase::Running => {}
        }
        if request.signal == KILL {
            process.killed();
        }
        let agent = container.pod.agent();
        match agent.signal_process(&request.id, &request.exec_id, request.signal, request.all).await {
            Err(error) if error.is_not_found() => Err(Error::Finished),
            Err(error) if error.is_end_of_guest() => Err(Error::Finished),
            // The bound of its end holds.
            Err(error) if request.signal == KILL => {
                tracing::warn!("the guest does not take the signal: {}", sentence(&error));
                Ok(())
            }
            Err(error @ AgentError::Silent { .. }) => {
                tracing::warn!("the VM is ended: {}", sentence(&error));
                // The end may be told to its last client, and this process with it be over, sooner than this answer.
                container.pod.abandon();
                Ok(())
            }
            sent => Ok(sent?),
        }
    }

    /// Forgets a process that has ended, or was never started; how it ended.
    ///
    /// # Errors
    /// [`Error::State`] for one that runs.
    pub async fn delete(&self, id: &str, exec_id: &str) -> Result<DeleteResponse> {
        let container = self.container(id)?;
        let process = container.process(exec_id)?;
        process.expect("delete", |phase| phase != Phase::Running)?;
        let end = match process.phase() {
            Phase::Created if exec_id.is_empty() => {
                let kill = KillRequest { id: id.to_owned(), signal: KILL, all: true, ..Default::default() };
                if let Err(error) = self.kill(&kill).await {
                    tracing::info!("container {id} is deleted unstarted: {}", sentence(&error));
                }
                process.ended().await
            }
            Phase::Stopped(end) => end,
            Phase::Created | Phase::Running => End { status: 0, at: SystemTime::now() },
        };
        if matches!(process.phase(), Phase::Stopped(_)) {
            process.output_reaches(Output::Closed, OUTPUT_LIMIT).await;
        }
        process.release();
        let response = DeleteResponse {
            pid: container.pod.pid(),
            exit_status: end.status.into(),
            exited_at: Some(wire::timestamp(end.at)).into(),
            ..Default::default()
        };
        if exec_id.is_empty() {
            self.delete_container(&container, &response).await?;
        } else {
            container.remove(exec_id);
        }
        Ok(response)
    }

    async fn delete_container(&self, container: &Container, response: &DeleteResponse) -> Result<()> {
        for exec in container.execs() {
            exec.release();
        }
        container.pod.delete(&container.id).await;
        if container.mounted {
            mounts::unmount_all(&container.bundle.join("rootfs"))?;
        }
        if lock(&self.containers).remove(&container.id).is_none() {
            // containerd lost patience and asked again, and the other request has told of it.
            return Ok(());
        }
        self.events.publish(&TaskDelete {
            container_id: container.id.clone(),
            pid: response.pid,
            exit_status: response.exit_status,
            exited_at: response.exited_at.clone(),
            ..Default::default()
        });
        Ok(())
    }

    /// Has a container rest.
    ///
    /// # Errors
    /// [`Error::State`] unless it runs.
    pub async fn pause(&self, id: &str) -> Result<()> {
        let container = self.container(id)?;
        container.init.expect("pause", |phase| phase == Phase::Running)?;
        container.pod.agent().pause_container(id).await?;
        container.set_paused(true);
        self.events.publish(&TaskPaused { container_id: id.to_owned(), ..Default::default() });
        Ok(())
    }

    /// Lets a container go on.
    ///
    /// # Errors
    /// [`Error::State`] unless it runs.
    pub async fn resume(&self, id: &str) -> Result<()> {
        let container = self.container(id)?;
        container.init.expect("resume", |phase| phase == Phase::Running)?;
        if container.status() != Status::PAUSED {
            return Err(runvm::error::Error::NotPaused.into());
        }
        container.pod.agent().resume_container(id).await?;
        container.set_paused(false);
        self.events.publish(&TaskResumed { container_id: id.to_owned(), ..Default::default() });
        Ok(())
    }

    /// Tells a process's terminal its size.
    ///
    /// # Errors
    /// [`Error`].
    pub async fn resize(&self, id: &str, exec_id: &str, rows: u32, columns: u32) -> Result<()> {
        let container = self.container(id)?;
        let process = container.process(exec_id)?;
        process.expect("resize", |phase| !matches!(phase, Phase::Stopped(_)))?;
        if process.spec.is_some() && process.phase() == Phase::Created {
            return Err(Error::State { action: "resize", state: "created" });
        }
        let cells = |count: u32| u16::try_from(count).unwrap_or(u16::MAX);
        Ok(container.pod.agent().resize_terminal(id, exec_id, cells(rows), cells(columns)).await?)
    }

    /// Changes the limits of a container, within those of its VM.
    ///
    /// # Errors
    /// [`Error`].
    pub async fn update(&self, id: &str, resources: &Any) -> Result<()> {
        let container = self.container(id)?;
        let resources: LinuxResources = json(resources, "resources", "the limits as JSON")?;
        let resources = limits_of_guest(resources, container.pod.size())?;
        let resources = serde_json::to_vec(&resources)
            .map_err(|error| Error::Request { field: "resources", problem: error.to_string() })?;
        Ok(container.pod.agent().update_container(id, resources).await?)
    }

    /// What a container uses, as containerd's metrics.
    ///
    /// # Errors
    /// [`Error`].
    pub async fn statistics(&self, id: &str) -> Result<Any> {
        let container = self.container(id)?;
        container.init.expect("measure", |phase| !matches!(phase, Phase::Stopped(_)))?;
        let statistics = container.pod.agent().statistics(id).await?;
        metrics::Form::of_host().of(&statistics)
    }
}

/// What containerd wraps as JSON.
fn json<T: serde::de::DeserializeOwned>(any: &Any, field: &'static str, what: &str) -> Result<T> {
    serde_json::from_slice(&any.value)
        .map_err(|error| Error::Request { field, problem: format!("is not {what}: {error}") })
}
