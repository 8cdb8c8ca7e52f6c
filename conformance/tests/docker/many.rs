//! Containers, and execs, one after another: nothing stays with the daemons, nor with who stands for a container, and
//! the last are no slower than the first.

use anyhow::{Context as _, Result, ensure};
use conformance::census::{Census, Process};
use conformance::docker::Docker;
use conformance::lifecycles::one_after_another;
use conformance::suite::expect_equal;
use conformance::{Case, Outcome, case};

pub(crate) fn cases() -> Vec<Case<Docker>> {
    vec![
        case!(containers_leave_nothing_with_the_daemons).alone(),
        case!(execs_leave_nothing_with_their_container).alone(),
    ]
}

/// How many more descriptors a process may have than before: those of a call that is being answered.
const IN_USE: usize = 8;
/// How much more memory, in bytes: collectors of garbage take their time.
const UNCOLLECTED: u64 = 32 << 20;

fn containers_leave_nothing_with_the_daemons(d: &Docker) -> Result<Outcome> {
    let lifecycle = || {
        let output = d.sh("--rm", "echo ran; exit 3").run()?;
        expect_equal("output and exit code", (output.text(), output.code), ("ran", 3))
    };
    // What is made once is there before the first that counts.
    lifecycle()?;
    let census = Census::take()?;
    let of_daemons = |process: &Process| ["dockerd", "containerd"].contains(&process.name.as_str());
    let before = Holdings::of(of_daemons)?;
    one_after_another(lifecycle)?;
    census.expect_nothing_new()?;
    before.expect_no_more(&Holdings::of(of_daemons)?)?;
    Ok(Outcome::new().see("left", 0))
}

fn execs_leave_nothing_with_their_container(d: &Docker) -> Result<Outcome> {
    let container = d.start("", &["sleep", "1000"])?;
    let lifecycle = || {
        let output = container.exec_sh("", "echo ran; exit 3").run()?;
        expect_equal("output and exit code", (output.text(), output.code), ("ran", 3))
    };
    lifecycle()?;
    let census = Census::take()?;
    // Its shim, and with runvm what owns the VM.
    let id = container.inspect("{{.Id}}")?;
    let of_container = |process: &Process| process.line.contains(id.trim());
    let before = Holdings::of(of_container)?;
    one_after_another(lifecycle)?;
    census.expect_nothing_new()?;
    before.expect_no_more(&Holdings::of(of_container)?)?;
    Ok(Outcome::new().see("left", 0))
}

/// What some processes have of the host.
#[derive(Debug)]
struct Holdings {
    descriptors: usize,
    memory: u64,
    processes: usize,
}

impl Holdings {
    fn of(chosen: impl Fn(&Process) -> bool) -> Result<Self> {
        let processes: Vec<_> = Process::all()?.into_iter().filter(|process| chosen(process)).collect();
        ensure!(!processes.is_empty(), "none of the processes is there");
        let descriptors = processes.iter().map(Process::descriptors).sum::<Option<_>>();
        let memory = processes.iter().map(Process::pss).sum::<Option<_>>();
        let (descriptors, memory) = descriptors.zip(memory).context("a daemon has ended")?;
        Ok(Self { descriptors, memory, processes: processes.len() })
    }

    fn expect_no_more(&self, later: &Self) -> Result<()> {
        expect_equal("processes", later.processes, self.processes)?;
        let kept = later.descriptors <= self.descriptors + IN_USE && later.memory <= self.memory + UNCOLLECTED;
        ensure!(kept, "at first {self:?}, in the end {later:?}");
        Ok(())
    }
}
