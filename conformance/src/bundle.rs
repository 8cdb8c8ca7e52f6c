//! Bundles made by hand, and runtimes called by hand: the handle of cases without an engine.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::census::{Census, Process};
use crate::command::{Cmd, Output, eventually};
use crate::enclosure::Enclosure;
use crate::image;
use crate::runtime::Runtime;
use crate::suite::{Handle, next_number};

/// What all bundles of a suite come from.
pub struct Workshop {
    folder: PathBuf,
    cgroup: String,
    /// What each bundle's configuration is made from.
    template: Value,
}

impl Workshop {
    /// Asks runc for its template.
    pub fn open(enclosure: &Enclosure) -> Result<Self> {
        let folder = enclosure.work().join("bundles");
        let template = template(&folder)?;
        Ok(Self { folder, cgroup: enclosure.cgroup(), template })
    }
}

/// The configuration that `runc spec` writes, but without a terminal, and with a root file system that can be written.
pub fn template(folder: &Path) -> Result<Value> {
    std::fs::create_dir_all(folder)?;
    Cmd::new(Runtime::Runc.program()).args(["spec", "--bundle"]).arg(folder).ok()?;
    let mut config: Value = serde_json::from_str(&std::fs::read_to_string(folder.join("config.json"))?)?;
    config["process"]["terminal"] = json!(false);
    config["root"]["readonly"] = json!(false);
    Ok(config)
}

/// One runtime called by hand, for one run of one case.
pub struct Hand {
    workshop: Arc<Workshop>,
    runtime: Runtime,
    folder: TempDir,
    tag: String,
}

impl Hand {
    /// A handle for one run of a case.
    pub fn open(workshop: &Arc<Workshop>, runtime: Runtime) -> Result<Self> {
        let folder = tempfile::Builder::new().prefix("case-").tempdir_in(&workshop.folder)?;
        // Unlike those of any other run on this machine.
        let tag = format!("{}-{}-", workshop.cgroup.trim_start_matches('/'), next_number());
        Ok(Self { workshop: Arc::clone(workshop), runtime, folder, tag })
    }

    /// The runtime under test.
    pub fn runtime(&self) -> Runtime {
        self.runtime
    }

    /// A folder for this run of the case.
    pub fn folder(&self) -> &Path {
        self.folder.path()
    }

    /// The runtime with these words, separated by blanks.
    pub fn call(&self, words: &str) -> Cmd {
        Cmd::new(self.runtime.program()).args(self.runtime.options()).args(words.split_whitespace())
    }

    /// What `list` prints. runc's fails when a container of another case vanishes while it looks: then it looks again.
    pub fn list(&self, words: &str) -> Result<Output> {
        const LOOKS: usize = 20;
        let list = || self.call("list").args(words.split_whitespace());
        for _ in 1..LOOKS {
            let output = list().run()?;
            if output.code == 0 {
                return Ok(output);
            }
        }
        list().ok()
    }

    /// A bundle that runs a shell script in the small image.
    pub fn bundle(&self, script: &str) -> Result<Bundle<'_>> {
        self.bundle_with(&["sh", "-c", script], |_| {})
    }

    /// A bundle that runs a command, with changes to its configuration.
    pub fn bundle_with(&self, command: &[&str], change: impl FnOnce(&mut Value)) -> Result<Bundle<'_>> {
        let id = format!("{}{}", self.tag, next_number());
        let path = self.folder().join(&id);
        image::unpack(image::BUSYBOX, &path.join("rootfs"))?;
        let mut config = self.workshop.template.clone();
        config["process"]["args"] = json!(command);
        config["linux"]["cgroupsPath"] = json!(format!("{}/{id}", self.workshop.cgroup));
        change(&mut config);
        let bundle = Bundle { hand: self, id, path };
        bundle.configure(&config)?;
        Ok(bundle)
    }
}

impl Handle for Hand {
    fn close(self) -> Result<()> {
        let list = self.list("--quiet")?;
        for id in list.stdout.lines().filter(|id| id.starts_with(&self.tag)) {
            self.call("delete --force").arg(id).ok()?;
        }
        Census::expect_no_trace_of(&self.tag)
    }
}

/// A bundle and the container made of it.
pub struct Bundle<'a> {
    hand: &'a Hand,
    /// The container's ID.
    pub id: String,
    /// The bundle's folder.
    pub path: PathBuf,
}

impl Bundle<'_> {
    /// Writes config.json anew.
    pub fn configure(&self, config: &Value) -> Result<()> {
        Ok(std::fs::write(self.path.join("config.json"), serde_json::to_vec_pretty(config)?)?)
    }

    /// A file or folder of the container, on the host.
    pub fn inside(&self, path: &str) -> PathBuf {
        self.path.join("rootfs").join(path.trim_start_matches('/'))
    }

    /// The runtime with these words, then the container's ID.
    pub fn call(&self, words: &str) -> Cmd {
        self.hand.call(words).arg(&self.id)
    }

    /// `run`, in the foreground.
    pub fn run(&self) -> Cmd {
        self.call("run").current_dir(&self.path)
    }

    /// `create` or `run --detach`, whose container inherits its standard streams: they
    /// are files beside the bundle, `out` and `err`.
    pub fn in_background(&self, words: &str) -> Result<Output> {
        let runtime = self.call(words);
        let line = "exec \"$@\" </dev/null >../out-$ID 2>../err-$ID";
        let cmd = Cmd::new("sh").args(["-c", line, "sh"]).env("ID", &self.id).current_dir(&self.path);
        let command = runtime.into_command();
        let mut output = cmd.arg(command.get_program()).args(command.get_args()).run()?;
        output.stderr = self.written("err")?;
        Ok(output)
    }

    /// `create`, which has to succeed.
    pub fn create(&self) -> Result<()> {
        let output = self.in_background("create")?;
        ensure!(output.code == 0, "create failed: {}", output.stderr);
        Ok(())
    }

    /// `create` and `start`.
    pub fn start(&self) -> Result<()> {
        self.create()?;
        self.call("start").ok()?;
        Ok(())
    }

    /// What the container in the background wrote on `out` or `err`.
    pub fn written(&self, stream: &str) -> Result<String> {
        let path = self.hand.folder().join(format!("{stream}-{}", self.id));
        std::fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))
    }

    /// Waits until the container in the background has written a line.
    pub fn expect_written(&self, line: &str) -> Result<()> {
        eventually(Duration::from_secs(30), &format!("{line:?} from the container"), || {
            Ok(self.written("out")?.lines().any(|have| have == line).then_some(()))
        })
    }

    /// `exec` of a shell script.
    pub fn exec(&self, options: &str, script: &str) -> Cmd {
        self.call(&format!("exec {options}")).args(["sh", "-c", script])
    }

    /// What `state` prints.
    pub fn state(&self) -> Result<Value> {
        let output = self.call("state").ok()?;
        serde_json::from_str(&output.stdout).with_context(|| format!("state printed {}", output.stdout))
    }

    /// The container's first process as the host sees it, and all that descend from it: it comes first.
    pub fn family(&self) -> Result<Vec<Process>> {
        let pid = self.state()?["pid"].as_i64().context("the state has a PID")?;
        let all = Process::all()?;
        let first = all.iter().find(|process| i64::from(process.pid) == pid).context("the first process is there")?;
        Ok(first.family(&all).into_iter().cloned().collect())
    }

    /// The status that `state` gives.
    pub fn status(&self) -> Result<String> {
        Ok(self.state()?["status"].as_str().unwrap_or_default().to_owned())
    }

    /// Waits until the container has ended.
    pub fn expect_stopped(&self) -> Result<()> {
        eventually(Duration::from_secs(30), "the container's end", || Ok((self.status()? == "stopped").then_some(())))
    }

    /// Fails if anything on the host still carries the container's ID.
    pub fn expect_no_trace(&self) -> Result<()> {
        Census::expect_no_trace_of(&self.id)
    }
}
