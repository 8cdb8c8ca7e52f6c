//! A private Podman, and the handle that its cases get.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use tempfile::TempDir;

use crate::command::{Cmd, eventually};
use crate::enclosure::{Enclosure, cgroup_hierarchies};
use crate::image;
use crate::judge::Judge;
use crate::runtime::Runtime;
use crate::suite::{Handle, next_number};

/// The cgroup of pods that are made of a file, which has no place for another.
const CGROUP_OF_PODS: &str = "libpod_parent";

/// Podman's folders and images. It has no daemon.
pub struct Engine {
    folder: PathBuf,
    sockets: PathBuf,
    cgroup: String,
    judge: Judge,
    /// A program for each runtime under test.
    programs: [(Runtime, PathBuf); 2],
    loaded: Mutex<BTreeSet<String>>,
}

impl Engine {
    /// Prepares folders in the suite's private world.
    pub fn start(enclosure: &Enclosure) -> Result<Self> {
        let folder = enclosure.work().join("podman");
        std::fs::create_dir_all(&folder)?;
        // Instead of what the machine's own says. Without the list, errors of a runtime that Podman does not know are
        // told with all that the runtime printed.
        let runtimes = [Judge::NAME, Runtime::Kvm.name(), Runtime::Tcg.name()];
        std::fs::write(folder.join("containers.conf"), format!("[engine]\nruntime_supports_json = {runtimes:?}\n"))?;
        let judge = Judge::write(&folder)?;
        let programs = [Runtime::Kvm, Runtime::Tcg].map(|runtime| Ok((runtime, runtime.script(&folder)?)));
        let [kvm, tcg]: [Result<_>; 2] = programs;
        Ok(Self {
            sockets: enclosure.sockets().join("podman"),
            cgroup: enclosure.cgroup(),
            judge,
            programs: [kvm?, tcg?],
            loaded: Mutex::default(),
            folder,
        })
    }

    /// Podman with this runtime.
    fn podman(&self, runtime: Runtime) -> Cmd {
        let program = self.programs.iter().find(|(known, _)| *known == runtime).map(|(_, program)| program.as_path());
        Cmd::new("/usr/bin/podman")
            .env("CONTAINERS_CONF", self.folder.join("containers.conf"))
            .arg("--root")
            .arg(self.folder.join("root"))
            .arg("--runroot")
            .arg(self.sockets.join("run"))
            .arg("--tmpdir")
            .arg(self.sockets.join("tmp"))
            .args(["--storage-driver", "overlay", "--cgroup-manager", "cgroupfs", "--events-backend", "file"])
            .args(["--network-backend", "netavark"])
            .arg("--runtime")
            .arg(program.unwrap_or_else(|| self.judge.program()))
    }

    /// Imports an image on its first use.
    fn load(&self, image: &str) -> Result<()> {
        let mut loaded = self.loaded.lock().unwrap_or_else(PoisonError::into_inner);
        if loaded.contains(image) {
            return Ok(());
        }
        self.podman(Runtime::Runc)
            .args(["import", "--change", "ENV PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"])
            .arg(image::tar(image)?)
            .arg(image)
            .ok()?;
        loaded.insert(image.to_owned());
        Ok(())
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        // What Podman keeps until the machine is shut down: its storage's mount, its locks, what it knows of networks,
        // and cgroups. Those of containers are the runtime's to remove; that of pods may be another Podman's too.
        let _ = Cmd::new("umount").arg(self.folder.join("root/overlay")).run();
        let _ = std::fs::remove_file("/dev/shm/libpod_lock");
        let _ = std::fs::remove_dir_all("/run/containers");
        for hierarchy in cgroup_hierarchies().into_iter().flatten() {
            for parent in [CGROUP_OF_PODS, self.cgroup.trim_start_matches('/')] {
                remove_engines_cgroups(&hierarchy.join(parent));
            }
            let _ = std::fs::remove_dir(hierarchy.join(CGROUP_OF_PODS));
        }
    }
}

/// Removes the cgroups that Podman made for itself and for pods, where they are empty.
fn remove_engines_cgroups(parent: &Path) {
    for entry in std::fs::read_dir(parent).into_iter().flatten().flatten() {
        if !entry.file_name().to_string_lossy().starts_with("libpod-") {
            let _ = std::fs::remove_dir(entry.path());
        }
    }
}

/// Podman with one runtime, for one run of one case.
pub struct Podman {
    engine: Arc<Engine>,
    runtime: Runtime,
    /// What all names that the case makes begin with.
    tag: String,
    folder: TempDir,
    /// The names of pods that were made of a file, and so have no label.
    pods: Mutex<Vec<String>>,
}

impl Podman {
    /// A handle for one run of a case.
    pub fn open(engine: &Arc<Engine>, runtime: Runtime) -> Result<Self> {
        engine.load(image::BUSYBOX)?;
        Ok(Self {
            engine: Arc::clone(engine),
            runtime,
            tag: format!("rvm-{}", next_number()),
            folder: tempfile::Builder::new().prefix("case-").tempdir_in(&engine.folder)?,
            pods: Mutex::default(),
        })
    }

    /// The runtime under test.
    pub fn runtime(&self) -> Runtime {
        self.runtime
    }

    /// Podman with these words, separated by blanks. It runs in the case's folder.
    pub fn podman(&self, words: &str) -> Cmd {
        self.engine.podman(self.runtime).current_dir(self.folder()).args(words.split_whitespace())
    }

    /// `podman run --rm` of the small image; options are separated by blanks.
    pub fn run(&self, options: &str, command: &[&str]) -> Cmd {
        self.create_or_run("run --rm", options, command)
    }

    /// `podman run --rm` of a shell script in the small image.
    pub fn sh(&self, options: &str, script: &str) -> Cmd {
        self.run(options, &["sh", "-c", script])
    }

    fn create_or_run(&self, verb: &str, options: &str, command: &[&str]) -> Cmd {
        let podman = self.podman(verb).args(["--label", &self.tag]);
        // A pod's members are in the pod's cgroup.
        let podman = match options.contains("--pod ") {
            true => podman,
            false => podman.args(["--cgroup-parent", &self.engine.cgroup]),
        };
        podman.args(options.split_whitespace()).arg(image::BUSYBOX).args(command)
    }

    /// `podman run --detach`: a container that stays until the case ends.
    pub fn start(&self, options: &str, command: &[&str]) -> Result<Container<'_>> {
        let id = self.create_or_run("run --detach", options, command).ok()?.text().to_owned();
        Ok(Container { podman: self, id })
    }

    /// `podman run --detach` of a shell script.
    pub fn start_sh(&self, options: &str, script: &str) -> Result<Container<'_>> {
        self.start(options, &["sh", "-c", script])
    }

    /// `podman create`.
    pub fn create(&self, options: &str, command: &[&str]) -> Result<Container<'_>> {
        let id = self.create_or_run("create", options, command).ok()?.text().to_owned();
        Ok(Container { podman: self, id })
    }

    /// `podman pod create`; returns the pod's name.
    pub fn pod(&self, options: &str) -> Result<String> {
        let name = format!("{}-pod{}", self.tag, next_number());
        self.podman("pod create --label")
            .args([&self.tag, "--cgroup-parent", &self.engine.cgroup, "--name", &name])
            .args(options.split_whitespace())
            .ok()?;
        Ok(name)
    }

    /// `podman play kube` of a file with this pod, whose name has to be [`name`](Self::name)'s of `pod`.
    pub fn play(&self, pod: &str, yaml: &str) -> Result<Cmd> {
        self.pods.lock().unwrap_or_else(PoisonError::into_inner).push(self.name(pod));
        let file = self.file("pod.yaml", yaml)?;
        Ok(self.podman("play kube").arg(file))
    }

    /// A container that a case made without this handle, by its name.
    pub fn container(&self, name: &str) -> Container<'_> {
        Container { podman: self, id: name.to_owned() }
    }

    /// `podman network create`; returns the network's name.
    pub fn network(&self) -> Result<String> {
        let name = format!("{}-net{}", self.tag, next_number());
        self.podman("network create --label").args([&self.tag, &name]).ok()?;
        Ok(name)
    }

    /// `podman volume create`; returns the volume's name.
    pub fn volume(&self) -> Result<String> {
        let name = format!("{}-vol{}", self.tag, next_number());
        self.podman("volume create --label").args([&self.tag, &name]).ok()?;
        Ok(name)
    }

    /// Has the runtime itself forget a container, where Podman does not.
    pub fn forget(&self, id: &str) -> Result<()> {
        Cmd::new(self.runtime.program()).args(self.runtime.options()).args(["delete", "--force", id]).ok().map(drop)
    }

    /// A name for something of this case.
    pub fn name(&self, what: &str) -> String {
        format!("{}-{what}", self.tag)
    }

    /// A folder on the host for this case.
    pub fn folder(&self) -> &Path {
        self.folder.path()
    }

    /// Writes a file in the case's folder and returns its path as text.
    pub fn file(&self, name: &str, content: impl AsRef<[u8]>) -> Result<String> {
        let path = self.folder().join(name);
        std::fs::write(&path, content)?;
        Ok(path.display().to_string())
    }

    fn remove_all(&self, list: &str, remove: &str) -> Result<()> {
        let found = self.podman(list).args(["--filter", &format!("label={}", self.tag)]).ok()?;
        if found.text().is_empty() {
            return Ok(());
        }
        self.podman(remove).args(found.text().lines()).ok()?;
        Ok(())
    }
}

impl Handle for Podman {
    fn close(self) -> Result<()> {
        for pod in self.pods.lock().unwrap_or_else(PoisonError::into_inner).iter() {
            self.podman("pod rm --force --ignore --time 0").arg(pod).ok()?;
        }
        self.remove_all("pod ls --quiet", "pod rm --force --time 0")?;
        self.remove_all("container ls --all --quiet", "container rm --force --volumes --time 0")?;
        self.remove_all("network ls --quiet", "network rm --force --time 0")?;
        self.remove_all("volume ls --quiet", "volume rm --force --time 0")?;
        let images = self.podman("image ls --quiet --filter").arg(format!("reference={}", self.name("*"))).ok()?;
        if !images.text().is_empty() {
            self.podman("image rm --force").args(images.text().lines()).ok()?;
        }
        Ok(())
    }
}

/// A container of a case.
pub struct Container<'a> {
    podman: &'a Podman,
    /// Its full ID, or its name.
    pub id: String,
}

impl Container<'_> {
    /// Podman with these words, then the container's ID.
    pub fn podman(&self, words: &str) -> Cmd {
        self.podman.podman(words).arg(&self.id)
    }

    /// `podman exec`; options are separated by blanks.
    pub fn exec(&self, options: &str, command: &[&str]) -> Cmd {
        self.podman.podman("exec").args(options.split_whitespace()).arg(&self.id).args(command)
    }

    /// `podman exec` of a shell script.
    pub fn exec_sh(&self, options: &str, script: &str) -> Cmd {
        self.exec(options, &["sh", "-c", script])
    }

    /// `podman wait`: the exit code.
    pub fn wait(&self) -> Result<i32> {
        let output = self.podman("wait").ok()?;
        output.text().parse().with_context(|| format!("`podman wait` printed {:?}", output.stdout))
    }

    /// `podman inspect` with a format.
    pub fn inspect(&self, format: &str) -> Result<String> {
        Ok(self.podman.podman("container inspect --format").args([format, &self.id]).ok()?.text().to_owned())
    }

    /// Waits until the container has printed a line.
    pub fn expect_log(&self, line: &str) -> Result<()> {
        eventually(Duration::from_secs(30), &format!("{line:?} in the log"), || {
            let logs = self.podman("logs").ok()?;
            if logs.stdout.lines().any(|have| have == line) {
                return Ok(Some(()));
            }
            if self.inspect("{{.State.Running}}")? != "true" {
                bail!("the container ended without printing {line:?}: {}{}", logs.stdout, logs.stderr);
            }
            Ok(None)
        })
    }
}
