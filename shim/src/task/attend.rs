//! The end of a process: it is waited for, told in order, and its output seen off. With the last process of a pod's
//! containers ends their VM.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use containerd_shim_protos::events::task::{TaskExit, TaskOOM};
use runvm::agent::{AgentError, Exit, Output as Written, RunningRelay};
use runvm::error::sentence;
use runvm::monitor::KILLED;
use runvm::pod::Pod;

use super::Tasks;
use super::container::Container;
use super::process::{End, Output, Phase, Process};
use crate::stdio::Logger;
use crate::wire;

/// How long the end of a container waits for its execs to take their leave, which end with it, and that of a process for
/// those who take its output.
const PARTING: Duration = Duration::from_secs(2);

/// How long the end of a process waits for its output to be closed.
const LINGER: Duration = Duration::from_millis(100);

impl Tasks {
    /// Stands for a process from its creation to the end of its output.
    pub(super) fn attend(
        self: &Arc<Self>,
        container: &Arc<Container>,
        process: &Arc<Process>,
        relay: RunningRelay,
        logger: Option<Logger>,
    ) {
        let (tasks, container, attended) = (self.clone(), container.clone(), process.clone());
        let carrier = tokio::spawn(async move {
            let exit = end_of(&container, &attended).await;
            if attended.has_streams() {
                see_off(&attended, &relay, exit.output).await;
            }
            tasks.tell_end(&container, &attended, exit).await;
            relay.drained(exit.output).await;
            attended.output().send_replace(Output::Drained);
            if attended.exec_id.is_empty() {
                tasks.end_if_idle(&container).await;
            }
            relay.closed().await;
            drop(relay);
            if let Some(logger) = logger {
                logger.finish().await;
            }
            attended.output().send_replace(Output::Closed);
        });
        process.carried_by(carrier.abort_handle());
    }

    /// Tells of the container's OOM kills as they happen.
    pub(super) fn attend_memory(self: &Arc<Self>, container: &Arc<Container>) {
        let (tasks, container) = (self.clone(), container.clone());
        tokio::spawn(async move {
            let mut known = 0;
            // An error is the end of the container or its VM.
            while let Ok(news) = container.pod.agent().await_out_of_memory(&container.id, known).await {
                if news.kills > known {
                    tasks.tell_oom(&container);
                }
                if news.ended || news.kills <= known {
                    return;
                }
                known = news.kills;
            }
        });
    }

    fn tell_oom(&self, container: &Container) {
        if container.first_oom() {
            self.events.publish(&TaskOOM { container_id: container.id.clone(), ..Default::default() });
        }
    }

    async fn tell_end(&self, container: &Container, process: &Process, exit: Exit) {
        let init = process.exec_id.is_empty();
        if init {
            container.execs_end(PARTING).await;
        }
        let _turn = process.turn().await;
        if init && exit.oom_killed {
            self.tell_oom(container);
        }
        let end = End { status: exit.status, at: SystemTime::now() };
        process.stopped(end);
        self.events.publish(&TaskExit {
            container_id: container.id.clone(),
            id: if init { container.id.clone() } else { process.exec_id.clone() },
            pid: container.pod.pid(),
            exit_status: end.status.into(),
            exited_at: Some(wire::timestamp(end.at)).into(),
            ..Default::default()
        });
    }

    /// A pod that runs nothing any more needs no VM: what is left to be told of its containers is known here.
    async fn end_if_idle(&self, last: &Container) {
        last.execs_drain(PARTING).await;
        let pod = {
            let mut place = self.pod.lock().await;
            let idle = self.containers().iter().all(|container| {
                matches!(container.init.phase(), Phase::Stopped(_))
                    && *container.init.output().borrow() >= Output::Drained
            });
            match &*place {
                Some(held) if idle && !held.kept && Arc::ptr_eq(&held.pod, &last.pod) => place.take(),
                _ => None,
            }
        };
        if let Some(held) = pod {
            held.pod.end().await;
        }
    }
}

/// Has containerd get what a process wrote into streams, and their end: it takes no more from them once it hears of the
/// process's. A fifo keeps it.
async fn see_off(process: &Process, relay: &RunningRelay, written: Written) {
    if tokio::time::timeout(PARTING, relay.drained(written)).await.is_err() {
        return;
    }
    // Children of the process that go on writing are not waited for.
    if tokio::time::timeout(LINGER, relay.closed()).await.is_ok() {
        let _ = tokio::time::timeout(PARTING, process.streams_part()).await;
    }
}

/// How a process ends. Without the guest's word it cannot go on, and nor can its VM.
async fn end_of(container: &Container, process: &Process) -> Exit {
    let waited = tokio::select! {
        exit = container.pod.agent().wait_process(&container.id, &process.exec_id) => exit,
        () = process.overdue() => Err(AgentError::Undead),
        reason = container.pod.ended() => {
            tracing::warn!("container {} ends with its VM: {reason}", container.id);
            return lost();
        }
    };
    waited.unwrap_or_else(|error| {
        tracing::warn!("nothing is known of a process of container {} any more: {}", container.id, sentence(&error));
        if !matches!(error, AgentError::Refused { .. }) {
            end_soon(&container.pod);
        }
        lost()
    })
}

fn lost() -> Exit {
    Exit { status: KILLED, oom_killed: false, output: Written::default() }
}

/// Ends a VM without waiting for it.
pub(super) fn end_soon(pod: &Arc<Pod>) {
    let pod = pod.clone();
    tokio::spawn(async move { pod.end().await });
}
