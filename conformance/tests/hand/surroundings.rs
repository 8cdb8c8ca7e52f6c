//! What a bundle asks of the world around the container: hooks, mounts, a network namespace.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use conformance::bundle::Hand;
use conformance::census::Process;
use conformance::command::eventually;
use conformance::suite::expect_equal;
use conformance::{Case, Outcome, case};
use serde_json::{Value, json};

use crate::veth::Veth;

pub(crate) fn cases() -> Vec<Case<Hand>> {
    vec![
        case!(hooks_run_in_their_order),
        case!(a_failing_hook_ends_it),
        case!(a_network_namespace_with_a_veth).tcg(),
        case!(a_veth_that_comes_after_create),
        case!(mounts_of_all_kinds),
        case!(masked_and_read_only_paths),
        case!(annotations_are_kept),
        case!(a_root_of_ones_own_for_the_records),
        case!(no_cgroup_path_at_all),
        case!(the_process_behind_it_is_confined),
        case!(an_idle_one_gives_memory_back),
    ]
}

fn hooks_run_in_their_order(h: &Hand) -> Result<Outcome> {
    let log = h.folder().join("hooks");
    let hook = |name: &str| {
        let script =
            format!("read state; echo {name} $(echo \"$state\" | grep -o '\"status\":\"[a-z]*\"') >>{}", log.display());
        json!([{ "path": "/bin/sh", "args": ["sh", "-c", script] }])
    };
    let bundle = h.bundle_with(&["true"], |config| {
        config["hooks"] = json!({
            "prestart": hook("prestart"),
            "createRuntime": hook("createRuntime"),
            "poststart": hook("poststart"),
            "poststop": hook("poststop"),
            "startContainer": [{ "path": "/bin/sh", "args": ["sh", "-c", "cat >/state-inside"] }],
        });
    })?;
    bundle.run().ok()?;
    let inside = fs::read_to_string(bundle.inside("state-inside"))?;
    ensure!(inside.contains(&bundle.id), "the hook inside got no state: {inside}");
    let order = fs::read_to_string(log)?;
    ensure!(order.lines().count() == 4, "hooks are missing: {order}");
    // By the time of poststart, runc calls a container created or running, as it happens.
    let order = order.replace("poststart \"status\":\"created\"", "poststart \"status\":\"running\"");
    Ok(Outcome::new().see("order", order))
}

fn a_failing_hook_ends_it(h: &Hand) -> Result<Outcome> {
    let bundle = h.bundle_with(&["true"], |config| {
        config["hooks"] =
            json!({ "createRuntime": [{ "path": "/bin/sh", "args": ["sh", "-c", "echo no >&2; exit 3"] }] });
    })?;
    let output = bundle.run().run()?;
    ensure!(output.stderr.contains("hook"), "the sentence does not speak of the hook: {}", output.stderr);
    bundle.expect_no_trace()?;
    Ok(Outcome::new().see("exit", output.code))
}

/// Tells of eth0, of the default route, and of who is there.
const LOOK_AROUND: &str = "cat /sys/class/net/eth0/address /sys/class/net/eth0/mtu; ip route | grep -c default;
    ping -c 1 -W 10 $(ip route | sed -n 's/default via \\([^ ]*\\).*/\\1/p') | grep -o '1 packets received'";

fn a_network_namespace_with_a_veth(h: &Hand) -> Result<Outcome> {
    let veth = Veth::make()?;
    let bundle = h.bundle_with(&["sh", "-c", LOOK_AROUND], |config| {
        may_ping(config);
        veth.give_to(config);
    })?;
    let output = bundle.run().run()?;
    let links = veth.links()?;
    veth.remove()?;
    expect_equal("what was seen", (output.text(), output.stderr.as_str()), (expected_around(&veth).as_str(), ""))?;
    Ok(Outcome::new().see("exit", output.code).see("links left in the namespace", links))
}

fn a_veth_that_comes_after_create(h: &Hand) -> Result<Outcome> {
    let bundle = h.bundle_with(&["sh", "-c", LOOK_AROUND], may_ping)?;
    bundle.create()?;
    let veth = Veth::make_for(bundle.state()?["pid"].as_u64().context("no pid")?)?;
    bundle.call("start").ok()?;
    bundle.expect_stopped()?;
    veth.remove()?;
    let seen = bundle.written("out")?;
    expect_equal("what was seen", seen.trim(), expected_around(&veth).as_str())?;
    Ok(Outcome::new().see("seen lines", seen.lines().count()))
}

fn expected_around(veth: &Veth) -> String {
    format!("{}\n1400\n1\n1 packets received", veth.mac())
}

fn may_ping(config: &mut Value) {
    for set in ["bounding", "effective", "permitted"] {
        config["process"]["capabilities"][set] = json!(["CAP_NET_RAW"]);
    }
}

fn mounts_of_all_kinds(h: &Hand) -> Result<Outcome> {
    let source = h.folder().join("source");
    fs::create_dir(&source)?;
    fs::write(source.join("file"), "bound\n")?;
    let script = "cat /bound/file /file; echo x >/bound/new; echo x >/file; echo x >/scratch/x && cat /scratch/x;
                  stat -c %a /scratch; cd /copied && echo y >inner/new && cat inner/file inner/new && stat -c '%a %u' . inner/file";
    let bundle = h.bundle_with(&["sh", "-c", script], |config| {
        let mounts = [
            json!({ "destination": "/bound", "type": "bind", "source": source, "options": ["rbind", "ro"] }),
            json!({ "destination": "/file", "type": "bind", "source": source.join("file"), "options": ["bind", "ro"] }),
            json!({ "destination": "/scratch", "type": "tmpfs", "source": "tmpfs", "options": ["mode=1770", "size=1m"] }),
            json!({ "destination": "/copied", "type": "tmpfs", "source": "tmpfs", "options": ["tmpcopyup"] }),
        ];
        config["mounts"].as_array_mut().into_iter().for_each(|list| list.extend(mounts.clone()));
    })?;
    let covered = bundle.inside("copied/inner");
    fs::create_dir_all(&covered)?;
    fs::write(covered.join("file"), "below\n")?;
    fs::set_permissions(covered.join("file"), fs::Permissions::from_mode(0o640))?;
    fs::set_permissions(bundle.inside("copied"), fs::Permissions::from_mode(0o751))?;
    std::os::unix::fs::chown(covered.join("file"), Some(7), None)?;
    let output = bundle.run().run()?;
    expect_equal("output", output.text(), "bound\nbound\nx\n1770\nbelow\ny\n751 0\n640 7")?;
    expect_equal("what is covered", fs::read_to_string(covered.join("file"))?.as_str(), "below\n")?;
    ensure!(output.stderr.matches("Read-only file system").count() == 2, "a write went through: {}", output.stderr);
    Ok(Outcome::new().see_output("run", &output))
}

fn masked_and_read_only_paths(h: &Hand) -> Result<Outcome> {
    let script = "cat /etc/passwd | wc -c; ls /home | wc -l; echo x >/etc/group; echo x >/new && cat /new";
    let bundle = h.bundle_with(&["sh", "-c", script], |config| {
        config["linux"]["maskedPaths"] = json!(["/etc/passwd", "/home", "/not/there"]);
        config["linux"]["readonlyPaths"] = json!(["/etc/group", "/not/there"]);
    })?;
    let output = bundle.run().run()?;
    expect_equal("output", output.text(), "0\n0\nx")?;
    Ok(Outcome::new().see_output("run", &output))
}

fn annotations_are_kept(h: &Hand) -> Result<Outcome> {
    let bundle = h.bundle_with(&["true"], |config| config["annotations"] = json!({ "org.example.note": "kept" }))?;
    bundle.create()?;
    let note: Value = bundle.state()?["annotations"]["org.example.note"].clone();
    expect_equal("annotation", note.as_str(), Some("kept"))?;
    Ok(Outcome::new().see("note", note))
}

fn a_root_of_ones_own_for_the_records(h: &Hand) -> Result<Outcome> {
    let root = h.folder().join("records");
    let bundle = h.bundle("sleep 1000")?;
    let words = format!("--root {}", root.display());
    bundle.in_background(&format!("{words} run --detach"))?;
    let known = bundle.call(&format!("{words} state")).run()?;
    let elsewhere = bundle.call("state").run()?;
    bundle.call(&format!("{words} delete --force")).ok()?;
    expect_equal("codes", (known.code, elsewhere.code), (0, 1))?;
    let left = fs::read_dir(root)?.count();
    Ok(Outcome::new().see("known", known.code).see("elsewhere", elsewhere.code).see("records left", left))
}

fn no_cgroup_path_at_all(h: &Hand) -> Result<Outcome> {
    let bundle = h.bundle_with(&["sleep", "1000"], |config| {
        config["linux"].as_object_mut().and_then(|linux| linux.remove("cgroupsPath"));
    })?;
    bundle.start()?;
    let status = bundle.status()?;
    bundle.call("delete --force").ok()?;
    bundle.expect_no_trace()?;
    Ok(Outcome::new().see("status", status))
}

/// What is exposed to the container: with runc its own process, else the one that is its machine.
fn the_process_behind_it_is_confined(h: &Hand) -> Result<Outcome> {
    let bundle = h.bundle("echo ready; sleep 1000")?;
    bundle.start()?;
    bundle.expect_written("ready")?;
    let family = bundle.family()?;
    let exposed = if h.runtime().is_runc() {
        family.first()
    } else {
        family.iter().find(|process| process.line.ends_with(" vm"))
    };
    let exposed = exposed.context("no process is the machine")?;
    let mut outcome = Outcome::new();
    for thread in fs::read_dir(format!("/proc/{}/task", exposed.pid))? {
        let thread = thread?.path();
        let status = fs::read_to_string(thread.join("status"))?;
        let field = |name: &str| {
            let line = status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
            line.map(|value| value.trim().to_owned()).with_context(|| format!("no {name} in {status}"))
        };
        outcome = outcome.see("new privileges are forbidden", field("NoNewPrivs")?);
        if h.runtime().is_runc() {
            continue;
        }
        expect_equal(&format!("the filter of\n{status}"), field("Seccomp")?.as_str(), "2")?;
        // A processor serves the guest's files itself, and leaves what takes long to the file system's thread. KVM's own
        // thread, which never leaves the host's kernel, is a processor's child.
        let name = field("Name")?;
        if !["filesystem", "vcpu", "kvm-nx"].iter().any(|serves| name.starts_with(serves)) {
            expect_equal(&format!("the capabilities of\n{status}"), u64::from_str_radix(&field("CapPrm")?, 16)?, 0)?;
        }
    }
    if !h.runtime().is_runc() {
        nothing_of_the_host_is_in_reach(exposed.pid, &bundle.id)?;
    }
    bundle.call("delete --force").ok()?;
    Ok(outcome)
}

fn an_idle_one_gives_memory_back(h: &Hand) -> Result<Outcome> {
    let bundle = h.bundle("echo ready; sleep 1000")?;
    bundle.start()?;
    bundle.expect_written("ready")?;
    let sum = || bundle.exec("", "cat /bin/busybox | md5sum").ok().map(|output| output.stdout);
    let before = sum()?;
    let pid = bundle.state()?["pid"].as_i64().context("the state has a PID")?;
    eventually(Duration::from_secs(60), "less than 32 MiB of an idle container", || {
        let all = Process::all()?;
        let first = all.iter().find(|process| i64::from(process.pid) == pid).context("the first process is there")?;
        let sum: u64 = first.family(&all).into_iter().filter_map(Process::pss).sum();
        Ok((sum > 0 && sum < 32 << 20).then_some(()))
    })?;
    let after = sum()?;
    bundle.call("delete --force").ok()?;
    Ok(Outcome::new().see("reads the same as before", after == before))
}

fn nothing_of_the_host_is_in_reach(pid: i32, id: &str) -> Result<()> {
    for namespace in ["mnt", "net", "ipc", "uts"] {
        let of = |pid: &str| fs::read_link(format!("/proc/{pid}/ns/{namespace}"));
        ensure!(of(&pid.to_string())? != of("self")?, "it is in our namespace {namespace}");
    }
    let root = fs::read_dir(format!("/proc/{pid}/root"))?.map(|entry| Ok(entry?.file_name()));
    expect_equal("its file system", root.collect::<std::io::Result<Vec<_>>>()?, vec!["rootfs".into()])?;
    for descriptor in fs::read_dir(format!("/proc/{pid}/fd"))? {
        // What has been closed since is of no interest.
        let Ok(target) = fs::read_link(descriptor?.path()) else { continue };
        let ours = Path::new("/rootfs").join(id);
        let known = !target.is_absolute()
            || target.starts_with(ours)
            || ["/", "/rootfs", "/dev/null", "/dev/net/tun"].iter().any(|known| target == Path::new(known));
        ensure!(known, "{} is open", target.display());
    }
    Ok(())
}
