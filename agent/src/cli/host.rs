//! What `signet agent release | rearm | uninstall` and `signet guard` print. They act on the
//! node that they run on, as root, and need no agent.

use std::{path::PathBuf, time::Duration};

use clap::{Arg, ArgAction, ArgMatches, Args, FromArgMatches, builder::ValueParser};

use super::exit::{self, Exit, Failure};
use crate::{
    config::{AgentConfig, ConfigSources, KEYS},
    kernel::{self, KernelConfig, features},
    lifecycle::{LifecycleError, boot, guard, release, uninstall},
};

/// The configuration's keys that matter on a node without an agent.
const HOST_KEYS: [&str; 9] = [
    "bpffs",
    "cgroupRoot",
    "enforcement",
    "instance",
    "nodeCgroup",
    "runDir",
    "stateDir",
    "unknownPods",
    "workloadSocket",
];

/// Where the agent's things are: the agent's own flags and file.
#[derive(Clone, Debug, Default)]
pub struct Place {
    config: Option<PathBuf>,
    flags: Vec<(String, String)>,
}

impl Place {
    /// The configuration.
    fn load(&self) -> Result<AgentConfig, Failure> {
        let mut sources = ConfigSources::from_process_env();
        sources.file.clone_from(&self.config);
        sources.flags.clone_from(&self.flags);
        let loaded = sources.load_without_node().map_err(|e| Failure::caused(Exit::Input, e))?;
        kernel::check_permitted().map_err(|e| Failure::caused(Exit::Host, e))?;
        Ok(loaded.config)
    }
}

impl Args for Place {
    fn augment_args(command: clap::Command) -> clap::Command {
        let command = command.arg(
            Arg::new("config")
                .long("config")
                .value_name("file")
                .value_parser(ValueParser::path_buf())
                .help("The agent's configuration file; environment and flags go before it"),
        );
        super::agent::flags()
            .iter()
            .zip(KEYS)
            .filter(|(_, key)| HOST_KEYS.contains(&key.name))
            .fold(command, |command, ((flag, help), key)| {
                command.arg(
                    Arg::new(flag.as_str())
                        .long(flag.as_str())
                        .value_name(key.form)
                        .action(ArgAction::Append)
                        .help(help.as_str()),
                )
            })
    }

    fn augment_args_for_update(command: clap::Command) -> clap::Command {
        Self::augment_args(command)
    }
}

impl FromArgMatches for Place {
    fn from_arg_matches(matches: &ArgMatches) -> Result<Self, clap::Error> {
        let mut place =
            Self { config: matches.get_one::<PathBuf>("config").cloned(), flags: Vec::new() };
        let keys = super::agent::flags().iter().zip(KEYS);
        for ((flag, _), _) in keys.filter(|(_, key)| HOST_KEYS.contains(&key.name)) {
            for value in matches.get_many::<String>(flag).into_iter().flatten() {
                place.flags.push((flag.clone(), value.clone()));
            }
        }
        Ok(place)
    }

    fn update_from_arg_matches(&mut self, matches: &ArgMatches) -> Result<(), clap::Error> {
        *self = Self::from_arg_matches(matches)?;
        Ok(())
    }
}

/// What is done to a node under `signet agent`.
#[derive(clap::Subcommand, Debug)]
pub enum HostCommand {
    /// Stop enforcing on this node, or one pod's, until it is re-armed; needs no agent.
    #[command(after_help = "\
Examples:
  signet agent release
  signet agent release --pod shop/payments-5b7f
  kubectl -n signet-system exec ds/signet-agent -- signet agent release")]
    Release(ReleaseArgs),
    /// End what `signet agent release` began.
    #[command(after_help = "\
Examples:
  signet agent rearm
  signet agent rearm --pod shop/payments-5b7f")]
    Rearm(ReleaseArgs),
    /// Remove programs, links, pins, filters and sockets from this node. The agent must not run.
    #[command(after_help = "\
Examples:
  signet agent uninstall
  signet agent uninstall --state")]
    Uninstall(UninstallArgs),
}

/// Arguments of `signet agent release` and `rearm`.
#[derive(clap::Args, Debug)]
pub struct ReleaseArgs {
    #[command(flatten)]
    place: Place,
    /// One pod, instead of the whole node
    #[arg(long, value_name = "namespace/name")]
    pod: Option<String>,
}

/// Arguments of `signet agent uninstall`.
#[derive(clap::Args, Debug)]
pub struct UninstallArgs {
    #[command(flatten)]
    place: Place,
    /// Remove the state directory, too: the history of flows, and the embedded authority's
    /// root with its key
    #[arg(long)]
    state: bool,
    /// Remove the guard's binary and systemd unit below this directory, too
    #[arg(long, value_name = "directory")]
    host_root: Option<PathBuf>,
    /// Then stay until SIGTERM: for a DaemonSet, whose pods must not end
    #[arg(long)]
    stay: bool,
}

/// Arguments of `signet guard`.
#[derive(clap::Args, Debug)]
#[command(
    args_conflicts_with_subcommands = true,
    after_help = "\
Examples:
  signet guard
  signet guard install --host-root /host
  signet guard --timeout 120 --cgroup-root /kubepods.slice"
)]
pub struct GuardArgs {
    #[command(flatten)]
    place: Place,
    /// Pods that nobody knows are refused for at most so many seconds, if no agent comes
    #[arg(long, value_name = "seconds", default_value_t = guard::MAX_TIMEOUT.as_secs(),
          value_parser = clap::value_parser!(u64).range(1..=guard::MAX_TIMEOUT.as_secs()))]
    timeout: u64,
    /// The kubelet's configuration, which names its cgroup driver
    #[arg(long, value_name = "file", default_value = "/var/lib/kubelet/config.yaml")]
    kubelet_config: PathBuf,
    #[command(subcommand)]
    command: Option<GuardCommand>,
}

#[derive(clap::Subcommand, Debug)]
enum GuardCommand {
    /// Copy this binary and a systemd unit onto a node, so that the guard runs at its next boot.
    #[command(after_help = "\
Examples:
  signet guard install
  signet guard install --host-root /host")]
    Install {
        /// The node's root directory
        #[arg(long, value_name = "directory", default_value = "/")]
        host_root: PathBuf,
    },
}

/// Runs one of the agent's commands.
pub fn run(command: HostCommand) -> Result<Exit, Failure> {
    match command {
        HostCommand::Release(args) => {
            let config = args.place.load()?;
            let outcome = release::release(&config, args.pod.as_deref()).map_err(failure)?;
            let what = args.pod.as_deref().unwrap_or("this node");
            exit::print(&format!(
                "released: {what}; {}\nIt stays so until `signet agent rearm`; an agent shows it \
                 in `signet status`.\n",
                described(&outcome, "open")
            ))?;
        }
        HostCommand::Rearm(args) => {
            let config = args.place.load()?;
            let outcome = release::rearm(&config, args.pod.as_deref()).map_err(failure)?;
            let what = args.pod.as_deref().unwrap_or("this node");
            exit::print(&format!("re-armed: {what}; {}\n", described(&outcome, "enforced again")))?;
        }
        HostCommand::Uninstall(args) => {
            let config = args.place.load()?;
            let outcome = uninstall::uninstall(&config, args.state).map_err(failure)?;
            let mut text = uninstalled(&config, &outcome);
            if let Some(root) = &args.host_root {
                for path in boot::uninstall(root).map_err(failure)? {
                    text.push_str(&format!("removed {}\n", path.display()));
                }
            }
            exit::print(&text)?;
            if args.stay {
                super::client(until_terminated())?;
            }
        }
    }
    Ok(Exit::Done)
}

/// Waits for SIGTERM or SIGINT.
async fn until_terminated() -> Result<Exit, Failure> {
    use tokio::signal::unix::{SignalKind, signal};
    let failed = |e| Failure::new(Exit::Host, format!("signals cannot be waited for: {e}"));
    let mut terminate = signal(SignalKind::terminate()).map_err(failed)?;
    let mut interrupt = signal(SignalKind::interrupt()).map_err(failed)?;
    tokio::select! {
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
    Ok(Exit::Done)
}

/// Runs the guard, or puts it onto the node.
pub fn run_guard(args: GuardArgs) -> Result<Exit, Failure> {
    if let Some(GuardCommand::Install { host_root }) = args.command {
        let mut text = String::new();
        for path in boot::install(&host_root).map_err(failure)? {
            text.push_str(&format!("wrote {}\n", path.display()));
        }
        exit::print(&text)?;
        return Ok(Exit::Done);
    }
    let config = args.place.load()?;
    let kernel = KernelConfig {
        bpffs: config.bpffs.clone(),
        instance: config.instance.clone(),
        workloads: config.cgroup_root.clone().into(),
        node: config.node_cgroup.clone().unwrap_or_else(|| "/".into()).into(),
        mask_features: std::env::var(features::MASK_VARIABLE).ok(),
        succeeds: false,
    };
    let timeout = Duration::from_secs(args.timeout);
    let outcome = guard::guard(&config, &kernel, &args.kubelet_config, timeout).map_err(failure)?;
    exit::print(&match outcome {
        guard::Outcome::Guarding { root } => format!(
            "guarding {root}: pods are refused until the agent knows them, for at most {} s\n",
            args.timeout
        ),
        guard::Outcome::AgentWasHere => {
            "nothing to guard: an agent has been here since this node booted\n".into()
        }
        guard::Outcome::NotEnforced => {
            "nothing to guard: the node is released, enforcement is not enforce, or unknownPods is \
             allow\n"
                .into()
        }
    })?;
    Ok(Exit::Done)
}

fn failure(error: LifecycleError) -> Failure {
    let exit = match &error {
        LifecycleError::AgentRuns { .. } => Exit::No,
        error if error.is_hosts() => Exit::Host,
        _ => Exit::Input,
    };
    Failure::caused(exit, error)
}

fn described(outcome: &release::Outcome, state: &str) -> String {
    match (outcome.is_pinned, outcome.pods.len()) {
        (false, _) => "no programs are attached here".into(),
        (true, 0) => "no enforced pod is registered".into(),
        (true, 1) => format!("{} is {state}", outcome.pods[0]),
        (true, n) => format!("{n} enforced pods are {state}: {}", outcome.pods.join(", ")),
    }
}

fn uninstalled(config: &AgentConfig, outcome: &uninstall::Outcome) -> String {
    let mut text = match &outcome.kernel {
        Some(removed) => format!(
            "removed from the kernel: {} links, {} maps, {} filters (pins of {})\n",
            removed.links,
            removed.maps,
            removed.filters,
            config.pin_dir().display()
        ),
        None => format!("nothing is pinned in {}\n", config.pin_dir().display()),
    };
    for file in &outcome.files {
        text.push_str(&format!("removed {}\n", file.display()));
    }
    if config.state_dir.exists() {
        text.push_str(&format!(
            "kept {}; `signet agent uninstall --state` removes it\n",
            config.state_dir.display()
        ));
    }
    text
}
