//! A network namespace with one end of a veth pair in it, as an engine makes it.

use anyhow::Result;
use conformance::Cmd;
use conformance::suite::next_number;
use serde_json::{Value, json};

/// The namespace. Its end of the pair is `eth0`.
pub(crate) struct Veth {
    name: String,
    mac: String,
}

impl Veth {
    /// In a new namespace.
    pub(crate) fn make() -> Result<Self> {
        Self::plug(|name| ip(&format!("netns add {name}")))
    }

    /// In the namespace of a process.
    pub(crate) fn make_for(pid: u64) -> Result<Self> {
        Self::plug(|name| ip(&format!("netns attach {name} {pid}")))
    }

    fn plug(name_it: impl FnOnce(&str) -> Result<()>) -> Result<Self> {
        let number = next_number();
        let (high, low) = (number / 256 % 128, number % 256);
        let (name, host) = (format!("rvmn{number}"), format!("rvmh{number}"));
        let mac = format!("02:00:00:00:{high:02x}:{low:02x}");
        let subnet = format!("10.{}.{low}", 77 + high);
        name_it(&name)?;
        ip(&format!("link add {host} type veth peer name eth0 address {mac} mtu 1400 netns {name}"))?;
        ip(&format!("address add {subnet}.1/24 dev {host}"))?;
        ip(&format!("link set {host} up"))?;
        ip(&format!("-n {name} address add {subnet}.2/24 dev eth0"))?;
        ip(&format!("-n {name} link set eth0 up"))?;
        ip(&format!("-n {name} route add default via {subnet}.1"))?;
        Ok(Self { name, mac })
    }

    /// The address of the end in the namespace.
    pub(crate) fn mac(&self) -> &str {
        &self.mac
    }

    /// How many interfaces there are in the namespace.
    pub(crate) fn links(&self) -> Result<usize> {
        Ok(Cmd::new("ip").args(["-n", &self.name, "-o", "link"]).ok()?.stdout.lines().count())
    }

    /// Makes the namespace that of a container.
    pub(crate) fn give_to(&self, config: &mut Value) {
        let path = json!(format!("/run/netns/{}", self.name));
        for namespace in config["linux"]["namespaces"].as_array_mut().into_iter().flatten() {
            if namespace["type"] == "network" {
                namespace["path"].clone_from(&path);
            }
        }
    }

    /// Removes the namespace, and with it the pair.
    pub(crate) fn remove(&self) -> Result<()> {
        ip(&format!("netns delete {}", self.name))
    }
}

fn ip(line: &str) -> Result<()> {
    Cmd::new("ip").args(line.split(' ')).ok().map(drop)
}
