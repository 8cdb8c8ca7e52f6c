//! The daemon: virtiofsd's library over the tree, with the settings that suit a container's files.

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::os::linux::net::SocketAddrExt as _;
use std::os::unix::net::{SocketAddr, UnixListener, UnixStream};
use std::sync::Arc;
use std::time::Duration;

use vhost::vhost_user::Listener;
use vhost_user_backend::VhostUserDaemon;
use virtiofsd::limits::setup_rlimit_nofile;
use virtiofsd::passthrough::xattrmap::XattrMap;
use virtiofsd::passthrough::{CachePolicy, Config, NegotiationMode, PassthroughFs};
use virtiofsd::vhost_user::{VhostUserFsBackend, VhostUserFsBackendBuilder};
use vm_memory::{GuestMemoryAtomic, GuestMemoryMmap};

use super::tree::step;
use super::{Export, Fresh, SetupError, confine, control, log, tree};

/// How long the guest may believe what it knows of names and attributes: as long as a change on the host takes to
/// be seen. File contents are kept (hence the policy "always") until the time of the last change or the size that is
/// seen so differs: forgetting them whenever a file is opened made starting a program take twice as long.
const TRUST: Duration = Duration::from_secs(1);

/// No pool: requests are served one after another by the thread that hears of them. Handing each to another thread made
/// all of them slower by a quarter.
const THREADS: usize = 0;

/// Descriptors that the process needs for itself. Every file that the guest knows, and every one that it has open,
/// costs one more, so the limit of open files (a million, or as many as the host allows) bounds what a guest can pin
/// here; beyond it the guest is told ENFILE. File handles in their stead would need `CAP_DAC_READ_SEARCH`, with which a
/// process that was taken over could open any file of an exported file system, past the walls of its mount namespace.
const OWN_DESCRIPTORS: u64 = 128;

/// Attributes go to the host as they are, where an image's file capabilities have to be seen by the engine; except
/// `trusted.*` (an overlay in the guest needs them, this process may not set them), which live under a prefix that
/// the guest's users cannot reach, and those of the host's security modules, which are not the guest's business.
const ATTRIBUTES: &str = ":prefix:all:trusted.:user.virtiofs.: \
     :bad:all:trusted.:trusted.: \
     :bad:all:user.virtiofs.:user.virtiofs.: \
     :ok:all:security.capability:security.capability: \
     :unsupported:all:security.:security.: \
     :ok:all:::";

/// What is served.
pub type Files = Fresh<PassthroughFs>;

type Server = VhostUserDaemon<Arc<VhostUserFsBackend<Files>>>;

/// Runs the daemon from its first moment to the VMM's last. What goes wrong is told to the parent.
pub(super) fn run() -> Result<(), SetupError> {
    confine::close_inherited().map_err(step("close inherited descriptors"))?;
    let control = UnixStream::from(confine::begin()?);
    let (server, reply) = match prepare(&control) {
        Ok((server, client)) => (Ok(server), Ok(client)),
        Err(error) => (Err(error.clone()), Err(error)),
    };
    control::send_reply(&control, reply).map_err(step("answer the parent"))?;
    drop(control);
    // However the VMM ends, it shows here as a broken connection, and is no failure of this process.
    server.map(|mut server| drop(server.wait()))
}

fn prepare(control: &UnixStream) -> Result<(Server, OwnedFd), SetupError> {
    let exports = control::receive_exports(control).map_err(step("read the exports"))?;
    let file_system = enter(&exports)?;
    let (listener, client) = connection().map_err(step("make the vhost-user socket"))?;
    confine::drop_privileges()?;
    confine::restrict_system_calls()?;
    let server = start(file_system, listener)?;
    Ok((server, client))
}

/// Makes the tree of these exports the whole file system of this process, in namespaces of its own, ready to be served.
///
/// # Errors
/// What could not be shared.
pub(crate) fn enter(exports: &[Export]) -> Result<Files, SetupError> {
    log::init();
    let descriptor_limit = setup_rlimit_nofile(None).map_err(SetupError::Serve)?;
    let own_descriptors = tree::own_descriptors()?;
    tree::enter(exports)?;
    let files = PassthroughFs::new(config(own_descriptors, descriptor_limit)?).map_err(step("open the share"))?;
    Ok(Fresh::over(files))
}

/// A listener, and its one client waiting. The name is in this process's own network namespace: nobody else can
/// connect, and nothing is left of it.
fn connection() -> io::Result<(UnixListener, OwnedFd)> {
    let address = SocketAddr::from_abstract_name("runvm-share")?;
    let listener = UnixListener::bind_addr(&address)?;
    let client = UnixStream::connect_addr(&address)?;
    Ok((listener, client.into()))
}

fn config(own_descriptors: OwnedFd, descriptor_limit: u64) -> Result<Config, SetupError> {
    let attributes = XattrMap::try_from(ATTRIBUTES).map_err(|error| SetupError::Serve(error.to_string()))?;
    Ok(Config {
        entry_timeout: TRUST,
        attr_timeout: TRUST,
        cache_policy: CachePolicy::Always,
        proc_sfd_rawfd: Some(File::from(own_descriptors)),
        guest_fd_limit: descriptor_limit.saturating_sub(OWN_DESCRIPTORS),
        // Each export is a device of its own in the guest, as inode numbers are unique only within one.
        announce_submounts: true,
        xattr: true,
        xattrmap: Some(attributes),
        posix_acl: NegotiationMode::Auto,
        // O_DIRECT means what it says, as it does to a process on the host.
        allow_direct_io: true,
        // Spares the guest asking for `security.capability` before every write.
        killpriv_v2: true,
        ..Config::default()
    })
}

fn start(file_system: Files, listener: UnixListener) -> Result<Server, SetupError> {
    let fail = |error: &dyn std::fmt::Display| SetupError::Serve(error.to_string());
    let backend = VhostUserFsBackendBuilder::default()
        .set_thread_pool_size(THREADS)
        .build(file_system)
        .map_err(|error| fail(&error))?;
    let memory = GuestMemoryAtomic::new(GuestMemoryMmap::new());
    let mut server = VhostUserDaemon::new("share".into(), Arc::new(backend), memory).map_err(|error| fail(&error))?;
    server.start(&mut Listener::from(listener)).map_err(|error| fail(&error))?;
    Ok(server)
}
