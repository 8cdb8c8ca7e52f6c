//! The verbs that only look: `state`, `list`, `ps`.

use std::process::Command;

use serde_json::{Value, json};

use super::args::OutputFormat;
use super::print;
use crate::container::host_pids;
use crate::error::{Error, Result};
use crate::monitor::Globals;
use crate::state::{Container, Status};

pub fn state(globals: &Globals, id: &str) -> Result<()> {
    let container = Container::look(&globals.root, id)?;
    print(&format!("{:#}\n", describe(&container)))
}

/// A container as runc's `state` and `list --format json` show it.
fn describe(container: &Container) -> Value {
    let record = &container.record;
    let status = container.status();
    let pid = record.monitor.filter(|_| status != Status::Stopped).map_or(0, |monitor| monitor.pid);
    json!({
        "ociVersion": record.oci_version,
        "id": record.id,
        "pid": pid,
        "status": status.name(),
        "bundle": record.bundle,
        "rootfs": record.rootfs,
        "created": record.created,
        "annotations": record.annotations,
        "owner": owner_name(record.owner),
    })
}

fn owner_name(uid: u32) -> String {
    match nix::unistd::User::from_uid(uid.into()) {
        Ok(Some(user)) => user.name,
        _ => format!("#{uid}"),
    }
}

pub fn list(globals: &Globals, format: OutputFormat, quiet: bool) -> Result<()> {
    let containers = Container::list(&globals.root)?;
    if quiet {
        return print(&containers.iter().map(|container| format!("{}\n", container.record.id)).collect::<String>());
    }
    let described: Vec<_> = containers.iter().map(describe).collect();
    if format == OutputFormat::Json {
        return print(&format!("{}\n", Value::from(described)));
    }
    let columns = ["id", "pid", "status", "bundle", "created", "owner"];
    let header = columns.iter().map(|column| column.to_uppercase()).collect();
    let rows = described.iter().map(|container| {
        columns
            .iter()
            .map(|&column| match &container[column] {
                Value::String(text) => text.clone(),
                other => other.to_string(),
            })
            .collect()
    });
    print(&table(std::iter::once(header).chain(rows).collect()))
}

/// Lays rows out in columns as wide as their widest entry.
fn table(rows: Vec<Vec<String>>) -> String {
    let columns = rows.first().map_or(0, Vec::len);
    let width = |column: usize| rows.iter().map(|row| row[column].chars().count()).max().unwrap_or(0);
    let widths: Vec<_> = (0..columns).map(width).collect();
    let line = |row: &Vec<String>| {
        let cells: Vec<_> = row.iter().zip(&widths).map(|(cell, &width)| format!("{cell:<width$}")).collect();
        format!("{}\n", cells.join("   ").trim_end())
    };
    rows.iter().map(line).collect()
}

pub fn ps(globals: &Globals, id: &str, format: OutputFormat, options: &[String]) -> Result<()> {
    let container = Container::look(&globals.root, id)?;
    let pids = host_pids(&container)?;
    if format == OutputFormat::Json {
        return print(&format!("{}\n", json!(pids)));
    }
    let options = if options.is_empty() { &["-ef".to_owned()][..] } else { options };
    let output = Command::new("ps").args(options).output().map_err(Error::system("run ps"))?;
    if !output.status.success() {
        return Err(Error::Usage(format!("ps: {}", String::from_utf8_lossy(&output.stderr).trim())));
    }
    let text = String::from_utf8_lossy(&output.stdout);
    let mut lines = text.lines();
    let header = lines.next().unwrap_or_default();
    let column = header
        .split_ascii_whitespace()
        .position(|word| word == "PID")
        .ok_or_else(|| Error::Usage("the options of ps leave out the PID column".to_owned()))?;
    let ours = lines.filter(|line| {
        let pid = line.split_ascii_whitespace().nth(column).and_then(|pid| pid.parse().ok());
        pid.is_some_and(|pid| pids.contains(&pid))
    });
    print(&std::iter::once(header).chain(ours).map(|line| format!("{line}\n")).collect::<String>())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tables_align() {
        let rows = vec![vec!["ID".into(), "PID".into()], vec!["longer".into(), "1".into()]];
        assert_eq!(table(rows), "ID       PID\nlonger   1\n");
    }
}
