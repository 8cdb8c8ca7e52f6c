//! A container whose guest has the evil agent, and what the host sees of it.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use conformance::bundle::{Hand, Workshop};
use conformance::census::{Census, Process};
use conformance::command::eventually;
use conformance::runtime::{Runtime, dist};
use conformance::suite::Handle as _;
use conformance::{Cmd, bundle::Bundle};
use serde_json::Value;

/// The most memory that a process of the host's may have had, beside the guest's: what the largest message takes, twice,
/// and a program.
const PEAK: u64 = 64 << 20;
/// The same for the machine's process, a guest's kernel and agent included.
const PEAK_OF_VM: u64 = 192 << 20;
/// How large a container's log may become by what its guest says.
const LOG: u64 = 2 << 20;
/// The longest message of an error.
const SENTENCE: usize = 5000;

/// A place for one case.
pub(crate) struct Scene {
    hand: Hand,
    /// What is installed beside the kernels: the evil agent with its plan.
    assets: PathBuf,
    id: String,
    path: PathBuf,
    watch: Watch,
}

impl Scene {
    /// Puts it together: the evil agent with a plan, and a bundle.
    pub(crate) fn set(workshop: &Arc<Workshop>, agent: &Path, plan: &str) -> Result<Self> {
        let hand = Hand::open(workshop, Runtime::Kvm)?;
        let assets = hand.folder().join("assets");
        install(agent, plan, &hand.folder().join("root"), &assets)?;
        let Bundle { id, path, .. } = hand.bundle("exit 1")?;
        let watch = Watch::over(id.clone());
        Ok(Self { hand, assets, id, path, watch })
    }

    /// The runtime with these words and the container's ID, over the evil agent, without templates.
    pub(crate) fn call(&self, words: &str) -> Cmd {
        let log = format!("--log-format json --log {} ", self.log().display());
        let cmd = self.hand.call(&(log + words)).arg(&self.id).current_dir(&self.path);
        cmd.env("RUNVM_ASSETS", &self.assets).env("RUNVM_TEMPLATE", "off")
    }

    /// Where the log is.
    fn log(&self) -> PathBuf {
        self.hand.folder().join("log")
    }

    /// The case's folder.
    pub(crate) fn folder(&self) -> &Path {
        self.hand.folder()
    }

    /// The handle behind it, for containers that mean well.
    pub(crate) fn hand(&self) -> &Hand {
        &self.hand
    }

    /// `create`, which has to succeed; what it, and with it the container, writes is read as long as the answer is kept.
    pub(crate) fn create(&self) -> Result<Child> {
        let mut create = self.call("create").into_command();
        let stdio = create.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::null());
        let mut create = stdio.spawn().context("cannot start create")?;
        let status = create.wait()?;
        ensure!(status.success(), "create failed: {}", self.complaint()?);
        Ok(create)
    }

    /// `create` and `start`.
    pub(crate) fn start(&self) -> Result<Child> {
        let created = self.create()?;
        self.call("start").ok()?;
        Ok(created)
    }

    /// Fails unless a command fails within so long, and says this.
    pub(crate) fn expect_failure(&self, cmd: Cmd, limit: Duration, said: &str) -> Result<()> {
        let output = cmd.limit(limit).run()?;
        ensure!(output.code != 0, "it succeeded");
        let complaint = self.complaint()?;
        ensure!(!complaint.is_empty(), "it says nothing");
        ensure!(complaint.contains(said), "it says {complaint:?} and not {said:?}, {}", self.circumstances());
        ensure!(complaint.len() < SENTENCE, "it says {} bytes", complaint.len());
        ensure!(!complaint.contains(char::is_control), "it says {complaint:?}");
        Ok(())
    }

    /// `exec` of a program.
    pub(crate) fn exec(&self) -> Cmd {
        self.call("exec").arg("true")
    }

    /// The last error in the log: what an engine shows.
    fn complaint(&self) -> Result<String> {
        let log = fs::read_to_string(self.log()).unwrap_or_default();
        let lines = log.lines().map(serde_json::from_str).collect::<Result<Vec<Value>, _>>()?;
        let error = lines.iter().rev().find(|line| line["level"] == "error");
        Ok(error.and_then(|line| line["msg"].as_str()).unwrap_or_default().to_owned())
    }

    /// What explains an unexpected answer: what has become of the container, and all that was logged.
    fn circumstances(&self) -> String {
        let log = fs::read_to_string(self.log()).unwrap_or_default();
        format!("the container's status being {:?}, and its log\n{log}", self.status())
    }

    /// The container's status; none where there is no such container.
    pub(crate) fn status(&self) -> Result<Option<String>> {
        let output = self.call("state").run()?;
        if output.code != 0 {
            return Ok(None);
        }
        let state: Value = serde_json::from_str(&output.stdout)?;
        Ok(state["status"].as_str().map(str::to_owned))
    }

    /// Waits until the container has ended.
    pub(crate) fn expect_stopped(&self, limit: Duration) -> Result<()> {
        eventually(limit, "the container's end", || Ok((self.status()?.as_deref() == Some("stopped")).then_some(())))
    }

    /// Fails unless SIGKILL ends the container within so long.
    pub(crate) fn expect_killable(&self, limit: Duration) -> Result<()> {
        let began = Instant::now();
        // It may have ended by what it was asked.
        self.call("kill").arg("KILL").limit(limit).run()?;
        self.expect_stopped(limit.saturating_sub(began.elapsed()))
    }

    /// Fails where more than a bounded amount of memory or log was used, or something of the container is left.
    pub(crate) fn clear(self) -> Result<()> {
        self.call("delete --force").ok()?;
        let log = fs::metadata(self.log()).map_or(0, |log| log.len());
        let peaks = self.watch.end()?;
        ensure!(peaks.of_vm <= PEAK_OF_VM, "the machine's process had {} MiB", peaks.of_vm >> 20);
        ensure!(peaks.others <= PEAK, "a process of the container's had {} MiB", peaks.others >> 20);
        ensure!(log <= LOG, "the log has {} KiB", log >> 10);
        Census::expect_no_trace_of(&self.id)?;
        self.hand.close()
    }
}

/// Makes a folder of assets whose initramfs holds the evil agent and its plan.
fn install(agent: &Path, plan: &str, root: &Path, assets: &Path) -> Result<()> {
    fs::create_dir(root)?;
    fs::create_dir(assets)?;
    fs::copy(agent, root.join("init"))?;
    fs::write(root.join("plan"), plan)?;
    let archive = Cmd::new("cpio").args(["--quiet", "--create", "--format=newc", "--file"]);
    archive.arg(assets.join("initramfs.cpio")).input("init\nplan\n").current_dir(root).ok()?;
    for kernel in ["vmlinux", "vmlinux-pvm"] {
        symlink(dist().join("lib/runvm").join(kernel), assets.join(kernel))?;
    }
    Ok(())
}

/// How much memory the processes of a container have had at most, each.
#[derive(Clone, Copy, Default)]
struct Peaks {
    of_vm: u64,
    others: u64,
}

/// Looks at a container's processes for as long as it is kept.
struct Watch {
    over: Arc<AtomicBool>,
    watching: JoinHandle<Result<Peaks>>,
}

impl Watch {
    /// Short against the time that memory takes to be filled, as what it was at most is known to the kernel.
    const INTERVAL: Duration = Duration::from_millis(20);

    fn over(id: String) -> Self {
        let over = Arc::new(AtomicBool::new(false));
        let end = Arc::clone(&over);
        let watching = std::thread::spawn(move || {
            let mut peaks = Peaks::default();
            while !end.load(Ordering::Relaxed) {
                look(&id, &mut peaks)?;
                std::thread::sleep(Self::INTERVAL);
            }
            Ok(peaks)
        });
        Self { over, watching }
    }

    fn end(self) -> Result<Peaks> {
        self.over.store(true, Ordering::Relaxed);
        self.watching.join().unwrap_or_else(|_| anyhow::bail!("the watch over the memory panicked"))
    }
}

fn look(id: &str, peaks: &mut Peaks) -> Result<()> {
    let all = Process::all()?;
    for process in all.iter().filter(|process| process.line.contains(id)) {
        for member in process.family(&all) {
            let peak = member.peak().unwrap_or(0);
            let known = if member.line.ends_with(" vm") { &mut peaks.of_vm } else { &mut peaks.others };
            *known = peak.max(*known);
        }
    }
    Ok(())
}
