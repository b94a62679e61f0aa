//! A hundred pods a minute: addresses that come again at once for another account, sandboxes
//! that are made anew, objects that go too early or too late; under traffic both ways, with and
//! without faults of the API server. Nobody is taken for somebody else, nothing of an enforced
//! pod is in clear, nothing is left.

mod lives;
mod truth;

use std::{
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use serde_json::json;
use signet_lab::{
    LabOptions,
    api_server::ApiServer,
    capture::Captured,
    eventually, netns,
    process::Running,
    traffic::{
        Role, any,
        roles::{Caller, TcpServer},
        unix_micros,
    },
};

use self::{
    lives::{CLEAR, Churn, FIRST_PORT, FRONTEND, PORTS, SECRET},
    truth::Truth,
};
use crate::{
    held::{Held, as_before},
    mesh::{Mesh, TCP, TIMEOUT, answered_soon, policy, refused_soon, with_logs},
};

/// Between two pods: a hundred a minute.
const PERIOD: Duration = Duration::from_millis(600);

/// How long pods come and go; five minutes in a soak.
fn duration() -> Duration {
    Duration::from_secs(if soak() { 300 } else { 12 })
}

/// How long watches stall, and how long the API server is away; longer than every watch's limit.
fn outages() -> (Duration, Duration) {
    let (stall, down) = if soak() { (30, 120) } else { (6, 5) };
    (Duration::from_secs(stall), Duration::from_secs(down))
}

fn soak() -> bool {
    std::env::var_os("SIGNET_LAB_SOAK").is_some()
}

/// A soak does it twice, in peace and under faults; else the faults begin on the way.
#[test]
fn a_hundred_pods_a_minute_are_nobody_but_themselves() -> Result<()> {
    if soak() {
        churned(LabOptions::default(), truth::API, |_, _| Ok(()))?;
    }
    // Watches come back some time after the server does.
    let (stall, down) = outages();
    let stale = stall + down + Duration::from_secs(20);
    churned(LabOptions { api_server: true, ..LabOptions::default() }, stale, |mesh, ended| {
        thread::sleep(duration() / 4);
        faults(mesh.lab.api_server()?, ended)
    })
}

/// One fault after the other, a moment of health in between.
fn faults(api: &ApiServer, ended: &AtomicBool) -> Result<()> {
    let (stall, down) = outages();
    let health = Duration::from_secs(2);
    let wait = |time: Duration| {
        let until = Instant::now() + time;
        while Instant::now() < until && !ended.load(Ordering::Relaxed) {
            thread::sleep(Duration::from_millis(50));
        }
    };
    while !ended.load(Ordering::Relaxed) {
        api.drop_watches();
        wait(health);
        api.forget_history();
        api.drop_watches();
        wait(health);
        api.set_faults(|faults| faults.stalled = true);
        wait(stall);
        api.set_faults(|faults| *faults = Default::default());
        wait(health);
        api.set_down(true);
        api.forget_history();
        wait(down);
        api.set_down(false);
        wait(health);
        api.set_faults(|faults| faults.refusal = Some(429));
        wait(health / 2);
        api.set_faults(|faults| *faults = Default::default());
        wait(health);
    }
    api.set_faults(|faults| *faults = Default::default());
    api.set_down(false);
    Ok(())
}

/// The run itself; `meanwhile` runs beside it until told. `stale`: see [`Truth`].
fn churned(
    options: LabOptions,
    stale: Duration,
    meanwhile: impl FnOnce(&Mesh, &AtomicBool) -> Result<()> + Send,
) -> Result<()> {
    let mesh = Mesh::with(options, Some("strict"))?;
    with_logs(&mesh, |mesh| {
        let lab = &mesh.lab;
        for account in ["churn-a", "churn-b"] {
            lab.cluster().service_account("shop", account)?;
        }
        lab.cluster().apply(policy(
            "ledger-callers",
            "Allow",
            "ledger",
            json!([{"from": [{"serviceAccounts": ["churn-a", "frontend"]}]}]),
        ))?;
        // Every pod that comes calls a port of its own: a record names its caller by that, too.
        let servers = [("shop", "ledger"), ("legacy", "board")].map(|(namespace, name)| {
            let listen = (0..PORTS).map(|i| any(FIRST_PORT + i)).collect();
            let role = TcpServer { listen, tag: lives::SERVER, ..Default::default() };
            lab.pod_on(lab.node("node-2")?, namespace, name)
                .container("main", Role::TcpServer(role))
                .start()
        });
        let [ledger, board] = servers;
        let (ledger, board) = (ledger?, board?);
        for (pod, state) in [(&ledger, "served"), (&board, "off")] {
            lab.wait_state(pod, state)?;
            pod.wait_published()?;
        }
        answered_soon(&mesh.frontend, ledger.at(FIRST_PORT))?;
        refused_soon(&mesh.intruder, ledger.at(FIRST_PORT))?;

        let churn = Churn::new(mesh, &ledger, &board);
        // What stays by right: one of each kind has been there.
        churn.one_of_each()?;
        churn.take_all();
        let names = netns::named_with_prefix(lab.id().as_str()).len();
        let before = eventually("only those that stay are registered", TIMEOUT, || {
            let held: Vec<Held> = lab.agents().iter().map(Held::of).collect::<Result<_>>()?;
            // frontend, intruder and reports; payments, ledger and board.
            Ok(held.iter().all(|held| held.entries("PODS") == Some(3)).then_some(held))
        })?;

        let capture = lab.capture("churn")?;
        let begun = unix_micros();
        let flows: Vec<Running> =
            lab.agents().iter().map(|agent| agent.follow_flows()).collect::<Result<_>>()?;
        // Many addresses are nobody's at a time: several callers, so that few wait for those.
        let mut frontend = Vec::new();
        for part in churn.addresses(TCP).chunks(6) {
            let caller = Caller {
                to: part.to_vec(),
                text: format!("{FRONTEND} shop/frontend"),
                interval_ms: 20,
                timeout_ms: 250,
            };
            frontend.push(mesh.frontend.start(&Role::Caller(caller))?);
        }
        let ended = AtomicBool::new(false);
        let started = thread::scope(|scope| -> Result<u32> {
            let beside = scope.spawn(|| meanwhile(mesh, &ended));
            let started = churn.run(scope, PERIOD, duration());
            // Also when it failed: the scope waits for what runs beside.
            ended.store(true, Ordering::Relaxed);
            beside.join().map_err(|_| anyhow::anyhow!("the faults' thread panicked"))??;
            started
        })?;
        let mut calls = Vec::new();
        for caller in &mut frontend {
            caller.finish();
            caller.wait_event("report", TIMEOUT)?;
            calls.extend(truth::calls(&caller.printed()));
        }
        drop(frontend);

        // The streams of flows are read behind the flows.
        thread::sleep(Duration::from_secs(1));
        let captured = capture.stop()?;
        let truth = Truth {
            lives: churn.take_all(),
            frontend: &mesh.frontend,
            calls,
            seen: truth::seen_by(&ledger, begun)?,
            flows: truth::records(&flows)?,
            server: &ledger,
            stale,
        };
        drop(flows);
        println!("{started} pods in {:?}", duration());
        truth.hold()?;
        in_clear(captured.complete()?)?;

        // The control: after all that, the next pod is served and answered.
        eventually("a pod that comes now is answered", TIMEOUT, || {
            churn.one()?;
            Ok(churn.take_all().iter().any(|life| life.answered() > 0).then_some(()))
        })?;

        as_before(lab.agents(), &before, TIMEOUT)?;
        let left = netns::named_with_prefix(lab.id().as_str()).len();
        ensure!(left == names, "{left} network namespaces, {names} before");
        Ok(())
    })
    .context("churn")
}

/// Nothing that a pod said which comes and goes enforced crossed in clear.
fn in_clear(captured: &Captured) -> Result<()> {
    let secrets = captured.find(SECRET);
    ensure!(secrets.is_empty(), "in clear: {:?}", &secrets[..secrets.len().min(5)]);
    // The control: the same search finds what pods that are off say on the same link.
    let clear = captured.find(CLEAR);
    ensure!(clear.len() > 20, "{} packets of pods that are off", clear.len());
    println!("in clear: {} packets or streams of pods that are off", clear.len());
    Ok(())
}
