//! The sandbox service.

use std::sync::Arc;
use std::time::SystemTime;

use async_trait::async_trait;
use containerd_shim_protos::sandbox_api::{
    CreateSandboxRequest, CreateSandboxResponse, PingRequest, PingResponse, PlatformRequest, PlatformResponse,
    SandboxMetricsRequest, SandboxMetricsResponse, SandboxStatusRequest, SandboxStatusResponse, ShutdownSandboxRequest,
    ShutdownSandboxResponse, StartSandboxRequest, StartSandboxResponse, StopSandboxRequest, StopSandboxResponse,
    WaitSandboxRequest, WaitSandboxResponse,
};
use ttrpc::Result;
use ttrpc::asynchronous::TtrpcContext;

use crate::task::Tasks;
use crate::wire;

pub(super) struct Sandbox(pub Arc<Tasks>);

/// How containerd calls the processor.
const ARCHITECTURE: &str = if cfg!(target_arch = "aarch64") { "arm64" } else { "amd64" };

#[async_trait]
impl containerd_shim_protos::sandbox_async::Sandbox for Sandbox {
    async fn create_sandbox(&self, _: &TtrpcContext, request: CreateSandboxRequest) -> Result<CreateSandboxResponse> {
        self.0.create_sandbox(&request)?;
        Ok(CreateSandboxResponse::new())
    }

    async fn start_sandbox(&self, _: &TtrpcContext, request: StartSandboxRequest) -> Result<StartSandboxResponse> {
        let (pid, at) = self.0.start_sandbox(&request.sandbox_id).await?;
        Ok(StartSandboxResponse { pid, created_at: Some(wire::timestamp(at)).into(), ..Default::default() })
    }

    async fn platform(&self, _: &TtrpcContext, _: PlatformRequest) -> Result<PlatformResponse> {
        let mut response = PlatformResponse::new();
        let platform = response.platform.mut_or_insert_default();
        platform.os = "linux".to_owned();
        platform.architecture = ARCHITECTURE.to_owned();
        Ok(response)
    }

    async fn stop_sandbox(&self, _: &TtrpcContext, request: StopSandboxRequest) -> Result<StopSandboxResponse> {
        self.0.stop_sandbox(&request.sandbox_id).await?;
        Ok(StopSandboxResponse::new())
    }

    async fn wait_sandbox(&self, _: &TtrpcContext, request: WaitSandboxRequest) -> Result<WaitSandboxResponse> {
        let end = self.0.wait_sandbox(&request.sandbox_id).await?;
        let exited_at = Some(wire::timestamp(end.at)).into();
        Ok(WaitSandboxResponse { exit_status: end.status.into(), exited_at, ..Default::default() })
    }

    async fn sandbox_status(&self, _: &TtrpcContext, request: SandboxStatusRequest) -> Result<SandboxStatusResponse> {
        Ok(self.0.sandbox_status(&request.sandbox_id).await?)
    }

    async fn ping_sandbox(&self, _: &TtrpcContext, request: PingRequest) -> Result<PingResponse> {
        self.0.ping_sandbox(&request.sandbox_id)?;
        Ok(PingResponse::new())
    }

    async fn shutdown_sandbox(
        &self,
        _: &TtrpcContext,
        request: ShutdownSandboxRequest,
    ) -> Result<ShutdownSandboxResponse> {
        self.0.shut_down_sandbox(&request.sandbox_id).await?;
        Ok(ShutdownSandboxResponse::new())
    }

    async fn sandbox_metrics(
        &self,
        _: &TtrpcContext,
        request: SandboxMetricsRequest,
    ) -> Result<SandboxMetricsResponse> {
        let data = self.0.sandbox_statistics(&request.sandbox_id).await?;
        let mut response = SandboxMetricsResponse::new();
        let metrics = response.metrics.mut_or_insert_default();
        metrics.timestamp = Some(wire::timestamp(SystemTime::now())).into();
        metrics.id = request.sandbox_id;
        metrics.data = Some(data).into();
        Ok(response)
    }
}
