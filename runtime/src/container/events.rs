//! `events`: what a container uses, and when its guest's kernel kills for want of memory.

use std::pin::pin;
use std::time::Duration;

use runvm_protocol::agent::ContainerStatisticsResponse as Statistics;
use tokio::time::{Instant, MissedTickBehavior, interval_at};

use super::pause::Guest;
use crate::error::{Error, Result};
use crate::monitor::{Globals, connect, single_threaded};

/// Something that is told of a container.
#[derive(Debug)]
pub enum Event {
    /// What it uses, as its guest says.
    Statistics(Box<Statistics>),
    /// A process of it was killed for want of memory.
    OutOfMemory,
}

/// What a container uses now.
///
/// # Errors
/// [`Error::NotRunning`] where it has no processes; the agent's.
pub fn statistics(globals: &Globals, id: &str) -> Result<Statistics> {
    single_threaded(ask(globals, id))
}

/// Tells of a container until it has ended, or `tell` says that nobody listens: of what it uses after each interval, and
/// of a kill when it comes.
///
/// # Errors
/// [`Error::NotRunning`] where it has no processes to begin with; the agent's.
pub fn events(globals: &Globals, id: &str, interval: Duration, tell: impl FnMut(Event) -> Result<bool>) -> Result<()> {
    match single_threaded(watch(globals, id, interval, tell)) {
        Err(Error::Agent(error)) if error.is_end_of_guest() => Ok(()),
        done => done,
    }
}

async fn watch(
    globals: &Globals,
    id: &str,
    interval: Duration,
    mut tell: impl FnMut(Event) -> Result<bool>,
) -> Result<()> {
    let mut known = ask(globals, id).await?.oom_kills;
    let guest = Guest::of(globals, id)?;
    let agent = connect(guest.container.dir()).await?;
    drop(guest);
    let mut ticks = interval_at(Instant::now() + interval, interval);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut kill = pin!(agent.await_out_of_memory(id, known));
    loop {
        let listened_to = tokio::select! {
            told = &mut kill => {
                let told = told?;
                let news = told.kills > known;
                known = told.kills;
                kill.set(agent.await_out_of_memory(id, known));
                (!news || tell(Event::OutOfMemory)?) && !told.ended
            }
            _ = ticks.tick() => match ask(globals, id).await {
                Ok(statistics) => tell(Event::Statistics(Box::new(statistics)))?,
                Err(Error::NotRunning) => false,
                Err(error) => return Err(error),
            },
        };
        if !listened_to {
            return Ok(());
        }
    }
}

async fn ask(globals: &Globals, id: &str) -> Result<Statistics> {
    let guest = Guest::of(globals, id)?;
    Ok(connect(guest.container.dir()).await?.statistics(id).await?)
}
