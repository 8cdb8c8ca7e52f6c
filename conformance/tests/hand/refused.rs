//! Bad input: exit code 1, one clear sentence, the same in the log, nothing left behind.
//!
//! runc is held to the exit code, the log and to leaving nothing. Its sentences do not
//! always name the file and the field; only runvm promises that.

use std::fs;
use std::path::Path;

use anyhow::{Result, ensure};
use conformance::bundle::{Bundle, Hand};
use conformance::suite::expect_equal;
use conformance::{Case, Cmd, Outcome, case};
use serde_json::{Value, json};

pub(crate) fn cases() -> Vec<Case<Hand>> {
    vec![
        case!(no_config),
        case!(a_config_that_is_no_json),
        case!(a_config_with_a_wrong_type),
        case!(an_unknown_oci_version),
        case!(no_args),
        case!(no_process),
        case!(a_relative_working_folder),
        case!(no_root_folder),
        case!(a_root_that_links_out_of_the_bundle),
        case!(a_root_that_is_a_file),
        case!(a_bind_source_that_is_not_there),
        case!(a_hook_that_is_not_there),
        case!(a_namespace_path_that_is_not_there),
        case!(an_id_that_is_taken),
        case!(an_id_with_slashes),
        case!(an_empty_id),
        case!(args_that_are_not_in_the_image).tcg(),
        case!(args_that_are_not_executable),
        case!(a_full_disk_for_the_records),
        case!(records_of_another_version),
        case!(a_bundle_that_is_not_there),
    ]
}

/// Runs a bundle that is bad, and judges how it is refused.
fn refuse(h: &Hand, bundle: &Bundle, names: &[&str]) -> Result<Outcome> {
    refuse_cmd(h, bundle.call("run").args(["--bundle".as_ref(), bundle.path.as_os_str()]), names, Some(bundle))
}

/// Calls the runtime so that it refuses. `cmd` begins with the runtime's program.
pub(crate) fn refuse_cmd(h: &Hand, cmd: Cmd, names: &[&str], bundle: Option<&Bundle>) -> Result<Outcome> {
    let log = h.folder().join("log.json");
    let call = cmd.into_command();
    let mut again =
        Cmd::new(call.get_program()).arg("--log").arg(&log).args(["--log-format", "json"]).args(call.get_args());
    for (key, value) in call.get_envs() {
        again = again.env(&key.to_string_lossy(), value.unwrap_or_default());
    }
    let output = again.run()?;
    if let Some(bundle) = bundle {
        bundle.expect_no_trace()?;
    }
    if output.code != 0 {
        let sentence = sentence(h, &output.stderr);
        expect_equal("the log's last error", last_error(&log)?.as_str(), sentence)?;
        if !h.runtime().is_runc() {
            ensure!(!sentence.contains('\n'), "more than one sentence:\n{sentence}");
            for name in names {
                ensure!(sentence.contains(name), "the sentence does not say {name:?}: {sentence}");
            }
        }
    }
    Ok(Outcome::new().see("exit", output.code))
}

/// What a runtime says on its standard error, without its own name before it.
pub(crate) fn sentence<'a>(h: &Hand, stderr: &'a str) -> &'a str {
    let name = if h.runtime().is_runc() { "runc: " } else { "runvm: " };
    let stderr = stderr.trim();
    stderr.strip_prefix(name).unwrap_or(stderr)
}

fn last_error(log: &Path) -> Result<String> {
    let text = fs::read_to_string(log)?;
    let mut errors = text
        .lines()
        .filter_map(|line| serde_json::from_str::<Value>(line).ok())
        .filter(|line| line["level"] == "error");
    Ok(errors.next_back().and_then(|line| line["msg"].as_str().map(|text| text.trim().to_owned())).unwrap_or_default())
}

fn no_config(h: &Hand) -> Result<Outcome> {
    let bundle = h.bundle("true")?;
    fs::remove_file(bundle.path.join("config.json"))?;
    refuse(h, &bundle, &["config.json"])
}

fn a_config_that_is_no_json(h: &Hand) -> Result<Outcome> {
    let bundle = h.bundle("true")?;
    fs::write(bundle.path.join("config.json"), "{ \"ociVersion\": \"1.0.2\", ")?;
    refuse(h, &bundle, &["config.json"])
}

fn a_config_with_a_wrong_type(h: &Hand) -> Result<Outcome> {
    let bundle = h.bundle_with(&["true"], |config| config["process"]["args"] = json!("true"))?;
    refuse(h, &bundle, &["config.json", "args"])
}

fn an_unknown_oci_version(h: &Hand) -> Result<Outcome> {
    let bundle = h.bundle_with(&["true"], |config| config["ociVersion"] = json!("99.0.0"))?;
    refuse(h, &bundle, &["config.json", "ociVersion", "99.0.0"])
}

fn no_args(h: &Hand) -> Result<Outcome> {
    let bundle = h.bundle_with(&[], |_| {})?;
    refuse(h, &bundle, &["config.json", "process.args"])
}

fn no_process(h: &Hand) -> Result<Outcome> {
    let bundle = h.bundle_with(&["true"], |config| {
        config.as_object_mut().and_then(|config| config.remove("process"));
    })?;
    refuse(h, &bundle, &["config.json", "process"])
}

fn a_relative_working_folder(h: &Hand) -> Result<Outcome> {
    let bundle = h.bundle_with(&["true"], |config| config["process"]["cwd"] = json!("tmp"))?;
    refuse(h, &bundle, &["config.json", "process.cwd"])
}

fn no_root_folder(h: &Hand) -> Result<Outcome> {
    let bundle = h.bundle("true")?;
    fs::remove_dir_all(bundle.path.join("rootfs"))?;
    refuse(h, &bundle, &["config.json", "root.path", "rootfs"])
}

fn a_root_that_links_out_of_the_bundle(h: &Hand) -> Result<Outcome> {
    let bundle = h.bundle("true")?;
    let outside = h.folder().join("outside");
    fs::rename(bundle.path.join("rootfs"), &outside)?;
    std::os::unix::fs::symlink(&outside, bundle.path.join("rootfs"))?;
    refuse(h, &bundle, &["config.json", "root.path", "rootfs"])
}

fn a_root_that_is_a_file(h: &Hand) -> Result<Outcome> {
    let bundle = h.bundle("true")?;
    fs::remove_dir_all(bundle.path.join("rootfs"))?;
    fs::write(bundle.path.join("rootfs"), "")?;
    refuse(h, &bundle, &["config.json", "root.path", "rootfs"])
}

fn a_bind_source_that_is_not_there(h: &Hand) -> Result<Outcome> {
    let bundle = h.bundle_with(&["true"], |config| {
        let mount = json!({ "destination": "/x", "type": "bind", "source": "/not/there", "options": ["bind"] });
        config["mounts"].as_array_mut().into_iter().for_each(|mounts| mounts.push(mount.clone()));
    })?;
    refuse(h, &bundle, &["/not/there"])
}

fn a_hook_that_is_not_there(h: &Hand) -> Result<Outcome> {
    let bundle = h.bundle_with(&["true"], |config| {
        config["hooks"] = json!({ "createRuntime": [{ "path": "/not/there" }] });
    })?;
    refuse(h, &bundle, &["createRuntime", "/not/there"])
}

fn a_namespace_path_that_is_not_there(h: &Hand) -> Result<Outcome> {
    let bundle = h.bundle_with(&["true"], |config| {
        for namespace in config["linux"]["namespaces"].as_array_mut().into_iter().flatten() {
            if namespace["type"] == "network" {
                namespace["path"] = json!("/run/netns/not-there");
            }
        }
    })?;
    refuse(h, &bundle, &["/run/netns/not-there"])
}

fn an_id_that_is_taken(h: &Hand) -> Result<Outcome> {
    let bundle = h.bundle("sleep 1000")?;
    bundle.start()?;
    let outcome = refuse_cmd(
        h,
        bundle.call("run").args(["--bundle".as_ref(), bundle.path.as_os_str()]),
        &[&bundle.id, "exist"],
        None,
    )?;
    Ok(outcome.see("the first container", bundle.status()?))
}

fn an_id_with_slashes(h: &Hand) -> Result<Outcome> {
    let bundle = h.bundle("true")?;
    let id = format!("../{}", bundle.id);
    let cmd = h.call("run --bundle").arg(&bundle.path).arg(&id);
    let outcome = refuse_cmd(h, cmd, &[&id], Some(&bundle))?;
    let state = refuse_cmd(h, h.call("state").arg(&id), &[&id], Some(&bundle))?;
    expect_equal("how `state` refuses it", &state, &outcome)?;
    Ok(outcome)
}

fn an_empty_id(h: &Hand) -> Result<Outcome> {
    let bundle = h.bundle("true")?;
    refuse_cmd(h, h.call("run --bundle").arg(&bundle.path).arg(""), &["ID"], Some(&bundle))
}

fn args_that_are_not_in_the_image(h: &Hand) -> Result<Outcome> {
    let bundle = h.bundle_with(&["no-such-program"], |_| {})?;
    refuse(h, &bundle, &["no-such-program"])
}

fn args_that_are_not_executable(h: &Hand) -> Result<Outcome> {
    let bundle = h.bundle_with(&["/etc/passwd"], |_| {})?;
    refuse(h, &bundle, &["/etc/passwd"])
}

fn a_full_disk_for_the_records(h: &Hand) -> Result<Outcome> {
    let root = h.folder().join("full");
    fs::create_dir(&root)?;
    let path = root.display().to_string();
    Cmd::new("mount").args(["-t", "tmpfs", "-o", "size=64k", "none", &path]).ok()?;
    // Writes until it is full, which `cat` calls an error.
    Cmd::new("sh").args(["-c", "cat /dev/zero >\"$0/filler\" 2>/dev/null; true", &path]).ok()?;
    let bundle = h.bundle("true")?;
    let cmd = bundle.call(&format!("--root {path} run")).args(["--bundle".as_ref(), bundle.path.as_os_str()]);
    let outcome = refuse_cmd(h, cmd, &[&path, "No space left"], None);
    let left = fs::read_dir(&root)?.count();
    Cmd::new("umount").arg(&path).ok()?;
    bundle.expect_no_trace()?;
    expect_equal("files on the full disk", left, 1)?;
    outcome
}

fn records_of_another_version(h: &Hand) -> Result<Outcome> {
    let root = h.folder().join("records");
    let words = format!("--root {}", root.display());
    let bundle = h.bundle("sleep 1000")?;
    bundle.in_background(&format!("{words} run --detach"))?;
    let record = root.join(&bundle.id).join("state.json");
    let original = fs::read(&record)?;
    let mut changed: Value = serde_json::from_slice(&original)?;
    // runc's record has no version of its own: it is left as it is.
    if changed.get("version").is_some() {
        changed["version"] = json!(99);
    }
    fs::write(&record, changed.to_string())?;
    let outcome = refuse_cmd(h, bundle.call(&format!("{words} state")), &["state.json", "99"], None);
    fs::write(&record, original)?;
    bundle.call(&format!("{words} delete --force")).ok()?;
    outcome
}

fn a_bundle_that_is_not_there(h: &Hand) -> Result<Outcome> {
    let bundle = h.bundle("true")?;
    refuse_cmd(h, bundle.call("run --bundle /not/there"), &["/not/there"], Some(&bundle))
}
