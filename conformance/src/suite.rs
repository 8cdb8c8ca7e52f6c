//! Cases, and the list of tests that the runner makes of them.

use std::collections::HashMap;
use std::fmt::Debug;
use std::process::ExitCode;
use std::sync::{Arc, Mutex, OnceLock, PoisonError, RwLock};

use anyhow::{Context, Result, anyhow, bail};
use libtest_mimic::{Arguments, Failed, Trial};

use crate::Outcome;
use crate::census::Census;
use crate::differences::Differences;
use crate::runtime::{Available, Runtime};

/// What a case drives: one runtime behind an engine, or by hand.
pub trait Handle: Sized {
    /// Removes what the case made; failing to is the case's failure.
    fn close(self) -> Result<()>;
}

/// One small test.
pub struct Case<H> {
    name: &'static str,
    run: fn(&H) -> Result<Outcome>,
    tcg: bool,
    alone: bool,
    engines: Option<&'static [&'static str]>,
}

impl<H> Case<H> {
    /// A case for runc and for runvm on KVM. See [`case!`](crate::case).
    pub const fn new(name: &'static str, run: fn(&H) -> Result<Outcome>) -> Self {
        Self { name, run, tcg: false, alone: false, engines: None }
    }

    /// Runs it with runvm on TCG too.
    #[must_use]
    pub const fn tcg(mut self) -> Self {
        self.tcg = true;
        self
    }

    /// Runs nothing beside it.
    #[must_use]
    pub const fn alone(mut self) -> Self {
        self.alone = true;
        self
    }

    /// Runs it with these engines only, of those that the suite has.
    #[must_use]
    pub const fn only_on(mut self, engines: &'static [&'static str]) -> Self {
        self.engines = Some(engines);
        self
    }

    /// Its name.
    pub const fn name(&self) -> &'static str {
        self.name
    }

    fn wants<E>(&self, suite: &Suite<E, H>, runtime: Runtime) -> bool {
        // The shim takes its options from the engine's environment: one engine has one accelerator.
        let engine = suite.engine;
        (runtime != Runtime::Tcg || (self.tcg && !suite.shim))
            && self.engines.is_none_or(|engines| engines.contains(&engine))
    }
}

/// Makes a [`Case`] of a function, named by its path.
#[macro_export]
macro_rules! case {
    ($function:ident) => {
        $crate::Case::new(concat!(module_path!(), "::", stringify!($function)), $function)
    };
}

/// A suite's cases and where they take place.
pub struct Suite<E, H> {
    /// The suite's name, with which its cases' names begin.
    pub name: &'static str,
    /// Which of its engines this run is with; empty where the suite has one only.
    pub engine: &'static str,
    /// Whether runvm is driven by its own shim.
    pub shim: bool,
    /// The cases.
    pub cases: Vec<Case<H>>,
    /// Makes the handle for one run of a case.
    pub open: fn(&Arc<E>, Runtime) -> Result<H>,
}

/// Runs a suite: `start` starts its engine, which has stopped when the census is taken.
pub fn run<E, H>(suite: Suite<E, H>, start: impl FnOnce() -> Result<E>) -> Result<ExitCode>
where
    E: Send + Sync + 'static,
    H: Handle + 'static,
{
    let mut arguments = Arguments::from_args();
    // Containers mostly wait, so that two at a time use a processor better than one.
    let processors = std::thread::available_parallelism().map_or(1, usize::from);
    arguments.test_threads.get_or_insert((2 * processors).clamp(2, 4));

    let available = Available::find()?;
    if arguments.list {
        let trials = trials(&suite, available, |_, _| Ok(()));
        return Ok(libtest_mimic::run(&arguments, trials).exit_code());
    }

    let before = Census::take()?;
    let conclusion = {
        let stage = Arc::new(Stage::new(suite, start()?)?);
        let judge = Arc::clone(&stage);
        let trials = trials(&stage.suite, available, move |index, runtime| judge.judge(index, runtime));
        libtest_mimic::run(&arguments, trials)
    };
    if conclusion.has_failed() {
        return Ok(conclusion.exit_code());
    }
    arguments.filter = None;
    arguments.exact = false;
    let census = Trial::test("nothing_is_left_behind", move || before.expect_nothing_new().map_err(failed));
    Ok(libtest_mimic::run(&arguments, vec![census]).exit_code())
}

/// One trial for each case and runtime, runc's first: they are what is compared with.
fn trials<E, H>(
    suite: &Suite<E, H>,
    available: Available,
    judge: impl Fn(usize, Runtime) -> Result<()> + Clone + Send + 'static,
) -> Vec<Trial> {
    let mut trials = Vec::new();
    for runtime in Runtime::ALL {
        let kind = format!("{} {}", suite.engine, runtime.name());
        for (index, case) in suite.cases.iter().enumerate().filter(|(_, case)| case.wants(suite, runtime)) {
            let judge = judge.clone();
            let trial = Trial::test(case.name, move || judge(index, runtime).map_err(failed));
            trials.push(trial.with_kind(kind.trim_start()).with_ignored_flag(!available.has(runtime)));
        }
    }
    trials
}

#[expect(clippy::needless_pass_by_value, reason = "the shape that map_err wants")]
fn failed(error: anyhow::Error) -> Failed {
    Failed::from(format!("{error:#}"))
}

/// What all trials of a suite share.
struct Stage<E, H> {
    suite: Suite<E, H>,
    engine: Arc<E>,
    differences: Differences,
    /// What runc showed, by case; an error's text where runc itself failed.
    runc: HashMap<&'static str, OnceLock<Result<Outcome, String>>>,
    /// Held for writing by a case that wants to be alone.
    company: RwLock<()>,
}

impl<E, H: Handle> Stage<E, H> {
    fn new(suite: Suite<E, H>, engine: E) -> Result<Self> {
        let differences = Differences::load()?;
        let names: Vec<_> = suite.cases.iter().map(|case| case.name.to_owned()).collect();
        let strays = differences.strays(suite.name, &names);
        if !strays.is_empty() {
            bail!("differences.toml speaks of cases that there are not: {}", strays.join(", "));
        }
        let runc = suite.cases.iter().map(|case| (case.name, OnceLock::new())).collect();
        Ok(Self { suite, engine: Arc::new(engine), differences, runc, company: RwLock::new(()) })
    }

    fn judge(&self, index: usize, runtime: Runtime) -> Result<()> {
        let case = &self.suite.cases[index];
        let runc = self.with_runc(case);
        if runtime.is_runc() {
            return runc.map(drop);
        }
        let runc = runc.map_err(|_| anyhow!("not judged: the case fails with runc"))?;
        let runvm = self.play(case, runtime)?;
        self.differences.judge(case.name, &runc, &runvm)
    }

    fn with_runc(&self, case: &Case<H>) -> Result<Outcome> {
        let known = self.runc.get(case.name).context("every case has a place for runc's outcome")?;
        known
            .get_or_init(|| self.play(case, Runtime::Runc).map_err(|error| format!("{error:#}")))
            .clone()
            .map_err(|error| anyhow!(error))
    }

    /// Runs a case once, in the company it bears, and tidies up after it.
    fn play(&self, case: &Case<H>, runtime: Runtime) -> Result<Outcome> {
        let _shared;
        let _only;
        if case.alone {
            _only = self.company.write().unwrap_or_else(PoisonError::into_inner);
        } else {
            _shared = self.company.read().unwrap_or_else(PoisonError::into_inner);
        }
        let handle = (self.suite.open)(&self.engine, runtime)?;
        let outcome = (case.run)(&handle);
        let closed = handle.close();
        let outcome = outcome?;
        closed.context("the case went well, but what it made could not be removed")?;
        if outcome.is_empty() {
            bail!("the case saw nothing: a test that cannot fail is none");
        }
        Ok(outcome)
    }
}

/// Fails unless both are equal, showing both.
pub fn expect_equal<T: PartialEq + Debug>(what: &str, got: T, expected: T) -> Result<()> {
    if got == expected {
        return Ok(());
    }
    bail!("{what}: expected {expected:?}, got {got:?}")
}

/// Counts upwards, for names that must not meet.
pub fn next_number() -> u64 {
    static NUMBER: Mutex<u64> = Mutex::new(0);
    let mut number = NUMBER.lock().unwrap_or_else(PoisonError::into_inner);
    *number += 1;
    *number
}
