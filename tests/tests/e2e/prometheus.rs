//! Prometheus itself scrapes an agent, and the alerts of `manifests/monitoring` fire and clear.

use std::{collections::BTreeSet, fs, time::Duration};

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};
use signet_lab::{
    eventually,
    process::{Place, Running, prometheus_binary},
    traffic::{Role, roles::Hold},
};

use crate::mesh::{Mesh, TCP, TIMEOUT, answered_soon, refused, refused_soon, with_logs};

const RULES: &str = include_str!("../../../manifests/monitoring/rules.yaml");
const DASHBOARD: &str = include_str!("../../../manifests/monitoring/dashboard.yaml");
const ADDRESS: &str = "127.0.0.1:9090";

/// A minute of the rules is a second here.
fn scaled(text: &str) -> Result<String> {
    let minutes = text.strip_suffix('m').map(|n| n.parse::<u64>()).transpose()?;
    let hours = text.strip_suffix('h').map(|n| n.parse::<u64>()).transpose()?;
    match (minutes, hours) {
        (Some(n), _) => Ok(format!("{n}s")),
        (_, Some(n)) => Ok(format!("{n}m")),
        _ => bail!("{text:?}: in minutes or hours"),
    }
}

/// The shipped rules with every duration a sixtieth.
fn rules() -> Result<Value> {
    let object: Value = serde_saphyr::from_str(RULES).context("rules.yaml")?;
    let mut spec = object["spec"].clone();
    let groups = spec["groups"].as_array_mut().context("groups")?;
    for rule in groups.iter_mut().filter_map(|group| group["rules"].as_array_mut()).flatten() {
        if let Some(wait) = rule["for"].as_str().map(scaled) {
            rule["for"] = json!(wait?);
        }
        let expression = rule["expr"].as_str().context("expr")?;
        let mut parts = expression.split('[');
        let mut text = parts.next().unwrap_or_default().to_owned();
        for part in parts {
            let (range, rest) = part.split_once(']').context("a range's end")?;
            text.push_str(&format!("[{}]{rest}", scaled(range)?));
        }
        rule["expr"] = json!(text);
    }
    Ok(spec)
}

/// Prometheus on a node, scraping that node's agent every second.
struct Prometheus {
    place: Place,
    _running: Running,
}

impl Prometheus {
    fn start(mesh: &Mesh, node: &str) -> Result<Self> {
        let place = mesh.lab.node(node)?.system_place();
        let directory = mesh.lab.directory().join("prometheus");
        fs::create_dir_all(&directory)?;
        // JSON is YAML.
        let config = json!({
            "global": {"scrape_interval": "1s", "scrape_timeout": "1s", "evaluation_interval": "1s"},
            "rule_files": [directory.join("rules.yaml")],
            "scrape_configs": [{
                "job_name": "signet-agent",
                "static_configs": [{
                    "targets": ["127.0.0.1:15020"], "labels": {"instance": node}
                }],
            }],
        });
        fs::write(directory.join("rules.yaml"), rules()?.to_string())?;
        fs::write(directory.join("prometheus.yaml"), config.to_string())?;
        let program = prometheus_binary()?.display().to_string();
        let flags = [
            format!("--config.file={}", directory.join("prometheus.yaml").display()),
            format!("--storage.tsdb.path={}", directory.join("data").display()),
            format!("--web.listen-address={ADDRESS}"),
        ];
        let argv: Vec<&str> =
            [program.as_str()].into_iter().chain(flags.iter().map(String::as_str)).collect();
        let running = place.start_program("prometheus", &argv)?;
        Ok(Self { place, _running: running })
    }

    fn query(&self, expression: &str) -> Result<Value> {
        self.ask("query", &["--data-urlencode", &format!("query={expression}")])
    }

    fn ask(&self, path: &str, arguments: &[&str]) -> Result<Value> {
        let url = format!("http://{ADDRESS}/api/v1/{path}");
        let curl = [&["curl", "-sS", "-G", "--max-time", "5"], arguments, &[url.as_str()]].concat();
        let answer = self.place.run(&curl)?.success()?;
        let answer: Value = serde_json::from_str(&answer).with_context(|| answer.clone())?;
        ensure!(answer["status"] == "success", "{answer}");
        Ok(answer["data"].clone())
    }

    /// The names of the alerts that fire, with their reason where they have one.
    fn firing(&self) -> Result<BTreeSet<String>> {
        let alerts = self.ask("alerts", &[])?;
        let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
        Ok(alerts["alerts"]
            .as_array()
            .into_iter()
            .flatten()
            .filter(|alert| alert["state"] == "firing")
            .map(|alert| match text(&alert["labels"]["reason"]) {
                reason if reason.is_empty() => text(&alert["labels"]["alertname"]),
                reason => format!("{} {reason}", text(&alert["labels"]["alertname"])),
            })
            .collect())
    }

    fn fires(&self, alert: &str, is: bool) -> Result<()> {
        eventually(&format!("{alert} fires: {is}"), TIMEOUT, || {
            let firing = self.firing()?;
            if firing.contains(alert) == is {
                return Ok(Some(()));
            }
            bail!("firing: {firing:?}")
        })
    }
}

/// Every panel's expression is one, and most of them have an answer here.
fn the_dashboard_is_understood(prometheus: &Prometheus) -> Result<()> {
    let object: Value = serde_saphyr::from_str(DASHBOARD).context("dashboard.yaml")?;
    let json = object["data"]["signet.json"].as_str().context("signet.json")?;
    let board: Value = serde_json::from_str(json)?;
    let mut silent = Vec::new();
    let panels = board["panels"].as_array().into_iter().flatten();
    for target in panels.flat_map(|panel| panel["targets"].as_array().into_iter().flatten()) {
        let expression = target["expr"].as_str().context("expr")?;
        let expression = expression
            .replace("$__rate_interval", "30s")
            .replace("$node", ".*")
            .replace("$namespace", ".*");
        let found = prometheus.query(&expression).with_context(|| expression.clone())?;
        if found["result"].as_array().is_none_or(Vec::is_empty) {
            silent.push(expression);
        }
    }
    // No tunnel has failed here, and no API server is watched.
    ensure!(
        silent.len() == 2
            && silent.iter().any(|e| e.contains("signet_tunnel_failures_total"))
            && silent.iter().any(|e| e.contains("signet_watch_silence_seconds")),
        "without an answer: {silent:#?}"
    );
    Ok(())
}

#[test]
fn alerts_fire_and_clear_in_an_incident() -> Result<()> {
    let mesh = Mesh::start(Some("permissive"))?;
    with_logs(&mesh, |mesh| {
        let to = mesh.payments.at(TCP);
        // In clear, which permissive takes and strict would not.
        let hold = Hold { to, count: 3, ..Hold::default() };
        let _holding = mesh.reports.start(&Role::Hold(hold))?;
        let prometheus = Prometheus::start(mesh, "node-2")?;
        eventually("the agent is scraped", TIMEOUT, || {
            let up = prometheus.query("up")?;
            Ok((up["result"][0]["value"][1] == "1").then_some(()))
        })?;
        prometheus.fires("SignetPlaintextLeft", true)?;
        // No authority is scraped here. Nothing else is wrong.
        let wrong = ["SignetAuthorityDown", "SignetPlaintextLeft"].map(str::to_owned);
        let firing = prometheus.firing()?;
        ensure!(firing == BTreeSet::from(wrong), "{firing:?}");
        // The policy closes them.
        mesh.allow_payments(&["frontend"])?;
        answered_soon(&mesh.frontend, to)?;
        refused_soon(&mesh.intruder, to)?;
        eventually("the maps' rows are counted", TIMEOUT, || {
            let fill = prometheus.query("signet_kernel_map_entries{map=\"ADDRESSES\"}")?;
            let rows = fill["result"][0]["value"][1].as_str().context("no ADDRESSES")?;
            Ok((rows.parse::<f64>()? > 0.0).then_some(()))
        })?;

        // Somebody tries what no policy allows.
        let denied = "SignetFlowsDenied policy_no_match";
        for n in 0..15 {
            refused(&mesh.intruder, to, &format!("attempt-{n}"))?;
        }
        prometheus.fires(denied, true)?;
        eventually("the dashboard's panels have answers", TIMEOUT, || {
            the_dashboard_is_understood(&prometheus).map(Some)
        })?;
        let firing = prometheus.firing()?;
        ensure!(!firing.contains("SignetAgentDown"), "{firing:?}");
        prometheus.fires(denied, false)?;

        // The agent goes and comes back.
        let agent = mesh.lab.agent("node-2")?;
        agent.stop()?;
        prometheus.fires("SignetAgentDown", true)?;
        agent.start_ready()?;
        prometheus.fires("SignetAgentDown", false)?;
        // Its own counters began anew: nothing else is said.
        std::thread::sleep(Duration::from_secs(2));
        let firing = prometheus.firing()?;
        ensure!(!firing.contains(denied), "{firing:?}");
        prometheus.fires("SignetPlaintextLeft", false)
    })
}
