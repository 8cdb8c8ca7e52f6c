//! `differences.toml`: where runvm may differ from runc, and why.

use std::path::Path;

use anyhow::{Context, Result, bail};
use serde::Deserialize;

use crate::Outcome;

/// One permitted difference.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Difference {
    /// The case, as the suite names it: `docker::network::host_is_refused`.
    case: String,
    /// The observation that differs; `*` stands for any.
    what: String,
    /// What runvm's observation is, or a part of it.
    runvm: String,
    /// Why it is right that they differ.
    reason: String,
}

impl Difference {
    fn is_of(&self, what: &str) -> bool {
        self.what == what || self.what == "*"
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    #[serde(default, rename = "difference")]
    differences: Vec<Difference>,
}

/// All permitted differences.
#[derive(Debug, Default)]
pub struct Differences(Vec<Difference>);

impl Differences {
    /// Reads the file beside this crate's `Cargo.toml`.
    pub fn load() -> Result<Self> {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("differences.toml");
        let text = std::fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
        Self::parse(&text).with_context(|| format!("{} is not as it should be", path.display()))
    }

    fn parse(text: &str) -> Result<Self> {
        let file: File = toml::from_str(text)?;
        for entry in &file.differences {
            if entry.reason.trim().is_empty() {
                bail!("the difference of {} in {:?} has no reason", entry.case, entry.what);
            }
        }
        Ok(Self(file.differences))
    }

    /// Compares runvm's outcome with runc's: an error names every difference that is not
    /// listed and every listed one that is no difference any more.
    pub fn judge(&self, case: &str, runc: &Outcome, runvm: &Outcome) -> Result<()> {
        let differences = runc.differences(runvm);
        let listed: Vec<_> = self.0.iter().filter(|entry| entry.case == case).collect();
        let mut complaints = Vec::new();
        for (what, with_runc, with_runvm) in &differences {
            let known = listed.iter().any(|entry| entry.is_of(what) && with_runvm.contains(&entry.runvm));
            if !known {
                complaints.push(format!("{what}:\n  runc:  {with_runc:?}\n  runvm: {with_runvm:?}"));
            }
        }
        for entry in &listed {
            if !differences.iter().any(|(what, ..)| entry.is_of(what)) {
                complaints.push(format!(
                    "{}: differences.toml lists a difference that is none, both are {:?}: take the entry out",
                    entry.what,
                    runc.get(&entry.what)
                ));
            }
        }
        if complaints.is_empty() {
            return Ok(());
        }
        bail!("runvm is not as runc here\n{}", complaints.join("\n"))
    }

    /// The observations of a case that may differ.
    pub fn of<'a>(&'a self, case: &'a str) -> impl Iterator<Item = &'a str> {
        self.0.iter().filter(move |entry| entry.case == case).map(|entry| entry.what.as_str())
    }

    /// Entries of `suite` whose case does not exist.
    pub fn strays(&self, suite: &str, cases: &[String]) -> Vec<String> {
        let prefix = format!("{suite}::");
        self.0
            .iter()
            .filter(|entry| entry.case.starts_with(&prefix) && !cases.contains(&entry.case))
            .map(|entry| entry.case.clone())
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIST: &str = "
        [[difference]]
        case = 'docker::a::b'
        what = 'exit'
        runvm = '125'
        reason = 'there is one'
    ";

    fn outcome(exit: i32) -> Outcome {
        Outcome::new().see("exit", exit)
    }

    #[test]
    fn an_unlisted_difference_fails() {
        let list = Differences::parse("").unwrap();
        assert!(list.judge("docker::a::b", &outcome(0), &outcome(0)).is_ok());
        assert!(list.judge("docker::a::b", &outcome(0), &outcome(125)).is_err());
    }

    #[test]
    fn a_listed_difference_passes_only_as_listed() {
        let list = Differences::parse(LIST).unwrap();
        assert!(list.judge("docker::a::b", &outcome(0), &outcome(125)).is_ok());
        assert!(list.judge("docker::a::b", &outcome(0), &outcome(1)).is_err());
        assert!(list.judge("docker::a::c", &outcome(0), &outcome(125)).is_err());
    }

    #[test]
    fn a_star_stands_for_any_observation() {
        let list = Differences::parse(&LIST.replace("exit", "*")).unwrap();
        assert!(list.judge("docker::a::b", &outcome(0), &outcome(125)).is_ok());
        assert!(list.judge("docker::a::b", &outcome(0), &outcome(1)).is_err());
        assert!(list.judge("docker::a::b", &outcome(0), &outcome(0)).is_err());
    }

    #[test]
    fn a_listed_difference_that_is_none_fails() {
        let list = Differences::parse(LIST).unwrap();
        assert!(list.judge("docker::a::b", &outcome(0), &outcome(0)).is_err());
    }

    #[test]
    fn an_entry_for_no_case_is_a_stray() {
        let list = Differences::parse(LIST).unwrap();
        assert_eq!(list.strays("docker", &["docker::a::c".to_owned()]), ["docker::a::b"]);
        assert!(list.strays("docker", &["docker::a::b".to_owned()]).is_empty());
        assert!(list.strays("ctr", &[]).is_empty());
    }
}
