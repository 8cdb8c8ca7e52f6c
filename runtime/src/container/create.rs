//! `create`: from a bundle to a VM with a container in it that waits for `start`.

use std::os::fd::OwnedFd;
use std::path::PathBuf;

use runvm_protocol::PRESERVED_FIRST;

use crate::agent::preserved;
use crate::bundle::{self, Bundle, GuestSpec, lone_member};
use crate::error::{Error, Result};
use crate::host::cgroup::Cgroup;
use crate::host::fork::Forked;
use crate::host::hooks::{self, OfKind};
use crate::log;
use crate::monitor::{self, Charge, Globals, Launched};
use crate::state::{Container, Phase, Record, Status};

/// What `create` is asked for.
#[derive(Clone, Debug)]
pub struct Create {
    /// The container's ID.
    pub id: String,
    /// The folder of its bundle.
    pub bundle: PathBuf,
    /// The socket that gets the terminal's master.
    pub console_socket: Option<PathBuf>,
    /// Where the monitor's PID is written.
    pub pid_file: Option<PathBuf>,
    /// The socket that gets a descriptor of the monitor.
    pub pidfd_socket: Option<PathBuf>,
    /// How many of this process's descriptors from 3 on its first process is handed.
    pub preserve_fds: u32,
}

/// A created container, as its creator holds it.
#[derive(Debug)]
pub struct Running {
    /// Its monitor, a child of this process.
    pub monitor: Forked,
    /// Whether its process has a terminal.
    pub terminal: bool,
    /// Its folder.
    pub folder: PathBuf,
}

/// Creates a container. After an error nothing of it is left.
///
/// # Errors
/// [`Error`].
pub fn create(globals: &Globals, options: &Create) -> Result<Running> {
    log::stage("create main");
    let preserved = preserved::take(PRESERVED_FIRST, options.preserve_fds)?;
    let bundle = Bundle::load(&options.bundle)?;
    check_terminal(&bundle, options)?;
    let guest = bundle::split(&bundle, &options.id)?;
    bundle::mount_points::make(&bundle)?;
    bundle::remark(&bundle.spec);
    let mut container = Container::create(&globals.root, Record::new(&options.id, &bundle))?;
    let launched = expect_vacancy(globals, &container)
        .and_then(|()| launch(globals, options, &bundle, &guest, &mut container, preserved));
    let launched = launched.and_then(|mut launched| match bring_up(options, &bundle, &mut container, &mut launched) {
        Ok(()) => Ok(launched),
        Err(error) => {
            launched.child.kill();
            Err(error)
        }
    });
    match launched {
        Ok(launched) => {
            log::stage("created");
            Ok(Running { monitor: launched.child, terminal: bundle.terminal(), folder: container.dir().to_owned() })
        }
        Err(error) => {
            if let Err(left) = super::delete::clean_up(&mut container) {
                tracing::warn!("after a failed create: {left}");
            }
            Err(error)
        }
    }
}

fn check_terminal(bundle: &Bundle, options: &Create) -> Result<()> {
    match (bundle.terminal(), &options.console_socket) {
        (false, Some(_)) => {
            Err(Error::Usage("--console-socket is given, but process.terminal in config.json is not true".to_owned()))
        }
        _ => Ok(()),
    }
}

/// A pod's namespaces, the network's above all, are those of one VM.
fn expect_vacancy(globals: &Globals, container: &Container) -> Result<()> {
    let Some(pod) = lone_member::pod_of(&container.record.annotations) else { return Ok(()) };
    let others = Container::list(&globals.root)?.into_iter().filter(|other| other.record.id != container.record.id);
    let mut neighbours = others.filter(|other| lone_member::pod_of(&other.record.annotations) == Some(pod));
    match neighbours.find(|other| other.status() != Status::Stopped) {
        None => Ok(()),
        Some(other) => Err(Error::PodTaken { pod: pod.to_owned(), other: other.record.id }),
    }
}

fn launch(
    globals: &Globals,
    options: &Create,
    bundle: &Bundle,
    guest: &GuestSpec,
    container: &mut Container,
    preserved: Vec<OwnedFd>,
) -> Result<Launched> {
    let cgroup = Cgroup::create(&bundle.spec, &options.id, container.record.size.memory)?;
    container.record.cgroups = cgroup.folders().to_vec();
    container.save()?;
    let charge = Charge {
        id: &options.id,
        folder: container.dir(),
        bundle,
        guest,
        cgroup: &cgroup,
        console_socket: options.console_socket.as_deref(),
        globals,
    };
    let launched = Launched::start(preserved, |owner, preserved| monitor::main(&charge, owner, preserved))?;
    container.record.monitor = Some(launched.identity);
    Ok(launched)
}

fn bring_up(options: &Create, bundle: &Bundle, container: &mut Container, launched: &mut Launched) -> Result<()> {
    container.save()?;
    let hooks = bundle.spec.hooks().as_ref().map(hooks::creating).unwrap_or_default();
    let waits = hooks.iter().any(|(_, hooks)| !hooks.is_empty());
    if !waits {
        launched.go();
    }
    launched.await_ready()?;
    if waits {
        run_hooks(hooks, container, launched.identity.pid)?;
        launched.go();
    }
    container.record.helpers = launched.await_created()?;
    container.record.phase = Phase::Created;
    container.save()?;
    let pid = launched.identity.pid;
    options.pidfd_socket.as_ref().map_or(Ok(()), |socket| super::send_pidfd(socket, pid))?;
    options.pid_file.as_ref().map_or(Ok(()), |path| super::write_pid_file(path, pid))
}

fn run_hooks(hooks: [OfKind<'_>; 3], container: &Container, monitor: u32) -> Result<()> {
    let state = super::oci_state(container)?;
    let [prestart, runtime, (kind, inside)] = hooks;
    for (kind, hooks) in [prestart, runtime] {
        hooks::run(kind, hooks, &state)?;
    }
    Ok(hooks::run_inside(kind, inside, &state, monitor)?)
}
