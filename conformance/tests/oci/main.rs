//! The programs by which the OCI validates runtimes, run against runc, crun and runvm: whatever runc passes, runvm
//! passes too.
//!
//! The programs end well whatever they find, so what they print is read. Those that print no assertion count as one.

mod contender;
mod program;

use std::collections::BTreeSet;
use std::process::ExitCode;
use std::sync::{Arc, OnceLock};

use anyhow::{Result, anyhow, ensure};
use conformance::differences::Differences;
use conformance::enclosure::{Enclosure, leave_hybrid_cgroups, run_inside};
use conformance::runtime::Available;
use conformance::tap::Assertions;
use conformance::{Outcome, Runtime, image};
use libtest_mimic::{Arguments, Failed, Trial};

use contender::Contender;
use program::Program;

fn main() -> ExitCode {
    run_inside(&[&["setup.sh", "oci"], &["validation/build.sh"]], |enclosure| {
        let mut arguments = Arguments::from_args();
        // The programs mostly wait, and look at their containers once a second.
        arguments.test_threads.get_or_insert(4);
        let available = Available::find()?;
        let stage = Arc::new(Stage::new(enclosure)?);
        if arguments.list {
            return Ok(libtest_mimic::run(&arguments, stage.trials(available)).exit_code());
        }
        leave_hybrid_cgroups()?;
        stage.contenders.iter().try_for_each(Contender::prepare)?;
        let conclusion = libtest_mimic::run(&arguments, stage.trials(available));
        stage.contenders.iter().try_for_each(Contender::clean_up)?;
        program::remove_cgroups()?;
        println!("{}", stage.summary());
        Ok(conclusion.exit_code())
    })
}

/// All programs, and what they found.
struct Stage {
    programs: Vec<Entry>,
    contenders: [Contender; 3],
    differences: Differences,
}

/// One program, and what it found of each contender.
struct Entry {
    program: Program,
    case: String,
    found: [OnceLock<Result<Assertions, String>>; 3],
}

impl Stage {
    fn new(enclosure: &Enclosure) -> Result<Self> {
        let tools = image::validation_tools()?;
        let programs = Program::all(&tools)?.into_iter().map(|program| Entry {
            case: format!("oci::{}", program.name()),
            program,
            found: Default::default(),
        });
        let programs: Vec<_> = programs.collect();
        let differences = Differences::load()?;
        let names: Vec<_> = programs.iter().map(|entry| entry.case.clone()).collect();
        let strays = differences.strays("oci", &names);
        ensure!(strays.is_empty(), "differences.toml speaks of cases that there are not: {}", strays.join(", "));
        Ok(Self { programs, contenders: Contender::all(enclosure), differences })
    }

    /// One for each program and contender, runc's first: they are what is compared with.
    fn trials(self: &Arc<Self>, available: Available) -> Vec<Trial> {
        let mut trials = Vec::new();
        for (place, contender) in self.contenders.iter().enumerate() {
            for (index, entry) in self.programs.iter().enumerate() {
                let stage = Arc::clone(self);
                let trial = Trial::test(&entry.case, move || {
                    stage.judge(index, place).map_err(|error| Failed::from(format!("{error:#}")))
                });
                let there = contender.runtime.is_none_or(|runtime| available.has(runtime));
                trials.push(trial.with_kind(contender.name).with_ignored_flag(!there));
            }
        }
        trials
    }

    fn judge(&self, index: usize, place: usize) -> Result<()> {
        let found = self.found(index, place)?;
        if self.contenders[place].runtime != Some(Runtime::Kvm) {
            return Ok(());
        }
        let runc = self.found(index, 0)?;
        let (with_runc, with_runvm) = compare(&runc, &found);
        self.differences.judge(&self.programs[index].case, &with_runc, &with_runvm)
    }

    fn found(&self, index: usize, place: usize) -> Result<Assertions> {
        let Entry { program, found, case } = &self.programs[index];
        let run = || program.run(&self.contenders[place]).map_err(|error| format!("{error:#}"));
        let run = || match place {
            0 => proven(run, |found| self.differences.of(case).all(|name| name == "*" || found.get(name).held > 0)),
            _ => run(),
        };
        found[place].get_or_init(run).clone().map_err(|error| anyhow!(error))
    }

    /// How many assertions each contender passed, of all that were made with any.
    fn summary(&self) -> String {
        let of = |entry: &Entry, place: usize| {
            entry.found[place].get().and_then(|found| found.as_ref().ok()).cloned().unwrap_or_default()
        };
        let held = |place| self.programs.iter().map(|entry| of(entry, place).held()).sum::<usize>();
        let all: usize = self.programs.iter().map(|entry| made_by_any(&[0, 1, 2].map(|place| of(entry, place)))).sum();
        let numbers = self.contenders.iter().enumerate();
        let numbers: Vec<_> =
            numbers.map(|(place, contender)| format!("{} {}/{all}", contender.name, held(place))).collect();
        format!("oci: assertions that hold: {}", numbers.join(", "))
    }
}

/// What a program finds of runc, which a few programs now and then come to no end with: where that is less than is known
/// to hold it is run again.
fn proven(
    run: impl Fn() -> Result<Assertions, String>,
    as_known: impl Fn(&Assertions) -> bool,
) -> Result<Assertions, String> {
    const RUNS: usize = 3;
    let mut found = run();
    for _ in 1..RUNS {
        if found.as_ref().is_ok_and(&as_known) {
            break;
        }
        found = run();
    }
    found
}

fn made_by_any(found: &[Assertions]) -> usize {
    let names: BTreeSet<_> = found.iter().flat_map(|found| found.iter().map(|(name, _)| name)).collect();
    let most = |name| found.iter().map(|found| found.get(name).made).max().unwrap_or_default();
    names.into_iter().map(most).sum()
}

/// How often each assertion that holds with runc holds with both. More is no difference.
fn compare(runc: &Assertions, runvm: &Assertions) -> (Outcome, Outcome) {
    runc.iter().filter(|(_, count)| count.held > 0).fold(
        Default::default(),
        |(with_runc, with_runvm), (name, count)| {
            let other = runvm.get(name).held.min(count.held);
            (with_runc.see(name, count.held), with_runvm.see(name, other))
        },
    )
}
