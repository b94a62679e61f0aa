//! `signet support-bundle`: one archive with what somebody needs who helps from afar.
//!
//! Nothing is copied from the disk. Each part is what a command prints or the metrics page says,
//! and has its name in this file; so keys, tokens and whatever else lies beside the configuration
//! cannot get in by being there. What still looks like a key or a token, in an error message or a
//! value that was pasted where a path belongs, is taken out by [`scrub`]; log lines never held it.

mod archive;

use std::{
    collections::HashSet,
    io::{self, IsTerminal, Write},
    net::SocketAddr,
    path::PathBuf,
    time::Duration,
};

use bytes::Bytes;
use http_body_util::{BodyExt as _, Empty, Limited};
use hyper_util::{client::legacy::Client, rt::TokioExecutor};
use jiff::Timestamp;

use self::archive::Archive;
use super::{
    aggregate, check, endpoints,
    exit::{Exit, Failure, print},
    flow_lines,
    flows::{self, Incoming},
    identities, policy, services,
    sockets::{self, Agent, SocketArgs},
    status, svid,
    table::printable,
};
use crate::{
    config::{AgentConfig, ConfigSources},
    kernel::{KernelError, Pinned},
    observer::encode::OPTIONS_TYPE,
    proto::{
        admin::{ListLogsRequest, admin_client::AdminClient},
        detail,
        observer::GetFlowsRequest,
    },
    telemetry::scrub,
};

/// The metrics page may be so large, in bytes.
const MAX_METRICS: usize = 32 << 20;
/// A part that is asked of this host may take so long.
const PATIENCE: Duration = Duration::from_secs(60);
/// Rows of a map that are written.
const MAX_ROWS: usize = 4096;
/// An agent's flows may take so long in all.
const FLOWS_WITHIN: Duration = Duration::from_secs(30);

/// Arguments of `signet support-bundle`.
#[derive(clap::Args, Debug)]
#[command(after_help = "\
Examples:
  signet support-bundle --config /etc/signet/agent/agent.yaml
  signet support-bundle -o shop-is-slow.tar.gz --flows 5000
  kubectl -n signet-system exec ds/signet-agent -- signet support-bundle \\
    --config /etc/signet/agent/agent.yaml -o - > bundle.tar.gz

In it: versions, the configuration, what `signet check` says of this host, the metrics page and the
kernel's maps; of each node status, endpoints, identities, services, SVIDs (no keys), policies,
recent flows, the agent's last log lines, and who talked to whom in seven days. problems.txt names
what could not be had. It tells names and addresses of workloads: look through it before you hand
it on. Exits with 4 when an agent does not answer, 5 when it may not be asked; the archive is
written all the same.")]
pub struct SupportBundleArgs {
    #[command(flatten)]
    sockets: SocketArgs,
    /// Where it is written; - is stdout [default: signet-support-TIME.tar.gz]
    #[arg(short, long, value_name = "file")]
    output: Option<PathBuf>,
    /// Replace a file that exists
    #[arg(long)]
    force: bool,
    /// The agent's configuration file; the environment (SIGNET_*) goes before it
    #[arg(long, value_name = "file")]
    config: Option<PathBuf>,
    /// How many of each node's last flows, ends included
    #[arg(long, value_name = "number", default_value_t = 1000, value_parser = clap::value_parser!(u64).range(1..=1_000_000))]
    flows: u64,
}

/// Gathers and writes.
pub async fn run(args: SupportBundleArgs) -> Result<Exit, Failure> {
    let now = Timestamp::now();
    let name = format!("signet-support-{}", now.strftime("%Y%m%dT%H%M%SZ"));
    let target = match &args.output {
        Some(path) if path.as_os_str() == "-" => None,
        Some(path) => Some(path.clone()),
        None => Some(PathBuf::from(format!("{name}.tar.gz"))),
    };
    match &target {
        // Before anything is asked; writing looks again.
        Some(path) if !args.force && path.symlink_metadata().is_ok() => {
            return Err(archive::exists(path));
        }
        None if io::stdout().is_terminal() => {
            let why = "--output -: the archive is no text for a terminal; give a file, or a pipe";
            return Err(Failure::new(Exit::Usage, why));
        }
        _ => {}
    }
    let mut bundle = Bundle { archive: Archive::new(name, now), problems: Vec::new() };
    let exit = bundle.gather(&args, now).await;
    let problems = match &*bundle.problems {
        [] => "none\n".to_owned(),
        problems => problems.iter().map(|problem| format!("{problem}\n")).collect(),
    };
    bundle.archive.add("problems.txt", &problems)?;
    let bytes = bundle.archive.finish()?;
    match &target {
        Some(path) => {
            archive::write(path, &bytes, args.force)?;
            print(&format!("{}\n", path.display()))?;
        }
        None => {
            let mut out = io::stdout().lock();
            let written = out.write_all(&bytes).and_then(|()| out.flush());
            written.map_err(|e| Failure::new(Exit::Input, format!("stdout: {e}")))?;
        }
    }
    Ok(exit)
}

/// What was gathered so far.
struct Bundle {
    archive: Archive,
    /// What could not be had, and why; one line each.
    problems: Vec<String>,
}

impl Bundle {
    /// [`Exit::Done`] when every agent answers.
    async fn gather(&mut self, args: &SupportBundleArgs, now: Timestamp) -> Exit {
        let (agents, mut exit) = match sockets::connect_each(&args.sockets).await {
            Ok((agents, failures)) => {
                for failure in &failures {
                    self.problem("nodes", &failure.to_string());
                }
                (agents, if failures.is_empty() { Exit::Done } else { Exit::Unreachable })
            }
            Err(failure) => {
                self.problem("nodes", &failure.to_string());
                (Vec::new(), failure.exit)
            }
        };
        let mut versions = Vec::new();
        let mut taken = HashSet::new();
        for agent in &agents {
            match self.node(agent, args, &mut taken).await {
                Some(version) => versions.push(version),
                None => exit = Exit::Unreachable,
            }
        }
        let host = rustix::system::uname();
        let versions = serde_json::json!({
            "schema": "signet.dev/support-bundle/v1",
            "time": now.to_string(),
            "signet": env!("CARGO_PKG_VERSION"),
            "host": {
                "kernel": host.release().to_string_lossy(),
                "machine": host.machine().to_string_lossy(),
            },
            "agents": versions,
        });
        self.add("versions.json", Ok(format!("{versions:#}\n")));
        if args.sockets.is_remote() && args.config.is_none() {
            // What this host's environment says is not what the agents have.
            for part in ["config.txt", "check.txt", "metrics.txt", "maps.ndjson"] {
                self.problem(
                    part,
                    "agents are asked through the API server; run this in an agent's pod",
                );
            }
        } else {
            self.host(args).await;
        }
        exit
    }

    /// The configuration as this command reads it, and what it leads to.
    async fn host(&mut self, args: &SupportBundleArgs) {
        let mut sources = ConfigSources::from_process_env();
        sources.file.clone_from(&args.config);
        let loaded = match sources.load_without_node() {
            Ok(loaded) => loaded,
            Err(error) => {
                let why = Failure::caused(Exit::Input, error).to_string();
                self.problem("config.txt", &why);
                for part in ["check.txt", "metrics.txt", "maps.ndjson"] {
                    self.problem(part, "the configuration that leads there cannot be read");
                }
                return;
            }
        };
        self.add("config.txt", Ok(loaded.print()));
        let silent = |what: &str| {
            Failure::new(Exit::Unreachable, format!("{what} took longer than {PATIENCE:?}"))
        };
        let checked = tokio::time::timeout(PATIENCE, check::of_host(&loaded.config)).await;
        self.add("check.txt", checked.map_err(|_| silent("the check")));
        let page = match metrics_address(&loaded.config) {
            Some(address) => tokio::time::timeout(PATIENCE, metrics(address))
                .await
                .unwrap_or_else(|_| Err(silent("the page"))),
            None => Err(Failure::new(Exit::Unreachable, "metricsListen is off")),
        };
        self.add("metrics.txt", page);
        self.add("maps.ndjson", maps(&loaded.config));
    }

    /// An agent's parts, and what it says of itself; `None` when it does not answer.
    async fn node(
        &mut self,
        agent: &Agent,
        args: &SupportBundleArgs,
        taken: &mut HashSet<String>,
    ) -> Option<serde_json::Value> {
        let status = match status::ask(agent).await {
            Ok(status) => status,
            Err(failure) => {
                // It would be as silent about everything else.
                self.problem("nodes", &failure.to_string());
                return None;
            }
        };
        let about = status.agent.clone().unwrap_or_default();
        let dir = directory(&about.node, taken);
        self.add(&format!("{dir}/status.txt"), Ok(status::text(&status)));
        self.add(&format!("{dir}/status.json"), status::json(&status));
        self.add(&format!("{dir}/endpoints.json"), endpoints::json_of(agent).await);
        self.add(&format!("{dir}/identities.json"), identities::json_of(agent).await);
        self.add(&format!("{dir}/services.json"), services::json_of(agent).await);
        self.add(&format!("{dir}/svids.json"), svid::json_of(agent).await);
        let policies = policy::list_lines(std::slice::from_ref(agent)).await;
        let lines = |lines: Vec<String>| lines.into_iter().map(|line| line + "\n").collect();
        self.add(&format!("{dir}/policies.json"), policies.map(lines));
        let edges = aggregate::seen_by(agent, None).await.map(|edges| {
            edges.iter().map(|(node, edge)| format!("{}\n", aggregate::line(node, edge))).collect()
        });
        self.add(&format!("{dir}/edges.ndjson"), edges);
        if args.sockets.is_remote() {
            let why = "agents tell their log on their own socket only; take it by kubectl logs, or \
                       run this in an agent's pod";
            self.problem(&format!("{dir}/log.txt"), why);
        } else {
            self.add(&format!("{dir}/log.txt"), logs(agent).await);
        }
        let (flows, lost) = match recent(agent, args.flows).await {
            Ok((flows, lost)) => (Ok(flows), lost),
            Err(failure) => (Err(failure), Vec::new()),
        };
        self.add(&format!("{dir}/flows.ndjson"), flows);
        for lost in lost {
            self.problem(&format!("{dir}/flows.ndjson"), &lost);
        }
        Some(serde_json::json!({
            "node": about.node,
            "version": about.version,
            "kernel": about.kernel,
            "state": about.state,
        }))
    }

    fn add(&mut self, name: &str, part: Result<String, Failure>) {
        let added = part.and_then(|text| self.archive.add(name, &text));
        if let Err(failure) = added {
            self.problem(name, &failure.to_string());
        }
    }

    fn problem(&mut self, part: &str, why: &str) {
        let line = printable(&format!("{part}: {}", scrub::scrub(why)));
        anstream::eprintln!("warning: {line}");
        self.problems.push(line);
    }
}

/// A node's directory in the archive: its name, in characters that are good in any file system.
fn directory(node: &str, taken: &mut HashSet<String>) -> String {
    let safe = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
    let name: String = node.chars().map(|c| if safe(c) { c } else { '_' }).take(100).collect();
    let name = match name.trim_start_matches('.') {
        "" => "unnamed",
        name => name,
    };
    let mut dir = format!("nodes/{name}");
    let mut n = 2;
    while !taken.insert(dir.clone()) {
        dir = format!("nodes/{name}-{n}");
        n += 1;
    }
    dir
}

/// An agent's last log lines, after one that says how many there were before.
async fn logs(agent: &Agent) -> Result<String, Failure> {
    let mut client = AdminClient::new(agent.channel.clone());
    let parts = sockets::all_parts(agent, client.list_logs(ListLogsRequest {})).await?;
    let gone = parts.first().map_or(0, |part| part.gone);
    let mut text = format!("{gone} lines before these are not kept\n");
    for line in parts.iter().flat_map(|part| &part.lines) {
        text.push_str(&line.lines().map(printable).collect::<Vec<_>>().join("\n"));
        text.push('\n');
    }
    Ok(text)
}

/// Every map that this instance has pinned, a line of JSON each: what it is, and its rows in hex.
fn maps(config: &AgentConfig) -> Result<String, Failure> {
    let host = |error: KernelError| Failure::caused(Exit::Host, error);
    let pinned = Pinned::find(&config.bpffs, &config.instance).ok_or_else(|| {
        let at = config.bpffs.join(&config.instance);
        Failure::new(Exit::Host, format!("nothing is pinned at {}", at.display()))
    })?;
    let hex = |bytes: &[u8]| bytes.iter().map(|byte| format!("{byte:02x}")).collect::<String>();
    let mut text = String::new();
    for map in pinned.contents(MAX_ROWS).map_err(host)? {
        let rows = map
            .rows
            .as_ref()
            .map(|rows| rows.iter().map(|(key, value)| [hex(key), hex(value)]).collect::<Vec<_>>());
        let line = serde_json::json!({
            "schema": "signet.dev/map/v1",
            "version": map.version,
            "map": map.name,
            "type": map.kind,
            "keySize": map.key_size,
            "valueSize": map.value_size,
            "maxEntries": map.max_entries,
            "isComplete": map.is_complete,
            "rows": rows,
        });
        text.push_str(&format!("{line}\n"));
    }
    Ok(text)
}

/// An agent's last flows, a line of JSON each, and warnings of what was lost.
async fn recent(agent: &Agent, number: u64) -> Result<(String, Vec<String>), Failure> {
    use prost::Message as _;
    let request = GetFlowsRequest {
        number,
        extensions: Some(prost_types::Any {
            type_url: OPTIONS_TYPE.into(),
            value: detail::Options { ends: true }.encode_to_vec(),
        }),
        ..GetFlowsRequest::default()
    };
    let mut incoming = flows::ask(vec![agent.clone()], request);
    let gathering = async {
        let (mut text, mut lost) = (String::new(), Vec::new());
        while let Some(message) = incoming.recv().await {
            match message {
                Incoming::Flow(answer) => {
                    let line = flow_lines::json(&answer.seen);
                    text.push_str(&line.map_err(|e| Failure::caused(Exit::Bug, e))?);
                    text.push('\n');
                }
                Incoming::Lost(_, warning) => lost.push(warning),
                Incoming::Ended(result) => result?,
            }
        }
        Ok((text, lost))
    };
    tokio::time::timeout(FLOWS_WITHIN, gathering).await.unwrap_or_else(|_| {
        let why = format!("{}: they took longer than {FLOWS_WITHIN:?}", agent.socket);
        Err(Failure::new(Exit::Unreachable, why))
    })
}

/// Where the agent's page is; one that listens everywhere listens on loopback, too.
fn metrics_address(config: &AgentConfig) -> Option<SocketAddr> {
    let mut address = config.metrics_listen?;
    if address.ip().is_unspecified() {
        let loopback = match address {
            SocketAddr::V4(_) => std::net::Ipv4Addr::LOCALHOST.into(),
            SocketAddr::V6(_) => std::net::Ipv6Addr::LOCALHOST.into(),
        };
        address.set_ip(loopback);
    }
    Some(address)
}

/// The metrics page.
async fn metrics(address: SocketAddr) -> Result<String, Failure> {
    let url = format!("http://{address}/metrics");
    let failed = |why: String| Failure::new(Exit::Unreachable, format!("{url}: {why}"));
    let uri = url.parse::<http::Uri>().map_err(|e| failed(e.to_string()))?;
    let client = Client::builder(TokioExecutor::new()).build_http::<Empty<Bytes>>();
    let answer = client.get(uri).await.map_err(|e| {
        Failure::caused(Exit::Unreachable, anyhow::Error::new(e).context(url.clone()))
    })?;
    if !answer.status().is_success() {
        return Err(failed(format!("the answer is {}", answer.status())));
    }
    let body = Limited::new(answer.into_body(), MAX_METRICS).collect().await;
    let body = body.map_err(|e| failed(e.to_string()))?.to_bytes();
    String::from_utf8(body.to_vec()).map_err(|_| failed("the page is no UTF-8".into()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn directories_are_distinct_and_stay_in_the_archive() {
        let mut taken = HashSet::new();
        let names = ["node-1", "node-1", "../etc", "a/b", "..", "", "é"];
        let dirs: Vec<String> = names.iter().map(|name| directory(name, &mut taken)).collect();
        assert_eq!(
            dirs,
            [
                "nodes/node-1",
                "nodes/node-1-2",
                "nodes/_etc",
                "nodes/a_b",
                "nodes/unnamed",
                "nodes/unnamed-2",
                "nodes/_"
            ]
        );
    }

    #[test]
    fn a_page_that_is_everywhere_is_asked_for_here() {
        let at = |listen: &str| {
            let listen = Some(listen.parse().unwrap());
            metrics_address(&AgentConfig { metrics_listen: listen, ..AgentConfig::default() })
        };
        assert_eq!(at("0.0.0.0:15020"), "127.0.0.1:15020".parse().ok());
        assert_eq!(at("[::]:15020"), "[::1]:15020".parse().ok());
        assert_eq!(at("10.0.0.1:15020"), "10.0.0.1:15020".parse().ok());
    }
}
