//! A private containerd, and the handle that its cases get: by runc's shim or by runvm's own.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, Result};

use crate::cni;
use crate::command::{Cmd, eventually};
use crate::enclosure::Enclosure;
use crate::engine::Daemon;
use crate::image::{self, Archive};
use crate::runtime::Runtime;
use crate::suite::{Handle, next_number};

const IMAGE: &str = "rvm.example/busybox:latest";

/// The daemon with its image.
pub struct Engine {
    _daemon: Daemon,
    _network: cni::Network,
    socket: PathBuf,
    /// containerd's name for a world of its own; `ctr` makes it the parent of cgroups too.
    namespace: String,
    folder: PathBuf,
}

impl Engine {
    /// Starts the daemon in the suite's private world.
    pub fn start(enclosure: &Enclosure) -> Result<Self> {
        let folder = enclosure.work().join("containerd");
        std::fs::create_dir_all(&folder)?;
        let socket = enclosure.sockets().join("containerd.sock");
        let network = cni::configure(&folder)?;
        network.make_default(&folder)?;
        let config = folder.join("config.toml");
        let text = format!(
            "version = 2\nroot = {:?}\nstate = {:?}\n\
             disabled_plugins = [\"io.containerd.grpc.v1.cri\", \"io.containerd.internal.v1.opt\"]\n\
             [grpc]\naddress = {socket:?}\n",
            folder.join("root"),
            enclosure.sockets().join("containerd"),
        );
        std::fs::write(&config, text)?;
        let namespace = enclosure.cgroup().trim_start_matches('/').to_owned();
        let daemon = Cmd::new("/usr/bin/containerd").arg("--config").arg(config);
        let daemon = Daemon::start(daemon, &folder.join("log"), || client(&socket, &namespace).arg("version"))?;
        let engine = Self { _daemon: daemon, _network: network, socket, namespace, folder };
        let image = tempfile::tempdir()?;
        let archive = Archive { name: IMAGE, root: image::BUSYBOX, command: &["sh"] }.write(image.path())?;
        engine.ctr().args(["image", "import"]).arg(archive).ok()?;
        Ok(engine)
    }

    fn ctr(&self) -> Cmd {
        client(&self.socket, &self.namespace)
    }
}

fn client(socket: &Path, namespace: &str) -> Cmd {
    Cmd::new("/usr/bin/ctr").arg("--address").arg(socket).args(["--namespace", namespace])
}

/// One runtime behind a shim of containerd's, for one run of one case.
pub struct Ctr {
    engine: Arc<Engine>,
    tag: String,
    /// The option of `ctr run` that chooses the runtime, and its value.
    choice: (&'static str, PathBuf),
}

impl Ctr {
    /// A handle for one run of a case, in which runvm is in runc's place under runc's shim.
    pub fn open(engine: &Arc<Engine>, runtime: Runtime) -> Result<Self> {
        let program = match runtime {
            Runtime::Runc | Runtime::Kvm => runtime.program(),
            Runtime::Tcg => runtime.script(&engine.folder)?,
        };
        Ok(Self::choose(engine, ("--runc-binary", program)))
    }

    /// A handle for one run of a case, in which each runtime has its own shim.
    pub fn open_by_shim(engine: &Arc<Engine>, runtime: Runtime) -> Result<Self> {
        let name = if runtime.is_runc() { "io.containerd.runc.v2" } else { "io.containerd.runvm.v2" };
        Ok(Self::choose(engine, ("--runtime", name.into())))
    }

    fn choose(engine: &Arc<Engine>, choice: (&'static str, PathBuf)) -> Self {
        Self { engine: Arc::clone(engine), tag: format!("rvm-{}", next_number()), choice }
    }

    /// The client with these words, separated by blanks.
    pub fn ctr(&self, words: &str) -> Cmd {
        self.engine.ctr().args(words.split_whitespace())
    }

    /// `ctr run` of the small image; options are separated by blanks.
    fn create_and_run(&self, options: &str, command: &[&str]) -> (String, Cmd) {
        let id = format!("{}-{}", self.tag, next_number());
        let cmd = self
            .ctr("run")
            .arg(self.choice.0)
            .arg(&self.choice.1)
            .args(options.split_whitespace())
            .args([IMAGE, &id])
            .args(command);
        (id, cmd)
    }

    /// `ctr run --rm`: a container in the foreground.
    pub fn run(&self, options: &str, command: &[&str]) -> Cmd {
        self.create_and_run(&format!("--rm {options}"), command).1
    }

    /// `ctr run --rm` of a shell script.
    pub fn sh(&self, options: &str, script: &str) -> Cmd {
        self.run(options, &["sh", "-c", script])
    }

    /// `ctr run --detach`: a container that stays until the case ends.
    pub fn start(&self, options: &str, command: &[&str]) -> Result<Task<'_>> {
        let (id, cmd) = self.create_and_run(&format!("--detach {options}"), command);
        cmd.ok()?;
        Ok(Task { ctr: self, id })
    }
}

impl Handle for Ctr {
    fn close(self) -> Result<()> {
        let list = self.ctr("container ls --quiet").ok()?;
        for id in list.stdout.lines().filter(|id| id.starts_with(&format!("{}-", self.tag))) {
            // There may be no task any more; a container with one is not removed.
            self.ctr("task rm --force").arg(id).run()?;
            self.ctr("container rm").arg(id).ok()?;
        }
        Ok(())
    }
}

/// A running container of a case.
pub struct Task<'a> {
    ctr: &'a Ctr,
    /// Its ID.
    pub id: String,
}

impl Task<'_> {
    /// `ctr task` with these words, then the container's ID.
    pub fn task(&self, words: &str) -> Cmd {
        self.ctr.ctr("task").args(words.split_whitespace()).arg(&self.id)
    }

    /// `ctr task rm`: the exit code that it tells of; it is silent about 0.
    pub fn remove(&self) -> Result<i32> {
        let output = self.task("rm").ok()?;
        let code = output.stderr.rsplit_once("exit code ").map_or("0", |(_, rest)| rest);
        let digits: String = code.chars().take_while(char::is_ascii_digit).collect();
        digits.parse().with_context(|| format!("`ctr task rm` says {:?}", output.stderr))
    }

    /// `ctr task exec`; options are separated by blanks.
    pub fn exec(&self, options: &str, command: &[&str]) -> Cmd {
        self.task(&format!("exec --exec-id e{} {options}", next_number())).args(command)
    }

    /// What `ctr task ls` says of it: CREATED, RUNNING, PAUSED, STOPPED; nothing if it is not listed.
    pub fn status(&self) -> Result<String> {
        let list = self.ctr.ctr("task ls").ok()?;
        let line = list.stdout.lines().find(|line| line.split_whitespace().next() == Some(&self.id));
        Ok(line.and_then(|line| line.split_whitespace().nth(2)).unwrap_or_default().to_owned())
    }

    /// Waits until the status is this.
    pub fn expect_status(&self, status: &str) -> Result<()> {
        eventually(std::time::Duration::from_secs(30), &format!("the status {status}"), || {
            Ok((self.status()? == status).then_some(()))
        })
    }
}
