//! What is in the way of a stricter mode of a namespace now: rules of NetworkPolicies, and open
//! flows in clear. Also those NetworkPolicies as policies on identities.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::Duration,
};

use signet_ebpf::abi::{Mode, proto};
use tokio::sync::{mpsc, oneshot};

use super::{inputs::StatusInputs, policies::Unanswered};
use crate::{
    cluster::{
        model::{ExemptPort, World},
        network_policy::{self, SuggestedPeer, SuggestedRule},
    },
    endpoint::{
        reconcile::{Survey, Surveyed},
        state::NodeState,
    },
    flow::edges::network_of,
    proto::admin::{
        BlockingRule, CheckRolloutRequest, CheckRolloutResponse, NodeNetwork, OpenFlow, PortRange,
        TranslateNetworkPoliciesResponse, TranslatedPeer, TranslatedPolicy, TranslatedRule,
    },
    telemetry::reason,
};

/// Open flows that are told one by one.
const MOST_FLOWS: usize = 1000;
/// How long the reconciler may take to look at its pods' sockets.
const PATIENCE: Duration = Duration::from_secs(10);

/// Answers over the world that is applied, and asks the reconciler for open flows.
///
/// # Errors
///
/// A mode that is none to go to; an agent without a world; sockets that cannot be listed.
pub async fn check(
    inputs: &StatusInputs,
    surveys: &mpsc::Sender<Survey>,
    request: &CheckRolloutRequest,
) -> Result<CheckRolloutResponse, Unanswered> {
    let state = inputs.state.as_ref().ok_or(Unanswered::Early)?;
    let mode = match &*request.to {
        "permissive" => Mode::Permissive,
        "strict" => Mode::Strict,
        other => {
            let shown = crate::config::yaml::shorten(other);
            return Err(Unanswered::Question(format!("{shown:?} is not permissive or strict")));
        }
    };
    let namespace: Arc<str> = request.namespace.as_str().into();
    let (answer, answered) = oneshot::channel();
    let survey = Survey { namespace: namespace.clone(), mode, answer };
    let late = || Unanswered::Busy("the agent did not list its pods' sockets in time".into());
    let asking = async {
        surveys.send(survey).await.map_err(|_| late())?;
        answered.await.map_err(|_| late())
    };
    let surveyed = tokio::time::timeout(PATIENCE, asking).await.map_err(|_| late())??;
    let surveyed = surveyed.map_err(Unanswered::Busy)?;
    Ok(response(state, &namespace, &surveyed))
}

fn response(state: &NodeState, namespace: &str, surveyed: &[Surveyed]) -> CheckRolloutResponse {
    let world = &state.world;
    let blocking = network_policy::blocking(world, namespace).into_iter().map(|found| {
        let name = &found.policy.name;
        BlockingRule {
            policy: format!("{}/{}", name.namespace, name.name),
            text: found.text(),
            remedy: found.remedy(),
        }
    });
    let open = surveyed.iter().flat_map(|pod| {
        pod.flows.iter().map(|flow| OpenFlow {
            pod: format!("{}/{}", pod.pod.namespace, pod.pod.name),
            local: flow.local.to_string(),
            remote: flow.remote.to_string(),
            remote_pod: pod_at(world, flow.remote.ip()),
            ingress: flow.ingress,
            reason: reason::name(flow.reason).into(),
        })
    });
    let total: usize = surveyed.iter().map(|pod| pod.flows.len()).sum();
    let exempt = world.namespaces.get(namespace).map(|n| n.exempt_ports.clone());
    // What the API server calls stays open by itself.
    let called = state.builtins.called(world);
    let called = called
        .iter()
        .filter(|(ip, _)| world.pod_at(**ip).is_some_and(|pod| *pod.name.namespace == *namespace));
    let called = called.flat_map(|(_, ports)| ports);
    let exempt: BTreeSet<_> = exempt
        .iter()
        .flat_map(|ports| ports.iter())
        .chain(called)
        .map(|port| (port.port, port.protocol))
        .collect();
    let exempt = exempt.into_iter().map(|(number, of)| ExemptPort { port: number, protocol: of });
    let exempt = exempt.map(|port| {
        let protocol = if port.protocol == proto::UDP { "udp" } else { "tcp" };
        format!("{}/{protocol}", port.port)
    });
    let node_hosts = node_hosts(world);
    CheckRolloutResponse {
        node: state.node.to_string(),
        blocking: blocking.collect(),
        open: open.take(MOST_FLOWS).collect(),
        open_total: total.try_into().unwrap_or(u64::MAX),
        exempt_ports: exempt.collect(),
        node_networks: node_hosts.iter().map(|hosts| hosts.network.clone()).collect(),
        node_hosts,
        pod_ranges: world.ranges.pods.iter().map(ToString::to_string).collect(),
    }
}

/// The nodes by the networks of their own addresses, each with what runs in the host's network
/// there: those dial under a node's address.
fn node_hosts(world: &World) -> Vec<NodeNetwork> {
    let mut on_node = BTreeMap::<&str, BTreeSet<String>>::new();
    for pod in world.pods.values().filter(|pod| pod.host_network && !pod.finished) {
        let Some(node) = &pod.node else { continue };
        let namespace = &pod.name.namespace;
        let name = match &pod.workload {
            Some(workload) => format!("{} {namespace}/{}", workload.kind, workload.name),
            None => format!("pod {namespace}/{}", pod.name.name),
        };
        on_node.entry(node).or_default().insert(name);
    }
    let mut networks = BTreeMap::<String, (BTreeSet<&str>, BTreeSet<&String>)>::new();
    for (node, addresses) in &world.nodes {
        for address in addresses {
            let (nodes, workloads) = networks.entry(network_of(*address).to_string()).or_default();
            nodes.insert(node);
            workloads.extend(on_node.get(&**node).into_iter().flatten());
        }
    }
    networks
        .into_iter()
        .map(|(network, (nodes, workloads))| NodeNetwork {
            network,
            nodes: nodes.into_iter().map(str::to_owned).collect(),
            host_workloads: workloads.into_iter().cloned().collect(),
        })
        .collect()
}

fn pod_at(world: &World, ip: std::net::IpAddr) -> String {
    let pod = world.pod_at(ip).map(|pod| &pod.name);
    pod.map(|name| format!("{}/{}", name.namespace, name.name)).unwrap_or_default()
}

/// The namespace's NetworkPolicies as ALLOWs.
///
/// # Errors
///
/// An agent without a world.
pub fn translate(
    inputs: &StatusInputs,
    namespace: &str,
) -> Result<TranslateNetworkPoliciesResponse, Unanswered> {
    let state = inputs.state.as_ref().ok_or(Unanswered::Early)?;
    let policies = network_policy::translate(&state.world, namespace).into_iter();
    let policies = policies.map(|suggested| TranslatedPolicy {
        name: suggested.name.name.to_string(),
        selector: suggested
            .selector
            .iter()
            .map(|(label, value)| (label.to_string(), value.to_string()))
            .collect(),
        is_translated: suggested.rules.is_some(),
        rules: suggested.rules.iter().flatten().map(rule).collect(),
        remarks: suggested.remarks,
    });
    Ok(TranslateNetworkPoliciesResponse {
        node: inputs.node.to_string(),
        trust_domain: state.world.trust_domain.to_string(),
        policies: policies.collect(),
    })
}

fn rule(rule: &SuggestedRule) -> TranslatedRule {
    let range = |&(first, last): &(u16, u16)| PortRange { first: first.into(), last: last.into() };
    TranslatedRule {
        peers: rule.peers.iter().map(peer).collect(),
        ports: rule.ports.iter().map(range).collect(),
        udp: rule.udp,
    }
}

fn peer(peer: &SuggestedPeer) -> TranslatedPeer {
    match peer {
        SuggestedPeer::Namespaces(names) => TranslatedPeer {
            namespaces: names.iter().map(ToString::to_string).collect(),
            ..TranslatedPeer::default()
        },
        SuggestedPeer::Accounts(accounts) => TranslatedPeer {
            accounts: accounts.iter().map(|(space, name)| format!("{space}/{name}")).collect(),
            ..TranslatedPeer::default()
        },
        SuggestedPeer::Block { block, except } => TranslatedPeer {
            block: block.to_string(),
            except: except.iter().map(ToString::to_string).collect(),
            ..TranslatedPeer::default()
        },
    }
}
