//! Templates: who makes one, who is forked from one, and who never may be.
//!
//! runc has none. It runs the same bundles and shows what the containers have to do all the same; what is asked of
//! templates is asked of runvm alone. Every case keeps its templates in a folder of its own.

mod clones;
mod damage;
mod making;

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use conformance::bundle::{Bundle, Hand};
use conformance::suite::expect_equal;
use conformance::{Case, Cmd, Outcome, Output, case};
use serde_json::{Value, json};

use crate::refused::refuse_cmd;
use crate::veth::Veth;

pub(crate) fn cases() -> Vec<Case<Hand>> {
    let mut cases = vec![
        case!(the_second_is_forked),
        case!(off_neither_makes_nor_uses_any),
        case!(processors_are_there_as_a_program_begins),
        case!(the_configuration_says_so),
        case!(require_wants_one),
        case!(list_create_and_remove),
        case!(prune_removes_what_is_of_no_use),
        case!(removal_does_not_disturb_a_clone),
        case!(another_size_is_another_template),
        case!(another_installation_is_another_template),
    ];
    cases.extend(damage::cases());
    cases.extend(making::cases());
    cases.extend(clones::cases());
    cases
}

/// A folder of templates.
struct Templates<'a> {
    hand: &'a Hand,
    folder: PathBuf,
}

/// A container that ran to its end, and what the log says of its beginning.
struct Ran {
    output: Output,
    /// Messages and stages at every level, without the times.
    log: Vec<Value>,
}

impl<'a> Templates<'a> {
    /// The case's own folder, which is not there yet.
    fn of(hand: &'a Hand) -> Self {
        Self { hand, folder: hand.folder().join("templates") }
    }

    fn at(hand: &'a Hand, folder: PathBuf) -> Self {
        Self { hand, folder }
    }

    /// Whether templates are asked about at all.
    fn asked(&self) -> bool {
        !self.hand.runtime().is_runc()
    }

    /// `run` of a bundle, which has to end well.
    fn run(&self, bundle: &Bundle) -> Result<Ran> {
        self.run_as(bundle, |cmd| cmd)
    }

    /// The same by a command that is changed first.
    fn run_as(&self, bundle: &Bundle, change: impl FnOnce(Cmd) -> Cmd) -> Result<Ran> {
        let log = self.log(bundle);
        // One log for each run.
        let _ = fs::remove_file(&log);
        let output = change(self.run_cmd(bundle)).ok()?;
        let log = fs::read_to_string(log).unwrap_or_default();
        let log = log.lines().map(serde_json::from_str).collect::<Result<_, _>>()?;
        Ok(Ran { output, log })
    }

    /// `run` with a log of everything.
    fn run_cmd(&self, bundle: &Bundle) -> Cmd {
        let words = format!("--debug --log-format json --log {} run", self.log(bundle).display());
        self.for_these(bundle.call(&words).current_dir(&bundle.path))
    }

    fn log(&self, bundle: &Bundle) -> PathBuf {
        bundle.path.with_extension("log")
    }

    /// A command that uses the templates of this folder.
    fn for_these(&self, cmd: Cmd) -> Cmd {
        cmd.env("RUNVM_TEMPLATE_DIR", &self.folder)
    }

    /// `runvm template` with these words.
    fn call(&self, words: &str) -> Cmd {
        self.for_these(self.hand.call(&format!("template {words}")))
    }

    fn list(&self) -> Result<Vec<Value>> {
        let output = self.call("list --format json").ok()?;
        serde_json::from_str(&output.stdout).with_context(|| format!("list printed {}", output.stdout))
    }

    /// The names of all templates, each of which has to be usable.
    fn keys(&self) -> Result<Vec<String>> {
        let list = self.list()?;
        ensure!(list.iter().all(|template| template["usable"] == true), "of no use: {list:?}");
        Ok(list.iter().filter_map(|template| template["key"].as_str().map(str::to_owned)).collect())
    }

    /// The only template's folder.
    fn only(&self) -> Result<PathBuf> {
        let keys = self.keys()?;
        ensure!(keys.len() == 1, "there should be one template: {keys:?}");
        Ok(self.folder.join(&keys[0]))
    }

    /// Fails unless the folder holds these templates, no half ones and no locks.
    fn expect_only(&self, keys: &[String]) -> Result<()> {
        let mut names = Vec::new();
        for entry in fs::read_dir(&self.folder)? {
            names.push(entry?.file_name().to_string_lossy().into_owned());
        }
        names.sort();
        let mut keys = keys.to_vec();
        keys.sort();
        expect_equal("what is in the folder of templates", names, keys)
    }
}

impl Ran {
    fn reached(&self, stage: &str) -> bool {
        self.log.iter().any(|line| line["stage"] == stage)
    }

    fn warnings(&self) -> Vec<&str> {
        let warnings = self.log.iter().filter(|line| line["level"] == "warning" || line["level"] == "warn");
        warnings.filter_map(|line| line["msg"].as_str()).collect()
    }

    /// What the stages say of the machine's beginning: whether it was forked, booted, and made a template.
    fn beginning(&self) -> (bool, bool, bool) {
        (self.reached("machine forked"), self.reached("machine booted"), self.reached("template made"))
    }

    fn expect_forked(&self) -> Result<()> {
        expect_equal("forked, booted, template made", self.beginning(), (true, false, false))
    }

    fn expect_booted_into_template(&self) -> Result<()> {
        expect_equal("forked, booted, template made", self.beginning(), (false, true, true))
    }
}

fn the_second_is_forked(h: &Hand) -> Result<Outcome> {
    let templates = Templates::of(h);
    let bundle = h.bundle("echo ran")?;
    let first = templates.run(&bundle)?;
    let second = templates.run(&bundle)?;
    if templates.asked() {
        first.expect_booted_into_template()?;
        second.expect_forked()?;
        templates.expect_only(&templates.keys()?)?;
    }
    bundle.expect_no_trace()?;
    Ok(Outcome::new().see_output("first", &first.output).see_output("second", &second.output))
}

fn off_neither_makes_nor_uses_any(h: &Hand) -> Result<Outcome> {
    let templates = Templates::of(h);
    let bundle = h.bundle("echo ran")?;
    let off = |cmd: Cmd| cmd.env("RUNVM_TEMPLATE", "off");
    let without = templates.run_as(&bundle, off)?;
    ensure!(!templates.folder.exists(), "{} was made", templates.folder.display());
    if templates.asked() {
        templates.run(&bundle)?.expect_booted_into_template()?;
        for ran in [&without, &templates.run_as(&bundle, off)?] {
            expect_equal("forked, booted, template made", ran.beginning(), (false, true, false))?;
        }
    }
    Ok(Outcome::new().see_output("run", &without.output))
}

/// Those of a machine that boots for its container alone come up after its kernel has booted.
fn processors_are_there_as_a_program_begins(h: &Hand) -> Result<Outcome> {
    let templates = Templates::of(h);
    let bundle = h.bundle("nproc; cat /sys/devices/system/cpu/online; grep Cpus_allowed_list /proc/self/status")?;
    let off = templates.run_as(&bundle, |cmd| cmd.env("RUNVM_TEMPLATE", "off"))?;
    let making = templates.run(&bundle)?;
    let third = templates.run(&bundle)?;
    if templates.asked() {
        third.expect_forked()?;
    }
    for ran in [&making, &third] {
        expect_equal("processors", ran.output.stdout.as_str(), off.output.stdout.as_str())?;
    }
    Ok(Outcome::new().see_output("run", &off.output))
}

fn the_configuration_says_so(h: &Hand) -> Result<Outcome> {
    let templates = Templates::of(h);
    let bundle = h.bundle("echo ran")?;
    let file = bundle.path.with_extension("toml");
    let configured = |text: &str| {
        fs::write(&file, text)?;
        templates.run_as(&bundle, |cmd| cmd.env("RUNVM_CONFIG", &file))
    };
    let without = configured("template = \"off\"\n")?;
    if templates.asked() {
        expect_equal("forked, booted, template made", without.beginning(), (false, true, false))?;
        let run = || bundle.call("run").args(["--bundle".as_ref(), bundle.path.as_os_str()]);
        fs::write(&file, "templates = \"off\"\n")?;
        let words = ["the configuration", "has a mistake: unknown field `templates`"];
        refuse_cmd(h, run().env("RUNVM_CONFIG", &file), &words, Some(&bundle))?;
        let listed = h.call("list").env("RUNVM_CONFIG", &file).run()?;
        expect_equal("exit code of a verb that needs no configuration", listed.code, 0)?;
    }
    Ok(Outcome::new().see_output("run", &without.output))
}

fn require_wants_one(h: &Hand) -> Result<Outcome> {
    let templates = Templates::of(h);
    let bundle = h.bundle("echo ran")?;
    let require = |cmd: Cmd| templates.for_these(cmd).env("RUNVM_TEMPLATE", "require");
    let run = || bundle.call("run").args(["--bundle".as_ref(), bundle.path.as_os_str()]);
    let without = refuse_cmd(h, require(run()), &["no template", "runvm template create"], Some(&bundle))?;
    ensure!(!templates.folder.exists(), "{} was made", templates.folder.display());
    templates.run(&bundle)?;
    let with = require(run()).ok()?;
    Ok(without.see_output("with one", &with))
}

fn list_create_and_remove(h: &Hand) -> Result<Outcome> {
    let templates = Templates::of(h);
    let bundle = h.bundle_with(&["echo", "ran"], |config| limit(config, 64, 1))?;
    if !templates.asked() {
        return Ok(Outcome::new().see_output("run", &templates.run(&bundle)?.output));
    }
    expect_equal("an empty list", templates.list()?, Vec::new())?;
    let create = || templates.call("create --vcpus 1 --memory 64 --interfaces 0").ok();
    let key = create()?.text().to_owned();
    let template = templates.only()?;
    expect_equal("the name", template.file_name().and_then(|name| name.to_str()), Some(key.as_str()))?;
    let made = fs::metadata(template.join("memory"))?.modified()?;
    expect_equal("the name at the second time", create()?.text(), key.as_str())?;
    expect_equal("when it was made", fs::metadata(template.join("memory"))?.modified()?, made)?;

    let list = templates.list()?;
    let shape = &list[0]["shape"];
    expect_equal("processors", &shape["vcpus"], &json!(1))?;
    expect_equal("interfaces", &shape["nics"], &json!(0))?;
    ensure!(shape["memory"].as_u64() >= Some(64 << 20), "too little memory: {shape}");
    let blocks = std::os::unix::fs::MetadataExt::blocks(&fs::metadata(template.join("memory"))?) * 512;
    ensure!(list[0]["size"].as_u64() >= Some(blocks), "{} is less than {blocks}", list[0]["size"]);
    let table = templates.call("list").ok()?;
    let line = table.stdout.lines().find(|line| line.starts_with(&key)).unwrap_or_default();
    ensure!(line.ends_with("yes"), "not in the table: {}", table.stdout);

    let ran = templates.run_as(&bundle, |cmd| cmd.env("RUNVM_TEMPLATE", "require"))?;
    ran.expect_forked()?;
    let of_these = format!("--template require --template-dir {}", templates.folder.display());
    let created = bundle.in_background(&format!("{of_these} create"))?;
    expect_equal("what create says", (created.code, created.stderr.as_str()), (0, ""))?;
    bundle.call("delete --force").ok()?;
    templates.call("remove").arg(&key).ok()?;
    templates.expect_only(&[])?;
    for name in [key.as_str(), "../templates", ""] {
        let again = templates.call("remove").arg(name).run()?;
        expect_equal("exit code", again.code, 1)?;
        let sentence = again.stderr.trim();
        ensure!(sentence.contains("there is no template") && !sentence.contains('\n'), "another sentence: {sentence}");
    }
    Ok(Outcome::new().see_output("run", &ran.output))
}

fn prune_removes_what_is_of_no_use(h: &Hand) -> Result<Outcome> {
    let templates = Templates::of(h);
    let bundle = h.bundle("echo ran")?;
    let ran = templates.run(&bundle)?;
    if templates.asked() {
        let good = templates.keys()?;
        // Of another boot, and of nothing that can be told.
        let (stale, broken) = ("0".repeat(16), "f".repeat(16));
        let shape = fs::read_to_string(templates.only()?.join("shape.json"))?;
        let boot = fs::read_to_string("/proc/sys/kernel/random/boot_id")?;
        ensure!(shape.contains(boot.trim()), "the shape does not name the boot: {shape}");
        let files = [(&stale, shape.replace(boot.trim(), "an earlier one")), (&broken, "no JSON".to_owned())];
        for (key, shape) in files {
            let folder = templates.folder.join(key);
            fs::create_dir(&folder)?;
            fs::write(folder.join("shape.json"), shape)?;
            fs::write(folder.join("state"), "")?;
            fs::write(folder.join("memory"), "")?;
        }
        // What killed writers left: a draft, and a template on its way out.
        fs::create_dir(templates.folder.join(format!("{stale}.draft")))?;
        fs::create_dir(templates.folder.join(format!("{stale}.4194304")))?;
        let pruned = templates.call("prune").ok()?;
        let mut gone: Vec<_> = pruned.stdout.lines().collect();
        gone.sort_unstable();
        expect_equal("what prune names", gone, vec![stale.as_str(), &broken])?;
        templates.expect_only(&good)?;
        templates.run(&bundle)?.expect_forked()?;
        let all = templates.call("prune --all").ok()?;
        expect_equal("what prune --all names", all.text(), good[0].as_str())?;
        templates.expect_only(&[])?;
    }
    Ok(Outcome::new().see_output("run", &ran.output))
}

fn removal_does_not_disturb_a_clone(h: &Hand) -> Result<Outcome> {
    let templates = Templates::of(h);
    // Much of the template's memory is touched for the first time only after its removal.
    let bundle = h.bundle("echo ready; until [ -e /go ]; do sleep 0.1; done; sha256sum /bin/busybox; find / -xdev | wc -l >/dev/null; echo done")?;
    templates.run(&h.bundle("true")?)?;
    let output = in_background(&templates, &bundle)?;
    ensure!(output.code == 0, "run exited with {}: {}{}", output.code, output.stdout, output.stderr);
    bundle.expect_written("ready")?;
    if templates.asked() {
        templates.call("prune --all").ok()?;
        templates.expect_only(&[])?;
    }
    let inside =
        bundle.exec("", "dd if=/dev/zero bs=1M count=16 2>/dev/null | sha256sum; ls /proc | grep -c '^1$'").run()?;
    fs::write(bundle.inside("go"), "")?;
    bundle.expect_written("done")?;
    bundle.expect_stopped()?;
    Ok(Outcome::new().see("output", bundle.written("out")?).see_output("exec", &inside))
}

/// `run --detach` of a bundle with these templates.
fn in_background(templates: &Templates, bundle: &Bundle) -> Result<Output> {
    let words = match templates.asked() {
        true => format!("--template-dir {} run --detach", templates.folder.display()),
        false => "run --detach".to_owned(),
    };
    bundle.in_background(&words)
}

fn another_size_is_another_template(h: &Hand) -> Result<Outcome> {
    let templates = Templates::of(h);
    let veth = Veth::make()?;
    let plain = h.bundle_with(&["echo", "ran"], |config| limit(config, 64, 1))?;
    let larger = h.bundle_with(&["echo", "ran"], |config| limit(config, 512, 1))?;
    let wider = h.bundle_with(&["echo", "ran"], |config| limit(config, 64, 2))?;
    let linked = h.bundle_with(&["echo", "ran"], |config| {
        limit(config, 64, 1);
        veth.give_to(config);
    })?;
    let mut bundles = vec![("plain", &plain), ("larger", &larger), ("linked", &linked)];
    // No machine has more processors than its host.
    if std::thread::available_parallelism()?.get() > 1 {
        bundles.push(("wider", &wider));
    }
    let mut outcome = Outcome::new();
    for (count, (name, bundle)) in (1..).zip(bundles) {
        let first = templates.run(bundle)?;
        let second = templates.run(bundle)?;
        if templates.asked() {
            first.expect_booted_into_template().context(name)?;
            second.expect_forked().context(name)?;
            expect_equal("templates", templates.keys()?.len(), count)?;
        }
        outcome = outcome.see_output(name, &second.output);
    }
    veth.remove()?;
    Ok(outcome)
}

fn another_installation_is_another_template(h: &Hand) -> Result<Outcome> {
    let templates = Templates::of(h);
    let bundle = h.bundle("echo ran")?;
    if !templates.asked() {
        return Ok(Outcome::new().see_output("run", &templates.run(&bundle)?.output));
    }
    let folder = h.folder().join("installation");
    let (assets, program) = (folder.join("assets"), folder.join("runvm"));
    fs::create_dir(&folder)?;
    let ours = conformance::runtime::dist().join("lib/runvm");
    copy(&ours, &assets)?;
    copy(&h.runtime().program(), &program)?;
    let run = || templates.run_as(&bundle, |cmd| by(cmd, &program).env("RUNVM_ASSETS", &assets));
    run()?.expect_booted_into_template()?;
    let first = run()?;
    first.expect_forked()?;

    let kernels = ["vmlinux", "vmlinux-pvm"];
    let touch = |path: &Path| {
        anyhow::Ok(fs::File::options().write(true).open(path)?.set_modified(std::time::SystemTime::now())?)
    };
    // The same bytes in another file.
    let replace = |path: &Path| {
        let other = path.with_extension("copy");
        copy(path, &other)?;
        anyhow::Ok(fs::rename(&other, path)?)
    };
    let expect_another = |what: &str| {
        run()?.expect_booted_into_template().with_context(|| format!("after {what}"))?;
        run()?.expect_forked().with_context(|| format!("after {what}, the second time"))
    };
    kernels.iter().try_for_each(|kernel| touch(&assets.join(kernel)))?;
    expect_another("a touched kernel")?;
    kernels.iter().try_for_each(|kernel| replace(&assets.join(kernel)))?;
    expect_another("a replaced kernel")?;
    replace(&assets.join("initramfs.cpio"))?;
    expect_another("a replaced agent")?;
    replace(&program)?;
    expect_another("a replaced program")?;
    Ok(Outcome::new().see_output("run", &first.output))
}

/// Copies in another process: a program that was written in this one could be open for writing in a child of another
/// case's, and could not be started.
fn copy(from: &Path, to: &Path) -> Result<()> {
    Cmd::new("cp").args(["--recursive", "--dereference"]).arg(from).arg(to).ok().map(drop)
}

/// The same command by another program.
fn by(cmd: Cmd, program: &Path) -> Cmd {
    remade(cmd, program, 0)
}

/// The same command without a word on what is to run guests.
fn choosing_freely(cmd: Cmd, h: &Hand) -> Cmd {
    remade(cmd, &h.runtime().program(), h.runtime().options().len())
}

/// The same command by this program, without the first arguments.
fn remade(cmd: Cmd, program: &Path, without: usize) -> Cmd {
    let command = cmd.into_command();
    let mut other = Cmd::new(program).args(command.get_args().skip(without));
    for (key, value) in command.get_envs() {
        other = other.env(&key.to_string_lossy(), value.unwrap_or_default());
    }
    match command.get_current_dir() {
        Some(folder) => other.current_dir(folder),
        None => other,
    }
}

/// Limits a container's memory, in MiB, and its processors, which makes its machine small.
fn limit(config: &mut Value, memory: u64, cpus: u64) {
    config["linux"]["resources"]["memory"] = json!({ "limit": memory << 20 });
    config["linux"]["resources"]["cpu"] = json!({ "quota": 100_000 * cpus, "period": 100_000 });
}
