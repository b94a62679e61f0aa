//! What the page is told while it is open: the picture whenever it changes, and flows as they are
//! decided.

use std::{sync::Arc, time::Duration};

use jiff::Timestamp;
use prost::Message;
use tokio::sync::{broadcast, watch};

use super::graph::{self, Graph};
use crate::{
    cli::{
        aggregate,
        exit::{Exit, Failure},
        flow_lines,
        flows::{self, Incoming},
        sockets::{self, Agent},
    },
    observer::encode::OPTIONS_TYPE,
    proto::{
        admin::{EndpointsRequest, admin_client::AdminClient},
        detail,
        observer::GetFlowsRequest,
    },
};

/// How often agents are asked for the picture.
const REFRESH: Duration = Duration::from_secs(2);
/// An agent that went away is tried again after this.
const RETRY: Duration = Duration::from_secs(5);
/// Flows that a page may lag behind; what it misses it is told in number.
const BACKLOG: usize = 1024;

/// What is new; clones see the same.
#[derive(Clone, Debug)]
pub struct Feed {
    /// The newest picture.
    pub graph: watch::Receiver<Arc<Graph>>,
    /// A line of JSON a flow, as `signet flows -o json` prints it.
    pub flows: broadcast::Sender<Arc<str>>,
    /// Who is asked.
    pub agents: Arc<[Agent]>,
}

impl Feed {
    /// Asks agents from now on; `is_complete` is false when some are missing from the beginning.
    pub fn start(agents: Vec<Agent>, is_complete: bool, since: Option<Timestamp>) -> Self {
        let (pictures, graph) = watch::channel(Arc::default());
        let (flows, _) = broadcast::channel(BACKLOG);
        let agents: Arc<[Agent]> = agents.into();
        tokio::spawn(refresh(agents.clone(), is_complete, since, pictures));
        tokio::spawn(follow(agents.clone(), flows.clone()));
        Self { graph, flows, agents }
    }
}

async fn refresh(
    agents: Arc<[Agent]>,
    is_complete: bool,
    since: Option<Timestamp>,
    pictures: watch::Sender<Arc<Graph>>,
) {
    let mut said = None;
    loop {
        match take(&agents, since).await {
            Ok((edges, pods, all)) => {
                let graph = graph::draw(&edges, &pods, is_complete && all);
                pictures.send_if_modified(|old| {
                    let changed = **old != graph;
                    *old = Arc::new(graph);
                    changed
                });
                said = None;
            }
            Err(failure) => {
                let failure = failure.to_string();
                if said.as_ref() != Some(&failure) {
                    anstream::eprintln!("warning: {failure}");
                    said = Some(failure);
                }
                pictures.send_if_modified(|old| {
                    let changed = old.is_complete;
                    *old = Arc::new(Graph { is_complete: false, ..(**old).clone() });
                    changed
                });
            }
        }
        tokio::time::sleep(REFRESH).await;
    }
}

type Taken = (Vec<crate::proto::admin::SeenEdge>, Vec<crate::proto::admin::Endpoint>, bool);

/// What all agents have seen, and their pods.
async fn take(agents: &[Agent], since: Option<Timestamp>) -> Result<Taken, Failure> {
    let seen = aggregate::ask(agents, since, &[]).await?;
    let (mut pods, mut all) = (Vec::new(), true);
    for agent in agents {
        let mut client = AdminClient::new(agent.channel.clone());
        match sockets::within_time(agent, client.endpoints(EndpointsRequest::default())).await {
            Ok(answer) => pods.extend(answer.endpoints),
            Err(failure) if failure.exit == Exit::Unreachable => all = false,
            Err(failure) => return Err(failure),
        }
    }
    let edges = seen.into_iter().map(|(_, edge)| edge).collect();
    Ok((edges, pods, all))
}

/// Flows as they are decided, for as long as the command runs.
async fn follow(agents: Arc<[Agent]>, flows: broadcast::Sender<Arc<str>>) {
    loop {
        let request = GetFlowsRequest { follow: true, ..GetFlowsRequest::default() };
        let mut incoming = flows::ask(agents.to_vec(), request);
        while let Some(message) = incoming.recv().await {
            if let Incoming::Flow(answer) = message
                && let Ok(line) = flow_lines::json(&answer.seen)
            {
                // Nobody looks while there is no page.
                let _ = flows.send(line.into());
            }
        }
        tokio::time::sleep(RETRY).await;
    }
}

/// The newest flows between two workloads, newest first, as JSON lines: what a click on an edge
/// asks for.
pub async fn between(
    agents: &[Agent],
    from: &str,
    to: &str,
    limit: usize,
) -> Result<Vec<String>, Failure> {
    let request = GetFlowsRequest {
        number: LOOK_BACK,
        extensions: Some(prost_types::Any {
            type_url: OPTIONS_TYPE.into(),
            value: detail::Options { ends: true }.encode_to_vec(),
        }),
        ..GetFlowsRequest::default()
    };
    let mut incoming = flows::ask(agents.to_vec(), request);
    let mut found = Vec::new();
    while let Some(message) = incoming.recv().await {
        if let Incoming::Flow(answer) = message {
            let record = &answer.seen.record;
            if flow_lines::workload(&record.source) == from
                && flow_lines::workload(&record.destination) == to
            {
                found.push(answer);
            }
        }
    }
    found.sort_by_key(|answer| std::cmp::Reverse(answer.seen.record.time));
    found.truncate(limit);
    found
        .iter()
        .map(|answer| flow_lines::json(&answer.seen).map_err(|e| Failure::caused(Exit::Bug, e)))
        .collect()
}

/// Records of each agent that are looked through.
const LOOK_BACK: u64 = 4096;
