//! runvm under a real Docker daemon, as a user drives it, held against runc.

mod exec;
mod exit_codes;
mod lifecycle;
mod many;
mod nested;
mod network;
mod programs;
mod remapped;
mod resources;
mod security;
mod stdio;
mod volumes;
mod wall;

use std::process::ExitCode;

use conformance::Case;
use conformance::docker::{Docker, Engine};
use conformance::enclosure::run_inside;
use conformance::suite::{Suite, run};

/// The engines: the distribution's; a later release, which makes a container's interfaces after its creation; and the same
/// with the runtimes' own shims.
const INSTALLED: &str = "";
/// See [`INSTALLED`].
const LATER: &str = "later";
/// See [`INSTALLED`].
const SHIM: &str = "by-shim";

/// What is tried with the shims too, beside all of the network's: they are held to all else by the suites of containerd.
const BY_SHIM: &[&str] = &[
    "docker::exec::exec_runs_in_the_same_container",
    "docker::exec::exec_takes_stdin_to_its_end",
    "docker::exec::exec_has_a_terminal",
    "docker::exec::top_lists_processes",
    "docker::exec::copy_in_and_out",
    "docker::exit_codes::a_code_is_passed_on",
    "docker::exit_codes::killed_by_sigkill_is_137",
    "docker::exit_codes::a_program_that_is_not_there_is_127",
    "docker::lifecycle::stop_lets_a_program_end_by_itself",
    "docker::lifecycle::stopped_container_starts_again",
    "docker::lifecycle::pause_freezes_and_unpause_goes_on",
    "docker::lifecycle::logs_have_a_tail",
    "docker::lifecycle::several_run_at_once",
    "docker::many::execs_leave_nothing_with_their_container",
    "docker::stdio::foreground_keeps_both_outputs_apart",
    "docker::stdio::stdin_from_a_pipe_reaches_its_end",
    "docker::stdio::terminal_follows_a_resize",
    "docker::volumes::a_folder_is_shared_both_ways",
    "docker::volumes::a_file_is_shared_both_ways",
    "docker::volumes::a_volume_outlives_its_container",
];

fn main() -> ExitCode {
    let scripts: &[&[&str]] = &[
        &["setup.sh"],
        &["images.sh", "busybox"],
        &["images.sh", "debian"],
        &["images.sh", "docker"],
        &["later.sh", "sid", "docker.io", "docker-cli", "containerd"],
    ];
    run_inside(scripts, |enclosure| {
        let mut failed = false;
        for (engine, shim) in [(INSTALLED, false), (LATER, false), (SHIM, true)] {
            let suite = Suite { name: "docker", engine, shim, cases: cases(), open: Docker::open };
            let start =
                || if engine == INSTALLED { Engine::start(enclosure) } else { Engine::start_later(enclosure, shim) };
            failed |= run(suite, start)? != ExitCode::SUCCESS;
        }
        Ok(if failed { ExitCode::FAILURE } else { ExitCode::SUCCESS })
    })
}

fn cases() -> Vec<Case<Docker>> {
    let cases = [
        exec::cases(),
        exit_codes::cases(),
        lifecycle::cases(),
        many::cases(),
        nested::cases(),
        network::cases(),
        programs::cases(),
        remapped::cases(),
        resources::cases(),
        security::cases(),
        stdio::cases(),
        volumes::cases(),
        wall::cases(),
    ];
    let cases = cases.into_iter().flatten();
    let somewhere = |case: Case<Docker>| match case.name() {
        name if name.starts_with("docker::network::") => case,
        name if BY_SHIM.contains(&name) => case.only_on(&[INSTALLED, SHIM]),
        _ => case.only_on(&[INSTALLED]),
    };
    cases.map(somewhere).collect()
}
