//! A machine with an ordinary KVM, made inside this one.
//!
//! QEMU's translator emulates a processor with SVM and nested paging; the distribution's kernel for cloud machines finds
//! it and offers the `/dev/kvm` that any server has, however this machine's is made. Nothing of the machine outlives
//! its power-off: its root file system is the kernel's initramfs, put together anew for each run, and it has no network.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use serde_json::{Value, json};

use crate::runtime::dist;
use crate::{Cmd, Output, image};

/// The machine's first process.
const INIT: &str = include_str!("init.sh");
/// What each case's script begins with: runvm tells all that it does in a log of its own.
const PRELUDE: &str = "runvm() { command runvm --debug --log /tmp/log \"$@\"; }\n";
/// Where the cases' containers have their root file system.
const ROOTFS: &str = "rootfs";

/// From power-on to power-off. A case takes seconds on a quiet machine.
const LIMIT: Duration = Duration::from_secs(600);
/// How many lines of the console are worth showing.
const TAIL: usize = 40;

/// A machine that is being put together.
pub struct Machine {
    folder: PathBuf,
    /// The tree that becomes its root file system.
    root: PathBuf,
    /// Its kernel and the modules.
    kernel: PathBuf,
}

impl Machine {
    /// A machine with busybox and runvm, in a folder that is made for it.
    pub fn assemble(folder: &Path) -> Result<Self> {
        let machine = Self { folder: folder.to_owned(), root: folder.join("root"), kernel: image::cloud_kernel()? };
        image::unpack(image::BUSYBOX, &machine.root)?;
        image::unpack(image::BUSYBOX, &machine.root.join(ROOTFS))?;
        for place in ["run", "stage", "cases"] {
            fs::create_dir(machine.root.join(place))?;
        }
        fs::write(machine.root.join("init"), INIT)?;
        fs::set_permissions(machine.root.join("init"), fs::Permissions::from_mode(0o755))?;
        for module in fs::read_dir(machine.kernel.join("modules"))? {
            let module = module?;
            machine.copy(&module.path(), &Path::new("modules").join(module.file_name()))?;
        }
        machine.install_runvm()?;
        Ok(machine)
    }

    /// Adds a case: a script, and the configuration of the bundle in whose folder it runs. `$ID` is the case's name.
    pub fn add_case(&self, name: &str, script: &str, mut config: Value) -> Result<()> {
        let case = self.root.join("cases").join(name);
        fs::create_dir(&case)?;
        config["root"]["path"] = json!(format!("/{ROOTFS}"));
        fs::write(case.join("config.json"), serde_json::to_vec_pretty(&config)?)?;
        Ok(fs::write(case.join("script"), format!("{PRELUDE}{script}"))?)
    }

    /// Boots the machine, lets it run its cases, and waits for its end.
    pub fn run(self) -> Result<Session> {
        let file = |name: &str| self.folder.join(name);
        let pack = "cd \"$1\" && find . | busybox cpio --quiet -o -H newc >\"$2\"";
        Cmd::new("sh").args(["-c", pack, "sh"]).arg(&self.root).arg(file("initramfs")).ok()?;
        let to_file = |name: &str| format!("file:{}", file(name).display());
        let ended = Cmd::new("qemu-system-x86_64")
            // The translator does not intercept XSETBV: guests see an XSAVE that contradicts itself, warn and go without.
            // One processor: before QEMU 8.1 the translator can go on with code of one that another has replaced.
            .args(["-M", "q35", "-cpu", "max", "-accel", "tcg", "-smp", "1", "-m", "2G"])
            .args(["-nodefaults", "-no-user-config", "-no-reboot", "-display", "none"])
            .arg("-kernel")
            .arg(self.kernel.join("vmlinuz"))
            .arg("-initrd")
            .arg(file("initramfs"))
            // The emulated clock counter is as steady as a server's, which the kernel does not believe unasked.
            .args(["-append", "console=ttyS0 quiet panic=-1 tsc=reliable"])
            .args(["-serial", &to_file("console"), "-serial", &to_file("report")])
            .limit(LIMIT)
            .ok();
        let read = |name: &str| fs::read(file(name)).map(|bytes| String::from_utf8_lossy(&bytes).into_owned());
        Ok(Session {
            reports: parse(&read("report").unwrap_or_default()),
            console: read("console").unwrap_or_default(),
            trouble: ended.err().map(|error| format!("{error:#}")),
        })
    }

    fn install_runvm(&self) -> Result<()> {
        let dist = dist();
        // The kernel for hosts of the PVM kind is left out: what boots there is the ordinary one.
        for file in ["bin/runvm", "lib/runvm/vmlinux", "lib/runvm/initramfs.cpio"] {
            self.copy(&dist.join(file), &Path::new("opt/runvm").join(file))?;
        }
        self.copy_libraries(&dist.join("bin/runvm"))
    }

    /// Copies what the loader would load with a program; nothing where it is static.
    fn copy_libraries(&self, program: &Path) -> Result<()> {
        let list = Cmd::new("ldd").arg(program).run()?;
        for library in list.stdout.split_whitespace().filter(|word| word.starts_with('/')).map(Path::new) {
            self.copy(library, library)?;
        }
        Ok(())
    }

    fn copy(&self, from: &Path, to: &Path) -> Result<()> {
        let to = self.root.join(to.strip_prefix("/").unwrap_or(to));
        fs::create_dir_all(to.parent().unwrap_or(&self.root))?;
        fs::copy(from, &to).with_context(|| format!("cannot copy {}", from.display()))?;
        Ok(())
    }
}

/// What a machine left when it had ended.
pub struct Session {
    /// By case.
    reports: BTreeMap<String, Report>,
    console: String,
    /// Why the machine did not end by itself.
    trouble: Option<String>,
}

impl Session {
    /// What a case left: its script's exit code and what it wrote. It is an error if the case did not end, or if something
    /// of its container outlived it.
    pub fn output(&self, case: &str) -> Result<Output> {
        let report = self.reports.get(case);
        let Some((report, code)) = report.and_then(|report| Some((report, report.code?))) else {
            bail!("no end was reported: {}", self.trouble.as_deref().unwrap_or("the machine went down before"));
        };
        ensure!(report.left.is_empty(), "left behind:\n{}", report.left);
        Ok(Output { code, stdout: report.stdout.clone(), stderr: report.stderr.clone() })
    }

    /// All that is known of a case, for whoever wants to know why it failed.
    pub fn account(&self, case: &str) -> String {
        let console: Vec<&str> = self.console.lines().collect();
        let console = console[console.len().saturating_sub(TAIL)..].join("\n");
        let report = match self.reports.get(case) {
            Some(Report { stdout, stderr, log, .. }) => {
                format!("--- stdout\n{stdout}--- stderr\n{stderr}--- runvm's log\n{log}")
            }
            None => String::new(),
        };
        format!("{report}--- the end of the machine's console\n{console}")
    }
}

/// What the machine said about a case.
#[derive(Debug, Default, PartialEq, Eq)]
struct Report {
    stdout: String,
    stderr: String,
    /// runvm's own.
    log: String,
    /// What outlived the case.
    left: String,
    /// The script's exit code, at the case's end.
    code: Option<i32>,
}

/// Reads a report: each line has a case, a kind, and one line of that kind.
fn parse(text: &str) -> BTreeMap<String, Report> {
    let mut reports: BTreeMap<String, Report> = BTreeMap::new();
    for line in text.lines() {
        let mut words = line.splitn(3, ' ');
        let (Some(case), Some(kind), Some(line)) = (words.next(), words.next(), words.next()) else { continue };
        let report = reports.entry(case.to_owned()).or_default();
        let text = match kind {
            "out" => &mut report.stdout,
            "err" => &mut report.stderr,
            "log" => &mut report.log,
            "left" => &mut report.left,
            "exit" => {
                report.code = line.parse().ok();
                continue;
            }
            _ => continue,
        };
        text.push_str(line);
        text.push('\n');
    }
    reports
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_report_is_read_up_to_where_it_breaks_off() {
        let reports = parse("a out one\r\na out \r\na out  two\r\na err no\r\na exit 7\r\nb left /run/runvm/b\r\nb ex");
        let a = Report { stdout: "one\n\n two\n".into(), stderr: "no\n".into(), code: Some(7), ..Report::default() };
        let b = Report { left: "/run/runvm/b\n".into(), ..Report::default() };
        assert_eq!(reports, BTreeMap::from([("a".to_owned(), a), ("b".to_owned(), b)]));
    }
}
