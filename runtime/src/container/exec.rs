//! `exec`: a further process in a running container, with a proxy of its own on the host.

use std::io;
use std::os::fd::OwnedFd;
use std::path::PathBuf;

use oci_spec::runtime::{Capability, LinuxCapabilities, Process as OciProcess, User};
use runvm_protocol::{PRESERVED_FIRST, agent as wire};
use rustix::process::setsid;

use crate::agent::{Agent, AgentError, Descriptors, Exit, Plan, Relay, preserved};
use crate::bundle::Bundle;
use crate::error::{Error, Result, sentence};
use crate::host::process::ProcessIdentity;
use crate::host::terminal::RawTerminal;
use crate::monitor::{
    self, Globals, KILLED, Launched, Owner, Process, ToOwner, attend, controlling_terminal, single_threaded,
};
use crate::state::{self, Container, Status};

/// The largest process.json that is read, in bytes.
const MAX_PROCESS: u64 = 4 << 20;

/// Which process is wanted.
#[derive(Clone, Debug)]
pub enum ProcessSource {
    /// The `process` object in this file.
    File(PathBuf),
    /// The container's own process with these changes.
    Like(Changes),
}

/// How a process differs from its container's first one.
#[derive(Clone, Debug, Default)]
pub struct Changes {
    /// The program and its arguments.
    pub args: Vec<String>,
    /// `NAME=value`, added to the container's.
    pub env: Vec<String>,
    /// The working directory.
    pub cwd: Option<PathBuf>,
    /// `UID[:GID]`.
    pub user: Option<String>,
    /// Additional group IDs.
    pub additional_gids: Vec<u32>,
    /// Capabilities to be added.
    pub caps: Vec<String>,
    /// Whether it has a terminal.
    pub terminal: bool,
    /// Whether it may gain no privileges; the container's where not said.
    pub no_new_privs: Option<bool>,
}

/// What `exec` is asked for.
#[derive(Clone, Debug)]
pub struct Exec {
    /// The container.
    pub id: String,
    /// The process.
    pub process: ProcessSource,
    /// The cgroup below the container's that it runs in; empty for the container's own.
    pub cgroup: String,
    /// Whether the command returns once the process runs.
    pub detach: bool,
    /// Where the proxy's PID is written.
    pub pid_file: Option<PathBuf>,
    /// The socket that gets a descriptor of the proxy.
    pub pidfd_socket: Option<PathBuf>,
    /// The socket that gets the terminal's master.
    pub console_socket: Option<PathBuf>,
    /// How many of this process's descriptors from 3 on it is handed.
    pub preserve_fds: u32,
}

/// Runs a process in a container; its exit status, or 0 once it runs where it is detached.
///
/// # Errors
/// [`Error::NotRunning`] where the container has no processes; the agent's.
pub fn exec(globals: &Globals, options: &Exec) -> Result<u8> {
    let preserved = preserved::take(PRESERVED_FIRST, options.preserve_fds)?;
    let container = Container::look(&globals.root, &options.id)?;
    match container.status() {
        Status::Running | Status::Created => {}
        // Nor with runc's --ignore-paused: where it would have the process wait, here the whole machine rests.
        Status::Paused => return Err(Error::Usage("cannot exec in a paused container: resume it first".to_owned())),
        _ => return Err(Error::NotRunning),
    }
    let process = process(&container, &options.process)?;
    let terminal = process.terminal().unwrap_or(false);
    if terminal && options.detach && options.console_socket.is_none() {
        return Err(Error::Usage("a detached process with a terminal needs --console-socket".to_owned()));
    }
    if !options.detach && options.console_socket.is_none() {
        tell_of(options, std::process::id())?;
        return foreground(&container, &process, &options.cgroup, preserved);
    }
    let work = |owner, preserved| proxy(&container, options, &process, owner, preserved);
    let mut launched = Launched::start(preserved, work)?;
    tell_of(options, launched.identity.pid)?;
    launched.go();
    launched.await_created()?;
    if options.detach {
        return Ok(0);
    }
    let status = launched.child.wait().map_err(Error::system("wait for the process"))?;
    Ok(status.code().and_then(|code| u8::try_from(code).ok()).unwrap_or(u8::MAX))
}

/// Says which process is the proxy.
fn tell_of(options: &Exec, pid: u32) -> Result<()> {
    options.pidfd_socket.as_ref().map_or(Ok(()), |socket| super::send_pidfd(socket, pid))?;
    options.pid_file.as_ref().map_or(Ok(()), |path| super::write_pid_file(path, pid))
}

/// The process that is wanted, in full.
fn process(container: &Container, source: &ProcessSource) -> Result<OciProcess> {
    match source {
        ProcessSource::File(path) => {
            let text = crate::bundle::read_bounded(path, MAX_PROCESS).map_err(Error::file("read --process", path))?;
            serde_json::from_str(&text)
                .map_err(|error| Error::Usage(format!("{} is not an OCI process: {error}", path.display())))
        }
        ProcessSource::Like(changes) => {
            let bundle = Bundle::load(&container.record.bundle)?;
            let own = bundle.spec.process().clone().unwrap_or_default();
            changed(own, changes)
        }
    }
}

fn changed(mut process: OciProcess, changes: &Changes) -> Result<OciProcess> {
    process.set_args(Some(changes.args.clone())).set_terminal(Some(changes.terminal));
    process.set_apparmor_profile(None).set_selinux_label(None);
    let mut env = process.env().clone().unwrap_or_default();
    env.extend(changes.env.iter().cloned());
    process.set_env(Some(env));
    if let Some(cwd) = &changes.cwd {
        process.set_cwd(cwd.clone());
    }
    if let Some(no_new_privs) = changes.no_new_privs {
        process.set_no_new_privileges(Some(no_new_privs));
    }
    process.set_user(changed_user(process.user().clone(), changes)?);
    if !changes.caps.is_empty() {
        let capabilities = add_capabilities(process.capabilities().clone().unwrap_or_default(), &changes.caps)?;
        process.set_capabilities(Some(capabilities));
    }
    Ok(process)
}

/// The container's user, but for what is named: as with runc a UID alone leaves the groups.
fn changed_user(mut user: User, changes: &Changes) -> Result<User> {
    if let Some(text) = &changes.user {
        let no_numbers = |_| Error::Usage(format!("--user {text}: give numbers, UID or UID:GID"));
        let (uid, gid) = text.split_once(':').map_or((text.as_str(), None), |(uid, gid)| (uid, Some(gid)));
        user.set_uid(uid.parse().map_err(no_numbers)?);
        if let Some(gid) = gid {
            user.set_gid(gid.parse().map_err(no_numbers)?);
        }
    }
    let own = user.additional_gids().iter().flatten();
    let gids: Vec<_> = own.chain(&changes.additional_gids).copied().collect();
    user.set_additional_gids(Some(gids).filter(|gids| !gids.is_empty()));
    Ok(user)
}

fn add_capabilities(mut capabilities: LinuxCapabilities, names: &[String]) -> Result<LinuxCapabilities> {
    for name in names {
        let capability: Capability = serde_json::from_value(name.to_uppercase().into())
            .map_err(|_| Error::Usage(format!("--cap {name}: there is no such capability")))?;
        let with = |set: &Option<std::collections::HashSet<Capability>>| {
            let mut set = set.clone().unwrap_or_default();
            set.insert(capability);
            Some(set)
        };
        let (bounding, effective, permitted) =
            (with(capabilities.bounding()), with(capabilities.effective()), with(capabilities.permitted()));
        capabilities.set_bounding(bounding).set_effective(effective).set_permitted(permitted);
    }
    Ok(capabilities)
}

/// Runs the process with this command as its proxy.
fn foreground(container: &Container, process: &OciProcess, cgroup: &str, preserved: Vec<OwnedFd>) -> Result<u8> {
    let terminal = process.terminal().unwrap_or(false);
    let _raw = match terminal {
        true => RawTerminal::new(io::stdin()).map_err(Error::system("set up the terminal"))?,
        false => None,
    };
    single_threaded(async {
        let descriptors = Descriptors::inherited(terminal).and_then(|descriptors| descriptors.with(preserved));
        let descriptors = descriptors.map_err(Error::system("duplicate the stdio"))?;
        let (process, relay) = begin(container, process, cgroup, descriptors).await?;
        let own = io::stdin();
        let own = terminal.then(|| std::os::fd::AsFd::as_fd(&own).try_clone_to_owned()).transpose();
        let own = own.map_err(Error::system("duplicate the stdio"))?;
        status(attend(process, relay, own.as_ref()).await)
    })
}

/// The status of a process whose container ended under it is that of a killed one.
fn status(end: std::result::Result<Exit, AgentError>) -> Result<u8> {
    match end {
        Ok(exit) => Ok(exit.status),
        Err(error) if error.is_end_of_guest() => Ok(KILLED),
        Err(error) => Err(error.into()),
    }
}

async fn begin(
    container: &Container,
    process: &OciProcess,
    cgroup: &str,
    descriptors: Descriptors,
) -> Result<(Process, Relay)> {
    let agent: Agent = monitor::connect(container.dir()).await?;
    let process_of_guest =
        Process { agent, container_id: container.record.id.clone(), exec_id: format!("exec-{}", std::process::id()) };
    let relay = start_process(&process_of_guest, process, cgroup, descriptors, true).await?;
    Ok((process_of_guest, relay))
}

/// Has the guest start a further process, with the IDs in `place`; its joined streams. With a `lifeline` the process
/// ends when they do.
///
/// # Errors
/// [`Error::Agent`].
pub async fn start_process(
    place: &Process,
    process: &OciProcess,
    cgroup: &str,
    descriptors: Descriptors,
    lifeline: bool,
) -> Result<Relay> {
    // Not the ID, which may be longer than a key.
    let key = format!("exec-{}-{}", std::process::id(), crate::log::monotonic_us());
    let mut process = process.clone();
    process.set_apparmor_profile(None).set_selinux_label(None);
    let request = wire::ExecProcessRequest {
        container_id: place.container_id.clone(),
        exec_id: place.exec_id.clone(),
        process: serde_json::to_vec(&process).map_err(Error::system("write the process"))?,
        cgroup: cgroup.to_owned(),
        ..Default::default()
    };
    let plan = Plan::of(&descriptors).with_lifeline(lifeline);
    let streams = place.agent.exec_process(request, &key, &plan).await?;
    Ok(Relay::join(descriptors, streams))
}

/// The process that stands for one exec: the PID that engines are told. It ends with the exec's status, and the exec with it.
fn proxy(container: &Container, options: &Exec, process: &OciProcess, mut owner: Owner, preserved: Vec<OwnedFd>) -> u8 {
    match stand_for_process(container, options, process, &mut owner, preserved) {
        Ok(status) => status,
        Err(error) => {
            let _ = owner.send(&ToOwner::Failed { message: sentence(&error) });
            u8::MAX
        }
    }
}

fn stand_for_process(
    container: &Container,
    options: &Exec,
    process: &OciProcess,
    owner: &mut Owner,
    preserved: Vec<OwnedFd>,
) -> Result<u8> {
    setsid().map_err(Error::system("make a session"))?;
    owner.await_go().map_err(Error::system("wait for `runvm exec`"))?;
    let terminal = match &options.console_socket {
        Some(socket) if process.terminal().unwrap_or(false) => Some(controlling_terminal(socket)?),
        _ => None,
    };
    if let Some(own) = ProcessIdentity::of(std::process::id()) {
        state::note_exec(container.dir(), own)?;
    }
    single_threaded(async {
        let descriptors = match &terminal {
            Some(slave) => Descriptors::terminal(slave),
            None => Descriptors::inherited(false),
        };
        let descriptors = descriptors.and_then(|descriptors| descriptors.with(preserved));
        let descriptors = descriptors.map_err(Error::system("duplicate the stdio"))?;
        let (process, relay) = begin(container, process, &options.cgroup, descriptors).await?;
        monitor::release_stdio().map_err(Error::system("release the stdio"))?;
        owner.send(&ToOwner::Created { helpers: Vec::new() }).map_err(Error::system("talk to `runvm exec`"))?;
        owner.dismiss();
        status(attend(process, relay, terminal.as_ref()).await)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn changes_are_applied_to_the_containers_process() {
        let own: OciProcess = serde_json::from_str(
            r#"{"cwd":"/","args":["a"],"env":["A=1"],"user":{"uid":5,"gid":6},"noNewPrivileges":true}"#,
        )
        .unwrap();
        let changes = Changes {
            args: vec!["b".into(), "c".into()],
            env: vec!["B=2".into()],
            user: Some("7:8".into()),
            caps: vec!["cap_net_admin".into()],
            ..Changes::default()
        };
        let process = changed(own, &changes).unwrap();
        assert_eq!(process.args().as_deref(), Some(&["b".to_owned(), "c".to_owned()][..]));
        assert_eq!(process.env().as_ref().unwrap(), &["A=1", "B=2"]);
        assert_eq!((process.user().uid(), process.user().gid()), (7, 8));
        assert_eq!(process.no_new_privileges(), Some(true));
        let bounding = process.capabilities().as_ref().unwrap().bounding().clone().unwrap();
        assert!(bounding.contains(&Capability::NetAdmin));
    }

    #[test]
    fn groups_stay_unless_they_are_named() {
        let own: User = serde_json::from_str(r#"{"uid":5,"gid":6,"additionalGids":[7]}"#).unwrap();
        let changes = Changes { user: Some("8".into()), additional_gids: vec![9], ..Changes::default() };
        let user = changed_user(own, &changes).unwrap();
        assert_eq!((user.uid(), user.gid()), (8, 6));
        assert_eq!(user.additional_gids().as_deref(), Some(&[7, 9][..]));
    }

    #[test]
    fn arguments_that_mean_nothing_are_refused() {
        let root = Changes { user: Some("root".into()), ..Changes::default() };
        assert!(changed_user(User::default(), &root).unwrap_err().to_string().contains("--user root"));
        let caps = add_capabilities(LinuxCapabilities::default(), &["CAP_FLY".into()]);
        assert!(caps.unwrap_err().to_string().contains("--cap CAP_FLY"));
    }
}
