//! What is measured.

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use conformance::{Cmd, image};

use crate::contender::Contender;
use crate::report::Row;
use crate::stream;
use crate::world::World;

/// One measure: a number of rounds in which all runtimes take their turn.
pub(crate) struct Measure {
    name: &'static str,
    what: &'static str,
    unit: &'static str,
    rounds: usize,
    sample: fn(&World, &Contender) -> Result<f64>,
}

/// All of them, in the table's order.
pub(crate) const ALL: [Measure; 8] = [
    Measure { name: "run_true", what: "run true", unit: "ms", rounds: 20, sample: run_true },
    Measure { name: "exec_true", what: "exec true", unit: "ms", rounds: 20, sample: exec_true },
    Measure { name: "docker_run_true", what: "docker run --rm true", unit: "ms", rounds: 10, sample: docker_run_true },
    Measure { name: "node_hello", what: "run node hello", unit: "ms", rounds: 10, sample: node_hello },
    Measure { name: "idle_pss", what: "PSS of an idle one", unit: "MB", rounds: 3, sample: idle_pss },
    Measure { name: "rootfs_read", what: "read the rootfs once", unit: "s", rounds: 3, sample: rootfs_read },
    Measure { name: "stdout_1g", what: "1 GB through stdout", unit: "MB/s", rounds: 3, sample: stdout_1g },
    Measure { name: "tcp_to_bridge", what: "TCP to the bridge", unit: "MB/s", rounds: 3, sample: tcp_to_bridge },
];

impl Measure {
    /// Takes it. A runtime that fails once is left out, with its reason.
    pub(crate) fn take(&self, world: &World, contenders: &[Contender]) -> Row {
        eprintln!("bench: {} ({} rounds)", self.what, self.rounds);
        let mut samples: Vec<Result<Vec<f64>>> = contenders.iter().map(|_| Ok(Vec::new())).collect();
        // The first round warms caches and does not count.
        for round in 0..=self.rounds {
            for (contender, so_far) in contenders.iter().zip(&mut samples) {
                let Ok(values) = so_far else { continue };
                match (self.sample)(world, contender) {
                    Ok(value) if round > 0 => values.push(value),
                    Ok(_) => {}
                    Err(error) => *so_far = Err(error),
                }
            }
        }
        Row::new(self.name, self.what, self.unit, samples)
    }
}

fn milliseconds(time: Duration) -> f64 {
    time.as_secs_f64() * 1000.0
}

/// How long a command takes, which has to succeed.
fn timed(cmd: Cmd) -> Result<f64> {
    let begin = Instant::now();
    cmd.ok()?;
    Ok(milliseconds(begin.elapsed()))
}

fn run_true(world: &World, contender: &Contender) -> Result<f64> {
    timed(world.bundle(image::BUSYBOX, &["true"])?.run(contender))
}

fn exec_true(world: &World, contender: &Contender) -> Result<f64> {
    let bundle = world.bundle(image::BUSYBOX, &["sleep", "1000"])?;
    let running = bundle.start(contender)?;
    running.exec(&["true"]).ok()?;
    timed(running.exec(&["true"]))
}

fn docker_run_true(world: &World, contender: &Contender) -> Result<f64> {
    world.docker.load(image::BUSYBOX)?;
    timed(world.docker.client().args(["run", "--rm", "--runtime", contender.name, image::BUSYBOX, "true"]))
}

fn node_hello(world: &World, contender: &Contender) -> Result<f64> {
    timed(world.bundle(image::DEBIAN, &["node", "-e", "console.log('hello')"])?.run(contender))
}

fn idle_pss(world: &World, contender: &Contender) -> Result<f64> {
    let bundle = world.bundle(image::BUSYBOX, &["sleep", "1000"])?;
    let running = bundle.start(contender)?;
    // Once used, then left alone until it has settled.
    running.exec(&["true"]).ok()?;
    std::thread::sleep(Duration::from_secs(1));
    Ok(running.pss()? as f64 / 1e6)
}

fn rootfs_read(world: &World, contender: &Contender) -> Result<f64> {
    let bundle = world.bundle(image::DEBIAN, &["sleep", "1000"])?;
    let running = bundle.start(contender)?;
    let script = "find / -xdev -type f -print0 | xargs -0 cat | wc -c";
    let begin = Instant::now();
    let output = running.exec(&["sh", "-c", script]).limit(Duration::from_secs(300)).ok()?;
    let seconds = begin.elapsed().as_secs_f64();
    let bytes: u64 = output.text().parse()?;
    ensure!(bytes > 100 << 20, "only {bytes} bytes were read");
    Ok(seconds)
}

fn stdout_1g(world: &World, contender: &Contender) -> Result<f64> {
    let bundle = world.bundle(image::BUSYBOX, &["dd", "if=/dev/zero", "bs=1M", "count=1024"])?;
    stream::from_stdout(bundle.run(contender), 1 << 30)
}

fn tcp_to_bridge(world: &World, contender: &Contender) -> Result<f64> {
    world.docker.load(image::BUSYBOX)?;
    stream::over_tcp(512 << 20, |address, port| {
        let script = format!("dd if=/dev/zero bs=1M count=512 2>/dev/null | nc {address} {port}");
        let run = world.docker.client().args(["run", "--rm", "--runtime", contender.name, image::BUSYBOX]);
        run.args(["sh", "-c", &script]).limit(Duration::from_secs(120))
    })
}
