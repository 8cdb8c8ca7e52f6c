//! The making of a container, in a child of PID 1: libcontainer waits, changes what it runs in, and may hang on a file
//! system of the container's.

use std::error::Error;
use std::fs;
use std::io;
use std::os::fd::{AsFd as _, AsRawFd as _, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::Duration;

use libcontainer::container::builder::ContainerBuilder;
use libcontainer::error::LibcontainerError;
use libcontainer::oci_spec::runtime::Spec;
use libcontainer::syscall::syscall::SyscallType;
use rustix::io::Errno;
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags};
use rustix::pipe::PipeFlags;
use rustix::process::Pid;
use tokio::io::Interest;
use tokio::net::unix::pipe;
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::watch;

use super::cwd;
use super::program::{Program, describe};
use crate::child;
use crate::error::RequestError;
use crate::log::{self, ChildLog};
use crate::reaper::{Exit, Reaper};
use crate::stdio::ChildEnds;

/// How long a start waits for its program to be loaded.
const START_PATIENCE: Duration = Duration::from_secs(10);

/// libcontainer's folder for containers, and the agent's for their bundles. They are not in a container's view: it leaves
/// this root.
const STATE: &str = "/run/runvm/containers";
const BUNDLES: &str = "/run/runvm/bundles";

/// The files of one container. Ours are named by a number, so that no identifier is too long for a socket's path.
pub(super) struct Files {
    name: String,
    folder: PathBuf,
    /// Whether the container's program has taken its process over, or the process has ended before.
    running: watch::Sender<bool>,
}

impl Files {
    pub(super) fn create(id: &str, number: u64) -> io::Result<Self> {
        let folder = Path::new(BUNDLES).join(number.to_string());
        let files = Self { name: id.to_owned(), folder, running: watch::Sender::new(false) };
        fs::create_dir_all(STATE)?;
        fs::create_dir_all(&files.folder)?;
        Ok(files)
    }

    fn console(&self) -> PathBuf {
        self.folder.join("console.sock")
    }

    fn failure(&self) -> PathBuf {
        self.folder.join("failure")
    }

    /// libcontainer's own folder.
    fn state(&self) -> PathBuf {
        Path::new(STATE).join(&self.name)
    }
}

impl Drop for Files {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.folder);
        let _ = fs::remove_dir_all(self.state());
    }
}

/// What the first process gets for stdin, stdout and stderr.
pub(super) enum FirstStdio {
    Pipes(ChildEnds),
    /// It makes a terminal, and hands over its master.
    Terminal,
}

/// A container whose program is ready to run.
pub(super) struct Created {
    pub(super) init: Pid,
    pub(super) exit: Exit,
    pub(super) master: Option<OwnedFd>,
}

/// Creates the container.
pub(super) async fn create(
    reaper: &Reaper,
    files: &Files,
    spec: &Spec,
    stdio: FirstStdio,
) -> Result<Created, RequestError> {
    let console = match stdio {
        FirstStdio::Terminal => {
            Some(UnixListener::bind(files.console()).map_err(RequestError::system("make the console socket"))?)
        }
        FirstStdio::Pipes(_) => None,
    };
    let expected = reaper.expect();
    let (log, log_end) = child_log().map_err(RequestError::system("make a pipe"))?;
    let helper = match &stdio {
        FirstStdio::Pipes(ends) => {
            let keep = [ends.stdin.as_fd(), ends.stdout.as_fd(), ends.stderr.as_fd()];
            child::fork(log_end, &keep, || build(files, spec, Some(ends)))
        }
        FirstStdio::Terminal => child::fork(log_end, &[], || build(files, spec, None)),
    };
    drop(stdio);
    let helper = reaper.watch(helper.map_err(RequestError::system("start a process"))?);
    let running = files.running.clone();
    let log = tokio::spawn(async move {
        // The last to hold the pipe is the process that becomes the program.
        let log = log::adopt(log).await;
        running.send_replace(true);
        log
    });
    if helper.status().await != 0 {
        let log = log.await.unwrap_or_default();
        let sentence = fs::read_to_string(files.failure());
        let sentence = sentence.unwrap_or_else(|_| "the container's first process died while it was made".into());
        return Err(RequestError::Program(failure(sentence, spec, log)));
    }
    let init = init_of(files).map_err(RequestError::system("read the container's state"))?;
    let exit = expected.fulfil(init);
    let master = match console {
        Some(console) => Some(receive_master(&console).await.map_err(RequestError::system("receive the terminal"))?),
        None => None,
    };
    Ok(Created { init, exit, master })
}

/// Lets the program run, and waits until it does: what is sent to it from now on is the program's, which sees to its
/// signals sooner than a further step of ours would.
pub(super) async fn start(files: &Files) -> io::Result<()> {
    let mut running = files.running.subscribe();
    // A socket's path is short, an identifier need not be.
    let state = fs::File::open(files.state())?;
    let notified = UnixStream::connect(format!("/proc/self/fd/{}/notify.sock", state.as_raw_fd())).await?;
    notified.writable().await?;
    notified.try_write(b"start")?;
    // The word is read to its end.
    drop(notified);
    // A program on a file system that hangs is started all the same.
    let _ = tokio::time::timeout(START_PATIENCE, running.wait_for(|running| *running)).await;
    Ok(())
}

/// In the child: has libcontainer make the container. What goes wrong is left in a file, since any descriptor of this
/// process goes on to the container's first one.
fn build(files: &Files, spec: &Spec, stdio: Option<&ChildEnds>) -> i32 {
    let written = write_config(files, spec).map_err(LibcontainerError::OtherIO);
    let built = written.and_then(|()| try_build(files, stdio));
    let Err(error) = built else { return 0 };
    let _ = fs::write(files.failure(), sentence(&error));
    1
}

fn write_config(files: &Files, spec: &Spec) -> io::Result<()> {
    let mut spec = spec.clone();
    cwd::provide(&mut spec)?;
    fs::write(files.folder.join("config.json"), serde_json::to_vec(&spec)?)
}

fn try_build(files: &Files, stdio: Option<&ChildEnds>) -> Result<(), LibcontainerError> {
    let stdio = stdio.map(duplicate).transpose().map_err(LibcontainerError::OtherIO)?;
    let mut builder =
        ContainerBuilder::new(files.name.clone(), SyscallType::default()).with_root_path(STATE)?.with_executor(Program);
    builder = match stdio {
        Some(ends) => builder.with_stdin(ends.stdin).with_stdout(ends.stdout).with_stderr(ends.stderr),
        None => builder.with_console_socket(Some(files.console())),
    };
    builder.as_init(&files.folder).with_systemd(false).with_detach(true).build().map(drop)
}

/// libcontainer closes what it is given.
fn duplicate(ends: &ChildEnds) -> io::Result<ChildEnds> {
    Ok(ChildEnds { stdin: ends.stdin.try_clone()?, stdout: ends.stdout.try_clone()?, stderr: ends.stderr.try_clone()? })
}

/// The sentence of an error. libcontainer hands its processes' errors on as text, each wrapped in the next.
fn sentence(error: &LibcontainerError) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(source) = next {
        let cause = source.to_string();
        if !text.ends_with(&cause) {
            text = format!("{text}: {cause}");
        }
        next = source.source();
    }
    let inside = text.split_once("error in executing process : ").map(|(_, inside)| inside);
    inside.or_else(|| text.strip_prefix("failed to create container: ")).unwrap_or(&text).to_owned()
}

/// Why the creation failed: libcontainer's sentence, with the cause from the log where it has none, and runc's where
/// the working directory is to blame.
fn failure(sentence: String, spec: &Spec, log: ChildLog) -> String {
    let Some(cause) = log.first_error.filter(|_| !sentence.starts_with("exec: ")) else { return sentence };
    let cwd = spec.process().as_ref().map(|process| process.cwd().display().to_string()).unwrap_or_default();
    if let Some(errno) = cwd::failure(&cause) {
        return format!("mkdir {cwd}: {}", describe(errno));
    }
    if cause.starts_with("failed to chdir") {
        return chdir_failure(&cwd, &cause);
    }
    if cause.contains(&sentence) { sentence } else { format!("{sentence}: {cause}") }
}

/// runc makes the directory first, so one that is none fails there.
fn chdir_failure(cwd: &str, cause: &str) -> String {
    if cause.contains("ENOTDIR") {
        return format!("mkdir {cwd}: {}", describe(Errno::NOTDIR));
    }
    let errnos = [("ENOENT", Errno::NOENT), ("EACCES", Errno::ACCESS), ("ELOOP", Errno::LOOP)];
    let errno = errnos.iter().find(|(name, _)| cause.contains(name)).map(|&(_, errno)| describe(errno));
    format!("chdir to cwd ({cwd:?}) set in config.json failed: {}", errno.as_deref().unwrap_or(cause))
}

fn init_of(files: &Files) -> io::Result<Pid> {
    let state: serde_json::Value = serde_json::from_slice(&fs::read(files.state().join("state.json"))?)?;
    let pid = state["pid"].as_i64().and_then(|pid| i32::try_from(pid).ok()).filter(|&pid| pid > 0);
    pid.and_then(Pid::from_raw).ok_or_else(|| io::Error::other("state.json names no process"))
}

/// A pipe for a child's log.
pub(super) fn child_log() -> io::Result<(pipe::Receiver, OwnedFd)> {
    let (read, write) = rustix::pipe::pipe_with(PipeFlags::CLOEXEC | PipeFlags::NONBLOCK)?;
    Ok((pipe::Receiver::from_owned_fd(read)?, write))
}

async fn receive_master(console: &UnixListener) -> io::Result<OwnedFd> {
    let (stream, _) = console.accept().await?;
    stream.async_io(Interest::READABLE, || receive_file(&stream)).await
}

/// Receives one open file.
pub(super) fn receive_file(socket: impl std::os::fd::AsFd) -> io::Result<OwnedFd> {
    let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let mut name = [0; 64];
    let mut buffer = [io::IoSliceMut::new(&mut name)];
    rustix::net::recvmsg(socket, &mut buffer, &mut ancillary, RecvFlags::CMSG_CLOEXEC)?;
    let mut files = ancillary.drain().filter_map(|message| match message {
        RecvAncillaryMessage::ScmRights(files) => Some(files),
        _ => None,
    });
    files.next().and_then(|mut files| files.next()).ok_or_else(|| io::Error::other("no terminal came"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use libcontainer::oci_spec::runtime::{ProcessBuilder, SpecBuilder};

    #[test]
    fn failures_are_told_in_runcs_words() {
        let process = ProcessBuilder::default().cwd("/srv").build().unwrap();
        let spec = SpecBuilder::default().process(process).build().unwrap();
        let told =
            |sentence: &str, cause: &str| failure(sentence.into(), &spec, ChildLog { first_error: Some(cause.into()) });
        let exec = r#"exec: "x": executable file not found in $PATH"#;
        assert_eq!(told(exec, &format!("failed to initialize: {exec}")), exec);
        let chdir = "chdir to cwd (\"/srv\") set in config.json failed: permission denied";
        assert_eq!(told("failed to unix syscall", "failed to chdir: e=EACCES"), chdir);
        assert_eq!(told("failed to unix syscall", "failed to chdir: e=ENOTDIR"), "mkdir /srv: not a directory");
        let hook = "failed to run create container hooks: err=NonZeroExitCode(30)";
        assert_eq!(told("failed to run hooks", hook), "mkdir /srv: read-only file system");
        assert_eq!(told("failed to prepare rootfs", "no such source"), "failed to prepare rootfs: no such source");
        assert_eq!(told("invalid umask", "failed: invalid umask"), "invalid umask");
    }
}
