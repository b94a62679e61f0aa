//! What a node forwards to a pod: node ports of Services with both kinds of
//! `externalTrafficPolicy`, and so host ports and load balancers, which do the same. It is plaintext,
//! also where it bears the node's own address, and is judged as that by the destination's mode.

use std::net::{IpAddr, SocketAddr};

use anyhow::{Context, Result, bail, ensure};
use serde_json::json;
use signet_lab::{
    address, eventually,
    node::Node,
    pod::Pod,
    traffic::{Role, reports::DialReport},
};

use crate::mesh::{
    CHANGE, Mesh, TCP, TIMEOUT, answered_soon, dial, refused_soon, server, verdict, with_logs,
};

/// Node ports of a Service: with `externalTrafficPolicy: Cluster`, and with `Local`.
#[derive(Clone, Copy)]
struct Ports {
    cluster: u16,
    local: u16,
}

const STRICT: Ports = Ports { cluster: 30080, local: 30081 };
const OPEN: Ports = Ports { cluster: 30090, local: 30091 };

/// A way from outside to a pod of node-2.
#[derive(Clone, Copy, Debug)]
struct Way {
    node: usize,
    /// The node's address stands for the client's.
    masquerades: bool,
}

const WAYS: [Way; 3] = [
    Way { node: 0, masquerades: true },
    // The endpoint's own node: what it forwards bears its address, as the kubelet's probes do.
    Way { node: 1, masquerades: true },
    Way { node: 1, masquerades: false },
];

impl Way {
    fn port(self, ports: Ports) -> u16 {
        if self.masquerades { ports.cluster } else { ports.local }
    }

    /// Whom the pod sees.
    fn source(self, mesh: &Mesh, to: IpAddr) -> Vec<IpAddr> {
        let (lab, node) = (&mesh.lab, &mesh.lab.nodes()[self.node]);
        let own = if self.masquerades {
            [node.addresses.all(), address::pod(lab.family(), node.number, 1).all()].concat()
        } else {
            address::outside_on_link(lab.family()).all()
        };
        own.into_iter().filter(|ip| ip.is_ipv4() == to.is_ipv4()).collect()
    }
}

/// A node's rules for the ports of both pods, as kube-proxy writes them: addresses rewritten, and
/// by a mark the client's too.
fn forward(node: &Node, pods: &[(Ports, &Pod)]) -> Result<()> {
    for ip in node.addresses.all() {
        let family = if ip.is_ipv4() { "ip" } else { "ip6" };
        let mut rules = String::new();
        for (ports, pod) in pods {
            let to = pod.all_at(TCP).into_iter().find(|to| to.is_ipv4() == ip.is_ipv4());
            let to = to.with_context(|| format!("{} has no address like {ip}", pod.full_name()))?;
            for (port, mark) in [(ports.cluster, "meta mark set 0x4000 "), (ports.local, "")] {
                rules += &format!("{family} daddr {ip} tcp dport {port} {mark}dnat to {to}; ");
            }
        }
        let table = format!(
            "table {family} ports {{ \
             chain pre {{ type nat hook prerouting priority -100; {rules} }}; \
             chain post {{ type nat hook postrouting priority 100; meta mark 0x4000 masquerade; }}; \
             }}"
        );
        node.exec(&["nft", &table])?.success()?;
    }
    Ok(())
}

/// Dials from the machine outside until it goes as wanted.
fn from_outside(
    mesh: &Mesh,
    to: SocketAddr,
    what: &str,
    wanted: impl Fn(&DialReport) -> bool,
) -> Result<DialReport> {
    eventually(&format!("from outside {to} {what}"), CHANGE, || {
        let client = mesh.lab.outside().start_role("dial", &Role::dial(to, "outside").argv()?)?;
        let report: DialReport = client.report(TIMEOUT)?;
        if wanted(&report) {
            return Ok(Some(report));
        }
        bail!("{report:?}")
    })
}

#[test]
fn what_a_node_forwards_is_plaintext_whosever_address_it_bears() -> Result<()> {
    let mesh = Mesh::start(Some("strict"))?;
    with_logs(&mesh, |mesh| {
        let Mesh { lab, frontend, payments, .. } = mesh;
        lab.namespace("open", Some("permissive"))?;
        let web = server(lab, "node-2", "open", "web")?;
        lab.wait_state(&web, "served")?;
        web.wait_published()?;
        for node in lab.nodes() {
            forward(node, &[(STRICT, payments), (OPEN, &web)])?;
        }
        let each = |run: &dyn Fn(Way, IpAddr) -> Result<()>| -> Result<()> {
            for way in WAYS {
                for ip in lab.nodes()[way.node].addresses.all() {
                    run(way, ip).with_context(|| format!("{way:?} {ip}"))?;
                }
            }
            Ok(())
        };
        let answered = |ports: Ports, way: Way, ip: IpAddr| -> Result<()> {
            let to = SocketAddr::new(ip, way.port(ports));
            let report = from_outside(mesh, to, "is answered", DialReport::answered)?;
            let seen = report.seen.context("the server's view")?.peer.ip();
            ensure!(way.source(mesh, ip).contains(&seen), "it saw {seen}");
            Ok(())
        };
        // Refused by the pod on node-2, for this reason, and told so.
        let refused = |ports: Ports, way: Way, ip: IpAddr, reason: &str| -> Result<()> {
            let to = SocketAddr::new(ip, way.port(ports));
            from_outside(mesh, to, "is refused", DialReport::refused)?;
            lab.agent("node-2")?.wait_flow("the refusal", &[], |flow| {
                let source = flow.source.ip.as_deref().and_then(|ip| ip.parse().ok());
                flow.reporter == "destination"
                    && source.is_some_and(|source| way.source(mesh, ip).contains(&source))
                    && flow.via == "plaintext"
                    && flow.is("DROPPED", reason)
            })?;
            Ok(())
        };
        // Permissive takes it; strict does not, unless the port is exempt.
        each(&|way, ip| answered(OPEN, way, ip))?;
        each(&|way, ip| refused(STRICT, way, ip, "plaintext_refused"))?;
        let exempt = |ports: Option<&str>| {
            lab.cluster().annotate_namespace("shop", "signet.dev/exempt-inbound-ports", ports)
        };
        exempt(Some(&format!("{TCP}/tcp")))?;
        each(&|way, ip| answered(STRICT, way, ip))?;
        exempt(None)?;
        each(&|way, ip| refused(STRICT, way, ip, "plaintext_refused"))?;

        // A pod that dials a node port is forwarded like anybody else: its address proves nothing.
        for ip in lab.nodes()[1].addresses.all() {
            answered_soon(frontend, SocketAddr::new(ip, OPEN.cluster))?;
            for port in [STRICT.cluster, STRICT.local] {
                refused_soon(frontend, SocketAddr::new(ip, port))?;
            }
        }
        verdict(
            lab,
            "node-2",
            "destination",
            "shop/frontend",
            "shop/payments",
            "DROPPED",
            "plaintext_refused",
        )?;
        // The control: its own way there is a tunnel.
        answered_soon(frontend, payments.at(TCP))?;

        // Policy on plaintext sees the client where nobody masquerades, else the node.
        let blocks: Vec<String> = address::outside_on_link(lab.family())
            .all()
            .iter()
            .map(|ip| format!("{ip}/{}", if ip.is_ipv4() { 32 } else { 128 }))
            .collect();
        lab.cluster().apply(json!({
            "apiVersion": "signet.dev/v1alpha1", "kind": "IdentityPolicy",
            "metadata": {"name": "outside", "namespace": "open"},
            "spec": {"action": "Allow", "ingress": [{"from": [{"ipBlocks": blocks}]}]},
        }))?;
        refused_soon(frontend, web.at(TCP))?;
        each(&|way, ip| match way.masquerades {
            true => refused(OPEN, way, ip, "policy_no_match"),
            false => answered(OPEN, way, ip),
        })?;
        ensure!(!dial(frontend, web.at(TCP), "not listed")?.answered());
        Ok(())
    })
}
