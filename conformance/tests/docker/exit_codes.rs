//! How a container's end is told.

use anyhow::Result;
use conformance::docker::Docker;
use conformance::suite::expect_equal;
use conformance::{Case, Outcome, case};

pub(crate) fn cases() -> Vec<Case<Docker>> {
    vec![
        case!(a_code_is_passed_on).tcg(),
        case!(every_code_is_passed_on_by_exec),
        case!(killed_by_sigkill_is_137).tcg(),
        case!(killed_by_sigterm_is_143),
        case!(a_child_killed_inside_is_seen_inside),
        case!(a_program_that_is_not_there_is_127),
        case!(a_program_that_is_not_executable_is_126),
        case!(a_folder_as_program_is_refused),
        case!(exec_of_what_is_not_there),
        case!(a_working_folder_is_made),
    ]
}

fn a_code_is_passed_on(d: &Docker) -> Result<Outcome> {
    let mut outcome = Outcome::new();
    for code in [0, 1, 42, 255] {
        let output = d.sh("", &format!("exit {code}")).run()?;
        expect_equal("exit code", output.code, code)?;
        outcome = outcome.see_output(&format!("exit {code}"), &output);
    }
    Ok(outcome)
}

fn every_code_is_passed_on_by_exec(d: &Docker) -> Result<Outcome> {
    let container = d.start("", &["sleep", "1000"])?;
    let mut outcome = Outcome::new();
    for code in [0, 2, 125, 126, 127, 128, 129, 137, 200, 255] {
        let output = container.exec_sh("", &format!("exit {code}")).run()?;
        expect_equal("exit code", output.code, code)?;
        outcome = outcome.see_output(&format!("exit {code}"), &output);
    }
    Ok(outcome)
}

fn killed_by_sigkill_is_137(d: &Docker) -> Result<Outcome> {
    let container = d.start("", &["sleep", "1000"])?;
    container.docker("kill").ok()?;
    let code = container.wait()?;
    expect_equal("exit code", code, 137)?;
    Ok(Outcome::new().see("code", code).see("state", container.inspect("{{.State.Status}} {{.State.ExitCode}}")?))
}

fn killed_by_sigterm_is_143(d: &Docker) -> Result<Outcome> {
    // With an init, so that the signal meets a process with its default handling.
    // The init is deaf until it has begun, and a kernel keeps no signal for such a one.
    let container = d.start_sh("--init", "echo ready; exec sleep 1000")?;
    container.expect_log("ready")?;
    container.docker("kill --signal TERM").ok()?;
    let code = container.wait()?;
    expect_equal("exit code", code, 143)?;
    Ok(Outcome::new().see("code", code))
}

fn a_child_killed_inside_is_seen_inside(d: &Docker) -> Result<Outcome> {
    let script = "sh -c 'kill -9 $$'; echo $?; sh -c 'kill -SEGV $$'; echo $?";
    let output = d.sh("", script).run()?;
    expect_equal("codes", output.stdout.lines().filter(|line| line.parse::<u8>().is_ok()).count(), 2)?;
    Ok(Outcome::new().see_output("run", &output))
}

fn a_program_that_is_not_there_is_127(d: &Docker) -> Result<Outcome> {
    let by_name = d.run("", &["no-such-program"]).run()?;
    let by_path = d.run("", &["/bin/no-such-program"]).run()?;
    expect_equal("exit codes", (by_name.code, by_path.code), (127, 127))?;
    Ok(Outcome::new()
        .see("by name", by_name.code)
        .see("by path", by_path.code)
        .see("message names it", by_name.stderr.contains("no-such-program")))
}

fn a_program_that_is_not_executable_is_126(d: &Docker) -> Result<Outcome> {
    let output = d.run("", &["/etc/passwd"]).run()?;
    expect_equal("exit code", output.code, 126)?;
    Ok(Outcome::new().see("code", output.code).see("says why", output.stderr.contains("permission denied")))
}

fn a_folder_as_program_is_refused(d: &Docker) -> Result<Outcome> {
    let output = d.run("", &["/etc"]).run()?;
    expect_equal("refused", output.code >= 125, true)?;
    Ok(Outcome::new().see("code", output.code))
}

fn exec_of_what_is_not_there(d: &Docker) -> Result<Outcome> {
    let container = d.start("", &["sleep", "1000"])?;
    let missing = container.exec("", &["no-such-program"]).run()?;
    let not_executable = container.exec("", &["/etc/passwd"]).run()?;
    let afterwards = container.exec("", &["echo", "alive"]).run()?;
    expect_equal("the container lives on", afterwards.text(), "alive")?;
    Ok(Outcome::new().see("missing", missing.code).see("not executable", not_executable.code))
}

fn a_working_folder_is_made(d: &Docker) -> Result<Outcome> {
    let output = d.run("--workdir /not/there", &["pwd"]).run()?;
    expect_equal("folder", output.text(), "/not/there")?;
    Ok(Outcome::new().see_output("run", &output))
}
