//! Agents of a cluster from another machine: through the API server's port-forward to the
//! loopback address where each agent serves what changes nothing.
//!
//! The kubeconfig's own credential goes to the API server only. Agents get a token that is made
//! for them: of the service account `signet-viewer`, for ten minutes, for the audience
//! `signet.dev/observer`, which opens nothing else.

use std::{
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use futures_util::{StreamExt, stream};
use k8s_openapi::api::{
    authentication::v1::{TokenRequest, TokenRequestSpec},
    core::v1::{Pod, ServiceAccount},
};
use kube::{
    Api, Client,
    api::{ListParams, PostParams},
    client::UpgradeConnectionError,
};
use tonic::service::interceptor::InterceptedService;

use super::{
    exit::{Exit, Failure},
    sockets::{self, Agent, Credential},
    table::printable,
};
use crate::{
    api_server::persons_access,
    proto::admin::{ProbeRequest, admin_client::AdminClient, probe_request},
    viewer::callers::AUDIENCE,
};

/// The account whose token the agents are shown.
const VIEWER: &str = "signet-viewer";
/// By this label the agents' pods are known.
const SELECTOR: &str = "app.kubernetes.io/name=signet-agent";
/// How long the token is good, seconds: the least that the API server gives.
const TOKEN_SECONDS: i64 = 600;
/// So many agents are connected to at a time.
const AT_ONCE: usize = 16;
/// The API server has so long for an answer, and for a port-forward.
const PATIENCE: Duration = Duration::from_secs(10);

/// A cluster whose agents are asked.
#[derive(clap::Args, Clone, Debug)]
#[command(next_help_heading = "Cluster")]
pub struct ClusterArgs {
    /// Ask the agents of all nodes, through the API server
    #[arg(long)]
    cluster: bool,
    /// The kubeconfig that leads there [default: $KUBECONFIG, or ~/.kube/config]
    #[arg(long, value_name = "file")]
    kubeconfig: Option<PathBuf>,
    /// The kubeconfig's context
    #[arg(long, value_name = "name")]
    context: Option<String>,
    /// Only the agents of these nodes
    #[arg(long, value_name = "name", value_delimiter = ',')]
    on_node: Vec<String>,
    /// The agents' namespace
    #[arg(long, value_name = "name", default_value = "signet-system")]
    agent_namespace: String,
    /// The port of their viewerListen
    #[arg(long, value_name = "number", default_value_t = 4255)]
    agent_port: u16,
}

impl ClusterArgs {
    /// Whether the arguments say so.
    pub fn is_asked_for(&self) -> bool {
        self.cluster
            || self.kubeconfig.is_some()
            || self.context.is_some()
            || !self.on_node.is_empty()
    }

    /// Whether there is a kubeconfig where kubectl would look.
    pub fn has_kubeconfig(&self) -> bool {
        let is_set = |name| std::env::var_os(name).filter(|value| !value.is_empty());
        is_set("KUBECONFIG").is_some()
            || is_set("HOME").is_some_and(|home| Path::new(&home).join(".kube/config").is_file())
    }
}

/// An agent's pod.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug)]
struct AgentPod {
    node: String,
    pod: String,
    /// Why it cannot be asked, if so.
    absent: Option<String>,
}

/// Connects to the agents of all nodes, in the nodes' order; with them come the failures of those
/// that cannot be reached. None at all is a failure.
pub async fn connect_each(args: &ClusterArgs) -> Result<(Vec<Agent>, Vec<Failure>), Failure> {
    let mut config = persons_access(args.kubeconfig.as_deref(), args.context.as_deref())
        .await
        .map_err(|error| Failure::caused(Exit::Input, error))?;
    config.connect_timeout = Some(PATIENCE);
    // A port-forward lives as long as it is looked at.
    config.read_timeout = None;
    let client = Client::try_from(config).map_err(|error| Failure::caused(Exit::Input, error))?;
    let pods = agents(&client, args).await?;
    let credential = credential(&client, args).await?;
    let connecting: Vec<_> =
        pods.iter().map(|pod| connect(&client, args, pod, &credential)).collect();
    let connecting = stream::iter(connecting).buffered(AT_ONCE).collect::<Vec<_>>();
    let mut found = Vec::new();
    let mut failures = Vec::new();
    for result in connecting.await {
        match result {
            Ok(agent) => found.push(agent),
            Err(failure) => failures.push(failure),
        }
    }
    for node in args.on_node.iter().filter(|node| pods.iter().all(|pod| pod.node != **node)) {
        failures.push(Failure::new(
            Exit::Unreachable,
            format!("{}: no agent runs on this node", printable(node)),
        ));
    }
    if found.is_empty() && failures.len() == 1 {
        return Err(failures.remove(0));
    }
    match (found.is_empty(), failures.first()) {
        (true, Some(first)) => {
            for failure in &failures {
                anstream::eprintln!("warning: {failure}");
            }
            Err(Failure::new(first.exit, format!("none of {} agents can be asked", pods.len())))
        }
        (true, None) => Err(Failure::new(
            Exit::Unreachable,
            format!(
                "no agent's pod is in namespace {}: is Signet installed there, and is \
                 --agent-namespace right?",
                args.agent_namespace
            ),
        )),
        (false, _) => Ok((found, failures)),
    }
}

/// The agents' pods, by node.
async fn agents(client: &Client, args: &ClusterArgs) -> Result<Vec<AgentPod>, Failure> {
    let api: Api<Pod> = Api::namespaced(client.clone(), &args.agent_namespace);
    let what = format!("the pods of namespace {}", args.agent_namespace);
    let params = ListParams::default().labels(SELECTOR);
    let list = in_time(&what, api.list(&params)).await?;
    let mut pods: Vec<AgentPod> = list.items.iter().filter_map(agent_pod).collect();
    pods.retain(|pod| args.on_node.is_empty() || args.on_node.contains(&pod.node));
    // During an upgrade a node has two: the one that can be asked, or else any.
    pods.sort_by(|a, b| (&a.node, &a.absent, &a.pod).cmp(&(&b.node, &b.absent, &b.pod)));
    pods.dedup_by(|a, b| a.node == b.node);
    Ok(pods)
}

/// `None` for a pod that is on no node yet, or on its way out.
fn agent_pod(pod: &Pod) -> Option<AgentPod> {
    let node = pod.spec.as_ref()?.node_name.clone()?;
    if pod.metadata.deletion_timestamp.is_some() {
        return None;
    }
    let name = pod.metadata.name.clone()?;
    let phase = pod.status.as_ref().and_then(|status| status.phase.as_deref());
    let absent = match phase {
        Some("Running") => None,
        Some("Succeeded" | "Failed") => return None,
        phase => Some(format!("its agent's pod {name} is {}", phase.unwrap_or("of no phase"))),
    };
    Some(AgentPod { node, pod: name, absent })
}

/// A token for the agents.
async fn credential(client: &Client, args: &ClusterArgs) -> Result<Credential, Failure> {
    let api: Api<ServiceAccount> = Api::namespaced(client.clone(), &args.agent_namespace);
    let request = TokenRequest {
        spec: TokenRequestSpec {
            audiences: vec![AUDIENCE.into()],
            expiration_seconds: Some(TOKEN_SECONDS),
            bound_object_ref: None,
        },
        ..TokenRequest::default()
    };
    let what = format!("a token of service account {}/{VIEWER}", args.agent_namespace);
    let params = PostParams::default();
    let answer = in_time(&what, api.create_token_request(VIEWER, &params, &request)).await?;
    let token = answer.status.map(|status| status.token).unwrap_or_default();
    Credential::bearer(&token).filter(|_| !token.is_empty()).ok_or_else(|| {
        Failure::new(Exit::Unreachable, format!("the API server gives no usable token for {what}"))
    })
}

/// Connects to one agent and asks it whether it is there.
async fn connect(
    client: &Client,
    args: &ClusterArgs,
    pod: &AgentPod,
    credential: &Credential,
) -> Result<Agent, Failure> {
    let node = printable(&pod.node);
    let fails = |exit, why: String| Failure::new(exit, format!("{node}: {}", printable(&why)));
    if let Some(why) = &pod.absent {
        return Err(fails(Exit::Unreachable, why.clone()));
    }
    let api: Api<Pod> = Api::namespaced(client.clone(), &args.agent_namespace);
    let port = args.agent_port;
    let ports = [port];
    let opened = tokio::time::timeout(PATIENCE, api.portforward(&pod.pod, &ports));
    let mut forwarder = match opened.await {
        Ok(Ok(forwarder)) => forwarder,
        Ok(Err(error)) => {
            let (exit, remedy) = match &error {
                kube::Error::UpgradeConnection(UpgradeConnectionError::ProtocolSwitch(code))
                    if code.as_u16() == 403 =>
                {
                    (Exit::Denied, REMEDY)
                }
                _ => (Exit::Unreachable, "is the node's kubelet reachable from the API server?"),
            };
            let pod = &pod.pod;
            return Err(fails(exit, format!("no port-forward to pod {pod}: {error}; {remedy}")));
        }
        Err(_) => {
            return Err(fails(
                Exit::Unreachable,
                format!("no port-forward to pod {} within {PATIENCE:?}", pod.pod),
            ));
        }
    };
    let (stream, trouble) = (forwarder.take_stream(port), forwarder.take_error(port));
    let missing = || fails(Exit::Bug, "the port-forward has no stream".into());
    let channel = sockets::over(stream.ok_or_else(missing)?)
        .await
        .map_err(|error| fails(Exit::Unreachable, error.to_string()))?;
    // What the kubelet says of the port comes beside the stream.
    let said = Arc::new(Mutex::new(None));
    if let Some(trouble) = trouble {
        let said = said.clone();
        tokio::spawn(async move {
            if let Some(text) = trouble.await {
                *said.lock().unwrap_or_else(PoisonError::into_inner) = Some(text);
            }
        });
    }
    let channel = InterceptedService::new(channel, credential.clone());
    let agent = Agent { socket: pod.node.as_str().into(), channel };
    let mut probe = AdminClient::new(agent.channel.clone());
    let request = ProbeRequest { kind: probe_request::Kind::Live.into() };
    match tokio::time::timeout(PATIENCE, probe.probe(request)).await {
        Ok(Ok(_)) => Ok(agent),
        Ok(Err(status)) if is_of_the_agent(&status) => {
            Err(Failure::refused(&agent.socket, &status))
        }
        other => {
            let said = said.lock().unwrap_or_else(PoisonError::into_inner).take();
            let why = match (said, other) {
                (Some(said), _) => said,
                (None, Ok(Err(status))) => status.message().to_owned(),
                (None, _) => format!("no answer within {PATIENCE:?}"),
            };
            Err(fails(
                Exit::Unreachable,
                format!(
                    "pod {} does not answer on port {port}: {why}; does its viewerListen say \
                     127.0.0.1:{port}?",
                    pod.pod
                ),
            ))
        }
    }
}

/// What makes a person one who may look.
const REMEDY: &str = "bind the Role signet-flows of the agents' namespace to yourself";

/// An answer rather than a connection that broke.
fn is_of_the_agent(status: &tonic::Status) -> bool {
    use tonic::Code;
    matches!(
        status.code(),
        Code::Unauthenticated
            | Code::PermissionDenied
            | Code::ResourceExhausted
            | Code::Unimplemented
            | Code::InvalidArgument
    )
}

async fn in_time<T>(
    what: &str,
    call: impl Future<Output = Result<T, kube::Error>>,
) -> Result<T, Failure> {
    match tokio::time::timeout(PATIENCE, call).await {
        Ok(Ok(answer)) => Ok(answer),
        Ok(Err(kube::Error::Api(status))) => {
            let (exit, remedy) = match status.code {
                401 => (Exit::Denied, "log in again"),
                403 => (Exit::Denied, REMEDY),
                404 => (Exit::Input, "is Signet installed there, and is --agent-namespace right?"),
                _ => (Exit::Unreachable, "try again"),
            };
            let said = printable(&status.message);
            Err(Failure::new(exit, format!("the API server refuses {what}: {said}; {remedy}")))
        }
        Ok(Err(error)) => Err(Failure::new(
            Exit::Unreachable,
            format!("the API server does not answer {what}: {error}; is the kubeconfig right?"),
        )),
        Err(_) => Err(Failure::new(
            Exit::Unreachable,
            format!("the API server does not answer {what} within {PATIENCE:?}"),
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pod(node: Option<&str>, phase: &str, is_ending: bool) -> Pod {
        let mut pod = serde_json::json!({
            "metadata": {"name": "signet-agent-x"},
            "spec": {"nodeName": node, "containers": []},
            "status": {"phase": phase},
        });
        if is_ending {
            pod["metadata"]["deletionTimestamp"] = "2026-08-06T10:00:00Z".into();
        }
        serde_json::from_value(pod).unwrap()
    }

    #[test]
    fn only_pods_that_run_on_a_node_are_asked() {
        let running = agent_pod(&pod(Some("node-1"), "Running", false)).unwrap();
        assert_eq!((&*running.node, running.absent), ("node-1", None));
        let pending = agent_pod(&pod(Some("node-1"), "Pending", false)).unwrap();
        assert!(pending.absent.unwrap().contains("is Pending"));
        assert_eq!(agent_pod(&pod(None, "Pending", false)), None);
        assert_eq!(agent_pod(&pod(Some("node-1"), "Running", true)), None);
        assert_eq!(agent_pod(&pod(Some("node-1"), "Failed", false)), None);
    }

    #[test]
    fn a_token_is_not_shown() {
        let credential = Credential::bearer("secret-token").unwrap();
        assert!(!format!("{credential:?}").contains("secret"), "{credential:?}");
        assert!(Credential::bearer("two\nlines").is_none());
    }
}
