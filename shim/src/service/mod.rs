//! What containerd calls, by ttrpc. Each method takes a request apart, and has [`Tasks`] do it.

mod sandbox;
mod streaming;
mod task;

use std::collections::HashMap;
use std::sync::Arc;

use containerd_shim_protos::sandbox_async::create_sandbox;
use containerd_shim_protos::shim_async::create_task;
use ttrpc::asynchronous::Service;

use crate::task::Tasks;

#[cfg(test)]
pub use streaming::service as streaming;

/// The task service that the library knows, and the one before: containerd 2.0 gave it another name and changed nothing.
const TASK: &str = "containerd.task.v3.Task";
const TASK_BEFORE: &str = "containerd.task.v2.Task";
const STREAMING: &str = "containerd.services.streaming.v1.Streaming";

/// All services.
pub fn all(tasks: &Arc<Tasks>) -> HashMap<String, Service> {
    let mut services = create_sandbox(Arc::new(sandbox::Sandbox(tasks.clone())));
    for name in [TASK, TASK_BEFORE] {
        let service = create_task(Arc::new(task::Task(tasks.clone()))).remove(TASK);
        services.extend(service.map(|service| (name.to_owned(), service)));
    }
    services.insert(STREAMING.to_owned(), streaming::service(tasks.streams()));
    services
}
