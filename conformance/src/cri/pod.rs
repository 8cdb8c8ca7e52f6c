//! Pods and their containers, as the kubelet makes them.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context, Result, anyhow};
use k8s_cri::v1::{self, ContainerState};
use tempfile::TempDir;

use super::client::Client;
use super::engine::Engine;
use super::log::{self, Line};
use super::stream::Stream;
use crate::Output;
use crate::command::eventually;
use crate::enclosure::cgroup_hierarchies;
use crate::runtime::Runtime;
use crate::suite::{Handle, next_number};

/// The small image.
pub const IMAGE: &str = "rvm.example/busybox:latest";

/// The label by which the pods of a case are found.
const CASE: &str = "rvm.example/case";

/// How long a container may take to come to a state that it is about to be in.
const PATIENCE: Duration = Duration::from_secs(60);

/// One runtime handler, for one run of one case.
pub struct Cri {
    engine: Arc<Engine>,
    runtime: Runtime,
    tag: String,
    folder: TempDir,
    cgroups: Mutex<Vec<String>>,
}

impl Cri {
    /// A handle for one run of a case.
    pub fn open(engine: &Arc<Engine>, runtime: Runtime) -> Result<Self> {
        let tag = format!("rvm-{}", next_number());
        let folder = tempfile::Builder::new().prefix(&tag).tempdir_in(engine.folder())?;
        Ok(Self { engine: Arc::clone(engine), runtime, tag, folder, cgroups: Mutex::default() })
    }

    /// The engine, for what is not a pod's.
    pub fn engine(&self) -> &Engine {
        &self.engine
    }

    /// The CRI's client.
    pub fn client(&self) -> &Client {
        self.engine.client()
    }

    /// Which runtime this is.
    pub fn runtime(&self) -> Runtime {
        self.runtime
    }

    /// A folder of the case's own on the host.
    pub fn folder(&self) -> &Path {
        self.folder.path()
    }

    /// Starts a pod as it comes: an address of each family, no ports.
    pub fn pod(&self) -> Result<Pod<'_>> {
        self.pod_with(|_| ())
    }

    /// Starts a pod whose configuration `change` has completed.
    pub fn pod_with(&self, change: impl FnOnce(&mut v1::PodSandboxConfig)) -> Result<Pod<'_>> {
        self.pod_by("", change)
    }

    /// Starts a pod that has an interface in each of two networks.
    pub fn pod_in_two_networks(&self) -> Result<Pod<'_>> {
        self.pod_by("-in-two-networks", |_| ())
    }

    fn pod_by(&self, handler: &str, change: impl FnOnce(&mut v1::PodSandboxConfig)) -> Result<Pod<'_>> {
        let name = format!("{}-{}", self.tag, next_number());
        let cgroup = format!("{}/{name}", self.engine.cgroup());
        self.cgroups.lock().unwrap_or_else(PoisonError::into_inner).push(cgroup.clone());
        let mut config = v1::PodSandboxConfig {
            metadata: Some(v1::PodSandboxMetadata {
                uid: name.clone(),
                namespace: "default".to_owned(),
                attempt: 0,
                name: name.clone(),
            }),
            hostname: name.clone(),
            log_directory: self.folder().join(&name).display().to_string(),
            labels: HashMap::from([(CASE.to_owned(), self.tag.clone())]),
            linux: Some(v1::LinuxPodSandboxConfig {
                cgroup_parent: cgroup,
                security_context: Some(v1::LinuxSandboxSecurityContext {
                    namespace_options: Some(own_processes()),
                    ..Default::default()
                }),
                ..Default::default()
            }),
            ..Default::default()
        };
        change(&mut config);
        std::fs::create_dir_all(&config.log_directory)?;
        let runtime_handler = format!("{}{handler}", if self.runtime.is_runc() { "runc" } else { "runvm" });
        let request = v1::RunPodSandboxRequest { config: Some(config.clone()), runtime_handler };
        let id = self.client().call(async |mut c| c.run_pod_sandbox(request).await)?.pod_sandbox_id;
        Ok(Pod { cri: self, id, config })
    }

    /// The pods of this case that the engine lists.
    pub fn list(&self) -> Result<Vec<v1::PodSandbox>> {
        let filter = v1::PodSandboxFilter {
            label_selector: HashMap::from([(CASE.to_owned(), self.tag.clone())]),
            ..Default::default()
        };
        let request = v1::ListPodSandboxRequest { filter: Some(filter) };
        Ok(self.client().call(async |mut c| c.list_pod_sandbox(request).await)?.items)
    }

    fn stop_pod(&self, id: &str) -> Result<()> {
        let request = v1::StopPodSandboxRequest { pod_sandbox_id: id.to_owned() };
        self.client().call(async |mut c| c.stop_pod_sandbox(request).await).map(drop)
    }

    fn remove_pod(&self, id: &str) -> Result<()> {
        let request = v1::RemovePodSandboxRequest { pod_sandbox_id: id.to_owned() };
        self.client().call(async |mut c| c.remove_pod_sandbox(request).await).map(drop)
    }
}

impl Cri {
    /// A pod's cgroup is the kubelet's to remove, not the runtime's; it has to be empty by then.
    fn remove_cgroups(&self) -> Result<()> {
        for cgroup in self.cgroups.lock().unwrap_or_else(PoisonError::into_inner).iter() {
            for group in in_hierarchies(cgroup)? {
                match std::fs::remove_dir(&group) {
                    Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
                        return Err(e).with_context(|| format!("a removed pod left its cgroup {}", group.display()));
                    }
                    _ => {}
                }
            }
        }
        Ok(())
    }
}

impl Handle for Cri {
    fn close(self) -> Result<()> {
        for pod in self.list()? {
            let removed = self.stop_pod(&pod.id).and_then(|()| self.remove_pod(&pod.id));
            removed.map_err(|error| anyhow!("{error:#}\n{}", self.engine.last_words()))?;
        }
        self.remove_cgroups()
    }
}

fn in_hierarchies(cgroup: &str) -> Result<Vec<PathBuf>> {
    Ok(cgroup_hierarchies()?.into_iter().map(|hierarchy| hierarchy.join(cgroup.trim_start_matches('/'))).collect())
}

/// A pod of a case.
pub struct Pod<'a> {
    cri: &'a Cri,
    /// Its ID.
    pub id: String,
    /// What it was made of.
    pub config: v1::PodSandboxConfig,
}

impl<'a> Pod<'a> {
    /// Stops all that runs in it, and takes its network away.
    pub fn stop(&self) -> Result<()> {
        self.cri.stop_pod(&self.id)
    }

    /// Removes it with all its containers.
    pub fn remove(&self) -> Result<()> {
        self.cri.remove_pod(&self.id)
    }

    /// The folder of its cgroup in each hierarchy, which need not be there.
    pub fn cgroups(&self) -> Result<Vec<PathBuf>> {
        in_hierarchies(&self.config.linux.as_ref().context("a pod has a cgroup")?.cgroup_parent)
    }

    /// What the engine says of it.
    pub fn status(&self) -> Result<v1::PodSandboxStatus> {
        let request = v1::PodSandboxStatusRequest { pod_sandbox_id: self.id.clone(), verbose: false };
        let response = self.cri.client().call(async |mut c| c.pod_sandbox_status(request).await)?;
        response.status.context("a pod has a status")
    }

    /// Whether it is ready.
    pub fn is_ready(&self) -> Result<bool> {
        Ok(self.status()?.state() == v1::PodSandboxState::SandboxReady)
    }

    /// Its addresses, the first of IPv4.
    pub fn addresses(&self) -> Result<Vec<String>> {
        let network = self.status()?.network.context("a pod has a network")?;
        Ok([network.ip].into_iter().chain(network.additional_ips.into_iter().map(|more| more.ip)).collect())
    }

    /// Makes a container that runs this command, and does not start it.
    pub fn create(&self, name: &str, command: &[&str]) -> Result<Container<'a>> {
        self.create_with(name, command, |_| ())
    }

    /// Makes a container whose configuration `change` has completed.
    pub fn create_with(
        &self,
        name: &str,
        command: &[&str],
        change: impl FnOnce(&mut v1::ContainerConfig),
    ) -> Result<Container<'a>> {
        let attempt = u32::try_from(next_number())?;
        let mut config = v1::ContainerConfig {
            metadata: Some(v1::ContainerMetadata { name: name.to_owned(), attempt }),
            image: Some(v1::ImageSpec { image: IMAGE.to_owned(), ..Default::default() }),
            command: command.iter().map(|&word| word.to_owned()).collect(),
            log_path: format!("{name}-{attempt}.log"),
            linux: Some(v1::LinuxContainerConfig {
                resources: Some(v1::LinuxContainerResources::default()),
                security_context: Some(v1::LinuxContainerSecurityContext {
                    namespace_options: Some(own_processes()),
                    ..Default::default()
                }),
            }),
            ..Default::default()
        };
        change(&mut config);
        let log = Path::new(&self.config.log_directory).join(&config.log_path);
        let request = v1::CreateContainerRequest {
            pod_sandbox_id: self.id.clone(),
            config: Some(config),
            sandbox_config: Some(self.config.clone()),
        };
        let id = self.cri.client().call(async |mut c| c.create_container(request).await)?.container_id;
        Ok(Container { cri: self.cri, id, log })
    }

    /// Starts a container that runs this command.
    pub fn start(&self, name: &str, command: &[&str]) -> Result<Container<'a>> {
        self.start_with(name, command, |_| ())
    }

    /// Starts a container whose configuration `change` has completed.
    pub fn start_with(
        &self,
        name: &str,
        command: &[&str],
        change: impl FnOnce(&mut v1::ContainerConfig),
    ) -> Result<Container<'a>> {
        let container = self.create_with(name, command, change)?;
        container.start()?;
        Ok(container)
    }

    /// Runs a shell script in a container of its own to its end: what it left.
    pub fn sh(&self, script: &str) -> Result<Output> {
        self.sh_with(script, |_| ())
    }

    /// Runs a shell script in a container whose configuration `change` has completed.
    pub fn sh_with(&self, script: &str, change: impl FnOnce(&mut v1::ContainerConfig)) -> Result<Output> {
        let container = self.start_with("sh", &["sh", "-c", script], change)?;
        let code = container.wait()?.exit_code;
        let lines = container.lines()?;
        let text = |stream| log::text(&lines, stream);
        Ok(Output { code, stdout: text("stdout"), stderr: text("stderr") })
    }
}

/// A container of a pod.
pub struct Container<'a> {
    cri: &'a Cri,
    /// Its ID.
    pub id: String,
    /// The file of what it printed.
    pub log: PathBuf,
}

impl Container<'_> {
    /// Starts it.
    pub fn start(&self) -> Result<()> {
        let request = v1::StartContainerRequest { container_id: self.id.clone() };
        self.cri.client().call(async |mut c| c.start_container(request).await).map(drop)
    }

    /// Asks it to end, and kills it after this many seconds.
    pub fn stop(&self, timeout: i64) -> Result<()> {
        let request = v1::StopContainerRequest { container_id: self.id.clone(), timeout };
        self.cri.client().call(async |mut c| c.stop_container(request).await).map(drop)
    }

    /// Removes it.
    pub fn remove(&self) -> Result<()> {
        let request = v1::RemoveContainerRequest { container_id: self.id.clone() };
        self.cri.client().call(async |mut c| c.remove_container(request).await).map(drop)
    }

    /// What the engine says of it.
    pub fn status(&self) -> Result<v1::ContainerStatus> {
        let request = v1::ContainerStatusRequest { container_id: self.id.clone(), verbose: false };
        let response = self.cri.client().call(async |mut c| c.container_status(request).await)?;
        response.status.context("a container has a status")
    }

    /// Waits for its end.
    pub fn wait(&self) -> Result<v1::ContainerStatus> {
        eventually(PATIENCE, "the container's end", || {
            let status = self.status()?;
            Ok((status.state() == ContainerState::ContainerExited).then_some(status))
        })
    }

    /// Runs a program in it to its end; there is no limit on its time.
    pub fn exec(&self, command: &[&str]) -> Result<Output> {
        self.exec_within(command, 0)
    }

    /// Runs a program in it, which is killed after this many seconds.
    pub fn exec_within(&self, command: &[&str], timeout: i64) -> Result<Output> {
        let cmd = command.iter().map(|&word| word.to_owned()).collect();
        let request = v1::ExecSyncRequest { container_id: self.id.clone(), cmd, timeout };
        let answer = self.cri.client().call(async |mut c| c.exec_sync(request).await)?;
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        Ok(Output { code: answer.exit_code, stdout: text(&answer.stdout), stderr: text(&answer.stderr) })
    }

    /// Runs a shell script in it to its end.
    pub fn sh(&self, script: &str) -> Result<Output> {
        self.exec(&["sh", "-c", script])
    }

    /// Runs a shell script in it again and again until it succeeds: what it printed then.
    pub fn until(&self, script: &str) -> Result<Output> {
        eventually(PATIENCE, &format!("`{script}` to succeed"), || {
            let output = self.sh(script)?;
            Ok((output.code == 0).then_some(output))
        })
    }

    /// Runs a program in it over the streaming server, as `kubectl exec --stdin` does.
    pub fn exec_stream(&self, command: &[&str], tty: bool) -> Result<Stream> {
        let request = v1::ExecRequest {
            container_id: self.id.clone(),
            cmd: command.iter().map(|&word| word.to_owned()).collect(),
            tty,
            stdin: true,
            stdout: true,
            // A terminal has no second output.
            stderr: !tty,
        };
        let url = self.cri.client().call(async |mut c| c.exec(request).await)?.url;
        Stream::open(&url)
    }

    /// Its own streams, over the streaming server, as `kubectl attach` does.
    pub fn attach(&self, tty: bool) -> Result<Stream> {
        let request = v1::AttachRequest { container_id: self.id.clone(), stdin: true, tty, stdout: true, stderr: !tty };
        let url = self.cri.client().call(async |mut c| c.attach(request).await)?.url;
        Stream::open(&url)
    }

    /// The lines of its log.
    pub fn lines(&self) -> Result<Vec<Line>> {
        log::read(&self.log)
    }

    /// Waits until its log has this text.
    pub fn expect_log(&self, text: &str) -> Result<()> {
        eventually(PATIENCE, &format!("{text:?} in the log"), || {
            Ok(log::text(&self.lines()?, "stdout").contains(text).then_some(()))
        })
    }
}

/// What the kubelet asks for unless a pod says otherwise: processes are a container's own, all else is its pod's.
fn own_processes() -> v1::NamespaceOption {
    v1::NamespaceOption { pid: v1::NamespaceMode::Container.into(), ..Default::default() }
}

/// The security context of a container's configuration, to be changed.
pub fn security(config: &mut v1::ContainerConfig) -> &mut v1::LinuxContainerSecurityContext {
    config.linux.get_or_insert_default().security_context.get_or_insert_default()
}

/// The security context of a pod's configuration, to be changed.
pub fn pod_security(config: &mut v1::PodSandboxConfig) -> &mut v1::LinuxSandboxSecurityContext {
    config.linux.get_or_insert_default().security_context.get_or_insert_default()
}
