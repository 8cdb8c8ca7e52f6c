//! A container with all capabilities, which mounts the share for itself and looks for more than its files.

use std::fs;

use anyhow::{Result, ensure};
use conformance::suite::expect_equal;
use serde_json::json;

use crate::Case;
use crate::scene::Scene;

/// What is in a file beside the container's, and what is in one of its own.
const OUTSIDE: &str = "nobody may read this";
const INSIDE: &str = "anybody may read this";
/// What is in a volume that may only be read.
const PRECIOUS: &str = "nobody may change this";

const CAPABILITIES: [&str; 9] = [
    "CAP_SYS_ADMIN",
    "CAP_MKNOD",
    "CAP_DAC_OVERRIDE",
    "CAP_DAC_READ_SEARCH",
    "CAP_FOWNER",
    "CAP_CHOWN",
    "CAP_SYS_CHROOT",
    "CAP_SYS_RAWIO",
    "CAP_SYS_PTRACE",
];

/// Each line says what was tried and what came of it. `$SECRET` is the path on the host.
const SCRIPT: &str = r#"
    tried() { what=$1; shift; if "$@" >/dev/null 2>&1; then echo "$what: done"; else echo "$what: refused"; fi; }
    mkdir /share
    tried 'mount the share' mount -t virtiofs runvm /share
    tried 'read a volume' grep -q 'anybody may read this' /rw/file
    tried 'write to a volume' sh -c 'echo new >/rw/new'
    ln -s "$SECRET" /rw/absolute; ln -s ../secret /rw/relative; ln -s .. /rw/up; ln -s ../secret /share/relative
    for way in "$SECRET" /rw/absolute /rw/relative /rw/up/secret /rw/../secret /share/../secret /share/relative \
        "/share/../../../../../..$SECRET" "/proc/1/root$SECRET" "/proc/self/root$SECRET"; do
        tried "read $way" cat "$way"
    done
    tried 'find a secret' grep -rqs 'nobody may read this' /share /rw /ro
    tried 'write where it is read-only' sh -c 'echo x >/ro/file'
    mount -o remount,rw,bind /ro; mount -o remount,rw /ro
    tried 'write after mounting it anew' sh -c 'echo x >/ro/file'
    tried 'truncate' sh -c ': >/ro/file'
    tried 'make a file' touch /ro/new
    tried 'remove' rm -f /ro/file
    tried 'link from there' ln /ro/file /rw/linked
    tried 'link to there' ln /rw/file /ro/linked
    tried 'move there' mv /rw/new /ro/new
    tried 'change the mode' chmod 777 /ro/file
    mknod /rw/device c 1 1; mknod /rw/disk b 7 0
    tried 'see a mount' mount -t tmpfs none /ro
"#;

/// What of that is the container's to do.
const DONE: [&str; 4] =
    ["mount the share: done", "read a volume: done", "write to a volume: done", "see a mount: done"];

pub(crate) fn cases() -> Vec<Case> {
    let plan = "nowhere silent".to_owned();
    vec![Case { name: "hostile::files::are_all_of_the_share".to_owned(), plan, judge: Box::new(are_all_of_the_share) }]
}

fn are_all_of_the_share(scene: &Scene) -> Result<()> {
    let folder = scene.folder().join("volumes");
    for (volume, word) in [("ro", PRECIOUS), ("rw", INSIDE)] {
        fs::create_dir_all(folder.join(volume))?;
        fs::write(folder.join(volume).join("file"), word)?;
    }
    let secret = folder.join("secret");
    fs::write(&secret, OUTSIDE)?;
    let bundle = scene.hand().bundle_with(&["sh", "-c", SCRIPT], |config| {
        for volume in ["ro", "rw"] {
            let mount = json!({"destination": format!("/{volume}"), "type": "bind",
                "source": folder.join(volume), "options": ["rbind", volume]});
            config["mounts"].as_array_mut().into_iter().for_each(|mounts| mounts.push(mount.clone()));
        }
        for set in ["bounding", "effective", "permitted"] {
            config["process"]["capabilities"][set] = json!(CAPABILITIES);
        }
        config["process"]["env"] = json!(["PATH=/bin:/sbin:/usr/bin", format!("SECRET={}", secret.display())]);
    })?;
    fs::write(bundle.path.join("secret"), OUTSIDE)?;
    let output = bundle.run().run()?;
    let done: Vec<_> = output.stdout.lines().filter(|line| !line.ends_with(": refused")).collect();
    expect_equal("what was done", done, DONE.to_vec())?;
    ensure!(output.stdout.lines().count() > 20, "not all was tried: {}{}", output.stdout, output.stderr);
    expect_equal("what is precious", fs::read_to_string(folder.join("ro/file"))?.as_str(), PRECIOUS)?;
    expect_equal("what is in its volume", fs::read_dir(folder.join("ro"))?.count(), 1)?;
    expect_equal("what is in the bundle", fs::read_dir(&bundle.path)?.count(), 3)
}
