//! The service on the control port: what each request of the host does.

use std::collections::HashMap;
use std::sync::Arc;

use async_trait::async_trait;
use runvm_protocol::{agent, agent_ttrpc};
use ttrpc::r#async::{Service, TtrpcContext};

use crate::container::Containers;
use crate::error::RequestError;
use crate::{log, network, sandbox};

/// The methods, for a server.
pub(crate) fn methods(containers: Arc<Containers>) -> HashMap<String, Service> {
    agent_ttrpc::create_agent(Arc::new(Agent { containers }))
}

struct Agent {
    containers: Arc<Containers>,
}

#[async_trait]
impl agent_ttrpc::Agent for Agent {
    async fn configure_sandbox(
        &self,
        _: &TtrpcContext,
        request: agent::ConfigureSandboxRequest,
    ) -> ttrpc::Result<agent::Empty> {
        Ok(sandbox::configure(&request).await.map(|()| agent::Empty::new())?)
    }

    async fn configure_network(
        &self,
        _: &TtrpcContext,
        request: agent::ConfigureNetworkRequest,
    ) -> ttrpc::Result<agent::Empty> {
        network::configure(&request).await.map_err(RequestError::from)?;
        log::stage("network done");
        Ok(agent::Empty::new())
    }

    async fn create_container(
        &self,
        _: &TtrpcContext,
        request: agent::CreateContainerRequest,
    ) -> ttrpc::Result<agent::ProcessResponse> {
        Ok(self.containers.create(&request).await.map(process)?)
    }

    async fn start_container(&self, _: &TtrpcContext, request: agent::ContainerRequest) -> ttrpc::Result<agent::Empty> {
        Ok(self.containers.start(&request.container_id).await.map(|()| agent::Empty::new())?)
    }

    async fn pause_container(&self, _: &TtrpcContext, request: agent::ContainerRequest) -> ttrpc::Result<agent::Empty> {
        Ok(self.containers.pause(&request.container_id).await.map(|()| agent::Empty::new())?)
    }

    async fn resume_container(
        &self,
        _: &TtrpcContext,
        request: agent::ContainerRequest,
    ) -> ttrpc::Result<agent::Empty> {
        Ok(self.containers.resume(&request.container_id).await.map(|()| agent::Empty::new())?)
    }

    async fn delete_container(
        &self,
        _: &TtrpcContext,
        request: agent::ContainerRequest,
    ) -> ttrpc::Result<agent::Empty> {
        Ok(self.containers.delete(&request.container_id).await.map(|()| agent::Empty::new())?)
    }

    async fn update_container(
        &self,
        _: &TtrpcContext,
        request: agent::UpdateContainerRequest,
    ) -> ttrpc::Result<agent::Empty> {
        Ok(self.containers.update(&request.container_id, &request.resources).map(|()| agent::Empty::new())?)
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
        Ok(self.containers.exec(&request).await.map(process)?)
    }

    async fn signal_process(
        &self,
        _: &TtrpcContext,
        request: agent::SignalProcessRequest,
    ) -> ttrpc::Result<agent::Empty> {
        Ok(self.containers.signal(&request).map(|()| agent::Empty::new())?)
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
        Ok(self.containers.resize(&request).map(|()| agent::Empty::new())?)
    }
}

fn process(pid: u32) -> agent::ProcessResponse {
    agent::ProcessResponse { pid, ..Default::default() }
}
