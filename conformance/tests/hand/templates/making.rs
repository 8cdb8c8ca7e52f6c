//! A template is there whole or not at all, whatever happens while it is made.

use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use conformance::bundle::{Bundle, Hand};
use conformance::census::Process;
use conformance::command::{ended_within, readable_within};
use conformance::suite::expect_equal;
use conformance::{Case, Cmd, Outcome, case};
use rustix::fs::inotify::{self, CreateFlags, ReadFlags, WatchFlags};
use rustix::process::{Pid, Signal, kill_process};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd as _, OwnedFd};

use super::{Templates, limit};

const STARTS: usize = 4;
const PATIENCE: Duration = Duration::from_secs(60);

pub(super) fn cases() -> Vec<Case<Hand>> {
    vec![
        case!(starts_at_once_make_one),
        case!(the_vm_dies_while_it_is_written),
        case!(the_monitor_is_killed_as_it_begins),
        case!(the_monitor_is_killed_while_it_is_written),
        case!(a_full_disk),
        case!(a_folder_that_cannot_be_written),
    ]
}

fn small(h: &Hand) -> Result<Bundle<'_>> {
    h.bundle_with(&["echo", "ran"], |config| limit(config, 64, 1))
}

fn starts_at_once_make_one(h: &Hand) -> Result<Outcome> {
    let templates = Templates::of(h);
    let bundles = (0..STARTS).map(|_| small(h)).collect::<Result<Vec<_>>>()?;
    let ran = std::thread::scope(|scope| {
        let runs: Vec<_> = bundles.iter().map(|bundle| scope.spawn(|| templates.run(bundle))).collect();
        runs.into_iter().map(|run| run.join().unwrap_or_else(|_| anyhow::bail!("panicked"))).collect::<Result<Vec<_>>>()
    })?;
    if templates.asked() {
        templates.only()?;
        templates.expect_only(&templates.keys()?)?;
        expect_equal("makers", ran.iter().filter(|ran| ran.reached("template made")).count(), 1)?;
        let warnings: Vec<_> = ran.iter().flat_map(super::Ran::warnings).collect();
        ensure!(warnings.is_empty(), "not without a word: {warnings:?}");
        templates.run(&bundles[0])?.expect_forked()?;
    }
    Ok(Outcome::new().see("outputs", ran.iter().filter(|ran| ran.output.text() == "ran").count()))
}

/// After a start that did not end well: nothing of it is there, and the next one makes a template.
fn expect_next_makes_one(templates: &Templates, bundle: &Bundle) -> Result<Outcome> {
    bundle.expect_no_trace()?;
    if templates.asked() {
        expect_equal("templates", templates.keys()?, Vec::new())?;
    }
    let next = templates.run(bundle)?;
    if templates.asked() {
        next.expect_booted_into_template()?;
        templates.expect_only(&templates.keys()?)?;
        templates.run(bundle)?.expect_forked()?;
    }
    Ok(Outcome::new().see_output("the next", &next.output))
}

fn the_vm_dies_while_it_is_written(h: &Hand) -> Result<Outcome> {
    let templates = Templates::of(h);
    let bundle = small(h)?;
    if templates.asked() {
        // Where its files grow too large, the kernel ends a process by a signal. The state is smaller, the memory larger.
        let run = templates.run_cmd(&bundle).into_command();
        let limited = Cmd::new("prlimit").args(["--fsize=1000000", "--core=0"]).arg(run.get_program());
        let output = templates.for_these(limited.args(run.get_args()).current_dir(&bundle.path)).run()?;
        ensure!(output.code != 0 || output.text() == "ran", "neither an error nor a container: {}", output.stderr);
    }
    expect_next_makes_one(&templates, &bundle)
}

fn the_monitor_is_killed_as_it_begins(h: &Hand) -> Result<Outcome> {
    the_monitor_is_killed(h, |watch, _| watch.next(ReadFlags::CREATE, ".draft").map(drop))
}

fn the_monitor_is_killed_while_it_is_written(h: &Hand) -> Result<Outcome> {
    the_monitor_is_killed(h, |watch, folder| {
        let draft = watch.next(ReadFlags::CREATE, ".draft")?;
        watch.add(&folder.join(draft))?;
        watch.next(ReadFlags::MODIFY, "memory").map(drop)
    })
}

fn the_monitor_is_killed(h: &Hand, moment: impl Fn(&Watch, &Path) -> Result<()>) -> Result<Outcome> {
    let templates = Templates::of(h);
    let bundle = small(h)?;
    if templates.asked() {
        fs::create_dir(&templates.folder)?;
        let watch = Watch::new()?;
        watch.add(&templates.folder)?;
        let mut run = templates.run_cmd(&bundle).spawn_logged(&h.folder().join("killed"))?;
        moment(&watch, &templates.folder)?;
        let all = Process::all()?;
        let first = all.iter().find(|process| u32::try_from(process.pid) == Ok(run.id())).context("`run` is there")?;
        let monitor = first.family(&all).into_iter().find(|process| process.parent == first.pid);
        let monitor = monitor.and_then(|monitor| Pid::from_raw(monitor.pid)).context("the monitor is there")?;
        kill_process(monitor, Signal::KILL)?;
        ensure!(ended_within(&run, PATIENCE)?, "`run` goes on without its monitor");
        ensure!(!run.wait()?.success(), "`run` succeeded without its monitor");
    }
    expect_next_makes_one(&templates, &bundle)
}

/// Tells what is created and written in folders.
struct Watch(OwnedFd);

impl Watch {
    fn new() -> Result<Self> {
        Ok(Self(inotify::init(CreateFlags::CLOEXEC)?))
    }

    fn add(&self, folder: &Path) -> Result<()> {
        inotify::add_watch(&self.0, folder, WatchFlags::CREATE | WatchFlags::MODIFY)?;
        Ok(())
    }

    /// Waits until this happens to something whose name ends so; the name.
    fn next(&self, what: ReadFlags, end: &str) -> Result<String> {
        let mut buffer = [MaybeUninit::uninit(); 4096];
        let mut events = inotify::Reader::new(&self.0, &mut buffer);
        let deadline = Instant::now() + PATIENCE;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let more = !events.is_buffer_empty() || readable_within(self.0.as_fd(), left)?;
            ensure!(more, "nothing happens to {end}");
            let event = events.next()?;
            let name = event.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
            if event.events().intersects(what) && name.ends_with(end) {
                return Ok(name);
            }
        }
    }
}

fn a_full_disk(h: &Hand) -> Result<Outcome> {
    without_room(h, "size=1m")
}

fn a_folder_that_cannot_be_written(h: &Hand) -> Result<Outcome> {
    without_room(h, "ro,size=1m")
}

/// A template that cannot be kept costs a container nothing but a warning.
fn without_room(h: &Hand, options: &str) -> Result<Outcome> {
    let folder = h.folder().join("tiny");
    fs::create_dir(&folder)?;
    Cmd::new("mount").args(["-t", "tmpfs", "-o", options, "tiny"]).arg(&folder).ok()?;
    let templates = Templates::at(h, folder.clone());
    let bundle = small(h)?;
    let judged = (0..2).try_fold(Outcome::new(), |outcome, time| {
        let ran = templates.run(&bundle)?;
        if templates.asked() {
            expect_equal("forked, booted, template made", ran.beginning(), (false, true, false))?;
            let warnings = ran.warnings();
            ensure!(warnings.len() == 1 && warnings[0].contains("template"), "not one warning: {warnings:?}");
        }
        templates.expect_only(&[])?;
        Ok(outcome.see_output(&format!("run {time}"), &ran.output))
    });
    Cmd::new("umount").arg(&folder).ok()?;
    judged
}
