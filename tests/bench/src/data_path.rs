//! The data path: plaintext, the native wire and HBONE, interleaved on one machine.
//!
//! Two labs run side by side, whose agents differ in the wire alone; requests are also measured to
//! a workload whose policy asks about them, over the native wire; plaintext goes between pods
//! that are not enrolled, on the nodes of the first, past the same eBPF programs. In each round
//! every subject has its turn, and another one begins.

use std::{
    fs,
    process::{Child, Command, Stdio},
    thread,
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use signet_lab::{
    Lab, LabOptions,
    address::Family,
    pod::Pod,
    traffic::{
        Role, any,
        reports::MeasureReport,
        roles::{Measure, MeasureKind, MeasureServer},
    },
};

use crate::results::{PLAINTEXT, Results};

/// First port of the servers.
const PORT: u16 = 7000;
/// The namespace whose policy asks about requests.
const JUDGED: &str = "judged";
/// A measurement that takes longer hangs.
const LIMIT: Duration = Duration::from_secs(120);

/// What is measured of the data path.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Case {
    /// Throughput of this many streams, and the agents' processor time for it.
    Bulk(usize),
    /// Requests on this many connections that stay.
    Http(usize),
    /// New connections, this many at once.
    Connections(usize),
    /// Connect and first byte, one after the other.
    FirstByte,
    /// Memory of an agent, idle and with this many open connections.
    Memory(usize),
}

/// Two pods, and the lab whose agents are between them.
struct Subject<'a> {
    name: &'static str,
    client: Pod,
    server: Pod,
    /// `None`: nothing of ours is between them.
    agents: Option<&'a Lab>,
    /// Requests are judged: nothing else may pass.
    judged: bool,
}

/// Measures `cases` in interleaved rounds.
pub fn run(cases: &[Case], quick: bool, results: &mut Results) -> Result<()> {
    let (rounds, millis) = if quick { (1, 500) } else { (3, 3000) };
    let _allowed = Allowed::cubic()?;
    let native = lab("native")?;
    let hbone = lab("hbone")?;
    let subjects = [
        Subject {
            name: PLAINTEXT,
            client: client(&native, "plain")?,
            server: server(&native, "plain")?,
            agents: None,
            judged: false,
        },
        Subject {
            name: "signet",
            client: client(&native, "mesh")?,
            server: server(&native, "mesh")?,
            agents: Some(&native),
            judged: false,
        },
        Subject {
            name: "signet-judged",
            client: client(&native, JUDGED)?,
            server: server(&native, JUDGED)?,
            agents: Some(&native),
            judged: true,
        },
        Subject {
            name: "signet-hbone",
            client: client(&hbone, "mesh")?,
            server: server(&hbone, "mesh")?,
            agents: Some(&hbone),
            judged: false,
        },
    ];
    for subject in &subjects {
        subject.prepare()?;
    }
    for case in cases {
        for round in 1..=rounds {
            for turn in 0..subjects.len() {
                let subject = &subjects[(round + turn) % subjects.len()];
                if subject.judged && !matches!(case, Case::Http(_)) {
                    continue;
                }
                subject
                    .measure(*case, round, millis, results)
                    .with_context(|| format!("{case:?}, {}", subject.name))?;
            }
        }
    }
    Ok(())
}

fn lab(wire: &str) -> Result<Lab> {
    let lab = Lab::with(LabOptions {
        family: Some(Family::V4),
        agent_env: vec![("SIGNET_TUNNEL".into(), wire.into())],
        ..Default::default()
    })?;
    lab.namespace("mesh", Some("strict"))?;
    lab.namespace("plain", None)?;
    lab.namespace(JUDGED, Some("strict"))?;
    lab.cluster().apply_yaml(&format!(
        "apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {{name: items, namespace: {JUDGED}}}
spec: {{action: ALLOW, rules: [{{to: [{{operation: {{methods: [GET], paths: [/v1/item]}}}}]}}]}}
"
    ))?;
    lab.start_agents()?;
    Ok(lab)
}

fn client(lab: &Lab, namespace: &str) -> Result<Pod> {
    lab.pod(namespace, "client").start()
}

fn server(lab: &Lab, namespace: &str) -> Result<Pod> {
    let role = Role::MeasureServer(MeasureServer { listen: any(PORT) });
    lab.pod_on(lab.node("node-2")?, namespace, "server").container("main", role).start()
}

impl Subject<'_> {
    /// Waits until a request is answered, with one congestion control for all.
    fn prepare(&self) -> Result<()> {
        for pod in [&self.client, &self.server] {
            // Where it is chosen by the machine's defaults, ratios would not mean anything.
            let set = "echo cubic > /proc/sys/net/ipv4/tcp_congestion_control";
            pod.exec(&["sh", "-c", set])?.success()?;
            pod.wait_published()?;
        }
        signet_lab::eventually("a first request", LIMIT, || {
            let report = self.ask(MeasureKind::Http, 1, 10)?;
            Ok((report.done > 0).then_some(()))
        })
    }

    fn ask(&self, kind: MeasureKind, parallel: usize, millis: u64) -> Result<MeasureReport> {
        let role = Measure { to: self.server.at(PORT), kind, parallel, millis };
        self.client.run(&Role::Measure(role), LIMIT)
    }

    /// Processor time of the agents so far, seconds.
    fn agents_cpu(&self) -> Result<f64> {
        let mut ticks = 0;
        for agent in self.agents.map(Lab::agents).unwrap_or_default() {
            ticks += agent.usage()?.cpu_ticks;
        }
        Ok(ticks as f64 / 100.0)
    }

    fn measure(&self, case: Case, round: usize, millis: u64, results: &mut Results) -> Result<()> {
        let mut add =
            |case: &str, value: f64, unit| results.add(case, self.name, round, value, unit);
        match case {
            Case::Bulk(streams) => {
                let before = self.agents_cpu()?;
                let report = self.ask(MeasureKind::Bulk, streams, millis)?;
                let cpu = self.agents_cpu()? - before;
                let bytes = report.bytes as f64;
                add(&format!("bulk-{streams}"), bytes * 8.0 / 1e9 / report.seconds, "Gb/s");
                if self.agents.is_some() {
                    add(&format!("cpu-per-gb-{streams}"), cpu / (bytes / 1e9), "s/GB");
                }
            }
            Case::Http(connections) => {
                let _awake = (connections == 1).then(Awake::keep).transpose()?;
                let report = self.ask(MeasureKind::Http, connections, millis)?;
                let name = format!("http-{connections}");
                add(&name, report.done as f64 / report.seconds, "1/s");
                add(&format!("{name}-p50"), f64::from(report.p50_us), "us");
                add(&format!("{name}-p99"), f64::from(report.p99_us), "us");
            }
            Case::Connections(parallel) => {
                let report = self.ask(MeasureKind::Connect, parallel, millis)?;
                add("connections", report.done as f64 / report.seconds, "1/s");
            }
            Case::FirstByte => {
                let _awake = Awake::keep()?;
                let report = self.ask(MeasureKind::Connect, 1, millis)?;
                add("first-byte-p50", f64::from(report.p50_us), "us");
                add("first-byte-p99", f64::from(report.p99_us), "us");
            }
            Case::Memory(connections) => self.memory(connections, &mut add)?,
        }
        Ok(())
    }

    fn memory(
        &self,
        connections: usize,
        add: &mut impl FnMut(&str, f64, &'static str),
    ) -> Result<()> {
        let Some(lab) = self.agents else { return Ok(()) };
        let resident = || -> Result<Vec<f64>> {
            let each = |agent: &signet_lab::agent::Agent| Ok(agent.usage()?.resident as f64);
            lab.agents().iter().map(each).collect()
        };
        let before = resident()?;
        let role = Measure {
            to: self.server.at(PORT),
            kind: MeasureKind::Hold,
            parallel: connections,
            millis: 0,
        };
        let mut holding = self.client.start(&Role::Measure(role))?;
        holding.wait_event("held", LIMIT)?;
        let held = resident()?;
        let report: MeasureReport = holding.finish_and_report(LIMIT)?;
        ensure!(report.done == connections as u64, "{report:?}");
        for (role, (then, now)) in ["client", "server"].iter().zip(before.iter().zip(&held)) {
            add(&format!("memory-{role}"), then / 1e6, "MB");
            let each = (now - then) / connections as f64 / 1e3;
            add(&format!("memory-{role}-per-connection-{connections}"), each, "KB");
        }
        Ok(())
    }
}

/// Lets network namespaces choose cubic, while this lives: the kernel lets them choose only
/// among what the machine's list names.
struct Allowed(Option<String>);

impl Allowed {
    const LIST: &str = "/proc/sys/net/ipv4/tcp_allowed_congestion_control";

    fn cubic() -> Result<Self> {
        let before = fs::read_to_string(Self::LIST).context(Self::LIST)?;
        if before.split_whitespace().any(|name| name == "cubic") {
            return Ok(Self(None));
        }
        fs::write(Self::LIST, format!("{} cubic", before.trim())).context(Self::LIST)?;
        Ok(Self(Some(before)))
    }
}

impl Drop for Allowed {
    fn drop(&mut self) {
        if let Some(before) = &self.0
            && let Err(error) = fs::write(Self::LIST, before)
        {
            eprintln!("bench: {} stays changed: {error}", Self::LIST);
        }
    }
}

/// Keeps every core from sleeping while latencies are measured: waking a virtual machine's core
/// takes longer than what is measured. The spinning costs nothing that wants to run
/// (`SCHED_IDLE`).
struct Awake(Vec<Child>);

impl Awake {
    fn keep() -> Result<Self> {
        let cores = thread::available_parallelism().map_or(1, usize::from);
        let mut awake = Self(Vec::new());
        for _ in 0..cores {
            let child = Command::new("chrt")
                .args(["--idle", "0", "sh", "-c", "while :; do :; done"])
                .stdin(Stdio::null())
                .spawn()
                .context("chrt (util-linux)")?;
            awake.0.push(child);
        }
        Ok(awake)
    }
}

impl Drop for Awake {
    fn drop(&mut self) {
        for child in &mut self.0 {
            // One that has ended already needs no end.
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}
