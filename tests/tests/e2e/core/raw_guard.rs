//! Frames that no socket was let through with: packet sockets, forged addresses, fragments.
//! The same bytes from a pod that is not enforced arrive: that is every test's control.

use std::net::IpAddr;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use signet_lab::{
    eventually,
    pod::Pod,
    traffic::{
        Role,
        reports::{SpoofReport, UdpReport, UdpServerReport},
        roles::{Spoof, UdpClient},
    },
};

use crate::mesh::{CHANGE, Mesh, TCP, TIMEOUT, UDP, answered, answered_soon, dial, with_logs};

const SCRIPT: &str = include_str!("raw_frames.py");
/// A source port that no socket has.
const FORGED: u16 = 4444;

/// `intruder` is enforced, `outlaw` beside it on the same bridge is not.
struct Attack {
    outlaw: Pod,
    /// The bridge's own address, which routes to other nodes.
    gateway_mac: String,
}

impl Attack {
    fn prepare(mesh: &Mesh) -> Result<Self> {
        let outlaw = mesh.lab.pod("legacy", "outlaw").start()?;
        outlaw.wait_published()?;
        mesh.lab.wait_state(&outlaw, "off")?;
        let node = mesh.lab.node("node-1")?;
        let shown = node.exec(&["ip", "-j", "link", "show", "cni0"])?.success()?;
        let links: Value = serde_json::from_str(&shown)?;
        let gateway_mac = links[0]["address"].as_str().context("cni0's address")?.to_owned();
        Ok(Self { outlaw, gateway_mac })
    }

    /// Has a pod write frames; the kernel must take every one, so that nothing but the guard
    /// keeps them from leaving.
    fn write(&self, from: &Pod, bypass: bool, frames: &[Value]) -> Result<()> {
        let role = json!({"interface": "eth0", "bypass": bypass, "frames": frames}).to_string();
        let out = from.exec(&["python3", "-c", SCRIPT, &role])?.success()?;
        let report: Value = serde_json::from_str(&out)?;
        let taken = report["taken"].as_array().context("taken")?;
        ensure!(taken.len() == frames.len(), "{report}");
        Ok(())
    }

    /// A datagram to a UDP server of the lab, by way of the gateway.
    fn datagram(&self, from: IpAddr, to: IpAddr, source_port: u16) -> Value {
        json!({
            "kind": "udp", "from": from, "to": to, "source_port": source_port, "port": UDP,
            "text": "forged", "mac": self.gateway_mac,
        })
    }
}

fn received(server: &Pod) -> Result<u64> {
    let report: UdpServerReport = server.report_of("udp")?;
    Ok(report.received)
}

/// Frames that the guards of a node dropped.
fn guard_dropped(mesh: &Mesh, node: &str) -> Result<u64> {
    let status = mesh.lab.agent(node)?.status()?;
    status["counters"]["kernel_guard_dropped"].as_u64().context("kernel_guard_dropped")
}

/// Addresses of two pods, paired by family.
fn pairs(one: &Pod, other: &Pod) -> Vec<(IpAddr, IpAddr)> {
    let matching =
        |a: IpAddr| other.ips().into_iter().find(|b| b.is_ipv4() == a.is_ipv4()).map(|b| (a, b));
    one.ips().into_iter().filter_map(matching).collect()
}

#[test]
fn a_packet_socket_of_an_enforced_pod_reaches_nobody() -> Result<()> {
    let mesh = Mesh::start(Some("strict"))?;
    with_logs(&mesh, |mesh| {
        let Mesh { lab, intruder, reports, .. } = mesh;
        let attack = Attack::prepare(mesh)?;
        let agent = lab.agent("node-1")?;
        let shown = agent.endpoint(intruder)?.context("the intruder")?;
        let masked = std::env::var("SIGNET_MASK_FEATURES").unwrap_or_default();
        let wanted = if masked.contains("5.15") { "clsact" } else { "tcx" };
        ensure!(shown["rawGuard"] == wanted, "{shown}");
        let shown = agent.endpoint(&attack.outlaw)?.context("the outlaw")?;
        ensure!(shown["rawGuard"].is_null(), "{shown}");

        for (bypass, port) in [(false, FORGED), (true, FORGED + 1)] {
            for (from, to) in pairs(&attack.outlaw, reports) {
                let before = received(reports)?;
                attack.write(&attack.outlaw, bypass, &[attack.datagram(from, to, port)])?;
                eventually("the control's datagram arrives", CHANGE, || {
                    Ok((received(reports)? == before + 1).then_some(()))
                })?;
            }
            for (from, to) in pairs(intruder, reports) {
                let before = received(reports)?;
                attack.write(intruder, bypass, &[attack.datagram(from, to, port)])?;
                agent.wait_flow("the frame is reported", &["--reason", "raw_packet"], |flow| {
                    flow.between("shop/intruder", "legacy/reports")
                        && flow.is("DROPPED", "raw_packet")
                        && flow.source.ip == Some(from.to_string())
                        && flow.source.port == Some(port)
                })?;
                ensure!(received(reports)? == before, "a frame of {from} arrived");
                // The same datagram out of a socket passes: the cause is the packet socket.
                let role = UdpClient { to: (to, UDP).into(), ..Default::default() };
                let sent: UdpReport = intruder.run(&Role::UdpClient(role), TIMEOUT)?;
                ensure!(sent.answered == 1, "{sent:?}");
            }
        }
        let drops = agent.endpoint(intruder)?.context("the intruder")?["drops"].clone();
        let counted = drops.as_array().context("drops")?.iter().any(|drop| {
            drop["reason"] == "raw_packet" && drop["count"].as_u64().is_some_and(|n| n >= 2)
        });
        ensure!(counted, "{drops}");

        // It holds without the agent, too.
        agent.kill();
        for (from, to) in pairs(intruder, reports) {
            let before = received(reports)?;
            attack.write(intruder, false, &[attack.datagram(from, to, FORGED + 2)])?;
            let from = pairs(&attack.outlaw, reports)
                .into_iter()
                .find_map(|(from, same)| (same == to).then_some(from))
                .context("the outlaw's address")?;
            attack.write(&attack.outlaw, false, &[attack.datagram(from, to, FORGED + 2)])?;
            eventually("only the control's datagram arrives", CHANGE, || {
                Ok((received(reports)? > before).then_some(()))
            })?;
            ensure!(received(reports)? == before + 1, "a frame of {from} arrived");
        }
        Ok(())
    })
}

#[test]
fn forged_sources_leave_no_enforced_pod() -> Result<()> {
    let mesh = Mesh::start(Some("strict"))?;
    with_logs(&mesh, |mesh| {
        let Mesh { lab, intruder, frontend, reports, .. } = mesh;
        let attack = Attack::prepare(mesh)?;
        let agent = lab.agent("node-1")?;
        for (stolen, to) in pairs(frontend, reports) {
            let before = received(reports)?;
            attack.write(&attack.outlaw, false, &[attack.datagram(stolen, to, FORGED)])?;
            eventually("the control's datagram arrives", CHANGE, || {
                Ok((received(reports)? == before + 1).then_some(()))
            })?;
            attack.write(intruder, false, &[attack.datagram(stolen, to, FORGED)])?;
            agent.wait_flow("it is reported", &["--reason", "identity_mismatch"], |flow| {
                flow.is("DROPPED", "identity_mismatch") && flow.direction == "egress"
            })?;
            ensure!(received(reports)? == before + 1, "a datagram in the name of {stolen} arrived");

            // A raw socket, with a header of its own, meets the hooks of every socket.
            let role = |from| Spoof {
                from: (from, FORGED).into(),
                to: (to, UDP).into(),
                udp: true,
                text: "raw".into(),
                ..Spoof::default()
            };
            if to.is_ipv4() {
                let sent: SpoofReport = intruder.run(&Role::Spoof(role(stolen)), TIMEOUT)?;
                ensure!(received(reports)? == before + 1, "a raw packet arrived: {sent:?}");
                let sent: SpoofReport = attack.outlaw.run(&Role::Spoof(role(stolen)), TIMEOUT)?;
                ensure!(sent.sent == 1, "{sent:?}");
                eventually("the control's raw packet arrives", CHANGE, || {
                    Ok((received(reports)? == before + 2).then_some(()))
                })?;
            }
        }
        Ok(())
    })
}

/// The link-layer address that a pod would send to `ip` with, upper bits in any case.
fn neighbour(pod: &Pod, ip: IpAddr) -> Result<Option<String>> {
    let ip = ip.to_string();
    let shown = pod.exec(&["ip", "-j", "neigh", "show", "to", &ip])?.success()?;
    let entries: Value = serde_json::from_str(&shown)?;
    Ok(entries[0]["lladdr"].as_str().map(str::to_owned))
}

fn own_mac(pod: &Pod) -> Result<String> {
    let shown = pod.exec(&["ip", "-j", "link", "show", "eth0"])?.success()?;
    let links: Value = serde_json::from_str(&shown)?;
    Ok(links[0]["address"].as_str().context("eth0's address")?.to_owned())
}

#[test]
fn no_enforced_pod_takes_anothers_place_on_the_link() -> Result<()> {
    let mesh = Mesh::start(Some("strict"))?;
    with_logs(&mesh, |mesh| {
        let Mesh { intruder, frontend, reports, .. } = mesh;
        let attack = Attack::prepare(mesh)?;
        for (claimed, victim) in pairs(frontend, reports) {
            let frontend_mac = own_mac(frontend)?;
            let victim_mac = own_mac(reports)?;
            // The victim knows the true one: it has just spoken with it.
            let role = UdpClient { to: (victim, UDP).into(), ..Default::default() };
            let sent: UdpReport = frontend.run(&Role::UdpClient(role), TIMEOUT)?;
            ensure!(sent.answered == 1, "{sent:?}");
            let knows = |mac: &str| -> Result<()> {
                let found = neighbour(reports, claimed)?;
                ensure!(found.as_deref() == Some(mac), "{claimed} is {found:?}, not {mac}");
                Ok(())
            };
            eventually("the victim knows its neighbour", CHANGE, || {
                knows(&frontend_mac).map(Some)
            })?;
            let claim = if claimed.is_ipv4() {
                json!({"kind": "arp", "from": claimed, "to": victim, "mac": victim_mac})
            } else {
                json!({"kind": "advertisement", "from": claimed, "to": victim, "target": claimed,
                       "mac": victim_mac})
            };
            let dropped = || guard_dropped(mesh, "node-1");
            let before = dropped()?;
            attack.write(intruder, false, std::slice::from_ref(&claim))?;
            eventually("the claim is dropped", CHANGE, || Ok((dropped()? > before).then_some(())))?;
            knows(&frontend_mac)?;
            // The control. The kernel keeps a neighbour for a moment against such changes.
            eventually("the control's claim is believed", CHANGE, || {
                attack.write(&attack.outlaw, false, std::slice::from_ref(&claim))?;
                knows(&own_mac(&attack.outlaw)?).map(Some)
            })?;
        }
        Ok(())
    })
}

#[test]
fn what_the_kernel_itself_sends_passes_the_guard() -> Result<()> {
    let mesh = Mesh::start(Some("permissive"))?;
    with_logs(&mesh, |mesh| {
        let Mesh { frontend, payments, reports, .. } = mesh;
        for (_, to) in pairs(reports, payments) {
            // Handshakes, fragments both ways, resets of closed ports, unreachable ports.
            answered_soon(reports, (to, TCP).into())?;
            let closed = dial(reports, (to, 5).into(), "closed")?;
            ensure!(closed.outcome == "connect:ECONNREFUSED", "{closed:?}");
            ensure!(closed.connect_us < 1_000_000, "not answered at once: {closed:?}");
            let long = "fragments ".repeat(400);
            let udp = |port, connected| UdpClient {
                to: (to, port).into(),
                text: long.clone(),
                connected,
                timeout_ms: 2000,
                ..Default::default()
            };
            for from in [reports, frontend] {
                let sent: UdpReport = from.run(&Role::UdpClient(udp(UDP, false)), TIMEOUT)?;
                ensure!(sent.answered == 1, "{}: {sent:?}", from.full_name());
            }
            let sent: UdpReport = reports.run(&Role::UdpClient(udp(6, true)), TIMEOUT)?;
            ensure!(sent.failures.keys().any(|o| o.ends_with("ECONNREFUSED")), "{sent:?}");
            answered(frontend, (to, TCP).into(), "tunnelled")?;
        }
        let dropped = guard_dropped(mesh, "node-2")?;
        ensure!(dropped == 0, "the guard of node-2 dropped {dropped} frames");
        Ok(())
    })
}

#[test]
fn later_fragments_need_a_first_one() -> Result<()> {
    let mesh = Mesh::start(Some("strict"))?;
    with_logs(&mesh, |mesh| {
        let Mesh { intruder, reports, .. } = mesh;
        let attack = Attack::prepare(mesh)?;
        let Some((from, to)) = pairs(intruder, reports).into_iter().find(|(a, _)| a.is_ipv4())
        else {
            // Of IPv6 fragments only the guard's own tests speak.
            return Ok(());
        };
        let dropped = || guard_dropped(mesh, "node-1");
        let before = dropped()?;
        let fragment = json!({"kind": "later-fragment", "from": from, "to": to, "text": "tail",
                              "mac": attack.gateway_mac});
        let syn = json!({"kind": "syn", "from": from, "to": to, "source_port": FORGED,
                         "port": TCP, "mac": attack.gateway_mac});
        attack.write(intruder, false, &[fragment, syn])?;
        eventually("both are dropped", CHANGE, || Ok((dropped()? >= before + 2).then_some(())))?;
        Ok(())
    })
}
