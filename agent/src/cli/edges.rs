//! What agents have seen of a namespace: the history of its flows, and its pods.

use jiff::Timestamp;

use super::{
    exit::{Exit, Failure},
    sockets::{self, Agent, SocketArgs},
};
use crate::proto::{
    self,
    admin::{
        EdgeEnd, Endpoint, EndpointsRequest, ListEdgesRequest, SeenEdge, admin_client::AdminClient,
    },
};

/// What was seen of a namespace.
#[derive(Debug, Default)]
pub struct Seen {
    /// Edges that have it on either side, as each end reports them.
    pub edges: Vec<SeenEdge>,
    /// Its pods on the nodes asked.
    pub pods: Vec<Endpoint>,
    /// False when an agent did not answer.
    pub is_complete: bool,
}

/// Asks all agents; those that do not answer are told on stderr, unless there is but one.
pub async fn ask(
    sockets: &SocketArgs,
    namespace: &str,
    since: Option<Timestamp>,
) -> Result<Seen, Failure> {
    let (agents, is_complete) = sockets::connect_all(sockets).await?;
    let mut seen = Seen { is_complete, ..Seen::default() };
    for agent in &agents {
        match ask_one(agent, namespace, since, &mut seen).await {
            Ok(()) => {}
            Err(failure) if agents.len() > 1 && failure.exit == Exit::Unreachable => {
                anstream::eprintln!("warning: {failure}");
                seen.is_complete = false;
            }
            Err(failure) => return Err(failure),
        }
    }
    Ok(seen)
}

async fn ask_one(
    agent: &Agent,
    namespace: &str,
    since: Option<Timestamp>,
    seen: &mut Seen,
) -> Result<(), Failure> {
    let mut client = AdminClient::new(agent.channel.clone());
    let request = EndpointsRequest { namespace: namespace.into(), ..EndpointsRequest::default() };
    seen.pods.extend(sockets::within_time(agent, client.endpoints(request)).await?.endpoints);
    let request =
        ListEdgesRequest { namespace: namespace.into(), since: since.map(proto::timestamp) };
    let mut stream = sockets::within_time(agent, client.list_edges(request)).await?;
    loop {
        let next = async { stream.message().await.map(tonic::Response::new) };
        match sockets::within_time(agent, next).await? {
            Some(answer) => seen.edges.extend(answer.edges),
            None => return Ok(()),
        }
    }
}

/// An end as people read it: `shop/frontend`, a SPIFFE ID, a network, `others`.
pub fn name_of(end: &EdgeEnd) -> String {
    match (&*end.namespace, &*end.identity, &*end.network) {
        ("", "", "") => "others".into(),
        ("", "", network) => network.into(),
        ("", identity, _) => identity.into(),
        (namespace, ..) => format!("{namespace}/{}", end.service_account),
    }
}

/// The server's side of an edge that the server's own node reports, when that is in `namespace`.
pub fn arrives_in<'a>(edge: &'a SeenEdge, namespace: &str) -> Option<(&'a EdgeEnd, &'a EdgeEnd)> {
    let (source, destination) = (edge.source.as_ref()?, edge.destination.as_ref()?);
    (edge.reporter == "destination" && destination.namespace == namespace)
        .then_some((source, destination))
}
