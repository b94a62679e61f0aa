//! The command line: arguments to one command, and its exit code.

mod agent;
mod aggregate;
mod authority;
mod check;
mod edges;
mod endpoints;
#[cfg(test)]
mod examples;
mod exit;
mod fetch;
mod filters;
mod flow_lines;
mod flows;
mod host;
mod identities;
mod policy;
mod probe;
mod remote;
mod rollout;
mod services;
mod shell;
mod sockets;
mod status;
mod support_bundle;
mod svid;
mod table;
mod top;
mod ui;

use std::{ffi::OsString, process::ExitCode};

use clap::{CommandFactory, FromArgMatches, Parser, Subcommand};

pub use self::exit::{Exit, Failure};
use crate::config::{ConfigSources, Loaded};

/// Sidecarless identity enforcement for Kubernetes.
#[derive(Parser, Debug)]
#[command(
    name = "signet",
    version,
    max_term_width = 100,
    after_help = "\
Examples:
  signet flows --verdict dropped --last 50
  signet flows -f -n shop --not --port 53
  signet status
  signet endpoints shop/payments-5b7f
  signet services shop/payments
  signet policy check --from shop/front --to shop/db-0:5432
  signet svid list
  signet rollout check shop --to strict

Exit codes: 0 done or yes; 1 the answer is no; 2 usage; 3 bad input; 4 agent unreachable;
5 not permitted; 6 this host cannot; 70 a bug."
)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand, Debug)]
#[allow(clippy::large_enum_variant, reason = "there is one in a process")]
enum Command {
    /// Run the node agent, or release or uninstall it on this node.
    Agent(agent::AgentArgs),
    /// Close a node that has just booted until its agent knows its pods; runs before the kubelet.
    Guard(host::GuardArgs),
    /// Run the certificate authority of a trust domain, or rotate its root.
    Authority(authority::AuthorityArgs),
    /// Show verdicts on flows, past and live.
    Flows(Box<flows::FlowsArgs>),
    /// Show whether the agent does its work, and what keeps it from it.
    Status(status::StatusArgs),
    /// Say whether this node, or a cluster, has what Signet needs, and what to do where not.
    Check(check::CheckArgs),
    /// Ask whether the agent is ready or live: for the kubelet.
    Probe(probe::ProbeArgs),
    /// Show the pods of this node: mode, identity, policies, drops.
    Endpoints(endpoints::EndpointsArgs),
    /// Show the identities that this node's kernel knows, and whose they are.
    Identities(identities::IdentitiesArgs),
    /// Show Services as this node knows them, and how an enrolled pod gets to each endpoint.
    Services(services::ServicesArgs),
    /// Say what a change would break, before it is made.
    #[command(subcommand)]
    Rollout(rollout::RolloutCommand),
    /// Show rates, denials and how long flows last, by identity, live.
    Top(top::TopArgs),
    /// Gather what somebody needs who helps from afar: one archive, without keys and tokens.
    SupportBundle(support_bundle::SupportBundleArgs),
    /// Serve a page on this host with who talks to whom, live.
    Ui(ui::UiArgs),
    /// Show policies, check them, and ask what they make of a flow.
    #[command(subcommand)]
    Policy(policy::PolicyCommand),
    /// Show the agent's SVIDs, or fetch one's own inside a pod.
    #[command(subcommand)]
    Svid(svid::SvidCommand),
    /// Print a script with which a shell completes commands, flags and values.
    Completion(shell::CompletionArgs),
    /// Write man pages.
    Man(shell::ManArgs),
}

/// Runs one command; `run_agent` is the node agent, which a command line alone does not need.
pub fn main(
    args: impl IntoIterator<Item = OsString>,
    run_agent: impl FnOnce(Loaded, ConfigSources) -> Result<(), Failure>,
) -> ExitCode {
    let args: Vec<OsString> = args.into_iter().collect();
    if args.get(1).is_none_or(|command| command != "agent" && command != "authority") {
        // A command that only asks ends at any panic; the agent deals with its own.
        let report = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |info| {
            report(info);
            std::process::exit(i32::from(Exit::Bug.code()));
        }));
    }
    match run(args, run_agent) {
        Ok(exit) => exit.into(),
        Err(failure) => {
            anstream::eprintln!("error: {failure}");
            failure.exit.into()
        }
    }
}

fn run(
    args: impl IntoIterator<Item = OsString>,
    run_agent: impl FnOnce(Loaded, ConfigSources) -> Result<(), Failure>,
) -> Result<Exit, Failure> {
    let parsed = Cli::command()
        .try_get_matches_from(args)
        .and_then(|matches| Ok((Cli::from_arg_matches(&matches)?, matches)));
    let (cli, matches) = match parsed {
        Ok(parsed) => parsed,
        Err(error) => {
            // Help and version go to stdout and are no error.
            let _ = error.print();
            return Ok(if error.use_stderr() { Exit::Usage } else { Exit::Done });
        }
    };
    match cli.command {
        Command::Agent(args) => agent::run(args, run_agent),
        Command::Guard(args) => host::run_guard(args),
        Command::Authority(args) => authority::run(args),
        Command::Flows(args) => {
            let terms = filters::terms(matches.subcommand_matches("flows"))?;
            client(flows::run(*args, terms))
        }
        Command::Status(args) => client(status::run(args)),
        Command::Check(args) => client(check::run(args)),
        Command::Probe(args) => client(probe::run(args)),
        Command::Endpoints(args) => client(endpoints::run(args)),
        Command::Identities(args) => client(identities::run(args)),
        Command::Services(args) => client(services::run(args)),
        Command::Rollout(command) => client(rollout::run(command)),
        Command::Policy(command) => client(policy::run(command)),
        Command::Top(args) => client(top::run(args)),
        Command::SupportBundle(args) => client(support_bundle::run(args)),
        Command::Ui(args) => client(ui::run(args)),
        Command::Svid(command) => client(svid::run(command)),
        Command::Completion(args) => shell::completion(Cli::command(), &args),
        Command::Man(args) => shell::man(Cli::command(), &args),
    }
}

/// Runs a command that only asks, on this thread.
fn client(command: impl Future<Output = Result<Exit, Failure>>) -> Result<Exit, Failure> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|e| Failure::new(Exit::Host, format!("no runtime can be started: {e}")))?;
    runtime.block_on(command)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn exit_of(args: &[&str]) -> Result<Exit, Failure> {
        let args = ["signet"].iter().chain(args).map(OsString::from);
        run(args, |loaded, _| {
            Err(Failure::new(Exit::Host, format!("asked to run as {}", loaded.config.node)))
        })
    }

    #[test]
    fn the_arguments_are_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn help_is_no_error_and_nonsense_is_usage() {
        assert_eq!(exit_of(&["--help"]).unwrap(), Exit::Done);
        assert_eq!(exit_of(&["flows", "--help"]).unwrap(), Exit::Done);
        assert_eq!(exit_of(&["agent", "--help"]).unwrap(), Exit::Done);
        assert_eq!(exit_of(&["flows", "--no-such-flag"]).unwrap(), Exit::Usage);
        assert_eq!(exit_of(&["no-such-command"]).unwrap(), Exit::Usage);
    }

    #[test]
    fn agent_flags_become_configuration() {
        // The control: with good flags the agent is run.
        let failure =
            exit_of(&["agent", "--node", "node-7", "--authority", "embedded"]).unwrap_err();
        assert_eq!(
            (failure.exit, failure.to_string()),
            (Exit::Host, "asked to run as node-7".into())
        );

        let failure = exit_of(&["agent"]).unwrap_err();
        assert_eq!(failure.exit, Exit::Input);
        assert!(failure.to_string().contains("--node"), "{failure}");

        let failure = exit_of(&["agent", "--node", "n", "--svid-ttl", "soon"]).unwrap_err();
        assert_eq!(failure.exit, Exit::Input);
        assert!(failure.to_string().contains("--svid-ttl"), "{failure}");
        assert!(failure.to_string().contains("soon"), "{failure}");

        let failure = exit_of(&["agent", "--node", "n", "--config", "/no/such/file"]).unwrap_err();
        assert_eq!(failure.exit, Exit::Input);
        assert!(failure.to_string().contains("/no/such/file"), "{failure}");
    }

    #[test]
    fn print_config_runs_no_agent() {
        assert_eq!(exit_of(&["agent", "--node", "n", "--print-config"]).unwrap(), Exit::Done);
    }

    #[test]
    fn policies_are_checked_without_an_agent() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("cluster.yaml");
        let text = "apiVersion: v1
kind: Namespace
metadata: {name: shop, labels: {signet.dev/mode: strict}}
---
apiVersion: v1
kind: Pod
metadata: {name: db, namespace: shop, uid: u1, labels: {app: db}}
spec: {serviceAccountName: db, containers: []}
status: {phase: Running, podIPs: [{ip: 10.0.0.1}]}
---
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: db, namespace: shop}
spec: {rules: [{from: [{source: {principals: [cluster.local/ns/shop/sa/front]}}]}]}
";
        std::fs::write(&file, text).unwrap();
        let file = file.to_str().unwrap();
        let check = |from: &str, to: &str| {
            exit_of(&["policy", "check", "--from", from, "--to", to, "-f", file])
        };
        assert_eq!(check("shop/front", "shop/db:5432").unwrap(), Exit::Done);
        assert_eq!(check("shop/back", "shop/db:5432").unwrap(), Exit::No);
        assert_eq!(check("@192.0.2.1", "shop/db:5432").unwrap(), Exit::No);
        // The override of a cluster's directory, and its default.
        let in_dir = |more: &[&str]| {
            let dir = dir.path().to_str().unwrap();
            let asked = ["policy", "check", "--from", "shop/back", "--cluster-dir", dir];
            exit_of(&[&asked, more].concat()).unwrap()
        };
        assert_eq!(in_dir(&["--to", "shop/db:5432"]), Exit::No);
        let switch = dir.path().join("enforcement.yaml");
        std::fs::write(&switch, "enforcement: audit").unwrap();
        assert_eq!(in_dir(&["--to", "shop/db:5432"]), Exit::Done);
        std::fs::remove_file(&switch).unwrap();
        let other = text.replace("kind: AuthorizationPolicy", "kind: Telemetry");
        std::fs::write(file, other).unwrap();
        assert_eq!(in_dir(&["--to", "shop/db:5432"]), Exit::Done);
        assert_eq!(in_dir(&["--to", "shop/db:5432", "--default-action", "deny"]), Exit::No);
        std::fs::write(file, text).unwrap();
        assert_eq!(check("shop/front", "shop/gone:5432").unwrap_err().exit, Exit::Input);
        assert_eq!(check("shop/front", "shop/db").unwrap_err().exit, Exit::Usage);
        assert_eq!(exit_of(&["policy", "validate", file]).unwrap(), Exit::Done);
        let broken = dir.path().join("broken.yaml");
        std::fs::write(&broken, text.replace("principals", "principal")).unwrap();
        let broken = broken.to_str().unwrap();
        assert_eq!(exit_of(&["policy", "validate", file, broken]).unwrap(), Exit::No);
        let missing = exit_of(&["policy", "validate", "/no/such/file"]).unwrap_err();
        assert_eq!(missing.exit, Exit::Input);
        assert!(missing.to_string().contains("/no/such/file"), "{missing}");
    }

    #[test]
    fn an_agent_that_nobody_serves_is_unreachable() {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("agent.sock");
        let check = ["policy", "check", "--from", "a/b", "--to", "a/b:1"];
        let commands: [&[&str]; 10] = [
            &["flows"],
            &["top", "--once"],
            &["status"],
            &["endpoints"],
            &["identities"],
            &["services"],
            &["svid", "list"],
            &["rollout", "check", "shop", "--to", "strict"],
            &["policy", "list"],
            &check,
        ];
        for command in commands {
            let arguments = [command, &["--socket", socket.to_str().unwrap()]].concat();
            let failure = exit_of(&arguments).unwrap_err();
            assert_eq!(failure.exit, Exit::Unreachable, "{command:?}");
            assert!(failure.to_string().contains("agent.sock"), "{failure}");
        }
    }
}
