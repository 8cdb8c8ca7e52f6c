//! What a runtime says of itself.

use anyhow::{Result, ensure};
use conformance::bundle::Hand;
use conformance::suite::expect_equal;
use conformance::{Case, Outcome, case};
use serde_json::Value;

use crate::refused::sentence;

pub(crate) fn cases() -> Vec<Case<Hand>> {
    vec![
        case!(spec_writes_a_configuration),
        case!(spec_does_not_overwrite),
        case!(features_are_json),
        case!(the_version_is_told),
        case!(an_unknown_verb_is_refused),
        case!(an_error_is_in_the_log_as_json),
        case!(an_error_is_in_the_log_as_text),
    ]
}

fn spec_writes_a_configuration(h: &Hand) -> Result<Outcome> {
    h.call("spec").current_dir(h.folder()).ok()?;
    let config: Value = serde_json::from_str(&std::fs::read_to_string(h.folder().join("config.json"))?)?;
    let mut outcome = Outcome::new();
    for pointer in ["/process/terminal", "/process/args", "/process/cwd", "/process/noNewPrivileges", "/root"] {
        let value = config.pointer(pointer).cloned().unwrap_or_default();
        ensure!(!value.is_null(), "the configuration has no {pointer}");
        outcome = outcome.see(pointer, value);
    }
    let mounts = config["mounts"].as_array().map_or(0, Vec::len);
    ensure!(mounts > 5, "only {mounts} mounts");
    Ok(outcome)
}

fn spec_does_not_overwrite(h: &Hand) -> Result<Outcome> {
    std::fs::write(h.folder().join("config.json"), "mine")?;
    let output = h.call("spec --bundle").arg(h.folder()).run()?;
    expect_equal("the file", std::fs::read_to_string(h.folder().join("config.json"))?.as_str(), "mine")?;
    ensure!(output.stderr.contains("config.json"), "the sentence does not name the file: {}", output.stderr);
    Ok(Outcome::new().see("exit", output.code))
}

fn features_are_json(h: &Hand) -> Result<Outcome> {
    let output = h.call("features").ok()?;
    let features: Value = serde_json::from_str(&output.stdout)?;
    let has = |pointer: &str, value: &str| {
        features.pointer(pointer).and_then(Value::as_array).is_some_and(|list| list.iter().any(|item| item == value))
    };
    ensure!(features["ociVersionMin"].is_string() && features["ociVersionMax"].is_string(), "no versions: {features}");
    Ok(Outcome::new()
        .see("hooks", has("/hooks", "createRuntime"))
        .see("mount options", has("/mountOptions", "rbind"))
        .see("namespaces", has("/linux/namespaces", "pid"))
        .see("capabilities", has("/linux/capabilities", "CAP_NET_ADMIN"))
        .see("seccomp", features.pointer("/linux/seccomp/enabled").cloned().unwrap_or_default()))
}

fn the_version_is_told(h: &Hand) -> Result<Outcome> {
    let output = h.call("--version").ok()?;
    let name = if h.runtime().is_runc() { "runc" } else { "runvm" };
    ensure!(output.stdout.starts_with(&format!("{name} version ")), "another program: {}", output.stdout);
    ensure!(output.stdout.lines().any(|line| line.starts_with("spec: ")), "no specification: {}", output.stdout);
    let short = h.call("-v").ok()?;
    Ok(Outcome::new().see("exit", output.code).see("short", short.stdout == output.stdout))
}

fn an_unknown_verb_is_refused(h: &Hand) -> Result<Outcome> {
    let output = h.call("no-such-verb").run()?;
    ensure!(output.stderr.contains("no-such-verb") || output.stdout.contains("no-such-verb"), "{}", output.stderr);
    Ok(Outcome::new().see("refused", output.code != 0))
}

fn an_error_is_in_the_log_as_json(h: &Hand) -> Result<Outcome> {
    let log = h.folder().join("log");
    let output = h.call(&format!("--log {} --log-format json state no-such-container", log.display())).run()?;
    let text = std::fs::read_to_string(&log)?;
    let last: Value = serde_json::from_str(text.lines().last().unwrap_or_default())?;
    ensure!(last["time"].is_string(), "the line has no time: {last}");
    expect_equal("the sentence", last["msg"].as_str(), Some(sentence(h, &output.stderr)))?;
    Ok(Outcome::new().see("exit", output.code).see("level", &last["level"]))
}

fn an_error_is_in_the_log_as_text(h: &Hand) -> Result<Outcome> {
    let log = h.folder().join("log");
    let output = h.call(&format!("--log {} state no-such-container", log.display())).run()?;
    let text = std::fs::read_to_string(&log)?;
    let last = text.lines().last().unwrap_or_default();
    ensure!(last.contains("level=error") && last.contains("does not exist"), "another line: {last}");
    Ok(Outcome::new().see("exit", output.code))
}
