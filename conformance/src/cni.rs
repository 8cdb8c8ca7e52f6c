//! The networks of pods, and of `ctr --cni`: CNI's plugins, as a node has them.

use std::net::{Ipv4Addr, Ipv6Addr};
use std::path::Path;

use anyhow::{Context, Result};
use rustix::mount::{MountFlags, UnmountFlags, mount, mount_bind, unmount};
use serde_json::{Value, json};

use crate::Cmd;

/// The host's addresses on the bridge of all pods.
pub const HOST4: Ipv4Addr = Ipv4Addr::new(172, 31, 248, 1);
/// See [`HOST4`].
pub const HOST6: Ipv6Addr = Ipv6Addr::new(0xfd00, 0x7276, 0x6d00, 0x8, 0, 0, 0, 1);

/// The folders of what most pods are in, and of what a pod is in that has two networks.
pub const ONE: &str = "cni";
/// See [`ONE`].
pub const TWO: &str = "cni-two";

const BRIDGE: &str = "rvm-pods";
const SECOND_BRIDGE: &str = "rvm-second";

/// Where CNI's plugins and its library keep which addresses are taken, whatever they are told.
const RECORDS: &str = "/var/lib/cni";

/// Where the distribution has the plugins.
pub const PLUGINS: &str = "/usr/lib/cni";
/// Where CNI's library looks for the networks and for the plugins.
const DEFAULTS: [&str; 2] = ["/etc/cni/net.d", "/opt/cni/bin"];

/// The pods' networks. A bridge is made with the first pod, and removed with this.
pub struct Network;

impl Drop for Network {
    fn drop(&mut self) {
        for bridge in [BRIDGE, SECOND_BRIDGE] {
            let _ = Cmd::new("ip").args(["link", "delete", bridge]).run();
        }
        for place in DEFAULTS.into_iter().chain([RECORDS]) {
            let _ = unmount(place, UnmountFlags::DETACH);
        }
    }
}

impl Network {
    /// Makes the network [`ONE`] that of programs that cannot be told where theirs is.
    pub fn make_default(&self, folder: &Path) -> Result<()> {
        let sources = [folder.join(ONE), PLUGINS.into()];
        for (source, place) in sources.iter().zip(DEFAULTS) {
            std::fs::create_dir_all(place)?;
            mount_bind(source, place).with_context(|| format!("cannot mount {} on {place}", source.display()))?;
        }
        Ok(())
    }
}

/// Writes the pods' networks into folders of `folder`.
pub fn configure(folder: &Path) -> Result<Network> {
    std::fs::create_dir_all(RECORDS)?;
    mount("tmpfs", RECORDS, "tmpfs", MountFlags::empty(), None).context("cannot mount private records of CNI's")?;
    let network = Network;
    let first = list("pods", BRIDGE, ["172.31.248.0/24", "fd00:7276:6d00:8::/64"], &["0.0.0.0/0", "::/0"]);
    let second = list("second", SECOND_BRIDGE, ["172.31.249.0/24", "fd00:7276:6d00:9::/64"], &[]);
    for (name, lists) in [(ONE, &[&first][..]), (TWO, &[&first, &second])] {
        std::fs::create_dir_all(folder.join(name))?;
        for (number, list) in lists.iter().enumerate() {
            std::fs::write(folder.join(name).join(format!("{number}.conflist")), list.to_string())?;
        }
    }
    // Pods talk to each other through the bridge, and to ports of the host through its addresses.
    for setting in ["net.ipv4.ip_forward=1", "net.ipv4.conf.all.route_localnet=1", "net.ipv6.conf.all.forwarding=1"] {
        Cmd::new("sysctl").args(["--quiet", "--write", setting]).ok()?;
    }
    Ok(network)
}

/// A bridge with addresses of both families, and ports of the host's.
fn list(name: &str, bridge: &str, subnets: [&str; 2], routes: &[&str]) -> Value {
    let ranges = subnets.map(|subnet| json!([{ "subnet": subnet }]));
    let routes: Vec<_> = routes.iter().map(|route| json!({ "dst": route })).collect();
    json!({
        "cniVersion": "0.4.0",
        "name": name,
        "plugins": [
            {
                "type": "bridge",
                "bridge": bridge,
                "isGateway": true,
                "ipMasq": true,
                "hairpinMode": true,
                "ipam": { "type": "host-local", "ranges": ranges, "routes": routes },
            },
            { "type": "portmap", "capabilities": { "portMappings": true } },
        ],
    })
}
