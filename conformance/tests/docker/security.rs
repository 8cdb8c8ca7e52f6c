//! What a process may do: user, capabilities, seccomp, limits of the kernel's.

use anyhow::{Result, ensure};
use conformance::docker::Docker;
use conformance::suite::expect_equal;
use conformance::{Case, Outcome, case};

pub(crate) fn cases() -> Vec<Case<Docker>> {
    vec![
        case!(the_process_has_its_user_and_groups).tcg(),
        case!(a_user_by_name),
        case!(capabilities_are_dockers_by_default).tcg(),
        case!(a_dropped_capability_is_missed),
        case!(an_added_capability_works),
        case!(a_user_that_is_not_root_has_no_capabilities),
        case!(the_default_profile_denies).tcg(),
        case!(an_unconfined_process_may),
        case!(a_profile_of_ones_own_denies),
        case!(no_new_privileges_holds),
        case!(paths_are_masked_and_read_only),
        case!(a_privileged_process_may_mount),
        case!(only_the_usual_devices_are_there),
        case!(limits_of_the_process),
        case!(a_sysctl_is_set),
        case!(own_namespaces),
    ]
}

fn the_process_has_its_user_and_groups(d: &Docker) -> Result<Outcome> {
    let script =
        "grep -E '^(Uid|Gid|Groups)' /proc/self/status | tr -s '\\t ' ' '; touch /tmp/mine; stat -c '%u %g' /tmp/mine";
    let output = d.sh("--user 1000:50 --group-add 4321", script).run()?;
    ensure!(output.stdout.starts_with("Uid: 1000 1000 1000 1000\nGid: 50 50 50 50\n"), "{}", output.stdout);
    Ok(Outcome::new().see_output("run", &output))
}

fn a_user_by_name(d: &Docker) -> Result<Outcome> {
    let output = d.sh("--user user", "id; echo $HOME").run()?;
    ensure!(output.stdout.contains("uid=1000(user)"), "{}", output.stdout);
    Ok(Outcome::new().see_output("run", &output))
}

const CAPABILITIES: &str = "grep -E '^(Cap|NoNewPrivs|Seccomp:)' /proc/self/status | tr -s '\\t' ' '";

fn capabilities_are_dockers_by_default(d: &Docker) -> Result<Outcome> {
    let output = d.sh("", CAPABILITIES).run()?;
    ensure!(output.stdout.contains("CapEff: 00000000a80425fb"), "{}", output.stdout);
    ensure!(output.stdout.contains("Seccomp: 2"), "no filter: {}", output.stdout);
    Ok(Outcome::new().see_output("run", &output))
}

fn a_dropped_capability_is_missed(d: &Docker) -> Result<Outcome> {
    let one = d.sh("--cap-drop CHOWN", &format!("{CAPABILITIES}; chown 1:1 /etc/passwd")).run()?;
    ensure!(one.stderr.contains("Operation not permitted"), "chown went through: {}", one.stderr);
    let all = d.sh("--cap-drop ALL", CAPABILITIES).run()?;
    ensure!(all.stdout.contains("CapEff: 0000000000000000"), "{}", all.stdout);
    Ok(Outcome::new().see_output("one", &one).see_output("all", &all))
}

fn an_added_capability_works(d: &Docker) -> Result<Outcome> {
    let script = format!("{CAPABILITIES}; ip link set lo mtu 20000 && cat /sys/class/net/lo/mtu");
    let without = d.sh("", &script).run()?;
    ensure!(without.stderr.contains("Operation not permitted"), "it went through without: {}", without.stderr);
    let with = d.sh("--cap-add NET_ADMIN", &script).run()?;
    ensure!(with.stdout.ends_with("20000\n"), "it does not work: {}{}", with.stdout, with.stderr);
    Ok(Outcome::new().see_output("without", &without).see_output("with", &with))
}

fn a_user_that_is_not_root_has_no_capabilities(d: &Docker) -> Result<Outcome> {
    let output = d.sh("--user 1000", &format!("{CAPABILITIES}; cat /etc/shadow; echo x >/etc/passwd")).run()?;
    ensure!(output.stdout.contains("CapEff: 0000000000000000"), "{}", output.stdout);
    Ok(Outcome::new().see_output("run", &output))
}

/// A system call that Docker's profile denies and the kernel alone allows to anyone.
const DENIED: &[&str] = &["unshare", "--user", "echo", "unshared"];

fn the_default_profile_denies(d: &Docker) -> Result<Outcome> {
    let output = d.run("--user 1000", DENIED).run()?;
    ensure!(output.stderr.contains("Operation not permitted"), "{}{}", output.stdout, output.stderr);
    Ok(Outcome::new().see_output("run", &output))
}

fn an_unconfined_process_may(d: &Docker) -> Result<Outcome> {
    let output = d.run("--user 1000 --security-opt seccomp=unconfined", DENIED).run()?;
    expect_equal("output", output.text(), "unshared")?;
    let status = d.sh("--security-opt seccomp=unconfined", CAPABILITIES).run()?;
    ensure!(status.stdout.contains("Seccomp: 0"), "{}", status.stdout);
    Ok(Outcome::new().see_output("run", &output).see_output("status", &status))
}

fn a_profile_of_ones_own_denies(d: &Docker) -> Result<Outcome> {
    let profile = r#"{
        "defaultAction": "SCMP_ACT_ALLOW",
        "architectures": ["SCMP_ARCH_X86_64"],
        "syscalls": [
            {"names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_ERRNO", "errnoRet": 28},
            {"names": ["kill"], "action": "SCMP_ACT_ERRNO", "errnoRet": 1,
             "args": [{"index": 1, "value": 10, "op": "SCMP_CMP_EQ"}]}
        ]}"#;
    let profile = d.file("profile.json", profile)?;
    let script = "mkdir /tmp/a; kill -USR1 $$; trap 'echo got usr2' USR2; kill -USR2 $$; unshare --user echo unshared";
    let output = d.sh(&format!("--security-opt seccomp={profile}"), script).run()?;
    ensure!(output.stderr.contains("No space left on device"), "mkdir is not denied as asked: {}", output.stderr);
    expect_equal("what is allowed", output.text(), "got usr2\nunshared")?;
    Ok(Outcome::new().see_output("run", &output))
}

fn no_new_privileges_holds(d: &Docker) -> Result<Outcome> {
    // A set-user-ID program gives a user root's identity, unless that is forbidden.
    let image = d.name("suid");
    let container = d.start_sh("", "mkdir /suid && cp /bin/busybox /suid/busybox && chmod 4755 /suid/busybox")?;
    expect_equal("preparation", container.wait()?, 0)?;
    container.docker("commit").arg(&image).ok()?;
    let ask = |option: &str| {
        let run = d.docker("run --rm --user 1000 --runtime").arg(d.runtime_name()).args(option.split_whitespace());
        run.args([
            &image,
            "/suid/busybox",
            "sh",
            "-c",
            "grep -E '^(Uid|NoNewPrivs)' /proc/self/status | tr -s '\\t' ' '",
        ])
        .run()
    };
    let without = ask("")?;
    let with = ask("--security-opt no-new-privileges")?;
    ensure!(with.stdout.contains("NoNewPrivs: 1"), "{}{}", with.stdout, with.stderr);
    Ok(Outcome::new().see_output("without", &without).see_output("with", &with))
}

fn paths_are_masked_and_read_only(d: &Docker) -> Result<Outcome> {
    let script = "for path in /proc/kcore /proc/keys /proc/timer_list; do [ -e $path ] && head -c 1 $path; done;
                  ls /sys/firmware | wc -l;
                  echo 51 >/proc/sys/vm/overcommit_ratio; mkdir /sys/kernel/x;
                  cd /sys/fs/cgroup; [ ! -d memory ] || cd memory; mkdir x; true";
    let output = d.sh("", script).run()?;
    ensure!(output.stderr.matches("Read-only file system").count() == 3, "a write went through: {}", output.stderr);
    expect_equal("what is masked", output.text(), "0")?;
    Ok(Outcome::new().see_output("run", &output))
}

fn a_privileged_process_may_mount(d: &Docker) -> Result<Outcome> {
    let script = "mount -t tmpfs none /mnt && grep -c ' /mnt tmpfs' /proc/mounts; ip link add dummy type bridge && ip link delete dummy && echo link; echo 0 >/proc/sys/net/ipv4/ip_forward && echo sysctl";
    let without = d.sh("", &format!("mkdir -p /mnt; {script}")).run()?;
    ensure!(without.text().is_empty(), "it went through without: {}", without.stdout);
    let with = d.sh("--privileged", &format!("mkdir -p /mnt; {script}")).run()?;
    expect_equal("with", with.text(), "1\nlink\nsysctl")?;
    Ok(Outcome::new().see("without", without.stdout).see_output("with", &with))
}

fn only_the_usual_devices_are_there(d: &Docker) -> Result<Outcome> {
    let script = "ls /dev | sort | tr '\\n' ' '; echo; echo x >/dev/null && head -c 4 /dev/zero | wc -c && head -c 4 /dev/urandom | wc -c;
                  mknod /tmp/disk b 254 0 && head -c 1 /tmp/disk; echo x >/dev/full";
    let output = d.sh("", script).run()?;
    ensure!(output.stderr.contains("/tmp/disk: Operation not permitted"), "the disk is readable: {}", output.stderr);
    Ok(Outcome::new().see_output("run", &output))
}

fn limits_of_the_process(d: &Docker) -> Result<Outcome> {
    let options = "--ulimit nofile=123:456 --ulimit core=0 --ulimit nproc=77:88";
    let output =
        d.sh(options, "ulimit -Sn; ulimit -Hn; ulimit -c; grep -E 'processes' /proc/self/limits | tr -s ' '").run()?;
    ensure!(output.stdout.starts_with("123\n456\n0\n"), "{}", output.stdout);
    Ok(Outcome::new().see_output("run", &output))
}

fn a_sysctl_is_set(d: &Docker) -> Result<Outcome> {
    let options = "--sysctl net.ipv4.ip_unprivileged_port_start=4000 --sysctl kernel.shmmax=123456789 --sysctl net.ipv4.ip_forward=0";
    let script =
        "cat /proc/sys/net/ipv4/ip_unprivileged_port_start /proc/sys/kernel/shmmax /proc/sys/net/ipv4/ip_forward";
    let output = d.sh(options, script).run()?;
    expect_equal("values", output.text(), "4000\n123456789\n0")?;
    Ok(Outcome::new().see_output("run", &output))
}

fn own_namespaces(d: &Docker) -> Result<Outcome> {
    let script = "echo $$; set -- /proc/[0-9]*; echo $#; hostname";
    let output = d.sh("--hostname own", script).run()?;
    ensure!(output.stdout == "1\n1\nown\n", "{}", output.stdout);
    Ok(Outcome::new().see_output("run", &output))
}
