//! Many at once, and verbs that meet: all that is asked for happens or is refused with a sentence, and nothing stays.

use std::thread::{self, ScopedJoinHandle};
use std::time::Duration;

use anyhow::{Context as _, Result, anyhow, ensure};
use conformance::bundle::{Bundle, Hand};
use conformance::census::Census;
use conformance::suite::expect_equal;
use conformance::{Case, Cmd, Outcome, Output, case};
use rustix::process::Signal;

/// How many containers are created at once, and how many programs are run in one.
const CONTAINERS: usize = 20;
const EXECS: usize = 50;
/// How often verbs meet.
const MEETINGS: usize = 8;
/// What takes a moment alone may take longer among so many.
const LIMIT: Duration = Duration::from_secs(120);

/// What is done to a created container.
const VERBS: [&str; 3] = ["start", "kill", "delete --force"];
/// In which order.
const ORDERS: [[usize; 3]; 6] = [[0, 1, 2], [0, 2, 1], [1, 0, 2], [1, 2, 0], [2, 0, 1], [2, 1, 0]];

pub(crate) fn cases() -> Vec<Case<Hand>> {
    vec![
        case!(twenty_containers_at_once).alone(),
        case!(fifty_execs_at_once).alone(),
        case!(execs_wait_for_a_machine).alone(),
        case!(execs_meet_the_end).alone(),
        case!(verbs_in_every_order).alone(),
        case!(verbs_at_once).alone(),
        case!(one_name_for_several).alone(),
    ]
}

/// Runs commands at once; their outputs in the same order.
fn at_once(commands: impl IntoIterator<Item = Cmd>) -> Result<Vec<Output>> {
    thread::scope(|scope| {
        let running: Vec<_> =
            commands.into_iter().map(|command| scope.spawn(move || command.limit(LIMIT).run())).collect();
        running.into_iter().map(join).collect()
    })
}

fn join<T>(running: ScopedJoinHandle<'_, Result<T>>) -> Result<T> {
    running.join().unwrap_or_else(|_| Err(anyhow!("a thread panicked")))
}

fn verb(bundle: &Bundle, words: &str) -> Cmd {
    let command = bundle.call(words);
    if words == "kill" { command.arg("KILL") } else { command }
}

fn expect_success(what: &str, outputs: &[Output]) -> Result<()> {
    for output in outputs {
        ensure!(output.code == 0, "{what} failed with {}: {}", output.code, output.stderr);
    }
    Ok(())
}

fn twenty_containers_at_once(h: &Hand) -> Result<Outcome> {
    let before = Census::take()?;
    let bundles: Vec<_> = (0..CONTAINERS).map(|_| h.bundle("echo ran; sleep 1000")).collect::<Result<_>>()?;
    thread::scope(|scope| {
        let creating: Vec<_> = bundles.iter().map(|bundle| scope.spawn(|| bundle.create())).collect();
        creating.into_iter().try_for_each(join)
    })?;
    for bundle in &bundles {
        expect_equal("status", bundle.status()?.as_str(), "created")?;
    }
    expect_success("start", &at_once(bundles.iter().map(|bundle| bundle.call("start")))?)?;
    bundles.iter().try_for_each(|bundle| bundle.expect_written("ran"))?;
    expect_success("kill", &at_once(bundles.iter().map(|bundle| verb(bundle, "kill")))?)?;
    bundles.iter().try_for_each(Bundle::expect_stopped)?;
    expect_success("delete", &at_once(bundles.iter().map(|bundle| bundle.call("delete")))?)?;
    before.expect_nothing_new()?;
    Ok(Outcome::new().see("ran", bundles.len()))
}

fn fifty_execs_at_once(h: &Hand) -> Result<Outcome> {
    let before = Census::take()?;
    let bundle = h.bundle("echo ready; sleep 1000")?;
    bundle.start()?;
    bundle.expect_written("ready")?;
    let script = |number| format!("read word; echo $word {number}; echo {number} >&2; exit {number}");
    let execs = (0..EXECS).map(|number| bundle.exec("", &script(number)).input(format!("word-{number}\n")));
    for (number, output) in at_once(execs)?.iter().enumerate() {
        let said = (output.text(), output.stderr.trim(), output.code);
        let expected = (&*format!("word-{number} {number}"), &*number.to_string(), i32::try_from(number)?);
        expect_equal("output of an exec", said, expected)?;
    }
    expect_equal("status", bundle.status()?.as_str(), "running")?;
    let after = bundle.exec("", "echo still here").ok()?;
    expect_equal("a last exec", after.text(), "still here")?;
    bundle.call("delete --force").ok()?;
    before.expect_nothing_new()?;
    Ok(Outcome::new().see("execs", EXECS))
}

/// What serves the container stands still while a hundred execs come, each with several streams, and then finds them all.
fn execs_wait_for_a_machine(h: &Hand) -> Result<Outcome> {
    let before = Census::take()?;
    let bundle = h.bundle("echo ready; sleep 1000")?;
    bundle.start()?;
    bundle.expect_written("ready")?;
    let family = bundle.family()?;
    let send = |signal| family.iter().skip(1).try_for_each(|process| process.signal(signal));
    let execs = (0..2 * EXECS).map(|number| bundle.exec("", "cat").input(format!("word-{number}\n")));
    let outputs = thread::scope(|scope| {
        send(Signal::STOP)?;
        let execs = scope.spawn(|| at_once(execs));
        thread::sleep(Duration::from_secs(1));
        send(Signal::CONT)?;
        join(execs)
    })?;
    for (number, output) in outputs.iter().enumerate() {
        let said = (output.text(), output.stderr.trim(), output.code);
        expect_equal("output of an exec", said, (&*format!("word-{number}"), "", 0))?;
    }
    bundle.call("delete --force").ok()?;
    before.expect_nothing_new()?;
    Ok(Outcome::new().see("execs", outputs.len()))
}

/// The container is killed from under its execs: each ends, whatever it was at.
fn execs_meet_the_end(h: &Hand) -> Result<Outcome> {
    let before = Census::take()?;
    for delay in [0, 50, 150] {
        let bundle = h.bundle("echo ready; sleep 1000")?;
        bundle.start()?;
        bundle.expect_written("ready")?;
        let outputs = thread::scope(|scope| -> Result<_> {
            let execs = scope.spawn(|| at_once((0..10).map(|_| bundle.exec("", "sleep 1000"))));
            thread::sleep(Duration::from_millis(delay));
            let killed = verb(&bundle, "kill").ok();
            let outputs = join(execs)?;
            killed.map(|_| outputs)
        })?;
        ensure!(outputs.iter().all(|output| output.code != 0), "an exec in a killed container succeeded");
        bundle.expect_stopped()?;
        bundle.call("delete").ok()?;
    }
    before.expect_nothing_new()?;
    Ok(Outcome::new().see("left", 0))
}

/// One after another, each from a process of its own, each as soon as the one before has returned.
fn verbs_in_every_order(h: &Hand) -> Result<Outcome> {
    let before = Census::take()?;
    let mut outcome = Outcome::new();
    for order in ORDERS {
        let bundle = h.bundle("sleep 1000")?;
        bundle.create()?;
        let codes = order.map(|index| verb(&bundle, VERBS[index]).run().map(|output| output.code));
        let codes: Vec<_> = codes.into_iter().collect::<Result<_>>()?;
        // What is not there can be deleted by force.
        bundle.call("delete --force").ok()?;
        let names = order.map(|index| VERBS[index].split(' ').next().unwrap_or_default()).join(", ");
        outcome = outcome.see(&names, format!("{codes:?}"));
    }
    before.expect_nothing_new()?;
    Ok(outcome)
}

/// All at the same time: any may come first, and the container is gone in the end.
fn verbs_at_once(h: &Hand) -> Result<Outcome> {
    let before = Census::take()?;
    for _ in 0..MEETINGS {
        let bundle = h.bundle("sleep 1000")?;
        bundle.create()?;
        let meeting = at_once(VERBS.iter().chain(&VERBS).map(|words| verb(&bundle, words)))?;
        for output in meeting.iter().filter(|output| output.code != 0) {
            ensure!(output.code == 1 && output.stderr.lines().count() == 1, "not a sentence: {}", output.stderr);
        }
        bundle.call("delete --force").ok()?;
        bundle.expect_no_trace()?;
    }
    before.expect_nothing_new()?;
    Ok(Outcome::new().see("left", 0))
}

/// Of several creates with one ID one succeeds, and its container is whole.
fn one_name_for_several(h: &Hand) -> Result<Outcome> {
    let before = Census::take()?;
    let bundle = h.bundle("echo ran; sleep 1000")?;
    let create = || bundle.call("create").current_dir(&bundle.path);
    // runc's creates take the folder from under each other: of several at once there may be none left.
    let outputs = match h.runtime().is_runc() {
        true => (0..5).map(|_| create().run()).collect::<Result<Vec<_>>>()?,
        false => at_once((0..5).map(|_| create()))?,
    };
    let created = outputs.iter().filter(|output| output.code == 0).count();
    expect_equal("creates that succeeded", created, 1)?;
    let refusal = outputs.iter().find(|output| output.code != 0).context("four are refused")?;
    ensure!(refusal.stderr.contains("exist"), "another sentence: {}", refusal.stderr);
    expect_equal("status", bundle.status()?.as_str(), "created")?;
    bundle.call("start").ok()?;
    expect_equal("status", bundle.status()?.as_str(), "running")?;
    bundle.call("delete --force").ok()?;
    before.expect_nothing_new()?;
    Ok(Outcome::new().see("created", created))
}
