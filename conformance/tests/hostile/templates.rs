//! A template belongs to its agent.

use std::fs;

use anyhow::{Context as _, Result, ensure};
use conformance::Cmd;
use conformance::suite::expect_equal;

use crate::Case;
use crate::scene::Scene;

pub(crate) fn cases() -> Vec<Case> {
    let plan = "ConfigureSandbox close".to_owned();
    vec![Case { name: "hostile::templates::are_an_agents_own".to_owned(), plan, judge: Box::new(are_an_agents_own) }]
}

/// A guest that says that it listens becomes a template, whatever it does later. Good agents beside it boot, become a
/// template and are forked from that; and what is forked from the evil one fails as it did itself.
fn are_an_agents_own(scene: &Scene) -> Result<()> {
    let folder = scene.folder().join("templates");
    let at = |cmd: Cmd| cmd.env("RUNVM_TEMPLATE", "auto").env("RUNVM_TEMPLATE_DIR", &folder);
    let good = scene.hand().bundle("echo well")?;
    let run_good = |name: &str| -> Result<String> {
        let log = scene.folder().join(name);
        let run = good.call(&format!("--debug --log {} run", log.display())).current_dir(&good.path);
        expect_equal("output", at(run).ok()?.text(), "well")?;
        fs::read_to_string(log).context("there is no log")
    };
    for round in ["first", "second"] {
        let evil = at(scene.call("create")).run()?;
        ensure!(evil.code != 0, "an evil guest was created");
        let log = run_good(round)?;
        ensure!(log.contains(if round == "first" { "machine booted" } else { "machine forked" }), "{round}: {log}");
    }
    Ok(())
}
