//! What most tests begin with: two nodes, a strict shop, a legacy namespace, both agents.

use std::{net::SocketAddr, time::Duration};

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};
use signet_lab::{
    Lab, LabOptions, Service,
    agent::Flow,
    eventually,
    pod::Pod,
    traffic::{Role, reports::DialReport, roles::Dial},
};

/// Longest that a role of a test may take.
pub const TIMEOUT: Duration = Duration::from_secs(60);
/// Longest that a change of a label or policy may take to be in force on a busy machine.
pub const CHANGE: Duration = Duration::from_secs(10);

/// HTTP port of the servers.
pub const HTTP: u16 = 8080;
/// TCP port of the servers.
pub const TCP: u16 = 9000;
/// UDP port of the servers.
pub const UDP: u16 = 9001;

/// The lab with its usual pods.
pub struct Mesh {
    pub lab: Lab,
    /// `shop/frontend` on node-1, account `frontend`.
    pub frontend: Pod,
    /// `shop/intruder` on node-1, account `intruder`.
    pub intruder: Pod,
    /// `shop/payments` on node-2, account `payments`: HTTP, TCP and UDP servers.
    pub payments: Pod,
    /// `legacy/reports` on node-1: HTTP, TCP and UDP servers; never enrolled.
    pub reports: Pod,
    /// `shop/payments`, port 80.
    pub service: Service,
}

impl Mesh {
    /// `shop` in the given mode, agents ready, pods known to them.
    pub fn start(mode: Option<&str>) -> Result<Self> {
        Self::with(LabOptions::default(), mode)
    }

    /// The same with options.
    pub fn with(options: LabOptions, mode: Option<&str>) -> Result<Self> {
        let mesh = Self::without_agents(options, mode)?;
        mesh.lab.start_agents()?;
        let state = state_of(mode.unwrap_or("off"));
        for pod in [&mesh.frontend, &mesh.intruder, &mesh.payments] {
            mesh.lab.wait_state(pod, state)?;
        }
        mesh.lab.wait_state(&mesh.reports, "off")?;
        Ok(mesh)
    }

    /// Pods run, no agent does.
    pub fn without_agents(options: LabOptions, mode: Option<&str>) -> Result<Self> {
        let lab = Lab::with(options)?;
        lab.namespace("shop", mode)?;
        lab.namespace("legacy", None)?;
        for account in ["frontend", "intruder", "payments"] {
            lab.cluster().service_account("shop", account)?;
        }
        let service =
            lab.service("shop", "payments", "payments", &[("http", 80, "http".into())])?;
        let payments = server(&lab, "node-2", "shop", "payments")?;
        let reports = server(&lab, "node-1", "legacy", "reports")?;
        let frontend = lab.pod("shop", "frontend").service_account("frontend").start()?;
        let intruder = lab.pod("shop", "intruder").service_account("intruder").start()?;
        for pod in [&payments, &reports, &frontend, &intruder] {
            pod.wait_published()?;
        }
        Ok(Self { lab, frontend, intruder, payments, reports, service })
    }

    /// An ALLOW: only these accounts of `shop` reach `payments` over TCP.
    pub fn allow_payments(&self, accounts: &[&str]) -> Result<()> {
        self.lab.cluster().apply(policy(
            "payments-callers",
            "Allow",
            "payments",
            json!([{"from": [{"serviceAccounts": accounts}]}]),
        ))
    }

    /// Both agents' logs, for messages.
    pub fn logs(&self) -> String {
        self.lab.agent_logs(60)
    }
}

/// A pod with HTTP, TCP and UDP servers, its account named like itself where it exists.
pub fn server(lab: &Lab, node: &str, namespace: &str, name: &str) -> Result<Pod> {
    let account = if namespace == "shop" { name } else { "default" };
    lab.pod_on(lab.node(node)?, namespace, name)
        .service_account(account)
        .container("main", Role::http(HTTP))
        .container("tcp", Role::tcp(TCP))
        .container("udp", Role::udp(UDP))
        .port("http", HTTP)
        .start()
}

/// An IdentityPolicy of `shop` with ingress rules.
pub fn policy(name: &str, action: &str, app: &str, ingress: Value) -> Value {
    json!({
        "apiVersion": "signet.dev/v1alpha1", "kind": "IdentityPolicy",
        "metadata": {"name": name, "namespace": "shop"},
        "spec": {
            "selector": {"matchLabels": {"app": app}}, "action": action, "ingress": ingress,
        },
    })
}

/// What `signet endpoints` says of a pod in a mode, once all is in place.
pub fn state_of(mode: &str) -> &'static str {
    match mode {
        "off" => "off",
        "observe" => "observed",
        _ => "served",
    }
}

/// One dial with a text.
pub fn dial(client: &Pod, to: SocketAddr, text: &str) -> Result<DialReport> {
    client.run(&Role::dial(to, text), TIMEOUT)
}

/// Dials until answered: what was changed or started takes a moment to reach the other node.
pub fn answered_soon(client: &Pod, to: SocketAddr) -> Result<DialReport> {
    eventually(&format!("{} reaches {to}", client.full_name()), CHANGE, || {
        let report = dial(client, to, "warm-up")?;
        if report.answered() {
            return Ok(Some(report));
        }
        bail!("{report:?}")
    })
}

/// Dials until refused (by an error at connect or a reset, never by a clean end).
pub fn refused_soon(client: &Pod, to: SocketAddr) -> Result<DialReport> {
    eventually(&format!("{} is refused at {to}", client.full_name()), CHANGE, || {
        let report = dial(client, to, "refuse-me")?;
        if report.refused() {
            return Ok(Some(report));
        }
        bail!("{report:?}")
    })
}

/// A dial that must be refused now.
pub fn refused(client: &Pod, to: SocketAddr, text: &str) -> Result<DialReport> {
    let report = dial(client, to, text)?;
    ensure!(report.refused(), "{} -> {to}: {report:?}", client.full_name());
    Ok(report)
}

/// A dial that must be answered now.
pub fn answered(client: &Pod, to: SocketAddr, text: &str) -> Result<DialReport> {
    let report = dial(client, to, text)?;
    ensure!(report.answered(), "{} -> {to}: {report:?}", client.full_name());
    Ok(report)
}

/// The verdict record of one reporter about a flow between two pods (or addresses).
pub fn verdict(
    mesh: &Lab,
    node: &str,
    reporter: &str,
    source: &str,
    destination: &str,
    verdict: &str,
    reason: &str,
) -> Result<Flow> {
    mesh.agent(node)?
        .wait_flow(
            &format!("{reporter} says {source} -> {destination} {verdict} {reason}"),
            &[],
            |flow| {
                flow.reporter == reporter
                    && flow.between(source, destination)
                    && flow.is(verdict, reason)
            },
        )
        .with_context(|| mesh.agent_logs(20))
}

/// Runs a test; a failure shows the agents' logs.
pub fn with_logs(mesh: &Mesh, test: impl FnOnce(&Mesh) -> Result<()>) -> Result<()> {
    let outcome = test(mesh);
    if outcome.is_err() {
        eprintln!("{}", mesh.logs());
    }
    outcome
}

/// A dial with further settings.
pub fn dial_with(client: &Pod, role: Dial) -> Result<DialReport> {
    client.run(&Role::Dial(role), TIMEOUT)
}

/// True when the agents run with kernel features masked.
pub fn is_masked() -> bool {
    std::env::var_os("SIGNET_MASK_FEATURES").is_some_and(|mask| !mask.is_empty())
}

/// True when a real container runtime makes the pods.
pub fn is_contained() -> bool {
    std::env::var("SIGNET_LAB_BACKEND").is_ok_and(|backend| backend == "containerd")
}

/// True for an outcome that programs retry: the refusal of a pod that is not known yet. A
/// kernel that cannot choose the errno (or is told so) says EPERM.
pub fn retriable(outcome: &str) -> bool {
    let masked = std::env::var_os("SIGNET_MASK_FEATURES").is_some();
    outcome == "connect:ECONNREFUSED" || (masked && outcome == "connect:EPERM")
}
