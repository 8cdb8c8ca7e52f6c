//! The wall: a container does not see the host. runc fails these by design, so that
//! `differences.toml` lists them all.

use anyhow::{Context, Result, ensure};
use conformance::docker::Docker;
use conformance::suite::expect_equal;
use conformance::{Case, Outcome, case};

pub(crate) fn cases() -> Vec<Case<Docker>> {
    vec![
        case!(the_kernel_is_not_the_hosts).tcg(),
        case!(the_boot_is_not_the_hosts),
        case!(the_command_line_is_not_the_hosts),
        case!(privileged_reads_another_kernels_log),
        case!(privileged_sees_no_device_of_the_host),
        case!(privileged_loads_nothing_into_the_host),
    ]
}

/// Compares what a container sees with what the host has.
fn against_the_host(d: &Docker, options: &str, script: &str) -> Result<Outcome> {
    let inside = d.sh(options, script).run()?;
    let outside = conformance::Cmd::new("sh").args(["-c", script]).run()?;
    ensure!(!inside.text().is_empty(), "nothing was seen inside: {}", inside.stderr);
    let view = if inside.stdout == outside.stdout { "the host's" } else { "its own" };
    Ok(Outcome::new().see("what it sees", view))
}

fn the_kernel_is_not_the_hosts(d: &Docker) -> Result<Outcome> {
    against_the_host(d, "", "uname -r")
}

fn the_boot_is_not_the_hosts(d: &Docker) -> Result<Outcome> {
    against_the_host(d, "", "cat /proc/sys/kernel/random/boot_id")
}

fn the_command_line_is_not_the_hosts(d: &Docker) -> Result<Outcome> {
    against_the_host(d, "", "cat /proc/cmdline")
}

fn privileged_reads_another_kernels_log(d: &Docker) -> Result<Outcome> {
    let mark = format!("runvm conformance: {}", d.name("mark"));
    std::fs::write("/dev/kmsg", &mark).context("cannot write to the kernel's log")?;
    let output = d.sh("--privileged", "dmesg").run()?;
    expect_equal("exit code", output.code, 0)?;
    Ok(Outcome::new().see("reads the host's log", output.stdout.contains(&mark)))
}

fn privileged_sees_no_device_of_the_host(d: &Docker) -> Result<Outcome> {
    // The host's root file system lies on the device with this number.
    let number = conformance::Cmd::new("stat").args(["--format", "%Hd:%Ld", "/"]).ok()?;
    let script = format!("test -e /sys/dev/block/{} && echo reachable || echo absent", number.text());
    let output = d.sh("--privileged", &script).run()?;
    Ok(Outcome::new().see("the host's disk", output.stdout))
}

fn privileged_loads_nothing_into_the_host(d: &Docker) -> Result<Outcome> {
    // A setting of the whole kernel: what privileged changes must not be the host's.
    let path = "/proc/sys/vm/overcommit_ratio";
    let before = std::fs::read_to_string(path)?;
    let changed = if before.trim() == "51" { "52" } else { "51" };
    let output = d.sh("--privileged", &format!("echo {changed} >{path}; cat {path}")).run()?;
    let after = std::fs::read_to_string(path)?;
    std::fs::write(path, &before)?;
    ensure!(output.text() == changed, "it was not changed inside: {}{}", output.stdout, output.stderr);
    Ok(Outcome::new().see("the host's setting", if after == before { "untouched" } else { "changed" }))
}
