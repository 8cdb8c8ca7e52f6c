//! A daemon that gives containers' users other numbers on the host (`userns-remap`).

use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::Path;
use std::sync::Arc;

use anyhow::{Context as _, Result, ensure};
use conformance::docker::{Docker, Engine};
use conformance::enclosure::Enclosure;
use conformance::suite::{Handle as _, expect_equal};
use conformance::{Case, Outcome, case};

pub(crate) fn cases() -> Vec<Case<Docker>> {
    // Each has a daemon of its own, and the names by which the host knows remapped users.
    vec![case!(users_are_others_on_the_host).alone()]
}

/// What root is on the host.
const ROOT: u32 = 300_000;

fn users_are_others_on_the_host(plain: &Docker) -> Result<Outcome> {
    let enclosure = Enclosure::around().context("the suite runs in an enclosure")?;
    let name = format!("remapped-{}", plain.runtime().name());
    let engine = Arc::new(Engine::start_remapped(&enclosure, &name, ROOT)?);
    let docker = Docker::open(&engine, plain.runtime())?;
    let seen = remapped(&docker);
    docker.close()?;
    let log = engine.last_words();
    seen.with_context(|| format!("the daemon said: {log}"))
}

fn remapped(d: &Docker) -> Result<Outcome> {
    let volume = d.volume()?;
    let network = d.network("")?;
    let script = "id; tr -s ' ' </proc/self/uid_map; stat -c %u:%g /etc/passwd /etc/resolv.conf /v /s
        echo mine >/v/root; echo mine >/s/root; echo mine >/root-file; chown 1000:1000 /v/root; echo x >/dev/stdout
        echo hosts >>/host/of-root || echo not the host; ping -c 1 -q 127.0.0.1 | grep -c ' 0% packet loss'
        nc -l -p 80 >/dev/null & ip -4 -o address show eth0 | wc -l; echo ready; sleep 1000";
    let shared = d.folder()?.join("shared");
    let hosts = d.folder()?.join("host");
    std::fs::set_permissions(d.folder()?, std::fs::Permissions::from_mode(0o711))?;
    for (folder, owner) in [(&shared, ROOT), (&hosts, 0)] {
        std::fs::create_dir(folder)?;
        std::os::unix::fs::chown(folder, Some(owner), Some(owner))?;
    }
    let options = format!(
        "--network {network} --volume {volume}:/v --volume {}:/s --volume {}:/host",
        shared.display(),
        hosts.display()
    );
    let container = d.start_sh(&options, script)?;
    container.expect_log("ready")?;
    let logs = container.docker("logs").ok()?;
    let exec =
        container.exec_sh("--user 1000:50", "id; cat /proc/self/uid_map | tr -s ' '; touch /tmp/of-user").run()?;
    let as_root = container.exec_sh("", "id -u; cat /v/root; echo more >>/v/root; ls /host").run()?;

    let owner = |path: &Path| -> Result<(u32, u32)> {
        let data = std::fs::metadata(path).with_context(|| format!("there is no {}", path.display()))?;
        Ok((data.uid(), data.gid()))
    };
    let inspect = d.docker("volume inspect --format {{.Mountpoint}}").arg(&volume).ok()?;
    expect_equal("the volume's file", owner(&Path::new(inspect.text()).join("root"))?, (ROOT + 1000, ROOT + 1000))?;
    expect_equal("the folder's file", owner(&shared.join("root"))?, (ROOT, ROOT))?;
    ensure!(!hosts.join("of-root").exists(), "the container's root is the host's");
    let copied = d.folder()?.join("copied");
    d.docker("cp").arg(format!("{}:/root-file", container.id)).arg(&copied).ok()?;
    expect_equal("a copied file", std::fs::read_to_string(copied)?.as_str(), "mine\n")?;
    let diff = container.docker("diff").ok()?;
    ensure!(diff.stdout.contains("A /root-file"), "{}", diff.stdout);
    container.docker("rm --force").ok()?;
    // Without the mapping, where the user wants none.
    let unmapped = d.sh("--userns host", "id -u; tr -s ' ' </proc/self/uid_map").run()?;
    Ok(Outcome::new()
        .see("logs", logs.stdout)
        .see_output("a user's exec", &exec)
        .see_output("root's exec", &as_root)
        .see_output("unmapped", &unmapped))
}
