//! Policies at random, every flow that they can tell apart: what `signet policy check` says is
//! what the kernel and the proxies do.

use std::net::IpAddr;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use signet_lab::{
    eventually,
    pod::Pod,
    traffic::{
        Role, any,
        roles::{TcpServer, UdpServer},
    },
};

use crate::mesh::{CHANGE, Mesh, policy, with_logs};

const SCRIPT: &str = include_str!("dial_many.py");
/// Ports that are dialled.
const PORTS: std::ops::Range<u16> = 9100..9132;
const POLICIES: u64 = 14;

/// A generator that gives the same numbers every time (Knuth's constants).
struct Numbers(u64);

impl Numbers {
    fn below(&mut self, limit: u64) -> u64 {
        self.0 =
            self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % limit
    }

    fn one<'a, T>(&mut self, of: &'a [T]) -> &'a T {
        &of[self.below(of.len() as u64) as usize]
    }
}

/// One rule: somebody (or anybody), some ports.
fn rule(numbers: &mut Numbers, addresses: &[IpAddr]) -> Value {
    let mut peer = json!({});
    match numbers.below(6) {
        0 => peer["serviceAccounts"] = json!([numbers.one(&["frontend", "intruder", "auditor"])]),
        1 => peer["namespaces"] = json!([numbers.one(&["shop", "legacy"])]),
        2 => peer["ipBlocks"] = json!([numbers.one(addresses).to_string()]),
        3 => peer["notIpBlocks"] = json!([numbers.one(addresses).to_string()]),
        4 => {
            peer["identities"] =
                json!([numbers.one(&["*/sa/frontend", "*/ns/legacy/sa/default", "*"])]);
        }
        _ => peer["notServiceAccounts"] = json!([numbers.one(&["frontend", "intruder"])]),
    }
    let first = PORTS.start + numbers.below(28) as u16;
    let mut ports = json!({"port": first, "endPort": first + numbers.below(6) as u16});
    if let Some(protocol) = [None, Some("TCP"), Some("UDP")][numbers.below(3) as usize] {
        ports["protocol"] = json!(protocol);
    }
    let mut rule = json!({"from": [peer], "ports": [ports]});
    if numbers.below(3) == 0 {
        rule["unauthenticated"] = json!(true);
    }
    rule
}

fn policies(addresses: &[IpAddr]) -> Vec<Value> {
    let mut numbers = Numbers(20_261_122);
    (0..POLICIES)
        .map(|n| {
            let action = *numbers.one(&["Allow", "Allow", "Deny", "Audit"]);
            let rules: Vec<Value> =
                (0..=numbers.below(2)).map(|_| rule(&mut numbers, addresses)).collect();
            policy(&format!("random-{n}"), action, "target", Value::Array(rules))
        })
        .collect()
}

/// A flow, and how `policy check` names its source.
struct Sample<'a> {
    from: &'a Pod,
    named: String,
    protocol: &'static str,
    to: IpAddr,
    port: u16,
}

#[test]
fn five_hundred_flows_meet_the_verdict_that_is_told() -> Result<()> {
    let mesh = Mesh::start(Some("permissive"))?;
    with_logs(&mesh, |mesh| {
        let Mesh { lab, frontend, intruder, reports, .. } = mesh;
        let listen: Vec<_> = PORTS.map(any).collect();
        let target = lab
            .pod_on(lab.node("node-2")?, "shop", "target")
            .service_account("payments")
            .container(
                "tcp",
                Role::TcpServer(TcpServer { listen: listen.clone(), ..Default::default() }),
            )
            .container("udp", Role::UdpServer(UdpServer { listen }))
            .start()?;
        target.wait_published()?;
        lab.wait_state(&target, "served")?;
        let stranger = lab.pod("legacy", "stranger").start()?;
        stranger.wait_published()?;
        lab.wait_state(&stranger, "off")?;
        let sources = [
            (frontend, "shop/frontend"),
            (intruder, "shop/intruder"),
            (reports, "legacy/default"),
            (&stranger, "legacy/default"),
        ];

        let mut samples = Vec::new();
        for (from, account) in sources {
            for to in target.ips() {
                let own = from.ips().into_iter().find(|ip| ip.is_ipv4() == to.is_ipv4());
                let own = own.context("an address of the family")?;
                for protocol in ["tcp", "udp"] {
                    for port in PORTS {
                        let named = format!("{account}@{own}");
                        samples.push(Sample { from, named, protocol, to, port });
                    }
                }
            }
        }
        // The control: with no policy every one of them is answered.
        eventually("everything passes", CHANGE, || {
            let found = attempts(&sources, &samples)?;
            let failed = found.iter().filter(|outcome| *outcome != "answered").count();
            ensure!(failed == 0, "{failed} of {} failed", found.len());
            Ok(Some(()))
        })?;

        let addresses: Vec<IpAddr> = sources.iter().flat_map(|(pod, _)| pod.ips()).collect();
        for policy in policies(&addresses) {
            lab.cluster().apply(policy)?;
        }
        for node in ["node-1", "node-2"] {
            let agent = lab.agent(node)?;
            eventually("the policies are in force", CHANGE, || {
                let status = agent.status()?;
                let cluster = &status["cluster"];
                let settled = cluster["revision"] == cluster["applied"];
                Ok((settled && status["policies"]["inForce"].as_u64() >= Some(POLICIES))
                    .then_some(()))
            })
            .with_context(|| agent.status().unwrap_or_default().to_string())?;
        }

        let found = attempts(&sources, &samples)?;
        let agent = lab.agent("node-2")?;
        let (mut allowed, mut refused) = (0, 0);
        let mut wrong = Vec::new();
        for (sample, outcome) in samples.iter().zip(&found) {
            let to = format!("shop/target:{}", sample.port);
            let arguments = [
                "policy",
                "check",
                "--from",
                &sample.named,
                "--to",
                &to,
                "--protocol",
                sample.protocol,
                "-o",
                "json",
            ];
            let told: Value = serde_json::from_str(&agent.cli(&arguments)?.stdout)?;
            let passes = told["verdict"] != "DROPPED";
            if passes {
                allowed += 1;
            } else {
                refused += 1;
            }
            if passes != (outcome == "answered") {
                wrong.push(format!(
                    "{} {} -> {}:{}: told {} {}, was {outcome}",
                    sample.named,
                    sample.protocol,
                    sample.to,
                    sample.port,
                    told["verdict"],
                    told["reason"]
                ));
            }
        }
        println!("{} flows: {allowed} allowed, {refused} refused", samples.len());
        ensure!(wrong.is_empty(), "{} of {}:\n{}", wrong.len(), samples.len(), wrong.join("\n"));
        ensure!(allowed > 50 && refused > 50, "{allowed} allowed, {refused} refused");
        Ok(())
    })
}

/// Tries every sample, each from its pod; the outcomes in the samples' order.
fn attempts(sources: &[(&Pod, &str)], samples: &[Sample<'_>]) -> Result<Vec<String>> {
    let mut outcomes = vec![String::new(); samples.len()];
    for (pod, _) in sources {
        let own: Vec<usize> = (0..samples.len())
            .filter(|n| samples[*n].from.full_name() == pod.full_name())
            .collect();
        let flows: Vec<Value> = own
            .iter()
            .map(|n| json!([samples[*n].protocol, samples[*n].to, samples[*n].port]))
            .collect();
        let argument = Value::Array(flows).to_string();
        let printed = pod.exec(&["python3", "-c", SCRIPT, &argument])?.success()?;
        let found: Vec<String> = serde_json::from_str(&printed)?;
        ensure!(found.len() == own.len(), "{printed}");
        for (n, outcome) in own.into_iter().zip(found) {
            outcomes[n] = outcome;
        }
    }
    Ok(outcomes)
}
