//! The command line, which only containerd writes: starting a shim, cleaning up after one, and telling what it is.

mod address;
mod delete;
mod flags;
mod info;
mod parameters;
mod start;

use std::io::{self, Write as _};
use std::path::PathBuf;
use std::process::ExitCode;

use runvm::error::sentence;
use thiserror::Error;

use crate::server;

pub use address::Address;
pub use flags::Flags;

/// Why a command of containerd's failed.
#[derive(Debug, Error)]
pub enum BootstrapError {
    /// A flag.
    #[error("{0}")]
    Flag(String),
    /// No namespace was given.
    #[error("shim namespace cannot be empty")]
    NoNamespace,
    /// What is to be done is none of the three.
    #[error("\"{0}\" is nothing that a shim does: say start or delete")]
    Action(String),
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
    /// config.json does not parse.
    #[error("{path} is not a valid OCI configuration", path = .0.display())]
    Spec(PathBuf, #[source] serde_json::Error),
    /// The operating system refuses.
    #[error("cannot {action}")]
    System {
        /// What was tried.
        action: &'static str,
        /// Why it failed.
        source: io::Error,
    },
    /// A message of containerd's, or one for it.
    #[error("cannot {action}")]
    Message {
        /// What was tried.
        action: &'static str,
        /// Why it failed.
        source: protobuf::Error,
    },
    /// The configuration of the VMs.
    #[error(transparent)]
    Options(#[from] crate::options::OptionsError),
    /// The server.
    #[error(transparent)]
    Server(#[from] server::ServerError),
}

impl BootstrapError {
    fn system(action: &'static str) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::System { action, source }
    }

    fn file(action: &'static str, path: impl Into<PathBuf>) -> impl FnOnce(io::Error) -> Self {
        let path = path.into();
        move |source| Self::File { action, path, source }
    }

    fn message(action: &'static str) -> impl FnOnce(protobuf::Error) -> Self {
        move |source| Self::Message { action, source }
    }
}

type Result<T> = std::result::Result<T, BootstrapError>;

/// The whole program: parse, do, tell.
pub fn main() -> ExitCode {
    let arguments: Vec<_> = std::env::args().skip(1).collect();
    match Flags::parse(&arguments).and_then(|flags| run(&flags)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{}: {}", crate::NAME, sentence(&error));
            ExitCode::FAILURE
        }
    }
}

fn run(flags: &Flags) -> Result<()> {
    if flags.version {
        return print(info::version().as_bytes());
    }
    if flags.info {
        return info::show();
    }
    if flags.namespace.is_empty() {
        return Err(BootstrapError::NoNamespace);
    }
    match flags.action.as_str() {
        "start" => start::start(flags),
        "delete" => delete::delete(flags),
        "" => Ok(server::serve(flags)?),
        other => Err(BootstrapError::Action(other.to_owned())),
    }
}

fn print(bytes: &[u8]) -> Result<()> {
    io::stdout().write_all(bytes).map_err(BootstrapError::system("write to stdout"))
}
