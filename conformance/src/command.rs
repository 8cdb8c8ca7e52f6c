//! Running other programs with a limit on their time: nothing in a suite may hang.

use std::ffi::OsStr;
use std::fmt::Write as _;
use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, Signal, kill_process_group, pidfd_open};

/// How long a program may take unless its caller says otherwise.
const DEFAULT_LIMIT: Duration = Duration::from_secs(60);

/// A program about to run, in its own process group and with a time limit.
pub struct Cmd {
    command: Command,
    input: Vec<u8>,
    limit: Duration,
}

/// What a program left: its exit code and what it wrote.
#[derive(Debug, Clone)]
pub struct Output {
    /// The exit code, or 128 plus the signal's number, as a shell has it.
    pub code: i32,
    /// Standard output, as text.
    pub stdout: String,
    /// Standard error, as text.
    pub stderr: String,
}

impl Cmd {
    /// A program with an empty standard input and the C locale.
    pub fn new(program: impl AsRef<OsStr>) -> Self {
        let mut command = Command::new(program);
        command.env("LC_ALL", "C");
        Self { command, input: Vec::new(), limit: DEFAULT_LIMIT }
    }

    /// Adds one argument.
    #[must_use]
    pub fn arg(mut self, arg: impl AsRef<OsStr>) -> Self {
        self.command.arg(arg);
        self
    }

    /// Adds arguments.
    #[must_use]
    pub fn args<S: AsRef<OsStr>>(mut self, args: impl IntoIterator<Item = S>) -> Self {
        self.command.args(args);
        self
    }

    /// Sets a variable of the program's environment.
    #[must_use]
    pub fn env(mut self, key: &str, value: impl AsRef<OsStr>) -> Self {
        self.command.env(key, value);
        self
    }

    /// Sets the folder that the program runs in.
    #[must_use]
    pub fn current_dir(mut self, dir: impl AsRef<std::path::Path>) -> Self {
        self.command.current_dir(dir);
        self
    }

    /// Gives the program these bytes on its standard input, then the end of it.
    #[must_use]
    pub fn input(mut self, bytes: impl Into<Vec<u8>>) -> Self {
        self.input = bytes.into();
        self
    }

    /// Sets the time after which the program's process group is killed.
    #[must_use]
    pub fn limit(mut self, limit: Duration) -> Self {
        self.limit = limit;
        self
    }

    /// The command line, for messages.
    pub fn line(&self) -> String {
        let mut line = self.command.get_program().to_string_lossy().into_owned();
        for arg in self.command.get_args() {
            let _ = write!(line, " {}", arg.to_string_lossy());
        }
        line
    }

    /// Runs the program to its end. It is an error only if it does not start or does
    /// not end in time; the exit code is for the caller to judge.
    pub fn run(mut self) -> Result<Output> {
        let line = self.line();
        let child = self
            .command
            .process_group(0)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .with_context(|| format!("cannot start `{line}`"))?;
        let mut conversation = Conversation::new(child, self.input)?;
        match conversation.hold(self.limit)? {
            Some(status) => Ok(conversation.output(status)),
            None => {
                let status = conversation.kill()?;
                let Output { stdout, stderr, .. } = conversation.output(status);
                bail!("`{line}` took longer than {:?}\n--- stdout\n{stdout}\n--- stderr\n{stderr}", self.limit)
            }
        }
    }

    /// Runs the program and expects it to succeed.
    pub fn ok(self) -> Result<Output> {
        let line = self.line();
        let output = self.run()?;
        if output.code != 0 {
            bail!("`{line}` exited with {}\n--- stdout\n{}\n--- stderr\n{}", output.code, output.stdout, output.stderr);
        }
        Ok(output)
    }

    /// Starts the program in the background with its output going to `log`.
    pub fn spawn_logged(mut self, log: &std::path::Path) -> Result<Child> {
        let line = self.line();
        let file = File::create(log).with_context(|| format!("cannot create {}", log.display()))?;
        self.command
            .process_group(0)
            .stdin(Stdio::null())
            .stdout(file.try_clone()?)
            .stderr(file)
            .spawn()
            .with_context(|| format!("cannot start `{line}`"))
    }

    /// The plain command, for a caller that has its own way with the program's descriptors.
    pub fn into_command(self) -> Command {
        self.command
    }
}

impl Output {
    /// Standard output without the white space around it.
    pub fn text(&self) -> &str {
        self.stdout.trim()
    }
}

/// A running child and the three pipes to it.
struct Conversation {
    child: Child,
    input: Vec<u8>,
    written: usize,
    stdout: Vec<u8>,
    stderr: Vec<u8>,
}

impl Conversation {
    fn new(child: Child, input: Vec<u8>) -> Result<Self> {
        let ends = [
            child.stdin.as_ref().map(AsFd::as_fd),
            child.stdout.as_ref().map(AsFd::as_fd),
            child.stderr.as_ref().map(AsFd::as_fd),
        ];
        for end in ends.into_iter().flatten() {
            rustix::io::ioctl_fionbio(end, true)?;
        }
        Ok(Self { child, input, written: 0, stdout: Vec::new(), stderr: Vec::new() })
    }

    /// Feeds and drains the child until it ends; `None` when it has not within `limit`.
    fn hold(&mut self, limit: Duration) -> Result<Option<ExitStatus>> {
        let deadline = Instant::now() + limit;
        let exit = pidfd_open(Pid::from_child(&self.child), PidfdFlags::empty())?;
        loop {
            self.feed()?;
            self.drain()?;
            let mut ready = vec![PollFd::new(&exit, PollFlags::IN)];
            if let Some(stdin) = &self.child.stdin {
                ready.push(PollFd::new(stdin, PollFlags::OUT));
            }
            if let Some(stdout) = &self.child.stdout {
                ready.push(PollFd::new(stdout, PollFlags::IN));
            }
            if let Some(stderr) = &self.child.stderr {
                ready.push(PollFd::new(stderr, PollFlags::IN));
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(None);
            }
            poll(&mut ready, Some(&Timespec::try_from(left)?))?;
            if !ready[0].revents().is_empty() {
                let status = self.child.wait()?;
                self.drain()?;
                return Ok(Some(status));
            }
        }
    }

    fn feed(&mut self) -> Result<()> {
        let Some(stdin) = &mut self.child.stdin else { return Ok(()) };
        while self.written < self.input.len() {
            match stdin.write(&self.input[self.written..]) {
                Ok(count) => self.written += count,
                Err(e) if e.kind() == std::io::ErrorKind::WouldBlock => return Ok(()),
                // A program need not read what it is offered.
                Err(e) if e.kind() == std::io::ErrorKind::BrokenPipe => break,
                Err(e) => return Err(e.into()),
            }
        }
        self.child.stdin = None;
        Ok(())
    }

    /// Reads what is there. A descendant may hold a pipe open after the program's end,
    /// so the end of the file is not waited for.
    fn drain(&mut self) -> Result<()> {
        if read_available(self.child.stdout.as_mut(), &mut self.stdout)? {
            self.child.stdout = None;
        }
        if read_available(self.child.stderr.as_mut(), &mut self.stderr)? {
            self.child.stderr = None;
        }
        Ok(())
    }

    fn kill(&mut self) -> Result<ExitStatus> {
        kill_process_group(Pid::from_child(&self.child), Signal::KILL)?;
        let status = self.child.wait()?;
        self.drain()?;
        Ok(status)
    }

    fn output(self, status: ExitStatus) -> Output {
        Output {
            code: code(status),
            stdout: String::from_utf8_lossy(&self.stdout).into_owned(),
            stderr: String::from_utf8_lossy(&self.stderr).into_owned(),
        }
    }
}

/// The exit code as a shell gives it.
pub fn code(status: ExitStatus) -> i32 {
    status.code().unwrap_or_else(|| 128 + status.signal().unwrap_or(0))
}

/// Reads what the pipe has now; true at its end.
fn read_available<R: Read>(pipe: Option<&mut R>, kept: &mut Vec<u8>) -> Result<bool> {
    let Some(pipe) = pipe else { return Ok(false) };
    // Reading to the end keeps what it got when the pipe is merely empty.
    match pipe.read_to_end(kept) {
        Ok(_) => Ok(true),
        Err(e) if e.kind() == std::io::ErrorKind::WouldBlock => Ok(false),
        Err(e) => Err(e.into()),
    }
}

/// Waits until a child ends, at most for `limit`; true if it did.
pub fn ended_within(child: &Child, limit: Duration) -> Result<bool> {
    let exit = pidfd_open(Pid::from_child(child), PidfdFlags::empty())?;
    readable_within(exit.as_fd(), limit)
}

/// Waits until a descriptor has something to read, at most for `limit`; true if it has.
pub fn readable_within(fd: BorrowedFd<'_>, limit: Duration) -> Result<bool> {
    let mut ready = [PollFd::from_borrowed_fd(fd, PollFlags::IN)];
    Ok(poll(&mut ready, Some(&Timespec::try_from(limit)?))? > 0)
}

/// Asks `question` again and again until it has an answer, at most for `limit`.
///
/// For things that happen in an engine, which no descriptor of ours tells about.
pub fn eventually<T>(limit: Duration, what: &str, mut question: impl FnMut() -> Result<Option<T>>) -> Result<T> {
    let deadline = Instant::now() + limit;
    loop {
        if let Some(answer) = question()? {
            return Ok(answer);
        }
        if Instant::now() > deadline {
            bail!("waited {limit:?} in vain for {what}");
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}
