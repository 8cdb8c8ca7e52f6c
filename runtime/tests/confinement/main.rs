//! What is left to an attacker who has taken over a thread of a VM's process: nothing but the exports.
//!
//! The test runs itself again to be such a process: it takes the steps that `runvm vm` takes before a guest runs, and then,
//! for each role that a thread can have, tries all that [`attempts`] lists. Each attempt has a process to itself, since the
//! filter of system calls ends it. The same attempts are made without confinement too, as root, where they have to
//! succeed: one that failed anyhow would show nothing. It needs root.

mod attacker;
mod attempts;
mod ground;
mod system;

use std::collections::BTreeMap;
use std::env;
use std::process::ExitCode;

use libtest_mimic::{Arguments, Failed, Trial};
use nix::libc;

use attacker::{Outcome, ROLES};
use attempts::{ATTEMPTS, Attempt, WORK};
use ground::Ground;

fn main() -> ExitCode {
    if let [_, word, role, ground] = &env::args().collect::<Vec<_>>()[..]
        && word == attacker::WORD
    {
        return attacker::main(role, ground);
    }
    let root = rustix::process::geteuid().is_root();
    let unconfined = Trial::test("without_confinement_everything_is_there", everything_is_there);
    let confined =
        ROLES.map(|(role, _)| Trial::test(format!("nothing_but_its_work_is_left_to_{role}"), move || is_left(role)));
    let trials = std::iter::once(unconfined).chain(confined).map(|trial| trial.with_ignored_flag(!root)).collect();
    libtest_mimic::run(&Arguments::from_args(), trials).exit_code()
}

fn everything_is_there() -> Result<(), Failed> {
    let ground = Ground::make()?;
    let outcomes = attacker::run(attacker::UNCONFINED, &ground)?;
    let expected = |attempt: &Attempt, outcome| outcome == Outcome::Done || attempt.not_everywhere;
    judge("failed without confinement, so that it fails with it shows nothing", attempts(), &outcomes, expected)
}

fn is_left(role: &str) -> Result<(), Failed> {
    let ground = Ground::make()?;
    let outcomes = attacker::run(role, &ground)?;
    let refused = |_: &Attempt, outcome| matches!(outcome, Outcome::Refused(_) | Outcome::Killed(libc::SIGSYS));
    judge("succeeded", attempts(), &outcomes, refused)?;
    ground.check()?;
    let work = WORK.iter().filter(|work| work.is_of(role)).map(|work| (work.name, work));
    judge("did not end as it has to", work, &outcomes, |work, outcome| outcome == work.ends)
}

fn attempts() -> impl Iterator<Item = (&'static str, &'static Attempt)> {
    ATTEMPTS.iter().flat_map(|attempts| attempts.iter()).map(|attempt| (attempt.name, attempt))
}

/// Fails with the names of all whose outcome is not as expected.
fn judge<'a, T: 'a>(
    verdict: &str,
    tried: impl Iterator<Item = (&'static str, &'a T)>,
    outcomes: &BTreeMap<String, Outcome>,
    expected: impl Fn(&T, Outcome) -> bool,
) -> Result<(), Failed> {
    let wrong = tried.filter_map(|(name, what)| match outcomes.get(name) {
        Some(&outcome) if expected(what, outcome) => None,
        outcome => Some(format!("\"{name}\" {verdict}: {outcome:?}")),
    });
    let wrong: Vec<_> = wrong.collect();
    if wrong.is_empty() { Ok(()) } else { Err(wrong.join("\n").into()) }
}
