//! A container with its conmon, and what CRI-O asks of both.

use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use conformance::bundle::{Bundle, Hand};
use conformance::command::{eventually, readable_within};
use conformance::{Cmd, Output};
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketAddrUnix, SocketType, connect, recv, send, socket};
use serde::Deserialize;
use serde_json::Value;

/// How long an engine's message may take.
const PATIENCE: Duration = Duration::from_secs(60);

/// What conmon says at the end of its work before it goes to the background, or at that of an exec.
#[derive(Debug, Deserialize)]
pub(crate) struct Message {
    /// The PID of who stands for the container, or -1.
    #[serde(default)]
    pub pid: i32,
    /// An exec's.
    #[serde(default)]
    pub exit_code: i32,
    /// Why there is no PID or no code.
    #[serde(default)]
    pub message: String,
}

/// A container that a conmon has created.
pub(crate) struct Scene<'a> {
    hand: &'a Hand,
    pub bundle: Bundle<'a>,
}

impl<'a> Scene<'a> {
    /// A bundle for a conmon.
    pub(crate) fn new(hand: &'a Hand, command: &[&str], change: impl FnOnce(&mut Value)) -> Result<Self> {
        let bundle = hand.bundle_with(command, change)?;
        for folder in ["exits", "persist", "sockets"] {
            std::fs::create_dir_all(hand.folder().join(folder))?;
        }
        Ok(Self { hand, bundle })
    }

    /// A container that runs a shell script.
    pub(crate) fn sh(hand: &'a Hand, script: &str) -> Result<Self> {
        let scene = Self::new(hand, &["sh", "-c", script], |_| {})?;
        scene.create("")?;
        Ok(scene)
    }

    /// Has a conmon create the container, with more options, which are separated by blanks.
    pub(crate) fn create(&self, options: &str) -> Result<i32> {
        let message = self.try_create(options)?;
        ensure!(message.pid > 0, "create failed: {}", message.message);
        Ok(message.pid)
    }

    /// What conmon says of an attempt to create the container.
    pub(crate) fn try_create(&self, options: &str) -> Result<Message> {
        let conmon = self
            .conmon()
            .arg("--bundle")
            .arg(&self.bundle.path)
            .args(["--cuuid", &self.bundle.id])
            .arg("--exit-dir")
            .arg(self.folder("exits"))
            .arg("--persist-dir")
            .arg(self.folder("persist"))
            .arg("--conmon-pidfile")
            .arg(self.bundle.path.join("conmon-pidfile"))
            .arg("--container-pidfile")
            .arg(self.bundle.path.join("pidfile"))
            .arg("--log-path")
            .arg(self.log())
            .args(options.split_whitespace());
        self.start(conmon)
    }

    /// What a conmon says of an exec that it waits for, as for a probe of the kubelet's; and what the exec printed.
    pub(crate) fn exec_sync(&self, process: &Value, options: &str) -> Result<(Message, String)> {
        let log = self.hand.folder().join("exec-log");
        let _ = std::fs::remove_file(&log);
        let conmon = self
            .conmon()
            .args(["--exec", "--sync", "--exec-process-spec"])
            .arg(self.process_file(process)?)
            .arg("--container-pidfile")
            .arg(self.hand.folder().join("exec-pidfile"))
            .arg("--log-path")
            .arg(&log)
            .args(options.split_whitespace());
        Ok((self.start(conmon)?, std::fs::read_to_string(log).unwrap_or_default()))
    }

    /// An exec by the runtime itself, as for `kubectl exec`.
    pub(crate) fn exec(&self, process: &Value) -> Result<Cmd> {
        Ok(self.hand.call("exec --process").arg(self.process_file(process)?).arg(&self.bundle.id))
    }

    /// The container's process with another command.
    pub(crate) fn process(&self, command: &[&str]) -> Result<Value> {
        let config: Value = serde_json::from_slice(&std::fs::read(self.bundle.path.join("config.json"))?)?;
        let mut process = config["process"].clone();
        process["args"] = command.into();
        Ok(process)
    }

    fn process_file(&self, process: &Value) -> Result<PathBuf> {
        let path = self.hand.folder().join("process.json");
        std::fs::write(&path, process.to_string())?;
        Ok(path)
    }

    /// conmon with what CRI-O gives it in any case.
    fn conmon(&self) -> Cmd {
        let runtime = self.hand.runtime();
        let words = runtime.options().iter().map(|word| format!("--runtime-arg={word}"));
        Cmd::new("/usr/bin/conmon")
            .args(["--cid", &self.bundle.id, "--name", &self.bundle.id, "--log-level", "info", "--runtime"])
            .arg(runtime.program())
            .args(words)
            .arg("--socket-dir-path")
            .arg(self.folder("sockets"))
    }

    /// Starts a conmon with the two descriptors by which it is told to begin and tells what became of it.
    fn start(&self, conmon: Cmd) -> Result<Message> {
        let (told, go) = (self.hand.folder().join("told"), self.hand.folder().join("go"));
        std::fs::write(&told, "")?;
        std::fs::write(&go, [0])?;
        let command = conmon.into_command();
        let line = "exec \"$@\" 3>\"$TOLD\" 4<\"$GO\" </dev/null >>\"$TOLD.out\" 2>&1";
        Cmd::new("sh")
            .args(["-c", line, "sh"])
            .arg(command.get_program())
            .args(command.get_args())
            .env("TOLD", &told)
            .env("GO", &go)
            .env("_OCI_SYNCPIPE", "3")
            .env("_OCI_STARTPIPE", "4")
            .current_dir(&self.bundle.path)
            .run()?;
        let text = eventually(PATIENCE, "conmon's message", || {
            let text = std::fs::read_to_string(&told)?;
            Ok(text.ends_with('\n').then_some(text))
        })?;
        serde_json::from_str(text.trim()).with_context(|| format!("conmon said {text:?}"))
    }

    fn folder(&self, name: &str) -> PathBuf {
        self.hand.folder().join(name)
    }

    /// The file that conmon writes what the container prints to.
    pub(crate) fn log(&self) -> PathBuf {
        self.hand.folder().join("log")
    }

    /// A file that conmon keeps for whoever looks after the container.
    pub(crate) fn persisted(&self, name: &str) -> PathBuf {
        self.folder("persist").join(name)
    }

    /// Writes into the pipe by which conmon is told of a size, or to open the log again.
    pub(crate) fn control(&self, line: &str) -> Result<()> {
        Ok(std::fs::write(self.bundle.path.join("ctl"), line)?)
    }

    /// Waits until the container has printed a line, and returns the log.
    pub(crate) fn expect_log(&self, line: &str) -> Result<String> {
        expect_line(&self.log(), line)
    }

    /// Waits for the container's end: the exit code that conmon noted.
    pub(crate) fn wait(&self) -> Result<String> {
        let path = self.folder("exits").join(&self.bundle.id);
        eventually(PATIENCE, "the exit file", || Ok(std::fs::read_to_string(&path).ok()))
    }

    /// The runtime with these words, then the container's ID, then more words.
    pub(crate) fn call(&self, words: &str, more: &[&str]) -> Result<Output> {
        self.bundle.call(words).args(more).run()
    }

    /// A connection as CRI-O makes it for `kubectl attach`.
    pub(crate) fn attach(&self) -> Result<Attached> {
        let path = self.folder("sockets").join(&self.bundle.id).join("attach");
        let connection = socket(AddressFamily::UNIX, SocketType::SEQPACKET, None)?;
        // The path of a case's folder may be longer than an address.
        let folder = rustix::fs::open(
            path.parent().context("a socket is in a folder")?,
            rustix::fs::OFlags::PATH | rustix::fs::OFlags::CLOEXEC,
            rustix::fs::Mode::empty(),
        )?;
        let short = format!("/proc/self/fd/{}/attach", std::os::fd::AsRawFd::as_raw_fd(&folder));
        connect(&connection, &SocketAddrUnix::new(short)?)
            .with_context(|| format!("cannot connect {}", path.display()))?;
        Ok(Attached(connection))
    }
}

/// One end of the socket that a container's streams go over.
pub(crate) struct Attached(OwnedFd);

impl Attached {
    /// What is typed.
    pub(crate) fn send(&self, text: &str) -> Result<()> {
        send(&self.0, text.as_bytes(), SendFlags::empty())?;
        Ok(())
    }

    /// Waits for a text in what comes, each piece of which begins with the number of its stream.
    pub(crate) fn expect(&self, text: &str) -> Result<()> {
        let mut seen = String::new();
        while !seen.contains(text) {
            ensure!(readable_within(std::os::fd::AsFd::as_fd(&self.0), PATIENCE)?, "no {text:?} came, but {seen:?}");
            let mut piece = [0; 8193];
            let (_, length) = recv(&self.0, &mut piece[..], RecvFlags::empty())?;
            ensure!(length > 0, "it ended without {text:?} after {seen:?}");
            seen.push_str(&String::from_utf8_lossy(&piece[1..length]));
        }
        Ok(())
    }
}

/// Waits until a log of the CRI's kind has a line, and returns the whole.
pub(crate) fn expect_line(log: &Path, line: &str) -> Result<String> {
    eventually(PATIENCE, &format!("{line:?} in {}", log.display()), || {
        let text = std::fs::read_to_string(log).unwrap_or_default();
        Ok(text.lines().any(|have| have.ends_with(&format!(" F {line}"))).then_some(text))
    })
}

/// A log of the CRI's kind without its times.
pub(crate) fn without_times(log: &str) -> String {
    log.lines().filter_map(|line| line.split_once(' ')).map(|(_, rest)| format!("{rest}\n")).collect()
}
