//! Templates: machines at rest whose agent waits for its first request, from which further machines are forked instead of
//! booted.
//!
//! A template is taken when nothing of a container is known to the guest, so it holds no container's data. It fits only
//! machines of its own [`Shape`], which names all that it depends on. Templates are kept in a [`Store`], and are of no
//! use after the host's next boot.

mod shape;
mod store;

use std::io;
use std::path::PathBuf;

use clap::ValueEnum;
use serde::Deserialize;
use thiserror::Error;

pub use shape::{FileIdentity, Shape};
pub use store::{Draft, Files, MAX_TOTAL, Store, Template};

/// Whether machines are forked from templates.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Use {
    /// Where there is one; else the machine boots, and becomes one.
    #[default]
    Auto,
    /// Never.
    Off,
    /// Always: without one there is no machine.
    Require,
}

/// What can go wrong with templates.
#[derive(Debug, Error)]
pub enum TemplateError {
    /// Demanded, and not there.
    #[error(
        "there is no template for this machine ({0}): make it with `runvm template create`, or use `--template auto`"
    )]
    Missing(String),
    /// No such name.
    #[error("there is no template \"{0}\": `runvm template list` shows those that there are")]
    Unknown(String),
    /// Its machine cannot be made, or its guest does not answer.
    #[error("the template {key} is of no use: {reason}; remove it with `runvm template remove {key}`")]
    Useless {
        /// Its name.
        key: String,
        /// Why, as a clause.
        reason: String,
    },
    /// A file cannot be read or written.
    #[error("cannot {action} {path}", path = path.display())]
    File {
        /// What was tried.
        action: &'static str,
        /// The file or folder.
        path: PathBuf,
        /// Why it failed.
        source: io::Error,
    },
}

impl TemplateError {
    fn file(action: &'static str, path: impl Into<PathBuf>) -> impl FnOnce(io::Error) -> Self {
        let path = path.into();
        move |source| Self::File { action, path, source }
    }
}
