//! Volumes, as the kubelet hands them on: folders and files of the host's.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown, symlink};
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use conformance::command::eventually;
use conformance::cri::{Cri, security};
use conformance::suite::expect_equal;
use conformance::{Case, Outcome, case};
use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};

use crate::{SLEEP, bind};

/// Nothing takes so long in a test that passes.
const PATIENCE: Duration = Duration::from_secs(30);

pub(crate) fn cases() -> Vec<Case<Cri>> {
    vec![
        case!(an_empty_dir_is_shared),
        case!(an_empty_dir_in_memory_is_shared),
        case!(a_folder_of_the_host),
        case!(a_read_only_folder_of_the_host),
        case!(a_config_map_is_replaced),
        case!(a_single_file),
        case!(a_sub_path).only_on(crate::MOST),
        case!(a_volume_of_a_group),
        case!(a_read_only_root),
        case!(a_volume_outlives_its_containers).only_on(crate::MOST),
    ]
}

fn folder(c: &Cri, name: &str) -> Result<std::path::PathBuf> {
    let folder = c.folder().join(name);
    fs::create_dir(&folder)?;
    fs::set_permissions(&folder, fs::Permissions::from_mode(0o777))?;
    Ok(folder)
}

/// Two containers and the host write in turns, and the containers see at once what another wrote.
fn written_by_all(c: &Cri, volume: &Path) -> Result<Outcome> {
    let pod = c.pod()?;
    let start = |name| pod.start_with(name, SLEEP, |config| config.mounts = vec![bind(volume, "/volume")]);
    let (one, two) = (start("one")?, start("two")?);
    let file = volume.join("file");
    for turn in 0..10 {
        one.sh(&format!("echo one {turn} >/volume/file"))?;
        expect_equal("what the other sees", two.sh("cat /volume/file")?.text(), &format!("one {turn}"))?;
        expect_equal("what the host sees", fs::read_to_string(&file)?.trim(), &format!("one {turn}"))?;
        two.sh(&format!("echo two {turn} >/volume/new; mv /volume/new /volume/file"))?;
        expect_equal("what the first sees", one.sh("cat /volume/file")?.text(), &format!("two {turn}"))?;
        fs::write(&file, format!("host {turn}"))?;
        // What a guest knows of a file that it may change itself it may believe for a second.
        let written = format!("host {turn}");
        eventually(PATIENCE, "what the host wrote", || {
            Ok((one.sh("cat /volume/file")?.text() == written).then_some(()))
        })?;
        two.sh("rm /volume/file")?;
        ensure!(!file.exists() && one.sh("test -e /volume/file")?.code != 0, "a removed file is still seen");
    }
    // Appending by two at a time loses nothing.
    let append = |name: &str| format!("for i in $(seq 200); do echo {name} $i >>/volume/log; done");
    std::thread::scope(|scope| -> Result<()> {
        let other = scope.spawn(|| two.sh(&append("two")));
        one.sh(&append("one"))?;
        other.join().ok().context("a thread panicked")?.map(drop)
    })?;
    let lines = fs::read_to_string(volume.join("log"))?.lines().count();
    expect_equal("lines of both", lines, 400)?;
    Ok(Outcome::new().see("lines", lines))
}

fn an_empty_dir_is_shared(c: &Cri) -> Result<Outcome> {
    written_by_all(c, &folder(c, "empty-dir")?)
}

fn an_empty_dir_in_memory_is_shared(c: &Cri) -> Result<Outcome> {
    let volume = folder(c, "empty-dir")?;
    mount("tmpfs", &volume, "tmpfs", MountFlags::empty(), Some(c"size=16m,mode=1777"))?;
    let outcome = written_by_all(c, &volume);
    let unmounted = unmount(&volume, UnmountFlags::DETACH);
    let outcome = outcome?;
    unmounted?;
    Ok(outcome)
}

fn a_folder_of_the_host(c: &Cri) -> Result<Outcome> {
    let volume = folder(c, "volume")?;
    fs::write(volume.join("file"), "of the host\n")?;
    let script =
        "cat /mounted/file; mkdir /mounted/new; echo of the container >/mounted/new/file; chmod 640 /mounted/new/file;
                  chown 12:34 /mounted/new/file; ln -s file /mounted/new/link; stat -c '%a %u %g' /mounted/new/file";
    let output = c.pod()?.sh_with(script, |config| config.mounts = vec![bind(&volume, "/mounted")])?;
    expect_equal("output", output.text(), "of the host\n640 12 34")?;
    let file = volume.join("new/file").metadata()?;
    expect_equal("mode and owner", (file.mode() & 0o777, file.uid(), file.gid()), (0o640, 12, 34))?;
    expect_equal("link", fs::read_link(volume.join("new/link"))?.to_str(), Some("file"))?;
    Ok(Outcome::new().see_output("run", &output))
}

fn a_read_only_folder_of_the_host(c: &Cri) -> Result<Outcome> {
    let volume = folder(c, "volume")?;
    fs::write(volume.join("file"), "of the host\n")?;
    let output = c.pod()?.sh_with("cat /mounted/file; echo x >/mounted/file", |config| {
        config.mounts = vec![bind(&volume, "/mounted")];
        config.mounts[0].readonly = true;
    })?;
    ensure!(output.stderr.contains("Read-only file system"), "{}", output.stderr);
    expect_equal("the host's file", fs::read_to_string(volume.join("file"))?.as_str(), "of the host\n")?;
    Ok(Outcome::new().see_output("run", &output))
}

fn a_config_map_is_replaced(c: &Cri) -> Result<Outcome> {
    let volume = folder(c, "config-map")?;
    // As the kubelet does: the names are links through `..data`, which is replaced by a rename.
    let write = |version: u32| -> Result<()> {
        let content = format!("..{version}");
        fs::create_dir(volume.join(&content))?;
        fs::write(volume.join(&content).join("key"), format!("version {version}\n"))?;
        symlink(&content, volume.join("..data_tmp"))?;
        fs::rename(volume.join("..data_tmp"), volume.join("..data"))?;
        if version > 0 {
            fs::remove_dir_all(volume.join(format!("..{}", version - 1)))?;
        }
        Ok(())
    };
    write(0)?;
    symlink("..data/key", volume.join("key"))?;
    let pod = c.pod()?;
    let container = pod.start_with("main", SLEEP, |config| {
        config.mounts = vec![bind(&volume, "/etc/config")];
        config.mounts[0].readonly = true;
    })?;
    for version in 0..5 {
        if version > 0 {
            write(version)?;
        }
        let seen = container.sh("cat /etc/config/key")?;
        expect_equal("what the container sees", seen.text(), &format!("version {version}"))?;
    }
    let listed = container.sh("ls -A /etc/config")?;
    Ok(Outcome::new().see_output("listed", &listed))
}

fn a_single_file(c: &Cri) -> Result<Outcome> {
    let file = c.folder().join("message");
    fs::write(&file, "")?;
    let pod = c.pod()?;
    // The kubelet reads what a container says at its end from a file that it mounts.
    let output = pod.sh_with("echo last words >/dev/termination-log; stat -c %F /dev/termination-log", |config| {
        config.mounts = vec![bind(&file, "/dev/termination-log")];
    })?;
    expect_equal("what the host reads", fs::read_to_string(&file)?.as_str(), "last words\n")?;
    Ok(Outcome::new().see_output("run", &output))
}

fn a_sub_path(c: &Cri) -> Result<Outcome> {
    let volume = folder(c, "volume")?;
    fs::create_dir(volume.join("sub"))?;
    fs::write(volume.join("sub/inside"), "inside\n")?;
    fs::write(volume.join("one.conf"), "one\n")?;
    let pod = c.pod()?;
    let container = pod.start_with("main", SLEEP, |config| {
        config.mounts = vec![bind(&volume.join("sub"), "/sub"), bind(&volume.join("one.conf"), "/etc/one.conf")];
    })?;
    let output = container.sh("cat /sub/inside /etc/one.conf; ls /sub/..; ls -A /sub")?;
    ensure!(output.stdout.starts_with("inside\none\n"), "{}{}", output.stdout, output.stderr);
    fs::write(volume.join("one.conf"), "two\n")?;
    expect_equal("the file then", container.sh("cat /etc/one.conf")?.text(), "two")?;
    Ok(Outcome::new().see_output("run", &output))
}

fn a_volume_of_a_group(c: &Cri) -> Result<Outcome> {
    let volume = folder(c, "volume")?;
    // What fsGroup makes of a volume.
    chown(&volume, Some(0), Some(2000))?;
    fs::set_permissions(&volume, fs::Permissions::from_mode(0o2770))?;
    let pod = c.pod()?;
    let mut outcome = Outcome::new();
    for (name, groups) in [("member", vec![2000]), ("stranger", vec![])] {
        let script = format!("echo mine >/volume/{name} && stat -c '%u %g' /volume/{name}");
        let output = pod.sh_with(&script, |config| {
            config.mounts = vec![bind(&volume, "/volume")];
            security(config).run_as_user = Some(crate::number(1234));
            security(config).run_as_group = Some(crate::number(1234));
            security(config).supplemental_groups = groups;
        })?;
        expect_equal("whether it may write", output.code == 0, name == "member")?;
        outcome = outcome.see_output(name, &output);
    }
    expect_equal("its group", volume.join("member").metadata()?.gid(), 2000)?;
    Ok(outcome)
}

fn a_read_only_root(c: &Cri) -> Result<Outcome> {
    let volume = folder(c, "volume")?;
    let script = "echo x >/new; echo y >/tmp/new; touch /dev/shm/may; echo z >/volume/new && cat /volume/new";
    let output = c.pod()?.sh_with(script, |config| {
        security(config).readonly_rootfs = true;
        config.mounts = vec![bind(&volume, "/volume")];
    })?;
    ensure!(output.stderr.contains("Read-only file system"), "{}", output.stderr);
    expect_equal("what is written to a volume", output.text(), "z")?;
    Ok(Outcome::new().see_output("run", &output))
}

fn a_volume_outlives_its_containers(c: &Cri) -> Result<Outcome> {
    let volume = folder(c, "empty-dir")?;
    let pod = c.pod()?;
    let mounted = |script: &str| pod.sh_with(script, |config| config.mounts = vec![bind(&volume, "/volume")]);
    mounted("echo of the first >/volume/file")?;
    let output = mounted("cat /volume/file")?;
    expect_equal("what the second sees", output.text(), "of the first")?;
    Ok(Outcome::new().see_output("run", &output))
}
