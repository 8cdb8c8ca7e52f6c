//! The service on the control port: what each request of the host does.

use std::collections::HashMap;
use std::future::Future;
use std::io;
use std::sync::Arc;

use async_trait::async_trait;
use runvm_protocol::{agent, agent_ttrpc};
use tokio::sync::Mutex;
use ttrpc::r#async::{Service, TtrpcContext};

use crate::container::Containers;
use crate::error::RequestError;
use crate::{log, network, sandbox};

/// The methods, for a server.
pub(crate) fn methods(containers: Arc<Containers>) -> HashMap<String, Service> {
    agent_ttrpc::create_agent(Arc::new(Agent { containers, turn: Arc::default() }))
}

struct Agent {
    containers: Arc<Containers>,
    /// Whose turn it is of those that change what others find: the host asks for all that a start takes at once, and each
    /// has its turn as it was asked.
    turn: Arc<Mutex<()>>,
}

#[async_trait]
impl agent_ttrpc::Agent for Agent {
    async fn configure_sandbox(
        &self,
        _: &TtrpcContext,
        request: agent::ConfigureSandboxRequest,
    ) -> ttrpc::Result<agent::Empty> {
        let (containers, turn) = (self.containers.clone(), self.turn.clone());
        to_its_end(async move {
            let _turn = turn.lock().await;
            if let Some(user_namespace) = sandbox::configure(&request).await? {
                containers.use_user_namespace(user_namespace);
            }
            Ok(agent::Empty::new())
        })
        .await
    }

    async fn set_clock(&self, _: &TtrpcContext, request: agent::SetClockRequest) -> ttrpc::Result<agent::Empty> {
        sandbox::set_clock(request.realtime_ns)?;
        Ok(agent::Empty::new())
    }

    async fn configure_network(
        &self,
        _: &TtrpcContext,
        request: agent::ConfigureNetworkRequest,
    ) -> ttrpc::Result<agent::Empty> {
        let turn = self.turn.clone();
        to_its_end(async move {
            let _turn = turn.lock().await;
            network::configure(&request).await?;
            log::stage("network done");
            Ok(agent::Empty::new())
        })
        .await
    }

    async fn create_container(
        &self,
        _: &TtrpcContext,
        request: agent::CreateContainerRequest,
    ) -> ttrpc::Result<agent::ProcessResponse> {
        let (containers, turn) = (self.containers.clone(), self.turn.clone());
        to_its_end(async move {
            // Containers are made beside each other.
            drop(turn.lock().await);
            containers.create(&request).await.map(process)
        })
        .await
    }

    async fn start_container(&self, _: &TtrpcContext, request: agent::ContainerRequest) -> ttrpc::Result<agent::Empty> {
        let containers = self.containers.clone();
        to_its_end(async move { containers.start(&request.container_id).await.map(empty) }).await
    }

    async fn pause_container(&self, _: &TtrpcContext, request: agent::ContainerRequest) -> ttrpc::Result<agent::Empty> {
        let containers = self.containers.clone();
        to_its_end(async move { containers.pause(&request.container_id).await.map(empty) }).await
    }

    async fn resume_container(
        &self,
        _: &TtrpcContext,
        request: agent::ContainerRequest,
    ) -> ttrpc::Result<agent::Empty> {
        let containers = self.containers.clone();
        to_its_end(async move { containers.resume(&request.container_id).await.map(empty) }).await
    }

    async fn delete_container(
        &self,
        _: &TtrpcContext,
        request: agent::ContainerRequest,
    ) -> ttrpc::Result<agent::Empty> {
        let containers = self.containers.clone();
        to_its_end(async move { containers.delete(&request.container_id).await.map(empty) }).await
    }

    async fn release_files(
        &self,
        _: &TtrpcContext,
        request: agent::ReleaseFilesRequest,
    ) -> ttrpc::Result<agent::Empty> {
        Ok(sandbox::release(&request.paths).map(empty)?)
    }

    async fn update_container(
        &self,
        _: &TtrpcContext,
        request: agent::UpdateContainerRequest,
    ) -> ttrpc::Result<agent::Empty> {
        Ok(self.containers.update(&request.container_id, &request.resources).map(empty)?)
    }

    async fn container_statistics(
        &self,
        _: &TtrpcContext,
        request: agent::ContainerRequest,
    ) -> ttrpc::Result<agent::ContainerStatisticsResponse> {
        Ok(self.containers.statistics(&request.container_id)?)
    }

    async fn await_out_of_memory(
        &self,
        _: &TtrpcContext,
        request: agent::AwaitOutOfMemoryRequest,
    ) -> ttrpc::Result<agent::AwaitOutOfMemoryResponse> {
        Ok(self.containers.await_out_of_memory(&request.container_id, request.known).await?)
    }

    async fn list_processes(
        &self,
        _: &TtrpcContext,
        request: agent::ContainerRequest,
    ) -> ttrpc::Result<agent::ListProcessesResponse> {
        let processes = self.containers.processes(&request.container_id)?;
        Ok(agent::ListProcessesResponse { processes, ..Default::default() })
    }

    async fn exec_process(
        &self,
        _: &TtrpcContext,
        request: agent::ExecProcessRequest,
    ) -> ttrpc::Result<agent::ProcessResponse> {
        let containers = self.containers.clone();
        to_its_end(async move { containers.exec(&request).await.map(process) }).await
    }

    async fn signal_process(
        &self,
        _: &TtrpcContext,
        request: agent::SignalProcessRequest,
    ) -> ttrpc::Result<agent::Empty> {
        Ok(self.containers.signal(&request).map(empty)?)
    }

    async fn wait_process(
        &self,
        _: &TtrpcContext,
        request: agent::ProcessRequest,
    ) -> ttrpc::Result<agent::WaitProcessResponse> {
        Ok(self.containers.wait(&request.container_id, &request.exec_id).await?)
    }

    async fn resize_terminal(
        &self,
        _: &TtrpcContext,
        request: agent::ResizeTerminalRequest,
    ) -> ttrpc::Result<agent::Empty> {
        Ok(self.containers.resize(&request).map(empty)?)
    }
}

/// Does what a request asks for also where the host does not wait for it: the server drops the work of a connection that
/// ends, and half a container is worse than one too many.
async fn to_its_end<T: Send + 'static>(
    work: impl Future<Output = Result<T, RequestError>> + Send + 'static,
) -> ttrpc::Result<T> {
    let done =
        tokio::spawn(work).await.map_err(|error| RequestError::system("finish the request")(io::Error::from(error)))?;
    Ok(done?)
}

fn empty((): ()) -> agent::Empty {
    agent::Empty::new()
}

fn process(pid: u32) -> agent::ProcessResponse {
    agent::ProcessResponse { pid, ..Default::default() }
}
