//! The guest kernel's parameters; docs/kernel.md has what each word is good for.

use std::fs;

use runvm_protocol::VSOCK_PORT;

use super::Machine;
use super::probe::Accelerator;

/// For any machine.
const COMMON: [&str; 6] =
    ["noreplace-smp", "pci=off", "reboot=t", "panic=-1", "random.trust_cpu=on", "dummy.numdummies=0"];

/// For a machine of the built-in VMM, whose console is shown or not.
pub fn builtin(console: bool) -> String {
    let mut words = common(console);
    // The processor's own counter jumps by the time that a machine rests in a file.
    words.push("clocksource=kvm-clock".to_owned());
    words.push(format!("runvm.vsock={VSOCK_PORT}"));
    words.join(" ")
}

/// For a machine of QEMU's.
pub fn qemu(machine: &Machine) -> String {
    let mut words = common(machine.console.is_some());
    let khz = processor_khz();
    if machine.accelerator == Accelerator::Tcg && khz > 0 {
        // Otherwise the guest measures its clock against the PIT, and fails on a busy host.
        words.push(format!("tsc_early_khz={khz} lpj={} no_timer_check", khz * 4));
    }
    words.join(" ")
}

fn common(console: bool) -> Vec<String> {
    let log: &[&str] = if console { &["console=ttyS0", "runvm.log=debug"] } else { &["quiet"] };
    COMMON.iter().chain(log).map(|&word| word.to_owned()).collect()
}

/// The host's clock rate in kHz, which TCG shows its guests as the TSC's; 0 where it is not known.
fn processor_khz() -> u64 {
    let info = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let mhz = info.lines().find_map(|line| line.strip_prefix("cpu MHz")?.split(':').nth(1)?.trim().parse::<f64>().ok());
    mhz.map_or(0, |mhz| (mhz * 1000.0) as u64)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::log;
    use crate::vmm::probe::Kvm;

    #[test]
    fn the_console_costs_nothing_unless_it_is_asked_for() {
        let mut machine = Machine {
            accelerator: Accelerator::Kvm(Kvm::Pvm),
            vcpus: 2,
            memory: 512 << 20,
            exports: Vec::new(),
            nics: Vec::new(),
            console: None,
            log: log::Options::default(),
        };
        for parameters in [qemu(&machine), builtin(machine.console.is_some())] {
            assert!(parameters.contains("quiet") && !parameters.contains("console="), "{parameters}");
        }
        machine.console = Some("/tmp/console".into());
        for parameters in [qemu(&machine), builtin(machine.console.is_some())] {
            assert!(parameters.contains("console=ttyS0") && !parameters.contains("quiet"), "{parameters}");
        }
    }
}
