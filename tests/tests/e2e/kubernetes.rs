//! Agents that follow the Kubernetes API instead of a directory: labels, policies, the board
//! and the override work the same, and no fault of the API server makes a wrong verdict.

use std::{
    process::Command,
    sync::atomic::{AtomicBool, AtomicUsize, Ordering},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};
use signet_lab::{
    LabOptions,
    agent::Process,
    api_server::ApiServer,
    cluster_dir::ObjectKey,
    eventually,
    pod::Pod,
    process::signet_binary,
    traffic::{
        Role,
        reports::{HoldReport, LoadReport},
        roles::{Hold, Load},
    },
};

use crate::mesh::{
    CHANGE, HTTP, Mesh, TCP, TIMEOUT, answered, answered_soon, dial, refused_soon, state_of,
    verdict, with_logs,
};

fn options() -> LabOptions {
    LabOptions { api_server: true, ..LabOptions::default() }
}

fn load(to: &Pod) -> Role {
    Role::Load(Load { to: to.at(HTTP), interval_ms: 5, ..Default::default() })
}

fn enforcement(word: &str) -> Value {
    json!({
        "apiVersion": "v1", "kind": "ConfigMap",
        "metadata": {"name": "signet-enforcement", "namespace": "signet-system"},
        "data": {"enforcement": word},
    })
}

/// The uids that a node's NodeEnrolment serves.
fn enrolled(api: &ApiServer, node: &str) -> Vec<String> {
    let object = api.get("nodeenrolments", "", node).unwrap_or_default();
    let served = object["status"]["served"].as_array().cloned().unwrap_or_default();
    served.iter().filter_map(|pod| Some(pod["uid"].as_str()?.to_owned())).collect()
}

/// Dials until the destination has refused with this reason.
fn refused_with(mesh: &Mesh, client: &Pod, reason: &str) -> Result<()> {
    let node = mesh.lab.agent("node-2")?;
    eventually(&format!("{} is refused: {reason}", client.full_name()), CHANGE, || {
        dial(client, mesh.payments.at(TCP), "x")?;
        let flows = node.flows(&["--verdict", "dropped", "--reason", reason])?;
        let found = flows.iter().any(|f| f.between(&client.full_name(), "shop/payments"));
        Ok(found.then_some(()))
    })
}

#[test]
fn labels_policies_and_the_override_work_through_the_api() -> Result<()> {
    let mesh = Mesh::with(options(), None)?;
    with_logs(&mesh, |mesh| {
        let Mesh { lab, frontend, intruder, payments, .. } = mesh;
        let api = lab.api_server()?;
        let mut running = frontend.start(&load(payments))?;
        running.wait_event("change", TIMEOUT)?;
        for mode in
            ["observe", "permissive", "strict", "permissive", "observe", "permissive", "strict"]
        {
            lab.cluster().set_mode("shop", Some(mode))?;
            for pod in [frontend, payments] {
                lab.wait_state(pod, state_of(mode))?;
                eventually(&format!("{mode} in force"), CHANGE, || {
                    let endpoint = lab.agent(&pod.node().name)?.endpoint(pod)?;
                    Ok(endpoint.filter(|e| e["mode"] == mode))
                })?;
            }
            // What the nodes announce to each other takes a moment longer.
            thread::sleep(Duration::from_millis(500));
        }
        let report: LoadReport = running.finish_and_report(TIMEOUT)?;
        ensure!(report.total() > 100 && report.answered() == report.total(), "{report:?}");

        // The board is one object a node.
        for pod in [frontend, intruder, payments] {
            let node = &pod.node().name;
            eventually(&format!("{} is announced", pod.full_name()), CHANGE, || {
                let found = enrolled(api, node).iter().any(|uid| uid == pod.uid());
                Ok(found.then_some(()))
            })?;
        }
        watches_are_shown(mesh)?;
        replaced_agents_stay_announced(mesh, api)?;
        viewers_see_all_nodes(mesh, api)?;
        policies_decide(mesh, api)?;
        the_override_goes_before_all(mesh, api)?;

        // All of that under the shipped roles: no agent asked for more than they allow.
        let asked = api.asked();
        let agent = "system:serviceaccount:signet-system:signet-agent";
        let (may, may_not): (Vec<_>, Vec<_>) =
            asked.iter().filter(|asked| asked.user == agent).partition(|asked| asked.allowed);
        ensure!(may.len() > 20 && may_not.is_empty(), "{may:?} {may_not:?}");

        // An agent that ends un-announces its pods with its last breath.
        lab.agent("node-2")?.stop()?;
        ensure!(enrolled(api, "node-2").is_empty(), "{:?}", enrolled(api, "node-2"));
        Ok(())
    })
}

/// While agents are replaced, and while the old one still drains, the board says what the one
/// that serves says: nobody is taken off it, and nobody is refused.
fn replaced_agents_stay_announced(mesh: &Mesh, api: &ApiServer) -> Result<()> {
    let Mesh { lab, frontend, intruder, payments, .. } = mesh;
    let mut running = frontend.start(&load(payments))?;
    let hold = Hold { to: payments.at(TCP), interval_ms: 20, ..Hold::default() };
    let mut stream = frontend.start(&Role::Hold(hold))?;
    stream.wait_event("open", TIMEOUT)?;
    let (ended, missed) = (AtomicBool::new(false), AtomicUsize::new(0));
    let old = thread::scope(|scope| -> Result<Vec<Process>> {
        scope.spawn(|| {
            while !ended.load(Ordering::Relaxed) {
                for pod in [frontend, intruder, payments] {
                    if !enrolled(api, &pod.node().name).iter().any(|uid| uid == pod.uid()) {
                        missed.fetch_add(1, Ordering::Relaxed);
                    }
                }
                thread::sleep(Duration::from_millis(5));
            }
        });
        let replace = || -> Result<Vec<Process>> {
            let old = lab.agents().iter().map(|agent| agent.succeed(&[]));
            let old = old.collect::<Result<Vec<_>>>()?;
            let late = lab.pod("shop", "later").service_account("frontend").start()?;
            late.wait_published()?;
            lab.wait_state(&late, "served")?;
            let announced = || enrolled(api, &late.node().name).iter().any(|u| u == late.uid());
            eventually("the new pod is announced", CHANGE, || Ok(announced().then_some(())))?;
            // An old agent that spoke would look after its word within five seconds.
            let begun = Instant::now();
            while begun.elapsed() < Duration::from_secs(7) {
                ensure!(announced(), "{} is taken off the board", late.full_name());
                thread::sleep(Duration::from_millis(50));
            }
            late.remove()?;
            Ok(old)
        };
        let old = replace();
        ended.store(true, Ordering::Relaxed);
        old
    })?;
    let missed = missed.into_inner();
    ensure!(missed == 0, "pods were missing on the board {missed} times");
    let report: HoldReport = stream.finish_and_report(TIMEOUT)?;
    ensure!(report.closed.iter().all(|closed| closed.outcome == "told"), "{report:?}");
    let report: LoadReport = running.finish_and_report(TIMEOUT)?;
    ensure!(report.total() > 100 && report.answered() == report.total(), "{report:?}");
    for mut old in old {
        ensure!(old.wait(TIMEOUT)?.code() == Some(0));
    }
    Ok(())
}

/// From outside through the API server: what the agents of both nodes saw.
fn viewers_see_all_nodes(mesh: &Mesh, api: &ApiServer) -> Result<()> {
    for node in mesh.lab.nodes() {
        api.forward_to(&node.name, node.netns());
    }
    let look = |arguments: &[&str]| -> Result<(Option<i32>, String, String)> {
        let mut command = Command::new(signet_binary()?);
        command.args(arguments).arg("--kubeconfig").arg(api.kubeconfig());
        let output = command.env_remove("SIGNET_SOCKET").output()?;
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        Ok((output.status.code(), text(&output.stdout), text(&output.stderr)))
    };
    let (code, text, errors) = look(&["status", "--all-nodes"])?;
    ensure!(
        matches!(code, Some(0 | 1)) && text.contains("node-1") && text.contains("node-2"),
        "{code:?} {text} {errors}"
    );
    let (code, text, errors) =
        look(&["flows", "-o", "compact", "--to-pod", "shop/payments", "--last", "20"])?;
    ensure!(
        code == Some(0)
            && text.lines().any(|line| {
                line.contains(" node-2 in shop/frontend:") && line.contains(" tcp mtls FORWARDED ")
            }),
        "{code:?} {text} {errors}"
    );
    let (code, text, errors) = look(&["endpoints", "shop/payments", "--on-node", "node-2"])?;
    ensure!(code == Some(0) && text.contains("State      served"), "{code:?} {text} {errors}");
    // The control: the same port, without the API server's token, tells nothing.
    let (code, _, errors) = look(&["flows", "--agent-port", "15020"])?;
    ensure!(code == Some(4) && errors.contains("does not answer on port 15020"), "{errors}");
    Ok(())
}

fn watches_are_shown(mesh: &Mesh) -> Result<()> {
    let agent = mesh.lab.agent("node-1")?;
    let status = agent.status()?;
    ensure!(status["cluster"]["source"] == "kubernetes", "{}", status["cluster"]);
    let watches = status["cluster"]["watches"].as_array().context("no watches")?;
    let of = |kind: &str| watches.iter().find(|watch| watch["kind"] == kind);
    let own = of("Pod (this node)").context("no watch of pods")?;
    ensure!(own["state"] == "listed" && own["objects"] == 4 && own["error"].is_null(), "{own}");
    let istio = of("AuthorizationPolicy").context("no watch of Istio's")?;
    ensure!(istio["state"] == "absent", "{istio}");
    let text = agent.cli(&["status"])?.stdout;
    ensure!(text.contains("\nWatches\n") && text.contains("Pod (this node)"), "{text}");
    let metrics = agent.metrics()?;
    let missing = metrics.undocumented(include_str!("../../../docs/metrics.md"));
    ensure!(missing.is_empty(), "not in docs/metrics.md: {missing:?}");
    Ok(())
}

fn policies_decide(mesh: &Mesh, api: &ApiServer) -> Result<()> {
    let Mesh { lab, frontend, intruder, payments, .. } = mesh;
    mesh.allow_payments(&["frontend"])?;
    refused_with(mesh, intruder, "policy_no_match")?;
    answered(frontend, payments.at(TCP), "x")?;
    verdict(
        lab,
        "node-2",
        "destination",
        "shop/frontend",
        "shop/payments",
        "FORWARDED",
        "allowed",
    )?;

    // Istio comes later, and says DENY.
    api.install("authorizationpolicies")?;
    let deny = json!({
        "apiVersion": "security.istio.io/v1", "kind": "AuthorizationPolicy",
        "metadata": {"name": "no-frontend", "namespace": "shop"},
        "spec": {
            "selector": {"matchLabels": {"app": "payments"}}, "action": "DENY",
            "rules": [{"from": [{"source": {
                "principals": ["cluster.local/ns/shop/sa/frontend"],
            }}]}],
        },
    });
    lab.cluster().apply(deny)?;
    refused_with(mesh, frontend, "policy_deny")?;
    lab.cluster().delete(&ObjectKey::new("AuthorizationPolicy", "shop", "no-frontend"))?;
    answered_soon(frontend, payments.at(TCP))?;

    // An object that cannot be read is named, and what it said stays.
    let key = ObjectKey::new("IdentityPolicy", "shop", "payments-callers");
    lab.cluster().change(&key, |policy| policy["spec"]["action"] = json!("Alow"))?;
    let problem = lab.agent("node-2")?.wait_problem("IdentityPolicy shop/payments-callers")?;
    ensure!(problem.to_string().contains("spec.action"), "{problem}");
    refused_soon(intruder, payments.at(TCP))?;
    answered(frontend, payments.at(TCP), "x")?;
    mesh.allow_payments(&["frontend"])
}

fn the_override_goes_before_all(mesh: &Mesh, api: &ApiServer) -> Result<()> {
    let Mesh { lab, intruder, payments, .. } = mesh;
    refused_soon(intruder, payments.at(TCP))?;
    let begin = Instant::now();
    api.apply(enforcement("audit"))?;
    let agent = lab.agent("node-2")?;
    let applied = |word: &'static str| {
        eventually(word, CHANGE, || {
            let status = agent.status()?;
            Ok((status["agent"]["enforcement"] == word).then_some(()))
        })
    };
    applied("audit")?;
    eprintln!("the override was applied within {:?}", begin.elapsed());
    answered_soon(intruder, payments.at(TCP))?;
    // A word that nobody knows leaves the last one in force.
    api.apply(enforcement("perhaps"))?;
    agent.wait_problem("signet-enforcement")?;
    answered(intruder, payments.at(TCP), "x")?;
    api.delete("configmaps", "signet-system", "signet-enforcement")?;
    applied("enforce")?;
    refused_soon(intruder, payments.at(TCP))?;
    Ok(())
}

#[test]
fn faults_of_the_api_server_make_no_wrong_verdict() -> Result<()> {
    let mesh = Mesh::with(options(), Some("strict"))?;
    with_logs(&mesh, |mesh| {
        let Mesh { lab, frontend, intruder, payments, .. } = mesh;
        let api = lab.api_server()?;
        mesh.allow_payments(&["frontend"])?;
        refused_with(mesh, intruder, "policy_no_match")?;
        answered_soon(frontend, payments.at(TCP))?;

        let mut good = frontend.start(&load(payments))?;
        let mut bad = intruder.start(&load(payments))?;
        good.wait_event("change", TIMEOUT)?;
        bad.wait_event("change", TIMEOUT)?;
        for round in 0..10u32 {
            // Something changes meanwhile, also under the fault.
            lab.cluster().service_account("legacy", &format!("churn-{round}"))?;
            lab.cluster().annotate_namespace("legacy", "round", Some(&round.to_string()))?;
            match round % 5 {
                0 => api.drop_watches(),
                1 => {
                    api.forget_history();
                    api.drop_watches();
                }
                2 => api.set_faults(|faults| faults.refusal = Some(429)),
                3 => api.set_faults(|faults| faults.stalled = true),
                _ => api.set_down(true),
            }
            thread::sleep(Duration::from_millis(1500));
            api.set_faults(|faults| *faults = Default::default());
        }
        // Down for longer than every timeout, every object of policy gone meanwhile as far as
        // anybody can see; and both agents still judge by what they know.
        api.set_down(true);
        api.forget_history();
        thread::sleep(Duration::from_secs(6));
        let good: LoadReport = good.finish_and_report(TIMEOUT)?;
        let bad: LoadReport = bad.finish_and_report(TIMEOUT)?;
        ensure!(good.total() > 500 && good.answered() == good.total(), "frontend: {good:?}");
        ensure!(bad.total() > 500 && bad.answered() == 0, "intruder: {bad:?}");
        for agent in lab.agents() {
            agent.wait_problem("watch IdentityPolicy")?;
        }

        an_agent_starts_while_it_is_down(mesh, api)?;

        // The control: a change is still noticed after all that.
        answered_soon(frontend, payments.at(TCP))?;
        mesh.allow_payments(&["frontend", "intruder"])?;
        answered_soon(intruder, payments.at(TCP))?;
        mesh.allow_payments(&["intruder"])?;
        refused_with(mesh, frontend, "policy_no_match")?;
        Ok(())
    })
}

/// It changes nothing in the kernel until it knows the cluster.
fn an_agent_starts_while_it_is_down(mesh: &Mesh, api: &ApiServer) -> Result<()> {
    let Mesh { lab, intruder, payments, .. } = mesh;
    let agent = lab.agent("node-2")?;
    agent.kill();
    agent.start()?;
    eventually("it answers", TIMEOUT, || {
        let status = agent.status()?;
        if status["agent"]["state"] == "STARTING" {
            return Ok(Some(()));
        }
        bail!("{}", status["agent"])
    })?;
    agent.wait_problem("nothing is known of this kind yet")?;
    for _ in 0..20 {
        let report = dial(intruder, payments.at(TCP), "x")?;
        ensure!(report.refused(), "{report:?}");
    }
    api.set_down(false);
    agent.wait_ready()?;
    lab.wait_state(payments, "served")
}

#[test]
fn an_empty_list_is_the_truth_and_a_failed_one_is_not() -> Result<()> {
    let mesh = Mesh::with(options(), Some("strict"))?;
    with_logs(&mesh, |mesh| {
        let Mesh { lab, frontend, intruder, payments, .. } = mesh;
        let api = lab.api_server()?;
        mesh.allow_payments(&["frontend"])?;
        refused_with(mesh, intruder, "policy_no_match")?;

        // While lists fail the policy goes, and a pod of another node.
        api.set_down(true);
        api.forget_history();
        lab.cluster().delete(&ObjectKey::new("IdentityPolicy", "shop", "payments-callers"))?;
        for agent in lab.agents() {
            agent.wait_problem("watch IdentityPolicy")?;
        }
        for _ in 0..10 {
            let report = dial(intruder, payments.at(TCP), "x")?;
            ensure!(report.refused(), "{report:?}");
            answered(frontend, payments.at(TCP), "x")?;
        }
        // The complete list says that there is none: default allow.
        api.set_down(false);
        answered_soon(intruder, payments.at(TCP))?;
        Ok(())
    })
}

#[test]
fn without_access_to_an_api_server_the_agent_says_what_to_give() -> Result<()> {
    let run = |arguments: &[&str]| -> Result<(Option<i32>, String)> {
        let mut command = Command::new(signet_binary()?);
        // What tells these tests how to run is no configuration of an agent.
        let own = |name: &str| name.starts_with("SIGNET_") || name == "KUBERNETES_SERVICE_HOST";
        for (name, _) in std::env::vars().filter(|(name, _)| own(name)) {
            command.env_remove(name);
        }
        let output = command.args(["agent", "--node", "node-1"]).args(arguments).output()?;
        Ok((output.status.code(), String::from_utf8_lossy(&output.stderr).into_owned()))
    };
    let (code, text) = run(&[])?;
    ensure!(code == Some(3), "{code:?} {text}");
    ensure!(
        text.contains("no access to an API server") && text.contains("give a kubeconfig"),
        "{text}"
    );
    let (code, text) = run(&["--kubeconfig", "/no/such/file"])?;
    ensure!(code == Some(3) && text.contains("kubeconfig /no/such/file"), "{code:?} {text}");
    let (code, text) = run(&["--watch-timeout", "10m"])?;
    ensure!(code == Some(3) && text.contains("--watch-timeout"), "{code:?} {text}");
    Ok(())
}
