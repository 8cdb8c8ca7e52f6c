//! What a container finds: files, its user, what it may do.

use std::os::unix::fs::MetadataExt;

use anyhow::{Result, ensure};
use conformance::podman::Podman;
use conformance::suite::expect_equal;
use conformance::{Case, Outcome, case};

pub(crate) fn cases() -> Vec<Case<Podman>> {
    vec![
        case!(a_folder_is_shared_both_ways).tcg(),
        case!(a_read_only_volume_cannot_be_written),
        case!(a_named_volume_outlives_its_container),
        case!(a_tmpfs_has_its_size),
        case!(a_read_only_root_cannot_be_written),
        case!(a_secret_is_a_file_or_a_variable),
        case!(the_process_has_its_user_and_groups),
        case!(capabilities_are_podmans),
        case!(the_default_profile_denies),
        case!(a_profile_of_ones_own_denies),
        case!(a_privileged_process_may_mount),
        case!(an_init_stands_before_the_program),
        case!(environment_and_labels),
    ]
}

fn a_folder_is_shared_both_ways(p: &Podman) -> Result<Outcome> {
    p.file("from-host", "from the host\n")?;
    let options = format!("--volume {}:/shared", p.folder().display());
    let script = "cat /shared/from-host; echo from inside >/shared/from-inside; chown 5:6 /shared/from-inside";
    let output = p.sh(&options, script).run()?;
    expect_equal("inside", output.text(), "from the host")?;
    let written = p.folder().join("from-inside");
    expect_equal("outside", std::fs::read_to_string(&written)?.as_str(), "from inside\n")?;
    let owner = std::fs::metadata(&written)?;
    expect_equal("owner", (owner.uid(), owner.gid()), (5, 6))?;
    Ok(Outcome::new().see_output("run", &output))
}

fn a_read_only_volume_cannot_be_written(p: &Podman) -> Result<Outcome> {
    let file = p.file("kept", "kept\n")?;
    let options = format!("--volume {}:/shared:ro --volume {file}:/one:ro", p.folder().display());
    let output = p.sh(&options, "cat /shared/kept /one; echo x >/shared/new; echo x >/one").run()?;
    ensure!(output.stderr.matches("Read-only file system").count() == 2, "a write went through: {}", output.stderr);
    Ok(Outcome::new().see_output("run", &output))
}

fn a_named_volume_outlives_its_container(p: &Podman) -> Result<Outcome> {
    let volume = p.volume()?;
    // A volume begins with what the image has in its place.
    p.sh(&format!("--volume {volume}:/etc"), "echo kept >/etc/kept").ok()?;
    let output = p.sh(&format!("--volume {volume}:/data:ro"), "cat /data/kept; ls /data/passwd").run()?;
    expect_equal("output", output.text(), "kept\n/data/passwd")?;
    Ok(Outcome::new().see_output("run", &output))
}

fn a_tmpfs_has_its_size(p: &Podman) -> Result<Outcome> {
    let script = "df -k /t | tail -n 1 | awk '{ print $2 }'; stat -c %a /t; echo x >/t/x; cat /t/x";
    let output = p.sh("--tmpfs /t:size=8m,mode=1770", script).run()?;
    expect_equal("tmpfs", output.text(), "8192\n1770\nx")?;
    Ok(Outcome::new().see_output("run", &output))
}

fn a_read_only_root_cannot_be_written(p: &Podman) -> Result<Outcome> {
    // Podman mounts a tmpfs where programs expect to be able to write.
    let output = p.sh("--read-only", "echo x >/new; echo x >/tmp/new && cat /tmp/new").run()?;
    ensure!(output.stderr.contains("Read-only file system"), "a write went through: {}", output.stderr);
    expect_equal("what is writable", output.text(), "x")?;
    Ok(Outcome::new().see_output("run", &output))
}

fn a_secret_is_a_file_or_a_variable(p: &Podman) -> Result<Outcome> {
    let (name, file) = (p.name("secret"), p.file("secret", "whispered")?);
    p.podman("secret create").args([&name, &file]).ok()?;
    let options = format!("--secret {name},mode=0400,uid=1000 --secret {name},type=env,target=WORD --user 1000");
    let output = p.sh(&options, &format!("cat /run/secrets/{name}; echo; echo $WORD")).run();
    p.podman("secret rm").arg(&name).ok()?;
    let output = output?;
    expect_equal("secret", output.text(), "whispered\nwhispered")?;
    Ok(Outcome::new().see_output("run", &output))
}

fn the_process_has_its_user_and_groups(p: &Podman) -> Result<Outcome> {
    let script = "grep -E '^(Uid|Gid|Groups)' /proc/self/status | tr -s '\\t ' ' '; pwd";
    let output = p.sh("--user 1000:50 --group-add 4321 --workdir /home/user", script).run()?;
    ensure!(output.stdout.starts_with("Uid: 1000 1000 1000 1000\nGid: 50 50 50 50\n"), "{}", output.stdout);
    let named = p.sh("--user user", "id -u; echo $HOME").run()?;
    expect_equal("user by name", named.text(), "1000\n/home/user")?;
    Ok(Outcome::new().see_output("by number", &output).see_output("by name", &named))
}

const CAPABILITIES: &str = "grep -E '^(Cap|NoNewPrivs|Seccomp:)' /proc/self/status | tr -s '\\t' ' '";

fn capabilities_are_podmans(p: &Podman) -> Result<Outcome> {
    let usual = p.sh("", CAPABILITIES).run()?;
    ensure!(usual.stdout.contains("Seccomp: 2"), "no filter: {}", usual.stdout);
    let none = p.sh("--cap-drop all --security-opt no-new-privileges", CAPABILITIES).run()?;
    ensure!(none.stdout.contains("CapEff: 0000000000000000\n"), "{}", none.stdout);
    let more = p.sh("--cap-add net_admin", "ip link set lo mtu 20000 && cat /sys/class/net/lo/mtu").run()?;
    expect_equal("an added capability's work", more.text(), "20000")?;
    Ok(Outcome::new().see_output("usual", &usual).see_output("none", &none).see_output("more", &more))
}

fn the_default_profile_denies(p: &Podman) -> Result<Outcome> {
    // Root without CAP_SYS_ADMIN: the filter says no before the kernel has to.
    let script = "unshare --uts true && echo unshared; mount -t tmpfs none /mnt && echo mounted";
    let output = p.sh("", script).run()?;
    expect_equal("what was allowed", output.text(), "")?;
    let without = p.sh("--user 1000 --security-opt seccomp=unconfined", CAPABILITIES).run()?;
    ensure!(without.stdout.contains("Seccomp: 0"), "{}", without.stdout);
    Ok(Outcome::new().see_output("run", &output).see_output("without", &without))
}

fn a_profile_of_ones_own_denies(p: &Podman) -> Result<Outcome> {
    let profile = r#"{
        "defaultAction": "SCMP_ACT_ALLOW",
        "architectures": ["SCMP_ARCH_X86_64"],
        "syscalls": [{"names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_ERRNO", "errnoRet": 28}]}"#;
    let profile = p.file("profile.json", profile)?;
    let output = p.sh(&format!("--security-opt seccomp={profile}"), "mkdir /tmp/a; echo goes on").run()?;
    ensure!(output.stderr.contains("No space left on device"), "mkdir is not denied as asked: {}", output.stderr);
    Ok(Outcome::new().see_output("run", &output))
}

fn a_privileged_process_may_mount(p: &Podman) -> Result<Outcome> {
    let script = "mkdir /mnt && mount -t tmpfs none /mnt && grep -c ' /mnt tmpfs' /proc/mounts; echo 0 >/proc/sys/net/ipv4/ip_forward && echo sysctl";
    let output = p.sh("--privileged", script).run()?;
    expect_equal("what it could do", output.text(), "1\nsysctl")?;
    Ok(Outcome::new().see_output("run", &output))
}

fn an_init_stands_before_the_program(p: &Podman) -> Result<Outcome> {
    let output = p.sh("--init", "tr '\\0' ' ' </proc/1/cmdline | cut -d ' ' -f 1; exit 3").run()?;
    expect_equal("first process and code", (output.text(), output.code), ("/run/podman-init", 3))?;
    Ok(Outcome::new().see_output("run", &output))
}

fn environment_and_labels(p: &Podman) -> Result<Outcome> {
    let container = p.start(
        "--env ONE=1 --env EMPTY= --label key=value",
        &["sh", "-c", "env | grep -v -e HOSTNAME -e SHLVL | sort"],
    )?;
    container.wait()?;
    let logs = container.podman("logs").ok()?;
    ensure!(logs.stdout.contains("ONE=1\n"), "{}", logs.stdout);
    Ok(Outcome::new().see_output("env", &logs).see("label", container.inspect("{{index .Config.Labels \"key\"}}")?))
}
