//! The security context: users, capabilities, seccomp, privileges, kernel settings.

use std::fs;

use anyhow::{Result, ensure};
use conformance::cri::{Cri, pod_security, security, v1};
use conformance::suite::expect_equal;
use conformance::{Case, Outcome, case};

use crate::{SLEEP, number};

pub(crate) fn cases() -> Vec<Case<Cri>> {
    vec![
        case!(users_and_groups),
        case!(a_user_by_name),
        case!(capabilities),
        case!(seccomp_profiles),
        case!(no_new_privileges),
        case!(privileged),
        case!(masked_and_read_only_paths),
        case!(kernel_settings),
        case!(limits_are_seen).only_on(crate::MOST),
    ]
}

const CAPABILITIES: &str = "grep -E '^(Cap|NoNewPrivs)' /proc/self/status | tr -s '\\t' ' '";

fn users_and_groups(c: &Cri) -> Result<Outcome> {
    let pod = c.pod_with(|config| {
        pod_security(config).run_as_user = Some(number(1000));
        pod_security(config).run_as_group = Some(number(1000));
    })?;
    let script = "id -u; id -g; id -G; touch /home/user/mine && stat -c '%u %g' /home/user/mine; cat /proc/1/environ | tr '\\0' '\\n' | grep HOME";
    let container = pod.start_with("main", SLEEP, |config| {
        let context = security(config);
        context.run_as_user = Some(number(1000));
        context.run_as_group = Some(number(3000));
        context.supplemental_groups = vec![4000, 5000];
    })?;
    let output = container.sh(script)?;
    ensure!(output.stdout.starts_with("1000\n3000\n3000 "), "{}{}", output.stdout, output.stderr);
    Ok(Outcome::new().see_output("exec", &output))
}

fn a_user_by_name(c: &Cri) -> Result<Outcome> {
    let output = c.pod()?.sh_with("id", |config| security(config).run_as_username = "user".to_owned())?;
    ensure!(output.stdout.starts_with("uid=1000(user)"), "{}", output.stdout);
    Ok(Outcome::new().see_output("run", &output))
}

fn capabilities(c: &Cri) -> Result<Outcome> {
    let pod = c.pod()?;
    let mut outcome = Outcome::new().see_output("default", &pod.sh(CAPABILITIES)?);
    let names = |names: &[&str]| names.iter().map(|&name| name.to_owned()).collect::<Vec<_>>();
    for (add, drop) in [(&["NET_ADMIN"][..], &["CHOWN"][..]), (&[], &["ALL"]), (&["CHOWN"], &["ALL"])] {
        let capability =
            v1::Capability { add_capabilities: names(add), drop_capabilities: names(drop), ..Default::default() };
        let output = pod.sh_with(CAPABILITIES, |config| security(config).capabilities = Some(capability))?;
        outcome = outcome.see_output(&format!("+{add:?} -{drop:?}"), &output);
    }
    expect_equal(
        "the bounding set of what dropped all but one",
        outcome.get("+[\"CHOWN\"] -[\"ALL\"] stdout").unwrap_or_default().contains("CapBnd: 0000000000000001"),
        true,
    )?;
    Ok(outcome)
}

fn seccomp_profiles(c: &Cri) -> Result<Outcome> {
    use v1::security_profile::ProfileType;
    const SCRIPT: &str =
        "grep Seccomp: /proc/self/status | tr -s '\\t' ' '; unshare --user echo unshared; mkdir /made && echo made";
    let profile = c.folder().join("profile.json");
    let text = serde_json::json!({
        "defaultAction": "SCMP_ACT_ALLOW",
        "architectures": ["SCMP_ARCH_X86_64"],
        "syscalls": [{ "names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_ERRNO" }],
    });
    fs::write(&profile, text.to_string())?;
    let pod = c.pod()?;
    let mut outcome = Outcome::new();
    for (kind, path, unshared, made) in [
        (ProfileType::RuntimeDefault, String::new(), false, true),
        (ProfileType::Unconfined, String::new(), true, true),
        (ProfileType::Localhost, profile.display().to_string(), true, false),
    ] {
        let profile = v1::SecurityProfile { profile_type: kind.into(), localhost_ref: path };
        let output = pod.sh_with(SCRIPT, |config| security(config).seccomp = Some(profile))?;
        let seen = (output.stdout.contains("unshared"), output.stdout.contains("made"));
        expect_equal(kind.as_str_name(), seen, (unshared, made))?;
        outcome = outcome.see_output(kind.as_str_name(), &output);
    }
    Ok(outcome)
}

fn no_new_privileges(c: &Cri) -> Result<Outcome> {
    let pod = c.pod()?;
    let mut outcome = Outcome::new();
    for no_new_privs in [false, true] {
        let output = pod.sh_with("grep NoNewPrivs /proc/self/status | tr -s '\\t' ' '", |config| {
            security(config).no_new_privs = no_new_privs;
        })?;
        expect_equal("what the kernel says", output.text(), &format!("NoNewPrivs: {}", i32::from(no_new_privs)))?;
        outcome = outcome.see_output(&no_new_privs.to_string(), &output);
    }
    Ok(outcome)
}

fn privileged(c: &Cri) -> Result<Outcome> {
    let pod = c.pod_with(|config| pod_security(config).privileged = true)?;
    let script = "mount -t tmpfs none /mnt && echo mounts; ip link add rvm-dummy type bridge && echo makes links;
                  echo 1 >/proc/sys/net/ipv4/ip_forward && echo sets; grep -E '^(Seccomp|NoNewPrivs):' /proc/self/status | tr -s '\\t' ' '";
    let output = pod.sh_with(&format!("mkdir /mnt; {script}"), |config| security(config).privileged = true)?;
    ensure!(output.stdout.starts_with("mounts\nmakes links\nsets\n"), "{}{}", output.stdout, output.stderr);
    // What is done to the kernel by it is done to which?
    let release = fs::read_to_string("/proc/sys/kernel/random/boot_id")?;
    let boot = pod.sh_with("cat /proc/sys/kernel/random/boot_id", |config| security(config).privileged = true)?;
    let kernel = if boot.text() == release.trim() { "the host's" } else { "its own" };
    Ok(Outcome::new().see_output("run", &output).see("kernel", kernel))
}

fn masked_and_read_only_paths(c: &Cri) -> Result<Outcome> {
    let output = c.pod()?.sh_with(
        "wc -c </proc/timer_list; cat /proc/uptime | wc -c; echo x >/etc/passwd; echo y >/root/z && cat /root/z",
        |config| {
            security(config).masked_paths = vec!["/proc/uptime".to_owned(), "/proc/timer_list".to_owned()];
            security(config).readonly_paths = vec!["/etc".to_owned()];
        },
    )?;
    expect_equal("what is masked and what may be written", output.text(), "0\n0\ny")?;
    ensure!(output.stderr.contains("Read-only file system"), "{}", output.stderr);
    Ok(Outcome::new().see_output("run", &output))
}

fn kernel_settings(c: &Cri) -> Result<Outcome> {
    let settings =
        [("net.ipv4.ip_unprivileged_port_start", "77"), ("kernel.shm_rmid_forced", "1"), ("kernel.msgmax", "12345")];
    let pod = c.pod_with(|config| {
        let sysctls = &mut config.linux.get_or_insert_default().sysctls;
        sysctls.extend(settings.map(|(name, value)| (name.to_owned(), value.to_owned())));
    })?;
    let mut outcome = Outcome::new();
    for (name, value) in settings {
        let output = pod.sh(&format!("cat /proc/sys/{}", name.replace('.', "/")))?;
        expect_equal(name, output.text(), value)?;
        outcome = outcome.see_output(name, &output);
    }
    Ok(outcome)
}

fn limits_are_seen(c: &Cri) -> Result<Outcome> {
    let pod = c.pod()?;
    let script = "for f in /sys/fs/cgroup/memory.max /sys/fs/cgroup/memory/memory.limit_in_bytes; do [ -e $f ] && cat $f; done; true";
    let output = pod.sh_with(script, |config| crate::resources(config).memory_limit_in_bytes = 96 << 20)?;
    expect_equal("the limit in its own cgroup", output.text(), &(96 << 20).to_string())?;
    Ok(Outcome::new().see_output("run", &output))
}
