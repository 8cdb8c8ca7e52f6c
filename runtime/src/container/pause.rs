//! `pause` and `resume`, and how the other verbs reach the guest of a container that may be paused.
//!
//! A pause has two parts. In the guest the container's processes are frozen. On the host the VM's processes are stopped,
//! by a signal that cannot be refused: no processor of the guest runs, whoever rules it, and no device is served. The
//! first part lets the guest be woken for a verb, and its container rest all the same.
//!
//! The guest's clocks go on meanwhile, as those of any frozen process do. Nobody loses patience: who is connected to the
//! guest waits without a bound, or hands over what the guest will find when it goes on.

use rustix::process::Signal;

use crate::agent::Agent;
use crate::error::{Error, Result};
use crate::monitor::{Globals, connect, single_threaded};
use crate::state::{Container, Status};

/// Has the container rest.
///
/// # Errors
/// [`Error::NotRunning`] where it does not run.
pub fn pause(globals: &Globals, id: &str) -> Result<()> {
    let mut container = Container::open(&globals.root, id)?;
    if !matches!(container.status(), Status::Running | Status::Created) {
        return Err(Error::NotRunning);
    }
    single_threaded(async { Ok(connect(container.dir()).await?.pause_container(id).await?) })?;
    container.record.paused = true;
    container.save()?;
    signal_vm(&container, Signal::STOP)
}

/// Lets a paused container go on.
///
/// # Errors
/// [`Error::NotPaused`] where it is not paused.
pub fn resume(globals: &Globals, id: &str) -> Result<()> {
    match Guest::of(globals, id) {
        Ok(mut guest) if guest.container.status() == Status::Paused => guest.resume(),
        Ok(_) | Err(Error::NotRunning) => Err(Error::NotPaused),
        Err(error) => Err(error),
    }
}

/// The guest of a container that has processes, to be asked something. One that is paused is awake as long as this is
/// there, and no other verb can resume it meanwhile.
pub(super) struct Guest {
    /// Its container.
    pub container: Container,
}

impl Guest {
    /// The guest of this container.
    ///
    /// # Errors
    /// [`Error::NotRunning`] where it has none.
    pub fn of(globals: &Globals, id: &str) -> Result<Self> {
        let mut container = Container::look(&globals.root, id)?;
        if container.status() == Status::Paused {
            container = Container::open(&globals.root, id)?;
        }
        Self::awake(container)
    }

    /// The same, for a verb that changes the record.
    ///
    /// # Errors
    /// [`Error::NotRunning`] where it has none.
    pub fn locked(globals: &Globals, id: &str) -> Result<Self> {
        Self::awake(Container::open(&globals.root, id)?)
    }

    fn awake(container: Container) -> Result<Self> {
        match container.status() {
            Status::Stopped | Status::Creating => return Err(Error::NotRunning),
            Status::Paused => signal_vm(&container, Signal::CONT)?,
            Status::Created | Status::Running => {}
        }
        Ok(Self { container })
    }

    /// Has the work done with its agent.
    pub fn ask<T>(&self, work: impl AsyncFnOnce(Agent) -> Result<T>) -> Result<T> {
        single_threaded(async { work(connect(self.container.dir()).await?).await })
    }

    /// Ends the pause, if there is one.
    pub fn resume(&mut self) -> Result<()> {
        if !self.container.record.paused {
            return Ok(());
        }
        let id = self.container.record.id.clone();
        self.ask(async |agent| Ok(agent.resume_container(&id).await?))?;
        self.container.record.paused = false;
        Ok(self.container.save()?)
    }

    /// Ends the pause of a container that was killed, and may be gone before it is asked to go on.
    pub fn release(mut self) {
        if self.resume().is_err() {
            self.container.record.paused = false;
        }
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        if self.container.record.paused
            && let Err(error) = signal_vm(&self.container, Signal::STOP)
        {
            tracing::warn!("the guest of a paused container stays awake, its processes frozen: {error}");
        }
    }
}

fn signal_vm(container: &Container, signal: Signal) -> Result<()> {
    container.record.helpers.iter().try_for_each(|process| {
        // One that has ended has taken the container with it, which its status tells.
        process.signal(signal).map_err(Error::system("signal the VM"))
    })
}
