//! What was denied is told the same way everywhere: by `signet flows`, by the metrics, and on the
//! page of `signet ui`.

use std::{
    collections::{BTreeMap, BTreeSet},
    io::{BufRead, BufReader},
    process::{Child, Command, Stdio},
};

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;
use signet_lab::{eventually, process::signet_binary};

use crate::mesh::{Mesh, TCP, TIMEOUT, answered_soon, refused, refused_soon, with_logs};

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

        let ui = Ui::start(mesh)?;
        let payments = "shop/payments".to_owned();
        let expected: Denials =
            [("policy_no_match", "shop/intruder"), ("plaintext_refused", "legacy/default")]
                .map(|(reason, client)| {
                    (reason.to_owned(), [(client.to_owned(), payments.clone())].into())
                })
                .into();
        let agent = mesh.lab.agent("node-2")?;
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
