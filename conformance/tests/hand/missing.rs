//! What runvm needs and does not find. runc needs none of it and runs: listed differences.

use std::path::PathBuf;

use anyhow::{Result, ensure};
use conformance::bundle::{Bundle, Hand};
use conformance::runtime::dist;
use conformance::suite::expect_equal;
use conformance::{Case, Cmd, Outcome, case};

use crate::refused::refuse_cmd;

pub(crate) fn cases() -> Vec<Case<Hand>> {
    vec![
        case!(no_guest_kernel),
        case!(a_guest_that_gives_up),
        case!(no_qemu_where_it_is_wanted).tcg(),
        case!(no_qemu_where_kvm_is_usable),
        case!(kvm_demanded_and_not_there),
        case!(without_kvm_it_is_emulated),
    ]
}

fn run_of(bundle: &Bundle) -> Cmd {
    bundle.call("run").args(["--bundle".as_ref(), bundle.path.as_os_str()])
}

fn no_guest_kernel(h: &Hand) -> Result<Outcome> {
    let bundle = h.bundle("true")?;
    let empty = h.folder().join("empty");
    std::fs::create_dir(&empty)?;
    let path = empty.display().to_string();
    refuse_cmd(h, run_of(&bundle).env("RUNVM_ASSETS", &path), &[&path, "vmlinux"], Some(&bundle))
}

fn a_guest_that_gives_up(h: &Hand) -> Result<Outcome> {
    let bundle = h.bundle("true")?;
    let assets = h.folder().join("assets");
    let script = "cp -r \"$1\" \"$2\" && echo no archive >\"$2/initramfs.cpio\"";
    Cmd::new("sh").args(["-c", script, "sh"]).arg(dist().join("lib/runvm")).arg(&assets).ok()?;
    let run = run_of(&bundle).env("RUNVM_ASSETS", &assets).env("RUNVM_ACCEL", "kvm");
    refuse_cmd(h, run, &["did not boot", "Kernel panic", "root fs"], Some(&bundle))
}

fn no_qemu_where_it_is_wanted(h: &Hand) -> Result<Outcome> {
    let bundle = h.bundle("true")?;
    let run = run_of(&bundle).env("PATH", path_without_qemu(h)?).env("RUNVM_VMM", "qemu");
    refuse_cmd(h, run, &["qemu"], Some(&bundle))
}

fn no_qemu_where_kvm_is_usable(h: &Hand) -> Result<Outcome> {
    let bundle = h.bundle("echo ran")?;
    let run = run_of(&bundle).env("PATH", path_without_qemu(h)?).run()?;
    expect_equal("output", run.text(), "ran")?;
    bundle.expect_no_trace()?;
    Ok(Outcome::new().see_output("run", &run))
}

/// A PATH with everything but QEMU.
fn path_without_qemu(h: &Hand) -> Result<PathBuf> {
    let path = h.folder().join("path");
    let script = "mkdir \"$0\"; for d in /usr/sbin /usr/bin /sbin /bin; do for p in $d/*; do
                  case $p in */qemu*) ;; *) ln -sf $p \"$0/\";; esac; done; done";
    Cmd::new("sh").args(["-c", script]).arg(&path).ok()?;
    Ok(path)
}

/// A command in a mount namespace whose /dev has no kvm.
fn without_kvm(h: &Hand, cmd: Cmd) -> Result<Cmd> {
    let script = r#"
set -e
d=$0; mkdir -p "$d"; mount -t tmpfs none "$d"
for n in null zero full random urandom tty fuse; do [ ! -e /dev/$n ] || { : >"$d/$n"; mount --bind /dev/$n "$d/$n"; }; done
for n in pts shm mqueue net; do [ ! -d /dev/$n ] || { mkdir "$d/$n"; mount --rbind /dev/$n "$d/$n"; }; done
ln -s pts/ptmx "$d/ptmx"; ln -s /proc/self/fd "$d/fd"
mount --move "$d" /dev
exec "$@""#;
    let command = cmd.into_command();
    Ok(Cmd::new("unshare")
        .args(["--mount", "--propagation", "private", "sh", "-c", script])
        .arg(h.folder().join("dev"))
        .arg(command.get_program())
        .args(command.get_args()))
}

fn kvm_demanded_and_not_there(h: &Hand) -> Result<Outcome> {
    let bundle = h.bundle("echo ran")?;
    let output = without_kvm(h, run_of(&bundle))?.run()?;
    bundle.expect_no_trace()?;
    if !h.runtime().is_runc() {
        ensure!(output.stderr.contains("KVM") && output.stderr.contains("/dev/kvm"), "no reason: {}", output.stderr);
    }
    Ok(Outcome::new().see("exit", output.code).see("stdout", output.stdout))
}

fn without_kvm_it_is_emulated(h: &Hand) -> Result<Outcome> {
    let bundle = h.bundle("echo ran")?;
    let auto = |words: &str| Cmd::new(h.runtime().program()).args(words.split_whitespace());
    let run = without_kvm(h, auto("run --bundle").arg(&bundle.path).arg(&bundle.id))?.run()?;
    expect_equal("output", run.text(), "ran")?;
    if !h.runtime().is_runc() {
        let check = without_kvm(h, auto("check --json"))?.run()?;
        let report: serde_json::Value = serde_json::from_str(&check.stdout)?;
        expect_equal("accelerator", report["accelerator"].as_str(), Some("tcg"))?;
    }
    Ok(Outcome::new().see_output("run", &run))
}
