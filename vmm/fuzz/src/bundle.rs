//! Bundles: what config.json becomes for the host and for the guest.

use std::cell::OnceCell;
use std::fs;
use std::io;
use std::os::unix::fs::symlink;
use std::path::{Component, Path};

use arbitrary::{Result, Unstructured};
use runvm::bundle::{Bundle, mount_points, split};
use runvm::sandbox::Size;
use serde_json::{Value, json};
use tempfile::TempDir;

/// The container's ID.
const ID: &str = "web";
/// What fields may be replaced by, beside each other.
const WORDS: [&str; 16] = [
    "",
    "/",
    ".",
    "..",
    "rootfs",
    "../outside",
    "/dir/link",
    "up",
    "/proc",
    "/sys/fs/cgroup",
    "bind",
    "rbind",
    "ro",
    "0-4294967295",
    "18446744073709551616",
    "path",
];
const NUMBERS: [i64; 8] = [0, 1, -1, 4096, 1 << 31, 1 << 40, i64::MAX, i64::MIN];

thread_local! {
    static FOLDER: OnceCell<TempDir> = const { OnceCell::new() };
}

/// Does what the input says.
pub fn run(data: &[u8]) {
    // All errors are the end of the input.
    let _ = play(&mut Unstructured::new(data));
}

#[expect(clippy::expect_used, reason = "a fuzzer ends where it cannot fuzz")]
fn play(u: &mut Unstructured<'_>) -> Result<()> {
    let text = if u.ratio(1, 8)? { u.bytes(u.len())?.to_vec() } else { spoilt(u)?.to_string().into_bytes() };
    FOLDER.with(|folder| {
        let folder = folder.get_or_init(|| TempDir::new().expect("a folder"));
        prepare(folder.path(), &text).expect("a bundle");
        load(folder.path());
        let outside = fs::read_dir(folder.path()).expect("a folder").count();
        assert_eq!(outside, 3, "something was made beside the root file system");
    });
    Ok(())
}

/// A bundle: links in its root file system lead out of it.
fn prepare(folder: &Path, config: &[u8]) -> io::Result<()> {
    let root = folder.join("rootfs");
    if root.exists() {
        fs::remove_dir_all(&root)?;
    }
    fs::create_dir_all(root.join("dir"))?;
    symlink("../../..", root.join("dir/link"))?;
    symlink("..", root.join("up"))?;
    fs::write(folder.join("path"), "nameserver 127.0.0.11")?;
    fs::write(folder.join("config.json"), config)
}

/// Does what `create` does before it makes anything. A bundle that is refused is no matter.
#[expect(clippy::expect_used, reason = "what was read can be written")]
fn load(folder: &Path) {
    let Ok(bundle) = Bundle::load(folder) else { return };
    let Ok(guest) = split(&bundle, ID) else { return };
    for export in &guest.exports {
        let inside = export.path.starts_with(ID);
        let plain = export.path.components().all(|part| matches!(part, Component::Normal(_)));
        assert!(inside && plain, "an export at {}", export.path.display());
        assert!(export.source.is_absolute(), "an export of {}", export.source.display());
    }
    serde_json::to_vec(&guest.spec).expect("a specification for the guest");
    let size = Size::of(&bundle.spec);
    assert!(size.vcpus > 0 && size.memory > 0, "{size:?}");
    let _ = (bundle.network_namespace(), bundle.terminal());
    let _ = mount_points::make(&bundle);
}

/// A configuration as engines write it, spoilt here and there.
fn spoilt(u: &mut Unstructured<'_>) -> Result<Value> {
    let mut config = json!({
        "ociVersion": "1.0.2",
        "root": {"path": "rootfs", "readonly": true},
        "hostname": "web",
        "process": {
            "terminal": false, "args": ["sh", "-c", "true"], "env": ["PATH=/bin"], "cwd": "/",
            "user": {"uid": 0, "gid": 0, "additionalGids": [1]},
            "capabilities": {"bounding": ["CAP_KILL"], "effective": ["CAP_KILL"]},
            "rlimits": [{"type": "RLIMIT_NOFILE", "hard": 1024, "soft": 1024}],
            "noNewPrivileges": true, "oomScoreAdj": 0,
        },
        "mounts": [
            {"destination": "/proc", "type": "proc", "source": "proc"},
            {"destination": "/dir/link/new", "type": "bind", "source": "path", "options": ["rbind", "ro"]},
            {"destination": "/etc/resolv.conf", "type": "bind", "source": "path", "options": ["bind"]},
        ],
        "hooks": {"prestart": [{"path": "/bin/true", "args": ["true"], "timeout": 1}]},
        "annotations": {"a": "b"},
        "linux": {
            "namespaces": [{"type": "pid"}, {"type": "network", "path": "/proc/1/ns/net"}, {"type": "mount"}],
            "uidMappings": [{"containerID": 0, "hostID": 0, "size": 1}],
            "devices": [{"path": "/dev/x", "type": "c", "major": 1, "minor": 3, "fileMode": 438}],
            "cgroupsPath": "/a/b", "sysctl": {"net.core.somaxconn": "1"},
            "resources": {
                "devices": [{"allow": false, "access": "rwm"}],
                "memory": {"limit": 1 << 26, "swap": -1},
                "cpu": {"shares": 2, "quota": 100_000, "period": 50_000, "cpus": "0-1,3", "mems": "0"},
                "pids": {"limit": 10}, "blockIO": {"weight": 10},
            },
            "seccomp": {"defaultAction": "SCMP_ACT_ERRNO", "syscalls": [{"names": ["read"], "action": "SCMP_ACT_ALLOW"}]},
            "maskedPaths": ["/proc/kcore"], "readonlyPaths": ["/proc/sys"],
        },
    });
    for _ in 0..u.int_in_range(1..=6)? {
        spoil(&mut config, u)?;
    }
    Ok(config)
}

/// Goes down to some place, and puts something else there.
fn spoil(value: &mut Value, u: &mut Unstructured<'_>) -> Result<()> {
    let length = match &*value {
        Value::Object(fields) => fields.len(),
        Value::Array(items) => items.len(),
        _ => 0,
    };
    if length == 0 || u.ratio(1, 8)? {
        *value = other(u)?;
        return Ok(());
    }
    let index = u.choose_index(length)?;
    let chosen = match value {
        Value::Object(fields) if u.ratio(1, 16)? => {
            let name = fields.keys().nth(index).cloned().unwrap_or_default();
            fields.remove(&name);
            return Ok(());
        }
        Value::Object(fields) => fields.values_mut().nth(index),
        Value::Array(items) if u.ratio(1, 16)? => {
            let again = items[index].clone();
            items.push(again);
            return Ok(());
        }
        Value::Array(items) => items.get_mut(index),
        _ => None,
    };
    chosen.map_or(Ok(()), |chosen| spoil(chosen, u))
}

fn other(u: &mut Unstructured<'_>) -> Result<Value> {
    Ok(match u.int_in_range(0..=6)? {
        0 => Value::Null,
        1 => json!(u.arbitrary::<bool>()?),
        2 => json!(*u.choose(&NUMBERS)?),
        3 => json!(u.arbitrary::<u64>()?),
        4 => json!(u.arbitrary::<String>()?),
        5 => json!([*u.choose(&WORDS)?, *u.choose(&WORDS)?]),
        _ => json!(*u.choose(&WORDS)?),
    })
}
