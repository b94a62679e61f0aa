//! Hubble's API over TLS as its own tools ask it: a client that is generated from the tests' own
//! description of the protocol, let in by its SVID.

use std::{collections::BTreeSet, net::SocketAddr, path::Path};

use anyhow::{Context, Result, bail, ensure};
use prost_types::{FieldMask, Timestamp};
use signet_lab::{
    Lab, LabOptions,
    address::Family,
    forge::{Forger, Leaf},
    hubble::{
        Caller, Hubble,
        flow::{
            self, Flow, FlowFilter, IpVersion, TrafficDirection, Verdict, flow_filter::Experimental,
        },
        observer::{
            GetFlowsRequest, GetNamespacesRequest, ServerStatusRequest, get_flows_request,
            get_flows_response::ResponseTypes,
        },
        peer::NotifyRequest,
    },
    pod::Pod,
    traffic::{Role, reports::UdpReport, roles::UdpClient},
};
use tonic::Code;

use crate::mesh::{
    HTTP, Mesh, TCP, TIMEOUT, UDP, answered, answered_soon, refused, refused_soon, with_logs,
};

const PORT: u16 = 4254;
const RELAY: &str = "spiffe://cluster.local/ns/kube-system/sa/hubble-relay";
const NAMES: &str = "hubble.test";

/// What a filter lets through.
type Holds = Box<dyn Fn(&Flow) -> bool>;

fn ports(flow: &Flow) -> Option<(&'static str, u32, u32)> {
    use flow::layer4::Protocol as P;
    match flow.l4.as_ref()?.protocol.as_ref()? {
        P::Tcp(p) => Some(("tcp", p.source_port, p.destination_port)),
        P::Udp(p) => Some(("udp", p.source_port, p.destination_port)),
        _ => None,
    }
}

fn source(flow: &Flow) -> &flow::Endpoint {
    flow.source.as_ref().expect("every flow has a source")
}

fn destination(flow: &Flow) -> &flow::Endpoint {
    flow.destination.as_ref().expect("every flow has a destination")
}

fn pod(endpoint: &flow::Endpoint) -> String {
    format!("{}/{}", endpoint.namespace, endpoint.pod_name)
}

fn runs(endpoint: &flow::Endpoint, name: &str) -> bool {
    endpoint.workloads.iter().any(|w| w.kind == "StatefulSet" && w.name == name)
}

fn ip(flow: &Flow) -> &flow::Ip {
    flow.ip.as_ref().expect("every flow has addresses")
}

macro_rules! filter {
    ($($field:ident: $value:expr),*) => {
        FlowFilter { $($field: $value,)* ..FlowFilter::default() }
    };
}

fn text(value: &str) -> Vec<String> {
    vec![value.to_owned()]
}

/// Every filter that Signet implements, with what it must let through of the flows that there are.
fn filters(sample: &Flow) -> Vec<(&'static str, FlowFilter, Holds)> {
    let workload = || vec![flow::Workload { kind: "StatefulSet".into(), name: "ledger".into() }];
    let (_, client, _) = ports(sample).expect("ports");
    let (uuid, address) = (sample.uuid.clone(), ip(sample).source.clone());
    let to = ip(sample).destination.clone();
    let (same_uuid, from_address, to_address) = (uuid.clone(), address.clone(), to.clone());
    let label = |endpoint: &flow::Endpoint, label: &str| endpoint.labels.iter().any(|l| l == label);
    vec![
        ("uuid", filter!(uuid: vec![uuid]), Box::new(move |f| f.uuid == same_uuid)),
        (
            "source_ip",
            filter!(source_ip: vec![address]),
            Box::new(move |f| ip(f).source == from_address),
        ),
        (
            "destination_ip",
            filter!(destination_ip: vec![to]),
            Box::new(move |f| ip(f).destination == to_address),
        ),
        (
            "source_pod",
            filter!(source_pod: text("shop/front")),
            Box::new(|f| pod(source(f)).starts_with("shop/front")),
        ),
        (
            "destination_pod",
            filter!(destination_pod: text("/ledger")),
            Box::new(|f| destination(f).pod_name == "ledger"),
        ),
        (
            "source_label",
            filter!(source_label: text("app in (intruder, nobody)")),
            Box::new(move |f| label(source(f), "k8s:app=intruder")),
        ),
        (
            "destination_label",
            filter!(destination_label: text("k8s:app=payments")),
            Box::new(move |f| label(destination(f), "k8s:app=payments")),
        ),
        (
            "destination_service",
            filter!(destination_service: text("shop/payments")),
            Box::new(|f| f.destination_service.as_ref().is_some_and(|s| s.name == "payments")),
        ),
        (
            "source_workload",
            filter!(source_workload: workload()),
            Box::new(|f| runs(source(f), "ledger")),
        ),
        (
            "destination_workload",
            filter!(destination_workload: workload()),
            Box::new(|f| runs(destination(f), "ledger")),
        ),
        (
            "verdict",
            filter!(verdict: vec![Verdict::Dropped.into()]),
            Box::new(|f| f.verdict() == Verdict::Dropped),
        ),
        (
            "drop_reason_desc",
            // POLICY_DENIED and UNENCRYPTED_TRAFFIC; only one of them is for who has no rule.
            filter!(drop_reason_desc: vec![195]),
            Box::new(|f| f.policy_log == ["plaintext_refused"]),
        ),
        (
            "event_type",
            filter!(event_type: vec![flow::EventTypeFilter { r#type: 1, ..Default::default() }]),
            Box::new(|f| f.verdict() == Verdict::Dropped),
        ),
        (
            "protocol",
            filter!(protocol: text("udp")),
            Box::new(|f| ports(f).is_some_and(|(protocol, ..)| protocol == "udp")),
        ),
        (
            "source_port",
            filter!(source_port: vec![client.to_string()]),
            Box::new(move |f| ports(f).is_some_and(|(_, port, _)| port == client)),
        ),
        (
            "destination_port",
            filter!(destination_port: vec![HTTP.to_string()]),
            Box::new(|f| ports(f).is_some_and(|(_, _, port)| port == u32::from(HTTP))),
        ),
        (
            "traffic_direction",
            filter!(traffic_direction: vec![TrafficDirection::Egress.into()]),
            Box::new(|f| f.traffic_direction() == TrafficDirection::Egress),
        ),
        ("encrypted", filter!(encrypted: vec![true]), Box::new(|f| ip(f).encrypted)),
    ]
}

/// Hubble's filters that Signet does not implement.
fn unimplemented() -> Vec<(&'static str, FlowFilter)> {
    let cel = Experimental { cel_expression: text("true") };
    let header = flow::HttpHeader { key: "a".into(), value: "b".into() };
    let interface = flow::NetworkInterface { index: 1, name: "eth0".into() };
    vec![
        ("source_fqdn", filter!(source_fqdn: text("a.b"))),
        ("destination_fqdn", filter!(destination_fqdn: text("a.b"))),
        ("http_url", filter!(http_url: text("/"))),
        ("http_header", filter!(http_header: vec![header])),
        ("dns_query", filter!(dns_query: text("a.*"))),
        ("source_identity", filter!(source_identity: vec![7])),
        ("destination_identity", filter!(destination_identity: vec![7])),
        ("tcp_flags", filter!(tcp_flags: vec![flow::TcpFlags { syn: true, fin: false }])),
        ("trace_id", filter!(trace_id: text("0af7"))),
        ("ip_trace_id", filter!(ip_trace_id: vec![7])),
        ("source_ip_xlated", filter!(source_ip_xlated: text("10.0.0.1"))),
        ("interface", filter!(interface: vec![interface])),
        ("node_labels", filter!(node_labels: text("a=b"))),
        ("source_cluster_name", filter!(source_cluster_name: text("default"))),
        ("destination_cluster_name", filter!(destination_cluster_name: text("default"))),
        ("experimental.cel_expression", filter!(experimental: Some(cel))),
    ]
}

/// One record of a node: both ends share the uuid.
fn key(flow: &Flow) -> (String, i32) {
    (flow.uuid.clone(), flow.traffic_direction)
}

fn keys<'a>(flows: impl IntoIterator<Item = &'a Flow>) -> BTreeSet<(String, i32)> {
    flows.into_iter().map(key).collect()
}

fn wanting(whitelist: Vec<FlowFilter>, blacklist: Vec<FlowFilter>) -> GetFlowsRequest {
    GetFlowsRequest { whitelist, blacklist, ..Default::default() }
}

async fn every_filter(hubble: &Hubble, all: &[Flow], sample: &Flow, family: Family) -> Result<()> {
    let known = keys(all);
    let asked = async |what: &str, request: GetFlowsRequest, holds: &dyn Fn(&Flow) -> bool| {
        let flows = hubble.flows(request).await.with_context(|| what.to_owned())?;
        ensure!(flows.iter().all(holds), "{what} shows what it should hide");
        let expected = keys(all.iter().filter(|flow| holds(flow)));
        // What was recorded meanwhile is not compared.
        let shown: BTreeSet<_> = keys(&flows).intersection(&known).cloned().collect();
        ensure!(shown == expected, "{what}: {} of {}", shown.len(), expected.len());
        anyhow::Ok(expected.len())
    };
    for (name, filter, holds) in filters(sample) {
        let shown = asked(name, wanting(vec![filter.clone()], vec![]), &holds).await?;
        // It must let something through, and not everything.
        ensure!(shown > 0 && shown < known.len(), "{name}: {shown} of {}", known.len());
        asked(name, wanting(vec![], vec![filter]), &|flow| !holds(flow)).await?;
    }
    // All flows of a node are its own, are no replies, and are verdicts.
    for (filter, is_all) in [
        (filter!(node_name: text("node-*")), true),
        (filter!(node_name: text("node-1")), false),
        (filter!(reply: vec![false]), true),
        (filter!(reply: vec![true]), false),
        (
            filter!(event_type: vec![flow::EventTypeFilter { r#type: 5, ..Default::default() }]),
            true,
        ),
        (
            filter!(event_type: vec![flow::EventTypeFilter { r#type: 129, ..Default::default() }]),
            false,
        ),
        (filter!(source_service: text("shop/payments")), false),
    ] {
        let what = format!("{filter:?}");
        asked(&what, wanting(vec![filter], vec![]), &|_| is_all).await?;
    }
    for (version, has) in [(IpVersion::IPv4, family.has_v4()), (IpVersion::IPv6, family.has_v6())] {
        let filter = filter!(ip_version: vec![version.into()]);
        let holds = |f: &Flow| ip(f).ip_version() == version;
        let shown = asked("ip_version", wanting(vec![filter], vec![]), &holds).await?;
        ensure!((shown > 0) == has, "{version:?}: {shown}");
    }
    // Fields of a filter must all hold; of several filters, one.
    let drops = filter!(verdict: vec![Verdict::Dropped.into()]);
    let of_intruder = filter!(source_pod: text("shop/intruder"));
    let both = filter!(verdict: drops.verdict.clone(), source_pod: of_intruder.source_pod.clone());
    let is_drop = |f: &Flow| f.verdict() == Verdict::Dropped;
    let is_intruders = |f: &Flow| source(f).pod_name == "intruder";
    asked("both", wanting(vec![both], vec![]), &|f| is_drop(f) && is_intruders(f)).await?;
    let either = wanting(vec![drops.clone(), of_intruder.clone()], vec![]);
    asked("either", either, &|f| is_drop(f) || is_intruders(f)).await?;
    let but = wanting(vec![drops], vec![of_intruder]);
    asked("but", but, &|f| is_drop(f) && !is_intruders(f)).await?;

    for (name, filter) in unimplemented() {
        for request in [wanting(vec![filter.clone()], vec![]), wanting(vec![], vec![filter])] {
            let status = hubble.flows(request).await.err();
            let status = status.with_context(|| format!("{name} was ignored"))?;
            ensure!(
                status.code() == Code::InvalidArgument
                    && status.message()
                        == format!("filter field {name} is not implemented by Signet"),
                "{name}: {status:?}"
            );
        }
    }
    // What a later version may have, which an older one knows by its number alone.
    let later = filter!(of_a_later_version: text("x"));
    let later_request =
        GetFlowsRequest { of_a_later_version: "x".into(), ..GetFlowsRequest::default() };
    for (request, what) in [
        (wanting(vec![later.clone()], vec![]), "filter"),
        (wanting(vec![], vec![later]), "filter"),
        (later_request, "request"),
    ] {
        let status = hubble.flows(request).await.err();
        let status = status.with_context(|| format!("a later {what} field was ignored"))?;
        let said = format!("{what} field 99999 is not known to Signet, which would ignore it");
        ensure!(
            status.code() == Code::InvalidArgument && status.message() == said,
            "{what}: {status:?}"
        );
    }
    Ok(())
}

async fn limits(hubble: &Hubble, all: &[Flow]) -> Result<()> {
    let of = |request: GetFlowsRequest| async move { hubble.flows(request).await };
    let time = |flow: &Flow| -> Timestamp { flow.time.expect("every flow has a time") };
    let order = |t: Timestamp| (t.seconds, t.nanos);
    ensure!(all.windows(2).all(|w| order(time(&w[0])) <= order(time(&w[1]))), "not in order");
    let first = of(GetFlowsRequest { number: 3, first: true, ..Default::default() }).await?;
    ensure!(first.iter().map(key).eq(all[..3].iter().map(key)), "the first three");
    let (from, to) = (time(&all[1]), time(&all[all.len() - 2]));
    let between = |n: u64, first: bool| GetFlowsRequest {
        number: n,
        first,
        since: Some(from),
        until: Some(to),
        ..Default::default()
    };
    let expected: Vec<_> = all
        .iter()
        .filter(|f| (order(from)..=order(to)).contains(&order(time(f))))
        .map(key)
        .collect();
    ensure!(of(between(0, false)).await?.iter().map(key).eq(expected.iter().cloned()), "between");
    let last = of(between(2, false)).await?;
    ensure!(
        last.iter().map(key).eq(expected[expected.len() - 2..].iter().cloned()),
        "the last two"
    );
    let earliest = of(between(2, true)).await?;
    ensure!(earliest.iter().map(key).eq(expected[..2].iter().cloned()), "the first two since");

    for (request, why) in [
        (GetFlowsRequest { since: Some(to), until: Some(from), ..Default::default() }, "is after"),
        (GetFlowsRequest { first: true, follow: true, ..Default::default() }, "exclude each other"),
    ] {
        let status = of(request).await.err().with_context(|| format!("taken: {why}"))?;
        ensure!(
            status.code() == Code::InvalidArgument && status.message().contains(why),
            "{status:?}"
        );
    }
    // The mask is a lower bound: what it names is there, and what Hubble's own mask leaves out.
    let paths = vec!["time".into(), "verdict".into(), "source.pod_name".into()];
    let masked = of(GetFlowsRequest {
        number: 1,
        first: true,
        field_mask: Some(FieldMask { paths }),
        ..Default::default()
    });
    let masked = masked.await?.pop().context("a flow")?;
    ensure!(masked == all[0], "{masked:?}");
    // Older clients have it elsewhere.
    let field_mask = Some(FieldMask { paths: vec!["verdict".into()] });
    let masked = of(GetFlowsRequest {
        number: 1,
        first: true,
        experimental: Some(get_flows_request::Experimental { field_mask }),
        ..Default::default()
    });
    let masked = masked.await?.pop().context("a flow")?;
    ensure!(masked == all[0], "{masked:?}");
    Ok(())
}

async fn following(hubble: &Hubble, mesh: &Mesh) -> Result<()> {
    let drops = filter!(verdict: vec![Verdict::Dropped.into()]);
    let follow = GetFlowsRequest { follow: true, ..wanting(vec![drops], vec![]) };
    let mut live = hubble.follow(follow.clone()).await?;
    let to = mesh.payments.at(TCP);
    answered(&mesh.frontend, to, "is hidden")?;
    refused(&mesh.intruder, to, "is shown")?;
    let next = async {
        loop {
            match live.message().await?.context("the stream has ended")?.response_types {
                Some(ResponseTypes::Flow(flow)) => return anyhow::Ok(flow),
                // That something was lost is told beside.
                _ => continue,
            }
        }
    };
    let shown = tokio::time::timeout(TIMEOUT, next).await.context("nothing is told")??;
    ensure!(pod(source(&shown)) == "shop/intruder", "{shown:?}");
    ensure!(shown.verdict() == Verdict::Dropped, "{shown:?}");
    // With `until` it ends by itself.
    let soon = std::time::SystemTime::now() + std::time::Duration::from_secs(1);
    let until = Some(Timestamp::from(soon));
    let mut live = hubble.follow(GetFlowsRequest { until, ..follow }).await?;
    let ended = async {
        while live.message().await?.is_some() {}
        anyhow::Ok(())
    };
    tokio::time::timeout(TIMEOUT, ended).await.context("it goes on")??;
    Ok(())
}

/// Everything that is to be seen on node-2.
fn traffic(mesh: &Mesh, ledger: &Pod) -> Result<()> {
    let to = mesh.payments.at(TCP);
    mesh.allow_payments(&["frontend", "default"])?;
    answered_soon(&mesh.frontend, to)?;
    refused_soon(&mesh.intruder, to)?;
    refused(&mesh.intruder, to, "by policy")?;
    refused(&mesh.reports, to, "in clear")?;
    mesh.frontend.curl(&mesh.payments.url(HTTP, "/"))?.success()?;
    answered_soon(&mesh.intruder, ledger.at(TCP))?;
    answered_soon(ledger, mesh.reports.at(TCP))?;
    let service = SocketAddr::new(mesh.service.addresses.first(), 80);
    ledger.curl(&format!("http://{service}/"))?.success()?;
    if let (Family::Dual, Some(ip)) = (mesh.lab.family(), mesh.payments.addresses().v6) {
        answered_soon(&mesh.frontend, SocketAddr::new(ip.into(), TCP))?;
    }
    let udp =
        UdpClient { to: mesh.reports.at(UDP), count: 3, timeout_ms: 300, ..Default::default() };
    let report: UdpReport = ledger.run(&Role::UdpClient(udp), TIMEOUT)?;
    ensure!(report.answered == 3, "{report:?}");
    Ok(())
}

#[test]
fn hubbles_own_protocol_is_spoken() -> Result<()> {
    let files = tempfile::tempdir()?;
    let server = Forger::stranger("hubble.test", files.path())?;
    let names = vec![format!("*.{NAMES}")];
    let pair = server.sign("serving", &Leaf { names, ..Leaf::of(&[]) })?;
    let listen = format!("[::]:{PORT}");
    let server_name = format!("*.{NAMES}");
    let flags: Vec<String> = [
        ("--observer-listen", listen.as_str()),
        ("--observer-clients", RELAY),
        ("--observer-cert-file", &pair.display().to_string()),
        ("--observer-key-file", &pair.display().to_string()),
        ("--observer-server-name", &server_name),
    ]
    .into_iter()
    .flat_map(|(flag, value)| [flag.to_owned(), value.to_owned()])
    .collect();
    let options = LabOptions { agent_flags: flags, ..LabOptions::default() };
    let mesh = Mesh::with(options, Some("strict"))?;
    let runtime = tokio::runtime::Runtime::new()?;
    with_logs(&mesh, |mesh| {
        let ledger = mesh
            .lab
            .pod_on(mesh.lab.node("node-2")?, "shop", "ledger")
            .owner("StatefulSet", "ledger")
            .container("tcp", Role::tcp(TCP))
            .start()?;
        mesh.lab.wait_state(&ledger, "served")?;
        traffic(mesh, &ledger)?;
        runtime.block_on(asks(&mesh.lab, mesh, &server, files.path()))
    })
}

async fn asks(lab: &Lab, mesh: &Mesh, server: &Forger, files: &Path) -> Result<()> {
    let own = Forger::with_stolen_root(lab.agent("node-2")?.authority_dir(), files)?;
    let identity = |id: &str| -> Result<String> {
        Ok(std::fs::read_to_string(own.sign("client", &Leaf::of(&[id]))?)?)
    };
    let node = lab.node("node-2")?;
    let dial = async |identity: Option<String>| {
        let caller = Caller {
            roots: server.root().into(),
            server_name: format!("node-2.{NAMES}"),
            identity,
        };
        let local = if lab.family().has_v4() { "127.0.0.1" } else { "::1" };
        Hubble::dial(node.netns(), SocketAddr::new(local.parse()?, PORT), &caller).await
    };
    let hubble = dial(Some(identity(RELAY)?)).await?;
    let status = hubble.observer().server_status(ServerStatusRequest {}).await?.into_inner();
    ensure!(status.num_flows > 0 && status.version.starts_with("signet "), "{status:?}");
    let namespaces = hubble.observer().get_namespaces(GetNamespacesRequest {}).await?.into_inner();
    let namespaces: Vec<_> = namespaces.namespaces.into_iter().map(|n| n.namespace).collect();
    ensure!(namespaces == ["legacy", "shop"], "{namespaces:?}");
    let mut peers = hubble.peers().notify(NotifyRequest {}).await?.into_inner();
    for name in ["node-1", "node-2"] {
        let peer = peers.message().await?.context("a peer")?;
        let to: SocketAddr = peer.address.parse()?;
        let server_name = peer.tls.unwrap_or_default().server_name;
        ensure!(peer.name == name && server_name == format!("{name}.{NAMES}"), "{server_name}");
        // As a relay would: whom it is told of, there it goes.
        let caller =
            Caller { roots: server.root().into(), server_name, identity: Some(identity(RELAY)?) };
        let there = Hubble::dial(node.netns(), to, &caller).await?;
        let flows = there.flows(GetFlowsRequest { number: 1, ..Default::default() }).await?;
        ensure!(flows.iter().all(|flow| flow.node_name == name) && flows.len() == 1, "{flows:?}");
    }
    // Who is not listed sees nothing, nor does who has no certificate.
    for (identity, code, why) in [
        (
            Some(identity("spiffe://cluster.local/ns/shop/sa/frontend")?),
            Code::PermissionDenied,
            "is not one of observerClients",
        ),
        (None, Code::Unauthenticated, "a client certificate of one of observerClients"),
    ] {
        match dial(identity).await?.flows(GetFlowsRequest::default()).await {
            Ok(_) => bail!("let in: {why}"),
            Err(status) => ensure!(
                status.code() == code && status.message().contains(why),
                "{why}: {status:?}"
            ),
        }
    }

    let all = hubble.flows(GetFlowsRequest::default()).await?;
    let sample = all
        .iter()
        .find(|f| pod(source(f)) == "shop/frontend" && f.verdict() == Verdict::Forwarded)
        .context("frontend's flow")?;
    every_filter(&hubble, &all, sample, lab.family()).await?;
    limits(&hubble, &all).await?;
    following(&hubble, mesh).await
}
