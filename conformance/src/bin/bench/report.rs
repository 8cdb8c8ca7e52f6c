//! The table, and the file.

use std::path::{Path, PathBuf};

use anyhow::Result;
use serde_json::{Map, Value, json};

use crate::contender::Contender;

/// One measure's results, a cell for each runtime.
pub(crate) struct Row {
    name: &'static str,
    what: &'static str,
    unit: &'static str,
    cells: Vec<Result<Cell>>,
}

/// What one runtime reached.
struct Cell {
    median: f64,
    p95: f64,
}

impl Row {
    pub(crate) fn new(
        name: &'static str,
        what: &'static str,
        unit: &'static str,
        samples: Vec<Result<Vec<f64>>>,
    ) -> Self {
        let cells = samples.into_iter().map(|values| values.map(Cell::of)).collect();
        Self { name, what, unit, cells }
    }
}

impl Cell {
    fn of(mut values: Vec<f64>) -> Self {
        values.sort_by(f64::total_cmp);
        Self { median: percentile(&values, 50), p95: percentile(&values, 95) }
    }
}

/// The value that `percent` of the sorted values do not exceed.
pub(crate) fn percentile(sorted: &[f64], percent: usize) -> f64 {
    let rank = (sorted.len() * percent).div_ceil(100).max(1);
    sorted.get(rank - 1).copied().unwrap_or(f64::NAN)
}

/// All results.
pub(crate) struct Report {
    names: Vec<&'static str>,
    rows: Vec<Row>,
}

impl Report {
    pub(crate) fn new(contenders: &[Contender]) -> Self {
        Self { names: contenders.iter().map(|contender| contender.name).collect(), rows: Vec::new() }
    }

    pub(crate) fn add(&mut self, row: Row) {
        self.rows.push(row);
    }

    /// Prints medians, with the 95th percentile behind them, and below what is missing.
    pub(crate) fn print(&self) -> Result<()> {
        print!("\n{:<24}{:<6}", "median (p95)", "");
        self.names.iter().for_each(|name| print!("{name:>20}"));
        println!();
        let mut notes = Vec::new();
        for row in &self.rows {
            print!("{:<24}{:<6}", row.what, row.unit);
            for (name, cell) in self.names.iter().zip(&row.cells) {
                match cell {
                    Ok(cell) => print!("{:>20}", format!("{:.1} ({:.1})", cell.median, cell.p95)),
                    Err(error) => {
                        print!("{:>20}", "-");
                        notes.push(format!("{name}, {}: {}", row.what, format!("{error:#}").replace('\n', " ")));
                    }
                }
            }
            println!();
        }
        notes.iter().for_each(|note| println!("- {note}"));
        Ok(())
    }

    /// Writes `target/bench.json` of the workspace.
    pub(crate) fn write(&self) -> Result<PathBuf> {
        let cell = |row: &Row, cell: &Result<Cell>| match cell {
            Ok(cell) => json!({ "median": round(cell.median), "p95": round(cell.p95), "unit": row.unit }),
            Err(_) => Value::Null,
        };
        let row = |row: &Row| {
            let cells = self.names.iter().zip(&row.cells);
            let cells: Map<_, _> = cells.map(|(name, value)| ((*name).to_owned(), cell(row, value))).collect();
            (row.name.to_owned(), Value::Object(cells))
        };
        let all: Map<_, _> = self.rows.iter().map(row).collect();
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../target");
        std::fs::create_dir_all(&folder)?;
        let path = std::fs::canonicalize(folder)?.join("bench.json");
        std::fs::write(&path, serde_json::to_string_pretty(&all)? + "\n")?;
        Ok(path)
    }
}

fn round(value: f64) -> f64 {
    (value * 100.0).round() / 100.0
}

#[cfg(test)]
mod tests {
    use super::percentile;

    #[test]
    fn percentiles_are_values_that_were_seen() {
        let values: Vec<f64> = (1..=20).map(f64::from).collect();
        assert_eq!((percentile(&values, 50), percentile(&values, 95)), (10.0, 19.0));
        assert_eq!(percentile(&[3.0], 95), 3.0);
    }
}
