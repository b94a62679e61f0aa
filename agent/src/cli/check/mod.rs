//! `signet check`: whether a node, or a cluster, has what Signet needs, before and after it is
//! there.

mod cluster;
mod node;
mod pods;

use serde::Serialize;

use super::{
    exit::{Exit, Failure, print},
    status::Output,
    table::{Table, printable},
};
use crate::config::{AgentConfig, ConfigSources};

/// Arguments of `signet check`.
#[derive(clap::Args, Debug)]
#[command(after_help = "\
Examples:
  signet check --config /etc/signet/agent/agent.yaml
  kubectl -n signet-system exec ds/signet-agent -- signet check --config FILE
  signet check cluster --kubeconfig ~/.kube/config
  signet check -o json

Looks only, and changes nothing. Exits with 0 when nothing fails (warnings do not), with 6 when this
host cannot, 4 when the API server or the authority does not answer, 5 when a right is missing, 1
when something else fails; the first of these that there is.")]
pub struct CheckArgs {
    /// What is looked at: this node with what its agent needs, or a cluster from anywhere
    #[arg(value_enum, default_value = "node")]
    part: Part,
    /// The agent's configuration file; the environment (SIGNET_*) goes before it
    #[arg(long, value_name = "file")]
    config: Option<std::path::PathBuf>,
    #[command(flatten)]
    cluster: cluster::ClusterArgs,
    /// How it is shown
    #[arg(short, long, value_name = "form", default_value = "text")]
    output: Output,
}

#[derive(clap::ValueEnum, Clone, Copy, PartialEq, Eq, Debug)]
enum Part {
    /// Kernel, cgroups, pins, ports, pods' links; the agent's rights, its authority.
    Node,
    /// The API server, what is installed, the agents' rights, what runs.
    Cluster,
}

/// Looks and prints.
pub async fn run(args: CheckArgs) -> Result<Exit, Failure> {
    let mut findings = Findings::default();
    match args.part {
        Part::Node => {
            let config = configuration(&args)?;
            node::look(&config, &mut findings).await;
            cluster::look_as_agent(&config, &mut findings).await;
        }
        Part::Cluster => cluster::look(&args.cluster, &mut findings).await?,
    }
    let text = match args.output {
        Output::Text => findings.text(),
        Output::Json => {
            let json = serde_json::to_string(&findings.json());
            json.map_err(|error| Failure::caused(Exit::Bug, error))? + "\n"
        }
    };
    print(&text)?;
    Ok(findings.exit())
}

/// What `signet check` says of this host.
pub async fn of_host(config: &AgentConfig) -> String {
    let mut findings = Findings::default();
    node::look(config, &mut findings).await;
    findings.text()
}

fn configuration(args: &CheckArgs) -> Result<AgentConfig, Failure> {
    let mut sources = ConfigSources::from_process_env();
    sources.file.clone_from(&args.config);
    let loaded = sources.load_without_node().map_err(|e| Failure::caused(Exit::Input, e))?;
    Ok(loaded.config)
}

/// What was found, in the order in which it was looked for.
#[derive(Default, Debug)]
struct Findings {
    all: Vec<Finding>,
}

#[derive(Serialize, Clone, PartialEq, Eq, Debug)]
struct Finding {
    /// `kernel`, `cgroups`, `pods`, `api`, …
    area: &'static str,
    check: &'static str,
    state: State,
    detail: String,
    /// What to do about it.
    #[serde(skip_serializing_if = "Option::is_none")]
    remedy: Option<String>,
    /// What kind of failure it is.
    #[serde(skip)]
    exit: Exit,
}

#[derive(Serialize, Clone, Copy, PartialEq, Eq, Debug)]
#[serde(rename_all = "lowercase")]
enum State {
    /// As it should be.
    Ok,
    /// Signet works; less is possible.
    Warning,
    /// Signet does not work, or not as configured.
    Failed,
    /// Could not be looked at, because of something above.
    Skipped,
}

impl State {
    const fn name(self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::Warning => "warning",
            Self::Failed => "failed",
            Self::Skipped => "skipped",
        }
    }
}

impl Findings {
    fn ok(&mut self, area: &'static str, check: &'static str, detail: impl Into<String>) {
        self.add(area, check, State::Ok, detail.into(), None, Exit::Done);
    }

    fn skipped(&mut self, area: &'static str, check: &'static str, why: impl Into<String>) {
        self.add(area, check, State::Skipped, why.into(), None, Exit::Done);
    }

    fn warning(
        &mut self,
        area: &'static str,
        check: &'static str,
        detail: impl Into<String>,
        remedy: impl Into<String>,
    ) {
        let remedy = Some(remedy.into());
        self.add(area, check, State::Warning, detail.into(), remedy, Exit::Done);
    }

    fn failed(
        &mut self,
        area: &'static str,
        check: &'static str,
        exit: Exit,
        detail: impl Into<String>,
        remedy: impl Into<String>,
    ) {
        self.add(area, check, State::Failed, detail.into(), Some(remedy.into()), exit);
    }

    fn add(
        &mut self,
        area: &'static str,
        check: &'static str,
        state: State,
        detail: String,
        remedy: Option<String>,
        exit: Exit,
    ) {
        self.all.push(Finding { area, check, state, detail, remedy, exit });
    }

    fn count(&self, state: State) -> usize {
        self.all.iter().filter(|finding| finding.state == state).count()
    }

    /// The most fundamental failure's.
    fn exit(&self) -> Exit {
        let failed = || self.all.iter().filter(|finding| finding.state == State::Failed);
        [Exit::Host, Exit::Unreachable, Exit::Denied]
            .into_iter()
            .find(|exit| failed().any(|finding| finding.exit == *exit))
            .unwrap_or(if failed().next().is_some() { Exit::No } else { Exit::Done })
    }

    fn text(&self) -> String {
        let rows: Vec<Vec<String>> = self
            .all
            .iter()
            .map(|f| {
                let cells = [f.area, f.state.name(), f.check].map(String::from);
                cells.into_iter().chain([printable(&f.detail)]).collect()
            })
            .collect();
        let mut text = String::new();
        for (line, finding) in Table::plain(&rows).into_iter().zip(&self.all) {
            text.push_str(&line);
            text.push('\n');
            if let Some(remedy) = &finding.remedy {
                text.push_str(&format!("  -> {}\n", printable(remedy)));
            }
        }
        text.push_str(&format!(
            "{} ok, {} warnings, {} failed, {} skipped\n",
            self.count(State::Ok),
            self.count(State::Warning),
            self.count(State::Failed),
            self.count(State::Skipped)
        ));
        text
    }

    fn json(&self) -> Json<'_> {
        let ok = self.count(State::Failed) == 0;
        Json { schema: "signet.dev/check/v1", ok, findings: &self.all }
    }
}

#[derive(Serialize)]
struct Json<'a> {
    schema: &'static str,
    ok: bool,
    findings: &'a [Finding],
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn findings_are_shown_with_their_remedies_and_the_first_failure_decides() {
        let mut findings = Findings::default();
        findings.ok("kernel", "release", "Linux 6.18");
        findings.warning("kernel", "tcx", "is missing", "clsact filters are used");
        assert_eq!(findings.exit(), Exit::Done);
        findings.skipped("api", "rights", "no API server");
        findings.failed("ports", "metricsListen", Exit::No, "is taken", "choose another");
        assert_eq!(findings.exit(), Exit::No);
        findings.failed("api", "server", Exit::Unreachable, "silent", "start it");
        assert_eq!(findings.exit(), Exit::Unreachable);
        findings.failed("kernel", "bpf", Exit::Host, "none", "build it");
        assert_eq!(findings.exit(), Exit::Host);
        assert_eq!(
            findings.text(),
            "kernel  ok       release        Linux 6.18\n\
             kernel  warning  tcx            is missing\n  -> clsact filters are used\n\
             api     skipped  rights         no API server\n\
             ports   failed   metricsListen  is taken\n  -> choose another\n\
             api     failed   server         silent\n  -> start it\n\
             kernel  failed   bpf            none\n  -> build it\n\
             1 ok, 1 warnings, 3 failed, 1 skipped\n"
        );
        let json = serde_json::to_value(findings.json()).unwrap();
        assert_eq!(
            (&json["ok"], &json["findings"][1]["state"]),
            (&false.into(), &"warning".into())
        );
        assert_eq!(json["findings"][0].get("remedy"), None);
    }
}
