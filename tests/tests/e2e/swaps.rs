//! A pod's policy is swapped as a whole: under load every verdict is the old set's or the new
//! one's; and one that does not fit closes its own pod only.

use std::{
    collections::BTreeMap,
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use signet_lab::{
    agent::Flow,
    cluster_dir::{ObjectKey, to_yaml},
    eventually,
    pod::Pod,
    traffic::{Role, reports::HammerReport, roles::Hammer},
};

use crate::mesh::{
    CHANGE, Mesh, TCP, TIMEOUT, answered, answered_soon, dial, policy, refused_soon, with_logs,
};

/// Between two swaps.
const PERIOD: Duration = Duration::from_millis(10);

/// A set of two policies in one file: whom `allowed` is, comes in; `denied` does not. A rule of
/// service accounts for tunnels, one of addresses for plaintext.
fn set(name: &str, allowed: (&str, &Pod), denied: (&str, &Pod)) -> Result<String> {
    let rules = |(account, plain): (&str, &Pod)| {
        let blocks: Vec<String> = plain.ips().iter().map(ToString::to_string).collect();
        json!([{"from": [{"serviceAccounts": [account]}]}, {"from": [{"ipBlocks": blocks}]}])
    };
    let allow = policy(&format!("{name}-allow"), "Allow", "payments", rules(allowed));
    let deny = policy(&format!("{name}-deny"), "Deny", "payments", rules(denied));
    Ok(format!("{}---\n{}", to_yaml(&allow)?, to_yaml(&deny)?))
}

fn hammer(from: &Pod, mesh: &Mesh, ended: &AtomicBool) -> Result<u64> {
    let to: Vec<_> = mesh.payments.all_at(TCP).into_iter().map(|to| (to, 0)).collect();
    let mut tried = 0;
    while !ended.load(Ordering::Relaxed) {
        let role = Hammer { to: to.clone(), count: 60, parallel: 4, ..Hammer::default() };
        let report: HammerReport = from.run(&Role::Hammer(role), TIMEOUT)?;
        ensure!(report.misdirected == 0, "{report:?}");
        tried += report.tried;
    }
    Ok(tried)
}

/// `a` or `b`: whose policy decided.
fn set_of(flow: &Flow) -> Option<char> {
    let name = flow.policy.as_ref()?.name.chars().next()?;
    matches!(name, 'a' | 'b').then_some(name)
}

#[test]
fn under_a_hundred_swaps_a_second_every_verdict_is_one_sets() -> Result<()> {
    let mesh = Mesh::start(Some("permissive"))?;
    with_logs(&mesh, |mesh| {
        let Mesh { lab, frontend, intruder, payments, reports, .. } = mesh;
        let stranger = lab.pod("legacy", "stranger").start()?;
        stranger.wait_published()?;
        lab.wait_state(&stranger, "off")?;
        let sets = [
            set("a", ("frontend", reports), ("intruder", &stranger))?,
            set("b", ("intruder", &stranger), ("frontend", reports))?,
        ];
        lab.cluster().write_file("swapped.yaml", &sets[0])?;
        let agent = lab.agent("node-2")?;
        refused_soon(intruder, payments.at(TCP))?;
        answered_soon(frontend, payments.at(TCP))?;
        answered_soon(reports, payments.at(TCP))?;
        let begun = jiff::Timestamp::now().to_string();

        let ended = AtomicBool::new(false);
        let swaps = thread::scope(|scope| -> Result<u32> {
            let load: Vec<_> = [frontend, intruder, reports, &stranger]
                .map(|pod| scope.spawn(|| hammer(pod, mesh, &ended)))
                .into();
            let start = Instant::now();
            let mut swaps = 0;
            let mut swapping = || -> Result<()> {
                while start.elapsed() < Duration::from_secs(10) {
                    swaps += 1;
                    lab.cluster().write_file("swapped.yaml", &sets[swaps as usize % 2])?;
                    thread::sleep((PERIOD * swaps).saturating_sub(start.elapsed()));
                }
                Ok(())
            };
            let swapped = swapping();
            ended.store(true, Ordering::Relaxed);
            for load in load {
                let tried = load.join().map_err(|_| anyhow::anyhow!("a load panicked"))??;
                ensure!(tried > 0, "a load tried nothing");
            }
            swapped.map(|()| swaps)
        })?;

        let flows = agent.flows(&["--since", &begun])?;
        let decided: Vec<&Flow> = flows
            .iter()
            .filter(|flow| flow.event == "verdict" && flow.reporter == "destination")
            .filter(|flow| flow.destination.full_name() == "shop/payments")
            .collect();
        let mut counts: BTreeMap<(String, char), usize> = BTreeMap::new();
        let mut of_revision: BTreeMap<u64, char> = BTreeMap::new();
        for flow in &decided {
            // An open flow that lost its right, or was caught between its check and its end.
            if flow.reason == "right_withdrawn" {
                continue;
            }
            let name = set_of(flow).with_context(|| format!("decided by neither set: {flow}"))?;
            let expected = match flow.reason.as_str() {
                "allowed" => format!("shop/{name}-allow"),
                _ => format!("shop/{name}-deny"),
            };
            ensure!(flow.policy_name() == expected, "{flow}");
            ensure!(matches!(flow.reason.as_str(), "allowed" | "policy_deny"), "{flow}");
            if flow.via == "mtls" {
                let known = *of_revision.entry(flow.revision).or_insert(name);
                ensure!(known == name, "revision {} decided by both: {flow}", flow.revision);
            }
            *counts.entry((flow.via.clone(), name)).or_default() += 1;
        }
        println!("{swaps} swaps, {} revisions seen, verdicts {counts:?}", of_revision.len());
        for via in ["mtls", "plaintext"] {
            for name in ['a', 'b'] {
                let count = counts.get(&(via.to_owned(), name)).copied().unwrap_or_default();
                ensure!(count >= 5, "{count} verdicts of {name} over {via}: {counts:?}");
            }
        }
        Ok(())
    })
}

/// An ALLOW that needs more kernel entries than a pod may have: each block a class of its own,
/// with ports of its own.
fn too_large() -> Value {
    let rules: Vec<Value> = (0..64)
        .map(|n| {
            let ports: Vec<Value> =
                (0..64).map(|p| json!({"port": 10_000 + n * 128 + p * 2})).collect();
            json!({"from": [{"ipBlocks": [format!("198.51.100.{n}")]}], "ports": ports})
        })
        .collect();
    policy("too-large", "Deny", "intruder", Value::Array(rules))
}

#[test]
fn a_policy_that_does_not_fit_closes_its_own_pod_and_says_so() -> Result<()> {
    let mesh = Mesh::start(Some("permissive"))?;
    with_logs(&mesh, |mesh| {
        let Mesh { lab, frontend, intruder, payments, reports, .. } = mesh;
        for from in [frontend, intruder] {
            answered_soon(from, payments.at(TCP))?;
            answered_soon(from, reports.at(TCP))?;
        }
        lab.cluster().apply(too_large())?;
        let agent = lab.agent("node-1")?;
        agent.wait_problem("kernel entries")?;
        for to in [payments.at(TCP), reports.at(TCP)] {
            eventually("the closed pod reaches nobody", CHANGE, || {
                let report = dial(intruder, to, "closed")?;
                ensure!(report.refused_at_connect(), "{report:?}");
                Ok(Some(()))
            })?;
        }
        agent.wait_flow("it is told", &["--reason", "map_full"], |flow| {
            flow.source.full_name() == "shop/intruder" && flow.is("DROPPED", "map_full")
        })?;
        let list: Value =
            serde_json::from_str(agent.cli(&["policy", "list", "-o", "json"])?.success()?.trim())?;
        let policies = list["policies"].as_array().context("policies")?;
        let policy = policies.iter().find(|p| p["name"] == "too-large").context("too-large")?;
        let enforced = &policy["conditions"][1];
        ensure!(enforced["status"] == "False" && enforced["reason"] == "PodsClosed", "{policy}");
        // Its neighbour in the same namespace on the same node is not touched.
        for to in [payments.at(TCP), reports.at(TCP)] {
            answered(frontend, to, "not me")?;
        }
        lab.cluster().delete(&ObjectKey::new("IdentityPolicy", "shop", "too-large"))?;
        answered_soon(intruder, payments.at(TCP))?;
        answered_soon(intruder, reports.at(TCP))?;
        Ok(())
    })
}
