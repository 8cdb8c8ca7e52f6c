//! Guests whose agent turns on the host: it says nothing, too much, something else, or goes, at each step of a
//! container's life.
//!
//! The agent is replaced by `evil-agent`, which is good up to a place that its plan names. Whatever it does, the command
//! that waits for it ends in time and says why, memory and logs stay bounded, and the container can be killed and
//! deleted without a trace. runc has no agent, and does not judge: what proves a case is that the same agent with an
//! empty plan passes [`life::good`].

mod files;
mod life;
mod scene;
mod templates;

use std::process::ExitCode;
use std::sync::Arc;

use anyhow::Result;
use conformance::bundle::Workshop;
use conformance::census::Census;
use conformance::enclosure::run_inside;
use conformance::image;
use conformance::runtime::{Available, Runtime};
use libtest_mimic::{Arguments, Failed, Trial};

use scene::Scene;

/// How many cases run at once: most only wait.
const AT_ONCE: usize = 8;

/// Drives one container over an evil agent, and fails where the host does not bear it.
type Judge = Box<dyn Fn(&Scene) -> Result<()> + Send + Sync>;

/// One small test.
struct Case {
    name: String,
    /// What the agent's plan says: a place and a fault.
    plan: String,
    judge: Judge,
}

fn main() -> ExitCode {
    let scripts: [&[&str]; 3] = [&["setup.sh"], &["images.sh", "busybox"], &["evil-agent.sh"]];
    run_inside(&scripts, |enclosure| {
        let mut arguments = Arguments::from_args();
        arguments.test_threads.get_or_insert(AT_ONCE);
        let tested = Available::find()?.kvm;
        let cases: Vec<Case> = [life::cases(), templates::cases(), files::cases()].into_iter().flatten().collect();
        if arguments.list {
            let trials = cases.into_iter().map(|case| trial(case.name, tested, || Ok(())));
            return Ok(libtest_mimic::run(&arguments, trials.collect()).exit_code());
        }
        let before = Census::take()?;
        let workshop = Arc::new(Workshop::open(enclosure)?);
        let agent = Arc::new(image::evil_agent()?);
        let trials = cases.into_iter().map(|case| {
            let (workshop, agent) = (Arc::clone(&workshop), Arc::clone(&agent));
            trial(case.name.clone(), tested, move || {
                let scene = Scene::set(&workshop, &agent, &case.plan)?;
                (case.judge)(&scene)?;
                scene.clear()
            })
        });
        let conclusion = libtest_mimic::run(&arguments, trials.collect());
        if conclusion.has_failed() {
            return Ok(conclusion.exit_code());
        }
        (arguments.filter, arguments.exact) = (None, false);
        let census = trial("nothing_is_left_behind".to_owned(), true, move || before.expect_nothing_new());
        Ok(libtest_mimic::run(&arguments, vec![census]).exit_code())
    })
}

fn trial(name: String, tested: bool, judge: impl FnOnce() -> Result<()> + Send + 'static) -> Trial {
    Trial::test(name, move || judge().map_err(|error| Failed::from(format!("{error:#}"))))
        .with_kind(Runtime::Kvm.name())
        .with_ignored_flag(!tested)
}
