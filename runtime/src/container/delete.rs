//! `delete`: nothing of a container is left, whatever ended it.

use std::time::Duration;

use rustix::process::Signal;

use crate::error::{Error, Result};
use crate::host::{cgroup, hooks};
use crate::monitor::Globals;
use crate::state::{self, Container, StateError, Status};

/// How long a killed process may take to go.
const END_LIMIT: Duration = Duration::from_secs(20);

/// Deletes a container; with `force` also one that is not stopped, and one that is not there is no error.
///
/// # Errors
/// [`Error::CannotDelete`] for one that runs.
pub fn delete(globals: &Globals, id: &str, force: bool) -> Result<()> {
    let mut container = match Container::open(&globals.root, id) {
        Err(StateError::NotFound(_)) if force => return Ok(state::discard(&globals.root, id)?),
        container => container?,
    };
    match container.status() {
        Status::Stopped | Status::Created => {}
        // Its creator is gone, for it would hold the lock.
        Status::Creating => {}
        _ if force => {}
        status => return Err(Error::CannotDelete { id: id.to_owned(), status }),
    }
    let state = super::oci_state(&container)?;
    let poststop = container.record.hooks.as_ref().and_then(|hooks| hooks.poststop().clone());
    clean_up(&mut container)?;
    for hook in poststop.into_iter().flatten() {
        // One that fails keeps neither the others nor the container's end from happening.
        if let Err(error) = hooks::run("poststop", [&hook], &state) {
            tracing::warn!("{error}");
        }
    }
    Ok(())
}

/// Ends the container's processes, and removes its cgroups and its record.
pub(super) fn clean_up(container: &mut Container) -> Result<()> {
    let record = &container.record;
    for process in record.monitor.iter().chain(&record.helpers) {
        process.signal(Signal::KILL).map_err(Error::system("kill a process of the container"))?;
    }
    for process in record.monitor.iter().chain(&record.helpers) {
        if !process.await_end(END_LIMIT).map_err(Error::system("wait for a process of the container"))? {
            return Err(Error::System {
                action: "wait for a process of the container to end",
                source: std::io::ErrorKind::TimedOut.into(),
            });
        }
    }
    cgroup::remove(&record.cgroups)?;
    Ok(container.remove()?)
}
