//! Agents that take their SVIDs from `signet authority`: short lives under steady traffic, an
//! authority that goes and comes back, a root that is replaced.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::{Path, PathBuf},
    process::Command,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use signet_lab::{
    LabOptions,
    authority::{self, Authority, node_token},
    capture::TUNNEL_PORT,
    eventually,
    forge::{Forger, Leaf},
    metrics::Metrics,
    process::Running,
    traffic::{
        Role,
        reports::{HostileReport, LoadReport},
        roles::{HostileClient, Load},
    },
};

use crate::{
    core::workload_api::fetch,
    mesh::{HTTP, Mesh, TCP, TIMEOUT},
    spiffe_clients::{followed, start_rust},
};

/// The life of every SVID here.
const TTL: Duration = Duration::from_secs(20);

/// A mesh whose agents ask an authority that runs on node-1.
struct Attested {
    mesh: Mesh,
    authority: Option<Authority>,
    flags: Vec<String>,
    starts: usize,
}

impl Attested {
    /// With further service accounts on each node, and further flags of the authority.
    fn start(accounts: usize, further: &[&str]) -> Result<Self> {
        let mesh = Mesh::without_agents(LabOptions::default(), Some("strict"))?;
        let lab = &mesh.lab;
        let dir = lab.directory();
        let tokens = dir.join("tokens");
        for node in lab.nodes() {
            let token = node_token(&tokens, &node.name)?;
            std::fs::write(agent_token(dir, &node.name), token)?;
        }
        for i in 0..accounts {
            let name = format!("extra-{i}");
            lab.cluster().service_account("shop", &name)?;
            let node = &lab.nodes()[i % lab.nodes().len()];
            lab.pod_on(node, "shop", &name).service_account(&name).start()?;
        }
        let ip = lab.node("node-1")?.addresses.first();
        let text = |path: PathBuf| path.display().to_string();
        let mut flags: Vec<String> = [
            ("--listen", format!("{}", std::net::SocketAddr::new(ip, 15012))),
            ("--names", ip.to_string()),
            ("--store-dir", text(dir.join("store"))),
            ("--cluster-dir", text(lab.cluster().path().to_owned())),
            ("--node-token-dir", text(tokens.clone())),
            ("--bundle-file", text(dir.join("bundle.pem"))),
            ("--max-ttl", "20s".into()),
            ("--svid-ttl", "20s".into()),
            ("--intermediate-ttl", "60s".into()),
            ("--metrics-listen", "127.0.0.1:15014".into()),
        ]
        .into_iter()
        .flat_map(|(flag, value)| [flag.to_owned(), value])
        .collect();
        flags.extend(further.iter().map(|f| (*f).to_owned()));
        for agent in lab.agents() {
            let address = format!("https://{}", std::net::SocketAddr::new(ip, 15012));
            agent.set_flags(&[
                "--authority",
                "grpc",
                "--ca-address",
                &address,
                "--ca-root-file",
                &text(dir.join("bundle.pem")),
                "--ca-token-file",
                &text(agent_token(dir, &agent.node().name)),
                "--svid-ttl",
                "20s",
                "--log-format",
                "json",
            ]);
        }
        let mut attested = Self { mesh, authority: None, flags, starts: 0 };
        attested.start_authority()?;
        attested.mesh.lab.start_agents()?;
        for pod in attested.mesh.lab.pods() {
            let state = if pod.namespace() == "shop" { "served" } else { "off" };
            attested.mesh.lab.wait_state(&pod, state)?;
        }
        Ok(attested)
    }

    fn start_authority(&mut self) -> Result<()> {
        self.starts += 1;
        let name = format!("authority-{}", self.starts);
        let lab = &self.mesh.lab;
        let place = lab.node("node-1")?.system_place();
        let logs = lab.directory().join("logs");
        self.authority = Some(Authority::start(&name, &logs, Some(&place), &self.flags)?);
        Ok(())
    }

    /// `kill -9`.
    fn kill_authority(&mut self) {
        self.authority = None;
    }

    /// The running authority's metrics.
    fn metrics(&self) -> Result<Metrics> {
        self.authority.as_ref().context("it does not run")?.metrics()
    }

    fn load(&self) -> Result<Running> {
        let load = Load {
            to: self.mesh.payments.at(HTTP),
            path: "/marker-5c1d".into(),
            interval_ms: 20,
            parallel: 2,
            ..Load::default()
        };
        let running = self.mesh.frontend.start(&Role::Load(load))?;
        running.wait_event("change", TIMEOUT)?;
        Ok(running)
    }

    /// (identity, when obtained, when it ends) of every SVID that an agent got, in order.
    fn obtained(&self) -> Result<Vec<(String, jiff::Timestamp, jiff::Timestamp)>> {
        let mut all = Vec::new();
        for agent in self.mesh.lab.agents() {
            for line in agent.logged().lines() {
                let Ok(line) = serde_json::from_str::<Value>(line) else { continue };
                if line["message"] != "SVID obtained" {
                    continue;
                }
                let text = |field: &str| {
                    line[field].as_str().with_context(|| format!("{field} in {line}"))
                };
                let id = format!("{} {}", agent.node().name, text("id")?);
                all.push((id, text("timestamp")?.parse()?, text("not_after")?.parse()?));
            }
        }
        Ok(all)
    }
}

/// The file with the token that a node's agent presents.
fn agent_token(dir: &Path, node: &str) -> PathBuf {
    dir.join(format!("agent-token-{node}"))
}

/// Every request was answered, and there were some.
fn all_answered(report: &LoadReport) -> Result<()> {
    ensure!(report.total() > 100 && report.answered() == report.total(), "{report:?}");
    Ok(())
}

#[test]
fn short_lives_under_traffic_an_authority_away_and_back() -> Result<()> {
    // `cargo xtask test --soak`: fifty accounts for three minutes.
    let (accounts, steady) = match std::env::var_os("SIGNET_LAB_STORM") {
        Some(_) => (50, Duration::from_secs(155)),
        None => (20, Duration::from_secs(25)),
    };
    let mut attested = Attested::start(accounts, &[])?;
    // Lives on end, and a pause of the authority that is shorter than what is left at half-life.
    let mut load = attested.load()?;
    thread::sleep(steady);
    let before = attested.obtained()?;
    attested.kill_authority();
    thread::sleep(Duration::from_secs(4));
    attested.start_authority()?;
    thread::sleep(Duration::from_secs(20));
    let report: LoadReport = load.finish_and_report(TIMEOUT)?;
    all_answered(&report)?;

    // While the authority was there, nothing was renewed after 75 % of its life.
    let mut last: BTreeMap<String, jiff::Timestamp> = BTreeMap::new();
    let mut renewals = 0;
    for (id, at, not_after) in before {
        if let Some(end) = last.insert(id.clone(), not_after) {
            renewals += 1;
            let left = end.duration_since(at).as_secs_f64();
            ensure!(left >= TTL.as_secs_f64() * 0.25, "{id}: renewed {left} s before its end");
        }
    }
    ensure!(renewals >= accounts, "renewals were seen: {renewals}");
    for agent in attested.mesh.lab.agents() {
        eventually("an agent's metrics count what it logs", TIMEOUT, || {
            let metrics = agent.metrics()?;
            let name = &agent.node().name;
            let logged = attested.obtained()?.iter().filter(|o| o.0.starts_with(name)).count();
            let requests = |labels: &[(&str, &str)]| metrics.sum("svid_requests_total", labels);
            let issued = requests(&[("use", "tunnel"), ("result", "issued")]);
            let renewed = requests(&[("kind", "renewal"), ("result", "issued")]);
            ensure!(issued == logged as f64, "{issued} counted, {logged} logged");
            ensure!(renewed > 0.0 && renewed < issued);
            let refreshes = metrics.sum("bundle_refreshes_total", &[("result", "ok")]);
            ensure!(refreshes >= 1.0, "no refresh of the bundle");
            Ok(Some(()))
        })?;
    }

    // Past the end: refused, with the reason; then it heals by itself.
    attested.kill_authority();
    thread::sleep(TTL + Duration::from_secs(3));
    let payments = attested.mesh.payments.clone();
    let refused = attested.mesh.frontend.curl(&payments.url(HTTP, "/marker-5c1d"))?;
    ensure!(refused.code() != 0, "no SVID is valid: {}", refused.stdout);
    attested.mesh.lab.agent("node-1")?.wait_flow(
        "a refusal with its reason",
        &["--verdict", "dropped"],
        |flow| flow.is("DROPPED", "svid_expired"),
    )?;
    let metrics = attested.mesh.lab.agent("node-1")?.metrics()?;
    let held = |state| metrics.sum("svids", &[("use", "tunnel"), ("state", state)]);
    ensure!(held("valid") == 0.0 && held("expired") > 0.0 && held("missing") == 0.0, "{metrics:?}");
    ensure!(metrics.sum("svids_failing", &[("use", "tunnel")]) == held("expired"));
    ensure!(metrics.sum("svid_requests_total", &[("result", "unreachable")]) > 0.0);
    attested.start_authority()?;
    eventually("it heals", Duration::from_secs(45), || {
        let answer = attested.mesh.frontend.curl(&payments.url(HTTP, "/marker-5c1d"))?;
        Ok((answer.code() == 0).then_some(()))
    })
    .with_context(|| attested.mesh.logs())?;
    Ok(())
}

#[test]
fn a_root_is_replaced_under_traffic_and_interrupted_at_each_step() -> Result<()> {
    let mut attested = Attested::start(2, &["--refresh-hint", "2s"])?;
    let dir = attested.mesh.lab.directory().to_owned();
    let bundle = || std::fs::read_to_string(dir.join("bundle.pem"));
    let roots = |text: &str| text.matches("BEGIN CERTIFICATE").count();
    let old = bundle()?;
    ensure!(roots(&old) == 1);
    // Somebody who has the old root's key gets in, as long as it counts.
    let store: Value = serde_json::from_slice(&std::fs::read(dir.join("store/authority.json"))?)?;
    let stolen = dir.join("stolen");
    std::fs::create_dir(&stolen)?;
    std::fs::write(stolen.join("root.pem"), store["roots"][0]["pem"].as_str().context("pem")?)?;
    let frontend = "spiffe://cluster.local/ns/shop/sa/frontend";
    let certificate =
        Forger::with_stolen_root(&stolen, &stolen)?.sign("forged", &Leaf::of(&[frontend]))?;
    let attack = |mesh: &Mesh| -> Result<HostileReport> {
        let role = HostileClient {
            to: mesh.payments.at(TUNNEL_PORT),
            certificate: Some(certificate.clone()),
            authority: mesh.payments.at(TCP).to_string(),
            ..HostileClient::default()
        };
        mesh.reports.run(&Role::HostileClient(role), TIMEOUT)
    };
    let report = attack(&attested.mesh)?;
    ensure!(report.reached == "tunnel", "the control: {report:?}");
    let mut load = attested.load()?;

    // A node whose agent does not report holds the rotation up, and is named.
    let token_file = agent_token(&dir, "node-2");
    let token = std::fs::read_to_string(&token_file)?;
    std::fs::write(&token_file, "x".repeat(40))?;
    let mut arguments: Vec<String> = vec!["rotate-root".into()];
    arguments.extend(attested.flags.iter().cloned());
    let rotate = |timeout: &str| {
        let mut arguments = arguments.clone();
        arguments.extend(["--timeout".into(), timeout.into()]);
        let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
        authority::command(&arguments)
    };
    let waiting = rotate("6s")?;
    std::fs::write(&token_file, token)?;
    ensure!(
        waiting.code() == 1 && waiting.stderr.contains("node-2"),
        "{} {}",
        waiting.stdout,
        waiting.stderr
    );
    // Interrupted while the new root is published …
    attested.kill_authority();
    attested.start_authority()?;
    let both = eventually("both roots are published", TIMEOUT, || {
        Ok(Some(bundle()?).filter(|text| roots(text) == 2))
    })?;
    ensure!(both.contains(old.trim()));
    let phase = |attested: &Attested, phase| -> Result<f64> {
        Ok(attested.metrics()?.sum("authority_rotation_phase", &[("phase", phase)]))
    };
    ensure!(phase(&attested, "published")? == 1.0 && phase(&attested, "none")? == 0.0);
    eventually("the new root signs", TIMEOUT, || {
        let answer = rotate("0s")?;
        Ok(answer.stdout.contains("signing:").then_some(()))
    })?;
    // … and while it signs.
    attested.kill_authority();
    attested.start_authority()?;
    let begin = Instant::now();
    let done = rotate("90s")?;
    ensure!(done.code() == 0, "{} {}", done.stdout, done.stderr);
    let new = eventually("the old root is gone", TIMEOUT, || {
        Ok(Some(bundle()?).filter(|text| roots(text) == 1))
    })?;
    ensure!(new != old, "another root");
    eventually("the metrics say that it is over", TIMEOUT, || {
        Ok((phase(&attested, "none")? == 1.0 && phase(&attested, "signing")? == 0.0).then_some(()))
    })?;
    eventually("both agents have told of the new bundle", TIMEOUT, || {
        let reports = attested.metrics()?;
        let current = reports.sum("authority_bundle_reports", &[("bundle", "current")]);
        Ok((current == 2.0).then_some(()))
    })?;
    // Long enough for the agents to follow: their bundle has one root again.
    for agent in attested.mesh.lab.agents() {
        eventually("the agent has the new bundle alone", TIMEOUT, || {
            let status = agent.status()?;
            Ok((status["identity"]["roots"] == 1).then_some(()))
        })?;
    }
    let report: LoadReport = load.finish_and_report(TIMEOUT)?;
    all_answered(&report).with_context(|| format!("after {:?}", begin.elapsed()))?;

    let dropped = || -> Result<u64> {
        let status = attested.mesh.lab.agent("node-2")?.status()?;
        Ok(status["events"]["droppedByReason"]["untrusted_peer"].as_u64().unwrap_or_default())
    };
    let before = dropped()?;
    let report = attack(&attested.mesh)?;
    ensure!(report.reached != "tunnel" && report.seen.is_none(), "the old root counts: {report:?}");
    eventually("it is counted as untrusted", TIMEOUT, || Ok((dropped()? > before).then_some(())))?;
    Ok(())
}

#[test]
fn pods_fetch_what_the_authority_signed_and_follow_rotation() -> Result<()> {
    let mut attested = Attested::start(0, &["--refresh-hint", "2s"])?;
    let outcome = workloads(&mut attested);
    outcome.inspect_err(|_| eprintln!("{}", attested.mesh.logs()))
}

fn workloads(attested: &mut Attested) -> Result<()> {
    let (frontend, intruder) = (attested.mesh.frontend.clone(), attested.mesh.intruder.clone());
    let dir = attested.mesh.lab.directory().to_owned();
    let id = "spiffe://cluster.local/ns/shop/sa/frontend";
    let followers = [
        start_rust(&attested.mesh.lab, &frontend, &["watch"])?,
        start_rust(&attested.mesh.lab, &intruder, &["watch"])?,
    ];
    ensure!(followers[0].wait_event("svid", TIMEOUT)?["id"] == id);

    // What is fetched leads to the authority's root, by somebody else's reckoning.
    let target = dir.join("tls").display().to_string();
    let written = &["x509", "--write", &target, "-o", "json"];
    let written = fetch(&attested.mesh.lab, frontend.place(), written)?.success()?;
    ensure!(serde_json::from_str::<Value>(&written)?["spiffeId"] == id, "{written}");
    let (roots, chain) =
        (dir.join("bundle.pem").display().to_string(), format!("{target}/svid.pem"));
    let verify = ["verify", "-x509_strict", "-CAfile", &roots, "-untrusted", &chain, &chain];
    let verified = Command::new("openssl").args(verify).output()?;
    ensure!(verified.status.success(), "{}", String::from_utf8_lossy(&verified.stderr));
    let alone = Command::new("openssl").args(["verify", "-CAfile", &roots, &chain]).output()?;
    ensure!(!alone.status.success(), "the control: an intermediate is between them");

    // Tokens, by another's client and by ours: signed with a key that the replicas share.
    let tokens = start_rust(&attested.mesh.lab, &frontend, &["jwt", "--audience", "payments"])?;
    let token = tokens.wait_event("jwt", TIMEOUT)?;
    ensure!(token["id"] == id && token["jwtDomains"] == 1, "{token}");
    let ask = |attested: &Attested, audience: &str| {
        fetch(&attested.mesh.lab, frontend.place(), &["jwt", "--audience", audience])
    };
    let first = ask(attested, "ledger")?.success()?;
    let store: Value = serde_json::from_slice(&std::fs::read(dir.join("store/authority.json"))?)?;
    let kid = store["jwtKeys"][0]["kid"].as_str().context("no key in the store")?;
    let head = first.trim().split('.').next().unwrap_or_default();
    ensure!(decoded(head)?.contains(kid), "{first} is not by {kid}");
    ensure!(ask(attested, "ledger")?.success()? == first, "not handed out again");
    let issued = attested
        .metrics()?
        .sum("authority_audit_events_total", &[("outcome", "issued"), ("method", "FetchJWTSVID")]);
    ensure!(issued == 2.0, "{issued} tokens were signed");
    let agent = attested.mesh.lab.agent("node-1")?;
    let counted = |result| {
        Ok::<_, anyhow::Error>(agent.metrics()?.sum("jwt_svids_total", &[("result", result)]))
    };
    ensure!(counted("issued")? == 2.0 && counted("cached")? == 1.0 && counted("failed")? == 0.0);

    // Rotation arrives, across a time without the authority.
    for follower in &followers {
        followed(follower, 2)?;
    }
    attested.kill_authority();
    ensure!(ask(attested, "ledger")?.success()? == first, "what is good is good");
    let refused = ask(attested, "somebody new")?;
    ensure!(refused.code() == 4 && refused.stderr.contains("does not answer"), "{refused:?}");
    attested.start_authority()?;
    for follower in &followers {
        followed(follower, 4)?;
        let printed = follower.printed();
        let leaves: BTreeSet<&str> = printed.iter().filter_map(|v| v["leaf"].as_str()).collect();
        let svids = printed.iter().filter(|v| v["event"] == "svid").count();
        ensure!(leaves.len() == svids, "a certificate came twice: {printed:?}");
    }
    ensure!(ask(attested, "somebody new")?.code() == 0);
    Ok(())
}

/// Base64url without padding, as text; by the alphabet's definition (RFC 4648, section 5).
fn decoded(text: &str) -> Result<String> {
    const ALPHABET: &[u8] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_";
    let (mut bits, mut held, mut out) = (0u32, 0u32, Vec::new());
    for c in text.bytes() {
        let value = ALPHABET.iter().position(|a| *a == c).context("not base64url")?;
        bits = bits << 6 | value as u32;
        held += 6;
        if held >= 8 {
            held -= 8;
            out.push((bits >> held) as u8);
        }
    }
    Ok(String::from_utf8(out)?)
}
