//! The cases, in the order in which the machine runs them: that of their names.

use anyhow::{Context as _, Result, bail, ensure};
use conformance::Output;
use conformance::suite::expect_equal;
use serde_json::{Value, json};

use crate::Case;

pub(crate) const CASES: &[Case] = &[
    Case {
        name: "check_finds_it",
        script: "runvm check --json",
        command: &["true"],
        configure: |_| {},
        judge: check_finds_it,
    },
    Case {
        name: "cold_start",
        script: "runvm --template off run \"$ID\"",
        command: &["sh", "-c", "uname -r; echo out; echo err >&2; exit 37"],
        configure: |_| {},
        judge: cold_start,
    },
    Case {
        name: "exec",
        script: r#"
            runvm run --detach "$ID" >container 2>&1 || { cat container; exit 1; }
            code=0
            echo in | runvm exec "$ID" sh -c 'hostname; cat; echo err >&2; exit 5' || code=$?
            runvm delete --force "$ID"
            exit "$code"
        "#,
        command: &["sleep", "1000"],
        configure: |config| config["hostname"] = json!("inside"),
        judge: |output| {
            expect_equal("exit code", output.code, 5)?;
            expect_equal("standard error", output.stderr.as_str(), "err\n")?;
            expect_equal("standard output", output.stdout.as_str(), "inside\nin\n")
        },
    },
    Case {
        name: "template",
        script: r#"
            runvm template create --interfaces 0 >key
            runvm template list
            runvm run "$ID"
            grep -c 'reached machine forked' /tmp/log
            runvm template remove "$(cat key)"
        "#,
        command: &["uname", "-r"],
        configure: |_| {},
        judge: |output| {
            expect_equal("exit code", output.code, 0)?;
            let lines: Vec<_> = output.stdout.lines().collect();
            let [_, template, kernel, forks] = lines[..] else { bail!("standard output: {:?}", output.stdout) };
            ensure!(template.ends_with("yes"), "the template is not usable: {template}");
            ensure!(kernel.ends_with("-runvm"), "the kernel is {kernel}");
            expect_equal("forks", forks, "1")
        },
    },
    Case {
        name: "volume",
        script: r#"
            mkdir volume
            echo from the machine >volume/read
            runvm run "$ID"
            cat volume/written
        "#,
        command: &["sh", "-c", "cat /volume/read; echo from the container >/volume/written"],
        configure: |config| {
            let volume = json!({
                "destination": "/volume", "type": "bind", "source": "volume", "options": ["rbind", "rw"]
            });
            config["mounts"].as_array_mut().into_iter().for_each(|mounts| mounts.push(volume.clone()));
        },
        judge: |output| {
            expect_equal("exit code", output.code, 0)?;
            expect_equal("standard output", output.stdout.as_str(), "from the machine\nfrom the container\n")
        },
    },
];

fn check_finds_it(output: &Output) -> Result<()> {
    expect_equal("exit code", output.code, 0)?;
    let report: Value = serde_json::from_str(&output.stdout).context("`runvm check --json` printed no JSON")?;
    expect_equal("accelerator", report["accelerator"].as_str(), Some("kvm"))?;
    let kernel = report["requirements"]
        .as_array()
        .and_then(|all| all.iter().find(|requirement| requirement["name"] == "guest kernel"))
        .and_then(|requirement| requirement["found"].as_str())
        .context("the report names no guest kernel")?;
    ensure!(kernel.ends_with("/vmlinux"), "the guest kernel is {kernel}");
    Ok(())
}

fn cold_start(output: &Output) -> Result<()> {
    expect_equal("exit code", output.code, 37)?;
    expect_equal("standard error", output.stderr.as_str(), "err\n")?;
    // The machine's own kernel has another name.
    let lines: Vec<_> = output.stdout.lines().collect();
    ensure!(matches!(lines[..], [kernel, "out"] if kernel.ends_with("-runvm")), "standard output: {:?}", output.stdout);
    Ok(())
}
