//! Events: what containerd is told without having asked, in the order in which it happened.
//!
//! One queue and one task that empties it. While containerd is away the events wait: it is tried again, since nothing
//! tells when it is back.

use std::io::Write as _;
use std::process::{Command, Stdio};
use std::time::{Duration, SystemTime};

use containerd_shim_protos::api::ForwardRequest;
use containerd_shim_protos::events::task::{
    TaskCreate, TaskDelete, TaskExecAdded, TaskExecStarted, TaskExit, TaskOOM, TaskPaused, TaskResumed, TaskStart,
};
use containerd_shim_protos::shim::event::Envelope;
use containerd_shim_protos::shim_async::EventsClient;
use containerd_shim_protos::topics;
use protobuf::{Message as _, MessageFull};
use thiserror::Error;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio::time::{sleep, timeout};
use ttrpc::context::with_duration;

use crate::wire;

/// Where containerd says that it takes events.
pub const TTRPC_ADDRESS: &str = "TTRPC_ADDRESS";
/// How many events wait for containerd, at most.
const MAX_WAITING: usize = 2048;
/// How long containerd may take for one.
const LIMIT: Duration = Duration::from_secs(5);
/// How long the first pause is after a failure, and the longest.
const PAUSES: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(5));
/// How long the last events may take, once the shim is over.
const PARTING: Duration = Duration::from_secs(5);

/// An event has a topic.
pub trait Event: MessageFull {
    /// What subscribers filter by.
    const TOPIC: &'static str;
}

macro_rules! topics {
    ($($event:ty => $topic:ident,)*) => { $(impl Event for $event { const TOPIC: &'static str = topics::$topic; })* };
}

topics! {
    TaskCreate => TASK_CREATE_EVENT_TOPIC,
    TaskStart => TASK_START_EVENT_TOPIC,
    TaskExit => TASK_EXIT_EVENT_TOPIC,
    TaskDelete => TASK_DELETE_EVENT_TOPIC,
    TaskExecAdded => TASK_EXEC_ADDED_EVENT_TOPIC,
    TaskExecStarted => TASK_EXEC_STARTED_EVENT_TOPIC,
    TaskPaused => TASK_PAUSED_EVENT_TOPIC,
    TaskResumed => TASK_RESUMED_EVENT_TOPIC,
    TaskOOM => TASK_OOM_EVENT_TOPIC,
}

/// How events reach containerd.
#[derive(Clone, Debug)]
pub enum Way {
    /// Its service for them, at this address.
    Service(String),
    /// Its program, where it names no address.
    Program {
        /// The program.
        path: String,
        /// containerd's own address.
        address: String,
    },
}

impl Way {
    /// The way that this shim was told.
    pub fn find(publish_binary: &str, address: &str) -> Self {
        match std::env::var(TTRPC_ADDRESS) {
            Ok(service) if !service.is_empty() => Self::Service(service),
            _ => Self::Program { path: publish_binary.to_owned(), address: address.to_owned() },
        }
    }
}

#[derive(Debug, Error)]
enum PublishError {
    #[error("containerd does not take events: {0}")]
    Ttrpc(#[from] ttrpc::Error),
    #[error("containerd does not answer")]
    Silent,
    #[error("cannot run {0} publish")]
    Program(String, #[source] std::io::Error),
    #[error("{0} publish failed ({1})")]
    Failed(String, std::process::ExitStatus),
}

/// The sending end of the queue.
#[derive(Clone)]
pub struct Events {
    queue: mpsc::Sender<Envelope>,
    namespace: String,
}

/// The task that empties the queue.
pub struct Delivery(JoinHandle<()>);

impl Events {
    /// Begins to tell containerd of events in its `namespace`.
    pub fn begin(namespace: &str, way: Way) -> (Self, Delivery) {
        let (queue, waiting) = mpsc::channel(MAX_WAITING);
        let delivery = tokio::spawn(deliver(waiting, way));
        (Self { queue, namespace: namespace.to_owned() }, Delivery(delivery))
    }

    /// Tells of an event, once those before have been told. It does not wait.
    pub fn publish<E: Event>(&self, event: &E) {
        let any = match wire::any(event) {
            Ok(any) => any,
            Err(error) => return tracing::warn!("{} is not told: {error}", E::TOPIC),
        };
        let envelope = Envelope {
            timestamp: Some(wire::timestamp(SystemTime::now())).into(),
            namespace: self.namespace.clone(),
            topic: E::TOPIC.to_owned(),
            event: Some(any).into(),
            ..Default::default()
        };
        if self.queue.try_send(envelope).is_err() {
            tracing::warn!("{} is not told: {MAX_WAITING} events wait for containerd already", E::TOPIC);
        }
    }
}

impl Delivery {
    /// Waits until all is told, for a while. The sending ends have to be gone.
    pub async fn finish(self) {
        if timeout(PARTING, self.0).await.is_err() {
            tracing::warn!("containerd was not told of the last events: it is not there");
        }
    }
}

async fn deliver(mut waiting: mpsc::Receiver<Envelope>, way: Way) {
    let mut publisher = Publisher { way, client: None };
    while let Some(envelope) = waiting.recv().await {
        let mut pause = PAUSES.0;
        while let Err(error) = publisher.publish(&envelope).await {
            if let PublishError::Ttrpc(ttrpc::Error::RpcStatus(status)) = &error {
                // It was heard, and refused; saying it again changes nothing.
                tracing::warn!("containerd refuses {}: {}", envelope.topic, status.message());
                break;
            }
            tracing::info!("{} has to wait: {}", envelope.topic, runvm::error::sentence(&error));
            sleep(pause).await;
            pause = (pause * 2).min(PAUSES.1);
        }
    }
}

struct Publisher {
    way: Way,
    client: Option<EventsClient>,
}

impl Publisher {
    async fn publish(&mut self, envelope: &Envelope) -> Result<(), PublishError> {
        match &self.way {
            Way::Service(address) => {
                let address = address.clone();
                let told = self.forward(&address, envelope).await;
                if told.is_err() {
                    // The next attempt connects anew: containerd may have been started again.
                    self.client = None;
                }
                told
            }
            Way::Program { path, address } => run(path.clone(), address.clone(), envelope.clone()).await,
        }
    }

    async fn forward(&mut self, address: &str, envelope: &Envelope) -> Result<(), PublishError> {
        let client = match &self.client {
            Some(client) => client.clone(),
            None => {
                let address = if address.contains("://") { address.to_owned() } else { format!("unix://{address}") };
                let client = EventsClient::new(ttrpc::asynchronous::Client::connect(&address).await?);
                self.client.insert(client).clone()
            }
        };
        let request = ForwardRequest { envelope: Some(envelope.clone()).into(), ..Default::default() };
        let told = timeout(LIMIT, client.forward(with_duration(LIMIT), &request)).await;
        told.map_err(|_| PublishError::Silent)?.map(drop).map_err(PublishError::from)
    }
}

/// Hands an event to containerd's program, on its stdin.
async fn run(path: String, address: String, envelope: Envelope) -> Result<(), PublishError> {
    let event = envelope.event.write_to_bytes().unwrap_or_default();
    let work = move || {
        let mut command = Command::new(&path);
        command.args(["--address", &address, "publish", "--topic", &envelope.topic]);
        command.args(["--namespace", &envelope.namespace]);
        let failed = |error| PublishError::Program(path.clone(), error);
        let child = command.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::null()).spawn();
        let mut child = child.map_err(failed)?;
        if let Some(mut stdin) = child.stdin.take() {
            // One that does not read it says why by its status.
            let _ = stdin.write_all(&event);
        }
        match child.wait().map_err(failed)? {
            status if status.success() => Ok(()),
            status => Err(PublishError::Failed(path.clone(), status)),
        }
    };
    tokio::task::spawn_blocking(work).await.unwrap_or(Err(PublishError::Silent))
}

#[cfg(test)]
mod tests {
    use super::*;
    use async_trait::async_trait;
    use containerd_shim_protos::shim_async::{Events as Service, create_events};
    use protobuf::well_known_types::empty::Empty;
    use std::sync::Arc;
    use ttrpc::asynchronous::{Server, TtrpcContext};

    struct Ear(mpsc::UnboundedSender<Envelope>);

    #[async_trait]
    impl Service for Ear {
        async fn forward(&self, _: &TtrpcContext, request: ForwardRequest) -> ttrpc::Result<Empty> {
            self.0.send(request.envelope.unwrap()).unwrap();
            Ok(Empty::new())
        }
    }

    async fn containerd(address: &str) -> (Server, mpsc::UnboundedReceiver<Envelope>) {
        let (sender, heard) = mpsc::unbounded_channel();
        let mut server = Server::new().bind(address).unwrap().register_service(create_events(Arc::new(Ear(sender))));
        server.start().await.unwrap();
        (server, heard)
    }

    #[tokio::test]
    async fn events_are_told_in_order_also_to_one_that_was_away() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("ttrpc").to_str().unwrap().to_owned();
        let (events, delivery) = Events::begin("n", Way::Service(path.clone()));
        events.publish(&TaskCreate { container_id: "a".into(), ..Default::default() });
        events.publish(&TaskStart { container_id: "a".into(), ..Default::default() });
        let (mut server, mut heard) = containerd(&format!("unix://{path}")).await;
        let first = heard.recv().await.unwrap();
        assert_eq!((first.topic.as_str(), first.namespace.as_str()), ("/tasks/create", "n"));
        assert_eq!(first.event.type_url, "containerd.events.TaskCreate");
        assert_eq!(heard.recv().await.unwrap().topic, "/tasks/start");
        server.shutdown().await.unwrap();
        drop(server);
        std::fs::remove_file(&path).unwrap();
        let (_server, mut heard) = containerd(&format!("unix://{path}")).await;
        events.publish(&TaskExit { container_id: "a".into(), exit_status: 3, ..Default::default() });
        drop(events);
        delivery.finish().await;
        let exit = heard.recv().await.unwrap();
        assert_eq!(TaskExit::parse_from_bytes(&exit.event.value).unwrap().exit_status, 3);
    }
}
