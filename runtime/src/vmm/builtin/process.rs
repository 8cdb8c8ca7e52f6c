//! The VM's process: makes the machine, gives up what making it took, and serves it to its end.
//!
//! In order: what only root of the host can open is opened; the share becomes the process's whole file system, in
//! namespaces of its own; capabilities go down to what serving files needs; then the machine is made, whose threads are
//! confined before the guest runs, and last this one: see [`super::confinement`].

use std::fs::File;
use std::io::{Read as _, Write as _};
use std::os::fd::{FromRawFd as _, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;

use kvm_ioctls::Kvm;
use nix::libc;
use runvm_protocol::{SHARE_TAG, VSOCK_PORT};
use runvm_vmm::Event;
use runvm_vmm::confinement::Role;
use runvm_vmm::door::Door;
use runvm_vmm::machine::x86::boot::Kernel;
use runvm_vmm::machine::{Config, End, Machine};
use runvm_vmm::virtio::Device;
use runvm_vmm::virtio::balloon::{Backing, Balloon};
use runvm_vmm::virtio::fs::Fs;
use runvm_vmm::virtio::net::Net;
use runvm_vmm::virtio::rng::Rng;
use runvm_vmm::virtio::vsock::Vsock;

use super::confinement::{confine, enter};
use super::{DOORWAY, Description, FIRST_TAP, Failure, Report};
use crate::error::sentence;
use crate::share;

/// A guest's interface gets the engine's MTU, which may be as much as Ethernet's length field says.
const MAX_MTU: u16 = u16::MAX;

/// Runs the VM's process; the machine's end is its own.
pub fn main() -> ExitCode {
    let begun = receive().and_then(|description| {
        close_from(FIRST_TAP + description.macs.len() as i32).map_err(failed("close inherited descriptors"))?;
        Ok((share::confine::begin().map_err(Failure::Share)?, description))
    });
    let (control, description) = match begun {
        Ok((control, description)) => (UnixStream::from(control), description),
        Err(_) => {
            tracing::error!("a VM's process is started by `runvm create` only");
            return ExitCode::FAILURE;
        }
    };
    match make(&description) {
        Ok(machine) => attend(&control, &machine),
        Err(failure) => {
            // An owner that is gone takes this process with it.
            let _ = report(&control, &Err(failure));
            ExitCode::FAILURE
        }
    }
}

fn attend(mut control: &UnixStream, machine: &Machine) -> ExitCode {
    if report(control, &Ok(())).is_err() {
        return ExitCode::FAILURE;
    }
    machine.resume();
    match machine.wait() {
        End::Shutdown => ExitCode::SUCCESS,
        End::Failed(reason) => {
            let _ = control.write_all(reason.as_bytes());
            ExitCode::FAILURE
        }
    }
}

fn report(mut control: &UnixStream, report: &Report) -> std::io::Result<()> {
    let mut line = serde_json::to_vec(report)?;
    line.push(b'\n');
    control.write_all(&line)
}

fn make(description: &Description) -> Result<Machine, Failure> {
    let kvm = Kvm::new().map_err(failed("open /dev/kvm"))?;
    let kernel = Kernel {
        image: open(&description.kernel)?,
        initramfs: Some(open(&description.initramfs)?),
        command_line: description.parameters.clone(),
        visible: description.memory,
    };
    let console = description.console.as_deref().map(File::create).transpose();
    let console = console.map_err(failed("create the console's file"))?;
    let file_system = enter(&description.exports).map_err(Failure::Share)?;
    let knocked = Event::new().map_err(failed("make an event"))?;
    let mut devices: Vec<Box<dyn Device>> = vec![
        Box::new(Vsock::new(Door::new(inherited(DOORWAY)), VSOCK_PORT, knocked)),
        Box::new(Fs::new(SHARE_TAG, file_system).map_err(failed("share files"))?),
        Box::new(Rng),
        Box::new(Balloon::new(Backing::Private)),
    ];
    for (tap, mac) in (FIRST_TAP..).zip(&description.macs) {
        devices.push(Box::new(Net::new(inherited(tap), *mac, MAX_MTU)));
    }
    let config = Config {
        kvm,
        flavour: description.flavour,
        vcpus: description.vcpus,
        memory: description.memory,
        huge_pages: true,
        devices,
        console,
        confinement: Arc::new(confine),
    };
    let machine = Machine::boot(config, kernel).map_err(failed("make the machine"))?;
    confine(Role::Owner).map_err(failed("confine the VM's process"))?;
    Ok(machine)
}

fn receive() -> Result<Description, Failure> {
    let mut text = Vec::new();
    std::io::stdin().read_to_end(&mut text).map_err(failed("be told what to make"))?;
    serde_json::from_slice(&text).map_err(failed("be told what to make"))
}

fn open(path: &Path) -> Result<File, Failure> {
    File::open(path).map_err(failed(&format!("open {}", path.display())))
}

/// Closes what an engine may have left open for all its descendants.
fn close_from(first: i32) -> std::io::Result<()> {
    // SAFETY: the descriptors from this number on that this process has opened itself are closed too: the caller has none.
    match unsafe { libc::close_range(first.cast_unsigned(), libc::c_uint::MAX, 0) } {
        0 => Ok(()),
        _ => Err(std::io::Error::last_os_error()),
    }
}

/// A descriptor that the owner has handed down.
fn inherited(number: i32) -> OwnedFd {
    // SAFETY: the owner's command line maps exactly these numbers, each is taken once, and nothing else in this process
    // had a chance to get one of them: it opened its first descriptor above all of them.
    unsafe { OwnedFd::from_raw_fd(number) }
}

fn failed<E: std::error::Error>(step: &str) -> impl FnOnce(E) -> Failure + use<E> {
    let step = step.to_owned();
    move |error| Failure::Machine(format!("cannot {step}: {}", sentence(&error)))
}
