//! `events`, in runc's words.

use std::collections::BTreeMap;
use std::io::{self, Write as _};
use std::time::Duration;

use clap::Args;
use runvm_protocol::agent::ContainerStatisticsResponse as Statistics;
use serde::Serialize;
use serde_json::{Value, json};

use crate::container::{self, Event};
use crate::error::{Error, Result};
use crate::monitor::Globals;

/// The guest's details that are passed on, at most, and the length of the name of one.
const MAX_DETAILS: usize = 256;
const MAX_NAME: usize = 64;

/// `events`'.
#[derive(Debug, Args)]
pub struct EventsArgs {
    /// How often statistics are printed, such as 500ms, 5s, 1m30s.
    #[arg(long, value_name = "DURATION", default_value = "5s", value_parser = duration)]
    interval: Duration,
    /// Print the statistics once.
    #[arg(long)]
    stats: bool,
    /// Container ID.
    id: String,
}

/// Prints events, each as a line of JSON.
pub fn events(globals: &Globals, args: &EventsArgs) -> Result<()> {
    let tell = |event| match print_line(&describe(&args.id, &event)) {
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(false),
        printed => printed.map(|()| true).map_err(Error::system("write to stdout")),
    };
    if args.stats {
        let statistics = container::statistics(globals, &args.id)?;
        return tell(Event::Statistics(Box::new(statistics))).map(drop);
    }
    container::events(globals, &args.id, args.interval, tell)
}

/// An event as a line has it, in runc's order.
#[derive(Debug, Serialize)]
struct Line<'a> {
    #[serde(rename = "type")]
    kind: &'static str,
    id: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    data: Option<Value>,
}

fn print_line(line: &Line) -> io::Result<()> {
    let mut text = serde_json::to_vec(line)?;
    text.push(b'\n');
    let mut stdout = io::stdout().lock();
    stdout.write_all(&text)?;
    stdout.flush()
}

fn describe<'a>(id: &'a str, event: &Event) -> Line<'a> {
    match event {
        Event::OutOfMemory => Line { kind: "oom", id, data: None },
        Event::Statistics(statistics) => Line { kind: "stats", id, data: Some(data(statistics)) },
    }
}

/// The statistics as runc prints those of a cgroup of version 2. Numbers that it leaves out where they are zero are left
/// out here too.
fn data(statistics: &Statistics) -> Value {
    let nanoseconds = |us: u64| us.saturating_mul(1000);
    let limit = |limit: Option<u64>| limit.unwrap_or(u64::MAX);
    let details: BTreeMap<_, _> = statistics
        .memory_details
        .iter()
        .filter(|(name, _)| name.len() <= MAX_NAME && name.chars().all(|c| c.is_ascii_alphanumeric() || c == '_'))
        .take(MAX_DETAILS)
        .collect();
    let unlimited = json!({"limit": 0, "failcnt": 0});
    json!({
        "cpu": {
            "usage": with_some(
                json!({"kernel": nanoseconds(statistics.cpu_system_us), "user": nanoseconds(statistics.cpu_user_us)}),
                &[("total", nanoseconds(statistics.cpu_usage_us))],
            ),
            "throttling": with_some(json!({}), &[
                ("periods", statistics.cpu_periods),
                ("throttledPeriods", statistics.cpu_throttled_periods),
                ("throttledTime", nanoseconds(statistics.cpu_throttled_us)),
            ]),
        },
        "cpuset": {
            "cpu_exclusive": 0,
            "mem_hardwall": 0,
            "mem_exclusive": 0,
            "memory_migrate": 0,
            "memory_spread_page": 0,
            "memory_spread_slab": 0,
            "memory_pressure": 0,
            "sched_load_balance": 0,
            "sched_relax_domain_level": 0,
        },
        "memory": with_some(
            json!({
                "usage": with_some(
                    json!({"limit": limit(statistics.memory_limit), "failcnt": statistics.memory_limit_hits}),
                    &[("usage", statistics.memory_usage), ("max", statistics.memory_peak)],
                ),
                "swap": unlimited,
                "kernel": unlimited,
                "kernelTCP": unlimited,
                "raw": details,
            }),
            &[("cache", statistics.memory_details.get("file").copied().unwrap_or(0))],
        ),
        "pids": with_some(
            json!({}),
            &[("current", statistics.pids), ("limit", statistics.pids_limit.unwrap_or(0))],
        ),
        "blkio": block_io(statistics),
        "hugetlb": {},
        "intel_rdt": {},
        "network_interfaces": null,
    })
}

fn block_io(statistics: &Statistics) -> Value {
    let entries = |read: fn(&_) -> u64, written: fn(&_) -> u64| {
        let devices = statistics.block_devices.iter().take(MAX_DETAILS);
        let entries = devices.flat_map(|device| {
            [("Read", read(device)), ("Write", written(device))].map(|(operation, value)| {
                let numbers = [("major", device.major), ("minor", device.minor), ("value", value)];
                with_some(json!({"op": operation}), &numbers)
            })
        });
        entries.collect::<Vec<_>>()
    };
    if statistics.block_devices.is_empty() {
        return json!({});
    }
    json!({
        "ioServiceBytesRecursive": entries(|device| device.read_bytes, |device| device.written_bytes),
        "ioServicedRecursive": entries(|device| device.reads, |device| device.writes),
    })
}

/// An object with further numbers, where they are not zero.
fn with_some(mut object: Value, numbers: &[(&str, u64)]) -> Value {
    for (name, number) in numbers.iter().filter(|(_, number)| *number > 0) {
        object[*name] = json!(number);
    }
    object
}

/// A length of time as Go writes it, more than zero.
fn duration(text: &str) -> std::result::Result<Duration, String> {
    let invalid = || format!("\"{text}\" is no duration such as 500ms, 5s, 1m30s");
    let mut seconds = 0.0;
    let mut rest = text;
    while !rest.is_empty() {
        let digits = rest.find(|c: char| !c.is_ascii_digit() && c != '.').ok_or_else(invalid)?;
        let (number, tail) = rest.split_at(digits);
        let unit = tail.find(|c: char| c.is_ascii_digit() || c == '.').unwrap_or(tail.len());
        let (unit, tail) = tail.split_at(unit);
        let factor = match unit {
            "ns" => 1e-9,
            "us" | "µs" => 1e-6,
            "ms" => 1e-3,
            "s" => 1.0,
            "m" => 60.0,
            "h" => 3600.0,
            _ => return Err(invalid()),
        };
        seconds += number.parse::<f64>().map_err(|_| invalid())? * factor;
        rest = tail;
    }
    match Duration::try_from_secs_f64(seconds) {
        Ok(Duration::ZERO) => Err("duration interval must be greater than 0".to_owned()),
        // Timers go no further.
        Ok(duration) if duration <= Duration::from_secs(1 << 31) => Ok(duration),
        _ => Err(invalid()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn events_have_runcs_names() {
        let mut statistics = Statistics { cpu_usage_us: 5, memory_usage: 7, pids: 1, ..Default::default() };
        statistics.memory_details.insert("file".into(), 3);
        statistics.memory_details.insert("\u{1b}[2J".into(), 3);
        let event = describe("a", &Event::Statistics(Box::new(statistics)));
        assert!(serde_json::to_string(&event).unwrap().starts_with(r#"{"type":"stats","id":"a","data":{"#));
        let data = event.data.unwrap();
        assert_eq!(data["cpu"], json!({"usage": {"total": 5000, "kernel": 0, "user": 0}, "throttling": {}}));
        assert_eq!(data["memory"]["usage"], json!({"limit": u64::MAX, "usage": 7, "failcnt": 0}));
        assert_eq!((&data["memory"]["cache"], &data["memory"]["raw"]), (&json!(3), &json!({"file": 3})));
        assert_eq!(data["pids"], json!({"current": 1}));
        let oom = serde_json::to_string(&describe("a", &Event::OutOfMemory)).unwrap();
        assert_eq!(oom, r#"{"type":"oom","id":"a"}"#);
    }

    #[test]
    fn durations_are_gos() {
        for (text, ms) in [("5s", 5000), ("500ms", 500), ("1m30s", 90_000), ("1.5s", 1500), ("1h", 3_600_000)] {
            assert_eq!(duration(text), Ok(Duration::from_millis(ms)), "{text}");
        }
        for text in ["", "5", "s", "0s", "-1s", "1x", "1..2s", "99999999999h"] {
            assert!(duration(text).is_err(), "{text}");
        }
    }
}
