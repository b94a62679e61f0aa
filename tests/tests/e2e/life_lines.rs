//! What a node and its cluster need to live is not cut off: not by a label, which admission
//! refuses, and not where nobody asks admission; nor what the API server calls.

use std::fs;

use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};
use signet_lab::{LabOptions, api_server::Ask, eventually, pod::Pod, process::Output};

use crate::mesh::{
    CHANGE, HTTP, Mesh, TCP, answered_soon, refused_soon, server, state_of, with_logs,
};

/// Kube-system, the agent's own namespace, and one of `neverDeny`.
const SPACES: [&str; 3] = ["kube-system", "signet-system", "storage"];

/// Everybody reaches the pod in clear, the node too, and it reaches whom it likes.
fn lives(mesh: &Mesh, pod: &Pod) -> Result<()> {
    for client in [&mesh.reports, &mesh.frontend] {
        answered_soon(client, pod.at(TCP))?;
    }
    answered_soon(pod, mesh.reports.at(TCP))?;
    for answer in [
        pod.node().probe(&pod.url(HTTP, "/"))?,
        // Not the kubelet: what an API server does that dials from a node.
        dialled_from_node(pod, HTTP)?,
    ] {
        ensure!(answer.status.success(), "{}: {answer:?}", pod.full_name());
    }
    Ok(())
}

/// A dial of the pod's node that is not its kubelet's.
fn dialled_from_node(pod: &Pod, port: u16) -> Result<Output> {
    pod.node().exec(&["curl", "-sS", "-g", "--max-time", "3", &pod.url(port, "/")])
}

#[test]
fn a_label_does_not_cut_a_nodes_life_lines() -> Result<()> {
    let options = LabOptions {
        api_server: true,
        agent_flags: vec!["--never-deny".into(), "storage".into()],
        ..LabOptions::default()
    };
    let mesh = Mesh::with(options, Some("strict"))?;
    with_logs(&mesh, |mesh| {
        let Mesh { lab, reports, payments, .. } = mesh;
        let api = lab.api_server()?;
        let mut pods = Vec::new();
        for space in SPACES {
            lab.namespace(space, None)?;
            let pod = server(lab, "node-2", space, "lifeline")?;
            pod.wait_published()?;
            lab.wait_state(&pod, "off")?;
            lives(mesh, &pod)?;
            pods.push(pod);
        }

        // Who labels them is refused, where admission is asked.
        let strict = json!({"metadata": {"labels": {"signet.dev/mode": "strict"}}});
        for space in &SPACES[..2] {
            let path = format!("/api/v1/namespaces/{space}");
            let (code, answer) = api.ask(Ask::merge(&path, &strict))?;
            let said = answer["message"].as_str().unwrap_or_default();
            let why = format!("pods of {space} are never enforced; off and observe are possible");
            ensure!(code == 422 && said.contains(&why), "{code} {answer}");
        }
        let (code, answer) = api.ask(Ask::merge("/api/v1/namespaces/legacy", &json!({})))?;
        ensure!(code == 200, "{code} {answer}");

        // Past admission: strict, nothing allowed, and the pod says so itself.
        for (space, pod) in SPACES.iter().zip(&pods) {
            lab.cluster().set_mode(space, Some("strict"))?;
            lab.cluster().label_namespace(space, "signet.dev/default", Some("deny"))?;
            lab.cluster().label_pod(space, "lifeline", "signet.dev/mode", Some("strict"))?;
            lab.wait_state(pod, state_of("observe"))?;
            let problem = lab.agent("node-2")?.wait_problem(&format!("pod {space}/lifeline"))?;
            ensure!(problem.to_string().contains("its mode is not enforced"), "{problem}");
            lives(mesh, pod)?;
        }
        // The control: the same labels close any other namespace.
        refused_soon(reports, payments.at(TCP))?;

        // Nor when the agent is gone.
        lab.agent("node-2")?.kill();
        pods.iter().try_for_each(|pod| lives(mesh, pod))
    })
}

/// What a webhook is dialled with: in clear as far as Signet is concerned, from a node.
#[test]
fn what_the_api_server_calls_stays_open_until_that_is_removed() -> Result<()> {
    let mesh = Mesh::without_agents(
        LabOptions { api_server: true, ..LabOptions::default() },
        Some("strict"),
    )?;
    with_logs(&mesh, |mesh| {
        let Mesh { lab, reports, payments, .. } = mesh;
        let api = lab.api_server()?;
        let config = lab.directory().join("agent.yaml");
        let configure = |text: &str| fs::write(&config, text).context("agent.yaml");
        configure("builtins: [dns, kubelet-probes, webhooks]\n")?;
        for agent in lab.agents() {
            agent.set_flags(&["--config", &config.display().to_string()]);
        }
        lab.start_agents()?;
        lab.wait_state(payments, "served")?;
        let is_open = |wanted: bool| {
            eventually(&format!("open to the API server: {wanted}"), CHANGE, || {
                let answer = dialled_from_node(payments, HTTP)?;
                Ok((answer.status.success() == wanted).then_some(()))
            })
        };
        is_open(false)?;
        refused_soon(reports, payments.at(HTTP))?;

        // The Service `payments` has the port 80, which is 8080 of the pod.
        api.apply(json!({
            "apiVersion": "admissionregistration.k8s.io/v1",
            "kind": "ValidatingWebhookConfiguration", "metadata": {"name": "payments"},
            "webhooks": [{"name": "a.shop.example", "clientConfig": {
                "service": {"namespace": "shop", "name": "payments", "port": 80},
            }}],
        }))?;
        is_open(true)?;
        // That port, and no other.
        refused_soon(reports, payments.at(TCP))?;
        let list = || -> Result<Value> {
            let output = lab.agent("node-2")?.cli(&["policy", "list", "-o", "json"])?;
            let list: Value = serde_json::from_str(&output.stdout).context(output.stderr)?;
            let policies = list["policies"].as_array().context("no policies")?;
            let found = policies.iter().find(|policy| policy["name"] == "webhooks").cloned();
            found.with_context(|| format!("no built-in in {list}"))
        };
        let said = list()?.to_string();
        ensure!(said.contains(":8080/tcp (ValidatingWebhookConfiguration payments)"), "{said}");

        // Removed by the configuration, and back; gone with the object.
        configure("builtins: [dns, kubelet-probes]\n")?;
        is_open(false)?;
        ensure!(list()?.to_string().contains("removed by the key builtins"), "{}", list()?);
        configure("builtins: [dns, kubelet-probes, webhooks]\n")?;
        is_open(true)?;
        api.delete("validatingwebhookconfigurations", "", "payments")?;
        is_open(false)
    })
}
