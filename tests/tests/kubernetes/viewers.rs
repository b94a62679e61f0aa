//! Looking at a cluster from outside it: through the port-forward, as who may, at all nodes.

use std::{
    path::{Path, PathBuf},
    process::{Command, Output},
    sync::Arc,
    time::Duration,
};

use anyhow::{Context, Result, ensure};
use serde_json::json;
use signet::{
    admin::{Admin, IssuerFacts, KernelFacts, StatusInputs},
    flow::{self, Edges, FlowEvent, FlowRecord, Limits, Party, Recorder, Reporter, Sinks, Via},
    observer::{self, Observer},
    proto::{
        admin::{StatusRequest, admin_client::AdminClient},
        observer::{GetAgentEventsRequest, observer_client::ObserverClient},
    },
    viewer::{self, callers::Callers},
};
use signet_ebpf::abi::{Direction, Reason, Verdict};
use signet_lab::{
    api_server::ApiServer,
    netns,
    process::{signet_binary, without_own_variables},
};
use tonic::{
    Code, Request,
    metadata::MetadataValue,
    service::Routes,
    transport::{Channel, Endpoint, Uri},
};

const PORT: &str = "127.0.0.1:4255";
const AUDIENCE: &str = "signet.dev/observer";
const SYSTEM: &str = "signet-system";

/// A node's network namespace with what an agent serves there for viewers.
struct Node {
    name: &'static str,
    netns: PathBuf,
    recorder: Recorder,
}

impl Node {
    async fn start(api: &ApiServer, name: &'static str) -> Result<Self> {
        let netns = netns::create(&format!("signet-view-{}-{name}", std::process::id()))?;
        let edges = Edges::default();
        let sinks = Sinks { edges: edges.clone(), ..Sinks::default() };
        let (recorder, collector) = flow::start(Limits::default(), sinks);
        tokio::spawn(collector.run());
        let node = Self { name, netns, recorder };
        let log = node.recorder.log();
        let provided = inputs(name);
        let surveys = tokio::sync::mpsc::channel(1).0;
        let admin = Admin::new(Arc::new(move || provided.clone()), log.clone(), edges, surveys);
        let routes = Routes::new(admin.into_service())
            .add_service(Observer::new(log, name.into(), "cluster.local".into()).into_service())
            .add_service(observer::health().await);
        let listener = netns::inside(&node.netns, || {
            let listener = std::net::TcpListener::bind(PORT).context(PORT)?;
            listener.set_nonblocking(true)?;
            Ok(listener)
        })?;
        let listener = tokio::net::TcpListener::from_std(listener)?;
        // As the shipped account of the agents, which must have the rights for this.
        let kubeconfig = api.account_kubeconfig(SYSTEM, "signet-agent", None)?;
        let reviewer = signet::api_server::ApiServer::connect(Some(&kubeconfig)).await?;
        tokio::spawn(viewer::serve(listener, routes, Arc::new(Callers::new(reviewer))));
        api.forward_to(name, &node.netns);
        agent_pod(api, name, "Running")?;
        Ok(node)
    }

    /// A connection of its own, without the API server.
    async fn dial(&self) -> Result<Channel> {
        let netns = self.netns.clone();
        let connector = tower::service_fn(move |_: Uri| {
            let netns = netns.clone();
            async move {
                let stream = netns::inside(&netns, || {
                    let stream = std::net::TcpStream::connect(PORT)?;
                    stream.set_nonblocking(true)?;
                    Ok(stream)
                });
                let stream = stream.map_err(std::io::Error::other)?;
                let stream = tokio::net::TcpStream::from_std(stream)?;
                std::io::Result::Ok(hyper_util::rt::TokioIo::new(stream))
            }
        });
        Ok(Endpoint::from_static("http://node").connect_with_connector(connector).await?)
    }

    /// Records a verdict on a flow of this second of the minute.
    async fn record(&self, second: u32) {
        let seen = self.recorder.log().totals().seen;
        let party = |address: &str| Party::unknown(address.parse().expect("an address"));
        let time = format!("2026-08-06T10:12:{second:02}Z").parse().expect("a time");
        self.recorder.record(FlowRecord {
            time,
            event: FlowEvent::Verdict,
            uuid: uuid::Uuid::from_u128(second.into()),
            node: self.name.into(),
            reporter: Reporter::Destination,
            direction: Direction::Ingress,
            protocol: 6,
            via: Via::Plaintext,
            verdict: Verdict::Dropped,
            reason: Reason::PlaintextRefused,
            policy: None,
            revision: 1,
            extra: vec![],
            http: None,
            source: party("10.9.0.7:39990"),
            destination: party("10.0.2.7:8080"),
        });
        while self.recorder.log().totals().seen == seen {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        if let Some(name) = self.netns.file_name() {
            netns::delete(&name.to_string_lossy());
        }
    }
}

fn inputs(node: &str) -> StatusInputs {
    let now = jiff::Timestamp::now();
    StatusInputs {
        node: node.into(),
        started: now,
        state: None,
        wanted_revision: 0,
        wanted_since: now,
        source: "kubernetes".into(),
        location: "lab".into(),
        watches: vec![],
        kernel: KernelFacts::default(),
        issuer: IssuerFacts {
            trust_domain: "cluster.local".into(),
            name: "embedded".into(),
            roots: vec![],
        },
        svids: vec![],
        workload_svids: vec![],
        drops: vec![],
        problems: vec![],
        since_turn: Some(Duration::from_millis(1)),
        settled: true,
        succession: Default::default(),
        counters: vec![],
    }
}

fn agent_pod(api: &ApiServer, node: &str, phase: &str) -> Result<()> {
    api.apply(json!({
        "apiVersion": "v1", "kind": "Pod",
        "metadata": {
            "namespace": SYSTEM, "name": format!("signet-agent-{node}"),
            "labels": {"app.kubernetes.io/name": "signet-agent"},
        },
        "spec": {
            "serviceAccountName": "signet-agent", "nodeName": node, "hostNetwork": true,
            "containers": [{"name": "agent"}],
        },
        "status": {"phase": phase},
    }))?;
    Ok(())
}

/// A person with a kubeconfig of its own.
fn person(api: &ApiServer, name: &str, may_look: bool) -> Result<PathBuf> {
    api.service_account("people", name)?;
    if may_look {
        api.apply(json!({
            "apiVersion": "rbac.authorization.k8s.io/v1", "kind": "RoleBinding",
            "metadata": {"namespace": SYSTEM, "name": name},
            "roleRef": {
                "apiGroup": "rbac.authorization.k8s.io", "kind": "Role", "name": "signet-flows",
            },
            "subjects": [{"kind": "ServiceAccount", "namespace": "people", "name": name}],
        }))?;
    }
    api.account_kubeconfig("people", name, None)
}

async fn signet(kubeconfig: &Path, arguments: &[&str]) -> Result<Output> {
    let mut command = Command::new(signet_binary()?);
    without_own_variables(&mut command);
    command.args(arguments).arg("--kubeconfig").arg(kubeconfig);
    Ok(tokio::task::spawn_blocking(move || command.output()).await??)
}

fn told(output: &Output) -> (Option<i32>, String, String) {
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    (output.status.code(), text(&output.stdout), text(&output.stderr))
}

fn server() -> Result<ApiServer> {
    let api = ApiServer::start()?;
    api.ship(&["crds", "agent"])?;
    Ok(api)
}

#[tokio::test(flavor = "multi_thread")]
async fn all_nodes_are_looked_at_through_the_api_server() -> Result<()> {
    let api = server()?;
    let first = Node::start(&api, "node-1").await?;
    let second = Node::start(&api, "node-2").await?;
    // Nothing listens on this one, that one's agent does not run, and a job's pod is no agent.
    let mute = Node::start(&api, "node-3").await?;
    let (alice, mallory) = (person(&api, "alice", true)?, person(&api, "mallory", false)?);
    first.record(1).await;
    second.record(2).await;
    first.record(3).await;

    let (code, text, errors) = told(&signet(&alice, &["flows", "-o", "compact"]).await?);
    ensure!(code == Some(0) && errors.is_empty(), "{code:?} {errors}");
    let seen: Vec<String> =
        text.lines().map(|line| line.split(' ').take(2).collect::<Vec<_>>().join(" ")).collect();
    ensure!(
        seen == [
            "2026-08-06T10:12:01.000Z node-1",
            "2026-08-06T10:12:02.000Z node-2",
            "2026-08-06T10:12:03.000Z node-1",
        ],
        "{text}"
    );
    let output = signet(&alice, &["flows", "-o", "compact", "--on-node", "node-2"]).await?;
    ensure!(told(&output).1.lines().count() == 1, "{output:?}");
    let (_, text, _) = told(&signet(&alice, &["status", "--all-nodes"]).await?);
    ensure!(["node-1", "node-2", "node-3"].iter().all(|node| text.contains(node)), "{text}");
    for command in [&["endpoints"][..], &["identities"], &["services"], &["policy", "list"]] {
        let (code, _, errors) = told(&signet(&alice, command).await?);
        ensure!(code == Some(0) && errors.is_empty(), "{command:?}: {code:?} {errors}");
    }

    // What is missing is named, and what is there is shown.
    api.forward_to("node-3", Path::new("/proc/self/ns/net"));
    agent_pod(&api, "node-4", "Pending")?;
    let (code, text, errors) = told(&signet(&alice, &["flows", "-o", "compact"]).await?);
    ensure!(code == Some(4) && text.lines().count() == 3, "{code:?} {text} {errors}");
    let warnings: Vec<&str> = errors.lines().collect();
    ensure!(
        warnings.len() == 2
            && warnings[0].starts_with("warning: node-3: pod signet-agent-node-3 does not answer")
            // How it was refused is the runtime's word, or that the connection ended: whichever
            // comes first.
            && warnings[0].ends_with("does its viewerListen say 127.0.0.1:4255?")
            && warnings[1] == "warning: node-4: its agent's pod signet-agent-node-4 is Pending",
        "{errors}"
    );
    let (code, _, errors) = told(&signet(&alice, &["status", "--on-node", "node-9"]).await?);
    ensure!(code == Some(4) && errors.contains("node-9: no agent runs"), "{code:?} {errors}");
    drop(mute);

    // Who has no right is told which, and the agents never hear of it.
    let before = api.requests().get("POST tokenreviews").copied();
    let (code, _, errors) = told(&signet(&mallory, &["flows"]).await?);
    ensure!(code == Some(5) && errors.contains("bind the Role signet-flows"), "{code:?} {errors}");
    ensure!(api.requests().get("POST tokenreviews").copied() == before);

    // The account of the token loses its right: agents refuse what they have not let in before.
    api.delete("clusterrolebindings", "", "signet-viewer")?;
    let (code, _, errors) = told(&signet(&alice, &["flows", "--on-node", "node-1"]).await?);
    ensure!(
        code == Some(5)
            && errors
                .contains("system:serviceaccount:signet-system:signet-viewer may not get flows"),
        "{code:?} {errors}"
    );
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn an_agent_lets_in_only_tokens_that_are_meant_for_it() -> Result<()> {
    let api = server()?;
    let node = Node::start(&api, "node-5").await?;
    let channel = node.dial().await?;
    let with = |token: Option<&str>| {
        let mut client = AdminClient::new(channel.clone());
        let mut request = Request::new(StatusRequest {});
        if let Some(token) = token {
            let value = MetadataValue::try_from(format!("Bearer {token}")).expect("a header");
            request.metadata_mut().insert("authorization", value);
        }
        async move { client.status(request).await }
    };
    let refused = async |token: Option<&str>, code: Code, why: &str| -> Result<()> {
        match with(token).await {
            Ok(_) => anyhow::bail!("let in: {why}"),
            Err(status) => {
                ensure!(status.code() == code && status.message().contains(why), "{status:?}");
                Ok(())
            }
        }
    };
    let hour = Duration::from_secs(3600);
    let token = |account: &str, audience: &str| api.token(SYSTEM, account, audience, None, hour);
    api.service_account(SYSTEM, "other")?;

    let good = token("signet-viewer", AUDIENCE)?;
    ensure!(with(Some(&good)).await?.into_inner().agent.context("an agent")?.node == "node-5");
    let reviews = || api.requests().get("POST tokenreviews").copied().unwrap_or(0);
    let asked = reviews();
    with(Some(&good)).await?;
    ensure!(reviews() == asked, "a token is not asked about twice in a moment");

    refused(None, Code::Unauthenticated, "a bearer token").await?;
    refused(Some("no-such-token"), Code::Unauthenticated, "not valid for the audience").await?;
    refused(Some("not one word"), Code::Unauthenticated, "malformed").await?;
    // Of the right account for the API server itself, and for the authority.
    for audience in ["https://kubernetes.default.svc", "signet-authority"] {
        let other = token("signet-viewer", audience)?;
        refused(Some(&other), Code::Unauthenticated, "not valid for the audience").await?;
    }
    let other = token("other", AUDIENCE)?;
    refused(Some(&other), Code::PermissionDenied, "signet-system:other may not get flows").await?;

    // A method that is not listed is not there, whoever asks; over the socket it is.
    let mut request = Request::new(GetAgentEventsRequest::default());
    let value = MetadataValue::try_from(format!("Bearer {good}"))?;
    request.metadata_mut().insert("authorization", value);
    let status = ObserverClient::new(channel.clone()).get_agent_events(request).await;
    let status = status.err().context("an unlisted method was served")?;
    ensure!(
        status.code() == Code::PermissionDenied && status.message().contains("admin socket only"),
        "{status:?}"
    );

    // Guessing runs dry before the API server is flooded, and who was let in stays in.
    let asked = reviews();
    let mut limited = 0;
    for n in 0..60 {
        match with(Some(&format!("guess-{n}"))).await {
            Ok(_) => anyhow::bail!("a guess was let in"),
            Err(status) => limited += usize::from(status.code() == Code::ResourceExhausted),
        }
    }
    ensure!(
        limited > 20 && reviews() - asked < 40,
        "{limited} limited, {} asked",
        reviews() - asked
    );
    with(Some(&good)).await?;

    // Without the API server nobody new is let in.
    tokio::time::sleep(Duration::from_secs(1)).await;
    let unknown = token("signet-viewer", AUDIENCE)?;
    api.set_down(true);
    refused(Some(&unknown), Code::Unavailable, "cannot have the token reviewed").await?;
    api.set_down(false);
    with(Some(&unknown)).await?;
    Ok(())
}
