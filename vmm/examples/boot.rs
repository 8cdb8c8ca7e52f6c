//! Boots a kernel with a serial console on stdout, to see what it says: `boot KERNEL [INITRAMFS [PARAMETERS]]`.
//!
//! `VCPUS`, `MEMORY` (MiB) and `QUIET` (no console; the time until the machine's end is told) change what it boots in.

use std::env;
use std::error::Error;
use std::fs::File;
use std::os::fd::AsFd as _;
use std::sync::Arc;
use std::time::Instant;

use kvm_ioctls::Kvm;
use runvm_vmm::machine::x86::boot::Kernel;
use runvm_vmm::machine::{Config, Flavour, Machine};

fn main() -> Result<(), Box<dyn Error>> {
    let begun = Instant::now();
    let mut arguments = env::args().skip(1);
    let image = File::open(arguments.next().ok_or("usage: boot KERNEL [INITRAMFS [PARAMETERS]]")?)?;
    let initramfs = arguments.next().map(File::open).transpose()?;
    let number = |name: &str, default| env::var(name).ok().and_then(|text| text.parse().ok()).unwrap_or(default);
    let quiet = env::var_os("QUIET").is_some();
    let console = if quiet { None } else { Some(File::from(std::io::stdout().as_fd().try_clone_to_owned()?)) };
    let log = if quiet { "quiet" } else { "console=ttyS0" };
    let memory = number("MEMORY", 256) << 20;
    let kernel = Kernel {
        image,
        initramfs,
        command_line: format!(
            "noreplace-smp pci=off reboot=t panic=-1 random.trust_cpu=on {log} {}",
            arguments.next().unwrap_or_default()
        ),
    };
    let pvm = !std::fs::read_to_string("/proc/cpuinfo")?.contains("svm");
    let config = Config {
        kvm: Kvm::new()?,
        flavour: if pvm { Flavour::Pvm } else { Flavour::Ordinary },
        vcpus: number("VCPUS", 1) as u32,
        memory,
        huge_pages: env::var_os("SMALL").is_none(),
        devices: Vec::new(),
        unannounced: 0,
        console,
        confinement: Arc::new(|_| Ok(())),
    };
    let machine = Machine::boot(config, kernel)?;
    eprintln!("made after {:?}", begun.elapsed());
    machine.resume();
    let end = machine.wait();
    eprintln!("{end:?} after {:?}", begun.elapsed());
    Ok(())
}
