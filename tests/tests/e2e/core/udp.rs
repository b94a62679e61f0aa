//! UDP: untouched unless denied; connected sockets too; DNS is shown.

use anyhow::{Result, ensure};
use serde_json::json;
use signet_ebpf::abi::UDP_SHARE;
use signet_lab::{
    eventually,
    pod::Pod,
    traffic::{
        Role,
        reports::UdpReport,
        roles::{UdpClient, UdpFlood},
    },
};

use crate::mesh::{CHANGE, Mesh, TIMEOUT, UDP, policy, verdict, with_logs};

fn send(client: &Pod, to: std::net::SocketAddr, connected: bool) -> Result<UdpReport> {
    let role = UdpClient { to, connected, count: 3, timeout_ms: 300, ..Default::default() };
    client.run(&Role::UdpClient(role), TIMEOUT)
}

fn answered(client: &Pod, to: std::net::SocketAddr) -> Result<()> {
    for connected in [false, true] {
        let report = send(client, to, connected)?;
        ensure!(report.answered == 3, "{}: {report:?}", client.full_name());
        ensure!(report.strangers.is_empty(), "{report:?}");
    }
    Ok(())
}

fn answered_soon(client: &Pod, to: std::net::SocketAddr) -> Result<()> {
    eventually("datagrams are answered", CHANGE, || answered(client, to).map(Some))
}

#[test]
fn datagrams_between_enrolled_pods_and_outside_work_and_are_shown() -> Result<()> {
    let mesh = Mesh::start(Some("strict"))?;
    with_logs(&mesh, |mesh| {
        let Mesh { lab, frontend, payments, reports, .. } = mesh;
        for to in payments.all_at(UDP) {
            answered_soon(frontend, to)?;
        }
        for to in reports.all_at(UDP) {
            answered_soon(frontend, to)?;
        }
        let flow = lab.agent("node-1")?.wait_flow("udp", &["--protocol", "udp"], |flow| {
            flow.between("shop/frontend", "shop/payments") && flow.is("FORWARDED", "allowed")
        })?;
        ensure!(flow.via == "plaintext" && flow.direction == "egress", "{flow}");
        Ok(())
    })
}

#[test]
fn names_are_still_resolved() -> Result<()> {
    const DNS: u16 = 53;
    let mesh = Mesh::start(Some("strict"))?;
    with_logs(&mesh, |mesh| {
        let Mesh { lab, frontend, .. } = mesh;
        lab.namespace("kube-system", None)?;
        let dns = lab
            .pod_on(lab.node("node-2")?, "kube-system", "dns")
            .container("main", Role::udp(DNS))
            .start()?;
        dns.wait_published()?;
        // By way of a Service, as resolv.conf has it: answers come from its address.
        let service = lab.apply_service(json!({
            "apiVersion": "v1", "kind": "Service",
            "metadata": {"name": "dns", "namespace": "kube-system"},
            "spec": {
                "selector": {"app": "dns"},
                "ports": [{"name": "dns", "port": DNS, "protocol": "UDP", "targetPort": DNS}],
            },
        }))?;
        for ip in service.addresses.all().into_iter().chain(dns.ips()) {
            answered_soon(frontend, (ip, DNS).into())?;
        }
        lab.agent("node-1")?.wait_flow("a DNS query", &["--port", "53"], |flow| {
            flow.protocol == "udp"
                && flow.source.full_name() == "shop/frontend"
                && flow.is("FORWARDED", "allowed")
        })?;
        Ok(())
    })
}

#[test]
fn udp_denials_reach_open_sockets_too() -> Result<()> {
    let mesh = Mesh::start(Some("strict"))?;
    with_logs(&mesh, |mesh| {
        let Mesh { lab, frontend, intruder, payments, .. } = mesh;
        let to = payments.at(UDP);
        answered_soon(intruder, to)?;
        answered_soon(frontend, to)?;
        // A connected socket from before the denial.
        let role =
            UdpClient { to, connected: true, count: 0, timeout_ms: 200, ..Default::default() };
        let open = intruder.start(&Role::UdpClient(role))?;
        open.wait_for("an answer", TIMEOUT, |v| v["outcome"] == "answered")?;

        lab.cluster().apply(policy(
            "no-intruder",
            "Deny",
            "payments",
            json!([{"from": [{"serviceAccounts": ["intruder"]}],
                    "ports": [{"port": UDP, "protocol": "UDP"}]}]),
        ))?;
        open.wait_for("the open socket is cut", CHANGE, |v| {
            v["event"] == "change" && v["outcome"] != "answered"
        })?;
        for connected in [false, true] {
            let report = send(intruder, to, connected)?;
            ensure!(report.answered == 0, "{report:?}");
        }
        answered(frontend, to)?;
        let flow = verdict(
            lab,
            "node-2",
            "destination",
            "shop/intruder",
            "shop/payments",
            "DROPPED",
            "policy_deny",
        )?;
        ensure!(flow.protocol == "udp", "{flow}");
        ensure!(flow.policy_name() == "shop/no-intruder", "{flow}");
        Ok(())
    })
}

#[test]
fn an_allow_on_an_identity_does_not_believe_an_address() -> Result<()> {
    let mesh = Mesh::start(Some("strict"))?;
    with_logs(&mesh, |mesh| {
        let Mesh { lab, frontend, payments, .. } = mesh;
        let to = payments.at(UDP);
        answered_soon(frontend, to)?;
        let allow = |unauthenticated: bool| {
            let mut rule = json!({"from": [{"serviceAccounts": ["frontend"]}]});
            if unauthenticated {
                rule["unauthenticated"] = json!(true);
            }
            policy("payments-callers", "Allow", "payments", json!([rule]))
        };
        lab.cluster().apply(allow(false))?;
        eventually("UDP under an ALLOW by account is refused", CHANGE, || {
            let report = send(frontend, to, false)?;
            Ok((report.answered == 0).then_some(()))
        })?;
        lab.cluster().apply(allow(true))?;
        answered_soon(frontend, to)?;
        Ok(())
    })
}

#[test]
fn a_pod_that_floods_uses_up_its_own_share_of_flows_only() -> Result<()> {
    let mesh = Mesh::start(Some("strict"))?;
    with_logs(&mesh, |mesh| {
        let Mesh { lab, frontend, intruder, reports, .. } = mesh;
        let to = reports.at(UDP);
        for pod in [frontend, intruder] {
            answered_soon(pod, to)?;
        }
        let share = u64::try_from(UDP_SHARE)?;
        let role = UdpFlood { to: reports.at(20_000), count: 40_000 };
        let flood: UdpReport = intruder.run(&Role::UdpFlood(role), TIMEOUT)?;
        let refused: u64 = flood.failures.values().sum();
        // A few flows of before count too; what was swept meanwhile gives no room.
        ensure!(flood.sent <= share && flood.sent > share - 100, "{flood:?}");
        ensure!(refused == 40_000 - flood.sent, "{flood:?}");
        // Its next flow is refused, and told once its events are within their rate again.
        eventually("the refusal is told", CHANGE, || {
            let report = send(intruder, to, false)?;
            ensure!(report.answered == 0 && report.sent == 0, "{report:?}");
            let flows = lab.agent("node-1")?.flows(&["--reason", "map_full"])?;
            let told = flows.iter().any(|flow| {
                flow.source.full_name() == "shop/intruder" && flow.is("DROPPED", "map_full")
            });
            Ok(told.then_some(()))
        })?;
        // Another pod's is not.
        answered(frontend, to)
    })
}
