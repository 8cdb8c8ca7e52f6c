//! The share is the exports and nothing else, whatever requests a guest puts: not as its kernel would put them, but as
//! one who has taken over that kernel can.
//!
//! The test runs itself again to be a VM's process that has entered its exports, and a guest that tries to leave them.
//! The same guest is let loose on a folder that nobody has entered, where it has to find what it looks for, and to change
//! what is elsewhere: one that could not would show nothing. It needs root.

mod ground;
mod guest;
mod ways;

use std::env;
use std::process::{Command, ExitCode, Stdio};

use libtest_mimic::{Arguments, Failed, Trial};

use ground::Ground;

/// The argument that makes this program a guest; how its files are served and the ground follow.
const WORD: &str = "guest";

fn main() -> ExitCode {
    if let [_, word, how, ground] = &env::args().collect::<Vec<_>>()[..]
        && word == WORD
    {
        return guest::main(how, ground);
    }
    let root = rustix::process::geteuid().is_root();
    let trials = [
        Trial::test("a_guest_gets_to_what_is_not_closed", gets_out),
        Trial::test("a_guest_stays_in_its_exports", stays_in),
    ];
    let trials = trials.into_iter().map(|trial| trial.with_ignored_flag(!root)).collect();
    libtest_mimic::run(&Arguments::from_args(), trials).exit_code()
}

fn gets_out() -> Result<(), Failed> {
    let ground = Ground::make()?;
    let breaches = breaches(guest::OPEN, &ground)?;
    // What only opens a file is held back by virtiofsd too, so that is found by its name.
    for found in ["a name: \"outside/secret\" leads to", "a name: a secret was read"] {
        if !breaches.iter().any(|breach| breach.starts_with(found)) {
            return Err(format!("it was not seen that {found:?}: {breaches:?}").into());
        }
    }
    if ground.check().is_ok() { Err("nothing has changed outside".into()) } else { Ok(()) }
}

fn stays_in() -> Result<(), Failed> {
    let ground = Ground::make()?;
    let breaches = breaches(guest::CLOSED, &ground)?;
    ground.check()?;
    if breaches.is_empty() { Ok(()) } else { Err(breaches.join("\n").into()) }
}

/// Has a guest try everything; what it got that it must not get.
fn breaches(how: &str, ground: &Ground) -> Result<Vec<String>, Failed> {
    let map = serde_json::to_string(&ground.map)?;
    let mut guest = Command::new("/proc/self/exe");
    let output = guest.args([WORD, how, &map]).stdin(Stdio::null()).stderr(Stdio::inherit()).output()?;
    if !output.status.success() {
        return Err(format!("the guest ended with {}", output.status).into());
    }
    Ok(serde_json::from_slice(&output.stdout)?)
}
