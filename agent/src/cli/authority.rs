//! `signet authority`: flags are the keys of its configuration; `rotate-root` works on the
//! same store.

use std::{collections::BTreeSet, path::PathBuf, sync::OnceLock, time::Duration};

use clap::{Arg, ArgAction, ArgMatches, Args, FromArgMatches, builder::ValueParser};

use super::exit::{Exit, Failure, print};
use crate::{
    authority::{
        self, AuthorityError,
        rotate::{self, Outcome},
        state::Phase,
    },
    config::{
        ConfigSources,
        authority::{AuthorityConfig, SETTINGS},
    },
};

/// Arguments of `signet authority`.
#[derive(Debug, Default)]
pub struct AuthorityArgs {
    config: Option<PathBuf>,
    print_config: bool,
    flags: Vec<(String, String)>,
    rotate: Option<RotateArgs>,
}

/// Arguments of `signet authority rotate-root`.
#[derive(Debug, Default)]
struct RotateArgs {
    excluded: BTreeSet<String>,
    timeout: Duration,
}

/// Runs the authority, prints its configuration, or rotates its root.
pub fn run(args: AuthorityArgs) -> Result<Exit, Failure> {
    let env = ConfigSources::from_process_env().env;
    let config = AuthorityConfig::load(args.config, &env, &args.flags)
        .map_err(|e| Failure::caused(Exit::Input, e))?;
    if args.print_config {
        print(&config.print())?;
        return Ok(Exit::Done);
    }
    let Some(rotation) = args.rotate else {
        authority::run(config).map_err(failure)?;
        return Ok(Exit::Done);
    };
    let say = |line: &str| {
        // A reader that has gone away does not stop the rotation.
        let _ = print(&format!("{line}\n"));
    };
    match rotate::run(&config, rotation.excluded, rotation.timeout, say).map_err(failure)? {
        Outcome::Done => Ok(Exit::Done),
        Outcome::Waiting { phase: Phase::Published, laggards } if !laggards.is_empty() => {
            Err(Failure::new(
                Exit::No,
                format!(
                    "the new root does not sign yet: {} has not reported the new bundle; look at \
                     the agents there, or run again with --exclude-node",
                    laggards.join(", ")
                ),
            ))
        }
        Outcome::Waiting { .. } => Err(Failure::new(
            Exit::No,
            "the rotation is not over; it goes on by itself, run again to follow it",
        )),
    }
}

fn failure(error: AuthorityError) -> Failure {
    let exit = match &error {
        e if e.is_unreachable() => Exit::Unreachable,
        e if e.is_bug() => Exit::Bug,
        AuthorityError::Listen { .. } => Exit::Host,
        _ => Exit::Input,
    };
    Failure::caused(exit, error)
}

/// Flag and help of every key; clap wants them for as long as the process lives.
fn flags() -> &'static [(String, String)] {
    static FLAGS: OnceLock<Vec<(String, String)>> = OnceLock::new();
    FLAGS.get_or_init(|| {
        let defaults = AuthorityConfig::default();
        SETTINGS
            .iter()
            .map(|setting| {
                let default = match setting.show(&defaults) {
                    text if text == "null" || text == "[]" => String::new(),
                    text => format!(" [default: {text}]"),
                };
                (setting.flag(), format!("{} [env: {}]{default}", setting.doc, setting.env()))
            })
            .collect()
    })
}

fn duration(text: &str) -> Result<Duration, String> {
    let parsed: Result<jiff::SignedDuration, _> = text.parse();
    parsed
        .ok()
        .and_then(|d| Duration::try_from(d).ok())
        .ok_or_else(|| "write a duration like 90s, 10m or 1h".into())
}

impl Args for AuthorityArgs {
    fn augment_args(command: clap::Command) -> clap::Command {
        let command = command
            .arg(
                Arg::new("config")
                    .long("config")
                    .global(true)
                    .value_name("file")
                    .value_parser(ValueParser::path_buf())
                    .help("Configuration file (YAML); environment and flags go before it"),
            )
            .arg(
                Arg::new("print-config")
                    .long("print-config")
                    .action(ArgAction::SetTrue)
                    .help("Print every key with its value, and exit"),
            )
            .subcommand(
                clap::Command::new("rotate-root")
                    .about("Replace the root: publish a new one, sign with it, retire the old")
                    .long_about(
                        "Replace the root. The new root joins the bundle; once every ready node has \
                         reported the bundle and two refresh hints have passed, it signs; after the \
                         longest TTL the old root leaves the bundle. The running authority takes the \
                         steps; this command begins the rotation, or joins the one in progress, and \
                         follows it.",
                    )
                    .after_help(
                        "Examples:\n  signet authority rotate-root\n  \
                         signet authority rotate-root --exclude-node node-7 --timeout 2h",
                    )
                    .arg(
                        Arg::new("exclude-node")
                            .long("exclude-node")
                            .value_name("node")
                            .action(ArgAction::Append)
                            .help("A node that is not waited for; its agent may lose its peers"),
                    )
                    .arg(
                        Arg::new("timeout")
                            .long("timeout")
                            .value_name("duration")
                            .default_value("30m")
                            .value_parser(duration)
                            .help("How long to follow; the rotation itself goes on"),
                    ),
            )
            .after_help(
                "Examples:\n  signet authority --store-secret signet-system/signet-root\n  \
                 signet authority --store-dir /var/lib/signet/authority --cluster-dir /etc/signet/cluster \\\n      \
                 --node-token-dir /etc/signet/tokens\n  \
                 signet authority rotate-root --store-dir /var/lib/signet/authority",
            );
        SETTINGS.iter().zip(flags()).fold(command, |command, (setting, (flag, help))| {
            command.arg(
                Arg::new(flag.as_str())
                    .long(flag.as_str())
                    .global(true)
                    .value_name(setting.form)
                    .action(ArgAction::Append)
                    .help(help.as_str()),
            )
        })
    }

    fn augment_args_for_update(command: clap::Command) -> clap::Command {
        Self::augment_args(command)
    }
}

impl FromArgMatches for AuthorityArgs {
    fn from_arg_matches(matches: &ArgMatches) -> Result<Self, clap::Error> {
        let rotate = matches.subcommand_matches("rotate-root").map(|matches| RotateArgs {
            excluded: matches
                .get_many::<String>("exclude-node")
                .into_iter()
                .flatten()
                .cloned()
                .collect(),
            timeout: matches.get_one::<Duration>("timeout").copied().unwrap_or_default(),
        });
        let mut args = Self {
            config: matches.get_one::<PathBuf>("config").cloned(),
            print_config: matches.get_flag("print-config"),
            flags: Vec::new(),
            rotate,
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
