//! The VM's process: makes the machine, gives up what making it took, and serves it to its end.
//!
//! In order: what only root of the host can open is opened, and a thread begins to copy a template's memory; the share
//! becomes the process's whole file system, in namespaces of its own; capabilities go down to what serving files needs; then
//! the machine is made, whose threads are confined before the guest runs, and last this one: see [`super::confinement`].
//! By then the thread that copied has ended.

use std::fs::File;
use std::io::Write as _;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Instant;

use kvm_ioctls::Kvm;
use runvm_protocol::{SHARE_TAG, VSOCK_PORT};
use runvm_vmm::Event;
use runvm_vmm::confinement::Role;
use runvm_vmm::door::Door;
use runvm_vmm::machine::x86::boot::Kernel;
use runvm_vmm::machine::{Config, End, Flavour, Machine, PageMap, Resting};
use runvm_vmm::virtio::Device;
use runvm_vmm::virtio::balloon::{Backing, Balloon};
use runvm_vmm::virtio::fs::Fs;
use runvm_vmm::virtio::net::Net;
use runvm_vmm::virtio::rng::Rng;
use runvm_vmm::virtio::vsock::Vsock;
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::confinement::{confine, enter};
use super::description::{Beginning, Description, FIRST_NIC, Failure, Report, Saving};
use crate::error::sentence;
use crate::host::idle::{Idleness, Spare};
use crate::share;

/// A guest's interface gets the engine's MTU, which may be as much as Ethernet's length field says.
const MAX_MTU: u16 = u16::MAX;
/// Descriptors: eighty that a machine with all its devices has, and those of the guest's open files and streams.
const TABLE: i32 = 1024;

/// Runs the VM's process; the machine's end is its own.
pub fn main() -> ExitCode {
    let (control, description, handed) = match receive() {
        Ok(Some(received)) => received,
        // The owner had no need of it.
        Ok(None) => return ExitCode::FAILURE,
        Err(error) => {
            tracing::error!("a VM's process is started by `runvm create` only: {}", sentence(&error));
            return ExitCode::FAILURE;
        }
    };
    // What it takes can be had now only.
    let spare = Spare::new();
    match begin(&description, handed) {
        Ok((machine, saving)) => match report(&control, &Ok(saving)) {
            Ok(()) => attend(&control, &machine, &spare),
            Err(_) => ExitCode::FAILURE,
        },
        Err(failure) => {
            // An owner that is gone takes this process with it.
            let _ = report(&control, &Err(failure));
            ExitCode::FAILURE
        }
    }
}

fn attend(mut control: &UnixStream, machine: &Machine, spare: &Spare) -> ExitCode {
    if let Err(errno) = trim_when_idle(machine, spare) {
        tracing::debug!("the machine's memory is not given back: {errno}");
    }
    match machine.wait() {
        End::Shutdown => ExitCode::SUCCESS,
        End::Failed(reason) => {
            let _ = control.write_all(reason.as_bytes());
            ExitCode::FAILURE
        }
    }
}

/// Until the machine's end gives back what it does not need of its memory, whenever it has come to rest.
fn trim_when_idle(machine: &Machine, spare: &Spare) -> std::io::Result<()> {
    let mut idleness = Idleness::new();
    loop {
        let mut ended = [PollFd::new(machine.ended(), PollFlags::IN)];
        let limit = Timespec::try_from(idleness.pause()).map_err(std::io::Error::other)?;
        if rustix::io::retry_on_intr(|| poll(&mut ended, Some(&limit)))? > 0 {
            return Ok(());
        }
        if idleness.look() {
            let begun = Instant::now();
            machine.trim()?;
            spare.give_back();
            idleness.rest(begun.elapsed());
        }
    }
}

fn report(mut control: &UnixStream, report: &Report) -> std::io::Result<()> {
    let mut line = serde_json::to_vec(report)?;
    line.push(b'\n');
    control.write_all(&line)
}

/// A running machine whose agent listens.
fn begin(description: &Description, handed: Handed) -> Result<(Machine, Saving), Failure> {
    let kvm = Kvm::new().map_err(failed("open /dev/kvm"))?;
    let fork = || failed("fork the machine");
    let (start, console, save) = match (&description.beginning, handed.template) {
        (Beginning::Boot { kernel, initramfs, parameters, console, save }, template) => {
            let console = console.as_deref().map(File::create).transpose();
            let kernel =
                Kernel { image: open(kernel)?, initramfs: Some(open(initramfs)?), command_line: parameters.clone() };
            (Start::Boot(kernel, template), console.map_err(failed("create the console's file"))?, *save)
        }
        // What many machines come from is open in none that runs.
        (Beginning::Restore, Some((state, memory))) => {
            (Start::Fork(Box::new(Resting::open(&state, &memory).map_err(fork())?)), None, false)
        }
        (Beginning::Restore, None) => {
            return Err(Failure::Machine("there is nothing that it could begin with".to_owned()));
        }
    };
    let pages = save.then(PageMap::open).transpose().map_err(failed("look at the process's pages"))?;
    let file_system = enter(&description.exports).map_err(Failure::Share)?;
    let knocked = Event::new().map_err(failed("make an event"))?;
    let knock = knocked.try_clone().map_err(failed("make an event"))?;
    let share = match description.flavour {
        // Such a host is a virtual machine itself, as a rule.
        Flavour::Pvm => Fs::with_lookout(SHARE_TAG, file_system),
        Flavour::Ordinary => Fs::new(SHARE_TAG, file_system),
    };
    let others: [Box<dyn Device>; FIRST_NIC] = [
        Box::new(Vsock::new(Door::new(handed.door), VSOCK_PORT, knock)),
        Box::new(share.map_err(failed("share files"))?),
        Box::new(Rng),
        Box::new(Balloon::new(Backing::Private)),
    ];
    let mut devices = Vec::from(others);
    for (tap, mac) in handed.taps.into_iter().zip(&description.macs) {
        devices.push(Box::new(Net::new(tap, *mac, MAX_MTU)));
    }
    let config = Config {
        kvm,
        flavour: description.flavour,
        vcpus: description.vcpus,
        memory: description.memory,
        huge_pages: true,
        devices,
        unannounced: description.spare,
        console,
        confinement: Arc::new(confine),
    };
    match start {
        Start::Boot(kernel, template) => {
            let machine = Machine::boot(config, kernel).map_err(failed("make the machine"))?;
            confine(Role::Owner).map_err(failed("confine the VM's process"))?;
            machine.resume();
            await_knock(&machine, &knocked)?;
            let saving = match (template, pages) {
                (Some((state, memory)), Some(pages)) => write(&machine, &state, &memory, &pages),
                _ => Saving::NotAsked,
            };
            Ok((machine, saving))
        }
        Start::Fork(resting) => {
            let machine = Machine::restore(config, *resting).map_err(fork())?;
            confine(Role::Owner).map_err(failed("confine the VM's process"))?;
            machine.resume();
            Ok((machine, Saving::NotAsked))
        }
    }
}

/// What a machine starts from.
enum Start {
    /// A kernel, and where its machine is to be written once its agent listens.
    Boot(Kernel, Option<(File, File)>),
    /// A template.
    Fork(Box<Resting>),
}

/// Waits until the guest's agent says that it listens.
fn await_knock(machine: &Machine, knocked: &Event) -> Result<(), Failure> {
    loop {
        let mut events = [PollFd::new(knocked, PollFlags::IN), PollFd::new(machine.ended(), PollFlags::IN)];
        rustix::io::retry_on_intr(|| poll(&mut events, None)).map_err(failed("wait for the guest"))?;
        if !events[0].revents().is_empty() {
            return Ok(());
        }
        if !events[1].revents().is_empty() {
            return Err(match machine.wait() {
                End::Shutdown => Failure::GaveUp,
                End::Failed(reason) => Failure::Machine(reason),
            });
        }
    }
}

/// Writes the machine into a template's files, and lets it go on.
fn write(machine: &Machine, state: &File, memory: &File, pages: &PageMap) -> Saving {
    machine.pause();
    let saved = machine.save(state, memory, pages);
    machine.resume();
    match saved {
        Ok(()) => Saving::Done,
        Err(error) => Saving::Failed(sentence(&error)),
    }
}

/// Waits for what the owner wants, with nothing else open; none where it wants nothing.
fn receive() -> std::io::Result<Option<(UnixStream, Description, Handed)>> {
    share::confine::close_inherited()?;
    widen_table();
    let control = UnixStream::from(share::confine::begin().map_err(std::io::Error::other)?);
    let Some((description, descriptors)) = Description::receive(&control)? else { return Ok(None) };
    let handed = Handed::of(&description, descriptors)?;
    Ok(Some((control, description, handed)))
}

fn open(path: &Path) -> Result<File, Failure> {
    File::open(path).map_err(failed(&format!("open {}", path.display())))
}

/// The descriptors that the owner has handed over.
struct Handed {
    door: OwnedFd,
    taps: Vec<OwnedFd>,
    /// A template's state and memory.
    template: Option<(File, File)>,
}

impl Handed {
    fn of(description: &Description, descriptors: Vec<OwnedFd>) -> std::io::Result<Self> {
        let mut all = descriptors.into_iter();
        let missing = || std::io::Error::from(std::io::ErrorKind::InvalidInput);
        let door = all.next().ok_or_else(missing)?;
        let taps: Vec<_> = all.by_ref().take(description.macs.len()).collect();
        if taps.len() < description.macs.len() {
            return Err(missing());
        }
        let template = all.next().zip(all.next()).map(|(state, memory)| (state.into(), memory.into()));
        Ok(Self { door, taps, template })
    }
}

/// Has the table of descriptors hold more than a machine opens, as long as there is one thread. With several, Linux waits
/// 5 to 12 ms whenever it grows: `expand_fdtable` in fs/file.c.
fn widen_table() {
    // Where the limit of open files is lower, the table is no wider ever.
    drop(rustix::io::fcntl_dupfd_cloexec(rustix::stdio::stdin(), TABLE - 1));
}

fn failed<E: std::error::Error>(step: &str) -> impl FnOnce(E) -> Failure + use<E> {
    let step = step.to_owned();
    move |error| Failure::Machine(format!("cannot {step}: {}", sentence(&error)))
}
