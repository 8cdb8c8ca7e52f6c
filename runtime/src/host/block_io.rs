//! `linux.resources.blockIO`: limits of the host's disks, at the cgroup of the process that reads and writes them for the
//! guest.

use oci_spec::runtime::{LinuxBlockIo, LinuxThrottleDevice};

/// A file of a cgroup, and a line to be written into it.
type Line = (&'static str, String);

/// The lines for a cgroup of version 1, in its controller `blkio`.
pub(super) fn v1(limits: &LinuxBlockIo) -> Vec<Line> {
    let mut lines = Vec::new();
    lines.extend(limits.weight().filter(|&weight| weight > 0).map(|weight| ("blkio.weight", weight.to_string())));
    lines.extend(
        limits.leaf_weight().filter(|&weight| weight > 0).map(|weight| ("blkio.leaf_weight", weight.to_string())),
    );
    for device in limits.weight_device().iter().flatten() {
        let line = |weight: u16| format!("{}:{} {weight}", device.major(), device.minor());
        lines.extend(device.weight().map(|weight| ("blkio.weight_device", line(weight))));
        lines.extend(device.leaf_weight().map(|weight| ("blkio.leaf_weight_device", line(weight))));
    }
    for (file, devices) in throttled(
        limits,
        [
            "blkio.throttle.read_bps_device",
            "blkio.throttle.write_bps_device",
            "blkio.throttle.read_iops_device",
            "blkio.throttle.write_iops_device",
        ],
    ) {
        let line = |device: &LinuxThrottleDevice| format!("{}:{} {}", device.major(), device.minor(), device.rate());
        lines.extend(devices.map(|device| (file, line(device))));
    }
    lines
}

/// The lines for a cgroup of version 2, which has no leaf weights.
pub(super) fn v2(limits: &LinuxBlockIo) -> Vec<Line> {
    let mut lines = Vec::new();
    // From 10 to 1,000 to 1 to 10,000, as runc and systemd do.
    let weight = |weight: u16| 1 + (u64::from(weight.max(10)) - 10) * 9_999 / 990;
    lines.extend(limits.weight().filter(|&own| own > 0).map(|own| ("io.weight", format!("default {}", weight(own)))));
    for device in limits.weight_device().iter().flatten() {
        let line = |own: u16| format!("{}:{} {}", device.major(), device.minor(), weight(own));
        lines.extend(device.weight().map(|own| ("io.weight", line(own))));
    }
    for (key, devices) in throttled(limits, ["rbps", "wbps", "riops", "wiops"]) {
        let line =
            |device: &LinuxThrottleDevice| format!("{}:{} {key}={}", device.major(), device.minor(), device.rate());
        lines.extend(devices.map(|device| ("io.max", line(device))));
    }
    lines
}

/// The throttled devices, by the names that their four lists have: bytes read and written, requests read and written.
fn throttled<'a>(
    limits: &'a LinuxBlockIo,
    names: [&'static str; 4],
) -> impl Iterator<Item = (&'static str, std::slice::Iter<'a, LinuxThrottleDevice>)> {
    let lists = [
        limits.throttle_read_bps_device(),
        limits.throttle_write_bps_device(),
        limits.throttle_read_iops_device(),
        limits.throttle_write_iops_device(),
    ];
    names.into_iter().zip(lists.map(|list| list.as_deref().unwrap_or_default().iter()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_become_lines() {
        let limits: LinuxBlockIo = serde_json::from_str(
            r#"{"weight":500,"weightDevice":[{"major":8,"minor":0,"weight":10}],
                "throttleReadBpsDevice":[{"major":8,"minor":0,"rate":600}],
                "throttleWriteIOPSDevice":[{"major":8,"minor":16,"rate":300}]}"#,
        )
        .unwrap();
        let text = |lines: Vec<Line>| lines.iter().map(|(file, line)| format!("{file} {line}")).collect::<Vec<_>>();
        assert_eq!(
            text(v1(&limits)),
            [
                "blkio.weight 500",
                "blkio.weight_device 8:0 10",
                "blkio.throttle.read_bps_device 8:0 600",
                "blkio.throttle.write_iops_device 8:16 300"
            ]
        );
        assert_eq!(
            text(v2(&limits)),
            ["io.weight default 4950", "io.weight 8:0 1", "io.max 8:0 rbps=600", "io.max 8:16 wiops=300"]
        );
    }
}
