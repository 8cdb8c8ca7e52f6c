//! Lifecycles one after another, forked from one template where there are templates: nothing stays, and the last are no
//! slower than the first.

use std::collections::BTreeSet;
use std::path::Path;

use anyhow::{Result, ensure};
use conformance::bundle::Hand;
use conformance::census::Census;
use conformance::lifecycles::one_after_another;
use conformance::suite::expect_equal;
use conformance::{Case, Outcome, case};

pub(crate) fn cases() -> Vec<Case<Hand>> {
    vec![
        case!(lifecycles_leave_nothing_and_stay_as_quick).alone(),
        case!(lifecycles_in_steps_leave_nothing_and_stay_as_quick).alone(),
    ]
}

fn lifecycles_leave_nothing_and_stay_as_quick(h: &Hand) -> Result<Outcome> {
    let folder = h.folder().join("templates");
    let log = h.folder().join("log");
    let bundle = h.bundle("echo ran; exit 3")?;
    let run = || bundle.call(&format!("--debug --log {} run", log.display())).current_dir(&bundle.path);
    let lifecycle = || {
        let output = run().env("RUNVM_TEMPLATE_DIR", &folder).run()?;
        expect_equal("output and exit code", (output.text(), output.code), ("ran", 3))
    };
    // What is made once, a template above all, is there before the first that counts.
    lifecycle()?;
    let before = Census::take()?;
    let templates = files(&folder)?;
    one_after_another(|| {
        // The log of one is as long as that of another.
        std::fs::remove_file(&log)?;
        lifecycle()?;
        if !h.runtime().is_runc() {
            let log = std::fs::read_to_string(&log)?;
            ensure!(!log.contains("machine booted"), "not forked:\n{log}");
        }
        Ok(())
    })?;
    before.expect_nothing_new()?;
    expect_equal("files of templates", files(&folder)?, templates)?;
    Ok(Outcome::new().see("left", 0))
}

/// The same as an engine does it, verb by verb, with an exec in between.
fn lifecycles_in_steps_leave_nothing_and_stay_as_quick(h: &Hand) -> Result<Outcome> {
    let bundle = h.bundle("read word; exit 3")?;
    let lifecycle = || {
        bundle.create()?;
        expect_equal("output of exec", bundle.exec("", "echo ran").ok()?.text(), "ran")?;
        bundle.call("start").ok()?;
        bundle.expect_stopped()?;
        bundle.call("delete").ok()?;
        anyhow::Ok(())
    };
    lifecycle()?;
    let before = Census::take()?;
    one_after_another(lifecycle)?;
    before.expect_nothing_new()?;
    Ok(Outcome::new().see("left", 0))
}

/// Everything in a folder, which need not be there.
fn files(folder: &Path) -> Result<BTreeSet<String>> {
    let mut found = BTreeSet::new();
    let mut todo = vec![folder.to_owned()];
    while let Some(folder) = todo.pop().filter(|folder| folder.exists()) {
        for entry in std::fs::read_dir(folder)? {
            let entry = entry?;
            found.insert(entry.path().display().to_string());
            if entry.file_type()?.is_dir() {
                todo.push(entry.path());
            }
        }
    }
    Ok(found)
}
