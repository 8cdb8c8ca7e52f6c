//! What a request can fail with, and the code that the host learns it by.

use std::io;

use ttrpc::Code;
use ttrpc::error::get_rpc_status;

use crate::container::spec::SpecError;
use crate::network::NetworkError;
use crate::stdio::{NotHeld, StdioError};
use crate::user_namespace::UserNamespaceError;

/// The failure of a request. Sentences that engines match on are runc's.
#[derive(Debug, thiserror::Error)]
pub(crate) enum RequestError {
    #[error("container with given ID already exists")]
    ContainerExists,
    #[error("container does not exist")]
    NoContainer,
    #[error("container not running")]
    NotRunning,
    #[error("cannot start an already running container")]
    AlreadyStarted,
    #[error("cannot start a container that has stopped")]
    Stopped,
    #[error("cannot exec in a container that has stopped")]
    ExecInStopped,
    #[error("cannot exec in a paused container")]
    ExecInPaused,
    #[error("container not paused")]
    NotPaused,
    #[error("cannot delete container that is not stopped")]
    StillRunning,
    #[error("exec with given ID already exists")]
    ExecExists,
    #[error("exec process does not exist")]
    NoExec,
    #[error("process already finished")]
    Finished,
    #[error("the process has no terminal")]
    NoTerminal,
    #[error("{0:?} is no identifier: it takes 1 to 255 letters, digits, _, +, - and .")]
    Identifier(String),
    #[error("invalid signal {0}")]
    Signal(u32),
    #[error(transparent)]
    Spec(#[from] SpecError),
    #[error(transparent)]
    NotHeld(#[from] NotHeld),
    /// What a process on its way into a container says of why it cannot run.
    #[error("{0}")]
    Program(String),
    #[error(transparent)]
    Network(#[from] NetworkError),
    #[error(transparent)]
    UserNamespace(#[from] UserNamespaceError),
    #[error("cannot {step}: {source}")]
    System { step: String, source: io::Error },
}

impl RequestError {
    /// A step that the system does not let the agent do.
    pub(crate) fn system<E: Into<io::Error>>(step: impl Into<String>) -> impl FnOnce(E) -> Self {
        move |source| Self::System { step: step.into(), source: source.into() }
    }

    fn code(&self) -> Code {
        match self {
            Self::ContainerExists | Self::ExecExists => Code::ALREADY_EXISTS,
            Self::NoContainer | Self::NoExec | Self::NotHeld(_) => Code::NOT_FOUND,
            Self::NotRunning
            | Self::AlreadyStarted
            | Self::Stopped
            | Self::ExecInStopped
            | Self::ExecInPaused
            | Self::NotPaused
            | Self::StillRunning
            | Self::Finished
            | Self::NoTerminal => Code::FAILED_PRECONDITION,
            Self::Identifier(_) | Self::Signal(_) | Self::Spec(_) => Code::INVALID_ARGUMENT,
            Self::Program(sentence) => program_code(sentence),
            Self::Network(_) | Self::UserNamespace(_) | Self::System { .. } => Code::INTERNAL,
        }
    }
}

impl From<StdioError> for RequestError {
    fn from(error: StdioError) -> Self {
        match error {
            StdioError::NotHeld(error) => Self::NotHeld(error),
            StdioError::Io(source) => Self::System { step: "connect the process's stdio".into(), source },
        }
    }
}

impl From<RequestError> for ttrpc::Error {
    fn from(error: RequestError) -> Self {
        get_rpc_status(error.code(), error)
    }
}

/// The sentences come from processes on their way, whose reports are text only.
fn program_code(sentence: &str) -> Code {
    if sentence.ends_with("permission denied") {
        Code::PERMISSION_DENIED
    } else if sentence.ends_with("no such file or directory") || sentence.ends_with("not found in $PATH") {
        Code::NOT_FOUND
    } else {
        Code::FAILED_PRECONDITION
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_status_is_the_sentence_alone() {
        let error =
            ttrpc::Error::from(RequestError::Program(r#"exec: "nope": executable file not found in $PATH"#.into()));
        let ttrpc::Error::RpcStatus(status) = error else { panic!("{error}") };
        assert_eq!(status.message(), r#"exec: "nope": executable file not found in $PATH"#);
        assert_eq!(status.code(), Code::NOT_FOUND);
    }

    #[test]
    fn programs_that_cannot_run_have_a_code() {
        assert_eq!(program_code(r#"exec: "/etc": permission denied"#), Code::PERMISSION_DENIED);
        assert_eq!(program_code(r#"exec: "/x": stat /x: no such file or directory"#), Code::NOT_FOUND);
        assert_eq!(program_code("mkdir /etc/passwd: not a directory"), Code::FAILED_PRECONDITION);
    }
}
