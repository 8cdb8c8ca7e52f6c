//! Where it is measured: a Docker daemon that knows all runtimes, a containerd that knows those with a shim, and the bundles.

use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::Arc;

use anyhow::{Context, Result, ensure};
use conformance::census::Process;
use conformance::docker::Engine;
use conformance::enclosure::Enclosure;
use conformance::suite::next_number;
use conformance::{Cmd, cri, image};
use serde_json::{Value, json};

use crate::contender::Contender;

/// The engine and the unpacked images.
pub(crate) struct World {
    pub(crate) docker: Engine,
    pub(crate) containerd: Arc<cri::Engine>,
    folder: PathBuf,
    cgroup: String,
    template: Value,
}

impl World {
    pub(crate) fn make(enclosure: &Enclosure, contenders: &[Contender]) -> Result<Self> {
        let folder = enclosure.work().join("bench");
        std::fs::create_dir_all(&folder)?;
        Cmd::new("/usr/sbin/runc").args(["spec", "--bundle"]).arg(&folder).ok()?;
        let template = serde_json::from_slice(&std::fs::read(folder.join("config.json"))?)?;
        for name in [image::BUSYBOX, image::DEBIAN] {
            image::unpack(name, &folder.join(name))?;
        }
        let others = contenders.iter().filter(|contender| contender.name != "runc");
        let others: Vec<_> =
            others.map(|contender| (contender.name, contender.program.as_path(), contender.options)).collect();
        let docker = Engine::start_with(enclosure, &others)?;
        let containerd = Arc::new(cri::Engine::start(enclosure, cri::Release::Installed)?);
        Ok(Self { docker, containerd, folder, cgroup: enclosure.cgroup(), template })
    }

    /// A bundle of an image that runs a command. All runtimes share the image's files.
    pub(crate) fn bundle(&self, image: &str, command: &[&str]) -> Result<Bundle> {
        let id = format!("rvm-bench-{}", next_number());
        let folder = self.folder.join(&id);
        std::fs::create_dir(&folder)?;
        let mut config = self.template.clone();
        config["process"]["terminal"] = json!(false);
        config["process"]["args"] = json!(command);
        // runc's template adds ambient capabilities that cannot be: nobody needs the warnings.
        config["process"]["capabilities"].as_object_mut().and_then(|sets| sets.remove("ambient"));
        config["root"] = json!({ "path": self.folder.join(image), "readonly": false });
        config["linux"]["cgroupsPath"] = json!(format!("{}/{id}", self.cgroup));
        std::fs::write(folder.join("config.json"), config.to_string())?;
        Ok(Bundle { id, folder })
    }
}

/// A bundle, and the container made of it.
pub(crate) struct Bundle {
    pub(crate) id: String,
    folder: PathBuf,
}

impl Bundle {
    fn call(&self, contender: &Contender, words: &str) -> Cmd {
        Cmd::new(&contender.program)
            .args(contender.options)
            .args(contender.alone)
            .args(words.split_whitespace())
            .current_dir(&self.folder)
    }

    /// `run` in the foreground.
    pub(crate) fn run(&self, contender: &Contender) -> Cmd {
        self.call(contender, "run").arg(&self.id)
    }

    /// `run` with more options before the verb.
    pub(crate) fn run_with(&self, contender: &Contender, options: &[&Path]) -> Cmd {
        self.call(contender, "").args(options).args(["run", &self.id])
    }

    /// Starts the container in the background.
    pub(crate) fn start(self, contender: &Contender) -> Result<Running<'_>> {
        let before: Vec<i32> = Process::all()?.iter().map(|process| process.pid).collect();
        // The container inherits the streams and keeps them open: no pipes.
        let mut create = self.call(contender, "create").arg(&self.id).into_command();
        let status = create.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).status()?;
        let running = Running { bundle: self, contender, before };
        ensure!(status.success(), "{} create failed ({status})", contender.name);
        running.bundle.call(contender, "start").arg(&running.bundle.id).ok()?;
        Ok(running)
    }
}

/// A container in the background, deleted when it goes out of scope.
pub(crate) struct Running<'a> {
    bundle: Bundle,
    contender: &'a Contender,
    before: Vec<i32>,
}

impl Running<'_> {
    /// `exec` of a command.
    pub(crate) fn exec(&self, command: &[&str]) -> Cmd {
        self.bundle.call(self.contender, "exec").arg(&self.bundle.id).args(command)
    }

    /// The memory of all processes that the container brought with it, in bytes.
    pub(crate) fn pss(&self) -> Result<u64> {
        let own = Process::all()?;
        let new = own.iter().filter(|process| !self.before.contains(&process.pid));
        let sum: u64 = new.filter_map(Process::pss).sum();
        (sum > 0).then_some(sum).context("no process of the container was found")
    }
}

impl Drop for Running<'_> {
    fn drop(&mut self) {
        let _ = self.bundle.call(self.contender, "delete --force").arg(&self.bundle.id).run();
    }
}
