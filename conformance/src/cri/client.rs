//! The CRI's client, for callers that wait.

use std::panic::Location;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail};
use k8s_cri::v1::image_service_client::ImageServiceClient;
use k8s_cri::v1::runtime_service_client::RuntimeServiceClient;
use tokio::runtime::Runtime;
use tonic::transport::{Channel, Endpoint};
use tonic::{Response, Status};

/// How long an answer may take.
const LIMIT: Duration = Duration::from_secs(120);

/// A connection to a CRI server. It is made anew when the server was started anew.
pub struct Client {
    runtime: Runtime,
    channel: Channel,
}

impl Client {
    /// A client of the server behind a Unix socket, which need not be there yet.
    pub fn of(socket: &Path) -> Result<Self> {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
        let endpoint = Endpoint::from_shared(format!("unix://{}", socket.display()))?;
        // A channel belongs to the runtime that it is made in.
        let channel = runtime.block_on(async { endpoint.connect_lazy() });
        Ok(Self { runtime, channel })
    }

    /// Calls the runtime service; an error is the server's, with its code before its sentence.
    #[track_caller]
    pub fn call<T>(
        &self,
        rpc: impl AsyncFnOnce(RuntimeServiceClient<Channel>) -> Result<Response<T>, Status>,
    ) -> Result<T> {
        self.wait(Location::caller(), rpc(RuntimeServiceClient::new(self.channel.clone())))
    }

    /// Calls the image service likewise.
    #[track_caller]
    pub fn call_images<T>(
        &self,
        rpc: impl AsyncFnOnce(ImageServiceClient<Channel>) -> Result<Response<T>, Status>,
    ) -> Result<T> {
        self.wait(Location::caller(), rpc(ImageServiceClient::new(self.channel.clone())))
    }

    /// Waits for the next message of a stream, at most for `limit`; `None` is its end.
    pub fn next<T>(&self, stream: &mut tonic::Streaming<T>, limit: Duration) -> Result<Option<T>> {
        let next = async { tokio::time::timeout(limit, stream.message()).await };
        Ok(self.runtime.block_on(next).context("no message came")??)
    }

    fn wait<T>(&self, caller: &Location<'_>, answer: impl Future<Output = Result<Response<T>, Status>>) -> Result<T> {
        match self.runtime.block_on(async { tokio::time::timeout(LIMIT, answer).await }) {
            Ok(Ok(response)) => Ok(response.into_inner()),
            Ok(Err(status)) => Err(anyhow!("{:?}: {}", status.code(), status.message())),
            Err(_) => bail!("the CRI server gave no answer within {LIMIT:?} to {caller}"),
        }
    }
}
