//! The agents under test: started as a node would, asked by their own command line.

pub mod flows;
pub mod succession;
pub mod usage;

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use rustix::process::Signal;
use serde_json::Value;

pub use self::{flows::Flow, succession::Process, usage::Usage};
use crate::{
    cgroup,
    lab::{LabOptions, eventually},
    metrics::Metrics,
    node::Node,
    pod::Pod,
    process::{Output, Running, signet_binary, tail_of, without_own_variables},
};

/// How long an agent may take to become ready, on a busy machine.
pub const READY_TIMEOUT: Duration = Duration::from_secs(30);

/// Where its metrics are by default.
const METRICS: &str = "127.0.0.1:15020";

/// Where its readiness is by default.
const READY: &str = "127.0.0.1:15021";

/// A node's agent, started or not.
#[derive(Debug)]
pub struct Agent {
    node: Arc<Node>,
    followed: Followed,
    authority_dir: PathBuf,
    logs: PathBuf,
    flags: Mutex<Vec<String>>,
    env: Mutex<Vec<(String, String)>>,
    running: Mutex<Option<Process>>,
    /// How many were started.
    started: AtomicUsize,
}

/// What an agent follows.
#[derive(Clone, Debug)]
pub(crate) enum Followed {
    /// A directory of manifests.
    Directory(PathBuf),
    /// The API server of a kubeconfig.
    ApiServer(PathBuf),
}

/// How soon the agents begin their watches anew, so that tests see it.
const WATCH_TIMEOUT: &str = "4s";

impl Agent {
    pub(crate) fn new(
        node: Arc<Node>,
        directory: &Path,
        followed: Followed,
        own_domain: Option<&str>,
        options: &LabOptions,
    ) -> Self {
        let mut flags = options.agent_flags.clone();
        let mut authority = "authority";
        if let Some(domain) = own_domain {
            flags.extend(["--trust-domain".to_owned(), domain.to_owned()]);
            authority = "authority-2";
        }
        Self {
            node,
            followed,
            authority_dir: directory.join(authority),
            logs: directory.join("logs"),
            flags: Mutex::new(flags),
            env: Mutex::new(options.agent_env.clone()),
            running: Mutex::new(None),
            started: AtomicUsize::new(0),
        }
    }

    /// Its node.
    pub fn node(&self) -> &Node {
        &self.node
    }

    /// Where the embedded authority keeps its root; all nodes share it.
    pub fn authority_dir(&self) -> &Path {
        &self.authority_dir
    }

    /// Its authority's certificate, PEM, without the key.
    pub fn root_certificate(&self) -> Result<String> {
        const MARKS: (&str, &str) = ("-----BEGIN CERTIFICATE-----", "-----END CERTIFICATE-----");
        let path = self.authority_dir.join("root.pem");
        let text = fs::read_to_string(&path).with_context(|| path.display().to_string())?;
        let begin = text.find(MARKS.0).context("no certificate in root.pem")?;
        let end = text[begin..].find(MARKS.1).context("no certificate in root.pem")?;
        Ok(format!("{}\n", &text[begin..begin + end + MARKS.1.len()]))
    }

    /// The file with its log.
    pub fn log(&self) -> PathBuf {
        self.logs.join(format!("agent-{}.log", self.node.name))
    }

    /// Everything that it has logged, over all its starts.
    pub fn logged(&self) -> String {
        String::from_utf8_lossy(&fs::read(self.log()).unwrap_or_default()).into_owned()
    }

    /// Its admin socket.
    pub fn socket(&self) -> PathBuf {
        self.node.run_dir.join("admin/agent.sock")
    }

    /// The socket of the SPIFFE Workload API.
    pub fn workload_socket(&self) -> PathBuf {
        self.node.run_dir.join("workload/workload.sock")
    }

    /// Replaces the further flags for the next start.
    pub fn set_flags(&self, flags: &[&str]) {
        *lock(&self.flags) = flags.iter().map(|f| (*f).to_owned()).collect();
    }

    /// Adds an environment variable for the next start.
    pub fn set_env(&self, key: &str, value: &str) {
        lock(&self.env).push((key.into(), value.into()));
    }

    /// The arguments that it is started with.
    pub fn arguments(&self) -> Result<Vec<String>> {
        let path = |p: &Path| p.display().to_string();
        let node_cgroup = cgroup::path_below_mount(self.node.cgroup())?;
        let workloads = cgroup::path_below_mount(&self.node.workloads())?;
        let mut arguments: Vec<String> = [
            ("--node", self.node.name.clone()),
            ("--authority", "embedded".into()),
            ("--authority-dir", path(&self.authority_dir)),
            ("--cgroup-root", workloads),
            ("--node-cgroup", node_cgroup),
            ("--bpffs", path(&self.node.bpffs)),
            ("--run-dir", path(&self.node.run_dir)),
            ("--state-dir", path(&self.node.state_dir)),
        ]
        .into_iter()
        .flat_map(|(flag, value)| [flag.to_owned(), value])
        .collect();
        let followed = match &self.followed {
            Followed::Directory(directory) => vec!["--cluster-dir".into(), path(directory)],
            Followed::ApiServer(kubeconfig) => vec![
                "--kubeconfig".into(),
                path(kubeconfig),
                "--watch-timeout".into(),
                WATCH_TIMEOUT.into(),
                "--namespace".into(),
                "signet-system".into(),
            ],
        };
        arguments.extend(followed);
        arguments.insert(0, "agent".into());
        arguments.extend(lock(&self.flags).iter().cloned());
        Ok(arguments)
    }

    /// Starts it, without waiting until it is ready.
    pub fn start(&self) -> Result<()> {
        let mut running = lock(&self.running);
        ensure!(
            running.as_mut().is_none_or(|r| r.ended().is_some()),
            "{}: the agent runs already",
            self.node.name
        );
        *running = Some(self.start_process(&[])?);
        Ok(())
    }

    /// One process of it, with a socket of its own.
    fn start_process(&self, further: &[&str]) -> Result<Process> {
        let number = self.started.fetch_add(1, Ordering::Relaxed);
        let socket = self.node.run_dir.join(format!("own-{number}/agent.sock"));
        let binary = signet_binary()?.display().to_string();
        let mut argv: Vec<String> = vec!["env".into()];
        argv.extend(lock(&self.env).iter().map(|(key, value)| format!("{key}={value}")));
        argv.push(binary);
        argv.extend(self.arguments()?);
        argv.extend(["--own-socket".into(), socket.display().to_string()]);
        argv.extend(further.iter().map(|f| (*f).to_owned()));
        let argv: Vec<&str> = argv.iter().map(String::as_str).collect();
        let name = format!("agent-{}", self.node.name);
        let running = self.node.agent_place().start_program(&name, &argv)?;
        Ok(Process::new(running, socket))
    }

    /// Waits until `signet status` says READY.
    pub fn wait_ready(&self) -> Result<()> {
        let started = Instant::now();
        let outcome = eventually("the agent is READY", READY_TIMEOUT, || {
            if let Some(status) = lock(&self.running).as_mut().and_then(Process::ended) {
                return Ok(Some(Err(status)));
            }
            let answer = self.cli(&["status"])?;
            if answer.code() == 0 {
                return Ok(Some(Ok(())));
            }
            bail!("{} {}", answer.stdout.trim(), answer.stderr.trim())
        });
        match outcome {
            Ok(Ok(())) => Ok(()),
            Ok(Err(status)) => bail!(
                "{}: the agent ended after {:?}: {status}\n{}",
                self.node.name,
                started.elapsed(),
                tail_of(&self.log(), 40)
            ),
            Err(error) => {
                Err(error.context(format!("{}\n{}", self.node.name, tail_of(&self.log(), 40))))
            }
        }
    }

    /// Starts it and waits until it is ready; returns how long that took.
    pub fn start_ready(&self) -> Result<Duration> {
        let begin = Instant::now();
        self.start()?;
        self.wait_ready()?;
        Ok(begin.elapsed())
    }

    /// `kill -9`.
    pub fn kill(&self) {
        *lock(&self.running) = None;
    }

    /// SIGTERM: it drains and exits 0. Returns the exit code.
    pub fn stop(&self) -> Result<Option<i32>> {
        let Some(mut running) = lock(&self.running).take() else {
            bail!("{}: the agent does not run", self.node.name)
        };
        running.signal(Signal::TERM)?;
        Ok(running.wait(Duration::from_secs(30))?.code())
    }

    /// Waits until it ends by itself; its exit code.
    pub fn wait_end(&self, timeout: Duration) -> Result<i32> {
        use std::os::unix::process::ExitStatusExt;
        let mut running = lock(&self.running);
        let running = running.as_mut().context("the agent does not run")?;
        let status = running.wait(timeout)?;
        Ok(status.code().unwrap_or_else(|| 128 + status.signal().unwrap_or(0)))
    }

    /// Sends it a signal.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        lock(&self.running).as_ref().context("the agent does not run")?.signal(signal)
    }

    /// Its pid.
    pub fn pid(&self) -> Result<u32> {
        lock(&self.running)
            .as_ref()
            .map(Process::pid)
            .with_context(|| format!("{}: the agent does not run", self.node.name))
    }

    /// Runs `signet <arguments> --socket <its admin socket>`.
    pub fn cli(&self, arguments: &[&str]) -> Result<Output> {
        let mut command = Command::new(signet_binary()?);
        without_own_variables(&mut command);
        let output = command
            .args(arguments)
            .arg("--socket")
            .arg(self.socket())
            .output()
            .context("cannot run signet")?;
        Ok(Output {
            status: output.status,
            stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
            stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
        })
    }

    /// Runs `signet <command>` as an operator on the node would (`agent release`, `guard`, …),
    /// told where this agent's things are.
    pub fn on_node(&self, command: &[&str]) -> Result<Output> {
        self.on_node_with(command, &[])
    }

    /// The same with other places: a later flag goes before an earlier one.
    pub fn on_node_with(&self, command: &[&str], others: &[(&str, &str)]) -> Result<Output> {
        self.on_node_under(&[], command, others)
    }

    /// The same, run by another program (`setpriv`).
    pub fn on_node_under(
        &self,
        program: &[&str],
        command: &[&str],
        others: &[(&str, &str)],
    ) -> Result<Output> {
        let path = |p: &Path| p.display().to_string();
        let places = [
            ("--cgroup-root", cgroup::path_below_mount(&self.node.workloads())?),
            ("--node-cgroup", cgroup::path_below_mount(self.node.cgroup())?),
            ("--bpffs", path(&self.node.bpffs)),
            ("--run-dir", path(&self.node.run_dir)),
            ("--state-dir", path(&self.node.state_dir)),
        ];
        let binary = signet_binary()?.display().to_string();
        let mut argv = program.to_vec();
        argv.push(binary.as_str());
        argv.extend(command);
        argv.extend(places.iter().flat_map(|(flag, value)| [*flag, value.as_str()]));
        argv.extend(others.iter().flat_map(|(flag, value)| [*flag, *value]));
        self.node.system_place().run(&argv)
    }

    /// Where its pins are.
    pub fn pins(&self) -> PathBuf {
        self.node.bpffs.join("default")
    }

    /// `signet status -o json`, READY or not.
    pub fn status(&self) -> Result<Value> {
        self.json(&["status", "-o", "json"], &[0, 1])
    }

    /// Its metrics, scraped from its node.
    pub fn metrics(&self) -> Result<Metrics> {
        Metrics::scrape(Some(&self.node.system_place()), METRICS)
    }

    /// Status and text of its readiness page, from its node.
    pub fn readiness(&self) -> Result<(u16, String)> {
        let url = format!("http://{READY}/healthz/ready");
        let curl = ["curl", "-sS", "--max-time", "10", "-w", "%{http_code}", &url];
        let answer = self.node.system_place().run(&curl)?.success()?;
        let (text, code) =
            answer.split_at_checked(answer.len().saturating_sub(3)).context("code")?;
        Ok((code.parse().with_context(|| answer.clone())?, text.trim_end().to_owned()))
    }

    /// What `signet endpoints -o json` says of each pod of the node.
    pub fn endpoints(&self) -> Result<Vec<Value>> {
        let answer = self.json(&["endpoints", "-o", "json"], &[0])?;
        Ok(answer["endpoints"].as_array().cloned().unwrap_or_default())
    }

    /// What it says of one pod, by uid.
    pub fn endpoint(&self, pod: &Pod) -> Result<Option<Value>> {
        Ok(self.endpoints()?.into_iter().find(|e| e["uid"] == *pod.uid()))
    }

    /// One JSON value that a command prints.
    fn json(&self, arguments: &[&str], codes: &[i32]) -> Result<Value> {
        let answer = self.cli(arguments)?;
        ensure!(
            codes.contains(&answer.code()),
            "signet {arguments:?}: {} {}",
            answer.status,
            answer.stderr
        );
        serde_json::from_str(answer.stdout.trim()).with_context(|| answer.stdout.clone())
    }

    /// Waits until the agent says of its pod: `off`, `observed`, `served`, `waiting`, …
    pub fn wait_state(&self, pod: &Pod, state: &str) -> Result<()> {
        let name = pod.full_name();
        eventually(&format!("{name} is {state}"), READY_TIMEOUT, || {
            let endpoint =
                self.endpoint(pod)?.with_context(|| format!("{name} is unknown to the agent"))?;
            if endpoint["state"] == state {
                return Ok(Some(()));
            }
            bail!("{name} is {} {}", endpoint["state"], endpoint["waiting"])
        })
        .with_context(|| tail_of(&self.log(), 40))
    }

    /// Waits until `signet status` has a problem whose text contains `text`; returns it.
    pub fn wait_problem(&self, text: &str) -> Result<Value> {
        eventually(&format!("a problem with {text:?}"), Duration::from_secs(10), || {
            let status = self.status()?;
            let problems = status["problems"].as_array().cloned().unwrap_or_default();
            let found = problems.iter().find(|p| p.to_string().contains(text)).cloned();
            if found.is_none() {
                bail!("problems: {problems:?}")
            }
            Ok(found)
        })
    }

    /// Recent flows, newest last; `filters` are flags of `signet flows`.
    pub fn flows(&self, filters: &[&str]) -> Result<Vec<Flow>> {
        let mut arguments = vec!["flows", "-o", "json", "--last", "100000"];
        arguments.extend(filters);
        let answer = self.cli(&arguments)?;
        ensure!(answer.code() == 0, "signet flows: {} {}", answer.status, answer.stderr);
        flows::parse(&answer.stdout)
    }

    /// Begins to follow its flows, as `signet flows -f -o json` prints them.
    pub fn follow_flows(&self) -> Result<Running> {
        let mut command = Command::new(signet_binary()?);
        without_own_variables(&mut command);
        command.args(["flows", "-f", "-o", "json", "--socket"]).arg(self.socket());
        Running::start(command, &format!("flows-{}", self.node.name), &self.logs)
    }

    /// Waits for a flow record that satisfies `wanted`.
    pub fn wait_flow(
        &self,
        what: &str,
        filters: &[&str],
        wanted: impl Fn(&Flow) -> bool,
    ) -> Result<Flow> {
        let mut last = Vec::new();
        eventually(what, Duration::from_secs(5), || {
            last = self.flows(filters)?;
            Ok(last.iter().rev().find(|flow| wanted(flow)).cloned())
        })
        .with_context(|| {
            let lines: Vec<String> =
                last.iter().rev().take(15).map(|flow| format!("  {flow}\n")).collect();
            format!("{}; it has (newest first):\n{}", self.node.name, lines.concat())
        })
    }

    /// What the process uses now.
    pub fn usage(&self) -> Result<Usage> {
        Usage::of(self.pid()?)
    }

    /// Entries of the pinned maps by name.
    pub fn map_entries(&self) -> Result<std::collections::BTreeMap<&'static str, usize>> {
        usage::map_entries(&self.node.bpffs.join("default"))
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
