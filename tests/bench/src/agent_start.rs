//! From an agent's start until every pod of its node is served.

use std::{
    thread,
    time::{Duration, Instant},
};

use anyhow::{Result, bail, ensure};
use signet_lab::{Lab, LabOptions};

use crate::results::{Results, SIGNET};

/// Longest that a start may take.
const LIMIT: Duration = Duration::from_secs(120);

pub fn run(quick: bool, results: &mut Results) -> Result<()> {
    let (accounts, rounds) = if quick { (20, 1) } else { (200, 3) };
    let lab = Lab::with(LabOptions { nodes: 1, ..Default::default() })?;
    lab.namespace("shop", Some("strict"))?;
    eprintln!("bench: making {accounts} pods");
    for number in 0..accounts {
        let name = format!("web-{number}");
        lab.cluster().service_account("shop", &name)?;
        lab.pod("shop", &name).service_account(&name).start()?;
    }
    for pod in lab.pods() {
        pod.wait_published()?;
    }
    let agent = lab.agent("node-1")?;
    let case = format!("agent-start-{accounts}-accounts");
    for round in 1..=rounds {
        let begin = Instant::now();
        agent.start()?;
        agent.wait_ready()?;
        loop {
            let status = agent.status()?;
            let served = status["pods"]["strict"].as_u64().unwrap_or_default();
            let valid = status["svids"]["valid"].as_u64().unwrap_or_default();
            let waiting = status["pods"]["waiting"].as_u64().unwrap_or_default();
            if served == accounts && valid == accounts && waiting == 0 {
                break;
            }
            if begin.elapsed() > LIMIT {
                bail!("{served} of {accounts} pods are served after {LIMIT:?}: {status}");
            }
            thread::sleep(Duration::from_millis(5));
        }
        results.add(&case, SIGNET, round, begin.elapsed().as_secs_f64(), "s");
        let code = agent.stop()?;
        ensure!(code == Some(0), "the agent ended with {code:?}");
    }
    Ok(())
}
