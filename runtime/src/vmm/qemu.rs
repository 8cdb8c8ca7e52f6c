//! QEMU's microvm machine: virtio-mmio devices only, and no firmware to wait for.

use std::env;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::Stdio;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use command_fds::{CommandFdExt as _, FdMapping};
use runvm_protocol::mux;
use runvm_protocol::{SERIAL_PORT_NAME, SHARE_TAG};
use tokio::process::Command;

use super::assets::Assets;
use super::parameters::Translator;
use super::probe::{Accelerator, Kvm};
use super::{ByteStream, Channel, Early, Machine, Vm, Vmm, VmmError, parameters, settle};
use crate::host::process::{ProcessIdentity, end_with_owner, own_program};
use crate::log;
use crate::share;

const PROGRAM: &str = "qemu-system-x86_64";
/// The first descriptor number that QEMU gets for its connections; those below are its stdio.
const FIRST_FD: i32 = 3;
/// The first version whose translator is to be trusted with several processors at once. Before, what one of them translates
/// while another writes there can stay as it was: such a processor never sees that the kernel has patched itself, and hangs.
/// In turn instead (`thread=single`) they wait for each other, for seconds in a start.
const TRANSLATES_IN_PARALLEL: (u32, u32) = (8, 1);

/// How long the program may take to tell its version.
const VERSION_LIMIT: Duration = Duration::from_secs(10);

/// The backend over the distribution's QEMU.
#[derive(Debug)]
pub struct Qemu {
    assets: Assets,
}

impl Qemu {
    /// The backend that boots these kernels.
    pub fn new(assets: Assets) -> Self {
        Self { assets }
    }

    /// Whether the program is there.
    pub fn installed() -> bool {
        let path = env::var_os("PATH").unwrap_or_default();
        env::split_paths(&path).any(|folder| folder.join(PROGRAM).is_file())
    }
}

#[async_trait]
impl Vmm for Qemu {
    async fn boot(&self, machine: Machine, early: Early) -> Result<Vm, VmmError> {
        let kernel = self.assets.kernel(machine.accelerator)?;
        let initramfs = self.assets.initramfs()?;
        if !Self::installed() {
            return Err(VmmError::Program { program: PROGRAM, package: "qemu-system-x86" });
        }
        let mut command = Command::new(PROGRAM);
        settle(command.as_std_mut(), machine.cgroup.as_ref())?;
        let mut share = spawn_share(&machine)?;
        let (ours, theirs) = UnixStream::pair().map_err(VmmError::Start)?;
        let mut arguments = Arguments::default();
        let translator = match machine.accelerator {
            Accelerator::Kvm(_) => None,
            Accelerator::Tcg => Some(Translator {
                counter_khz: parameters::host_counter_khz(),
                parallel: machine.vcpus == 1 || version().await >= Some(TRANSLATES_IN_PARALLEL),
            }),
        };
        let parameters = parameters::qemu(&machine, translator.as_ref());
        arguments.machine(&machine, &kernel, &initramfs, translator.as_ref());
        arguments.channel(theirs.into());
        arguments.share(share.connect()?);
        for nic in machine.nics {
            arguments.nic(nic.tap, nic.mac);
        }
        arguments.add(&["-append", &(parameters + &arguments.announcement())]);
        let spare_nics = machine.spare_nics.into_iter().map(|nic| arguments.nic(nic.tap, nic.mac)).collect();
        command.args(&arguments.list);
        command
            .as_std_mut()
            .fd_mappings(arguments.descriptors)
            .map_err(|error| VmmError::Start(io::Error::other(error)))?;
        end_with_owner(command.as_std_mut());
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
        command.kill_on_drop(true);
        let mut process = command.spawn().map_err(VmmError::Start)?;
        let identity = process.id().and_then(ProcessIdentity::of);
        let identity = identity.ok_or_else(|| VmmError::Start(io::Error::other("it ended at once")))?;

        ours.set_nonblocking(true).map_err(VmmError::Start)?;
        let ours = tokio::net::UnixStream::from_std(ours).map_err(VmmError::Start)?;
        let (opener, driver) = mux::host(ours);
        tokio::spawn(async move {
            if let Err(error) = driver.run().await {
                tracing::debug!("the channel to the guest ended: {error}");
            }
        });
        log::stage("vmm started");
        let channel: Arc<dyn Channel> = Arc::new(SerialChannel(opener));
        // Whoever starts a machine and wants no way to its agent has none.
        let _ = early.send(channel.clone());
        let words = process.stderr.take().map(|stderr| Box::new(stderr) as Box<_>);
        Ok(Vm {
            process,
            identity,
            share: Some(share),
            words,
            template: None,
            channel,
            streams: mux::MAX_STREAMS,
            spare_nics,
        })
    }
}

/// The program's major and minor version; none where it does not tell.
async fn version() -> Option<(u32, u32)> {
    let output = Command::new(PROGRAM).arg("--version").stdin(Stdio::null()).kill_on_drop(true).output();
    let output = tokio::time::timeout(VERSION_LIMIT, output).await.ok()?.ok()?;
    parse_version(&String::from_utf8_lossy(&output.stdout))
}

/// Finds the version in the line "QEMU emulator version 7.2.22 (Debian 1:7.2+dfsg-7)".
fn parse_version(text: &str) -> Option<(u32, u32)> {
    let (_, version) = text.split_once(" version ")?;
    let mut numbers = version.split(|other: char| !other.is_ascii_digit()).map(|number| number.parse().ok());
    Some((numbers.next()??, numbers.next()??))
}

fn spawn_share(machine: &Machine) -> Result<share::Daemon, VmmError> {
    let mut program = own_program();
    settle(&mut program, machine.cgroup.as_ref())?;
    machine.log.hand_down_as_stderr(&mut program).map_err(VmmError::Start)?;
    end_with_owner(&mut program);
    Ok(share::spawn(program, &machine.exports)?)
}

/// Streams over the one virtio-serial port.
struct SerialChannel(mux::Opener);

#[async_trait]
impl Channel for SerialChannel {
    async fn open(&self) -> io::Result<ByteStream> {
        Ok(Box::new(self.0.open().await?))
    }
}

/// QEMU's command line, and the descriptors that it speaks of.
#[derive(Default)]
struct Arguments {
    list: Vec<String>,
    descriptors: Vec<FdMapping>,
    devices: u64,
}

impl Arguments {
    fn add(&mut self, words: &[&str]) {
        self.list.extend(words.iter().map(|&word| word.to_owned()));
    }

    /// Hands a descriptor to QEMU, and says by which number.
    fn descriptor(&mut self, parent_fd: OwnedFd) -> i32 {
        let child_fd = FIRST_FD + i32::try_from(self.descriptors.len()).unwrap_or(i32::MAX - FIRST_FD);
        self.descriptors.push(FdMapping { parent_fd, child_fd });
        child_fd
    }

    fn machine(&mut self, machine: &Machine, kernel: &Path, initramfs: &Path, translator: Option<&Translator>) {
        let (accelerator, processor) = match machine.accelerator {
            Accelerator::Kvm(Kvm::Ordinary) => ("kvm", "host"),
            // With this feature QEMU asks a PVM host for a register that it does not have, and aborts.
            Accelerator::Kvm(Kvm::Pvm) => ("kvm", "host,-arch-capabilities"),
            // The translator copies and clears a byte at a time where it offers "enhanced REP MOVSB/STOSB", else eight.
            Accelerator::Tcg => ("tcg,thread=multi", "max,-erms"),
        };
        let megabytes = machine.memory >> 20;
        // Without KVM's clock a guest asks an RTC for the time; one that is not there, for a whole second.
        let rtc = if translator.is_some() { "on" } else { "off" };
        // Where a guest is not told its counter's rate, it measures it by the PIT, and waits while it does.
        let pit = if translator.is_some_and(|translator| translator.counter_khz.is_none()) { "on" } else { "off" };
        let serial = if machine.console.is_some() { "on" } else { "off" };
        self.add(&[
            "-accel",
            accelerator,
            "-M",
            &format!(
                "microvm,memory-backend=memory,x-option-roms=off,isa-serial={serial},rtc={rtc},pit={pit},pic={pit},acpi=off,auto-kernel-cmdline=off"
            ),
            "-cpu",
            processor,
            "-smp",
            &machine.vcpus.to_string(),
            "-m",
            &format!("{megabytes}M"),
            "-object",
            &format!("memory-backend-memfd,id=memory,size={megabytes}M,share=on"),
            "-nodefaults",
            "-no-user-config",
            "-no-reboot",
            "-display",
            "none",
            "-sandbox",
            "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny",
            "-global",
            "virtio-mmio.force-legacy=false",
            "-kernel",
            &kernel.to_string_lossy(),
            "-initrd",
            &initramfs.to_string_lossy(),
            "-object",
            "rng-builtin,id=rng",
        ]);
        self.device("virtio-rng-device,rng=rng");
        if let Some(console) = &machine.console {
            self.add(&["-serial", &format!("file:{}", console.display())]);
        }
    }

    fn channel(&mut self, socket: OwnedFd) {
        let socket = self.descriptor(socket);
        self.add(&["-chardev", &format!("socket,id=agent,fd={socket}")]);
        // Each port that could be makes two queues, which the guest sets up with slow register exits.
        self.device("virtio-serial-device,max_ports=2");
        self.add(&["-device", &format!("virtserialport,nr=1,chardev=agent,name={SERIAL_PORT_NAME}")]);
    }

    fn share(&mut self, socket: OwnedFd) {
        let socket = self.descriptor(socket);
        self.add(&["-chardev", &format!("socket,id=share,fd={socket}")]);
        self.device(&format!("vhost-user-fs-device,chardev=share,tag={SHARE_TAG},queue-size=1024"));
    }

    /// Where the guest finds it.
    fn nic(&mut self, tap: OwnedFd, mac: [u8; 6]) -> String {
        let tap = self.descriptor(tap);
        let mac = mac.map(|byte| format!("{byte:02x}")).join(":");
        self.add(&["-netdev", &format!("tap,id=net{tap},fd={tap},vhost=off")]);
        self.device(&format!("virtio-net-device,netdev=net{tap},mac={mac}"))
    }

    /// A device in the next of the machine's places; where that is.
    fn device(&mut self, device: &str) -> String {
        let place = self.devices;
        self.devices += 1;
        self.add(&["-device", &format!("{device},bus=virtio-mmio-bus.{place}")]);
        whereabouts(place)
    }

    /// What tells the kernel of all devices that there are so far.
    fn announcement(&self) -> String {
        (0..self.devices).map(|place| format!(" virtio_mmio.device={}", whereabouts(place))).collect()
    }
}

/// Where a microvm has the device in one of its eight places, as for the kernel's parameter `virtio_mmio.device`: QEMU's
/// hw/i386/microvm.c.
fn whereabouts(place: u64) -> String {
    const SIZE: u64 = 512;
    const FIRST: u64 = 0xfeb0_0000;
    const FIRST_INTERRUPT: u64 = 5;
    format!("{SIZE}@{:#x}:{}", FIRST + place * SIZE, FIRST_INTERRUPT + place)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsRawFd as _;

    #[test]
    fn the_version_is_found_in_what_the_program_says() {
        let debian = "QEMU emulator version 7.2.22 (Debian 1:7.2+dfsg-7+deb12u18)\nCopyright (c) 2003-2022\n";
        assert_eq!(parse_version(debian), Some((7, 2)));
        assert_eq!(parse_version("QEMU emulator version 10.0.0\n"), Some((10, 0)));
        assert_eq!(parse_version("QEMU emulator version 11.1-rc0"), Some((11, 1)));
        for unknown in
            ["", "version 8.1", "QEMU emulator version ", "QEMU emulator version 8", "QEMU emulator version x.1"]
        {
            assert_eq!(parse_version(unknown), None, "{unknown}");
        }
    }

    #[test]
    fn each_descriptor_gets_a_number_of_its_own() {
        let mut arguments = Arguments::default();
        let (a, b) = UnixStream::pair().unwrap();
        arguments.channel(a.into());
        assert_eq!(arguments.nic(b.into(), [2, 0, 0, 0, 0, 0xff]), "512@0xfeb00200:6");
        let line = arguments.list.join(" ");
        assert!(line.contains("socket,id=agent,fd=3") && line.contains("tap,id=net4,fd=4"), "{line}");
        assert!(line.contains("mac=02:00:00:00:00:ff"), "{line}");
        let announced = " virtio_mmio.device=512@0xfeb00000:5 virtio_mmio.device=512@0xfeb00200:6";
        assert_eq!(arguments.announcement(), announced);
        assert_eq!(arguments.descriptors.len(), 2);
        assert!(arguments.descriptors.iter().all(|mapping| mapping.parent_fd.as_raw_fd() >= 0));
    }
}
