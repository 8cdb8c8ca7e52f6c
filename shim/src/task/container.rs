//! A container of the pod, with its first process and its execs.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use containerd_shim_protos::api::Status;
use futures::future::join_all;
use runvm::monitor;
use runvm::pod::Pod;

use super::process::{Output, Phase, Process};
use crate::errors::{Error, Result};
use crate::sync::lock;

/// A container.
pub struct Container {
    /// Its ID.
    pub id: String,
    /// Its bundle.
    pub bundle: PathBuf,
    /// Where it runs.
    pub pod: Arc<Pod>,
    /// Its first process.
    pub init: Arc<Process>,
    /// Whether its root file system was mounted for it.
    pub mounted: bool,
    execs: Mutex<HashMap<String, Arc<Process>>>,
    paused: AtomicBool,
    oom_told: AtomicBool,
}

impl Container {
    /// One that was created in `pod`.
    pub fn new(id: &str, bundle: PathBuf, pod: Arc<Pod>, init: Arc<Process>, mounted: bool) -> Self {
        Self {
            id: id.to_owned(),
            bundle,
            pod,
            init,
            mounted,
            execs: Mutex::default(),
            paused: AtomicBool::new(false),
            oom_told: AtomicBool::new(false),
        }
    }

    /// Its first process, or an exec's.
    ///
    /// # Errors
    /// [`Error::NoProcess`].
    pub fn process(&self, exec_id: &str) -> Result<Arc<Process>> {
        if exec_id.is_empty() {
            return Ok(self.init.clone());
        }
        lock(&self.execs).get(exec_id).cloned().ok_or_else(|| Error::NoProcess(exec_id.to_owned()))
    }

    /// Takes in an exec.
    ///
    /// # Errors
    /// [`Error::NoExec`] unless it can run; [`Error::Exists`].
    pub fn add(&self, exec: Process) -> Result<()> {
        match self.status() {
            Status::CREATED | Status::RUNNING => {}
            Status::STOPPED => return Err(Error::NoExec("stopped")),
            _ => return Err(Error::NoExec("paused")),
        }
        let mut execs = lock(&self.execs);
        if execs.contains_key(&exec.exec_id) {
            return Err(Error::Exists(exec.exec_id));
        }
        execs.insert(exec.exec_id.clone(), Arc::new(exec));
        Ok(())
    }

    /// Forgets an exec.
    pub fn remove(&self, exec_id: &str) {
        lock(&self.execs).remove(exec_id);
    }

    /// All execs that are known.
    pub fn execs(&self) -> Vec<Arc<Process>> {
        lock(&self.execs).values().cloned().collect()
    }

    /// Waits until no exec runs, for at most `limit`.
    pub async fn execs_end(&self, limit: Duration) {
        let running = self.execs().into_iter().filter(|exec| exec.phase() == Phase::Running);
        let ends = join_all(running.map(|exec| async move { exec.ended().await }));
        if tokio::time::timeout(limit, ends).await.is_err() {
            tracing::info!("the end of container {} is told before that of an exec", self.id);
        }
    }

    /// Waits until the output of its execs has gone, for at most `limit`.
    pub async fn execs_drain(&self, limit: Duration) {
        let ended = self.execs().into_iter().filter(|exec| matches!(exec.phase(), Phase::Stopped(_)));
        join_all(ended.map(|exec| async move { exec.output_reaches(Output::Drained, limit).await })).await;
    }

    /// What it is.
    pub fn status(&self) -> Status {
        match self.init.phase().status() {
            Status::RUNNING if self.paused.load(Ordering::Relaxed) => Status::PAUSED,
            status => status,
        }
    }

    /// Whether it is to rest.
    pub fn set_paused(&self, paused: bool) {
        self.paused.store(paused, Ordering::Relaxed);
    }

    /// Whether an OOM kill in it is news.
    pub fn first_oom(&self) -> bool {
        !self.oom_told.swap(true, Ordering::Relaxed)
    }

    /// Where the library finds one of its processes.
    pub fn place(&self, exec_id: &str) -> monitor::Process {
        monitor::Process { agent: self.pod.agent().clone(), container_id: self.id.clone(), exec_id: exec_id.to_owned() }
    }
}
