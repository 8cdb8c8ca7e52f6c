//! What the host says of the guest as a whole.

use std::ffi::CString;
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd as _;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;

use libcontainer::oci_spec::runtime::{Root, Spec};
use runvm_protocol::{SHARE_MOUNT_POINT, SHARED_MEMORY, agent};
use rustix::fs::{AtFlags, CWD, StatxFlags};
use rustix::io::Errno;
use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};
use rustix::time::{ClockId, Timespec};

use crate::error::RequestError;
use crate::user_namespace::UserNamespace;
use crate::{log, network};

/// As much as the kernel's pool takes in.
const MAX_ENTROPY: usize = 512;

/// How far ahead the share's files are read: each request is a round to the host, which has them in memory.
const READ_AHEAD_KB: &str = "512";

/// Prepares the guest for its containers; the user namespace that they have, if any.
pub(crate) async fn configure(request: &agent::ConfigureSandboxRequest) -> Result<Option<UserNamespace>, RequestError> {
    set_clock(request.realtime_ns)?;
    if !request.hostname.is_empty() {
        rustix::system::sethostname(request.hostname.as_bytes()).map_err(RequestError::system("set the host name"))?;
    }
    if !request.entropy.is_empty() {
        add_entropy(&request.entropy).map_err(RequestError::system("credit the host's entropy"))?;
    }
    let user_namespace = match request.uid_mappings.is_empty() {
        true => None,
        false => Some(UserNamespace::make(&request.uid_mappings, &request.gid_mappings).await?),
    };
    // Loopback is there whatever network follows.
    network::configure(&agent::ConfigureNetworkRequest::new()).await?;
    for share in &request.shares {
        mount_share(share).map_err(RequestError::system(format!("mount the share {:?}", share.tag)))?;
    }
    log::stage("share mounted");
    Ok(user_namespace)
}

/// Makes the memory that containers share, unless it is there.
pub(crate) fn share_memory(bytes: u64) -> Result<(), RequestError> {
    let place = Path::new(SHARED_MEMORY);
    match std::fs::create_dir(place) {
        Ok(()) => {
            let flags = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
            let options = CString::new(format!("mode=1777,size={bytes}")).map_err(io::Error::other);
            options
                .and_then(|options| Ok(mount("shm", place, "tmpfs", flags, Some(options.as_c_str()))?))
                .inspect_err(|_| drop(std::fs::remove_dir(place)))
                .map_err(RequestError::system("mount the shared memory"))
        }
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
        Err(error) => Err(RequestError::system("make a place for the shared memory")(error)),
    }
}

/// Looks at the container's files in the share. Each of its exports is a file system that the kernel mounts where it is
/// first seen: were that in the mount namespace of a container, the next one would have it once more, with a cache of
/// its own, and see late what others write.
pub(crate) fn see_files(spec: &Spec) {
    let root = spec.root().as_ref().map(Root::path);
    let sources = spec.mounts().iter().flatten().filter_map(|mount| mount.source().as_ref());
    for path in root.into_iter().chain(sources).filter(|path| path.starts_with(SHARE_MOUNT_POINT)) {
        // What is not there is told by the mount that needs it.
        let _ = rustix::fs::statx(CWD, path, AtFlags::empty(), StatxFlags::TYPE);
    }
}

/// Lets go of what is mounted at these places of the share, and with it of all that the kernel keeps of its files.
pub(crate) fn release(places: &[String]) -> Result<(), RequestError> {
    for place in places {
        match unmount(place.as_str(), UnmountFlags::DETACH | UnmountFlags::NOFOLLOW) {
            // Nobody has looked at it since it came.
            Err(Errno::INVAL | Errno::NOENT) => {}
            released => released.map_err(RequestError::system(format!("let go of {place}")))?,
        }
    }
    Ok(())
}

/// Sets the clock to nanoseconds since the Unix epoch.
pub(crate) fn set_clock(realtime_ns: u64) -> Result<(), RequestError> {
    let set = || -> io::Result<()> {
        let (seconds, nanoseconds) = (realtime_ns / 1_000_000_000, realtime_ns % 1_000_000_000);
        let time = Timespec {
            tv_sec: i64::try_from(seconds).map_err(io::Error::other)?,
            tv_nsec: i64::try_from(nanoseconds).map_err(io::Error::other)?,
        };
        Ok(rustix::time::clock_settime(ClockId::Realtime, time)?)
    };
    set().map_err(RequestError::system("set the clock"))
}

const RNDADDENTROPY: libc::Ioctl = libc::_IOW::<[libc::c_int; 2]>(b'R' as u32, 0x03);
const RNDRESEEDCRNG: libc::Ioctl = libc::_IO(b'R' as u32, 0x07);

/// The argument of RNDADDENTROPY.
#[repr(C)]
struct Pool {
    bits: libc::c_int,
    size: libc::c_int,
    bytes: [u8; MAX_ENTROPY],
}

fn add_entropy(entropy: &[u8]) -> io::Result<()> {
    let entropy = &entropy[..entropy.len().min(MAX_ENTROPY)];
    let size = libc::c_int::try_from(entropy.len()).map_err(io::Error::other)?;
    let mut pool = Pool { bits: size * 8, size, bytes: [0; MAX_ENTROPY] };
    pool.bytes[..entropy.len()].copy_from_slice(entropy);
    let random = File::options().write(true).open("/dev/urandom")?;
    // SAFETY: the kernel reads the structure, and of its bytes no more than `size`.
    let added = unsafe { libc::ioctl(random.as_raw_fd(), RNDADDENTROPY, &raw const pool) };
    // SAFETY: it takes no argument.
    let reseeded = unsafe { libc::ioctl(random.as_raw_fd(), RNDRESEEDCRNG) };
    if added < 0 || reseeded < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

fn mount_share(share: &agent::Share) -> io::Result<()> {
    let target = Path::new(&share.mount_point);
    if !target.is_absolute() {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "the mount point is not absolute"));
    }
    std::fs::create_dir_all(target)?;
    mount(share.tag.as_str(), target, "virtiofs", MountFlags::empty(), None)?;
    let device = std::fs::metadata(target)?.dev();
    let settings = format!("/sys/class/bdi/{}:{}", libc::major(device), libc::minor(device));
    std::fs::write(format!("{settings}/read_ahead_kb"), READ_AHEAD_KB)
}
