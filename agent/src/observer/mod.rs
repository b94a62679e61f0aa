//! Hubble's observer API over the flow log, and its peer service over the cluster's nodes.

pub mod decode;
pub mod encode;
pub mod filter;
pub mod glob;
pub mod hubble;
pub mod jsonpb;
pub mod labels;
pub mod peers;

use std::{collections::BTreeSet, pin::Pin, sync::Arc, time::Duration};

use futures_util::{Stream, StreamExt, stream};
use jiff::{SignedDuration, Timestamp};
use prost::Message;
use tokio::time::{Instant, Interval, MissedTickBehavior};
use tonic::{Request, Response, Status};
use tonic_health::pb::health_server::{Health, HealthServer};

use self::filter::Filters;
use crate::{
    flow::{FlowEvent, FlowLog, FlowRecord, Followed, Follower, LostCause},
    proto::{
        self, detail, flow,
        observer::{
            self as api, GetFlowsRequest, GetFlowsResponse,
            get_flows_response::ResponseTypes,
            observer_server::{self, ObserverServer},
        },
        relay,
    },
};

/// Answers the observer API of one agent.
#[derive(Clone, Debug)]
pub struct Observer {
    log: FlowLog,
    node: Arc<str>,
    trust_domain: Arc<str>,
    started: Instant,
}

impl Observer {
    /// `trust_domain` is the agent's own: clients shorten identities of it.
    pub fn new(log: FlowLog, node: Arc<str>, trust_domain: Arc<str>) -> Self {
        Self { log, node, trust_domain, started: Instant::now() }
    }

    /// The service, ready to be routed.
    pub fn into_service(self) -> ObserverServer<Self> {
        ObserverServer::new(self)
    }

    fn response(&self, of: ResponseTypes, time: Timestamp) -> GetFlowsResponse {
        GetFlowsResponse {
            response_types: Some(of),
            node_name: self.node.to_string(),
            time: Some(proto::timestamp(time)),
        }
    }

    fn flow(&self, record: &FlowRecord) -> GetFlowsResponse {
        let flow = encode::encode(record, &self.trust_domain);
        self.response(ResponseTypes::Flow(flow), record.time)
    }

    fn lost(&self, cause: &str, source: flow::LostEventSource, n: u64) -> GetFlowsResponse {
        let lost = flow::LostEvent {
            source: source.into(),
            num_events_lost: n,
            cpu: None,
            cause: cause.into(),
        };
        self.response(ResponseTypes::LostEvents(lost), Timestamp::now())
    }

    fn losses(&self, losses: Vec<(LostCause, u64)>) -> Vec<GetFlowsResponse> {
        losses
            .into_iter()
            .map(|(cause, n)| self.lost(cause.describe(), lost_source(cause), n))
            .collect()
    }
}

type FlowStream = Pin<Box<dyn Stream<Item = Result<GetFlowsResponse, Status>> + Send>>;
type NoStream<T> = stream::Empty<Result<T, Status>>;

#[tonic::async_trait]
impl observer_server::Observer for Observer {
    type GetFlowsStream = FlowStream;
    type GetAgentEventsStream = NoStream<api::GetAgentEventsResponse>;
    type GetDebugEventsStream = NoStream<api::GetDebugEventsResponse>;

    async fn get_flows(
        &self,
        request: Request<GetFlowsRequest>,
    ) -> Result<Response<FlowStream>, Status> {
        let query = Query::parse(request.into_inner())?;
        let Query { filters, ends, since, until, number, first, follow } = query;
        let matches = Arc::new(move |record: &FlowRecord| {
            (ends || record.event == FlowEvent::Verdict)
                && since.is_none_or(|t| record.time >= t)
                && until.is_none_or(|t| record.time <= t)
                && filters.matches(record)
        });
        let (mut records, follower) = if follow {
            let (records, follower) = self.log.follow(matches).ok_or_else(|| {
                Status::resource_exhausted("too many clients follow the flows of this agent")
            })?;
            (records, Some(follower))
        } else {
            (self.log.recent(&(matches as _)), None)
        };
        let wanted = match (number, follow) {
            // Following without a number begins now, unless a time is given.
            (0, true) if since.is_none() => 0,
            (0, _) => records.len(),
            (n, _) => usize::try_from(n).unwrap_or(usize::MAX),
        };
        if first {
            records.truncate(wanted);
        } else {
            records.drain(..records.len().saturating_sub(wanted));
        }
        let losses = match (follow, records.first()) {
            (true, _) => Vec::new(),
            (false, oldest) => {
                let from = oldest.map(|r| r.time).max(since).unwrap_or(Timestamp::MIN);
                self.losses(self.log.losses_since(from.max(EARLIEST)))
            }
        };
        let this = self.clone();
        let past = stream::iter(records).map(move |r| this.flow(&r));
        let past = stream::iter(losses).chain(past);
        let stream: FlowStream = match follower {
            None => Box::pin(past.map(Ok)),
            Some(follower) => {
                let following = Following::new(self.clone(), follower, until);
                let live = stream::unfold(following, Following::step);
                Box::pin(past.chain(live).map(Ok))
            }
        };
        Ok(Response::new(stream))
    }

    async fn get_agent_events(
        &self,
        _: Request<api::GetAgentEventsRequest>,
    ) -> Result<Response<Self::GetAgentEventsStream>, Status> {
        Err(Status::unimplemented("Signet keeps no agent events; see `signet status`"))
    }

    async fn get_debug_events(
        &self,
        _: Request<api::GetDebugEventsRequest>,
    ) -> Result<Response<Self::GetDebugEventsStream>, Status> {
        Err(Status::unimplemented("Signet keeps no debug events"))
    }

    async fn get_nodes(
        &self,
        _: Request<api::GetNodesRequest>,
    ) -> Result<Response<api::GetNodesResponse>, Status> {
        let totals = self.log.totals();
        Ok(Response::new(api::GetNodesResponse {
            nodes: vec![api::Node {
                name: self.node.to_string(),
                version: env!("CARGO_PKG_VERSION").into(),
                address: String::new(),
                state: relay::NodeState::NodeConnected.into(),
                uptime_ns: self.uptime(),
                num_flows: totals.held,
                max_flows: totals.capacity,
                seen_flows: totals.seen,
            }],
        }))
    }

    async fn get_namespaces(
        &self,
        _: Request<api::GetNamespacesRequest>,
    ) -> Result<Response<api::GetNamespacesResponse>, Status> {
        let everything: crate::flow::recorder::Matches = Arc::new(|_| true);
        let records = self.log.recent(&everything);
        let namespaces: BTreeSet<&str> = records
            .iter()
            .flat_map(|r| [&r.source, &r.destination])
            .filter_map(|p| p.pod.as_ref().map(|(namespace, _)| &**namespace))
            .collect();
        let namespaces = namespaces
            .into_iter()
            .map(|n| api::Namespace { cluster: String::new(), namespace: n.into() })
            .collect();
        Ok(Response::new(api::GetNamespacesResponse { namespaces }))
    }

    async fn server_status(
        &self,
        _: Request<api::ServerStatusRequest>,
    ) -> Result<Response<api::ServerStatusResponse>, Status> {
        let totals = self.log.totals();
        let seconds = self.started.elapsed().as_secs_f64().max(1.0);
        Ok(Response::new(api::ServerStatusResponse {
            num_flows: totals.held,
            max_flows: totals.capacity,
            seen_flows: totals.seen,
            uptime_ns: self.uptime(),
            num_connected_nodes: Some(1),
            num_unavailable_nodes: Some(0),
            unavailable_nodes: Vec::new(),
            version: format!("signet {}", env!("CARGO_PKG_VERSION")),
            flows_rate: totals.seen as f64 / seconds,
        }))
    }
}

/// The standard health service, which `hubble status` asks about the observer: an agent that
/// answers serves it.
pub async fn health() -> HealthServer<impl Health> {
    let (reporter, service) = tonic_health::server::health_reporter();
    reporter.set_serving::<ObserverServer<Observer>>().await;
    service
}

impl Observer {
    fn uptime(&self) -> u64 {
        u64::try_from(self.started.elapsed().as_nanos()).unwrap_or(u64::MAX)
    }
}

/// Losses are looked up from here on; before, there were none.
const EARLIEST: Timestamp = Timestamp::UNIX_EPOCH;
/// How often a follower is told of losses.
const TELL_LOSSES: Duration = Duration::from_secs(1);

const fn lost_source(cause: LostCause) -> flow::LostEventSource {
    match cause {
        LostCause::KernelRing | LostCause::KernelRate => flow::LostEventSource::PerfEventRingBuffer,
        LostCause::Queue | LostCause::PodShare => flow::LostEventSource::ObserverEventsQueue,
    }
}

/// A request, read and checked.
struct Query {
    filters: Filters,
    ends: bool,
    since: Option<Timestamp>,
    until: Option<Timestamp>,
    number: u64,
    first: bool,
    follow: bool,
}

impl Query {
    fn parse(request: GetFlowsRequest) -> Result<Self, Status> {
        let time = |field: &str, t: Option<&prost_types::Timestamp>| {
            t.map(|t| {
                proto::time(t)
                    .ok_or_else(|| Status::invalid_argument(format!("field {field} is not a time")))
            })
            .transpose()
        };
        let since = time("since", request.since.as_ref())?;
        let until = time("until", request.until.as_ref())?;
        if let (Some(since), Some(until)) = (since, until)
            && since > until
        {
            return Err(Status::invalid_argument(format!("since {since} is after until {until}")));
        }
        if request.first && request.follow {
            return Err(Status::invalid_argument("first and follow exclude each other"));
        }
        let filters = Filters::compile(request.whitelist, request.blacklist)
            .map_err(|e| Status::invalid_argument(e.to_string()))?;
        let options = match request.extensions {
            None => detail::Options::default(),
            Some(any) if any.type_url == encode::OPTIONS_TYPE => {
                detail::Options::decode(&*any.value)
                    .map_err(|e| Status::invalid_argument(format!("field extensions: {e}")))?
            }
            Some(any) => {
                return Err(Status::invalid_argument(format!(
                    "field extensions: {:?} is not known",
                    any.type_url
                )));
            }
        };
        Ok(Self {
            filters,
            ends: options.ends,
            since,
            until,
            number: request.number,
            first: request.first,
            follow: request.follow,
        })
    }
}

/// The live half of a followed stream.
struct Following {
    observer: Observer,
    follower: Follower,
    until: Option<Instant>,
    tick: Interval,
    /// Losses told so far, by cause.
    told: Vec<(LostCause, u64)>,
    pending: Vec<GetFlowsResponse>,
}

impl Following {
    fn new(observer: Observer, follower: Follower, until: Option<Timestamp>) -> Self {
        let mut tick = tokio::time::interval(TELL_LOSSES);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let told = observer.log.totals().lost;
        let until = until.map(|t| {
            let left = t.duration_since(Timestamp::now()).max(SignedDuration::ZERO);
            Instant::now() + left.unsigned_abs()
        });
        Self { observer, follower, until, tick, told, pending: Vec::new() }
    }

    async fn step(mut self) -> Option<(GetFlowsResponse, Self)> {
        loop {
            if let Some(response) = self.pending.pop() {
                return Some((response, self));
            }
            let end = async {
                match self.until {
                    Some(at) => tokio::time::sleep_until(at).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                biased;
                followed = self.follower.next() => {
                    let response = match followed? {
                        Followed::Record(record) => self.observer.flow(&record),
                        Followed::Lost(n) => self.observer.lost(
                            "the client reads too slowly",
                            flow::LostEventSource::HubbleRingBuffer,
                            n,
                        ),
                    };
                    return Some((response, self));
                }
                () = end => return None,
                _ = self.tick.tick() => self.tell_losses(),
            }
        }
    }

    fn tell_losses(&mut self) {
        let lost = self.observer.log.totals().lost;
        let new = lost
            .iter()
            .zip(&self.told)
            .map(|((cause, now), (_, before))| (*cause, now.saturating_sub(*before)))
            .filter(|(_, n)| *n > 0)
            .collect();
        self.pending = self.observer.losses(new);
        self.told = lost;
    }
}
