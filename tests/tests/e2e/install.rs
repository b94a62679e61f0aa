//! `docs/install.md`, word by word: its shell blocks run in order, with real kubectl against the
//! test API server, and every `signet` on node-1, beside its agent, or from outside.
//!
//! The test plays the controllers of a cluster: a DaemonSet of agents is agents that run in the
//! lab, each with a token of its own; a DaemonSet that uninstalls is the command that its
//! container runs, on every node; a Deployment is ready at once (the lab's agents sign for
//! themselves). Lines that end with `(not in the lab)` are left out.

use std::{
    collections::BTreeMap,
    fs::{self, File},
    os::unix::process::ExitStatusExt as _,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::Duration,
};

use anyhow::{Context, Result, bail, ensure};
use rustix::process::{Pid, Signal};
use serde_json::{Value, json};
use signet_lab::{
    LabOptions,
    agent::Agent,
    api_server::ApiServer,
    eventually,
    pod::Pod,
    process::{signet_binary, without_own_variables},
};

use crate::{
    lifecycle::{map_ids, programs_over},
    mesh::{Mesh, TCP, TIMEOUT, answered_soon, refused_soon, server, with_logs},
};

const DOCUMENT: &str = include_str!("../../../docs/install.md");
const LEFT_OUT: &str = "(not in the lab)";
const SYSTEM: &str = "signet-system";

/// The commands of the document's shell blocks, in order, with those that are left out.
fn commands() -> (Vec<String>, Vec<String>) {
    let mut all = (Vec::new(), Vec::new());
    let mut is_shell = false;
    let mut is_block = false;
    for line in DOCUMENT.lines() {
        if let Some(language) = line.strip_prefix("```") {
            is_block = !is_block;
            is_shell = is_block && language.is_empty();
        } else if is_shell {
            let command = line.split(" #").next().unwrap_or_default().trim().to_owned();
            match line.trim_end().ends_with(LEFT_OUT) {
                true => all.1.push(command),
                false if command.is_empty() || command.starts_with('#') => {}
                false => all.0.push(command),
            }
        }
    }
    all
}

/// A reader of the document.
struct Reader<'a> {
    mesh: &'a Mesh,
    /// The document's own example, `shop/payments-0` on node-1.
    example: &'a Pod,
    kubeconfig: PathBuf,
    /// `signet flows -f`, which goes on in a window of its own.
    following: Option<(Child, PathBuf)>,
    /// Maps of all agents.
    maps: Vec<u32>,
}

impl Reader<'_> {
    /// Runs one command; its output.
    fn run(&mut self, command: &str) -> Result<String> {
        let mut words = command.split_whitespace();
        let program = words.next().unwrap_or_default();
        let words: Vec<&str> = words.collect();
        let agent = self.mesh.lab.agent("node-1")?;
        let (code, out, err) = match (program, words.as_slice()) {
            ("kubectl", words) if words.contains(&"create") => self.create(words)?,
            // A roll-out that does not end is a failure.
            ("kubectl", words) => self.on_a_laptop("timeout", &[&["90", "kubectl"], words])?,
            ("signet", ["flows", "-f", ..]) => return self.follow(&words),
            ("signet", words @ (["check", "cluster"] | ["status", "--all-nodes"])) => {
                let binary = signet_binary()?.display().to_string();
                self.on_a_laptop(&binary, &[words])?
            }
            ("signet", ["check", "--config", "FILE"]) => {
                let file = config_file(agent, self.mesh.lab.directory())?.display().to_string();
                let binary = signet_binary()?.display().to_string();
                let output =
                    agent.node().agent_place().run(&[&binary, "check", "--config", &file])?;
                (output.code(), output.stdout, output.stderr)
            }
            ("signet", ["agent", ..]) => {
                let output = agent.on_node(&words)?;
                (output.code(), output.stdout, output.stderr)
            }
            ("signet", words) => {
                let output = agent.cli(words)?;
                (output.code(), output.stdout, output.stderr)
            }
            _ => bail!("{command:?} is neither kubectl nor signet: {LEFT_OUT}"),
        };
        // A check that finds something says so with 1.
        let may_find = command.starts_with("signet rollout check") && code == 1;
        ensure!(code == 0 || may_find, "{command}: {code}\n{out}\n{err}");
        Ok(out)
    }

    /// Runs a program on a machine that has nothing but a kubeconfig.
    fn on_a_laptop(&self, program: &str, words: &[&[&str]]) -> Result<(i32, String, String)> {
        let output = self
            .outside(program)?
            .args(words.concat())
            .output()
            .with_context(|| format!("{program}: is kubectl there? cargo xtask setup says"))?;
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        Ok((output.status.code().unwrap_or(-1), text(&output.stdout), text(&output.stderr)))
    }

    /// `kubectl create` of kinds that kubectl knows by itself speaks protobuf, which the test
    /// server does not: kubectl says what it would create, and creates that from a file.
    fn create(&self, words: &[&str]) -> Result<(i32, String, String)> {
        let dry = ["--dry-run=client", "-o", "json"];
        let (code, object, err) = self.on_a_laptop("kubectl", &[words, &dry])?;
        ensure!(code == 0, "{err}");
        let file = self.mesh.lab.directory().join("created.json");
        fs::write(&file, object)?;
        let file = file.display().to_string();
        self.on_a_laptop("kubectl", &[&["create", "-f", &file]])
    }

    fn outside(&self, program: &str) -> Result<Command> {
        let mut command = Command::new(program);
        without_own_variables(&mut command);
        command
            .current_dir(Path::new(env!("CARGO_MANIFEST_DIR")).join(".."))
            .env("KUBECONFIG", &self.kubeconfig)
            .env("HOME", self.mesh.lab.api_server()?.directory());
        Ok(command)
    }

    fn follow(&mut self, words: &[&str]) -> Result<String> {
        let path = self.mesh.lab.directory().join("followed");
        let mut command = self.outside(&signet_binary()?.display().to_string())?;
        command.args(words).stdout(File::create(&path)?).stderr(Stdio::inherit());
        self.following = Some((command.spawn()?, path));
        Ok(String::new())
    }

    /// What the reader is told to see, is to be seen.
    fn look(&mut self, command: &str, said: &str) -> Result<()> {
        let Mesh { lab, frontend, payments, reports, .. } = self.mesh;
        let to = payments.at(TCP);
        match command {
            "signet status" => ensure!(said.contains("READY"), "{said}"),
            "signet status --all-nodes" => {
                ensure!(said.contains("node-1") && said.contains("node-2"), "{said}");
            }
            "signet endpoints" => ensure!(said.contains("shop/frontend"), "{said}"),
            "kubectl label namespace shop signet.dev/mode=observe" => {
                for pod in [frontend, payments, self.example] {
                    lab.wait_state(pod, "observed")?;
                }
                // What the next two lines are to show.
                answered_soon(reports, self.example.at(TCP))?;
                answered_soon(frontend, self.example.at(TCP))?;
                let agent = lab.agent("node-1")?;
                let audited = |flow: &signet_lab::agent::Flow| flow.verdict == "AUDIT";
                agent.wait_flow("the plaintext is judged", &["-n", "shop"], audited)?;
                eventually("the plaintext is counted", TIMEOUT, || {
                    let found = agent.cli(&["rollout", "check", "shop", "--to", "strict"])?;
                    Ok(found.stdout.contains("legacy/default").then_some(()))
                })?;
            }
            "signet flows -n shop --verdict audit" => {
                ensure!(said.contains("plaintext_refused"), "{said}");
            }
            "signet rollout check shop --to strict" => {
                ensure!(said.contains("legacy/default -> shop/payments-0"), "{said}");
            }
            "kubectl label namespace shop signet.dev/mode=permissive --overwrite" => {
                answered_soon(reports, to)?;
            }
            "kubectl label namespace shop signet.dev/mode=strict --overwrite" => {
                for pod in [frontend, payments, self.example] {
                    lab.wait_state(pod, "served")?;
                }
                refused_soon(reports, to)?;
                answered_soon(frontend, to)?;
                answered_soon(frontend, self.example.at(TCP))?;
                for agent in lab.agents() {
                    self.maps.extend(map_ids(&agent.pins())?);
                }
                ensure!(!programs_over(&self.maps)?.is_empty(), "no program is loaded");
                self.end_following()?;
            }
            "signet policy suggest -n shop" => {
                ensure!(said.contains("kind: IdentityPolicy"), "{said}");
            }
            "kubectl label namespace shop signet.dev/default=deny" => {
                refused_soon(frontend, to)?;
            }
            "kubectl label namespace shop signet.dev/default-" => {
                answered_soon(frontend, to)?;
            }
            other if other.contains("--from-literal=enforcement=off") => {
                answered_soon(reports, to)?;
            }
            other if other.ends_with("delete configmap signet-enforcement") => {
                refused_soon(reports, to)?;
                refused_soon(reports, self.example.at(TCP))?;
            }
            "signet agent release" | "signet agent release --pod shop/payments-0" => {
                answered_soon(reports, self.example.at(TCP))?;
                // The other node goes on.
                refused_soon(reports, to)?;
            }
            "signet agent rearm" => {
                refused_soon(reports, self.example.at(TCP))?;
            }
            "kubectl label namespace shop signet.dev/mode-" => {
                answered_soon(reports, to)?;
            }
            _ => {}
        }
        Ok(())
    }

    /// What was followed in its window: verdicts of both nodes.
    fn end_following(&mut self) -> Result<()> {
        let (mut child, path) = self.following.take().context("nothing is followed")?;
        let seen = eventually("verdicts of both nodes are followed", TIMEOUT, || {
            let text = fs::read_to_string(&path)?;
            let both = text.contains(" node-1 in shop/") && text.contains(" node-2 in shop/");
            ensure!(both, "{text}");
            Ok(Some(()))
        });
        let pid = Pid::from_child(&child);
        rustix::process::kill_process(pid, Signal::INT).context("signet flows -f")?;
        let ended = child.wait()?;
        seen?;
        // A shell says 130 of it.
        ensure!(ended.signal() == Some(Signal::INT.as_raw()), "signet flows -f ended: {ended}");
        Ok(())
    }
}

impl Drop for Reader<'_> {
    fn drop(&mut self) {
        if let Some((mut child, _)) = self.following.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// What the lab's agent is told by flags, as a configuration file.
fn config_file(agent: &Agent, directory: &Path) -> Result<PathBuf> {
    let mut text = String::new();
    let arguments = agent.arguments()?;
    for pair in arguments[1..].chunks(2) {
        let [flag, value] = pair else { bail!("{pair:?} is no flag with a value") };
        let words = flag.trim_start_matches('-').split('-').enumerate();
        let key: String = words
            .map(|(at, word)| match at {
                0 => word.to_owned(),
                _ => word[..1].to_uppercase() + &word[1..],
            })
            .collect();
        text += &format!("{key}: {}\n", json!(value));
    }
    let path = directory.join("agent.yaml");
    fs::write(&path, text)?;
    Ok(path)
}

/// The controllers and kubelets of the cluster, for ever.
fn control(mesh: &Mesh, api: &ApiServer, over: &AtomicBool) -> Result<()> {
    let mut runs = false;
    let mut uninstalled = false;
    while !over.load(Ordering::Relaxed) {
        thread::sleep(Duration::from_millis(100));
        let wanted = api.get("daemonsets", SYSTEM, "signet-agent").is_some();
        if wanted && !runs {
            mesh.lab.renew_agents_tokens()?;
            mesh.lab.start_agents()?;
            runs = true;
        } else if !wanted && runs {
            for agent in mesh.lab.agents() {
                agent.stop()?;
                let pod = format!("signet-agent-{}", agent.node().name);
                api.delete("pods", SYSTEM, &pod)?;
            }
            runs = false;
        }
        let uninstall = api.get("daemonsets", SYSTEM, "signet-uninstall");
        if let Some(uninstall) = uninstall.filter(|_| !uninstalled && !runs) {
            for agent in mesh.lab.agents() {
                let words = uninstalling(&uninstall, agent)?;
                let words: Vec<&str> = words.iter().map(String::as_str).collect();
                let done = agent.on_node(&words)?;
                ensure!(done.code() == 0, "{} {}", done.stdout, done.stderr);
            }
            uninstalled = true;
        }
        let count = mesh.lab.nodes().len();
        for (name, is_done) in [("signet-agent", runs), ("signet-uninstall", uninstalled)] {
            if is_done && let Some(object) = api.get("daemonsets", SYSTEM, name) {
                let status = json!({
                    "observedGeneration": object["metadata"]["generation"],
                    "desiredNumberScheduled": count, "currentNumberScheduled": count,
                    "updatedNumberScheduled": count, "numberReady": count,
                    "numberAvailable": count, "numberMisscheduled": 0,
                });
                set_status(api, "daemonsets", name, status)?;
            }
        }
        if let Some(object) = api.get("deployments", SYSTEM, "signet-authority") {
            let replicas = &object["spec"]["replicas"];
            let status = json!({
                "observedGeneration": object["metadata"]["generation"],
                "replicas": replicas, "updatedReplicas": replicas, "readyReplicas": replicas,
                "availableReplicas": replicas,
                "conditions": [{"type": "Available", "status": "True"}],
            });
            set_status(api, "deployments", "signet-authority", status)?;
        }
    }
    Ok(())
}

/// The words of the DaemonSet's container that uninstalls; the node's root is a directory of
/// the lab.
fn uninstalling(object: &Value, agent: &Agent) -> Result<Vec<String>> {
    let container = &object["spec"]["template"]["spec"]["initContainers"][0];
    let words = container["args"].as_array().context("no args")?;
    let root = agent.node().run_dir.join("root").display().to_string();
    let words = words.iter().filter_map(Value::as_str);
    Ok(words.map(|word| if word == "/host" { root.clone() } else { word.to_owned() }).collect())
}

fn set_status(api: &ApiServer, plural: &str, name: &str, status: Value) -> Result<()> {
    if api.get(plural, SYSTEM, name).is_some_and(|object| object["status"] != status) {
        // It may go meanwhile.
        let _ = api.change(plural, SYSTEM, name, |object| object["status"] = status);
    }
    Ok(())
}

/// Objects of ours that are in the server, by plural.
fn left(api: &ApiServer) -> BTreeMap<&'static str, Vec<String>> {
    let all = [
        "customresourcedefinitions",
        "clusterroles",
        "clusterrolebindings",
        "roles",
        "rolebindings",
        "validatingadmissionpolicies",
        "validatingadmissionpolicybindings",
        "daemonsets",
        "deployments",
        "configmaps",
        "secrets",
        "pods",
        "serviceaccounts",
        "identitypolicies",
        "nodeenrolments",
        "leases",
    ];
    let ours = |object: &Value| {
        let name = object["metadata"]["name"].as_str().unwrap_or_default().to_owned();
        let is_ours = name.contains("signet") || object["metadata"]["namespace"] == SYSTEM;
        is_ours.then_some(name)
    };
    let of = |plural| (plural, api.list(plural).iter().filter_map(ours).collect::<Vec<_>>());
    let left = all.into_iter().map(of).filter(|(_, names)| !names.is_empty());
    left.collect()
}

#[test]
fn the_document_does_what_it_says() -> Result<()> {
    let options = LabOptions { api_server: true, ..LabOptions::default() };
    let mesh = Mesh::without_agents(options, None)?;
    with_logs(&mesh, |mesh| {
        let Mesh { lab, frontend, payments, reports, .. } = mesh;
        let api = lab.api_server()?;
        lab.cluster().service_account("shop", "payments-0")?;
        let example = server(lab, "node-1", "shop", "payments-0")?;
        example.wait_published()?;
        for node in lab.nodes() {
            api.forward_to(&node.name, node.netns());
        }
        let mut reader = Reader {
            mesh,
            example: &example,
            kubeconfig: api.secure_kubeconfig("reader", None)?,
            following: None,
            maps: Vec::new(),
        };
        let (commands, left_out) = commands();
        ensure!(commands.len() > 25 && left_out.len() == 1, "{commands:#?} {left_out:#?}");
        // The lab begins with Signet's objects; the document begins without.
        reader.run("kubectl delete --ignore-not-found -k manifests/base")?;
        ensure!(left(api).is_empty(), "{:?}", left(api));

        let over = AtomicBool::new(false);
        thread::scope(|scope| {
            let controllers = scope.spawn(|| control(mesh, api, &over));
            let mut read = || -> Result<()> {
                for command in &commands {
                    eprintln!("$ {command}");
                    let said = reader.run(command);
                    let seen = said.and_then(|said| reader.look(command, &said));
                    seen.with_context(|| format!("docs/install.md: {command}"))?;
                }
                Ok(())
            };
            let outcome = read();
            over.store(true, Ordering::Relaxed);
            let controlled = controllers.join();
            // Why nothing was ready says more than that nothing was.
            controlled.map_err(|_| anyhow::anyhow!("the controllers panicked"))??;
            outcome
        })?;

        // Nothing is left, on no node and not in the cluster, and traffic goes as before.
        ensure!(left(api).is_empty(), "{:?}", left(api));
        for agent in lab.agents() {
            ensure!(!agent.pins().exists(), "{} is left", agent.pins().display());
            ensure!(!agent.node().state_dir.exists(), "its state is left");
        }
        eventually("no program is left", TIMEOUT, || {
            let programs = programs_over(&reader.maps)?;
            ensure!(programs.is_empty(), "{programs:?}");
            Ok(Some(()))
        })?;
        for node in api.list("nodes") {
            ensure!(!node.to_string().contains("signet.dev/"), "{node}");
        }
        answered_soon(reports, payments.at(TCP))?;
        answered_soon(frontend, reports.at(TCP)).map(drop)
    })
}
