//! A sandbox: a VM that containerd makes before there are containers, and ends by itself.

use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::SystemTime;

use containerd_shim_protos::sandbox_api::{CreateSandboxRequest, SandboxStatusResponse};
use oci_spec::runtime::Spec;
use protobuf::Message as _;
use protobuf::well_known_types::any::Any;
use runvm::bundle::{NetworkNamespace, PodWishes};
use runvm::error::sentence;
use runvm::monitor::KILLED;
use runvm::pod::{Empty, Pod};
use runvm::sandbox::Size;

use super::pod_files::PodFiles;
use super::process::End;
use super::{Held, Tasks, metrics};
use crate::errors::{Error, Result};
use crate::sync::lock;
use crate::wire;
use crate::wire::options::{LinuxContainerResources, NamespaceMode, PodSandboxConfig};

/// Where the bundle says which cgroup the pod's is in, for the `delete` after a shim that was killed.
pub const CGROUP_PARENT: &str = "cgroup-parent";
/// How containerd wraps a pod of the CRI.
const POD: &str = "runtime.v1.PodSandboxConfig";

/// What is known of the sandbox.
pub(super) struct Record {
    id: String,
    network: Option<PathBuf>,
    config: PodSandboxConfig,
    files: PodFiles,
    started: Option<Started>,
}

struct Started {
    at: SystemTime,
    pod: Arc<Pod>,
    /// It was told to end.
    stopped: bool,
    end: Option<End>,
}

impl Tasks {
    /// Takes note of what the sandbox is to be.
    ///
    /// # Errors
    /// [`Error`].
    pub fn create_sandbox(&self, request: &CreateSandboxRequest) -> Result<()> {
        let mut sandbox = lock(&self.sandbox);
        if sandbox.is_some() {
            return Err(Error::Exists(request.sandbox_id.clone()));
        }
        if !request.rootfs.is_empty() {
            return Err(Error::Unsupported("a sandbox in a VM has no root file system of its own"));
        }
        let mut config = request.options.as_ref().map(pod_config).transpose()?.flatten().unwrap_or_default();
        check(&config)?;
        if config.hostname.is_empty() {
            config.hostname = rustix::system::uname().nodename().to_string_lossy().into_owned();
        }
        let bundle = Path::new(&request.bundle_path);
        let parent = bundle.join(CGROUP_PARENT);
        fs::write(&parent, &config.linux.cgroup_parent).map_err(Error::file("write", parent))?;
        *sandbox = Some(Record {
            id: request.sandbox_id.clone(),
            network: Some(request.netns_path.as_str()).filter(|path| !path.is_empty()).map(PathBuf::from),
            files: PodFiles::make(&request.sandbox_id, bundle, &config)?,
            config,
            started: None,
        });
        Ok(())
    }

    /// Boots the sandbox's VM; its PID, and when it began.
    ///
    /// # Errors
    /// [`Error`].
    pub async fn start_sandbox(&self, id: &str) -> Result<(u32, SystemTime)> {
        let mut place = self.pod.lock().await;
        let empty = self.with_sandbox(id, |record| match &record.started {
            Some(_) => Err(Error::State { action: "start", state: "running" }),
            None => Ok(record.empty()),
        })??;
        let options = self.environment.complete(None, self.log.clone())?;
        let pod = Arc::new(Pod::boot_empty(&options, id, empty).await?);
        *place = Some(Held { pod: pod.clone(), kept: true });
        let (pid, at) = (pod.pid(), SystemTime::now());
        self.with_sandbox(id, |record| record.started = Some(Started { at, pod, stopped: false, end: None }))?;
        Ok((pid, at))
    }

    /// Ends the sandbox's VM.
    ///
    /// # Errors
    /// [`Error::NoSandbox`].
    pub async fn stop_sandbox(&self, id: &str) -> Result<()> {
        self.with_sandbox(id, |record| {
            if let Some(started) = &mut record.started {
                started.stopped = true;
            }
        })?;
        self.end().await;
        Ok(())
    }

    /// Waits for the end of the sandbox's VM.
    ///
    /// # Errors
    /// [`Error::NoSandbox`]; [`Error::State`] for one that was not started.
    pub async fn wait_sandbox(&self, id: &str) -> Result<End> {
        let pod = self.with_sandbox(id, |record| record.started.as_ref().map(|started| started.pod.clone()))?;
        let Some(pod) = pod else { return Err(Error::State { action: "wait for", state: "created" }) };
        pod.ended().await;
        self.with_sandbox(id, |record| {
            let end = |stopped| End { status: if stopped { 0 } else { KILLED }, at: SystemTime::now() };
            match &mut record.started {
                Some(started) => *started.end.get_or_insert(end(started.stopped)),
                None => end(true),
            }
        })
    }

    /// What the sandbox is, in the words of the CRI.
    ///
    /// # Errors
    /// [`Error::NoSandbox`].
    pub async fn sandbox_status(&self, id: &str) -> Result<SandboxStatusResponse> {
        let running = self.pod.lock().await.as_ref().map(|held| held.pod.pid());
        self.with_sandbox(id, |record| {
            let mut status = SandboxStatusResponse { sandbox_id: id.to_owned(), ..Default::default() };
            let ready = running.filter(|_| record.started.as_ref().is_some_and(|started| started.end.is_none()));
            status.state = if ready.is_some() { "SANDBOX_READY" } else { "SANDBOX_NOTREADY" }.to_owned();
            status.pid = ready.unwrap_or_default();
            if let Some(started) = &record.started {
                status.created_at = Some(wire::timestamp(started.at)).into();
                status.exited_at = started.end.map(|end| wire::timestamp(end.at)).into();
            }
            status
        })
    }

    /// What the containers of the sandbox use together.
    ///
    /// # Errors
    /// [`Error::NoSandbox`].
    pub async fn sandbox_statistics(&self, id: &str) -> Result<Any> {
        self.with_sandbox(id, |_| ())?;
        let mut all = Vec::new();
        for container in self.containers() {
            // One that has ended uses nothing.
            all.extend(container.pod.agent().statistics(&container.id).await.ok());
        }
        metrics::Form::of_host().of(&metrics::sum(all))
    }

    /// Ends the sandbox for good, and the shim; the shim also where the sandbox was refused, as nobody else would.
    ///
    /// # Errors
    /// [`Error::NoSandbox`] where there is another one.
    pub async fn shut_down_sandbox(&self, id: &str) -> Result<()> {
        if lock(&self.sandbox).is_some() {
            self.with_sandbox(id, |_| ())?;
        }
        self.end().await;
        let record = lock(&self.sandbox).take();
        if let Some(Err(error)) = record.map(|record| record.files.remove()) {
            tracing::warn!("{}", sentence(&error));
        }
        self.shut_down();
        Ok(())
    }

    /// Whether the sandbox is there.
    ///
    /// # Errors
    /// [`Error::NoSandbox`].
    pub fn ping_sandbox(&self, id: &str) -> Result<()> {
        self.with_sandbox(id, |_| ())
    }

    /// Has a container of the sandbox, if there is one, have what is the pod's.
    pub(super) fn complete(&self, spec: &mut Spec) {
        if let Some(record) = lock(&self.sandbox).as_ref() {
            record.complete(spec);
        }
    }

    fn with_sandbox<T>(&self, id: &str, work: impl FnOnce(&mut Record) -> T) -> Result<T> {
        match lock(&self.sandbox).as_mut().filter(|record| record.id == id) {
            Some(record) => Ok(work(record)),
            None => Err(Error::NoSandbox(id.to_owned())),
        }
    }
}

impl Record {
    fn complete(&self, spec: &mut Spec) {
        self.files.bring_into(spec);
        let mut linux = spec.linux().clone().unwrap_or_default();
        let mut sysctls: HashMap<_, _> = self.config.linux.sysctls.clone();
        sysctls.extend(linux.sysctl().clone().unwrap_or_default());
        linux.set_sysctl(Some(sysctls));
        spec.set_linux(Some(linux));
    }

    fn empty(&self) -> Empty {
        let limits = Limits::of(&self.config);
        Empty {
            hostname: self.config.hostname.clone(),
            network: self.network.clone().map_or(NetworkNamespace::New, NetworkNamespace::Existing),
            size: Size::for_limits(limits.vcpus, limits.memory),
            cgroup_parent: self.config.linux.cgroup_parent.clone(),
        }
    }
}

/// What the containers of a pod may use together, as far as the CRI says.
#[derive(Debug, PartialEq, Eq)]
struct Limits {
    vcpus: Option<u32>,
    memory: Option<u64>,
}

impl Limits {
    fn of(config: &PodSandboxConfig) -> Self {
        let positive = |number: i64| u64::try_from(number).ok().filter(|&number| number > 0);
        let resources: &LinuxContainerResources = &config.linux.resources;
        let quota = positive(resources.cpu_quota);
        let period = positive(resources.cpu_period).unwrap_or(100_000);
        Self {
            vcpus: quota.and_then(|quota| u32::try_from(quota.div_ceil(period)).ok()),
            memory: positive(resources.memory_limit_in_bytes),
        }
    }
}

fn check(config: &PodSandboxConfig) -> Result<()> {
    let namespaces = &config.linux.security_context.namespace_options;
    let wishes = PodWishes {
        host_pid: namespaces.pid == NamespaceMode::NODE.into(),
        host_ipc: namespaces.ipc == NamespaceMode::NODE.into(),
        own_users: namespaces.userns_options.as_ref().is_some_and(|users| users.mode == NamespaceMode::POD.into()),
    };
    wishes.check().map_err(|problem| Error::Request { field: "the pod", problem })
}

fn pod_config(options: &Any) -> Result<Option<PodSandboxConfig>> {
    if !options.type_url.ends_with(POD) {
        return Ok(None);
    }
    match PodSandboxConfig::parse_from_bytes(&options.value) {
        Ok(config) => Ok(Some(config)),
        Err(error) => Err(Error::Request { field: "options", problem: format!("is no pod of the CRI: {error}") }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire::options::LinuxPodSandboxConfig;

    #[test]
    fn a_pods_limits_are_those_of_its_containers() {
        let resources = LinuxContainerResources {
            cpu_quota: 150_000,
            cpu_period: 100_000,
            memory_limit_in_bytes: 1 << 30,
            ..Default::default()
        };
        let linux = LinuxPodSandboxConfig { resources: Some(resources).into(), ..Default::default() };
        let config = PodSandboxConfig { hostname: "h".into(), linux: Some(linux).into(), ..Default::default() };
        assert_eq!(Limits::of(&config), Limits { vcpus: Some(2), memory: Some(1 << 30) });
        assert_eq!(Limits::of(&PodSandboxConfig::default()), Limits { vcpus: None, memory: None });

        let any = |type_url: &str| Any {
            type_url: type_url.into(),
            value: config.write_to_bytes().unwrap(),
            ..Default::default()
        };
        assert_eq!(pod_config(&any("runtime.v1.PodSandboxConfig")).unwrap().unwrap().hostname, "h");
        assert!(pod_config(&any("other")).unwrap().is_none());
    }
}
