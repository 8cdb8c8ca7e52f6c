//! How a new process comes by its stdio, and the host by what it says there.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use libcontainer::oci_spec::runtime::Process as ProcessSpec;
use runvm_protocol::agent;
use rustix::fs::{Gid, Uid};
use rustix::process::Pid;
use rustix::termios::Winsize;

use super::Process;
use super::process::{Files, Stdio};
use crate::error::RequestError;
use crate::reaper::Exit;
use crate::stdio::{Attached, Owner, Pipes, Streams, Terminal, hang_up, window};
use crate::user_namespace::UserNamespace;

/// The streams of a process that is about to be, and our ends of what it gets.
pub(super) struct Connection {
    streams: Streams,
    /// None where it has a terminal, which it makes itself.
    pipes: Option<Pipes>,
}

impl Connection {
    /// Makes what the process gets, and the connection for when it is there.
    pub(super) fn prepare(
        process: &ProcessSpec,
        user_namespace: Option<&Arc<UserNamespace>>,
        stdio: &agent::Stdio,
        mut streams: Streams,
    ) -> Result<(Files, Self), RequestError> {
        let owner = owner_of(process, user_namespace);
        let preserved = streams.connect_preserved(owner);
        let preserved = preserved.map_err(RequestError::system("make the process's descriptors"))?;
        if process.terminal().unwrap_or_default() {
            let stdio = Stdio::Terminal(size_of(stdio, process));
            return Ok((Files { stdio, preserved }, Self { streams, pipes: None }));
        }
        let pipes = Pipes::new(&streams, owner);
        let (pipes, ends) = pipes.map_err(RequestError::system("make the process's pipes"))?;
        Ok((Files { stdio: Stdio::Pipes(ends), preserved }, Self { streams, pipes: Some(pipes) }))
    }

    /// Connects the process to the host; `master` is its terminal's, if it has one.
    pub(super) fn adopt(self, pid: Pid, exit: &Exit, master: Option<OwnedFd>) -> Result<Process, RequestError> {
        let Self { mut streams, pipes } = self;
        let failed = || RequestError::system("connect the process");
        let lifeline = streams.lifeline.take();
        streams.attach_preserved(exit).map_err(failed())?;
        let attached = match pipes {
            Some(pipes) => Attached::pipes(streams, pipes, exit).map_err(failed())?,
            None => {
                let terminal = Terminal::new(master.ok_or(RequestError::NoTerminal)?);
                Attached::terminal(streams, terminal.map_err(RequestError::system("use the terminal"))?, exit)
            }
        };
        let process = Process { pid, exit: exit.clone(), attached };
        if let Some(lifeline) = lifeline {
            let process = process.clone();
            tokio::spawn(async move {
                tokio::select! {
                    () = hang_up(lifeline) => {
                        let _ = process.signal(libc::SIGKILL);
                    }
                    _ = process.exit.status() => {}
                }
            });
        }
        Ok(process)
    }
}

/// Who owns what a process gets.
fn owner_of(process: &ProcessSpec, user_namespace: Option<&Arc<UserNamespace>>) -> Owner {
    let user = (process.user().uid(), process.user().gid());
    // That a user namespace does not have the user is for the process to say.
    let outside = user_namespace.and_then(|namespace| namespace.outside(user.0, user.1));
    let (uid, gid) = outside.unwrap_or(user);
    (Uid::from_raw(uid), Gid::from_raw(gid))
}

/// The first size of a terminal: the host's terminal's, else the specification's.
fn size_of(stdio: &agent::Stdio, process: &ProcessSpec) -> Option<Winsize> {
    if stdio.terminal_rows != 0 && stdio.terminal_columns != 0 {
        return Some(window(stdio.terminal_rows, stdio.terminal_columns));
    }
    let size = process.console_size()?;
    let number = |number: u64| u32::try_from(number).unwrap_or(u32::MAX);
    (size.height() != 0 && size.width() != 0).then(|| window(number(size.height()), number(size.width())))
}
