//! Ways around the hooks that an application has without privileges: odd sockets, sockets of
//! others, another cgroup, another network namespace, the agent's own ports. Packet sockets are
//! `core::raw_guard`'s; plaintext dialled at a pod, and spoofed addresses, `core::refusals`'.
//!
//! From whom policy allows, each must be tunnelled or refused, never in clear; from whom it
//! does not, refused, with its reason. The control is the same dial while nothing is enrolled.

use std::net::{IpAddr, SocketAddr};

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};
use signet_lab::{
    LabOptions,
    pod::Pod,
    traffic::{
        Role,
        reports::{DialReport, HoldReport, TcpServerReport},
        roles::{Dial, Hold},
    },
};

use crate::mesh::{Mesh, TCP, TIMEOUT, answered_soon, refused_soon, retriable, verdict, with_logs};

const SCRIPT: &str = include_str!("odd_dials.py");
const MARKER: &str = "bypass-51f0";

/// The outcome of an odd dial, and what the server saw.
#[derive(Debug)]
struct Outcome {
    outcome: String,
    seen: Value,
}

impl Outcome {
    fn answered(&self) -> bool {
        self.outcome == "answered"
    }
}

fn role(kind: &str, to: SocketAddr, more: &Value) -> String {
    let mut role = json!({"kind": kind, "to": [to.ip(), to.port()], "text": MARKER});
    for (key, value) in more.as_object().into_iter().flatten() {
        role[key] = value.clone();
    }
    role.to_string()
}

fn odd(from: &Pod, kind: &str, to: SocketAddr, more: &Value) -> Result<Outcome> {
    outcome(&from.exec(&["python3", "-c", SCRIPT, &role(kind, to, more)])?.success()?)
}

fn outcome(printed: &str) -> Result<Outcome> {
    let value: Value = serde_json::from_str(printed.trim()).with_context(|| printed.to_owned())?;
    let outcome = value["outcome"].as_str().context("outcome")?.to_owned();
    Ok(Outcome { outcome, seen: value["seen"].clone() })
}

/// Every odd socket towards every address that it can have.
fn odd_sockets(server: &Pod) -> Vec<(&'static str, SocketAddr)> {
    let mut all = Vec::new();
    for to in server.all_at(TCP) {
        for kind in ["plain", "mptcp", "device", "fast-open", "fast-open-connect"] {
            all.push((kind, to));
        }
        if to.is_ipv4() {
            all.push(("mapped", to));
        }
    }
    all
}

fn accepted(server: &Pod) -> Result<u64> {
    let report: TcpServerReport = server.report_of("tcp")?;
    Ok(report.accepted)
}

#[test]
fn odd_sockets_are_tunnelled_or_refused_and_never_in_clear() -> Result<()> {
    let mesh = Mesh::start(Some("strict"))?;
    with_logs(&mesh, |mesh| {
        let Mesh { lab, frontend, intruder, payments, .. } = mesh;
        let capture = lab.capture("strict")?;
        mesh.allow_payments(&["frontend"])?;
        answered_soon(frontend, payments.at(TCP))?;
        refused_soon(intruder, payments.at(TCP))?;
        let before = accepted(payments)?;
        let mut answers = 0;
        for (kind, to) in odd_sockets(payments) {
            let allowed = odd(frontend, kind, to, &Value::Null)?;
            // A socket bound to the device cannot reach the agent on the loopback of IPv6.
            let may_fail = kind == "device";
            ensure!(allowed.answered() || may_fail, "{kind} to {to}: {allowed:?}");
            if allowed.answered() {
                answers += 1;
                let accepted = allowed.seen["accepted"].as_str().context("accepted")?;
                let accepted: SocketAddr = accepted.parse()?;
                let ip = accepted.ip().to_canonical();
                ensure!(frontend.ips().contains(&ip), "{kind}: the server saw {ip}");
            }
            let denied = odd(intruder, kind, to, &Value::Null)?;
            ensure!(!denied.answered(), "{kind} to {to} was answered: {denied:?}");
        }
        ensure!(accepted(payments)? == before + answers, "somebody else was accepted");
        verdict(
            lab,
            "node-2",
            "destination",
            "shop/intruder",
            "shop/payments",
            "DROPPED",
            "policy_no_match",
        )?;
        let captured = capture.stop()?;
        captured.only_tunnels_between(&frontend.ips(), &payments.ips())?;
        captured.only_tunnels_between(&intruder.ips(), &payments.ips())?;
        let hits = captured.find(MARKER);
        ensure!(hits.is_empty(), "in clear: {hits:?}");

        // The control: with nothing enrolled each of them crosses in clear and is found.
        lab.cluster().set_mode("shop", Some("off"))?;
        lab.wait_state(intruder, "off")?;
        lab.wait_state(payments, "off")?;
        let capture = lab.capture("off")?;
        let sockets = odd_sockets(payments);
        for (kind, to) in &sockets {
            let free = odd(intruder, kind, *to, &Value::Null)?;
            ensure!(free.answered(), "{kind} to {to}: {free:?}");
        }
        let captured = capture.stop()?;
        captured.complete()?;
        let hits = captured.find(MARKER).len();
        ensure!(hits >= sockets.len(), "found {hits} times, not {}", sockets.len());
        Ok(())
    })
}

#[test]
fn another_pods_socket_is_nobodys_identity() -> Result<()> {
    let mesh = Mesh::start(Some("strict"))?;
    with_logs(&mesh, |mesh| {
        let Mesh { lab, frontend, intruder, payments, .. } = mesh;
        mesh.allow_payments(&["frontend"])?;
        answered_soon(frontend, payments.at(TCP))?;
        refused_soon(intruder, payments.at(TCP))?;
        for (n, to) in payments.all_at(TCP).into_iter().enumerate() {
            // (taker, whether it may use the socket that frontend made)
            for (taker, may) in [(intruder, false), (frontend, true)] {
                let path = lab.directory().join(format!("handed-{n}-{may}"));
                let path = json!({"socket": path});
                let argv = ["python3", "-c", SCRIPT, &role("hand-over", to, &path)];
                let giver = frontend.place().start_program("hand-over", &argv)?;
                giver.wait_event("listening", TIMEOUT)?;
                let taken = odd(taker, "given", to, &path)?;
                if may {
                    ensure!(taken.answered(), "the control: {taken:?}");
                } else {
                    ensure!(taken.outcome == "connect:EPERM", "{taken:?}");
                }
            }
        }
        verdict(
            lab,
            "node-1",
            "source",
            "shop/frontend",
            "shop/payments",
            "DROPPED",
            "identity_mismatch",
        )?;
        Ok(())
    })
}

#[test]
fn another_cgroup_is_still_its_own_pod() -> Result<()> {
    let mesh = Mesh::start(Some("strict"))?;
    with_logs(&mesh, |mesh| {
        let Mesh { lab, frontend, intruder, payments, .. } = mesh;
        mesh.allow_payments(&["frontend"])?;
        answered_soon(frontend, payments.at(TCP))?;
        refused_soon(intruder, payments.at(TCP))?;
        let before = accepted(payments)?;
        // A directory named like the pod that is allowed, inside each one's own.
        let name = frontend.cgroup().file_name().context("cgroup")?;
        let forged = |pod: &Pod| json!({"cgroup": pod.cgroup().join(name)});
        let to = payments.at(TCP);
        let denied = odd(intruder, "cgroup", to, &forged(intruder))?;
        ensure!(!denied.answered(), "{denied:?}");
        let allowed = odd(frontend, "cgroup", to, &forged(frontend))?;
        ensure!(allowed.answered(), "the control: {allowed:?}");
        ensure!(accepted(payments)? == before + 1);
        verdict(
            lab,
            "node-2",
            "destination",
            "shop/intruder",
            "shop/payments",
            "DROPPED",
            "policy_no_match",
        )?;
        Ok(())
    })
}

/// A network namespace inside a pod, linked to it, with the pod as its router.
const NESTED: &str = r#"
set -e
unshare -n sleep 60 & inner=$!
trap 'kill $inner' EXIT
for i in 1 2 3 4 5 6 7 8 9 10; do
  [ "$(readlink /proc/$inner/ns/net)" != "$(readlink /proc/self/ns/net)" ] && break; sleep 0.1
done
ip link add inner0 type veth peer name inner1 netns $inner
ip addr add 192.168.77.1/24 dev inner0
ip addr add fd77::1/64 dev inner0 nodad
ip link set inner0 up
nsenter -t $inner -n sh -c 'ip addr add 192.168.77.2/24 dev inner1; ip addr add fd77::2/64 dev inner1 nodad
  ip link set inner1 up; ip route add default via 192.168.77.1; ip -6 route add default via fd77::1'
echo 1 > /proc/sys/net/ipv4/ip_forward
echo 1 > /proc/sys/net/ipv6/conf/all/forwarding
nsenter -t $inner -n python3 -c "$1" "$2"
ip link del inner0
"#;

#[test]
fn a_network_namespace_inside_a_strict_pod_reaches_nothing() -> Result<()> {
    let mesh = Mesh::start(Some("strict"))?;
    with_logs(&mesh, |mesh| {
        let Mesh { lab, frontend, payments, reports, .. } = mesh;
        answered_soon(frontend, payments.at(TCP))?;
        let nested = |to: SocketAddr| -> Result<Outcome> {
            let role = role("plain", to, &Value::Null);
            outcome(&frontend.exec(&["sh", "-c", NESTED, "sh", SCRIPT, &role])?.success()?)
        };
        for to in [payments.at(TCP), reports.at(TCP)] {
            let found = nested(to)?;
            ensure!(retriable(&found.outcome), "{to}: {found:?}");
        }
        lab.agent("node-1")?.wait_flow("it is reported", &[], |flow| {
            flow.source.full_name() == "shop/frontend" && flow.is("DROPPED", "pod_unregistered")
        })?;
        // The control: with the namespace off it is the routes that keep it from getting an
        // answer (nothing masquerades it), not a refusal.
        lab.cluster().set_mode("shop", Some("off"))?;
        lab.wait_state(frontend, "off")?;
        let found = nested(reports.at(TCP))?;
        ensure!(!retriable(&found.outcome), "{found:?}");
        Ok(())
    })
}

/// Ports on which something listens in a pod's network namespace that is not the lab's.
fn agents_ports(pod: &Pod) -> Result<Vec<SocketAddr>> {
    let listed = pod.exec(&["ss", "-ltnH"])?.success()?;
    let mut found = Vec::new();
    for line in listed.lines() {
        let Some(local) = line.split_whitespace().nth(3) else { bail!("{line}") };
        let (address, port) = local.rsplit_once(':').context("address")?;
        let port: u16 = port.parse()?;
        let ip: IpAddr = match address.trim_matches(['[', ']']) {
            "*" => "::".parse()?,
            other => other.split('%').next().unwrap_or(other).parse()?,
        };
        found.push((ip, port).into());
    }
    Ok(found)
}

#[test]
fn the_agents_own_ports_lead_nowhere() -> Result<()> {
    let mesh = Mesh::start(Some("strict"))?;
    with_logs(&mesh, |mesh| {
        let Mesh { lab, frontend, intruder, payments, .. } = mesh;
        answered_soon(frontend, payments.at(TCP))?;
        // intruder runs no server: whatever listens there is the agent.
        let ports = agents_ports(intruder)?;
        ensure!(!ports.is_empty(), "the agent listens nowhere");
        for listener in ports {
            let own = if listener.ip().is_unspecified() {
                let loopback = if listener.is_ipv4() { "127.0.0.1" } else { "::1" };
                SocketAddr::new(loopback.parse()?, listener.port())
            } else {
                listener
            };
            let mut towards = vec![own];
            towards.extend(intruder.all_at(listener.port()));
            for to in towards {
                let found = odd(intruder, "plain", to, &Value::Null)?;
                ensure!(!found.answered(), "{to}: {found:?}");
            }
            // From another pod of the node, in clear.
            for to in intruder.all_at(listener.port()) {
                let found = odd(&mesh.reports, "plain", to, &Value::Null)?;
                ensure!(!found.answered(), "{to}: {found:?}");
            }
        }
        lab.agent("node-1")?.wait_flow("a dial at the agent's port is told", &[], |flow| {
            flow.destination.full_name() == "shop/intruder"
                && flow.verdict == "DROPPED"
                && matches!(flow.reason.as_str(), "wrong_destination" | "plaintext_refused")
        })?;
        // The control: it is no worse for that.
        answered_soon(intruder, payments.at(TCP))?;
        Ok(())
    })
}

#[test]
fn sockets_from_before_the_agent_do_not_outlive_its_start() -> Result<()> {
    let mesh = Mesh::without_agents(LabOptions::default(), Some("strict"))?;
    with_logs(&mesh, |mesh| {
        let Mesh { lab, frontend, payments, reports, .. } = mesh;
        // Nobody is there to refuse it: in clear to a pod that will be enforced, and to one
        // that will not.
        let hold = |to| Role::Hold(Hold { to, ..Hold::default() });
        let mut towards_enforced = frontend.start(&hold(payments.at(TCP)))?;
        let mut towards_outside = frontend.start(&hold(reports.at(TCP)))?;
        // The control: a pod that is not enforced keeps its own.
        let mut outside = reports.start(&hold(reports.at(TCP)))?;
        for held in [&towards_enforced, &towards_outside, &outside] {
            held.wait_event("open", TIMEOUT)?;
        }
        lab.start_agents()?;
        for pod in [frontend, payments] {
            lab.wait_state(pod, "served")?;
        }
        for held in [&mut towards_enforced, &mut towards_outside] {
            let report: HoldReport = held.report(TIMEOUT)?;
            ensure!(report.opened == 1, "{report:?}");
            let outcome = &report.closed[0].outcome;
            ensure!(outcome != "told" && !outcome.ends_with(":EOF"), "{report:?}");
        }
        lab.agent("node-1")?.wait_flow("it is reported", &["--ends"], |flow| {
            flow.source.full_name() == "shop/frontend" && flow.reason == "right_withdrawn"
        })?;
        ensure!(outside.ended().is_none(), "the control ended: {}", outside.said());
        outside.finish();
        let report: HoldReport = outside.report(TIMEOUT)?;
        ensure!(report.closed.iter().all(|closed| closed.outcome == "told"), "{report:?}");
        answered_soon(frontend, payments.at(TCP))?;
        Ok(())
    })
}

/// Rules by which a pod rewrites its own packets: towards `decoy` at these ports, to there.
fn rewrite(pod: &Pod, decoy: IpAddr, rules: &[(u16, SocketAddr)]) -> Result<()> {
    let family = if decoy.is_ipv4() { "ip" } else { "ip6" };
    let rules: String = rules
        .iter()
        .map(|(port, to)| format!("{family} daddr {decoy} tcp dport {port} dnat to {to}; "))
        .collect();
    let table = format!(
        "table {family} trick {{ chain out {{ type nat hook output priority -100; {rules} }}; }}"
    );
    pod.exec(&["nft", &table])?.success()?;
    Ok(())
}

/// What would fool a proxy that asks conntrack for the original destination, or a hook that
/// believes the address that was dialled.
#[test]
fn addresses_rewritten_inside_a_pod_give_no_right() -> Result<()> {
    const CONTROL: u16 = 7001;
    const CLEAR: u16 = 7002;
    const LISTENERS: u16 = 7003;
    let mesh = Mesh::start(Some("strict"))?;
    with_logs(&mesh, |mesh| {
        let Mesh { lab, frontend, intruder, payments, reports, .. } = mesh;
        mesh.allow_payments(&["frontend"])?;
        answered_soon(frontend, payments.at(TCP))?;
        refused_soon(intruder, payments.at(TCP))?;
        let listeners = agents_ports(intruder)?;
        let before = accepted(payments)?;
        let counted = lab.agent("node-1")?.metrics()?.sum("flows_unattributed_total", &[]);
        for (decoy, target) in reports.all_at(TCP).into_iter().zip(payments.all_at(TCP)) {
            ensure!(decoy.is_ipv4() == target.is_ipv4(), "{decoy} {target}");
            let loopback: IpAddr =
                if decoy.is_ipv4() { [127, 0, 0, 1].into() } else { "::1".parse()? };
            let own: Vec<SocketAddr> = listeners
                .iter()
                .filter(|l| {
                    l.ip() == loopback
                        || (l.ip().is_unspecified() && l.is_ipv4() == decoy.is_ipv4())
                })
                .map(|l| SocketAddr::new(loopback, l.port()))
                .collect();
            ensure!(!own.is_empty(), "no listener of the agent for {decoy}: {listeners:?}");
            let into: Vec<_> = (LISTENERS..).zip(own).collect();
            let rules = [&[(CONTROL, decoy), (CLEAR, target)], &into[..]].concat();
            rewrite(intruder, decoy.ip(), &rules)?;
            let dial = |port| {
                let to = SocketAddr::new(decoy.ip(), port);
                intruder.run(&Role::Dial(Dial { to, timeout_ms: 1500, ..Dial::default() }), TIMEOUT)
            };
            // The control: packets are rewritten, and nothing keeps them from who is not enrolled.
            let report: DialReport = dial(CONTROL)?;
            ensure!(report.answered(), "{decoy}: {report:?}");
            for (port, _) in rules.into_iter().skip(1) {
                let report: DialReport = dial(port)?;
                ensure!(!report.answered(), "{decoy} {port}: {report:?}");
            }
        }
        ensure!(accepted(payments)? == before, "payments took a rewritten connection");
        let agent = lab.agent("node-1")?;
        agent.wait_flow("what was to leave in clear is told", &[], |flow| {
            flow.between("shop/intruder", "shop/payments")
                && flow.is("DROPPED", "plaintext_refused")
        })?;
        // Whose flow it would be is not known to who was handed nothing: it is counted.
        let unattributed = agent.metrics()?.sum("flows_unattributed_total", &[]);
        ensure!(unattributed > counted, "{unattributed} sockets without a destination");
        Ok(())
    })
}
