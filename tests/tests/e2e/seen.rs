//! What was denied is told the same way everywhere: by `signet flows`, by the metrics, and on the
//! page of `signet ui`.

use std::{
    collections::{BTreeMap, BTreeSet},
    io::{BufRead, BufReader},
    process::{Child, Command, Stdio},
    time::Duration,
};

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};
use signet_lab::{
    eventually,
    metrics::Metrics,
    process::signet_binary,
    traffic::{Role, reports::ConnectFloodReport, roles::ConnectFlood},
};

use crate::mesh::{Mesh, TCP, TIMEOUT, answered_soon, policy, refused, refused_soon, with_logs};

/// `signet ui` over the agents of both nodes, until it is dropped.
struct Ui {
    child: Child,
    origin: String,
    cookie: String,
}

impl Drop for Ui {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Ui {
    fn start(mesh: &Mesh) -> Result<Self> {
        let mut command = Command::new(signet_binary()?);
        command.arg("ui").env_remove("SIGNET_SOCKET");
        for node in ["node-1", "node-2"] {
            command.arg("--socket").arg(mesh.lab.agent(node)?.socket());
        }
        let mut child = command.stdout(Stdio::piped()).stderr(Stdio::null()).spawn()?;
        let mut url = String::new();
        BufReader::new(child.stdout.take().context("stdout")?).read_line(&mut url)?;
        let (origin, token) = url.trim().split_once("/?token=").context("an address")?;
        Ok(Self { child, origin: origin.into(), cookie: format!("signet-ui={token}") })
    }

    /// The picture that a page gets first.
    fn graph(&self) -> Result<Value> {
        let url = format!("{}/api/live", self.origin);
        let mut curl = Command::new("curl")
            .args(["-sS", "-N", "--max-time", "10", "-b", &self.cookie, &url])
            .stdout(Stdio::piped())
            .spawn()?;
        let told = BufReader::new(curl.stdout.take().context("stdout")?)
            .lines()
            .map_while(Result::ok)
            .find_map(|line| line.strip_prefix("data: ").map(str::to_owned));
        curl.kill()?;
        curl.wait()?;
        serde_json::from_str(&told.context("nothing was told")?).context("a picture")
    }
}

/// Denials by reason: client and server.
type Denials = BTreeMap<String, BTreeSet<(String, String)>>;

fn on_the_page(graph: &Value) -> Denials {
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let mut denials = Denials::new();
    for edge in graph["edges"].as_array().into_iter().flatten() {
        if edge["verdict"] == "DROPPED" {
            let pair = (text(&edge["from"]), text(&edge["to"]));
            denials.entry(text(&edge["reason"])).or_default().insert(pair);
        }
    }
    denials
}

#[test]
fn a_denial_is_told_the_same_way_everywhere() -> Result<()> {
    let mesh = Mesh::start(Some("strict"))?;
    with_logs(&mesh, |mesh| {
        let to = mesh.payments.at(TCP);
        mesh.allow_payments(&["frontend"])?;
        answered_soon(&mesh.frontend, to)?;
        refused_soon(&mesh.intruder, to)?;
        refused(&mesh.intruder, to, "by policy")?;
        refused(&mesh.reports, to, "in clear")?;
        // And by name: with these there is every reason for which the demo refuses.
        let by_name = json!([{"from": [{"serviceAccounts": ["intruder"]}]}]);
        mesh.lab.cluster().apply(policy("no-intruder", "Deny", "payments", by_name))?;
        let agent = mesh.lab.agent("node-2")?;
        eventually("the intruder is denied by name", TIMEOUT, || {
            refused(&mesh.intruder, to, "by name")?;
            let told = agent.flows(&["--reason", "policy_deny", "--node", "node-2"])?;
            Ok((!told.is_empty()).then_some(()))
        })?;

        let ui = Ui::start(mesh)?;
        let payments = "shop/payments".to_owned();
        let expected: Denials = [
            ("policy_no_match", "shop/intruder"),
            ("policy_deny", "shop/intruder"),
            ("plaintext_refused", "legacy/default"),
        ]
        .map(|(reason, client)| (reason.to_owned(), [(client.to_owned(), payments.clone())].into()))
        .into();
        eventually("the page has the denials", TIMEOUT, || {
            let graph = ui.graph()?;
            let mut shown = on_the_page(&graph);
            // A dial that the change of the policy caught has a reason of its own.
            shown.remove("right_withdrawn");
            if shown == expected {
                return Ok(Some(()));
            }
            bail!("{shown:?}")
        })?;
        let mut flows = BTreeMap::<String, u64>::new();
        for flow in agent.flows(&["--verdict", "dropped", "--node", "node-2"])? {
            *flows.entry(flow.reason.clone()).or_default() += 1;
        }
        let metrics = agent.metrics()?;
        for reason in expected.keys() {
            let told = flows.get(reason).copied().unwrap_or(0);
            let counted = metrics.sum("drops_total", &[("reason", reason)]);
            ensure!(told > 0 && told as f64 == counted, "{reason}: {told} told, {counted} counted");
        }
        // And what is allowed is on the page as such.
        let graph = ui.graph()?;
        let forwarded = graph["edges"].as_array().into_iter().flatten().any(|edge| {
            edge["from"] == "shop/frontend"
                && edge["verdict"] == "FORWARDED"
                && edge["via"] == "mtls"
        });
        ensure!(forwarded, "{graph}");
        Ok(())
    })
}

/// Resident memory of a process, in KiB (proc_pid_status(5)).
fn resident(pid: u32) -> Result<u64> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status"))?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).context("VmRSS")?;
    Ok(line.trim().trim_end_matches(" kB").parse()?)
}

#[test]
fn one_denial_is_found_in_another_pods_flood() -> Result<()> {
    let mesh = Mesh::start(Some("strict"))?;
    with_logs(&mesh, |mesh| {
        let Mesh { lab, frontend, intruder, payments, .. } = mesh;
        let to = payments.at(TCP);
        // Refused at connect, so that as many come as the pod can make.
        let nobody = json!({
            "apiVersion": "signet.dev/v1alpha1", "kind": "IdentityPolicy",
            "metadata": {"name": "no-way-out", "namespace": "shop"},
            "spec": {
                "action": "Deny", "egress": [{"to": [{"serviceAccounts": ["payments"]}]}],
            },
        });
        answered_soon(frontend, to)?;
        lab.cluster().apply(nobody)?;
        refused_soon(intruder, to)?;
        refused_soon(frontend, to)?;
        let agent = lab.agent("node-1")?;
        let denied = [("reason", "policy_deny")];
        let lost = |m: &Metrics| m.sum("lost_events_total", &[]);
        // What the kernel has counted is told a moment later.
        let before = eventually("what was denied so far is told", TIMEOUT, || {
            let now = agent.metrics()?;
            let told = now.sum("drops_total", &denied) + lost(&now);
            Ok((told == now.sum("kernel_drops_total", &denied)).then_some(now))
        })?;
        let memory = resident(agent.pid()?)?;
        let of_frontend = ["--from-pod", "shop/frontend", "--verdict", "dropped"];
        let known = agent.flows(&of_frontend)?.len();

        let flood = Role::ConnectFlood(ConnectFlood { to, for_ms: 6_000 });
        let mut flooding = intruder.start(&flood)?;
        std::thread::sleep(Duration::from_secs(3));
        let report = refused(frontend, to, "one of two")?;
        ensure!(report.outcome == "connect:EPERM", "{report:?}");
        eventually("the one denial is found", TIMEOUT, || {
            Ok((agent.flows(&of_frontend)?.len() == known + 1).then_some(()))
        })?;
        let during = resident(agent.pid()?)?;
        let report: ConnectFloodReport =
            serde_json::from_value(flooding.wait_event("report", TIMEOUT)?)?;
        flooding.finish();
        let made = report.outcomes.get("connect:EPERM").copied().unwrap_or(0);
        ensure!(report.outcomes.len() == 1, "{report:?}");
        let rate = made * 1000 / report.took_ms.max(1);
        println!("{made} denials, {rate} a second; memory {memory} KiB, then {during} KiB");
        ensure!(rate > 20_000, "{report:?}: no flood");

        // None is uncounted, and what was not told is said to be missing.
        let all = (made + 1) as f64;
        let (told, missing) = eventually("every denial is told or missing", TIMEOUT, || {
            let after = agent.metrics()?;
            let grown = |name| after.sum(name, &denied) - before.sum(name, &denied);
            let (told, missing) = (grown("drops_total"), lost(&after) - lost(&before));
            if grown("kernel_drops_total") == all && told + missing == all {
                return Ok(Some((told, missing)));
            }
            bail!("{told} told, {missing} lost, {all} made; {}", grown("kernel_drops_total"))
        })?;
        ensure!(missing > 0.0, "{told} told");
        let shown = agent.cli(&["flows", "--last", "1"])?;
        ensure!(shown.stderr.contains("node-1 lost"), "{}", shown.stderr);
        ensure!(during < memory + 30 * 1024, "{memory} KiB, then {during} KiB");
        Ok(())
    })
}
