//! `signet-bench`: runs the cases that are asked for and prints what came out.
//!
//! `cargo xtask bench` builds everything in the release profile and starts it.

mod agent_start;
mod certificates;
mod policy_compile;
mod results;

use std::path::PathBuf;

use anyhow::{Context as _, Result};
use clap::{Parser, ValueEnum};

use results::Results;

/// Measures Signet on this machine.
#[derive(Parser)]
#[command(name = "cargo xtask bench", bin_name = "cargo xtask bench")]
struct Arguments {
    /// Fewer and shorter rounds: whether it runs, not what it says.
    #[arg(long)]
    quick: bool,
    /// Only these cases.
    #[arg(long, value_name = "CASE")]
    case: Vec<Case>,
    /// Also writes every value and summary here, one JSON record a line.
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
}

/// What can be measured.
#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum)]
enum Case {
    /// Certificates a second that one authority signs over gRPC, 16 requests in flight.
    Certificates,
    /// Seconds from an agent's start until every pod of its node is served, each pod under an
    /// account of its own.
    AgentStart,
    /// Milliseconds to read and compile policies at three sizes, and after one change.
    PolicyCompile,
}

fn main() -> Result<()> {
    let arguments = Arguments::parse();
    let mut results = Results::default();
    let cases = if arguments.case.is_empty() { Case::value_variants() } else { &arguments.case };
    for case in cases {
        match case {
            Case::Certificates => certificates::run(arguments.quick, &mut results)?,
            Case::AgentStart => agent_start::run(arguments.quick, &mut results)?,
            Case::PolicyCompile => policy_compile::run(arguments.quick, &mut results)?,
        }
    }
    results.print();
    if let Some(path) = &arguments.json {
        std::fs::write(path, results.json()?).with_context(|| path.display().to_string())?;
    }
    Ok(())
}
