//! A machine with one of each device, and what stands on the host's side of them.

use std::env;
use std::error::Error;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read as _, Write as _};
use std::net::Shutdown;
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::os::unix::fs::OpenOptionsExt as _;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};

use kvm_ioctls::Kvm;
use runvm_vmm::Event;
use runvm_vmm::door::{Door, hand_over};
use runvm_vmm::machine::x86::boot::Kernel;
use runvm_vmm::machine::{Config, End, Flavour, Machine, PageMap, Resting};
use runvm_vmm::virtio::Device;
use runvm_vmm::virtio::balloon::{Backing, Balloon, Control};
use runvm_vmm::virtio::block::Block;
use runvm_vmm::virtio::fs::Fs;
use runvm_vmm::virtio::net::Net;
use runvm_vmm::virtio::rng::Rng;
use runvm_vmm::virtio::vsock::Vsock;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use virtiofsd::passthrough::{self, MigrationOnError, PassthroughFs};

pub type Result<T> = std::result::Result<T, Box<dyn Error + Send + Sync>>;

const MEMORY: u64 = 128 << 20;
const DISK: u64 = 1 << 20;
const PORT: u32 = 1023;
const MAC: [u8; 6] = [2, 0, 0, 0, 0, 1];
const PARAMETERS: &str =
    "noreplace-smp pci=off reboot=t panic=-1 random.trust_cpu=on dummy.numdummies=0 quiet clocksource=kvm-clock";
/// What the guest may be silent for.
const PATIENCE: Duration = Duration::from_secs(20);

/// A machine that runs, and the ways to its guest.
pub struct World {
    pub machine: Machine,
    doorway: UnixStream,
    balloon: Control,
    vcpus: u32,
}

/// The parts of a machine, and the host's ends of its devices.
struct Parts {
    config: Config,
    doorway: UnixStream,
    balloon: Control,
    knocked: Event,
}

/// Makes a home for a machine's files: a disk, and a folder to share.
pub fn make_home(home: &Path) -> Result<()> {
    fs::create_dir_all(home.join("share"))?;
    Ok(File::create(home.join("disk"))?.set_len(DISK)?)
}

impl World {
    /// A machine that has booted, and whose guest listens.
    pub fn boot(home: &Path, vcpus: u32) -> Result<Self> {
        let Parts { config, doorway, balloon, knocked } = Parts::make(home, vcpus)?;
        let kernel = Kernel {
            image: File::open(kernel(config.flavour)?)?,
            initramfs: Some(File::open(guest(home)?)?),
            command_line: PARAMETERS.to_owned(),
        };
        let machine = Machine::boot(config, kernel)?;
        machine.resume();
        let mut events = [PollFd::new(&knocked, PollFlags::IN), PollFd::new(machine.ended(), PollFlags::IN)];
        poll(&mut events, Some(&Timespec::try_from(PATIENCE)?))?;
        if events[0].revents().is_empty() {
            return Err("the guest does not listen".into());
        }
        Ok(Self { machine, doorway, balloon, vcpus })
    }

    /// The machine in these files, which goes on.
    pub fn restore(home: &Path, vcpus: u32, state: &Path, memory: &Path) -> Result<Self> {
        let Parts { config, doorway, balloon, .. } = Parts::make(home, vcpus)?;
        let machine = Machine::restore(config, Resting::open(&File::open(state)?, &File::open(memory)?)?)?;
        machine.resume();
        Ok(Self { machine, doorway, balloon, vcpus })
    }

    /// Writes the machine, which has to rest, into new files.
    pub fn save(&self, state: &Path, memory: &Path) -> Result<()> {
        let create = |path: &Path| OpenOptions::new().read(true).write(true).create_new(true).open(path);
        Ok(self.machine.save(&create(state)?, &create(memory)?, &PageMap::open()?)?)
    }

    /// A stream to the guest, which begins with this command.
    pub fn open(&self, command: u8) -> Result<UnixStream> {
        let (mut ours, theirs) = UnixStream::pair()?;
        hand_over(&self.doorway, &theirs)?;
        ours.set_read_timeout(Some(PATIENCE))?;
        ours.set_write_timeout(Some(PATIENCE))?;
        ours.write_all(&[command])?;
        Ok(ours)
    }

    /// Waits until all devices have gone on for a while. So many streams must have broken under the guest's hands until
    /// now, and nothing must have gone wrong.
    pub fn expect_progress(&self, resets: u32) -> Result<()> {
        let mut text = String::new();
        self.open(b'g')?.read_to_string(&mut text)?;
        let expected = format!("{} processors, {resets} resets, error: none\n", self.vcpus);
        if text == expected { Ok(()) } else { Err(format!("the guest says {text:?}, not {expected:?}").into()) }
    }

    /// Takes memory from the guest, and gives it back.
    pub fn use_balloon(&self) -> Result<()> {
        for pages in [2048, 0] {
            self.balloon.set_target(pages);
            let begun = Instant::now();
            while self.balloon.actual() != pages {
                if begun.elapsed() > PATIENCE {
                    return Err(format!("the balloon has {} pages, not {pages}", self.balloon.actual()).into());
                }
                std::thread::sleep(Duration::from_millis(5));
            }
        }
        Ok(())
    }

    /// Fails if the machine has ended.
    pub fn expect_alive(&self) -> Result<()> {
        let mut ended = [PollFd::new(self.machine.ended(), PollFlags::IN)];
        if poll(&mut ended, Some(&Timespec::default()))? == 0 {
            return Ok(());
        }
        match self.machine.wait() {
            End::Shutdown => Err("the guest has switched its machine off".into()),
            End::Failed(reason) => Err(reason.into()),
        }
    }
}

impl Parts {
    fn make(home: &Path, vcpus: u32) -> Result<Self> {
        let (doorway, door) = UnixStream::pair()?;
        door.set_nonblocking(true)?;
        let knocked = Event::new()?;
        let balloon = Balloon::new(Backing::Private);
        let control = balloon.control();
        let disk = OpenOptions::new().read(true).write(true).open(home.join("disk"))?;
        let root_dir = home.join("share").to_string_lossy().into_owned();
        // A file that is gone, and which the guest has not forgotten yet, keeps nobody from going on.
        let migration_on_error = MigrationOnError::GuestError;
        let share = PassthroughFs::new(passthrough::Config { root_dir, migration_on_error, ..Default::default() })?;
        let devices: Vec<Box<dyn Device>> = vec![
            Box::new(Vsock::new(Door::new(door.into()), PORT, knocked.try_clone()?)),
            Box::new(Fs::new("share", share)?),
            Box::new(Rng),
            Box::new(balloon),
            Box::new(Block::new(disk, "disk")?),
            Box::new(Net::new(tap()?, MAC, 1500)),
        ];
        let config = Config {
            kvm: Kvm::new()?,
            flavour: flavour()?,
            vcpus,
            memory: MEMORY,
            huge_pages: true,
            devices,
            unannounced: 0,
            console: None,
            confinement: Arc::new(|_| Ok(())),
        };
        Ok(Self { config, doorway, balloon: control, knocked })
    }
}

/// Streams what the guest sends back inverted, and compares it.
pub fn echo(stream: &UnixStream, round: u8) -> Result<()> {
    let sent: Vec<u8> = (0..60_000u32).map(|index| (index.wrapping_mul(31) >> 3) as u8 ^ round).collect();
    let mut got = vec![0; sent.len()];
    std::thread::scope(|scope| {
        let writing = scope.spawn(|| { stream }.write_all(&sent));
        { stream }.read_exact(&mut got)?;
        writing.join().unwrap_or_else(|_| Err(io::Error::other("panicked")))
    })?;
    if got.iter().zip(&sent).all(|(got, sent)| *got == !sent) { Ok(()) } else { Err("an echo is wrong".into()) }
}

/// Ends a stream of echoes in order, so that the guest sees no reset.
pub fn hang_up(mut stream: &UnixStream) -> Result<()> {
    stream.shutdown(Shutdown::Write)?;
    match stream.read(&mut [0])? {
        0 => Ok(()),
        _ => Err("more came back than was sent".into()),
    }
}

fn flavour() -> Result<Flavour> {
    let info = fs::read_to_string("/proc/cpuinfo")?;
    let virtualizes = info.split_ascii_whitespace().any(|word| word == "vmx" || word == "svm");
    Ok(if virtualizes { Flavour::Ordinary } else { Flavour::Pvm })
}

/// The kernel of an installation, as `make build` lays it out.
fn kernel(flavour: Flavour) -> Result<PathBuf> {
    let default = || Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/dist");
    let name = match flavour {
        Flavour::Ordinary => "vmlinux",
        Flavour::Pvm => "vmlinux-pvm",
    };
    let path = env::var_os("RUNVM_DIST").map_or_else(default, PathBuf::from).join("lib/runvm").join(name);
    if path.is_file() {
        return Ok(path);
    }
    Err(format!("there is no {}: run `make kernel`, or set RUNVM_DIST", path.display()).into())
}

/// An initramfs with `guest.c` as its init.
fn guest(home: &Path) -> Result<PathBuf> {
    let root = home.join("initramfs");
    fs::create_dir_all(&root)?;
    let source = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/snapshot/guest.c");
    run(Command::new("gcc").args(["-O1", "-static", "-o"]).arg(root.join("init")).arg(source))?;
    let archive = home.join("initramfs.cpio");
    let script = "cd \"$0\" && echo init | cpio --create --quiet --format=newc >\"$1\"";
    run(Command::new("sh").args(["-c", script]).arg(&root).arg(&archive))?;
    Ok(archive)
}

/// A tap behind which the host answers at 10.0.0.1, in a network namespace of the calling thread's own.
fn tap() -> Result<OwnedFd> {
    // SAFETY: it changes the calling thread's namespace and nothing in this process's memory.
    if unsafe { libc::unshare(libc::CLONE_NEWNET) } != 0 {
        return Err(format!("no network namespace can be made (run as root): {}", io::Error::last_os_error()).into());
    }
    let tap = OpenOptions::new().read(true).write(true).custom_flags(libc::O_NONBLOCK).open("/dev/net/tun")?;
    // SAFETY: all bits zero are a value of this structure.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (place, byte) in request.ifr_name.iter_mut().zip(b"tap0") {
        *place = byte.cast_signed();
    }
    request.ifr_ifru.ifru_flags = (libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR) as i16;
    // SAFETY: the kernel reads the structure, which is the one that this call takes, and writes a name into it.
    if unsafe { libc::ioctl(tap.as_raw_fd(), libc::TUNSETIFF, &raw mut request) } != 0 {
        return Err(io::Error::last_os_error().into());
    }
    run(Command::new("ip").args("address add 10.0.0.1/24 dev tap0".split(' ')))?;
    // The guest remembers the address wherever it goes on.
    run(Command::new("ip").args("link set tap0 address 02:00:00:00:00:02 up".split(' ')))?;
    Ok(tap.into())
}

fn run(command: &mut Command) -> Result<()> {
    match command.status()? {
        status if status.success() => Ok(()),
        status => Err(format!("{command:?}: {status}").into()),
    }
}
