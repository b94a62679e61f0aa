//! The agent's own service on its admin socket: status, endpoints and SVIDs.
//!
//! The daemon provides [`StatusInputs`], a plain picture of the moment; everything else
//! here is pure.

pub mod endpoints;
pub mod inputs;
pub mod socket;
pub mod status;
pub mod svids;

use std::sync::Arc;

use jiff::Timestamp;
use tonic::{Request, Response, Status};

pub use self::inputs::{
    DropCount, EnforcementState, IssuerFacts, KernelFacts, StatusInputs, SvidFacts, SvidState,
};
use crate::{
    flow::FlowLog,
    proto::admin::{
        EndpointsRequest, EndpointsResponse, ListSvidsRequest, ListSvidsResponse, StatusRequest,
        StatusResponse,
        admin_server::{self, AdminServer},
    },
};

/// Gives the picture of the moment; it may read kernel maps and is called off the runtime.
pub type Provider = Arc<dyn Fn() -> StatusInputs + Send + Sync>;

/// Answers the admin service of one agent.
#[derive(Clone)]
pub struct Admin {
    provider: Provider,
    log: FlowLog,
}

impl Admin {
    /// An admin service over what `provider` sees.
    pub fn new(provider: Provider, log: FlowLog) -> Self {
        Self { provider, log }
    }

    /// The service, ready to be routed.
    pub fn into_service(self) -> AdminServer<Self> {
        AdminServer::new(self)
    }

    async fn inputs(&self) -> Result<StatusInputs, Status> {
        let provider = self.provider.clone();
        tokio::task::spawn_blocking(move || provider())
            .await
            .map_err(|e| Status::internal(format!("the agent's state cannot be read: {e}")))
    }
}

#[tonic::async_trait]
impl admin_server::Admin for Admin {
    async fn status(&self, _: Request<StatusRequest>) -> Result<Response<StatusResponse>, Status> {
        let inputs = self.inputs().await?;
        let status = status::assemble(&inputs, &self.log.totals(), Timestamp::now());
        Ok(Response::new(status))
    }

    async fn endpoints(
        &self,
        request: Request<EndpointsRequest>,
    ) -> Result<Response<EndpointsResponse>, Status> {
        let request = request.into_inner();
        let inputs = self.inputs().await?;
        let drops = endpoints::recent_drops(&self.log);
        let response = endpoints::assemble(&inputs, &drops, &request, Timestamp::now());
        Ok(Response::new(response))
    }

    async fn list_svids(
        &self,
        _: Request<ListSvidsRequest>,
    ) -> Result<Response<ListSvidsResponse>, Status> {
        let inputs = self.inputs().await?;
        Ok(Response::new(svids::assemble(&inputs, Timestamp::now())))
    }
}
