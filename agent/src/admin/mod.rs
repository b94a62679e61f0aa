//! The agent's own service on its admin socket: status, endpoints, SVIDs, policies, history of
//! flows.
//!
//! The daemon provides [`StatusInputs`], a plain picture of the moment; everything else
//! here is pure.

pub mod diff;
mod edges;
pub mod endpoints;
mod identities;
pub mod inputs;
pub mod policies;
mod probe;
mod rollout;
mod services;
pub mod socket;
pub mod status;
pub mod svids;

use std::{pin::Pin, sync::Arc};

use futures_util::Stream;
use jiff::Timestamp;
use tokio::sync::mpsc;
use tonic::{Request, Response, Status};

pub use self::inputs::{
    DropCount, EnforcementState, IssuerFacts, KernelFacts, StatusInputs, Succession, SvidFacts,
    SvidState,
};
use self::policies::Unanswered;
pub use self::probe::readiness;
use crate::{
    endpoint::reconcile::Survey,
    flow::{Edges, FlowLog},
    proto::admin::{
        CheckPolicyRequest, CheckPolicyResponse, CheckRolloutRequest, CheckRolloutResponse,
        DiffPoliciesRequest, DiffPoliciesResponse, EndpointsRequest, EndpointsResponse,
        ListEdgesRequest, ListEdgesResponse, ListIdentitiesRequest, ListIdentitiesResponse,
        ListLogsRequest, ListLogsResponse, ListPoliciesRequest, ListPoliciesResponse,
        ListServicesRequest, ListServicesResponse, ListSvidsRequest, ListSvidsResponse,
        ProbeRequest, ProbeResponse, StatusRequest, StatusResponse,
        TranslateNetworkPoliciesRequest, TranslateNetworkPoliciesResponse,
        admin_server::{self, AdminServer},
    },
    telemetry::recent::Recent,
};

/// Gives the picture of the moment; it may read kernel maps and is called off the runtime.
pub type Provider = Arc<dyn Fn() -> StatusInputs + Send + Sync>;

/// Answers the admin service of one agent.
#[derive(Clone)]
pub struct Admin {
    provider: Provider,
    log: FlowLog,
    edges: Edges,
    surveys: mpsc::Sender<Survey>,
    logs: Recent,
}

impl Admin {
    /// An admin service over what `provider` sees, the recent flows and their history; `surveys`
    /// lead to who knows open flows.
    pub fn new(
        provider: Provider,
        log: FlowLog,
        edges: Edges,
        surveys: mpsc::Sender<Survey>,
    ) -> Self {
        Self { provider, log, edges, surveys, logs: Recent::default() }
    }

    /// The same, which tells the last lines of this log.
    pub fn with_logs(self, logs: Recent) -> Self {
        Self { logs, ..self }
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

fn refusal(error: &Unanswered) -> Status {
    match error {
        Unanswered::Early | Unanswered::Busy(_) => Status::unavailable(error.to_string()),
        Unanswered::Question(_) => Status::invalid_argument(error.to_string()),
        Unanswered::Check(_) => Status::failed_precondition(error.to_string()),
    }
}

/// An answer that may be longer than one message.
type Parts<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

/// Slices of at most so many; of nothing one empty one, so that the answer says whose it is.
fn parted<T>(all: &[T], most: usize) -> impl Iterator<Item = &[T]> {
    let empty = all.is_empty().then_some(all);
    empty.into_iter().chain(all.chunks(most))
}

fn in_parts<T: Send + 'static>(parts: Vec<T>) -> Response<Parts<T>> {
    Response::new(Box::pin(futures_util::stream::iter(parts.into_iter().map(Ok))))
}

#[tonic::async_trait]
impl admin_server::Admin for Admin {
    type ListEdgesStream = Parts<ListEdgesResponse>;
    type ListIdentitiesStream = Parts<ListIdentitiesResponse>;
    type ListLogsStream = Parts<ListLogsResponse>;
    type ListServicesStream = Parts<ListServicesResponse>;

    async fn list_edges(
        &self,
        request: Request<ListEdgesRequest>,
    ) -> Result<Response<Self::ListEdgesStream>, Status> {
        let request = request.into_inner();
        let node = self.inputs().await?.node;
        Ok(in_parts(edges::assemble(&self.edges, &node, &request)))
    }

    async fn list_identities(
        &self,
        _: Request<ListIdentitiesRequest>,
    ) -> Result<Response<Self::ListIdentitiesStream>, Status> {
        let inputs = self.inputs().await?;
        Ok(in_parts(identities::assemble(&inputs, Timestamp::now())))
    }

    async fn list_logs(
        &self,
        _: Request<ListLogsRequest>,
    ) -> Result<Response<Self::ListLogsStream>, Status> {
        // Each is at most 8 KiB long, and a message 4 MiB.
        const LINES_IN_PART: usize = 256;
        let node = self.inputs().await?.node;
        let (gone, lines) = self.logs.lines();
        let parts = parted(&lines, LINES_IN_PART).map(|lines| ListLogsResponse {
            node: node.to_string(),
            lines: lines.to_vec(),
            gone,
        });
        Ok(in_parts(parts.collect()))
    }

    async fn list_services(
        &self,
        request: Request<ListServicesRequest>,
    ) -> Result<Response<Self::ListServicesStream>, Status> {
        let inputs = self.inputs().await?;
        Ok(in_parts(services::assemble(&inputs, &request.into_inner())))
    }

    async fn status(&self, _: Request<StatusRequest>) -> Result<Response<StatusResponse>, Status> {
        let inputs = self.inputs().await?;
        let status = status::assemble(&inputs, &self.log.totals(), Timestamp::now());
        Ok(Response::new(status))
    }

    async fn probe(
        &self,
        request: Request<ProbeRequest>,
    ) -> Result<Response<ProbeResponse>, Status> {
        let kind = request.into_inner().kind();
        let inputs = self.inputs().await?;
        Ok(Response::new(probe::answer(&inputs, kind, Timestamp::now())))
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

    async fn list_policies(
        &self,
        _: Request<ListPoliciesRequest>,
    ) -> Result<Response<ListPoliciesResponse>, Status> {
        let inputs = self.inputs().await?;
        Ok(Response::new(policies::list(&inputs, &self.log.hits())))
    }

    async fn diff_policies(
        &self,
        request: Request<DiffPoliciesRequest>,
    ) -> Result<Response<DiffPoliciesResponse>, Status> {
        let inputs = self.inputs().await?;
        let edges = self.edges.clone();
        let request = request.into_inner();
        // Thousands of verdicts take a while.
        tokio::task::spawn_blocking(move || diff::answer(&inputs, &edges, &request))
            .await
            .map_err(|e| Status::internal(format!("the policies cannot be compared: {e}")))?
            .map(Response::new)
            .map_err(|error| refusal(&error))
    }

    async fn check_policy(
        &self,
        request: Request<CheckPolicyRequest>,
    ) -> Result<Response<CheckPolicyResponse>, Status> {
        let inputs = self.inputs().await?;
        policies::answer(&inputs, &request.into_inner())
            .map(Response::new)
            .map_err(|error| refusal(&error))
    }

    async fn check_rollout(
        &self,
        request: Request<CheckRolloutRequest>,
    ) -> Result<Response<CheckRolloutResponse>, Status> {
        let inputs = self.inputs().await?;
        rollout::check(&inputs, &self.surveys, &request.into_inner())
            .await
            .map(Response::new)
            .map_err(|error| refusal(&error))
    }

    async fn translate_network_policies(
        &self,
        request: Request<TranslateNetworkPoliciesRequest>,
    ) -> Result<Response<TranslateNetworkPoliciesResponse>, Status> {
        let inputs = self.inputs().await?;
        rollout::translate(&inputs, &request.into_inner().namespace)
            .map(Response::new)
            .map_err(|error| refusal(&error))
    }
}
