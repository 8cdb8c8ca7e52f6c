//! What is measured.

use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, ensure};
use conformance::census::Process;
use conformance::cri::{self, Cri};
use conformance::suite::{Handle, next_number};
use conformance::{Cmd, Runtime, image};

use crate::contender::Contender;
use crate::report::{Row, percentile};
use crate::stream;
use crate::world::{Bundle, Running, World};

/// One measure: a number of rounds in which all runtimes take their turn.
pub(crate) struct Measure {
    pub(crate) name: &'static str,
    what: &'static str,
    unit: &'static str,
    rounds: usize,
    open: for<'a> fn(&'a World, &'a Contender) -> Result<Sampler<'a>>,
}

/// Takes one sample. What all samples of a runtime share, it holds.
type Sampler<'a> = Box<dyn FnMut() -> Result<f64> + 'a>;

/// All of them, in the table's order.
pub(crate) const ALL: [Measure; 15] = [
    Measure { name: "run_true", what: "run true", unit: "ms", rounds: 20, open: run_true },
    Measure { name: "exec_true", what: "exec true", unit: "ms", rounds: 20, open: exec_true },
    Measure { name: "docker_run_true", what: "docker run --rm true", unit: "ms", rounds: 10, open: docker_run_true },
    Measure { name: "ctr_run_true", what: "ctr run --rm true", unit: "ms", rounds: 10, open: ctr_run_true },
    Measure { name: "pod_one", what: "a pod of one", unit: "ms", rounds: 5, open: pod_one },
    Measure { name: "pod_three", what: "a pod of three", unit: "ms", rounds: 5, open: pod_three },
    Measure { name: "pod_pss", what: "PSS of a pod of three", unit: "MB", rounds: 2, open: pod_pss },
    Measure { name: "node_hello", what: "run node hello", unit: "ms", rounds: 10, open: node_hello },
    Measure { name: "idle_pss", what: "PSS of an idle one", unit: "MB", rounds: 3, open: idle_pss },
    Measure { name: "fifty_at_once", what: "50 at once, the 95th", unit: "ms", rounds: 2, open: fifty_at_once },
    Measure { name: "fifty_pss", what: "PSS of each of 50", unit: "MB", rounds: 1, open: fifty_pss },
    Measure { name: "small_files", what: "copy small files", unit: "s", rounds: 3, open: small_files },
    Measure { name: "rootfs_read", what: "read the rootfs once", unit: "s", rounds: 3, open: rootfs_read },
    Measure { name: "stdout_1g", what: "1 GB through stdout", unit: "MB/s", rounds: 3, open: stdout_1g },
    Measure { name: "tcp_to_bridge", what: "TCP to the bridge", unit: "MB/s", rounds: 3, open: tcp_to_bridge },
];

impl Measure {
    /// Takes it. A runtime that fails once is left out, with its reason.
    pub(crate) fn take(&self, world: &World, contenders: &[Contender]) -> Row {
        eprintln!("bench: {} ({} rounds)", self.what, self.rounds);
        let mut turns: Vec<_> = contenders
            .iter()
            .map(|contender| (self.open)(world, contender).map(|sampler| (sampler, Vec::new())))
            .collect();
        // The first round warms caches and does not count.
        for round in 0..=self.rounds {
            for turn in &mut turns {
                let Ok((sampler, values)) = turn else { continue };
                match sampler() {
                    Ok(value) if round > 0 => values.push(value),
                    Ok(_) => {}
                    Err(error) => *turn = Err(error),
                }
            }
        }
        let samples = turns.into_iter().map(|turn| turn.map(|(_, values)| values)).collect();
        Row::new(self.name, self.what, self.unit, samples)
    }
}

/// How long a container is left alone until it is called idle.
const SETTLES: Duration = Duration::from_secs(5);
const SLEEP: &[&str] = &["sleep", "1000"];

fn milliseconds(time: Duration) -> f64 {
    time.as_secs_f64() * 1000.0
}

/// How long a command takes, which has to succeed.
fn timed(cmd: Cmd) -> Result<f64> {
    let begin = Instant::now();
    cmd.ok()?;
    Ok(milliseconds(begin.elapsed()))
}

fn run_true<'a>(world: &'a World, contender: &'a Contender) -> Result<Sampler<'a>> {
    let bundle = world.bundle(image::BUSYBOX, &["true"])?;
    Ok(Box::new(move || timed(bundle.run(contender))))
}

fn exec_true<'a>(world: &'a World, contender: &'a Contender) -> Result<Sampler<'a>> {
    let running = world.bundle(image::BUSYBOX, SLEEP)?.start(contender)?;
    Ok(Box::new(move || timed(running.exec(&["true"]))))
}

fn docker_run_true<'a>(world: &'a World, contender: &'a Contender) -> Result<Sampler<'a>> {
    world.docker.load(image::BUSYBOX)?;
    let run = ["run", "--rm", "--runtime", contender.name, image::BUSYBOX, "true"];
    Ok(Box::new(move || timed(world.docker.client().args(run))))
}

/// What containerd knows a runtime by.
fn shim(contender: &Contender) -> Result<Runtime> {
    contender.shim.with_context(|| format!("{} has no shim of its own here", contender.name))
}

fn ctr_run_true<'a>(world: &'a World, contender: &'a Contender) -> Result<Sampler<'a>> {
    let runtime = if shim(contender)?.is_runc() { "io.containerd.runc.v2" } else { "io.containerd.runvm.v2" };
    Ok(Box::new(move || {
        let id = format!("rvm-bench-{}", next_number());
        timed(world.containerd.ctr().args(["run", "--rm", "--runtime", runtime, cri::IMAGE, &id, "true"]))
    }))
}

/// Has a pod of this many containers running, and takes what `value` says of it and of how long that took.
fn pods<'a>(
    world: &'a World,
    contender: &Contender,
    containers: usize,
    value: fn(began: Instant, before: &[Process]) -> Result<f64>,
) -> Result<Sampler<'a>> {
    let runtime = shim(contender)?;
    Ok(Box::new(move || {
        let cri = Cri::open(&world.containerd, runtime)?;
        let before = Process::all()?;
        let began = Instant::now();
        let pod = cri.pod()?;
        for number in 0..containers {
            pod.start(&format!("c{number}"), SLEEP)?;
        }
        let taken = value(began, &before);
        cri.close()?;
        taken
    }))
}

fn pod_one<'a>(world: &'a World, contender: &'a Contender) -> Result<Sampler<'a>> {
    pods(world, contender, 1, |began, _| Ok(milliseconds(began.elapsed())))
}

fn pod_three<'a>(world: &'a World, contender: &'a Contender) -> Result<Sampler<'a>> {
    pods(world, contender, 3, |began, _| Ok(milliseconds(began.elapsed())))
}

fn pod_pss<'a>(world: &'a World, contender: &'a Contender) -> Result<Sampler<'a>> {
    pods(world, contender, 3, |_, before| {
        thread::sleep(SETTLES);
        Ok(pss_since(before)? as f64 / 1e6)
    })
}

/// The memory of all processes that have come since, in bytes.
fn pss_since(before: &[Process]) -> Result<u64> {
    let all = Process::all()?;
    let new = all.iter().filter(|process| before.iter().all(|other| other.pid != process.pid));
    Ok(new.filter_map(Process::pss).sum())
}

fn node_hello<'a>(world: &'a World, contender: &'a Contender) -> Result<Sampler<'a>> {
    let bundle = world.bundle(image::DEBIAN, &["node", "-e", "console.log('hello')"])?;
    Ok(Box::new(move || timed(bundle.run(contender))))
}

fn idle_pss<'a>(world: &'a World, contender: &'a Contender) -> Result<Sampler<'a>> {
    Ok(Box::new(|| {
        let running = world.bundle(image::BUSYBOX, SLEEP)?.start(contender)?;
        // Once used, then left alone until it has settled.
        running.exec(&["true"]).ok()?;
        thread::sleep(SETTLES);
        Ok(running.pss()? as f64 / 1e6)
    }))
}

/// Starts fifty containers at once; they, and how long each took, sorted.
fn start_fifty<'a>(world: &World, contender: &'a Contender) -> Result<(Vec<Running<'a>>, Vec<f64>)> {
    let bundles = (0..50).map(|_| world.bundle(image::BUSYBOX, SLEEP)).collect::<Result<Vec<_>>>()?;
    let started: Vec<_> = thread::scope(|scope| {
        let start = |bundle: Bundle| {
            scope.spawn(move || {
                let begin = Instant::now();
                bundle.start(contender).map(|running| (running, milliseconds(begin.elapsed())))
            })
        };
        let threads: Vec<_> = bundles.into_iter().map(start).collect();
        threads.into_iter().map(|thread| thread.join().map_err(|_| anyhow!("a start panicked"))?).collect()
    });
    let (running, mut times): (Vec<_>, Vec<_>) = started.into_iter().collect::<Result<Vec<_>>>()?.into_iter().unzip();
    times.sort_by(f64::total_cmp);
    Ok((running, times))
}

fn fifty_at_once<'a>(world: &'a World, contender: &'a Contender) -> Result<Sampler<'a>> {
    Ok(Box::new(|| {
        let (running, times) = start_fifty(world, contender)?;
        for one in &running {
            one.exec(&["true"]).ok()?;
        }
        Ok(percentile(&times, 95))
    }))
}

fn fifty_pss<'a>(world: &'a World, contender: &'a Contender) -> Result<Sampler<'a>> {
    Ok(Box::new(|| {
        let before = Process::all()?;
        let (running, _) = start_fifty(world, contender)?;
        thread::sleep(2 * SETTLES);
        Ok(pss_since(&before)? as f64 / 1e6 / running.len() as f64)
    }))
}

fn small_files<'a>(world: &'a World, contender: &'a Contender) -> Result<Sampler<'a>> {
    let running = world.bundle(image::DEBIAN, SLEEP)?.start(contender)?;
    let script = "mkdir /root/copy && cp -a /usr/lib/python3* /root/copy && rm -r /root/copy";
    Ok(Box::new(move || {
        let begin = Instant::now();
        running.exec(&["sh", "-c", script]).limit(Duration::from_secs(300)).ok()?;
        Ok(begin.elapsed().as_secs_f64())
    }))
}

fn rootfs_read<'a>(world: &'a World, contender: &'a Contender) -> Result<Sampler<'a>> {
    Ok(Box::new(|| {
        // A new container each time: what it has read, a guest's kernel would keep.
        let running = world.bundle(image::DEBIAN, SLEEP)?.start(contender)?;
        let script = "find / -xdev -type f -print0 | xargs -0 cat | wc -c";
        let begin = Instant::now();
        let output = running.exec(&["sh", "-c", script]).limit(Duration::from_secs(300)).ok()?;
        let seconds = begin.elapsed().as_secs_f64();
        let bytes: u64 = output.text().parse()?;
        ensure!(bytes > 100 << 20, "only {bytes} bytes were read");
        Ok(seconds)
    }))
}

fn stdout_1g<'a>(world: &'a World, contender: &'a Contender) -> Result<Sampler<'a>> {
    let bundle = world.bundle(image::BUSYBOX, &["dd", "if=/dev/zero", "bs=1M", "count=1024"])?;
    Ok(Box::new(move || stream::from_stdout(bundle.run(contender), 1 << 30)))
}

fn tcp_to_bridge<'a>(world: &'a World, contender: &'a Contender) -> Result<Sampler<'a>> {
    world.docker.load(image::BUSYBOX)?;
    let run = ["run", "--rm", "--runtime", contender.name, image::BUSYBOX, "sh", "-c"];
    Ok(Box::new(move || {
        stream::over_tcp(256 << 20, |address, port| {
            let script = format!("dd if=/dev/zero bs=1M count=256 2>/dev/null | nc {address} {port}");
            world.docker.client().args(run).arg(script).limit(Duration::from_secs(120))
        })
    }))
}
