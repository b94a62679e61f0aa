//! `signet agent`: flags are the configuration's keys.

use std::{path::PathBuf, sync::OnceLock};

use clap::{Arg, ArgAction, ArgMatches, Args, FromArgMatches, Subcommand, builder::ValueParser};

use super::{
    exit::{Exit, Failure},
    host::{self, HostCommand},
};
use crate::config::{ConfigSources, KEYS, Loaded};

/// Arguments of `signet agent`: one flag for every configuration key, and these. Without a
/// command the agent runs.
#[derive(Debug, Default)]
pub struct AgentArgs {
    config: Option<PathBuf>,
    print_config: bool,
    flags: Vec<(String, String)>,
    command: Option<HostCommand>,
}

/// Runs the agent, or prints its configuration.
pub fn run(
    args: AgentArgs,
    run_agent: impl FnOnce(Loaded, ConfigSources) -> Result<(), Failure>,
) -> Result<Exit, Failure> {
    if let Some(command) = args.command {
        return host::run(command);
    }
    let mut sources = ConfigSources::from_process_env();
    sources.file = args.config;
    sources.flags = args.flags;
    let loaded = sources.load().map_err(|e| Failure::caused(Exit::Input, e))?;
    if args.print_config {
        anstream::print!("{}", loaded.print());
        return Ok(Exit::Done);
    }
    run_agent(loaded, sources)?;
    Ok(Exit::Done)
}

/// Flag, form and help of every key; clap wants them for as long as the process lives.
pub(super) fn flags() -> &'static [(String, String)] {
    static FLAGS: OnceLock<Vec<(String, String)>> = OnceLock::new();
    FLAGS.get_or_init(|| {
        KEYS.iter()
            .map(|key| {
                let default = match key.default_text() {
                    text if text.is_empty() || text == "null" || text == "[]" => String::new(),
                    text => format!(" [default: {text}]"),
                };
                (key.flag(), format!("{} [env: {}]{default}", key.doc, key.env()))
            })
            .collect()
    })
}

impl Args for AgentArgs {
    fn augment_args(command: clap::Command) -> clap::Command {
        let command = command
            .arg(
                Arg::new("config")
                    .long("config")
                    .value_name("file")
                    .value_parser(ValueParser::path_buf())
                    .help("Configuration file (YAML); environment and flags go before it"),
            )
            .arg(
                Arg::new("print-config")
                    .long("print-config")
                    .action(ArgAction::SetTrue)
                    .help("Print every key with its value and where that comes from, and exit"),
            )
            .after_help(
                "Examples:\n  signet agent --node node-1 --cluster-dir /etc/signet/cluster\n  \
                 signet agent --node node-1 --kubeconfig /etc/signet/kubeconfig\n  \
                 signet agent --config /etc/signet/agent.yaml --print-config\n  \
                 signet agent release --pod shop/payments-5b7f",
            );
        let command =
            HostCommand::augment_subcommands(command).args_conflicts_with_subcommands(true);
        KEYS.iter().zip(flags()).fold(command, |command, (key, (flag, help))| {
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

impl FromArgMatches for AgentArgs {
    fn from_arg_matches(matches: &ArgMatches) -> Result<Self, clap::Error> {
        let mut args = Self {
            config: matches.get_one::<PathBuf>("config").cloned(),
            print_config: matches.get_flag("print-config"),
            flags: Vec::new(),
            command: match matches.subcommand() {
                Some(_) => Some(HostCommand::from_arg_matches(matches)?),
                None => None,
            },
        };
        for (flag, _) in flags() {
            for value in matches.get_many::<String>(flag).into_iter().flatten() {
                args.flags.push((flag.clone(), value.clone()));
            }
        }
        Ok(args)
    }

    fn update_from_arg_matches(&mut self, matches: &ArgMatches) -> Result<(), clap::Error> {
        *self = Self::from_arg_matches(matches)?;
        Ok(())
    }
}
