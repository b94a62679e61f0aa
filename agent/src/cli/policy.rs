//! `signet policy …`.

mod check;
mod diff;
mod list;
mod networkpolicies;
mod suggest;
mod validate;

pub use self::list::list_lines;

use clap::Subcommand;

use super::exit::{Exit, Failure};
use crate::{policy::istio::ROOT_NAMESPACE, spiffe::TrustDomain};

/// The subcommands.
#[derive(Subcommand, Debug)]
pub enum PolicyCommand {
    /// Show the policies in force: from which object, about whom, what was not understood.
    List(list::ListArgs),
    /// Say what would become of a flow, rule by rule.
    Check(check::CheckArgs),
    /// Say which of the flows that were seen other policies would change.
    Diff(diff::DiffArgs),
    /// Write the least policies that what was seen coming in needs.
    Suggest(suggest::SuggestArgs),
    /// Read policies and say what is wrong with them, by file and line.
    Validate(validate::ValidateArgs),
}

/// Runs one of them.
pub async fn run(command: PolicyCommand) -> Result<Exit, Failure> {
    match command {
        PolicyCommand::List(args) => list::run(args).await,
        PolicyCommand::Check(args) => check::run(args).await,
        PolicyCommand::Diff(args) => diff::run(args).await,
        PolicyCommand::Suggest(args) => suggest::run(args).await,
        PolicyCommand::Validate(args) => validate::run(&args),
    }
}

/// How manifests are read that no agent reads.
#[derive(clap::Args, Clone, Debug)]
pub struct OfflineArgs {
    /// Namespace whose Istio objects are the whole mesh's
    #[arg(long, value_name = "namespace", default_value = ROOT_NAMESPACE)]
    pub root_namespace: String,
}

/// A trust domain from the command line.
fn parse_domain(text: &str) -> Result<TrustDomain, String> {
    TrustDomain::parse(text).map_err(|error| error.to_string())
}

/// What cannot be read, for exit code 3.
fn unreadable(error: impl std::fmt::Display) -> Failure {
    Failure::new(Exit::Input, error.to_string())
}
