//! What is said of the VMs: by the environment of containerd, by the `options` of the runtime in its configuration, and
//! by runvm's own configuration.

use std::path::PathBuf;

use clap::Parser;
use protobuf::Message as _;
use protobuf::well_known_types::any::Any;
use runvm::log;
use runvm::pod;
use runvm::vmm::{self, Configuration, ConfigurationError};
use thiserror::Error;

use crate::wire::options::RuntimeOptions;

/// How the options of the CRI are named, whatever package they are in.
const RUNTIME_OPTIONS: &str = "runtimeoptions.v1.Options";

/// Why it is not known what is asked of the VMs.
#[derive(Debug, Error)]
pub enum OptionsError {
    /// A variable.
    #[error("the environment has a mistake: {0}")]
    Environment(String),
    /// The file.
    #[error(transparent)]
    Configuration(#[from] ConfigurationError),
    /// The runtime's options.
    #[error("the options of the runtime in containerd's configuration are damaged")]
    Runtime(#[source] protobuf::Error),
}

/// The variables of the command, which has them beside its options.
#[derive(Clone, Debug, Parser)]
#[command(no_binary_name = true)]
pub struct Environment {
    #[arg(long, env = "RUNVM_CONFIG")]
    config: Option<PathBuf>,
    #[arg(long, env = "RUNVM_GUEST_CONSOLE")]
    guest_console: Option<PathBuf>,
    #[command(flatten)]
    vm: vmm::Arguments,
}

impl Environment {
    /// That of this process.
    ///
    /// # Errors
    /// [`OptionsError::Environment`].
    pub fn read() -> Result<Self, OptionsError> {
        let nothing: [&str; 0] = [];
        Self::try_parse_from(nothing).map_err(|error| {
            let message = error.to_string();
            let first = message.lines().next().unwrap_or_default();
            OptionsError::Environment(first.trim_start_matches("error: ").to_owned())
        })
    }

    /// What holds for a VM. The file that the runtime's options name goes before the one of the environment.
    ///
    /// # Errors
    /// [`OptionsError`].
    pub fn complete(&self, runtime: Option<&Any>, log: log::Options) -> Result<pod::Options, OptionsError> {
        let named = runtime.map(config_path).transpose()?.flatten();
        let configuration = Configuration::load(named.as_ref().or(self.config.as_ref()).map(PathBuf::as_path))?;
        let vm = self.vm.clone().complete(configuration);
        Ok(pod::Options { vm, log, console: self.guest_console.clone() })
    }
}

/// The file that the options name. Those of other runtimes say nothing to this one.
fn config_path(options: &Any) -> Result<Option<PathBuf>, OptionsError> {
    if !options.type_url.ends_with(RUNTIME_OPTIONS) {
        return Ok(None);
    }
    let options = RuntimeOptions::parse_from_bytes(&options.value).map_err(OptionsError::Runtime)?;
    Ok(Some(options.config_path).filter(|path| !path.is_empty()).map(PathBuf::from))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_runtimes_options_name_a_file() {
        let value = RuntimeOptions { config_path: "/etc/x.toml".into(), ..Default::default() };
        let any = |type_url: &str| Any {
            type_url: type_url.into(),
            value: value.write_to_bytes().unwrap(),
            ..Default::default()
        };
        assert_eq!(config_path(&any("cri.runtimeoptions.v1.Options")).unwrap(), Some("/etc/x.toml".into()));
        assert_eq!(config_path(&any("runtimeoptions.v1.Options")).unwrap(), Some("/etc/x.toml".into()));
        assert_eq!(config_path(&any("containerd.runc.v1.Options")).unwrap(), None);
        let error = Environment::read().unwrap().complete(Some(&any("runtimeoptions.v1.Options")), Default::default());
        assert!(error.unwrap_err().to_string().contains("/etc/x.toml"));
    }
}
