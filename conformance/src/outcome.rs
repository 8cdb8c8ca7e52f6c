//! What a case saw, in a form that two runtimes can be compared by.

use std::collections::BTreeMap;
use std::fmt::Display;
use std::sync::LazyLock;

use regex_lite::Regex;

use crate::Output;

/// Named observations. Two runtimes agree on a case when all of them are equal.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Outcome(BTreeMap<String, String>);

impl Outcome {
    /// Nothing seen yet; a case that returns this fails.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds an observation.
    #[must_use]
    pub fn see(mut self, name: &str, value: impl Display) -> Self {
        self.0.insert(name.to_owned(), normalise(&value.to_string()));
        self
    }

    /// Adds the exit code and both outputs of a program.
    #[must_use]
    pub fn see_output(self, name: &str, output: &Output) -> Self {
        self.see(&format!("{name} exit"), output.code)
            .see(&format!("{name} stdout"), &output.stdout)
            .see(&format!("{name} stderr"), &output.stderr)
    }

    /// Adds how a shell ended in which a greedy program was killed, and the last line it wrote. Linux may kill others beside
    /// that, before it has its memory back, and so lines are missing: guests' kernels are patched not to, runc's is the host's.
    #[must_use]
    pub fn see_survivor(self, output: &Output) -> Self {
        self.see("exit", output.code).see("last line", output.text().lines().last().unwrap_or_default())
    }

    /// Whether nothing was seen.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// One observation.
    pub fn get(&self, name: &str) -> Option<&str> {
        self.0.get(name).map(String::as_str)
    }

    /// The observations that differ: name, here, there.
    pub fn differences<'a>(&'a self, other: &'a Self) -> Vec<(&'a str, &'a str, &'a str)> {
        const MISSING: &str = "(not seen)";
        let names: std::collections::BTreeSet<_> = self.0.keys().chain(other.0.keys()).collect();
        names
            .into_iter()
            .map(|name| {
                let value = |outcome: &'a Self| outcome.0.get(name).map_or(MISSING, String::as_str);
                (name.as_str(), value(self), value(other))
            })
            .filter(|(_, here, there)| here != there)
            .collect()
    }
}

/// Replaces what differs from one run to the next: IDs of containers.
fn normalise(text: &str) -> String {
    static ID: LazyLock<Option<Regex>> = LazyLock::new(|| Regex::new(r"\b([0-9a-f]{64}|[0-9a-f]{12})\b").ok());
    let text = text.trim_end();
    ID.as_ref().map_or_else(|| text.to_owned(), |id| id.replace_all(text, "<id>").into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equal_but_for_ids() {
        let one = Outcome::new().see("out", format!("{} ok\n", "ab".repeat(32)));
        let two = Outcome::new().see("out", format!("{} ok", "cd".repeat(32)));
        assert_eq!(one, two);
    }

    #[test]
    fn names_what_differs() {
        let one = Outcome::new().see("exit", 0).see("out", "a");
        let two = Outcome::new().see("exit", 1).see("out", "a").see("more", "b");
        assert_eq!(one.differences(&two), [("exit", "0", "1"), ("more", "(not seen)", "b")]);
    }
}
