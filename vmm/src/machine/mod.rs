//! A machine: memory, processors and devices, from its making to its end.

mod bus;
mod elsewhere;
pub mod memory;
mod origin;
mod pagemap;
mod snapshot;
mod vcpu;
pub mod x86;

use std::collections::BTreeSet;
use std::fs::File;
use std::io;
use std::sync::mpsc::{self, Receiver, Sender};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, ScopedJoinHandle};

use kvm_bindings::{CpuId, KVM_API_VERSION, kvm_userspace_memory_region};
use kvm_ioctls::{IoEventAddress, Kvm, VcpuFd, VmFd};
use serde::{Deserialize, Serialize};
use thiserror::Error;
use vm_memory::{GuestMemory as _, GuestMemoryRegion as _};

use crate::confinement::Confinement;
use crate::virtio::Device;
use crate::virtio::transport::{QUEUE_NOTIFY, SIZE, Transport, TransportError};
use crate::{Event, Memory};
use bus::{Bus, Console, ConsoleLine, DEVICES, FIRST_INTERRUPT, MAX_DEVICES, Pin, SERIAL_INTERRUPT};
use memory::{Block, Filling, MemoryError};
use origin::Origin;
pub use pagemap::PageMap;
use snapshot::Saved;
pub use snapshot::SnapshotError;
#[cfg(feature = "driver")]
pub use snapshot::{saved_devices, state_file};
use vcpu::Vcpus;
pub use x86::MAX_VCPUS;
use x86::boot::{BootError, Kernel};
use x86::host::Host;
use x86::state::StateError;
use x86::{cpuid, registers};

/// What kind of KVM runs a machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Flavour {
    /// Over the processor's VMX or SVM.
    Ordinary,
    /// Without either; runs only guest kernels that speak its own interface.
    Pvm,
}

/// Three pages that Intel's processors need to run a guest in real mode.
const TSS: usize = 0xfffb_d000;

/// The parts of a machine.
pub struct Config {
    /// `/dev/kvm`.
    pub kvm: Kvm,
    /// What it is.
    pub flavour: Flavour,
    /// Processors, from 1 to [`MAX_VCPUS`].
    pub vcpus: u32,
    /// Memory in bytes, a whole number of MiB.
    pub memory: u64,
    /// Whether the host gives memory in large pages where it can.
    pub huge_pages: bool,
    /// Devices, at most 19; guests find them in this order.
    pub devices: Vec<Box<dyn Device>>,
    /// How many of the last devices a guest that boots is not told of: it finds them once it is, by [`device_word`].
    pub unannounced: usize,
    /// Where a serial port writes to. It costs a start dearly, and is for debugging.
    pub console: Option<File>,
    /// What each thread that the guest's doings reach does to itself first.
    pub confinement: Confinement,
}

/// Why there is no machine.
#[derive(Debug, Error)]
pub enum MachineError {
    /// KVM refused.
    #[error("KVM cannot {step}")]
    Kvm {
        /// Completes "cannot …".
        step: &'static str,
        /// KVM's reason.
        #[source]
        source: kvm_ioctls::Error,
    },
    /// Of another time.
    #[error("/dev/kvm has version {0} of its interface, not 12")]
    Version(i32),
    /// None or too many.
    #[error("a machine has 1 to {MAX_VCPUS} processors, not {0}")]
    Vcpus(u32),
    /// Too many.
    #[error("a machine has at most {MAX_DEVICES} devices, not {0}")]
    Devices(usize),
    /// No memory.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// No kernel.
    #[error(transparent)]
    Boot(#[from] BootError),
    /// No device.
    #[error(transparent)]
    Transport(#[from] TransportError),
    /// No state.
    #[error(transparent)]
    State(#[from] StateError),
    /// No snapshot.
    #[error(transparent)]
    Snapshot(#[from] SnapshotError),
    /// No threads, no descriptors.
    #[error("cannot {step}")]
    Host {
        /// Completes "cannot …".
        step: &'static str,
        /// The cause.
        #[source]
        source: io::Error,
    },
}

/// How a machine ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum End {
    /// The guest switched it off, or restarted it.
    Shutdown,
    /// It could not go on; why, as a clause.
    Failed(String),
}

/// Where ends are told.
#[derive(Clone)]
struct Ends {
    sender: Sender<End>,
    told: Arc<Event>,
}

impl Ends {
    fn send(&self, end: End) {
        // Nobody may be waiting any more.
        let _ = self.sender.send(end);
        self.told.raise();
    }
}

/// A machine. It ends when this is dropped.
pub struct Machine {
    // Dropped in this order: nothing runs any more when the memory goes.
    vcpus: Vcpus,
    bus: Arc<Bus>,
    ends: Receiver<End>,
    ended: Arc<Event>,
    vm: Arc<VmFd>,
    memory: Memory,
    origin: Origin,
    /// The blocks of its memory that are a file's, or were, and may be there without a page of theirs.
    trimmed: Mutex<BTreeSet<Block>>,
    flavour: Flavour,
    host: Host,
    msrs: Vec<u32>,
}

impl Machine {
    /// Makes a machine that is about to enter a kernel. [`Machine::resume`] lets it.
    ///
    /// # Errors
    /// [`MachineError`].
    pub fn boot(config: Config, mut kernel: Kernel) -> Result<Self, MachineError> {
        let size = config.memory;
        let memory = memory::anonymous(size, config.huge_pages)?;
        let vcpu_count = config.vcpus;
        kernel.command_line.push_str(&device_parameters(config.devices.len().saturating_sub(config.unannounced)));
        // Copying files and asking KVM for things take two processors half as long as one.
        let (loaded, made) = thread::scope(|scope| {
            let load = || x86::boot::load(&memory, &mut kernel, vcpu_count);
            let loading = thread::Builder::new().spawn_scoped(scope, load);
            let supported = supported(&config);
            let parts = Parts::make(config, Host::here(), memory.clone());
            (loading.map(ScopedJoinHandle::join), supported.and_then(|supported| Ok((supported, parts?))))
        });
        let loaded =
            loaded.map_err(|source| MachineError::Host { step: "start a thread that loads the kernel", source })?;
        let entry = loaded
            .map_err(|_| MachineError::Host { step: "load the kernel", source: io::ErrorKind::Other.into() })??;
        let (supported, parts) = made?;
        for (index, vcpu) in (0..).zip(&parts.vcpus) {
            describe(vcpu, &supported, index, vcpu_count)?;
            registers::set(vcpu, (index == 0).then_some(entry)).map_err(kvm("set a processor's registers"))?;
        }
        let origin = Origin::new(size, &x86::boot::pieces(&kernel, size)?, x86::boot::constant(&kernel.image))?;
        parts.assemble(origin, BTreeSet::new())
    }

    /// Lets it run.
    pub fn resume(&self) {
        self.bus.devices().for_each(|mut device| device.go_on());
        // What has come for the guest is there when a processor looks for it, which else may keep the device from its turn.
        self.bus.devices().for_each(|device| device.await_begin());
        self.vcpus.resume();
    }

    /// Lets it rest: when this returns, neither processors nor devices do anything.
    pub fn pause(&self) {
        self.vcpus.pause();
        self.bus.devices().for_each(|mut device| device.rest());
    }

    /// Gives back to the host what of its memory is still as it began. The machine stands still for a millisecond or two at
    /// a time, and comes to the pages that it uses anew: to be called when it has nothing to do.
    ///
    /// # Errors
    /// Where the host cannot (Linux does it from 5.13 on): what was given back until then is, and nothing else is changed.
    pub fn trim(&self) -> io::Result<()> {
        let copies = self.origin.copies()?;
        for block in Block::all(memory::size(&self.memory)) {
            if !origin::is_there(block, &self.memory)? {
                continue;
            }
            self.pause();
            let replaced = self.origin.replace(block, &self.memory, &copies);
            self.resume();
            if !matches!(replaced, Ok(false)) {
                self.trimmed().insert(block);
            }
            replaced?;
        }
        Ok(())
    }

    fn trimmed(&self) -> MutexGuard<'_, BTreeSet<Block>> {
        self.trimmed.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Writes a paused machine into two empty files; it can go on afterwards. `pages` is this process's. A guest that booted
    /// from an initramfs has to have unpacked it: what is left of the archive in its memory is not written.
    ///
    /// # Errors
    /// [`MachineError`]; then the files are of no use.
    pub fn save(&self, state: &File, memory: &File, pages: &PageMap) -> Result<(), MachineError> {
        let vcpus = self.vcpus.paused();
        let vcpus = vcpus.iter().map(|vcpu| x86::state::save_vcpu(&self.vm, vcpu, &self.msrs));
        let saved = Saved {
            flavour: self.flavour,
            memory: memory::size(&self.memory),
            contents: snapshot::write_memory(&self.memory, &self.origin, &self.trimmed(), pages, memory)?,
            host: self.host.clone(),
            vcpus: vcpus.collect::<Result<_, _>>()?,
            vm: x86::state::save_vm(&self.vm)?,
            devices: self.bus.devices().map(|device| device.save()).collect::<Result<_, _>>()?,
        };
        Ok(saved.write(state)?)
    }

    /// Makes a machine that goes on where a saved one was, with devices of the same make.
    ///
    /// # Errors
    /// [`MachineError`].
    pub fn restore(config: Config, resting: Resting) -> Result<Self, MachineError> {
        let Resting { saved, memory, filling, origin } = resting;
        let mismatch = |what| Err(SnapshotError::Mismatch(what).into());
        if saved.flavour != config.flavour {
            return mismatch("kinds of KVM");
        }
        if (saved.memory, saved.vcpus.len()) != (config.memory, config.vcpus as usize) {
            return mismatch("sizes");
        }
        if saved.devices.len() != config.devices.len() {
            return mismatch("devices");
        }
        let vcpu_count = config.vcpus;
        let mapped = saved.contents.iter().filter(|content| content.is_mapped());
        let trimmed = mapped.map(|content| content.block).collect();
        let host = Host::here();
        let supported = (saved.host != host).then(|| supported(&config)).transpose()?;
        let mut parts = Parts::make(config, host, memory)?;
        x86::state::restore_vm(&parts.vm, &saved.vm)?;
        for (index, (vcpu, state)) in (0..).zip(parts.vcpus.iter().zip(&saved.vcpus)) {
            if let Some(supported) = &supported {
                // What KVM makes of a description is what it gave when the machine was saved.
                describe(vcpu, supported, index, vcpu_count)?;
                let ours = vcpu.get_cpuid2(kvm_bindings::KVM_MAX_CPUID_ENTRIES);
                if !cpuid::same(&ours.map_err(kvm("describe a processor"))?, &state.cpuid) {
                    return mismatch("processors");
                }
            }
            x86::state::restore_vcpu(&parts.vm, vcpu, state)?;
        }
        snapshot::await_memory(filling)?;
        for (device, saved) in parts.devices.iter_mut().zip(saved.devices) {
            device.restore(saved)?;
        }
        parts.assemble(origin, trimmed)
    }

    /// Waits for its end.
    pub fn wait(&self) -> End {
        self.ends.recv().unwrap_or_else(|_| End::Failed("its processors' threads ended".to_owned()))
    }

    /// Readable once it has ended, for those who wait for more than that.
    pub fn ended(&self) -> &Event {
        &self.ended
    }

    /// Its memory.
    pub fn memory(&self) -> &Memory {
        &self.memory
    }
}

/// A machine that was saved, whose memory is being fetched by a thread.
#[derive(Debug)]
pub struct Resting {
    saved: Saved,
    memory: Memory,
    filling: Filling,
    origin: Origin,
}

impl Resting {
    /// Looks at the files of [`Machine::save`], and begins to fetch the memory. That file has to stay as it is as long as a
    /// machine is there that began so.
    ///
    /// # Errors
    /// [`MachineError`].
    pub fn open(state: &File, memory: &File) -> Result<Self, MachineError> {
        let saved = Saved::read(state)?;
        let (fetched, filling) = snapshot::read_memory(saved.memory, &saved.contents, memory)?;
        let origin = Origin::of_template(saved.memory, memory)?;
        Ok(Self { saved, memory: fetched, filling, origin })
    }
}

/// What a machine is assembled from, the same for one that boots and one that is restored.
struct Parts {
    vm: Arc<VmFd>,
    memory: Memory,
    vcpus: Vec<VcpuFd>,
    devices: Vec<Transport>,
    console: Option<Console>,
    confinement: Confinement,
    flavour: Flavour,
    host: Host,
    msrs: Vec<u32>,
}

impl Parts {
    fn make(config: Config, host: Host, memory: Memory) -> Result<Self, MachineError> {
        let version = config.kvm.get_api_version();
        if version != KVM_API_VERSION as i32 {
            return Err(MachineError::Version(version));
        }
        if !(1..=MAX_VCPUS).contains(&config.vcpus) {
            return Err(MachineError::Vcpus(config.vcpus));
        }
        if config.devices.len() > MAX_DEVICES {
            return Err(MachineError::Devices(config.devices.len()));
        }
        let vm = Arc::new(config.kvm.create_vm().map_err(kvm("make a machine"))?);
        // Memory is first: with an interrupt controller there, each region would take milliseconds.
        for (slot, region) in (0..).zip(memory.iter()) {
            let region = kvm_userspace_memory_region {
                slot,
                guest_phys_addr: region.start_addr().0,
                memory_size: region.len(),
                userspace_addr: region.as_ptr() as u64,
                flags: 0,
            };
            // SAFETY: the region is mapped as long as the memory, which the machine keeps until after its processors' end.
            unsafe { vm.set_user_memory_region(region) }.map_err(kvm("give a machine memory"))?;
        }
        if config.flavour == Flavour::Ordinary {
            vm.set_tss_address(TSS).map_err(kvm("set aside pages for real mode"))?;
        }
        vm.create_irq_chip().map_err(kvm("make an interrupt controller"))?;
        let vcpus = (0..config.vcpus).map(|index| vm.create_vcpu(index.into())).collect::<Result<_, _>>();
        let vcpus = vcpus.map_err(kvm("make a processor"))?;
        let mut devices = Vec::new();
        for (index, device) in config.devices.into_iter().enumerate() {
            let pin = Pin { vm: vm.clone(), number: FIRST_INTERRUPT + index as u32 };
            let device = Transport::new(device, memory.clone(), Arc::new(pin), config.confinement.clone())?;
            connect(&vm, index, &device).map_err(kvm("connect a device"))?;
            devices.push(device);
        }
        let console = config.console.map(|file| console(&vm, file)).transpose()?;
        let (flavour, confinement) = (config.flavour, config.confinement);
        let msrs = x86::state::msrs_to_save(&config.kvm, flavour)?;
        Ok(Self { vm, memory, vcpus, devices, console, confinement, flavour, host, msrs })
    }

    fn assemble(self, origin: Origin, trimmed: BTreeSet<Block>) -> Result<Machine, MachineError> {
        self.devices.iter().try_for_each(Transport::ready)?;
        let bus = Arc::new(Bus::new(self.devices, self.console));
        let (sender, ends) = mpsc::channel();
        let event = Event::new().map_err(|source| MachineError::Host { step: "wait for its end", source })?;
        let telling = Ends { sender, told: Arc::new(event) };
        let vcpus = Vcpus::spawn(self.vcpus, bus.clone(), &self.confinement, &telling)
            .map_err(|source| MachineError::Host { step: "start the processors", source })?;
        Ok(Machine {
            vcpus,
            bus,
            ends,
            ended: telling.told,
            vm: self.vm,
            memory: self.memory,
            origin,
            trimmed: Mutex::new(trimmed),
            flavour: self.flavour,
            host: self.host,
            msrs: self.msrs,
        })
    }
}

/// What KVM says of processors.
fn supported(config: &Config) -> Result<CpuId, MachineError> {
    let supported = config.kvm.get_supported_cpuid(kvm_bindings::KVM_MAX_CPUID_ENTRIES);
    let mut supported = supported.map_err(kvm("say what processors are like"))?;
    if config.flavour == Flavour::Pvm {
        cpuid::answer_briefly(&mut supported);
    }
    Ok(supported)
}

fn describe(vcpu: &VcpuFd, supported: &CpuId, index: u32, vcpus: u32) -> Result<(), MachineError> {
    let cpuid = cpuid::of(supported, index, vcpus).map_err(|_| too_many("describe a processor"))?;
    vcpu.set_cpuid2(&cpuid).map_err(kvm("describe a processor"))
}

fn connect(vm: &VmFd, index: usize, device: &Transport) -> Result<(), kvm_ioctls::Error> {
    let registers = DEVICES + index as u64 * SIZE;
    for (queue, kick) in (0u32..).zip(device.kicks()) {
        vm.register_ioevent(kick.for_kvm(), &IoEventAddress::Mmio(registers + QUEUE_NOTIFY), queue)?;
    }
    Ok(())
}

fn console(vm: &VmFd, file: File) -> Result<Console, MachineError> {
    let line = Event::new().map_err(|source| MachineError::Host { step: "make a console", source })?;
    vm.register_irqfd(line.for_kvm(), SERIAL_INTERRUPT).map_err(kvm("connect the console"))?;
    Ok(Console::new(ConsoleLine(line), file))
}

fn device_parameters(count: usize) -> String {
    (0..count).map(|index| format!(" virtio_mmio.device={}", device_word(index))).collect()
}

/// Tells a kernel where the device with this index is: Documentation/admin-guide/kernel-parameters.txt, `virtio_mmio.device`.
pub fn device_word(index: usize) -> String {
    format!("{SIZE:#x}@{:#x}:{}", DEVICES + index as u64 * SIZE, FIRST_INTERRUPT + index as u32)
}

fn kvm(step: &'static str) -> impl FnOnce(kvm_ioctls::Error) -> MachineError {
    move |source| MachineError::Kvm { step, source }
}

fn too_many(step: &'static str) -> MachineError {
    MachineError::Kvm { step, source: kvm_ioctls::Error::new(libc::E2BIG) }
}
