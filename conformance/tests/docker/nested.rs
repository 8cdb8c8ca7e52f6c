//! An engine of the container's own, as a builder of images has one.

use std::time::Duration;

use anyhow::Result;
use conformance::docker::Docker;
use conformance::suite::expect_equal;
use conformance::{Case, Outcome, case, image};

/// How long it may take for two daemons to start, and a container with them, on a machine that has much else to do.
const PATIENCE: Duration = Duration::from_secs(180);

pub(crate) fn cases() -> Vec<Case<Docker>> {
    vec![case!(docker_runs_inside)]
}

/// Prints what the innermost container did, and nothing where its daemon does not come up.
const ENGINE: &str = "
dockerd --storage-driver overlay2 >/tmp/log 2>&1 &
until docker info >/dev/null 2>&1; do kill -0 $! || { tail /tmp/log >&2; exit 1; }; sleep 0.2; done
docker info --format '{{.Driver}}'
docker import /busybox.tar busybox >/dev/null
docker run --name inner busybox sh -c \"$INNER\"
echo code $?
docker diff inner | sort
docker rm inner >/dev/null
kill $!; wait $!";

/// A copy up, a whiteout, an opaque folder, and the network of its engine.
const INNER: &str = "echo changed >/etc/passwd; rm /etc/group; rm -r /home; mkdir /home; echo kept >/home/kept
    cat /etc/passwd; ls /home; ls /etc/group 2>/dev/null; ip -o -4 address show eth0 | tr -s ' ' | cut -d ' ' -f 4; exit 5";

fn docker_runs_inside(d: &Docker) -> Result<Outcome> {
    let (volume, busybox) = (d.volume()?, image::tar(image::BUSYBOX)?);
    let options = format!(
        "--privileged --cgroupns private --volume {volume}:/var/lib/docker --volume {}:/busybox.tar:ro",
        busybox.display()
    );
    let script = format!("INNER={INNER:?}{ENGINE}").replace("\\n", "\n");
    let output = d.run_docker(&options, &["sh", "-c", &script])?.limit(PATIENCE).run()?;
    let expected = "overlay2\nchanged\nkept\n172.17.0.2/16\ncode 5\nA /home/kept\nC /etc\nC /etc/passwd\nC /home\nD /etc/group\nD /home/user";
    expect_equal("output", (output.text(), output.stderr.as_str()), (expected, ""))?;
    Ok(Outcome::new().see_output("run", &output))
}
