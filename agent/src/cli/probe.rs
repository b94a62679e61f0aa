//! `signet probe`: the kubelet's exec probes.

use std::path::PathBuf;

use clap::ValueEnum;

use super::{
    exit::{self, Exit, Failure},
    sockets,
};
use crate::proto::admin::{ProbeRequest, admin_client::AdminClient, probe_request};

/// Arguments of `signet probe`.
#[derive(clap::Args, Debug)]
#[command(after_help = "\
Examples:
  signet probe ready
  signet probe live --socket /run/signet/admin/agent.sock

Exits with 0 for yes, 1 for no, 4 when no agent answers.")]
pub struct ProbeArgs {
    /// What is asked: ready (it has read the cluster, its programs are attached, its listeners
    /// open) or live (its reconciler turns).
    kind: Kind,
    /// Admin socket of the agent
    #[arg(
        long,
        value_name = "path",
        env = "SIGNET_OWN_SOCKET",
        default_value = "/run/signet/admin/agent.sock"
    )]
    socket: PathBuf,
}

#[derive(ValueEnum, Clone, Copy, PartialEq, Eq, Debug)]
enum Kind {
    Ready,
    Live,
}

/// Asks and prints one line.
pub async fn run(args: ProbeArgs) -> Result<Exit, Failure> {
    let agent = sockets::connect(&args.socket).await?;
    let kind = match args.kind {
        Kind::Ready => probe_request::Kind::Ready,
        Kind::Live => probe_request::Kind::Live,
    };
    let mut client = AdminClient::new(agent.channel.clone());
    let request = ProbeRequest { kind: kind.into() };
    let answer = sockets::within_time(&agent, client.probe(request)).await?;
    let word = match (args.kind, answer.ok) {
        (Kind::Ready, true) => "ready",
        (Kind::Ready, false) => "not ready",
        (Kind::Live, true) => "live",
        (Kind::Live, false) => "not live",
    };
    exit::print(&format!("{word}: {}\n", answer.reason))?;
    Ok(if answer.ok { Exit::Done } else { Exit::No })
}
