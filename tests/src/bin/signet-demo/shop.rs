//! The scenes: a shop moves from `off` to `strict` while it works, then is attacked.

use std::{
    fs,
    net::{IpAddr, SocketAddr},
    path::Path,
    time::{Duration, SystemTime},
};

use anyhow::{Context, Result, bail, ensure};
use signet_lab::{
    agent::{Agent, Flow},
    capture::{Captured, TUNNEL_PORT},
    cluster_dir::ObjectKey,
    lab::{Lab, LabOptions, eventually},
    pod::Pod,
    process::{Output, Running},
    traffic::{
        Role,
        reports::{DialReport, LoadReport, SpoofReport, TcpServerReport},
        roles::{Dial, Load, Spoof},
    },
};

use crate::report::Report;

/// The port that every program of the shop serves.
const PORT: u16 = 8080;
/// How long a changed label may take to be in force everywhere, on a busy machine.
const CHANGE: Duration = Duration::from_secs(15);

/// A Service's address.
pub struct ServiceAddress(SocketAddr);

impl ServiceAddress {
    /// `http://address:port/path`.
    pub fn url(&self, path: &str) -> String {
        format!("http://{}{path}", self.0)
    }
}

/// The lab with the shop in it.
pub struct Shop {
    /// Two nodes.
    pub lab: Lab,
    /// The Service that the frontend calls.
    pub checkout: ServiceAddress,
    payments: ServiceAddress,
    policies: String,
    /// A text that no other traffic carries: payload to search the captures for.
    marker: String,
}

impl Shop {
    /// Makes the nodes, starts the pods and the agents; the shop's namespace is still off.
    pub fn open(examples: &Path, report: &Report) -> Result<Self> {
        let read = |file: &str| {
            let path = examples.join(file);
            fs::read_to_string(&path).with_context(|| path.display().to_string())
        };
        let lab = Lab::with(LabOptions { ranges: false, ..LabOptions::default() })?;
        report.progress(&format!("two nodes in {}", lab.directory().display()));
        lab.cluster().write_file("ranges.yaml", &read("ranges.yaml")?)?;
        lab.apply_yaml(&read("namespaces.yaml")?)?;
        // The example is strict; the demo goes there step by step.
        lab.cluster().set_mode("shop", None)?;
        lab.apply_yaml(&read("service-accounts.yaml")?)?;
        lab.apply_yaml(&read("services.yaml")?)?;
        let pods = lab.apply_yaml(&read("pods.yaml")?)?;
        report.progress(&format!("{} pods with real HTTP servers", pods.len()));
        lab.start_agents()?;
        report.progress("a signet agent on each node is READY");
        for pod in &pods {
            pod.wait_published()?;
            report.say(&format!(
                "   {:<15} {:<13} on {}",
                pod.full_name(),
                pod.ip().to_string(),
                pod.node().name
            ));
        }
        let policies = read("policies.yaml")?;
        let checkout = service(&lab, "checkout")?;
        let payments = service(&lab, "payments")?;
        let marker = format!("payload-{}", uuid::Uuid::new_v4().simple());
        Ok(Self { lab, checkout, payments, policies, marker })
    }

    /// Plays all scenes. An error is something that prevents the next scene.
    pub fn play(&self, report: &mut Report) -> Result<()> {
        let control = self.off(report)?;
        // From before the first tunnel is opened, so that each is seen from its beginning.
        let capture = self.lab.capture("strict")?;
        self.migrate(report)?;
        let strict_since = SystemTime::now();
        self.allowed(report)?;
        self.denied(report)?;
        self.plaintext(report)?;
        let captured = capture.stop()?;
        // Apart: forged packets are plaintext that seems to come from a pod of the shop.
        let capture = self.lab.capture("attack")?;
        self.spoofed(report)?;
        let attack = capture.stop()?;
        self.table(report)?;
        self.proof(report, &control, &captured, &attack);
        report.expect(
            "strict: between the shop's pods there was nothing but TLS 1.3 on port 15008",
            self.only_tunnels(&captured, strict_since),
        );
        Ok(())
    }

    /// Nothing is touched: the control for the search in the capture.
    fn off(&self, report: &mut Report) -> Result<Captured> {
        report.scene("off: nothing is touched");
        let frontend = self.pod("frontend")?;
        let capture = self.lab.capture("off")?;
        let called = frontend.curl(&self.checkout.url(&self.path()));
        let captured = capture.stop()?;
        report.expect(
            "frontend's plain curl reaches the Service checkout",
            called.and_then(answered),
        );
        Ok(captured)
    }

    /// off → observe → permissive → strict, with requests flowing all the while.
    fn migrate(&self, report: &mut Report) -> Result<()> {
        report.scene("the namespace moves observe -> permissive -> strict while requests flow");
        let frontend = self.pod("frontend")?;
        let reports = self.pod("reports")?;
        let (node_1, node_2) = (self.lab.agent("node-1")?, self.lab.agent("node-2")?);
        let cluster = self.lab.cluster();
        let mut load = frontend.start(&Role::Load(Load {
            to: self.checkout.0,
            path: "/load".into(),
            interval_ms: 20,
            ..Load::default()
        }))?;

        cluster.set_mode("shop", Some("observe"))?;
        report.expect(
            "observe: plaintext from legacy/reports passes and is reported as AUDIT",
            calls_until(&reports, &frontend, node_1, |answer, flow| {
                answer.code() == 0 && flow.is("AUDIT", "plaintext_refused")
            }),
        );

        cluster.set_mode("shop", Some("permissive"))?;
        report.expect(
            "permissive: frontend -> checkout goes over mTLS now",
            eventually("a tunnelled request", CHANGE, || {
                let flows = node_2.flows(&["--from-pod", "shop/frontend"])?;
                Ok(flows.into_iter().rev().find(|flow| {
                    flow.between("shop/frontend", "shop/checkout")
                        && flow.is("FORWARDED", "allowed")
                        && flow.via == "mtls"
                }))
            })
            .map(|flow| shown(&flow)),
        );
        report.expect(
            "permissive: plaintext from legacy/reports still passes where no policy forbids it",
            calls_until(&reports, &frontend, node_1, |answer, flow| {
                answer.code() == 0 && flow.is("FORWARDED", "allowed") && flow.via == "plaintext"
            }),
        );
        self.lab.apply_yaml(&self.policies)?;
        report.progress("policies are applied: who may call checkout and payments");

        cluster.set_mode("shop", Some("strict"))?;
        report.expect(
            "strict: plaintext from legacy/reports is refused",
            calls_until(&reports, &frontend, node_1, |answer, flow| {
                answer.code() != 0 && flow.is("DROPPED", "plaintext_refused")
            }),
        );
        let checkout = self.pod("checkout")?;
        calls_until(&reports, &checkout, node_2, |answer, flow| {
            answer.code() != 0 && flow.is("DROPPED", "plaintext_refused")
        })
        .context("strict on node-2")?;
        report.expect("not one request failed on the way", finish(&mut load));
        Ok(())
    }

    /// Calls that policy allows.
    fn allowed(&self, report: &mut Report) -> Result<()> {
        report.scene("strict: what policy allows works as before, over mTLS");
        let (frontend, checkout) = (self.pod("frontend")?, self.pod("checkout")?);
        let (node_1, node_2) = (self.lab.agent("node-1")?, self.lab.agent("node-2")?);
        let answer = frontend.curl(&self.checkout.url(&self.path())).and_then(|output| {
            let answer = Answer::of(output)?;
            ensure!(
                answer.accepted.ip() == frontend.ip(),
                "the server accepted from {}, not from frontend's {}",
                answer.accepted,
                frontend.ip()
            );
            Ok(format!("accept() in {} gave {}", answer.server, answer.accepted))
        });
        report.expect(
            "frontend's plain curl reaches checkout, which sees frontend's own address",
            answer,
        );
        report.expect(
            "node-2 reports it: FORWARDED over mTLS under frontend's certificate",
            node_2
                .wait_flow("the verdict", &[], |flow| {
                    flow.between("shop/frontend", "shop/checkout")
                        && flow.is("FORWARDED", "allowed")
                        && flow.source.known_by.as_deref() == Some("mtls")
                        && flow.policy_name() == "shop/checkout-callers"
                })
                .map(|flow| shown(&flow)),
        );
        report.expect(
            "checkout's call reaches payments",
            checkout.curl(&self.payments.url(&self.path())).and_then(answered),
        );
        report.expect(
            "both nodes report it under one id",
            node_1
                .wait_flow("the verdict of node-1", &[], |flow| {
                    flow.between("shop/checkout", "shop/payments")
                        && flow.is("FORWARDED", "allowed")
                })
                .and_then(|server| {
                    let client = node_2.wait_flow("the same id on node-2", &[], |flow| {
                        flow.uuid == server.uuid && flow.reporter == "source"
                    })?;
                    Ok(format!("{}\n{}", shown(&client), shown(&server)))
                }),
        );
        let reports = self.pod("reports")?;
        report.expect(
            "a namespace that is off is not touched: frontend -> legacy/reports goes direct",
            frontend.curl(&reports.url(PORT, "/outside-the-mesh")).and_then(answered),
        );
        Ok(())
    }

    /// Identities that policy does not let in.
    fn denied(&self, report: &mut Report) -> Result<()> {
        report.scene("strict: a pod of the same namespace whose identity nobody allows");
        let intruder = self.pod("intruder")?;
        let (node_1, node_2) = (self.lab.agent("node-1")?, self.lab.agent("node-2")?);
        report.expect(
            "intruder -> payments is reset",
            intruder.curl(&self.payments.url(&self.path())).and_then(refused),
        );
        for (agent, name) in [(node_1, "node-1"), (node_2, "node-2")] {
            report.expect(
                &format!("{name} reports it with the policy that decided"),
                agent
                    .wait_flow("the verdict", &[], |flow| {
                        flow.between("shop/intruder", "shop/payments")
                            && flow.is("DROPPED", "policy_no_match")
                            && flow.policy_name() == "shop/payments-callers"
                    })
                    .map(|flow| shown(&flow)),
            );
        }
        report.expect(
            "intruder -> checkout is reset",
            intruder.curl(&self.checkout.url(&self.path())).and_then(refused),
        );
        report.expect(
            "a DENY goes before every ALLOW",
            node_2
                .wait_flow("the verdict", &[], |flow| {
                    flow.between("shop/intruder", "shop/checkout")
                        && flow.is("DROPPED", "policy_deny")
                        && flow.policy_name() == "shop/no-intruders"
                })
                .map(|flow| shown(&flow)),
        );
        Ok(())
    }

    /// Who has no identity at all.
    fn plaintext(&self, report: &mut Report) -> Result<()> {
        report.scene("strict: plaintext");
        let (payments, reports) = (self.pod("payments")?, self.pod("reports")?);
        let node_1 = self.lab.agent("node-1")?;
        report.expect(
            "legacy/reports -> payments is refused at once",
            reports.curl(&payments.url(PORT, &self.path())).and_then(refused),
        );
        report.expect(
            "it is reported",
            node_1
                .wait_flow("the verdict", &[], |flow| {
                    flow.between("legacy/reports", "shop/payments")
                        && flow.is("DROPPED", "plaintext_refused")
                })
                .map(|flow| shown(&flow)),
        );
        let url = payments.url(PORT, "/healthz");
        report.expect(
            "any other process of payments' own node is refused, too",
            payments.node().exec(&["curl", "-sS", "-g", "--max-time", "5", &url]).and_then(refused),
        );
        report.expect("the kubelet's probe passes", payments.node().probe(&url).and_then(answered));
        Ok(())
    }

    /// An address of somebody who is allowed, without the key.
    fn spoofed(&self, report: &mut Report) -> Result<()> {
        report.scene("strict: an attacker takes checkout's address");
        let (payments, checkout, reports) =
            (self.pod("payments")?, self.pod("checkout")?, self.pod("reports")?);
        let node_1 = self.lab.agent("node-1")?;
        let before = accepted_by(&payments)?;
        if let (Some(from), Some(to)) = (checkout.addresses().v4, payments.addresses().v4) {
            let sent = reports.run::<SpoofReport>(
                &Role::Spoof(Spoof {
                    from: (from, 45454).into(),
                    to: (to, PORT).into(),
                    count: 3,
                    ..Spoof::default()
                }),
                Duration::from_secs(10),
            );
            let verdict = sent.and_then(|sent| {
                ensure!(sent.sent > 0, "no packet left: {:?}", sent.failures);
                let from = from.to_string();
                let flow = node_1.wait_flow("the verdict", &[], |flow| {
                    flow.source.ip.as_deref() == Some(&from)
                        && flow.source.port == Some(45454)
                        && flow.is("DROPPED", "plaintext_refused")
                })?;
                ensure!(
                    flow.source.known_by.as_deref() != Some("mtls"),
                    "a forged address counts as proven: {flow}"
                );
                Ok(shown(&flow))
            });
            report.expect("forged packets with checkout's address are refused", verdict);
        }
        reports.add_address(checkout.ip(), "lo")?;
        let dialled = reports.run::<DialReport>(
            &Role::Dial(Dial {
                to: payments.at(PORT),
                bind: Some((checkout.ip(), 0).into()),
                text: self.marker.clone(),
                timeout_ms: 2000,
                ..Dial::default()
            }),
            Duration::from_secs(15),
        );
        report.expect(
            "a program that binds checkout's address gets no connection",
            dialled.and_then(|dial| {
                ensure!(!dial.answered(), "it was answered: {:?}", dial.seen);
                let after = accepted_by(&payments)?;
                ensure!(after == before, "payments accepted {} connections", after - before);
                Ok(format!("{}; payments accepted nothing", dial.outcome))
            }),
        );
        Ok(())
    }

    /// What the command line shows of it all, both nodes' records merged.
    fn table(&self, report: &mut Report) -> Result<()> {
        report.scene("signet flows: refused flows, then the last that passed");
        let [one, others @ ..] = self.lab.agents() else { bail!("a lab without nodes") };
        let mut sockets = Vec::new();
        for agent in others {
            sockets.extend(["--socket".to_owned(), agent.socket().display().to_string()]);
        }
        let ask = |filters: &[&str]| -> Result<String> {
            let mut arguments = vec!["flows", "-o", "table"];
            arguments.extend(filters);
            arguments.extend(sockets.iter().map(String::as_str));
            one.cli(&arguments)?.success()
        };
        let table = ask(&["--last", "16", "--verdict", "dropped"]).and_then(|dropped| {
            ensure!(dropped.contains("policy_no_match"), "no denied identity:\n{dropped}");
            let passed = ask(&["--last", "6", "--verdict", "forwarded"])?;
            Ok(format!("{}\n{}", dropped.trim_end(), passed.trim_end()))
        });
        report.expect("signet flows shows the verdicts of both nodes", table);
        Ok(())
    }

    /// The search of everything that crossed between the nodes.
    fn proof(
        &self,
        report: &mut Report,
        control: &Captured,
        captured: &Captured,
        attack: &Captured,
    ) {
        report.scene("what crossed the link between the nodes");
        report.expect(
            "the search works: it finds the payload that crossed while the namespace was off",
            control.complete().and_then(|control| {
                let hits = control.find(&self.marker);
                let Some(hit) = hits.first() else {
                    bail!("not found in {}", control.packets.len())
                };
                Ok(format!(
                    "{} places, such as {}:{} -> {}:{}",
                    hits.len(),
                    hit.from.0,
                    hit.from.1,
                    hit.to.0,
                    hit.to.1
                ))
            }),
        );
        report.expect(
            "strict: the same search finds nothing in clear, during the attack neither",
            [captured, attack]
                .into_iter()
                .try_fold(0, |searched, captured| {
                    let hits = captured.complete()?.find(&self.marker);
                    ensure!(hits.is_empty(), "found {} times: {:?}", hits.len(), hits.first());
                    Ok(searched + captured.packets.len())
                })
                .map(|searched| format!("{searched} packets searched, none lost")),
        );
    }

    /// Every packet between the shop's pods belongs to a tunnel since `since`, and every
    /// tunnel is TLS 1.3 from its beginning.
    fn only_tunnels(&self, captured: &Captured, since: SystemTime) -> Result<String> {
        let one = self.addresses(&["frontend", "payments"])?;
        let two = self.addresses(&["checkout", "intruder"])?;
        let mut packets = 0;
        for packet in captured.complete()?.tcp_between(&one, &two) {
            if packet.time < since {
                continue;
            }
            let (from, to) = (packet.from(), packet.to());
            ensure!(
                from.1 == TUNNEL_PORT || to.1 == TUNNEL_PORT,
                "TCP outside the tunnels: {from:?} -> {to:?}"
            );
            packets += 1;
        }
        let (mut tunnels, mut records) = (0, 0);
        for (key, stream) in captured.tcp_streams() {
            let from_server = key.from.1 == TUNNEL_PORT;
            if from_server || key.to.1 == TUNNEL_PORT {
                records += stream.tls13_records(from_server)?;
                tunnels += usize::from(from_server);
            }
        }
        ensure!(packets > 0 && records > 0, "no tunnel in the capture");
        Ok(format!("{packets} packets, {records} TLS records in {tunnels} tunnels"))
    }

    fn path(&self) -> String {
        format!("/{}", self.marker)
    }

    fn pod(&self, name: &str) -> Result<Pod> {
        self.lab
            .pods()
            .into_iter()
            .find(|pod| pod.name() == name)
            .with_context(|| format!("the examples have no pod {name}"))
    }

    fn addresses(&self, pods: &[&str]) -> Result<Vec<IpAddr>> {
        let mut all = Vec::new();
        for pod in pods {
            all.extend(self.pod(pod)?.ips());
        }
        Ok(all)
    }
}

/// The first address of a Service of the shop, with its first port.
fn service(lab: &Lab, name: &str) -> Result<ServiceAddress> {
    let object = lab
        .cluster()
        .get(&ObjectKey::new("Service", "shop", name))
        .with_context(|| format!("the examples have no Service shop/{name}"))?;
    let ip = object["spec"]["clusterIPs"][0].as_str().context("a Service without address")?;
    let port = object["spec"]["ports"][0]["port"].as_u64().context("a Service without port")?;
    Ok(ServiceAddress((ip.parse::<IpAddr>()?, u16::try_from(port)?).into()))
}

/// Calls `server` from `client` until the answer and the record of the server's node are as
/// wanted: a changed label is in force when they are.
fn calls_until(
    client: &Pod,
    server: &Pod,
    agent: &Agent,
    wanted: impl Fn(&Output, &Flow) -> bool,
) -> Result<String> {
    let (from, to) = (client.full_name(), server.full_name());
    let mut last = String::new();
    eventually(&format!("{from} -> {to} as expected"), CHANGE, || {
        let answer = client.curl(&server.url(PORT, "/"))?;
        std::thread::sleep(Duration::from_millis(100));
        let flows = agent.flows(&["--from-pod", &from, "--to-pod", &to])?;
        let Some(flow) = flows.last() else { bail!("no record yet") };
        last = shown(flow);
        Ok(wanted(&answer, flow).then(|| last.clone()))
    })
    .with_context(|| format!("last seen: {last}"))
}

/// How many connections the pod's server has accepted.
fn accepted_by(pod: &Pod) -> Result<u64> {
    Ok(pod.report_of::<TcpServerReport>("server")?.accepted)
}

/// Ends the load: every request must have been answered.
fn finish(load: &mut Running) -> Result<String> {
    let report: LoadReport = load.finish_and_report(Duration::from_secs(15))?;
    let (answered, total) = (report.answered(), report.total());
    ensure!(total >= 20, "only {total} requests were made");
    ensure!(answered == total, "{answered} of {total} answered: {:?}", report.outcomes);
    Ok(format!("{total} requests, all answered"))
}

/// What the server that answered a curl saw of the client.
struct Answer {
    server: String,
    accepted: SocketAddr,
}

impl Answer {
    /// The answer of a curl that succeeded.
    fn of(output: Output) -> Result<Self> {
        let body = output.success()?;
        let seen: serde_json::Value =
            serde_json::from_str(&body).with_context(|| format!("the answer {body:?}"))?;
        let text = |field: &str| seen[field].as_str().unwrap_or_default().to_owned();
        let accepted = text("accepted").parse().with_context(|| format!("the answer {body}"))?;
        Ok(Self { server: text("server"), accepted })
    }
}

/// That a curl was answered, and by whom.
fn answered(output: Output) -> Result<String> {
    let answer = Answer::of(output)?;
    Ok(format!("{} answered; its accept() gave {}", answer.server, answer.accepted))
}

/// curl's word for a connection that was refused or reset (not one that timed out or was
/// closed as if all were well).
fn refused(output: Output) -> Result<String> {
    // 7: could not connect; 56: reset while receiving; 55: while sending.
    match output.code() {
        7 | 55 | 56 => Ok(output.stderr.trim().to_owned()),
        0 => bail!("it was answered: {}", output.stdout.trim()),
        code => bail!("curl ended with {code}: {}", output.stderr.trim()),
    }
}

/// A record, short.
fn shown(flow: &Flow) -> String {
    let known = |by: &Option<String>| by.clone().unwrap_or_else(|| "-".into());
    format!(
        "{} {} {} ({}) -> {}:{} {} {} {} {}",
        flow.node,
        flow.reporter,
        flow.source.full_name(),
        known(&flow.source.known_by),
        flow.destination.full_name(),
        flow.destination.port.unwrap_or_default(),
        flow.via,
        flow.verdict,
        flow.reason,
        flow.policy_name(),
    )
    .trim_end()
    .to_owned()
}
