//! Hooks of the specification that run on the host, with the container's state on their stdin.

use std::collections::HashMap;
use std::fs::File;
use std::io::{self, Read, Write as _};
use std::os::fd::AsFd as _;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use oci_spec::runtime::{Hook, Hooks};
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};
use serde::Serialize;
use thiserror::Error;

use super::process::ProcessIdentity;

/// A hook without a time-out of its own gets this one: nothing waits for ever.
const LONGEST: Duration = Duration::from_secs(120);
/// How much of what a failed hook says is told.
const MAX_OUTPUT: u64 = 4096;

/// A hook that did not do its work.
#[derive(Debug, Error)]
pub enum HookError {
    /// It could not be run.
    #[error("hook {kind} ({path}) cannot be run", path = path.display())]
    Run {
        /// Which kind.
        kind: &'static str,
        /// Its program.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// It ran and failed.
    #[error("hook {kind} ({path}) failed: {reason}", path = path.display())]
    Failed {
        /// Which kind.
        kind: &'static str,
        /// Its program.
        path: PathBuf,
        /// How it ended, and what it said.
        reason: String,
    },
}

/// A container's state as the OCI runtime specification has it.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct State<'a> {
    /// The version of the specification that the container's config.json follows.
    pub oci_version: &'a str,
    /// The container.
    pub id: &'a str,
    /// One of the specification's words.
    pub status: &'static str,
    /// The process that stands for the container on the host; none once it is stopped.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pid: Option<u32>,
    /// The folder of its bundle.
    pub bundle: &'a Path,
    /// Those of config.json.
    pub annotations: &'a HashMap<String, String>,
}

/// Hooks of one kind, and its name in config.json.
pub type OfKind<'a> = (&'static str, &'a [Hook]);

/// The hooks that belong between the making of the namespaces and the container's, in order. The last are the container's
/// own, to be run in its namespaces.
pub fn creating(hooks: &Hooks) -> [OfKind<'_>; 3] {
    #[allow(deprecated, reason = "engines still bring prestart hooks: Docker sets its network up by one")]
    let prestart = hooks.prestart();
    let kinds = [
        ("prestart", prestart),
        ("createRuntime", hooks.create_runtime()),
        ("createContainer", hooks.create_container()),
    ];
    kinds.map(|(kind, hooks)| (kind, hooks.as_deref().unwrap_or_default()))
}

/// Runs the hooks in order, until one fails. `state` is the container's [`State`] as JSON.
///
/// # Errors
/// That of the first hook that fails.
pub fn run<'a>(kind: &'static str, hooks: impl IntoIterator<Item = &'a Hook>, state: &[u8]) -> Result<(), HookError> {
    hooks.into_iter().try_for_each(|hook| run_one(kind, hook, state, None))
}

/// As [`run`], in the network namespace of the process `pid`: of a container's namespaces the one that the host has.
///
/// # Errors
/// That of the first hook that fails.
pub fn run_inside<'a>(
    kind: &'static str,
    hooks: impl IntoIterator<Item = &'a Hook>,
    state: &[u8],
    pid: u32,
) -> Result<(), HookError> {
    hooks.into_iter().try_for_each(|hook| run_one(kind, hook, state, Some(pid)))
}

fn run_one(kind: &'static str, hook: &Hook, state: &[u8], inside: Option<u32>) -> Result<(), HookError> {
    let path = hook.path().clone();
    let cannot = |source| HookError::Run { kind, path: path.clone(), source };
    let failed = |reason| HookError::Failed { kind, path: path.clone(), reason };

    let mut output = tempfile::tempfile().map_err(cannot)?;
    let mut command = Command::new(hook.path());
    let args = hook.args().as_deref().unwrap_or_default();
    if let Some((name, rest)) = args.split_first() {
        command.arg0(name).args(rest);
    }
    command.env_clear();
    let env = hook.env().as_deref().unwrap_or_default();
    command.envs(env.iter().filter_map(|entry| entry.split_once('=')));
    command.stdin(Stdio::piped()).stdout(output.try_clone().map_err(cannot)?);
    command.stderr(output.try_clone().map_err(cannot)?);
    if let Some(pid) = inside {
        enter_network(&mut command, pid).map_err(cannot)?;
    }
    let mut child = command.spawn().map_err(cannot)?;

    if let Some(mut stdin) = child.stdin.take() {
        match stdin.write_all(state) {
            // A hook need not read it.
            Err(error) if error.kind() != io::ErrorKind::BrokenPipe => return Err(cannot(error)),
            _ => {}
        }
    }
    let limit = hook.timeout().and_then(|seconds| u64::try_from(seconds).ok()).map_or(LONGEST, Duration::from_secs);
    let ended = ProcessIdentity::of(child.id()).is_none_or(|hook| hook.await_end(limit).unwrap_or(false));
    if !ended {
        let _ = child.kill();
        let _ = child.wait();
        return Err(failed(format!("it did not end within {} seconds", limit.as_secs())));
    }
    let status = child.wait().map_err(cannot)?;
    if status.success() {
        return Ok(());
    }
    io::Seek::rewind(&mut output).map_err(cannot)?;
    let mut said = Vec::new();
    output.take(MAX_OUTPUT).read_to_end(&mut said).map_err(cannot)?;
    Err(failed(format!("{status}: {}", String::from_utf8_lossy(&said).trim())))
}

/// Has the command's process enter the network namespace of the process `pid`.
fn enter_network(command: &mut Command, pid: u32) -> io::Result<()> {
    let namespace = File::open(format!("/proc/{pid}/ns/net"))?;
    let enter = move || Ok(move_into_link_name_space(namespace.as_fd(), Some(LinkNameSpaceType::Network))?);
    // SAFETY: between fork and exec it makes one system call, it allocates nothing and takes no lock.
    unsafe { command.pre_exec(enter) };
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hook(script: &str, timeout: Option<i64>) -> Vec<Hook> {
        let timeout = timeout.map(|seconds| format!(r#","timeout":{seconds}"#)).unwrap_or_default();
        let text = format!(r#"[{{"path":"/bin/sh","args":["sh","-c",{script:?}],"env":["A=b"]{timeout}}}]"#);
        serde_json::from_str(&text).unwrap()
    }

    #[test]
    fn a_hook_gets_the_state_and_its_environment() {
        run("prestart", &hook("test \"$(cat)\" = '{state}' && test $A = b", None), b"{state}").unwrap();
    }

    #[test]
    fn a_failing_hook_is_named_with_what_it_said() {
        let message = run("prestart", &hook("echo no good >&2; exit 3", None), b"").unwrap_err().to_string();
        assert!(message.contains("prestart") && message.contains("no good") && message.contains('3'), "{message}");
    }

    #[test]
    fn a_hook_that_hangs_is_ended() {
        let message = run("poststop", &hook("exec sleep 60", Some(1)), b"").unwrap_err().to_string();
        assert!(message.contains("within 1 seconds"), "{message}");
    }
}
