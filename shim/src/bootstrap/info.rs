//! `-v` and `-info`: what this shim is.

use std::sync::LazyLock;

use containerd_shim_protos::types::introspection::{RuntimeInfo, RuntimeVersion};
use protobuf::Message as _;
use protobuf::well_known_types::any::Any;
use runvm::cli::features;

use super::{BootstrapError, Result, print};

/// How containerd names the features of an OCI runtime, which are JSON.
const FEATURES: &str = "types.containerd.io/opencontainers/runtime-spec/1/features/Features";

static VERSION: LazyLock<String> = LazyLock::new(|| format!("v{}", env!("CARGO_PKG_VERSION")));

/// In the form of containerd's own.
pub fn version() -> String {
    format!("containerd-shim-runvm-v2:\n  Version:  {}\n", *VERSION)
}

/// Prints the message.
pub fn show() -> Result<()> {
    let info = RuntimeInfo {
        name: crate::NAME.to_owned(),
        version: Some(RuntimeVersion { version: VERSION.clone(), ..Default::default() }).into(),
        features: Some(Any {
            type_url: FEATURES.to_owned(),
            value: features().to_string().into_bytes(),
            ..Default::default()
        })
        .into(),
        ..Default::default()
    };
    print(&info.write_to_bytes().map_err(BootstrapError::message("write what this shim is"))?)
}
