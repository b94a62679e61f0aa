//! Hostile peers on 15008: each is refused with its own reason, counted, and costs nothing.

use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    path::PathBuf,
    thread,
    time::Duration,
};

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use signet_lab::{
    capture::TUNNEL_PORT,
    forge::{Forger, Leaf},
    pod::Pod,
    traffic::{
        Role,
        reports::{HostileReport, TcpServerReport},
        roles::{Attack, HostileClient, HostileServer},
    },
};

use crate::mesh::{HTTP, Mesh, TCP, TIMEOUT, UDP, answered_soon, with_logs};

const FRONTEND: &str = "spiffe://cluster.local/ns/shop/sa/frontend";

/// A mesh with an attacker in an unenrolled pod who has the lab root's key.
struct Siege {
    mesh: Mesh,
    forger: Forger,
    certificate: PathBuf,
}

impl Siege {
    fn start() -> Result<Self> {
        let mesh = Mesh::start(Some("strict"))?;
        answered_soon(&mesh.frontend, mesh.payments.at(TCP))?;
        let authority = mesh.lab.agents()[0].authority_dir().to_owned();
        let forger = Forger::with_stolen_root(&authority, mesh.lab.directory())?;
        let certificate = forger.sign("right", &Leaf::of(&[FRONTEND]))?;
        Ok(Self { mesh, forger, certificate })
    }

    /// A client that would be let through, to be spoilt.
    fn right(&self) -> HostileClient {
        HostileClient {
            to: self.mesh.payments.at(TUNNEL_PORT),
            certificate: Some(self.certificate.clone()),
            authority: self.mesh.payments.at(TCP).to_string(),
            ..Default::default()
        }
    }

    fn attack(&self, role: HostileClient) -> Result<HostileReport> {
        self.mesh.reports.run(&Role::HostileClient(role), TIMEOUT)
    }

    /// The control for every refusal: with nothing spoilt the tunnel opens.
    fn control(&self) -> Result<HostileReport> {
        let report = self.attack(self.right())?;
        ensure!(report.reached == "tunnel" && report.seen.is_some(), "{report:?}");
        Ok(report)
    }

    fn counters(&self) -> Result<Value> {
        Ok(self.mesh.lab.agent("node-2")?.status()?["counters"].clone())
    }

    fn dropped(&self, reason: &str) -> Result<u64> {
        let status = self.mesh.lab.agent("node-2")?.status()?;
        Ok(status["events"]["droppedByReason"][reason].as_u64().unwrap_or_default())
    }

    /// Attacks; it must be refused with this reason, counted, and reach nobody.
    fn refused(&self, what: &str, reason: &str, role: HostileClient) -> Result<HostileReport> {
        let accepted = self.accepted()?;
        let before = self.dropped(reason)?;
        let report = self.attack(role)?;
        ensure!(report.reached != "tunnel" && report.seen.is_none(), "{what}: {report:?}");
        let counted = Duration::from_secs(5);
        signet_lab::eventually(&format!("{what} is counted as {reason}"), counted, || {
            Ok((self.dropped(reason)? > before).then_some(()))
        })
        .with_context(|| {
            let status = self.mesh.lab.agent("node-2").and_then(|agent| agent.status());
            let status = status.unwrap_or_default();
            format!(
                "{report:?}\nreasons: {}\ncounters: {}",
                status["events"]["droppedByReason"], status["counters"]
            )
        })?;
        ensure!(self.accepted()? == accepted, "{what} reached the application");
        Ok(report)
    }

    fn accepted(&self) -> Result<u64> {
        let report: TcpServerReport = self.mesh.payments.report_of("tcp")?;
        Ok(report.accepted)
    }
}

#[test]
fn certificates_that_are_no_svid_of_ours() -> Result<()> {
    let siege = Siege::start()?;
    with_logs(&siege.mesh, |mesh| {
        siege.control()?;
        let stranger = Forger::stranger("cluster.local", mesh.lab.directory())?;
        let leaf = || Leaf::of(&[FRONTEND]);
        let cases = [
            ("another root", "untrusted_peer", stranger.sign("stranger", &leaf())?),
            (
                "expired",
                "svid_expired",
                siege.forger.sign("expired", &Leaf { years: (2020, 2021), ..leaf() })?,
            ),
            (
                "not yet valid",
                "untrusted_peer",
                siege.forger.sign("early", &Leaf { years: (2090, 2095), ..leaf() })?,
            ),
            ("no SAN", "untrusted_peer", siege.forger.sign("none", &Leaf::of(&[]))?),
            (
                "two URI SANs",
                "untrusted_peer",
                siege.forger.sign(
                    "two",
                    &Leaf::of(&[FRONTEND, "spiffe://cluster.local/ns/shop/sa/checkout"]),
                )?,
            ),
            (
                "another trust domain",
                "untrusted_peer",
                siege
                    .forger
                    .sign("foreign", &Leaf::of(&["spiffe://other.example/ns/shop/sa/frontend"]))?,
            ),
            (
                "no SPIFFE ID",
                "untrusted_peer",
                siege.forger.sign("https", &Leaf::of(&["https://cluster.local/ns/shop"]))?,
            ),
            (
                "DNS name only",
                "untrusted_peer",
                siege
                    .forger
                    .sign("dns", &Leaf { names: vec!["payments.shop".into()], ..Leaf::of(&[]) })?,
            ),
            (
                "an authority's certificate as a leaf",
                "untrusted_peer",
                siege.forger.sign("authority", &Leaf { authority: true, ..leaf() })?,
            ),
        ];
        let mut kinds = Vec::new();
        for (what, reason, certificate) in cases {
            let before = siege.counters()?;
            siege.refused(
                what,
                reason,
                HostileClient { certificate: Some(certificate), ..siege.right() },
            )?;
            kinds.push((what, changed(&before, &siege.counters()?)));
        }
        siege.refused(
            "no certificate",
            "untrusted_peer",
            HostileClient { certificate: None, ..siege.right() },
        )?;
        // Each has a count of its own.
        println!("counted: {kinds:#?}");
        for (what, counted) in &kinds {
            ensure!(!counted.is_empty(), "{what} moved no counter");
        }
        siege.control()?;
        Ok(())
    })
}

/// Counters whose value differs.
fn changed(before: &Value, after: &Value) -> Vec<String> {
    let (Some(before), Some(after)) = (before.as_object(), after.as_object()) else {
        return Vec::new();
    };
    after
        .iter()
        .filter(|(key, value)| before.get(*key) != Some(value))
        .map(|(key, _)| key.clone())
        .collect()
}

#[test]
fn what_is_not_our_protocol() -> Result<()> {
    let siege = Siege::start()?;
    with_logs(&siege.mesh, |_| {
        siege.control()?;
        let failed = "handshake_failed";
        siege.refused("TLS 1.2", failed, HostileClient { tls12: true, ..siege.right() })?;
        siege.refused("no ALPN", failed, HostileClient { alpn: vec![], ..siege.right() })?;
        siege.refused(
            "another ALPN",
            failed,
            HostileClient { alpn: vec!["http/1.1".into()], ..siege.right() },
        )?;
        siege.refused(
            "plain HTTP/1.1",
            failed,
            HostileClient { attack: Attack::Plain, ..siege.right() },
        )?;
        siege.refused(
            "HTTP/1.1 inside TLS",
            "protocol_error",
            HostileClient { attack: Attack::Http1, ..siege.right() },
        )?;
        siege.refused(
            "garbage inside TLS",
            "protocol_error",
            HostileClient { attack: Attack::GarbageInside, amount: 1 << 20, ..siege.right() },
        )?;
        let get = HostileClient { method: "GET".into(), ..siege.right() };
        let report = siege.refused("GET", "protocol_error", get)?;
        ensure!(report.status.is_none_or(|status| status == 400), "{report:?}");
        siege.control()?;
        Ok(())
    })
}

#[test]
fn no_ticket_is_given_and_none_is_taken() -> Result<()> {
    let siege = Siege::start()?;
    with_logs(&siege.mesh, |_| {
        let report = siege.attack(HostileClient { attack: Attack::Resume, ..siege.right() })?;
        ensure!(report.reached == "handshake" && report.error.is_empty(), "{report:?}");
        ensure!(report.tickets == 0, "{report:?}");
        ensure!(report.resumed == Some(false), "{report:?}");
        Ok(())
    })
}

#[test]
fn connect_reaches_only_this_pods_own_ports() -> Result<()> {
    let siege = Siege::start()?;
    with_logs(&siege.mesh, |mesh| {
        let control = siege.control()?;
        let seen = control.seen.context("no answer")?;
        ensure!(seen.accepted.ip() == mesh.reports.ip(), "{seen:?}");
        let payments = &mesh.payments;
        let on = |host: &str, port: u16| {
            if host.contains(':') { format!("[{host}]:{port}") } else { format!("{host}:{port}") }
        };
        let mut wrong = vec![
            ("another pod", mesh.frontend.at(TCP).to_string()),
            ("loopback", on("127.0.0.1", TCP)),
            ("IPv6 loopback", on("::1", TCP)),
            ("unspecified", on("0.0.0.0", TCP)),
            ("IPv6 unspecified", on("::", TCP)),
            ("link-local", on("169.254.169.254", 80)),
            ("IPv6 link-local", on("fe80::1", TCP)),
            (
                "the node",
                SocketAddr::from((mesh.lab.nodes()[1].addresses.first(), 10250)).to_string(),
            ),
            ("the tunnel's port", payments.at(TUNNEL_PORT).to_string()),
            ("a host name", "payments.shop:9000".to_owned()),
            ("localhost", "localhost:9000".to_owned()),
        ];
        if let Some(v4) = payments.addresses().v4 {
            wrong.push(("IPv4-mapped", on(&v4.to_ipv6_mapped().to_string(), TCP)));
        }
        if payments.ips().len() == 2 {
            wrong.push((
                "its other address",
                SocketAddr::from((payments.ips()[1], TCP)).to_string(),
            ));
        }
        for (what, authority) in wrong {
            siege
                .refused(what, "wrong_destination", HostileClient { authority, ..siege.right() })
                .with_context(|| what.to_owned())?;
        }
        // The agent's own listeners in the pod, whether or not they are on this address.
        let own = [HTTP, TCP, UDP];
        let listeners: Vec<u16> =
            listening(payments)?.into_iter().filter(|port| !own.contains(port)).collect();
        ensure!(!listeners.is_empty(), "found no listener of the agent's");
        for port in listeners {
            let authority = payments.at(port).to_string();
            let report = siege.attack(HostileClient { authority, ..siege.right() })?;
            ensure!(
                report.seen.is_none() && matches!(report.status, Some(400 | 503)),
                "port {port}: {report:?}"
            );
        }
        let without_port = match payments.ip() {
            IpAddr::V4(v4) => v4.to_string(),
            IpAddr::V6(v6) => format!("[{v6}]"),
        };
        siege.refused(
            "no port",
            "wrong_destination",
            HostileClient { authority: without_port, ..siege.right() },
        )?;
        siege.refused(
            "a closed port",
            "app_unreachable",
            HostileClient { authority: payments.at(9999).to_string(), ..siege.right() },
        )?;
        siege.control()?;
        Ok(())
    })
}

/// TCP ports on which somebody listens in the pod's namespace.
fn listening(pod: &Pod) -> Result<Vec<u16>> {
    let mut ports = Vec::new();
    for table in ["/proc/net/tcp", "/proc/net/tcp6"] {
        let text = pod.exec(&["cat", table])?.success()?;
        for line in text.lines().skip(1) {
            let mut fields = line.split_whitespace().skip(1);
            let (local, state) = (fields.next(), fields.nth(1));
            // State 0A is LISTEN.
            if state == Some("0A")
                && let Some((_, port)) = local.and_then(|local| local.rsplit_once(':'))
            {
                ports.push(u16::from_str_radix(port, 16).context("port")?);
            }
        }
    }
    ports.sort_unstable();
    ports.dedup();
    Ok(ports)
}

#[test]
fn forged_headers_change_nothing() -> Result<()> {
    let siege = Siege::start()?;
    with_logs(&siege.mesh, |mesh| {
        let forged = |role: HostileClient| HostileClient {
            header: vec![
                format!("forwarded: for=\"{}\"", mesh.intruder.at(4242)),
                "baggage: k8s.namespace.name=kube-system,k8s.pod.name=admin,service.name=root"
                    .into(),
                "x-forwarded-for: 203.0.113.9".into(),
                "traceparent: 00-11111111111111111111111111111111-2222222222222222-01".into(),
            ],
            text: "forged".into(),
            ..role
        };
        let report = siege.attack(forged(siege.right()))?;
        let seen = report.seen.clone().with_context(|| format!("{report:?}"))?;
        ensure!(seen.accepted.ip() == mesh.reports.ip(), "the application was told {seen:?}");
        ensure!(seen.peer.ip() == mesh.reports.ip(), "{seen:?}");
        let flow = mesh.lab.agent("node-2")?.wait_flow("the record", &[], |flow| {
            flow.reporter == "destination"
                && flow.source.ip == Some(mesh.reports.ip().to_string())
                && flow.is("FORWARDED", "allowed")
        })?;
        let text = format!("{flow:?}");
        for forged in ["kube-system", "admin", "203.0.113.9", &mesh.intruder.ip().to_string()] {
            ensure!(!text.contains(forged), "{forged} is in the record: {text}");
        }
        // Nor the verdict: the certificate's identity is judged, not the baggage's.
        mesh.allow_payments(&["checkout"])?;
        signet_lab::eventually("the policy refuses", TIMEOUT, || {
            let report = siege.attack(forged(siege.right()))?;
            Ok((report.status == Some(401)).then_some(()))
        })?;
        Ok(())
    })
}

#[test]
fn floods_cost_bounded_memory_and_others_get_through() -> Result<()> {
    let siege = Siege::start()?;
    with_logs(&siege.mesh, |mesh| {
        let agent = mesh.lab.agent("node-2")?;
        siege.control()?;
        answered_soon(&mesh.frontend, mesh.payments.at(TCP))?;
        // What was only needed to start is given back by then.
        thread::sleep(Duration::from_secs(10));
        let before = agent.usage()?;
        assault(&siege)?;
        thread::sleep(Duration::from_secs(10));
        let after = agent.usage()?;
        for (when, usage) in [("before", before), ("after", after)] {
            println!("{when}: {} KiB, {} of files", usage.resident >> 10, usage.of_files >> 10);
        }
        let growth = after.resident.saturating_sub(before.resident);
        ensure!(growth <= 2 << 20, "grew by {} KiB", growth >> 10);
        ensure!(after.descriptors <= before.descriptors + 4, "{before:?} {after:?}");
        // The runtimes' threads for blocking calls end after ten idle seconds.
        signet_lab::eventually("no thread is left over", TIMEOUT, || {
            let now = agent.usage()?;
            ensure!(now.threads <= before.threads, "{before:?} {now:?}");
            Ok(Some(()))
        })?;
        Ok(())
    })
}

fn assault(siege: &Siege) -> Result<()> {
    // Stalled handshakes from one source: bounded in number and time, others get through.
    let stall =
        HostileClient { attack: Attack::Stall, amount: 300, timeout_ms: 30_000, ..siege.right() };
    let stalling = siege.mesh.reports.start(&Role::HostileClient(stall))?;
    stalling.wait_event("stalling", TIMEOUT)?;
    fresh_calls(&siege.mesh)?;
    let report: HostileReport = stalling.report(TIMEOUT)?;
    ensure!(report.amount == 300, "only {} of 300 stalled were closed", report.amount);
    drop(stalling);
    let report = siege.refused(
        "10 MB of garbage",
        "handshake_failed",
        HostileClient { attack: Attack::Garbage, amount: 10 << 20, ..siege.right() },
    )?;
    println!("garbage: {} bytes went out before {}", report.amount, report.error);
    flood(siege, 10)?;
    fresh_calls(&siege.mesh)
}

/// Every kind of refused peer, several times.
fn flood(siege: &Siege, rounds: usize) -> Result<()> {
    let expired =
        siege.forger.sign("flood", &Leaf { years: (2020, 2021), ..Leaf::of(&[FRONTEND]) })?;
    for _ in 0..rounds {
        for attack in [Attack::Plain, Attack::Http1, Attack::Garbage] {
            siege.attack(HostileClient { attack, amount: 1 << 20, ..siege.right() })?;
        }
        siege.attack(HostileClient { certificate: Some(expired.clone()), ..siege.right() })?;
    }
    Ok(())
}

/// A pod that has no pooled connection calls: its handshake must find room.
fn fresh_calls(mesh: &Mesh) -> Result<()> {
    let name = format!("fresh-{}", signet_lab::traffic::unix_micros());
    let fresh: Pod = mesh.lab.pod("shop", &name).start()?;
    mesh.lab.wait_state(&fresh, "served")?;
    let report = answered_soon(&fresh, mesh.payments.at(TCP))?;
    ensure!(report.total_us < 2_000_000, "{report:?}");
    fresh.remove()
}

#[test]
fn a_server_with_the_wrong_certificate_gets_nothing() -> Result<()> {
    let siege = Siege::start()?;
    with_logs(&siege.mesh, |mesh| {
        let lab = &mesh.lab;
        let stranger = Forger::stranger("cluster.local", lab.directory())?;
        let payments = "spiffe://cluster.local/ns/shop/sa/payments";
        let cases = [
            ("right", None, siege.forger.sign("srv-right", &Leaf::of(&[payments]))?),
            (
                "another account",
                Some("identity_mismatch"),
                siege.forger.sign("srv-account", &Leaf::of(&[FRONTEND]))?,
            ),
            (
                "another root",
                Some("untrusted_peer"),
                stranger.sign("srv-root", &Leaf::of(&[payments]))?,
            ),
        ];
        // Somebody outside answers on 15008 of an address that a forged announcement calls a
        // served pod's.
        for (ip, (what, reason, certificate)) in (1..).zip(cases) {
            let address = impostor_address(mesh, ip)?;
            let role = HostileServer {
                listen: vec![(address, TUNNEL_PORT).into()],
                certificate,
                alpn: vec!["h2".into()],
            };
            let impostor = lab
                .outside()
                .start_role(&format!("impostor-{ip}"), &Role::HostileServer(role).argv()?)?;
            impostor.wait_event("listening", TIMEOUT)?;
            announce(mesh, ip, address)?;
            let to = (address, TCP).into();
            match reason {
                // The control: with the right certificate it would be believed.
                None => {
                    signet_lab::eventually("the impostor is believed", TIMEOUT, || {
                        crate::mesh::dial(&mesh.frontend, to, "secret-51b0")?;
                        let printed = impostor.printed();
                        Ok(printed.iter().any(|v| v["event"] == "fooled").then_some(()))
                    })
                    .with_context(|| impostor.said())?;
                }
                Some(reason) => {
                    let report = signet_lab::eventually(what, TIMEOUT, || {
                        let report = crate::mesh::dial(&mesh.frontend, to, "secret-51b0")?;
                        ensure!(!report.answered(), "{report:?}");
                        let flows = lab.agent("node-1")?.flows(&["--reason", reason])?;
                        Ok((!flows.is_empty()).then_some(report))
                    })
                    .with_context(|| impostor.said())?;
                    ensure!(report.refused(), "{what}: {report:?}");
                    let printed = impostor.printed();
                    ensure!(!printed.iter().any(|v| v["event"] == "fooled"), "{what}: {printed:?}");
                    ensure!(printed.iter().any(|v| v["event"] == "peer"), "{what}: not dialled");
                }
            }
        }
        Ok(())
    })
}

/// A further address of the machine outside.
fn impostor_address(mesh: &Mesh, number: u8) -> Result<IpAddr> {
    let name = format!("{}-outside", mesh.lab.id());
    let (ip, bits): (IpAddr, _) = if mesh.lab.family().has_v4() {
        (Ipv4Addr::new(198, 51, 100, 100 + number).into(), 32)
    } else {
        (Ipv6Addr::new(0x2001, 0xdb8, 0xff, 0, 0, 0, 1, number.into()).into(), 128)
    };
    signet_lab::netns::batch(&name, &[format!("addr add {ip}/{bits} dev lo")])?;
    Ok(ip)
}

/// Writes a pod of `shop` with the address, on a node of its own that calls it served.
fn announce(mesh: &Mesh, number: u8, address: IpAddr) -> Result<()> {
    use serde_json::json;
    let (uid, name) = (format!("f0f0-{number}"), format!("forged-{number}"));
    let node = format!("node-{}", 6 + number);
    mesh.lab.cluster().apply(json!({
        "apiVersion": "v1", "kind": "Pod",
        "metadata": {"name": name, "namespace": "shop", "uid": uid},
        "spec": {
            "nodeName": node, "serviceAccountName": "payments",
            "containers": [{"name": "main", "image": "x"}],
        },
        "status": {
            "phase": "Running", "podIP": address.to_string(),
            "podIPs": [{"ip": address.to_string()}],
        },
    }))?;
    let board = format!(
        "node: {node}\nrevision: 1\ntime: {}\nserved:\n- uid: \"{uid}\"\n  pod: \"shop/{name}\"\n",
        jiff::Timestamp::now()
    );
    mesh.lab.cluster().write_board(&node, &board)
}
