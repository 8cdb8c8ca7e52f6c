//! A private Docker daemon, and the handle that its cases get.

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use anyhow::{Context, Result, bail};
use rustix::mount::{UnmountFlags, mount_bind, unmount};
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::command::Cmd;
use crate::enclosure::Enclosure;
use crate::engine::Daemon;
use crate::image;
use crate::judge::Judge;
use crate::nameserver::Nameserver;
use crate::runtime::Runtime;
use crate::suite::{Handle, next_number};

/// What a later release of the distribution has: an engine that can start runtimes by shims of their own.
const LATER: (&str, &[&str]) = ("sid", &["docker.io", "docker-cli", "containerd"]);

const BRIDGE: &str = "rvm0";

/// The host's addresses on the default bridge.
pub const HOST4: Ipv4Addr = Ipv4Addr::new(172, 31, 250, 1);
/// See [`HOST4`].
pub const HOST6: Ipv6Addr = Ipv6Addr::new(0xfd00, 0x7276, 0x6d00, 0x1, 0, 0, 0, 1);

/// The daemon, its bridge, its name server and its images.
pub struct Engine {
    daemon: Daemon,
    /// The client that came with the daemon.
    program: PathBuf,
    by_shim: bool,
    socket: PathBuf,
    folder: PathBuf,
    cgroup: String,
    loaded: Mutex<BTreeSet<String>>,
    _network: Option<(Nameserver, Bridge)>,
    _mounts: Vec<Mounted>,
}

/// How a daemon is started.
struct Setup<'a> {
    name: &'a str,
    /// Where its programs are.
    tree: &'a Path,
    by_shim: bool,
    config: Value,
    bridge: &'a str,
    data: &'a Path,
}

impl Engine {
    /// Starts the daemon in the suite's private world, with the runtimes under test.
    pub fn start(enclosure: &Enclosure) -> Result<Self> {
        let judge = Judge::write(enclosure.work())?;
        Self::start_with(enclosure, &under_test(&judge, &Runtime::Kvm.program()))
    }

    /// Starts the daemon of a later release, which makes a container's interfaces after its creation. Under it runvm is in
    /// runc's place, or runc and runvm each have their own shim.
    pub fn start_later(enclosure: &Enclosure, by_shim: bool) -> Result<Self> {
        let tree = image::later(LATER.0, LATER.1)?;
        let judge = Judge::write(enclosure.work())?;
        let runvm = Runtime::Kvm.program();
        let runtimes = if by_shim { Vec::new() } else { under_test(&judge, &runvm).to_vec() };
        Self::start_programs(enclosure, &tree, by_shim, &runtimes)
    }

    /// Starts the daemon with these runtimes besides runc: name, program, options.
    pub fn start_with(enclosure: &Enclosure, runtimes: &[(&str, &Path, &[&str])]) -> Result<Self> {
        Self::start_programs(enclosure, Path::new("/"), false, runtimes)
    }

    fn start_programs(
        enclosure: &Enclosure,
        tree: &Path,
        by_shim: bool,
        runtimes: &[(&str, &Path, &[&str])],
    ) -> Result<Self> {
        let bridge = Bridge::make()?;
        let nameserver = Nameserver::start(IpAddr::V4(HOST4))?;
        let name = match (tree == Path::new("/"), by_shim) {
            (true, _) => "docker",
            (false, false) => "docker-later",
            (false, true) => "docker-by-shim",
        };
        let config = configuration(enclosure, runtimes);
        let data = enclosure.work().join(name).join("data");
        let setup = Setup { name, tree, by_shim, config, bridge: BRIDGE, data: &data };
        Self::launch(enclosure, &setup, Some((nameserver, bridge)))
    }

    /// Starts a further daemon, whose containers' root is on the host the user with this ID. It has no networks but those
    /// that a case makes, of which it tells the host's packet filter nothing.
    pub fn start_remapped(enclosure: &Enclosure, name: &str, root: u32) -> Result<Self> {
        let judge = Judge::write(enclosure.work())?;
        // The lists of the private world, in which the user is one that every machine has.
        let list = enclosure.work().join(name).join("subids");
        let data = enclosure.work().join(name).join("data");
        // Where every user may go.
        let place = enclosure.sockets().join(format!("{name}-data"));
        std::fs::create_dir_all(&data)?;
        std::fs::create_dir_all(&place)?;
        std::fs::write(&list, format!("daemon:{root}:65536\n"))?;
        let mounts = [
            Mounted::bind(&list, Path::new("/etc/subuid"))?,
            Mounted::bind(&list, Path::new("/etc/subgid"))?,
            Mounted::bind(&data, &place)?,
        ];
        let runvm = Runtime::Kvm.program();
        let config = json!({
            "runtimes": entries(&under_test(&judge, &runvm)),
            "cgroup-parent": enclosure.cgroup(),
            "userns-remap": "daemon",
            "iptables": false,
            "shutdown-timeout": 5,
        });
        let setup = Setup { name, tree: Path::new("/"), by_shim: false, config, bridge: "none", data: &place };
        let engine = Self::launch(enclosure, &setup, None)?;
        Ok(Self { _mounts: mounts.into(), ..engine })
    }

    fn launch(enclosure: &Enclosure, setup: &Setup<'_>, network: Option<(Nameserver, Bridge)>) -> Result<Self> {
        let Setup { name, tree, by_shim, config, bridge, data } = setup;
        let folder = enclosure.work().join(name);
        std::fs::create_dir_all(folder.join("client"))?;
        let socket = enclosure.sockets().join(format!("{name}.sock"));
        let config_file = folder.join("daemon.json");
        std::fs::write(&config_file, config.to_string())?;

        let host = format!("unix://{}", socket.display());
        let mut path = tree.join("usr/bin").into_os_string();
        for folder in [tree.join("usr/sbin").into_os_string(), std::env::var_os("PATH").unwrap_or_default()] {
            path.push(":");
            path.push(folder);
        }
        let program = tree.join("usr/bin/docker");
        let daemon = Cmd::new(tree.join("usr/sbin/dockerd"))
            .env("PATH", path)
            .args(["--host", &host, "--bridge", bridge])
            .arg("--config-file")
            .arg(&config_file)
            .arg("--data-root")
            .arg(data)
            .arg("--exec-root")
            .arg(enclosure.sockets().join(name))
            .arg("--pidfile")
            .arg(enclosure.sockets().join(format!("{name}.pid")));
        let client = folder.join("client");
        let ready = || client_of(&program, &socket, &client).arg("version");
        let daemon = Daemon::start(daemon, &folder.join("log"), ready)?;
        let loaded = Mutex::default();
        let cgroup = enclosure.cgroup();
        let by_shim = *by_shim;
        Ok(Self { daemon, program, by_shim, socket, folder, cgroup, loaded, _network: network, _mounts: Vec::new() })
    }

    /// The daemon's client.
    pub fn client(&self) -> Cmd {
        client_of(&self.program, &self.socket, &self.folder.join("client"))
    }

    /// Imports an image on its first use.
    pub fn load(&self, image: &str) -> Result<()> {
        let mut loaded = self.loaded.lock().unwrap_or_else(PoisonError::into_inner);
        if loaded.contains(image) {
            return Ok(());
        }
        self.client()
            .args(["import", "--change", "ENV PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"])
            .arg(image::tar(image)?)
            .arg(image)
            .ok()?;
        loaded.insert(image.to_owned());
        Ok(())
    }

    /// The end of the daemon's log.
    pub fn last_words(&self) -> String {
        self.daemon.last_words()
    }
}

fn client_of(program: &Path, socket: &Path, config: &Path) -> Cmd {
    Cmd::new(program).env("DOCKER_HOST", format!("unix://{}", socket.display())).env("DOCKER_CONFIG", config)
}

fn configuration(enclosure: &Enclosure, runtimes: &[(&str, &Path, &[&str])]) -> Value {
    json!({
        "runtimes": entries(runtimes),
        "cgroup-parent": enclosure.cgroup(),
        "dns": [HOST4],
        "ipv6": true,
        "fixed-cidr-v6": "fd00:7276:6d00:1::/64",
        "experimental": true,
        "ip6tables": true,
        "shutdown-timeout": 5,
    })
}

fn under_test<'a>(judge: &'a Judge, runvm: &'a Path) -> [(&'static str, &'a Path, &'static [&'static str]); 3] {
    let under_test = |runtime: Runtime| (runtime.name(), runvm, runtime.options());
    [(Judge::NAME, judge.program(), &[]), under_test(Runtime::Kvm), under_test(Runtime::Tcg)]
}

fn entries(runtimes: &[(&str, &Path, &[&str])]) -> serde_json::Map<String, Value> {
    let entry = |(name, program, options): &(&str, &Path, &[&str])| {
        ((*name).to_owned(), json!({ "path": program, "runtimeArgs": options }))
    };
    runtimes.iter().map(entry).collect()
}

/// A mount, and what is mounted below it; it goes with this.
struct Mounted(PathBuf);

impl Mounted {
    fn bind(source: &Path, target: &Path) -> Result<Self> {
        mount_bind(source, target).with_context(|| format!("cannot mount {}", target.display()))?;
        Ok(Self(target.to_owned()))
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        let _ = unmount(&self.0, UnmountFlags::DETACH);
    }
}

/// The daemon's default bridge.
struct Bridge;

/// As the daemon has it for a bridge of its own: a bridge that is given none has the lowest of its ports' addresses, and who
/// knows it by that of a port which goes loses its connections for a while.
const BRIDGE_MAC: &str = "02:72:76:6d:00:01";

impl Bridge {
    fn make() -> Result<Self> {
        let ip = |line: &str| Cmd::new("ip").args(line.split(' ')).ok();
        ip(&format!("link add {BRIDGE} address {BRIDGE_MAC} type bridge"))?;
        let bridge = Self;
        ip(&format!("address add {HOST4}/24 dev {BRIDGE}"))?;
        ip(&format!("address add {HOST6}/64 dev {BRIDGE} nodad"))?;
        ip(&format!("link set {BRIDGE} up"))?;
        Ok(bridge)
    }
}

impl Drop for Bridge {
    fn drop(&mut self) {
        let _ = Cmd::new("ip").args(["link", "delete", BRIDGE]).run();
    }
}

/// One runtime behind the daemon, for one run of one case.
pub struct Docker {
    engine: Arc<Engine>,
    runtime: Runtime,
    /// What all names that the case makes begin with.
    tag: String,
    folder: OnceLock<TempDir>,
}

impl Docker {
    /// A handle for one run of a case.
    pub fn open(engine: &Arc<Engine>, runtime: Runtime) -> Result<Self> {
        engine.load(image::BUSYBOX)?;
        Ok(Self { engine: Arc::clone(engine), runtime, tag: format!("rvm-{}", next_number()), folder: OnceLock::new() })
    }

    /// The runtime under test.
    pub fn runtime(&self) -> Runtime {
        self.runtime
    }

    /// The runtime's name in the daemon's configuration, or that of its shim.
    pub fn runtime_name(&self) -> &'static str {
        match (self.engine.by_shim, self.runtime.is_runc()) {
            (false, true) => Judge::NAME,
            (false, false) => self.runtime.name(),
            (true, true) => "io.containerd.runc.v2",
            (true, false) => "io.containerd.runvm.v2",
        }
    }

    /// The client with these words, separated by blanks.
    pub fn docker(&self, words: &str) -> Cmd {
        self.engine.client().args(words.split_whitespace())
    }

    /// `docker run --rm` of the small image; options are separated by blanks.
    pub fn run(&self, options: &str, command: &[&str]) -> Cmd {
        self.run_image(image::BUSYBOX, options, command)
    }

    /// `docker run --rm` of a shell script in the small image.
    pub fn sh(&self, options: &str, script: &str) -> Cmd {
        self.run(options, &["sh", "-c", script])
    }

    fn run_image(&self, image: &str, options: &str, command: &[&str]) -> Cmd {
        self.create_or_run("run --rm", image, options, command)
    }

    fn create_or_run(&self, verb: &str, image: &str, options: &str, command: &[&str]) -> Cmd {
        self.docker(verb)
            .args(["--runtime", self.runtime_name(), "--label", &self.tag])
            .args(options.split_whitespace())
            .arg(image)
            .args(command)
    }

    /// `docker run --rm` of the big image.
    pub fn run_debian(&self, options: &str, command: &[&str]) -> Result<Cmd> {
        self.engine.load(image::DEBIAN)?;
        Ok(self.run_image(image::DEBIAN, options, command))
    }

    /// `docker run --rm` of the image with an engine in it.
    pub fn run_docker(&self, options: &str, command: &[&str]) -> Result<Cmd> {
        self.engine.load(image::DOCKER)?;
        Ok(self.run_image(image::DOCKER, options, command))
    }

    /// `docker run --detach`: a container that stays until the case ends.
    pub fn start(&self, options: &str, command: &[&str]) -> Result<Container<'_>> {
        let id = self.create_or_run("run --detach", image::BUSYBOX, options, command).ok()?.text().to_owned();
        Ok(Container { docker: self, id })
    }

    /// `docker run --detach` of a shell script.
    pub fn start_sh(&self, options: &str, script: &str) -> Result<Container<'_>> {
        self.start(options, &["sh", "-c", script])
    }

    /// `docker create`.
    pub fn create(&self, options: &str, command: &[&str]) -> Result<Container<'_>> {
        let id = self.create_or_run("create", image::BUSYBOX, options, command).ok()?.text().to_owned();
        Ok(Container { docker: self, id })
    }

    /// `docker network create`; returns the network's name.
    pub fn network(&self, options: &str) -> Result<String> {
        let name = format!("{}-net{}", self.tag, next_number());
        let bridge = format!("com.docker.network.bridge.name=rvmb{}", next_number());
        self.docker("network create --label")
            .args([&self.tag, "--opt", &bridge])
            .args(options.split_whitespace())
            .arg(&name)
            .ok()?;
        Ok(name)
    }

    /// `docker volume create`; returns the volume's name.
    pub fn volume(&self) -> Result<String> {
        let name = format!("{}-vol{}", self.tag, next_number());
        self.docker("volume create --label").args([&self.tag, &name]).ok()?;
        Ok(name)
    }

    /// A name for an image or a container of this case.
    pub fn name(&self, what: &str) -> String {
        format!("{}-{what}", self.tag)
    }

    /// A folder on the host for this case.
    pub fn folder(&self) -> Result<&Path> {
        if self.folder.get().is_none() {
            // On the disk, beside the daemon's data: /tmp may be anything.
            let folder = tempfile::Builder::new().prefix("case-").tempdir_in(&self.engine.folder)?;
            let _ = self.folder.set(folder);
        }
        Ok(self.folder.get().context("the folder was just made")?.path())
    }

    /// Writes a file in the case's folder and returns its path as text.
    pub fn file(&self, name: &str, content: impl AsRef<[u8]>) -> Result<String> {
        let path = self.folder()?.join(name);
        std::fs::write(&path, content)?;
        Ok(path.display().to_string())
    }

    /// The host's processes that stand for a container: those in its cgroup.
    pub fn processes(&self, id: &str) -> Result<Vec<i32>> {
        let group = format!("/sys/fs/cgroup/pids{}/{id}/cgroup.procs", self.engine.cgroup);
        let list = std::fs::read_to_string(&group).with_context(|| format!("cannot read {group}"))?;
        Ok(list.lines().filter_map(|line| line.parse().ok()).collect())
    }

    fn remove_all(&self, list: &str, remove: &str) -> Result<()> {
        let found = self.docker(list).args(["--filter", &format!("label={}", self.tag)]).ok()?;
        if found.text().is_empty() {
            return Ok(());
        }
        self.docker(remove).args(found.text().lines()).ok()?;
        Ok(())
    }
}

impl Handle for Docker {
    fn close(self) -> Result<()> {
        self.remove_all("container ls --all --quiet", "container rm --force --volumes")?;
        self.remove_all("network ls --quiet", "network rm")?;
        self.remove_all("volume ls --quiet", "volume rm")?;
        let images = self.docker("image ls --quiet").arg(self.name("*")).ok()?;
        if !images.text().is_empty() {
            self.docker("image rm --force").args(images.text().lines()).ok()?;
        }
        Ok(())
    }
}

/// A container of a case.
pub struct Container<'a> {
    docker: &'a Docker,
    /// Its full ID.
    pub id: String,
}

impl Container<'_> {
    /// The client with these words, then the container's ID.
    pub fn docker(&self, words: &str) -> Cmd {
        self.docker.docker(words).arg(&self.id)
    }

    /// `docker exec`; options are separated by blanks.
    pub fn exec(&self, options: &str, command: &[&str]) -> Cmd {
        self.docker.docker("exec").args(options.split_whitespace()).arg(&self.id).args(command)
    }

    /// `docker exec` of a shell script.
    pub fn exec_sh(&self, options: &str, script: &str) -> Cmd {
        self.exec(options, &["sh", "-c", script])
    }

    /// `docker wait`: the exit code.
    pub fn wait(&self) -> Result<i32> {
        let output = self.docker("wait").ok()?;
        output.text().parse().with_context(|| format!("`docker wait` printed {:?}", output.stdout))
    }

    /// `docker inspect` with a format.
    pub fn inspect(&self, format: &str) -> Result<String> {
        Ok(self.docker.docker("inspect --format").args([format, &self.id]).ok()?.text().to_owned())
    }

    /// Waits until the container has printed a line.
    pub fn expect_log(&self, line: &str) -> Result<()> {
        crate::command::eventually(std::time::Duration::from_secs(30), &format!("{line:?} in the log"), || {
            let logs = self.docker("logs").ok()?;
            if logs.stdout.lines().any(|have| have == line) {
                return Ok(Some(()));
            }
            if self.inspect("{{.State.Running}}")? != "true" {
                bail!("the container ended without printing {line:?}: {}{}", logs.stdout, logs.stderr);
            }
            Ok(None)
        })
    }

    /// The container's address on its only network, or its IPv6 address there.
    pub fn address(&self, key: &str) -> Result<String> {
        self.inspect(&format!("{{{{range .NetworkSettings.Networks}}}}{{{{.{key}}}}}{{{{end}}}}"))
    }
}
