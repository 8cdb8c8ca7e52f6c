//! The configuration file: what is said of the VM where neither the command line nor the environment says anything.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use serde::Deserialize;
use thiserror::Error;

use super::options::Wanted;
use super::probe;
use crate::template;

/// Where it is looked for. It need not be there.
const FILE: &str = "/etc/runvm/config.toml";

/// A file that cannot be used.
#[derive(Debug, Error)]
pub enum ConfigurationError {
    /// Not readable.
    #[error("cannot read the configuration {path}", path = .0.display())]
    Read(PathBuf, #[source] io::Error),
    /// Not understood.
    #[error("the configuration {path} has a mistake: {1}", path = .0.display())]
    Parse(PathBuf, String),
}

/// Its keys are the long options of the same meaning.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct Configuration {
    /// `--accel`.
    pub accel: Option<probe::Wanted>,
    /// `--vmm`.
    pub vmm: Option<Wanted>,
    /// `--template`.
    pub template: Option<template::Use>,
    /// `--template-dir`.
    pub template_dir: Option<PathBuf>,
}

impl Configuration {
    /// Reads the file that the user names, or that of the system, if there is one.
    ///
    /// # Errors
    /// [`ConfigurationError`].
    pub fn load(named: Option<&Path>) -> Result<Self, ConfigurationError> {
        let path = named.unwrap_or(Path::new(FILE));
        match fs::read_to_string(path) {
            Ok(text) => toml::from_str(&text)
                .map_err(|error| ConfigurationError::Parse(path.to_owned(), error.message().trim().to_owned())),
            Err(error) if error.kind() == io::ErrorKind::NotFound && named.is_none() => Ok(Self::default()),
            Err(error) => Err(ConfigurationError::Read(path.to_owned(), error)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write as _;

    fn load(text: &str) -> Result<Configuration, String> {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(text.as_bytes()).unwrap();
        Configuration::load(Some(file.path())).map_err(|error| error.to_string())
    }

    #[test]
    fn keys_are_those_of_the_options() {
        let text = "accel = 'kvm'\nvmm = 'builtin'\ntemplate = 'off'\ntemplate-dir = '/srv/t'\n";
        let configuration = Configuration {
            accel: Some(probe::Wanted::Kvm),
            vmm: Some(Wanted::Builtin),
            template: Some(template::Use::Off),
            template_dir: Some("/srv/t".into()),
        };
        assert_eq!(load(text), Ok(configuration));
        assert_eq!(load(""), Ok(Configuration::default()));
    }

    #[test]
    fn mistakes_are_named() {
        assert!(load("acel = 'kvm'").unwrap_err().contains("unknown field `acel`"));
        assert!(load("template = 'sometimes'").unwrap_err().contains("unknown variant `sometimes`"));
        let missing = Configuration::load(Some(Path::new("/no/such"))).unwrap_err();
        assert_eq!(missing.to_string(), "cannot read the configuration /no/such");
    }
}
