//! What config.json can say: each field is followed, or refused by its name. `docs/conformance.md` has the table.

use std::fs;

use anyhow::{Context as _, Result, ensure};
use conformance::bundle::Hand;
use conformance::suite::expect_equal;
use conformance::{Case, Outcome, case};
use serde_json::{Value, json};

pub(crate) fn cases() -> Vec<Case<Hand>> {
    vec![
        case!(mounts_have_their_options),
        case!(mounts_are_passed_on_as_asked),
        case!(devices_are_made),
        case!(devices_are_forbidden),
        case!(seccomp_actions),
        case!(a_personality),
        case!(clocks_are_shifted),
        case!(a_scheduler_and_a_priority_for_disks),
        case!(a_domain_name),
        case!(limits_by_their_names_in_version_2),
        case!(limits_of_disks),
        case!(hooks_have_their_namespaces),
        case!(hooks_have_their_time),
        case!(a_failing_hook_after_the_start_stops_it),
        case!(all_hooks_after_the_end_run),
        case!(a_changed_configuration_changes_nothing),
        case!(what_a_guest_cannot_have_is_refused),
    ]
}

fn add(config: &mut Value, list: &str, items: impl IntoIterator<Item = Value>) {
    if let Some(list) = config.pointer_mut(list).and_then(Value::as_array_mut) {
        list.extend(items);
    }
}

/// The options, and below `optional` what is passed on to whom, of the mounts below /m.
fn mounts(h: &Hand, options: &[&[&str]]) -> Result<Vec<String>> {
    let source = h.folder().join("source");
    fs::create_dir_all(&source)?;
    let bundle = h.bundle_with(&["cat", "/proc/self/mountinfo"], |config| {
        let mounts = options.iter().enumerate().map(|(index, options)| {
            let kind = if options.iter().any(|option| option.ends_with("bind")) { "bind" } else { "tmpfs" };
            json!({ "destination": format!("/m/{index}"), "type": kind, "source": source, "options": options })
        });
        add(config, "/mounts", mounts);
    })?;
    let output = bundle.run().ok()?;
    let lines = output.stdout.lines().filter_map(|line| {
        let mut fields = line.split(' ').skip(4);
        let (place, options) = (fields.next()?, fields.next()?);
        let optional: Vec<_> =
            fields.take_while(|&field| field != "-").filter_map(|field| field.split(':').next()).collect();
        place.starts_with("/m/").then(|| format!("{place} {options} {}", optional.join(" ")).trim_end().to_owned())
    });
    Ok(lines.collect())
}

fn mounts_have_their_options(h: &Hand) -> Result<Outcome> {
    let seen = mounts(
        h,
        &[
            &["ro", "nosuid", "nodev", "noexec"],
            &["noatime"],
            &["nodiratime", "strictatime"],
            &["rbind", "rro", "rnosuid"],
            &["bind", "ro", "noexec"],
        ],
    )?;
    expect_equal("mounts", seen.len(), 5)?;
    ensure!(seen[0].contains("ro,nosuid,nodev,noexec"), "{seen:?}");
    ensure!(seen[3].contains("ro,nosuid"), "{seen:?}");
    Ok(Outcome::new().see("options", seen[..3].join("\n")).see("bound", seen[4].contains("ro,noexec")))
}

fn mounts_are_passed_on_as_asked(h: &Hand) -> Result<Outcome> {
    let options: [&[&str]; 6] = [
        &["shared"],
        &["private"],
        &["unbindable"],
        &["bind", "shared"],
        &["rbind", "rprivate"],
        &["bind", "unbindable"],
    ];
    let seen = mounts(h, &options)?;
    let kinds: Vec<_> = seen.iter().map(|line| line.split(' ').skip(2).collect::<Vec<_>>().join(" ")).collect();
    expect_equal("kinds", kinds.join(","), "shared,,unbindable,shared,,unbindable".to_owned())?;
    Ok(Outcome::new().see("kinds", kinds.join(",")))
}

fn devices_are_made(h: &Hand) -> Result<Outcome> {
    let script = "cd /dev; stat -c '%n %F %t:%T %a %u:%g' own/null fifo far; echo x >own/null && echo written; cat far";
    let bundle = h.bundle_with(&["sh", "-c", script], |config| {
        config["linux"]["devices"] = json!([
            { "path": "/dev/own/null", "type": "c", "major": 1, "minor": 3, "fileMode": 0o640, "uid": 7, "gid": 8 },
            { "path": "/dev/fifo", "type": "p", "fileMode": 0o600 },
            // Neither host nor guest has it.
            { "path": "/dev/far", "type": "c", "major": 508, "minor": 77, "fileMode": 0o600, "uid": 0, "gid": 0 },
        ]);
        let rule = json!({ "allow": true, "type": "c", "major": 508, "minor": 77, "access": "rwm" });
        add(config, "/linux/resources/devices", [rule]);
    })?;
    let output = bundle.run().run()?;
    ensure!(output.stdout.contains("character special file 1:3 640 7:8"), "{output:?}");
    Ok(Outcome::new().see_output("run", &output))
}

fn devices_are_forbidden(h: &Hand) -> Result<Outcome> {
    let script = "cat /dev/null && echo null; head -c 1 /dev/kmsg || echo forbidden";
    let bundle = h.bundle_with(&["sh", "-c", script], |config| {
        config["linux"]["devices"] = json!([{ "path": "/dev/kmsg", "type": "c", "major": 1, "minor": 11 }]);
    })?;
    let output = bundle.run().run()?;
    ensure!(output.stdout.contains("forbidden"), "{output:?}");
    Ok(Outcome::new().see_output("run", &output))
}

fn seccomp_actions(h: &Hand) -> Result<Outcome> {
    let mut outcome = Outcome::new();
    for (action, errno) in [
        ("SCMP_ACT_ALLOW", None),
        ("SCMP_ACT_LOG", None),
        ("SCMP_ACT_ERRNO", None),
        ("SCMP_ACT_ERRNO", Some(38)),
        ("SCMP_ACT_TRACE", None),
        ("SCMP_ACT_TRAP", None),
        ("SCMP_ACT_KILL", None),
        ("SCMP_ACT_KILL_THREAD", None),
        ("SCMP_ACT_KILL_PROCESS", None),
    ] {
        let bundle = h.bundle_with(&["mkdir", "/made"], |config| {
            let mut rule = json!({ "names": ["mkdir"], "action": action });
            if let Some(errno) = errno {
                rule["errnoRet"] = json!(errno);
            }
            let default = if action == "SCMP_ACT_ALLOW" { "SCMP_ACT_LOG" } else { "SCMP_ACT_ALLOW" };
            config["linux"]["seccomp"] = json!({ "defaultAction": default, "syscalls": [rule] });
        })?;
        let output = bundle.run().run()?;
        let made = bundle.inside("made").exists();
        expect_equal(action, made, matches!(action, "SCMP_ACT_ALLOW" | "SCMP_ACT_LOG"))?;
        outcome = outcome.see_output(&format!("{action} {errno:?}"), &output);
    }
    Ok(outcome)
}

fn a_personality(h: &Hand) -> Result<Outcome> {
    if h.runtime().is_runc() {
        // The distribution's does not know the field.
        return Ok(Outcome::new().see("machine", "not asked"));
    }
    let bundle = h.bundle_with(&["uname", "-m"], |config| {
        config["linux"]["personality"] = json!({ "domain": "LINUX32" });
    })?;
    Ok(Outcome::new().see("machine", bundle.run().ok()?.text()))
}

fn clocks_are_shifted(h: &Hand) -> Result<Outcome> {
    if h.runtime().is_runc() {
        return Ok(Outcome::new().see("days since boot", "not asked"));
    }
    let bundle =
        h.bundle_with(&["sh", "-c", "echo $(($(cut -d. -f1 /proc/uptime) / 86400)); sleep 1000"], |config| {
            config["linux"]["timeOffsets"] =
                json!({ "boottime": { "secs": 864_000 }, "monotonic": { "secs": 864_000 } });
            add(config, "/linux/namespaces", [json!({ "type": "time" })]);
        })?;
    bundle.start()?;
    bundle.expect_written("10")?;
    let exec = bundle.exec("", "echo $(($(cut -d. -f1 /proc/uptime) / 86400))").ok()?;
    Ok(Outcome::new().see("days since boot", exec.text()))
}

fn a_scheduler_and_a_priority_for_disks(h: &Hand) -> Result<Outcome> {
    if h.runtime().is_runc() {
        return Ok(Outcome::new().see("scheduler", "not asked").see("disks", "not asked"));
    }
    let script = "cut -d' ' -f41 /proc/self/stat; ionice -p $$";
    let bundle = h.bundle_with(&["sh", "-c", &format!("{script}; echo ready; sleep 1000")], |config| {
        config["process"]["scheduler"] = json!({ "policy": "SCHED_BATCH", "nice": 5 });
        config["process"]["ioPriority"] = json!({ "class": "IOPRIO_CLASS_IDLE", "priority": 0 });
    })?;
    bundle.start()?;
    bundle.expect_written("ready")?;
    let written = bundle.written("out")?;
    let exec = bundle.exec("", script).ok()?;
    expect_equal("an exec's, which is like the first", format!("{}ready\n", exec.stdout), written.clone())?;
    let mut lines = written.lines();
    let (scheduler, disks) = lines.next().zip(lines.next()).context("two lines")?;
    Ok(Outcome::new().see("scheduler", scheduler).see("disks", disks))
}

fn a_domain_name(h: &Hand) -> Result<Outcome> {
    if h.runtime().is_runc() {
        return Ok(Outcome::new().see("name", "not asked"));
    }
    let bundle = h.bundle_with(&["cat", "/proc/sys/kernel/domainname"], |config| {
        config["domainname"] = json!("example.test");
    })?;
    Ok(Outcome::new().see("name", bundle.run().ok()?.text()))
}

fn limits_by_their_names_in_version_2(h: &Hand) -> Result<Outcome> {
    if h.runtime().is_runc() {
        // It has what the host has, which may be version 1.
        return Ok(Outcome::new().see("limits", "not asked"));
    }
    let script = "cd /sys/fs/cgroup; cat memory.high pids.max cpu.max cpu.weight";
    let bundle = h.bundle_with(&["sh", "-c", script], |config| {
        add(config, "/mounts", [json!({ "destination": "/sys/fs/cgroup", "type": "cgroup", "options": ["ro"] })]);
        config["linux"]["resources"]["pids"] = json!({ "limit": 77 });
        config["linux"]["resources"]["cpu"] = json!({ "quota": 30_000, "period": 60_000, "shares": 2048 });
        config["linux"]["resources"]["unified"] = json!({ "memory.high": "67108864" });
    })?;
    Ok(Outcome::new().see("limits", bundle.run().ok()?.text().replace('\n', " ")))
}

fn limits_of_disks(h: &Hand) -> Result<Outcome> {
    let disk = fs::read_dir("/sys/block")?.flatten().find(|disk| disk.path().join("device").exists());
    let disk = disk.context("the machine has no disk")?.path().join("dev");
    let number = fs::read_to_string(disk)?.trim().to_owned();
    let (major, minor) = number.split_once(':').context("a device has two numbers")?;
    let (major, minor): (i64, i64) = (major.parse()?, minor.parse()?);
    let bundle = h.bundle_with(&["sleep", "1000"], |config| {
        let rate = json!([{ "major": major, "minor": minor, "rate": 104_857_600 }]);
        config["linux"]["resources"]["blockIO"] = json!({ "throttleReadBpsDevice": rate });
    })?;
    bundle.create()?;
    let pid = bundle.state()?["pid"].as_i64().context("the state has a pid")?;
    let of_process = fs::read_to_string(format!("/proc/{pid}/cgroup"))?;
    let find = |controller: &str| {
        of_process.lines().find_map(|line| line.split_once(controller).map(|(_, path)| path.to_owned()))
    };
    let limit = match find(":blkio:") {
        Some(path) => fs::read_to_string(format!("/sys/fs/cgroup/blkio{path}/blkio.throttle.read_bps_device"))?,
        None => fs::read_to_string(format!("/sys/fs/cgroup{}/io.max", find("::").context("no cgroup")?))?,
    };
    ensure!(limit.contains(&number) && limit.contains("104857600"), "the limit is not set: {limit}");
    Ok(Outcome::new().see("limit", limit))
}

fn hooks_have_their_namespaces(h: &Hand) -> Result<Outcome> {
    let log = h.folder().join("namespaces");
    let script = format!("readlink /proc/self/ns/net >>{}", log.display());
    let bundle = h.bundle_with(&["true"], |config| {
        let hooks = json!([{ "path": "/bin/sh", "args": ["sh", "-c", script], "env": ["PATH=/usr/bin:/bin"] }]);
        config["hooks"] = json!({ "prestart": hooks, "createRuntime": hooks, "createContainer": hooks });
    })?;
    bundle.run().ok()?;
    let seen = fs::read_to_string(log)?;
    let seen: Vec<_> = seen.lines().collect();
    expect_equal("hooks", seen.len(), 3)?;
    let own = fs::read_link("/proc/self/ns/net")?.display().to_string();
    let own: Vec<_> = seen.into_iter().map(|namespace| namespace == own).collect();
    expect_equal("in the runtime's network namespace", &own, &vec![true, true, false])?;
    Ok(Outcome::new().see("in the runtime's", format!("{own:?}")))
}

fn hooks_have_their_time(h: &Hand) -> Result<Outcome> {
    let bundle = h.bundle_with(&["true"], |config| {
        let hook = json!({ "path": "/bin/sleep", "args": ["sleep", "100"], "timeout": 1 });
        config["hooks"] = json!({ "createRuntime": [hook] });
    })?;
    let output = bundle.run().run()?;
    ensure!(output.code != 0 && output.stderr.contains("hook"), "{output:?}");
    bundle.expect_no_trace()?;
    Ok(Outcome::new().see("refused", output.code != 0))
}

fn a_failing_hook_after_the_start_stops_it(h: &Hand) -> Result<Outcome> {
    let bundle = h.bundle_with(&["sleep", "1000"], |config| {
        config["hooks"] = json!({ "poststart": [{ "path": "/bin/false", "args": ["false"] }] });
    })?;
    let output = bundle.run().run()?;
    ensure!(output.stderr.contains("hook"), "the sentence does not speak of the hook: {}", output.stderr);
    bundle.expect_no_trace()?;
    Ok(Outcome::new().see("exit", output.code))
}

fn all_hooks_after_the_end_run(h: &Hand) -> Result<Outcome> {
    let last = h.folder().join("last");
    let bundle = h.bundle_with(&["true"], |config| {
        let script = format!("cat >{}", last.display());
        config["hooks"] = json!({ "poststop": [
            { "path": "/bin/sh", "args": ["sh", "-c", script] },
            { "path": "/bin/false", "args": ["false"] },
        ]});
    })?;
    let output = bundle.run().run()?;
    let state: Value = serde_json::from_str(&fs::read_to_string(&last)?)?;
    expect_equal("the container's ID", state["id"].as_str(), Some(bundle.id.as_str()))?;
    Ok(Outcome::new().see("exit", output.code).see("status", &state["status"]))
}

fn a_changed_configuration_changes_nothing(h: &Hand) -> Result<Outcome> {
    let marks = ["before", "after"].map(|name| h.folder().join(name));
    let hooks = |mark: &std::path::Path| json!({ "poststop": [{ "path": "/bin/touch", "args": ["touch", mark] }] });
    let bundle = h.bundle_with(&["sh", "-c", "echo first"], |config| config["hooks"] = hooks(&marks[0]))?;
    bundle.create()?;
    let mut config: Value = serde_json::from_slice(&fs::read(bundle.path.join("config.json"))?)?;
    config["process"]["args"] = json!(["echo", "second"]);
    config["hooks"] = hooks(&marks[1]);
    bundle.configure(&config)?;
    bundle.call("start").ok()?;
    bundle.expect_written("first")?;
    bundle.expect_stopped()?;
    bundle.call("delete").ok()?;
    expect_equal("hooks that ran", marks.map(|mark| mark.exists()), [true, false])?;
    Ok(Outcome::new().see("output", bundle.written("out")?))
}

fn what_a_guest_cannot_have_is_refused(h: &Hand) -> Result<Outcome> {
    if h.runtime().is_runc() {
        return Ok(Outcome::new().see("refused", "not asked"));
    }
    let mapping = json!([{ "containerID": 0, "hostID": 1000, "size": 1 }]);
    let mount = |rest: Value| {
        let mut mount = json!({ "destination": "/m", "type": "bind", "source": "/usr", "options": ["bind"] });
        mount.as_object_mut().into_iter().for_each(|mount| mount.extend(rest.as_object().cloned().unwrap_or_default()));
        json!([mount])
    };
    let notify = json!({ "defaultAction": "SCMP_ACT_ALLOW", "listenerPath": "/run/x",
        "syscalls": [{ "names": ["mkdir"], "action": "SCMP_ACT_NOTIFY" }] });
    let fields = [
        ("/process/execCPUAffinity", json!({ "initial": "0" }), "process.execCPUAffinity"),
        ("/process/capabilities/bounding", json!(["CAP_NONE"]), "process.capabilities.bounding"),
        ("/vm", json!({ "kernel": { "path": "/kernel" } }), "vm"),
        ("/linux/uidMappings", mapping.clone(), "linux.uidMappings"),
        ("/linux/gidMappings", mapping.clone(), "linux.gidMappings"),
        ("/linux/timeOffsets", json!({ "boottime": { "secs": 1 } }), "linux.timeOffsets"),
        ("/linux/netDevices", json!({ "eth0": {} }), "linux.netDevices"),
        ("/linux/intelRdt", json!({ "closID": "a" }), "linux.intelRdt"),
        ("/linux/memoryPolicy", json!({ "mode": "MPOL_BIND", "nodes": "0" }), "linux.memoryPolicy"),
        ("/linux/seccomp", notify, "linux.seccomp"),
        ("/linux/rootfsPropagation", json!("sideways"), "rootfs"),
        ("/linux/sysctl", json!({ "kernel.none": "1" }), "linux.sysctl"),
        ("/linux/resources/cpu", json!({ "realtimeRuntime": 1 }), "linux.resources.cpu.realtimeRuntime"),
        ("/linux/resources/network", json!({ "classID": 1 }), "linux.resources.network.classID"),
        ("/linux/resources/rdma", json!({ "mlx": { "hcaHandles": 1 } }), "linux.resources.rdma"),
        ("/linux/resources/hugepageLimits", json!([{ "pageSize": "3MB", "limit": 0 }]), "linux.resources"),
        ("/linux/namespaces", json!([{ "type": "network" }]), "linux.namespaces"),
        (
            "/linux/namespaces",
            json!([{ "type": "network" }, { "type": "mount" }, { "type": "user", "path": "/proc/self/ns/user" }]),
            "linux.namespaces",
        ),
        (
            "/linux/namespaces",
            json!([{ "type": "network" }, { "type": "mount" }, { "type": "user" }]),
            "linux.uidMappings and linux.gidMappings",
        ),
        ("/mounts", mount(json!({ "uidMappings": mapping })), "mounts[0].uidMappings"),
        ("/mounts", mount(json!({ "options": ["bind", "idmap"] })), "mounts[0].options (idmap)"),
        ("/mounts", mount(json!({ "options": ["bind", "tmpcopyup"] })), "mounts[0].options (tmpcopyup)"),
    ];
    for (place, value, name) in &fields {
        let (parent, field) = place.rsplit_once('/').context("a pointer has a slash")?;
        let bundle = h.bundle_with(&["true"], |config| {
            if let Some(parent) = config.pointer_mut(parent) {
                parent[field] = value.clone();
            }
        })?;
        let output = bundle.in_background("create")?;
        ensure!(output.code != 0, "{name} is not refused");
        ensure!(output.stderr.contains(name), "the sentence does not name {name}: {}", output.stderr);
        ensure!(output.stderr.lines().count() == 1, "more than a sentence: {}", output.stderr);
        bundle.expect_no_trace()?;
    }
    Ok(Outcome::new().see("refused", "all"))
}
