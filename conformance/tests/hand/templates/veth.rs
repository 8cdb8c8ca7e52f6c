//! A network namespace with one end of a veth pair in it, as an engine makes it.

use anyhow::Result;
use conformance::Cmd;
use conformance::suite::next_number;
use serde_json::{Value, json};

/// The namespace. Its end of the pair is `eth0`.
pub(super) struct Veth {
    name: String,
    mac: String,
}

impl Veth {
    pub(super) fn make() -> Result<Self> {
        let number = next_number();
        let name = format!("rvmn{number}");
        let mac = format!("02:00:00:00:{:02x}:{:02x}", number / 256 % 256, number % 256);
        ip(&format!("netns add {name}"))?;
        ip(&format!("link add rvmh{number} type veth peer name eth0 address {mac} netns {name}"))?;
        ip(&format!("link set rvmh{number} up"))?;
        ip(&format!("-n {name} link set eth0 up"))?;
        Ok(Self { name, mac })
    }

    /// The address of the end in the namespace.
    pub(super) fn mac(&self) -> &str {
        &self.mac
    }

    /// Makes the namespace that of a container.
    pub(super) fn give_to(&self, config: &mut Value) {
        let path = json!(format!("/run/netns/{}", self.name));
        for namespace in config["linux"]["namespaces"].as_array_mut().into_iter().flatten() {
            if namespace["type"] == "network" {
                namespace["path"].clone_from(&path);
            }
        }
    }

    /// Removes the namespace, and with it the pair.
    pub(super) fn remove(&self) -> Result<()> {
        ip(&format!("netns delete {}", self.name))
    }
}

fn ip(line: &str) -> Result<()> {
    Cmd::new("ip").args(line.split(' ')).ok().map(drop)
}
