//! A private containerd with its CRI plugin.

use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context, Result};
use k8s_cri::v1;

use super::client::Client;
use super::pod::IMAGE;
use crate::cni::{self, Network};
use crate::command::{Cmd, eventually};
use crate::enclosure::Enclosure;
use crate::engine::Daemon;
use crate::image::{self, Archive};
use crate::judge::Judge;

/// What holds a pod's namespaces where the runtime wants a process for that.
const PAUSE: &str = "rvm.example/pause:latest";

/// Where the images and all else of the CRI's are in containerd.
const NAMESPACE: &str = "k8s.io";

/// Which containerd.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Release {
    /// The one of this machine's distribution.
    Installed,
    /// 1.7.
    Trixie,
    /// The same with its experimental server, which leaves the making of runvm's pods to its shim (the Sandbox API).
    TrixieBySandbox,
    /// 2.x.
    Sid,
    /// The same, which leaves the making of runvm's pods to its shim (the Sandbox API): they have no container of their own.
    SidBySandbox,
}

impl Release {
    /// All of them, the oldest first.
    pub const ALL: [Self; 5] = [Self::Installed, Self::Trixie, Self::TrixieBySandbox, Self::Sid, Self::SidBySandbox];

    /// The name by which the suite reports on it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Installed => "containerd-1.6",
            Self::Trixie => "containerd-1.7",
            Self::TrixieBySandbox => "containerd-1.7-sandbox",
            Self::Sid => "containerd-2",
            Self::SidBySandbox => "containerd-2-sandbox",
        }
    }

    /// The folder with its programs.
    fn programs(self) -> Result<PathBuf> {
        let release = match self {
            Self::Installed => return Ok(PathBuf::from("/usr/bin")),
            Self::Trixie | Self::TrixieBySandbox => "trixie",
            Self::Sid | Self::SidBySandbox => "sid",
        };
        Ok(image::later(release, &["containerd"])?.join("usr/bin"))
    }
}

/// The daemon with its images.
pub struct Engine {
    release: Release,
    daemon: Mutex<Option<Daemon>>,
    programs: PathBuf,
    folder: PathBuf,
    socket: PathBuf,
    cgroup: String,
    client: Client,
    _network: Network,
}

impl Engine {
    /// Starts the daemon in the suite's private world, with the runtime handlers `runc` and `runvm`.
    pub fn start(enclosure: &Enclosure, release: Release) -> Result<Self> {
        let folder = enclosure.work().join(release.name());
        std::fs::create_dir_all(&folder)?;
        let network = cni::configure(&folder)?;
        let socket = enclosure.sockets().join(format!("{}.sock", release.name()));
        let judge = Judge::write(enclosure.work())?;
        let state = enclosure.sockets().join(release.name());
        std::fs::write(folder.join("config.toml"), configuration(&folder, &state, &socket, &judge, release))?;
        let client = Client::of(&socket)?;
        let programs = release.programs()?;
        let cgroup = enclosure.cgroup();
        let engine =
            Self { release, daemon: Mutex::default(), programs, folder, socket, cgroup, client, _network: network };
        engine.start_daemon()?;
        engine.import(IMAGE, image::BUSYBOX, &["sh"])?;
        engine.import(PAUSE, image::PAUSE, &["/pause", "-P"])?;
        Ok(engine)
    }

    /// Stops the daemon and starts it anew, over what it kept. Containers live on.
    pub fn restart(&self) -> Result<()> {
        drop(self.daemon.lock().unwrap_or_else(PoisonError::into_inner).take());
        self.start_daemon()
    }

    fn start_daemon(&self) -> Result<()> {
        let mut path = self.programs.clone().into_os_string();
        path.push(":");
        path.push(std::env::var_os("PATH").unwrap_or_default());
        let daemon = Cmd::new(self.programs.join("containerd"))
            .env("PATH", path)
            .arg("--config")
            .arg(self.folder.join("config.toml"));
        let daemon = match self.release {
            Release::TrixieBySandbox => daemon.env("ENABLE_CRI_SANDBOXES", "sandboxed"),
            _ => daemon,
        };
        let daemon = Daemon::start(daemon, &self.folder.join("log"), || self.ctr().arg("version"))?;
        let mut place = self.daemon.lock().unwrap_or_else(PoisonError::into_inner);
        let daemon = place.insert(daemon);
        eventually(Duration::from_secs(60), "the CRI plugin and its network to be ready", || {
            let status = self.client.call(async |mut c| c.status(v1::StatusRequest::default()).await);
            let conditions = status.ok().and_then(|status| status.status).unwrap_or_default().conditions;
            let holds = |name| conditions.iter().any(|condition| condition.r#type == name && condition.status);
            Ok((holds("RuntimeReady") && holds("NetworkReady")).then_some(()))
        })
        .with_context(|| daemon.last_words())
    }

    /// containerd's own client, in the CRI's namespace.
    pub fn ctr(&self) -> Cmd {
        Cmd::new(self.programs.join("ctr")).arg("--address").arg(&self.socket).args(["--namespace", NAMESPACE])
    }

    /// The CRI's client.
    pub fn client(&self) -> &Client {
        &self.client
    }

    /// Which containerd it is.
    pub fn release(&self) -> Release {
        self.release
    }

    /// A folder on disk.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// The cgroup that pods belong under.
    pub fn cgroup(&self) -> &str {
        &self.cgroup
    }

    /// The end of the daemon's log.
    pub fn last_words(&self) -> String {
        let daemon = self.daemon.lock().unwrap_or_else(PoisonError::into_inner);
        daemon.as_ref().map(Daemon::last_words).unwrap_or_default()
    }

    fn import(&self, name: &str, root: &str, command: &[&str]) -> Result<()> {
        let folder = tempfile::tempdir()?;
        let archive = Archive { name, root, command }.write(folder.path())?;
        self.ctr().args(["image", "import"]).arg(archive).ok()?;
        // The plugin hears of an image by an event.
        eventually(Duration::from_secs(60), &format!("the CRI plugin to know {name}"), || {
            let image = v1::ImageSpec { image: name.to_owned(), ..Default::default() };
            let request = v1::ImageStatusRequest { image: Some(image), verbose: false };
            Ok(self.client.call_images(async |mut c| c.image_status(request).await)?.image.map(drop))
        })
    }
}

/// containerd's configuration; all releases read the second version of it.
fn configuration(folder: &Path, state: &Path, socket: &Path, judge: &Judge, release: Release) -> String {
    let root = folder.join("root");
    let (network, plugins) = (folder.join(cni::ONE), cni::PLUGINS);
    let general = format!(
        r#"
version = 2
root = {root:?}
state = {state:?}
disabled_plugins = ["io.containerd.internal.v1.opt"]

[grpc]
address = {socket:?}

[plugins."io.containerd.nri.v1.nri"]
disable = true

[plugins."io.containerd.grpc.v1.cri"]
sandbox_image = {PAUSE:?}
# Root may not lower the score everywhere.
restrict_oom_score_adj = true
stream_server_address = "127.0.0.1"
stream_server_port = "0"

[plugins."io.containerd.grpc.v1.cri".cni]
bin_dir = {plugins:?}
conf_dir = {network:?}

[plugins."io.containerd.grpc.v1.cri".containerd]
default_runtime_name = "runc"
"#
    );
    let two = folder.join(cni::TWO);
    let in_two_networks = format!("cni_conf_dir = {two:?}\ncni_max_conf_num = 2\n");
    let judge = format!("BinaryName = {:?}\n", judge.program());
    // Stdio by the shim's own streams goes with the Sandbox API: its address is the sandbox's.
    let sandboxer = match release {
        Release::SidBySandbox => "sandboxer = \"shim\"\nio_type = \"streaming\"\n",
        Release::TrixieBySandbox => "sandbox_mode = \"shim\"\n",
        _ => "",
    };
    let handlers = [
        handler("runc", "io.containerd.runc.v2", "", &judge),
        handler("runc-in-two-networks", "io.containerd.runc.v2", &in_two_networks, &judge),
        // Its program is found by its name in the daemon's PATH.
        handler("runvm", "io.containerd.runvm.v2", sandboxer, ""),
        handler("runvm-in-two-networks", "io.containerd.runvm.v2", &(in_two_networks + sandboxer), ""),
    ];
    general + &handlers.concat()
}

/// A runtime handler, as a Kubernetes RuntimeClass names it.
fn handler(name: &str, kind: &str, settings: &str, options: &str) -> String {
    format!(
        r#"
[plugins."io.containerd.grpc.v1.cri".containerd.runtimes.{name}]
runtime_type = "{kind}"
privileged_without_host_devices = true
{settings}
[plugins."io.containerd.grpc.v1.cri".containerd.runtimes.{name}.options]
{options}"#
    )
}
