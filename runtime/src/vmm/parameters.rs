//! The guest kernel's parameters; docs/kernel.md has what each word is good for.

use std::fs;

use runvm_protocol::VSOCK_PORT;

use super::Machine;

/// For any machine.
const COMMON: [&str; 9] = [
    "noreplace-smp",
    "pci=off",
    "reboot=t",
    "panic=-1",
    "random.trust_cpu=on",
    "dummy.numdummies=0",
    "irqaffinity=0",
    "rcupdate.rcu_expedited=1",
    "thp_anon=16K:always;2M:inherit",
];

/// How fast the local APIC's timer of QEMU's own processors counts: once in a nanosecond.
const QEMU_LAPIC_TIMER_KHZ: u32 = 1_000_000;

/// How many jiffies there are in a second of the guest's kernels.
const GUEST_HZ: u64 = 250;

/// When a guest's processors come up, the first aside.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Processors {
    /// While the kernel boots, if there are any: for a guest that others are to be like, which have them from the beginning.
    AtBoot,
    /// After that, beside what the agent does for the first container.
    Late,
}

/// For a machine of the built-in VMM, whose console is shown or not.
pub fn builtin(console: bool, processors: Processors) -> String {
    let mut words = common(console);
    if processors == Processors::Late {
        words.extend(["maxcpus=1", "runvm.processors=late"].map(str::to_owned));
    }
    // The processor's own counter jumps by the time that a machine rests in a file.
    words.push("clocksource=kvm-clock".to_owned());
    words.push(format!("runvm.vsock={VSOCK_PORT}"));
    words.join(" ")
}

/// What the parameters depend on where QEMU executes the guest itself (TCG).
#[derive(Debug)]
pub struct Translator {
    /// The [rate of the host's counter](host_counter_khz) in kHz, where it is known.
    pub counter_khz: Option<u64>,
    /// Whether the guest's processors may run at once.
    pub parallel: bool,
}

/// For a machine of QEMU's; `translator` is there where QEMU executes the guest itself.
pub fn qemu(machine: &Machine, translator: Option<&Translator>) -> String {
    let mut words = common(machine.console.is_some());
    if let Some(translator) = translator {
        // A guest measures the rates that it is not told, and does so wrongly on a busy host.
        words.push(format!("lapic_timer_khz={QEMU_LAPIC_TIMER_KHZ}"));
        words.push(match translator.counter_khz {
            // QEMU keeps the counter from ever going back; what the kernel would check it with loses ticks.
            Some(khz) => format!("tsc_early_khz={khz} lpj={} tsc=reliable", khz * 1000 / GUEST_HZ),
            None => "no_timer_check".to_owned(),
        });
        if !translator.parallel {
            // The others stay off, but a list of processors may name them.
            words.push("maxcpus=1".to_owned());
        }
    }
    words.join(" ")
}

/// The rate in kHz of the host's counter, which TCG shows its guests as theirs, where the host tells it.
pub fn host_counter_khz() -> Option<u64> {
    counter_khz(&fs::read_to_string("/proc/cpuinfo").ok()?)
}

/// What a host says that describes its processors like this. With `aperfmperf` it tells how fast its processor runs at
/// the moment instead.
fn counter_khz(cpuinfo: &str) -> Option<u64> {
    let field = |name| cpuinfo.lines().find_map(|line| line.strip_prefix(name)?.trim_start().strip_prefix(':'));
    if field("flags")?.split_whitespace().any(|flag| flag == "aperfmperf") {
        return None;
    }
    let mhz: f64 = field("cpu MHz")?.trim().parse().ok()?;
    Some((mhz * 1000.0).round() as u64)
}

fn common(console: bool) -> Vec<String> {
    // Without a console the kernel writes its errors to the first serial port all the same, two exits for each character,
    // be there such a port or not.
    let log: &[&str] = if console { &["console=ttyS0", "runvm.log=debug"] } else { &["loglevel=0"] };
    COMMON.iter().chain(log).map(|&word| word.to_owned()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::log;
    use crate::vmm::probe::{Accelerator, Kvm};

    #[test]
    fn the_console_costs_nothing_unless_it_is_asked_for() {
        let mut machine = machine();
        for parameters in [qemu(&machine, None), builtin(machine.console.is_some(), Processors::Late)] {
            assert!(parameters.contains("loglevel=0") && !parameters.contains("console="), "{parameters}");
        }
        machine.console = Some("/tmp/console".into());
        for parameters in [qemu(&machine, None), builtin(machine.console.is_some(), Processors::Late)] {
            assert!(parameters.contains("console=ttyS0") && !parameters.contains("loglevel="), "{parameters}");
        }
    }

    #[test]
    fn one_processor_is_used_where_the_translator_is_not_up_to_more() {
        for (parallel, told) in [(true, false), (false, true)] {
            let parameters = qemu(&machine(), Some(&Translator { counter_khz: None, parallel }));
            assert_eq!(parameters.contains("maxcpus=1"), told, "{parameters}");
        }
    }

    fn machine() -> Machine {
        Machine {
            accelerator: Accelerator::Kvm(Kvm::Pvm),
            vcpus: 2,
            memory: 512 << 20,
            exports: Vec::new(),
            nics: Vec::new(),
            spare_nics: Vec::new(),
            console: None,
            log: log::Options::default(),
            cgroup: None,
            blank: None,
        }
    }

    #[test]
    fn only_a_rate_that_stays_is_believed() {
        let cpuinfo = "processor\t: 0\nmicrocode\t: 0x1\ncpu MHz\t\t: 2596.094\nflags\t\t: fpu tsc constant_tsc\n";
        assert_eq!(counter_khz(cpuinfo), Some(2_596_094));
        assert_eq!(counter_khz(&cpuinfo.replace("fpu", "aperfmperf")), None);
        assert_eq!(counter_khz(&cpuinfo.replace("2596.094", "unknown")), None);
        assert_eq!(counter_khz(""), None);
    }
}
