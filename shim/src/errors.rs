//! The errors of the services, and the one table by which containerd tells them apart.

use std::io;
use std::path::PathBuf;

use runvm::agent::AgentError;
use runvm::error::{Error as RunvmError, sentence};
use runvm::sandbox::SandboxError;
use runvm::state::StateError;
use thiserror::Error;
use ttrpc::Code;

use crate::mounts::MountError;
use crate::options::OptionsError;
use crate::stdio::StdioError;

/// Why a request was not granted.
#[derive(Debug, Error)]
pub enum Error {
    /// The library's.
    #[error(transparent)]
    Runvm(#[from] RunvmError),
    /// The root file system.
    #[error(transparent)]
    Mount(#[from] MountError),
    /// The stdio.
    #[error(transparent)]
    Stdio(#[from] StdioError),
    /// The configuration.
    #[error(transparent)]
    Options(#[from] OptionsError),
    /// There is no such container.
    #[error("container not created")]
    NoContainer,
    /// There is no such process in it.
    #[error("process does not exist {0}")]
    NoProcess(String),
    /// The ID is taken.
    #[error("id {0}")]
    Exists(String),
    /// A signal that came too late.
    #[error("process already finished")]
    Finished,
    /// What a process in this state cannot be asked.
    #[error("cannot {action} a {state} process")]
    State {
        /// What was asked.
        action: &'static str,
        /// What the process is.
        state: &'static str,
    },
    /// `exec` in a container that runs nothing.
    #[error("cannot exec in a {0} state")]
    NoExec(&'static str),
    /// There is no sandbox, or another one.
    #[error("sandbox {0} does not exist")]
    NoSandbox(String),
    /// The request says what cannot be.
    #[error("{field} of the request {problem}")]
    Request {
        /// Which field.
        field: &'static str,
        /// What is wrong with it.
        problem: String,
    },
    /// What no VM has.
    #[error("{0}")]
    Unsupported(&'static str),
    /// A file of the bundle.
    #[error("cannot {action} {path}", path = path.display())]
    File {
        /// What was tried.
        action: &'static str,
        /// The file.
        path: PathBuf,
        /// Why it failed.
        source: io::Error,
    },
}

/// The result of a request.
pub type Result<T> = std::result::Result<T, Error>;

impl Error {
    /// For `map_err`: names the file and what was tried.
    pub fn file(action: &'static str, path: impl Into<PathBuf>) -> impl FnOnce(io::Error) -> Self {
        let path = path.into();
        move |source| Self::File { action, path, source }
    }

    /// The kind that containerd tells its client, and acts upon.
    pub fn code(&self) -> Code {
        match self {
            Self::NoContainer | Self::NoProcess(_) | Self::Finished | Self::NoSandbox(_) => Code::NOT_FOUND,
            Self::Exists(_) => Code::ALREADY_EXISTS,
            Self::State { .. } | Self::NoExec(_) => Code::FAILED_PRECONDITION,
            Self::Unsupported(_) => Code::UNIMPLEMENTED,
            Self::Request { .. } | Self::Stdio(StdioError::Scheme(_)) | Self::Options(_) => Code::INVALID_ARGUMENT,
            Self::Mount(MountError::Option(..) | MountError::Target(..)) => Code::INVALID_ARGUMENT,
            Self::Runvm(error) => code_of(error),
            Self::Mount(_) | Self::Stdio(_) | Self::File { .. } => Code::UNKNOWN,
        }
    }
}

fn code_of(error: &RunvmError) -> Code {
    match error {
        RunvmError::State(StateError::NotFound(_)) | RunvmError::Finished => Code::NOT_FOUND,
        RunvmError::State(StateError::Exists(_)) => Code::ALREADY_EXISTS,
        RunvmError::Bundle(_) | RunvmError::Usage(_) | RunvmError::TooLarge { .. } => Code::INVALID_ARGUMENT,
        RunvmError::NotRunning | RunvmError::NotPaused | RunvmError::CannotStart(_) => Code::FAILED_PRECONDITION,
        RunvmError::CannotDelete { .. } => Code::FAILED_PRECONDITION,
        RunvmError::Agent(error) | RunvmError::Sandbox(SandboxError::Agent(error)) => code_of_agent(error),
        RunvmError::Sandbox(SandboxError::Gone(_)) => Code::UNAVAILABLE,
        _ => Code::UNKNOWN,
    }
}

fn code_of_agent(error: &AgentError) -> Code {
    match error {
        AgentError::Refused { code, .. } => *code,
        AgentError::Silent { .. } => Code::DEADLINE_EXCEEDED,
        AgentError::Undead | AgentError::Channel(_) => Code::UNAVAILABLE,
    }
}

impl From<AgentError> for Error {
    fn from(error: AgentError) -> Self {
        Self::Runvm(error.into())
    }
}

impl From<Error> for ttrpc::Error {
    fn from(error: Error) -> Self {
        tracing::debug!("refused: {}", sentence(&error));
        Self::RpcStatus(ttrpc::get_status(error.code(), sentence(&error)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn containerd_tells_errors_apart() {
        for (error, code, text) in [
            (Error::NoContainer, Code::NOT_FOUND, "container not created"),
            (Error::Finished, Code::NOT_FOUND, "process already finished"),
            (Error::Exists("a".into()), Code::ALREADY_EXISTS, "id a"),
            (
                Error::State { action: "delete", state: "running" },
                Code::FAILED_PRECONDITION,
                "cannot delete a running process",
            ),
            (RunvmError::NotRunning.into(), Code::FAILED_PRECONDITION, "container not running"),
            (Error::Unsupported("no"), Code::UNIMPLEMENTED, "no"),
            (AgentError::Silent { request: "X" }.into(), Code::DEADLINE_EXCEEDED, "does not answer"),
            (RunvmError::from(SandboxError::Gone("x".into())).into(), Code::UNAVAILABLE, "the VM is gone"),
        ] {
            let ttrpc::Error::RpcStatus(status) = ttrpc::Error::from(error) else { panic!("no status") };
            assert_eq!(status.code(), code, "{text}");
            assert!(status.message().contains(text), "{}", status.message());
        }
    }
}
