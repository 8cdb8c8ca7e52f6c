//! Containers whose users are others outside, and mounts whose files' owners are others inside.

use std::fs;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _, chown};
use std::path::Path;

use anyhow::{Context as _, Result, ensure};
use conformance::bundle::{Bundle, Hand};
use conformance::enclosure::Enclosure;
use conformance::suite::expect_equal;
use conformance::{Case, Cmd, Outcome, Terminal, case, image};
use serde_json::{Value, json};
use tempfile::TempDir;

pub(crate) fn cases() -> Vec<Case<Hand>> {
    vec![
        case!(root_is_another_outside).tcg(),
        case!(its_file_systems_are_there),
        case!(its_devices_are_there),
        case!(its_limits_and_parameters_are_set),
        case!(its_network_is_its_own),
        case!(its_first_process_is_a_user),
        case!(its_read_only_parts_are_so),
        case!(its_terminal_is_its_users),
        case!(its_cgroup_can_be_managed),
        case!(further_processes_are_in_it),
        case!(nodes_are_made_for_it),
        case!(a_mount_has_its_own_mapping),
        case!(a_mount_has_the_containers_mapping),
        case!(a_mount_that_cannot_be_mapped_is_named),
    ]
}

/// What root is outside.
const ROOT: u32 = 100_000;

/// A bundle with a user namespace; its root file system is where every user of the host may go.
struct Mapped<'a> {
    bundle: Bundle<'a>,
    _root: TempDir,
}

fn mapped<'a>(h: &'a Hand, command: &[&str], change: impl FnOnce(&mut Value)) -> Result<Mapped<'a>> {
    let enclosure = Enclosure::around().context("the suite runs in an enclosure")?;
    let folder = tempfile::Builder::new().prefix("root-").tempdir_in(enclosure.sockets())?;
    fs::set_permissions(folder.path(), fs::Permissions::from_mode(0o755))?;
    let root = folder.path().join("rootfs");
    image::unpack(image::BUSYBOX, &root)?;
    Cmd::new("chown").args(["-hR", &format!("{ROOT}:{ROOT}")]).arg(&root).ok()?;
    let bundle = h.bundle_with(command, |config| {
        config["root"]["path"] = json!(root);
        let mapping = json!([{ "containerID": 0, "hostID": ROOT, "size": 65_536 }]);
        config["linux"]["uidMappings"] = mapping.clone();
        config["linux"]["gidMappings"] = mapping;
        add(config, "/linux/namespaces", json!({ "type": "user" }));
        change(config);
    })?;
    Ok(Mapped { bundle, _root: folder })
}

fn add(config: &mut Value, list: &str, item: Value) {
    if let Some(list) = config.pointer_mut(list).and_then(Value::as_array_mut) {
        list.push(item);
    }
}

impl Mapped<'_> {
    /// The owner of a file of the container, on the host.
    fn owner(&self, path: &str) -> Result<(u32, u32)> {
        let path = self._root.path().join("rootfs").join(path);
        let data = fs::symlink_metadata(&path).with_context(|| format!("there is no {}", path.display()))?;
        Ok((data.uid(), data.gid()))
    }
}

/// What it prints, which is the same with any runtime, and how it ends.
fn seen(mapped: &Mapped<'_>) -> Result<Outcome> {
    Ok(Outcome::new().see_output("run", &mapped.bundle.run().run()?))
}

fn root_is_another_outside(h: &Hand) -> Result<Outcome> {
    let script = "cat /proc/self/uid_map /proc/self/gid_map /proc/self/setgroups | tr -s ' '; id; stat -c '%u:%g' / /bin
        echo x >/made; chown 5:6 /made; mkdir /folder; chown 1000 /folder; echo x >/folder/file; stat -c %u:%g /folder/file
        echo again >/dev/stdout; chown 70000 /made || echo no such user";
    let mapped = mapped(h, &["sh", "-c", script], |config| {
        config["process"]["capabilities"] = json!({});
        for set in ["bounding", "effective", "permitted"] {
            config["process"]["capabilities"][set] = json!(["CAP_CHOWN", "CAP_DAC_OVERRIDE", "CAP_FOWNER"]);
        }
    })?;
    let outcome = seen(&mapped)?;
    expect_equal("the owner outside", mapped.owner("made")?, (ROOT + 5, ROOT + 6))?;
    expect_equal("of the folder", mapped.owner("folder")?, (ROOT + 1000, ROOT))?;
    expect_equal("of what is in it", mapped.owner("folder/file")?, (ROOT, ROOT))?;
    Ok(outcome)
}

fn its_file_systems_are_there(h: &Hand) -> Result<Outcome> {
    let script = "grep -E ' (/proc|/dev|/dev/pts|/dev/shm|/dev/mqueue|/sys|/t) ' /proc/self/mounts | cut -d' ' -f2-3
        stat -c '%n %u:%g' /proc /proc/1 /sys /dev /dev/pts /dev/shm; stat -c '%n %u' /dev/mqueue; stat -c '%n %u:%g %a' /t
        ls /sys/class/net; echo x >/dev/shm/x && echo x >/t/x && echo written";
    let mapped = mapped(h, &["sh", "-c", script], |config| {
        let options = ["uid=7", "gid=8", "mode=711"];
        add(config, "/mounts", json!({ "destination": "/t", "type": "tmpfs", "source": "tmpfs", "options": options }));
        config["process"]["capabilities"]["effective"] = json!(["CAP_DAC_OVERRIDE"]);
        config["process"]["capabilities"]["permitted"] = json!(["CAP_DAC_OVERRIDE"]);
        config["process"]["capabilities"]["bounding"] = json!(["CAP_DAC_OVERRIDE"]);
    })?;
    seen(&mapped)
}

fn its_devices_are_there(h: &Hand) -> Result<Outcome> {
    let script = "cd /dev; stat -c '%n %F %t:%T %a %u:%g' null zero full tty random urandom; ls -l | grep -c '>'
        echo x >null && head -c 3 /dev/zero | wc -c; head -c 1 /dev/kmsg || echo forbidden; mknod /n c 1 3 || echo none";
    seen(&mapped(h, &["sh", "-c", script], |config| {
        for set in ["bounding", "effective", "permitted"] {
            config["process"]["capabilities"][set] = json!(["CAP_MKNOD"]);
        }
    })?)
}

fn its_limits_and_parameters_are_set(h: &Hand) -> Result<Outcome> {
    let script = "hostname; cat /proc/self/oom_score_adj /proc/sys/kernel/msgmax /proc/sys/net/ipv4/ip_forward
        grep -E 'open files|core' /proc/self/limits | tr -s ' '; hostname other && hostname";
    let mapped = mapped(h, &["sh", "-c", script], |config| {
        config["hostname"] = json!("mapped");
        config["process"]["oomScoreAdj"] = json!(500);
        config["process"]["rlimits"] = json!([
            { "type": "RLIMIT_NOFILE", "soft": 100, "hard": 200 },
            { "type": "RLIMIT_CORE", "soft": 111, "hard": 222 },
        ]);
        config["linux"]["sysctl"] = json!({ "kernel.msgmax": "4242", "net.ipv4.ip_forward": "1" });
        for set in ["bounding", "effective", "permitted"] {
            config["process"]["capabilities"][set] = json!(["CAP_SYS_ADMIN"]);
        }
    })?;
    seen(&mapped)
}

fn its_network_is_its_own(h: &Hand) -> Result<Outcome> {
    // Only root of the user namespace in which the network's was made may do so.
    let script =
        "ip link set lo mtu 1400 && cat /sys/class/net/lo/mtu; ip address add 127.0.0.99/8 dev lo && echo added
        timeout 1 nc -l -p 80; echo $?
        ping -c 1 -q 127.0.0.1 | grep -c ' 0% packet loss'";
    let mapped = mapped(h, &["sh", "-c", script], |config| {
        let capabilities = ["CAP_NET_ADMIN", "CAP_NET_RAW", "CAP_NET_BIND_SERVICE"];
        for set in ["bounding", "effective", "permitted"] {
            config["process"]["capabilities"][set] = json!(capabilities);
        }
    })?;
    seen(&mapped)
}

fn its_first_process_is_a_user(h: &Hand) -> Result<Outcome> {
    let script =
        "id; grep -E '^(NoNewPrivs|Seccomp|CapEff)' /proc/self/status; echo out >/dev/stdout; mkdir /x || echo no
        echo x >/tmp/mine; mkdir /tmp/d || echo filtered";
    let mapped = mapped(h, &["sh", "-c", script], |config| {
        config["process"]["user"] = json!({ "uid": 1000, "gid": 50, "additionalGids": [7, 8] });
        config["process"]["noNewPrivileges"] = json!(true);
        config["linux"]["seccomp"] = json!({
            "defaultAction": "SCMP_ACT_ALLOW",
            "syscalls": [{ "names": ["mkdir"], "action": "SCMP_ACT_ERRNO" }],
        });
    })?;
    let outcome = seen(&mapped)?;
    expect_equal("the owner outside", mapped.owner("tmp/mine")?, (ROOT + 1000, ROOT + 50))?;
    Ok(outcome)
}

fn its_read_only_parts_are_so(h: &Hand) -> Result<Outcome> {
    let script =
        "touch /x || echo root; touch /made/for/it/x && echo tmpfs; cat /proc/kcore | wc -c; ls /sys/firmware | wc -l
        echo 1 >/proc/sys/kernel/domainname || echo parameters; stat -c %u:%g /made";
    let mapped = mapped(h, &["sh", "-c", script], |config| {
        config["root"]["readonly"] = json!(true);
        add(config, "/mounts", json!({ "destination": "/made/for/it", "type": "tmpfs", "source": "tmpfs" }));
    })?;
    let outcome = seen(&mapped)?;
    expect_equal("the owner of a mount point", mapped.owner("made/for")?, (ROOT, ROOT))?;
    Ok(outcome)
}

fn its_terminal_is_its_users(h: &Hand) -> Result<Outcome> {
    let script = "stat -c '%u %t' $(tty) /dev/console; id -u; echo x >/dev/tty && exit 7";
    let mapped = mapped(h, &["sh", "-c", script], |config| {
        config["process"]["terminal"] = json!(true);
        config["process"]["user"] = json!({ "uid": 1000, "gid": 1000 });
    })?;
    let run = format!("run --bundle {}", mapped.bundle.path.display());
    let (code, shown) = Terminal::open(mapped.bundle.call(&run), 33, 99)?.finish()?;
    ensure!(shown.contains("1000 88"), "the terminal is another's: {shown}");
    Ok(Outcome::new().see("exit", code).see("shown", shown))
}

fn its_cgroup_can_be_managed(h: &Hand) -> Result<Outcome> {
    if h.runtime().is_runc() {
        // It has what the host has, which may be version 1.
        return Ok(Outcome::new().see("managed", "not asked"));
    }
    let script = "cd /sys/fs/cgroup && mkdir own && echo 0 >own/cgroup.procs && cat /proc/self/cgroup
        stat -c %u . cgroup.procs memory.max";
    let mapped = mapped(h, &["sh", "-c", script], |config| {
        let mount = json!({ "destination": "/sys/fs/cgroup", "type": "cgroup", "source": "cgroup", "options": ["rw"] });
        add(config, "/mounts", mount);
        add(config, "/linux/namespaces", json!({ "type": "cgroup" }));
    })?;
    Ok(Outcome::new().see("managed", mapped.bundle.run().ok()?.text().replace('\n', " ")))
}

fn further_processes_are_in_it(h: &Hand) -> Result<Outcome> {
    let mapped = mapped(h, &["sleep", "1000"], |_| {})?;
    mapped.bundle.start()?;
    let script = "tr -s ' ' </proc/self/uid_map; id; readlink /proc/self/ns/user /proc/1/ns/user | uniq | wc -l; echo x >/dev/stdout
        touch $1";
    let root = mapped.bundle.exec("", script).args(["sh", "/by-root"]).run()?;
    let user = mapped.bundle.exec("--user 1000:50 --additional-gids 7", script).args(["sh", "/tmp/by-user"]).run()?;
    expect_equal("the owner outside", mapped.owner("by-root")?, (ROOT, ROOT))?;
    expect_equal("of a user's", mapped.owner("tmp/by-user")?, (ROOT + 1000, ROOT + 50))?;
    let on_terminal = mapped.bundle.exec("--tty --user 1000", "stat -c '%u %t' $(tty); exit 5");
    let (code, shown) = Terminal::open(on_terminal, 33, 99)?.finish()?;
    ensure!(shown.contains("1000 88"), "the terminal is another's: {shown}");
    Ok(Outcome::new().see_output("root", &root).see_output("user", &user).see("terminal", code))
}

fn nodes_are_made_for_it(h: &Hand) -> Result<Outcome> {
    if h.runtime().is_runc() {
        // It takes those of the host, by their paths.
        return Ok(Outcome::new().see("nodes", "not asked"));
    }
    let script = "cd /dev; stat -c '%n %F %t:%T %a %u:%g' own/null fifo; echo x >own/null && echo written";
    let mapped = mapped(h, &["sh", "-c", script], |config| {
        config["linux"]["devices"] = json!([
            { "path": "/dev/own/null", "type": "c", "major": 1, "minor": 3, "fileMode": 0o660, "uid": 7, "gid": 0 },
            { "path": "/dev/fifo", "type": "p", "fileMode": 0o600 },
        ]);
    })?;
    Ok(Outcome::new().see("nodes", mapped.bundle.run().ok()?.text().replace('\n', ", ")))
}

/// A folder with a file of root's and one of a user's.
fn volume(at: &Path) -> Result<()> {
    fs::create_dir_all(at)?;
    fs::set_permissions(at, fs::Permissions::from_mode(0o777))?;
    for (name, owner) in [("roots", 0), ("users", 1000)] {
        fs::write(at.join(name), name)?;
        chown(at.join(name), Some(owner), Some(owner))?;
    }
    Ok(())
}

const LIST: &str = "cd /v; stat -c '%n %u:%g' roots users; echo more >>roots; touch made; stat -c '%n %u:%g' made";

fn a_mount_has_its_own_mapping(h: &Hand) -> Result<Outcome> {
    if h.runtime().is_runc() {
        // The distribution's is older than id-mapped mounts.
        return Ok(Outcome::new().see("owners", "not asked"));
    }
    let source = h.folder().join("volume");
    volume(&source)?;
    let bundle = h.bundle_with(&["sh", "-c", LIST], |config| {
        let mapping = json!([{ "containerID": 0, "hostID": 2000, "size": 2000 }]);
        let mount = json!({ "destination": "/v", "source": source, "options": ["rbind"],
            "uidMappings": mapping, "gidMappings": mapping });
        add(config, "/mounts", mount);
        config["process"]["user"] = json!({ "uid": 2000, "gid": 2000 });
    })?;
    let output = bundle.run().ok()?;
    let made = fs::metadata(source.join("made"))?;
    expect_equal("the owner of what was made", (made.uid(), made.gid()), (0, 0))?;
    expect_equal("what was written", fs::read_to_string(source.join("roots"))?.as_str(), "rootsmore\n")?;
    Ok(Outcome::new().see("owners", output.text().replace('\n', ", ")))
}

fn a_mount_has_the_containers_mapping(h: &Hand) -> Result<Outcome> {
    if h.runtime().is_runc() {
        return Ok(Outcome::new().see("idmap", "not asked").see("ridmap", "not asked"));
    }
    let mut outcome = Outcome::new();
    for option in ["idmap", "ridmap"] {
        let source = h.folder().join(option);
        volume(&source)?;
        let mapped = mapped(h, &["sh", "-c", LIST], |config| {
            add(config, "/mounts", json!({ "destination": "/v", "source": source, "options": ["rbind", option] }));
        })?;
        let output = mapped.bundle.run().ok()?;
        expect_equal("the owner of what was made", fs::metadata(source.join("made"))?.uid(), 0)?;
        outcome = outcome.see(option, output.text().replace('\n', ", "));
    }
    Ok(outcome)
}

fn a_mount_that_cannot_be_mapped_is_named(h: &Hand) -> Result<Outcome> {
    if h.runtime().is_runc() {
        return Ok(Outcome::new().see("refused", "not asked"));
    }
    // No kernel maps the IDs of such a file system.
    let source = h.folder().join("ramfs");
    fs::create_dir(&source)?;
    Cmd::new("mount").args(["-t", "ramfs", "ramfs"]).arg(&source).ok()?;
    let mapped = mapped(h, &["true"], |config| {
        add(config, "/mounts", json!({ "destination": "/v", "source": source, "options": ["bind", "idmap"] }));
    })?;
    let output = mapped.bundle.in_background("create");
    Cmd::new("umount").arg(&source).ok()?;
    let output = output?;
    ensure!(output.code != 0 && output.stderr.contains("cannot map the IDs of"), "{}", output.stderr);
    ensure!(output.stderr.lines().count() == 1, "more than a sentence: {}", output.stderr);
    mapped.bundle.expect_no_trace()?;
    Ok(Outcome::new().see("refused", "by name"))
}
