//! The steps of a container's life, and what can go wrong at each.

use std::io::Read as _;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use conformance::suite::expect_equal;

use crate::Case;
use crate::scene::Scene;

/// More than a guest may take to boot, and to answer; what is not about waiting takes a moment, on a busy machine too.
const BOOT: Duration = Duration::from_secs(75);
const ANSWER: Duration = Duration::from_secs(45);
const MOMENT: Duration = Duration::from_secs(20);

/// Who talks too much is waited for as long as who says nothing.
const SILENT: &str = "does not answer";
const CLOSED: &str = "channel to the guest is closed";
const UNBOOTED: &str = "did not boot";
const REFUSED: &str = "[2J";

/// What `create`, `start` and `exec` say of it, and how long they may take.
const ANSWERS: [(&str, Duration, &str); 10] = [
    ("silent", ANSWER, SILENT),
    ("late", ANSWER, SILENT),
    ("garbage", ANSWER, SILENT),
    ("flood", ANSWER, SILENT),
    // It is read over, and may be read to its end.
    ("huge", ANSWER, ""),
    ("longest", ANSWER, SILENT),
    ("data", MOMENT, CLOSED),
    ("half-close", MOMENT, CLOSED),
    ("close", MOMENT, CLOSED),
    ("refuse", MOMENT, REFUSED),
];

pub(crate) fn cases() -> Vec<Case> {
    let mut cases = vec![case("nowhere silent", good), case("output storm", good)];
    cases.push(refused_by_create("knock silent", BOOT, UNBOOTED));
    cases.push(refused_by_create("knock exit", MOMENT, UNBOOTED));
    cases.push(refused_by_create("ConfigureSandbox silent", BOOT, UNBOOTED));
    cases.push(refused_by_create("ConfigureSandbox flood", BOOT, UNBOOTED));
    cases.push(refused_by_create("ConfigureSandbox exit", MOMENT, UNBOOTED));
    cases.push(refused_by_create("ConfigureSandbox close", MOMENT, UNBOOTED));
    cases.push(refused_by_create("ConfigureSandbox refuse", MOMENT, REFUSED));
    cases.push(refused_by_create("ConfigureNetwork silent", ANSWER, SILENT));
    cases.push(refused_by_create("ConfigureNetwork exit", MOMENT, UNBOOTED));
    cases.push(refused_by_create("stdio silent", ANSWER, SILENT));
    cases.push(refused_by_create("stdio garbage", MOMENT, CLOSED));
    cases.push(refused_by_create("stdio flood", MOMENT, CLOSED));
    cases.push(refused_by_create("stdio half-close", MOMENT, CLOSED));
    // It comes with the first requests, which the agent may have answered by then or not.
    cases.push(refused_by_create("stdio exit", MOMENT, "the VMM ended"));
    cases.push(refused_by_create("CreateContainer exit", MOMENT, "the VM is gone"));
    for (fault, limit, said) in ANSWERS {
        cases.push(refused_by_create(&format!("CreateContainer {fault}"), limit, said));
    }
    for (fault, limit, said) in [ANSWERS[0], ANSWERS[1], ANSWERS[3], ANSWERS[8], ANSWERS[9]] {
        cases.push(case(&format!("StartContainer {fault}"), move |scene| {
            let _created = scene.create()?;
            scene.expect_failure(scene.call("start"), limit, said)?;
            // The stream that is closed is the one on which its end was waited for.
            if fault == "close" {
                return scene.expect_stopped(MOMENT);
            }
            expect_equal("status", scene.status()?.as_deref(), Some("created"))
        }));
        cases.push(case(&format!("ExecProcess {fault}"), move |scene| {
            let _started = scene.start()?;
            scene.expect_failure(scene.exec(), limit, said)?;
            expect_equal("status", scene.status()?.as_deref(), Some("running"))
        }));
    }
    for verb in ["StartContainer exit", "ExecProcess exit"] {
        cases.push(case(verb, |scene| {
            let _created = scene.create()?;
            let started = scene.call("start").run()?;
            ensure!(started.code == 0 || verb.starts_with("Start"), "start failed: {}", started.stderr);
            if verb.starts_with("Exec") {
                scene.expect_failure(scene.exec(), MOMENT, "")?;
            }
            scene.expect_stopped(MOMENT)
        }));
    }
    // What says something is an end. What does not is a process that runs.
    for fault in ["lie", "data", "refuse", "half-close", "close", "exit"] {
        cases.push(case(&format!("WaitProcess {fault}"), |scene| {
            let _created = scene.create()?;
            // It may have ended before it is started.
            scene.call("start").run()?;
            scene.expect_stopped(ANSWER)
        }));
    }
    for fault in ["garbage", "flood", "huge"] {
        cases.push(case(&format!("WaitProcess {fault}"), |scene| {
            let _created = scene.create()?;
            // It is answered on the stream that says this.
            scene.call("start").run()?;
            scene.expect_killable(ANSWER)
        }));
    }
    cases.push(case("WaitProcess silent", |scene| {
        let _started = scene.start()?;
        scene.expect_killable(ANSWER)
    }));
    for fault in ["silent", "lie", "flood", "refuse", "close", "exit"] {
        cases.push(case(&format!("SignalProcess {fault}"), |scene| {
            let _started = scene.start()?;
            scene.expect_killable(ANSWER)
        }));
    }
    for fault in ["lines", "line", "flood", "garbage", "close"] {
        cases.push(case(&format!("log {fault}"), good));
    }
    cases.push(case("output flood", output_that_is_read));
    cases.push(case("output line", output_that_is_not_read));
    cases
}

/// A case that is named by its plan.
fn case(plan: &str, judge: impl Fn(&Scene) -> Result<()> + Send + Sync + 'static) -> Case {
    Case { name: format!("hostile::{}", plan.replace(' ', "::")), plan: plan.to_owned(), judge: Box::new(judge) }
}

/// `create` fails, and there is no container.
fn refused_by_create(plan: &str, limit: Duration, said: &'static str) -> Case {
    case(plan, move |scene| {
        scene.expect_failure(scene.call("create"), limit, said)?;
        expect_equal("status", scene.status()?, None)
    })
}

/// All is well from the container's beginning to its end.
pub(crate) fn good(scene: &Scene) -> Result<()> {
    let _started = scene.start()?;
    expect_equal("status", scene.status()?.as_deref(), Some("running"))?;
    expect_equal("exit code of exec", scene.exec().limit(MOMENT).run()?.code, 7)?;
    scene.call("kill").arg("TERM").limit(MOMENT).ok()?;
    scene.expect_stopped(MOMENT)?;
    scene.call("delete").ok().map(drop)
}

/// What is read is all the host has to keep.
fn output_that_is_read(scene: &Scene) -> Result<()> {
    const ENOUGH: u64 = 256 << 20;
    let started = scene.start()?;
    let output = started.stdout.context("its output is a pipe")?;
    let read = std::io::copy(&mut output.take(ENOUGH), &mut std::io::sink())?;
    expect_equal("bytes read", read, ENOUGH)?;
    scene.expect_killable(MOMENT)
}

/// What is not read keeps nobody from killing.
fn output_that_is_not_read(scene: &Scene) -> Result<()> {
    let mut started = scene.start()?;
    let mut output = started.stdout.take().context("its output is a pipe")?;
    output.read_exact(&mut [0; 1])?;
    scene.expect_killable(MOMENT)
}
