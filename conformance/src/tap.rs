//! What a program says in the Test Anything Protocol.

use std::collections::BTreeMap;

/// How often each assertion was made, and how often it held. One may be made several times under one name.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Assertions(BTreeMap<String, Count>);

/// How often one assertion was made, and how often it held.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Count {
    /// How often it was made.
    pub made: usize,
    /// How often it held.
    pub held: usize,
}

impl Assertions {
    /// Reads a program's output. What was skipped, or is not expected to hold, is no assertion.
    pub fn parse(output: &str) -> Self {
        let mut assertions = Self::default();
        for line in output.lines() {
            let (held, rest) = match (line.strip_prefix("ok "), line.strip_prefix("not ok ")) {
                (Some(rest), _) => (true, rest),
                (_, Some(rest)) => (false, rest),
                _ => continue,
            };
            let name = rest.trim_start_matches(|c: char| c.is_ascii_digit()).trim_start_matches([' ', '-']);
            if !["# SKIP", "# TODO"].iter().any(|directive| name.contains(directive)) {
                assertions.add(name, held);
            }
        }
        assertions
    }

    /// Adds one assertion.
    pub fn add(&mut self, name: &str, held: bool) {
        let count = self.0.entry(name.to_owned()).or_default();
        count.made += 1;
        count.held += usize::from(held);
    }

    /// Whether none was made.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// One of them.
    pub fn get(&self, name: &str) -> Count {
        self.0.get(name).copied().unwrap_or_default()
    }

    /// All of them by name.
    pub fn iter(&self) -> impl Iterator<Item = (&str, Count)> {
        self.0.iter().map(|(name, count)| (name.as_str(), *count))
    }

    /// How often any held.
    pub fn held(&self) -> usize {
        self.0.values().map(|count| count.held).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_skipped_is_no_assertion() {
        let output = "TAP version 13\nok 1 - a\n  ---\n  ok 9 - in a note\n  ...\nnot ok 2 - a\nok 3 # SKIP b\n\
                      not ok 4 - c # TODO\nok 5 - \"d\" is - e\n1..5\n";
        let assertions = Assertions::parse(output);
        let all: Vec<_> = assertions.iter().map(|(name, count)| (name, count.made, count.held)).collect();
        assert_eq!(all, [("\"d\" is - e", 1, 1), ("a", 2, 1)]);
        assert_eq!(assertions.held(), 2);
    }
}
