//! `signet-bench`: runs the cases that are asked for and prints what came out.
//!
//! `cargo xtask bench` builds everything in the release profile and starts it.

mod agent_start;
mod certificates;
mod data_path;
mod policy_compile;
mod results;
mod tls_records;

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
    /// Throughput of one stream, and the agents' processor time a gigabyte.
    #[value(name = "bulk-1")]
    Bulk1,
    /// The same with eight streams.
    #[value(name = "bulk-8")]
    Bulk8,
    /// HTTP requests one after the other on one connection, the cores kept awake.
    #[value(name = "http-1")]
    Http1,
    /// HTTP requests on 64 connections.
    #[value(name = "http-64")]
    Http64,
    /// New connections a second, 16 at once.
    Connections,
    /// Connect and first byte, the cores kept awake.
    FirstByte,
    /// Memory of an agent, idle and a connection with 1,000 open.
    Memory,
    /// rustls alone: its buffered and its unbuffered interface.
    TlsRecords,
    /// Milliseconds to read and compile policies at three sizes, and after one change.
    PolicyCompile,
}

impl Case {
    fn of_data_path(self) -> Option<data_path::Case> {
        use data_path::Case as DataPath;
        match self {
            Self::Bulk1 => Some(DataPath::Bulk(1)),
            Self::Bulk8 => Some(DataPath::Bulk(8)),
            Self::Http1 => Some(DataPath::Http(1)),
            Self::Http64 => Some(DataPath::Http(64)),
            Self::Connections => Some(DataPath::Connections(16)),
            Self::FirstByte => Some(DataPath::FirstByte),
            Self::Memory => Some(DataPath::Memory(1000)),
            Self::Certificates | Self::AgentStart | Self::TlsRecords | Self::PolicyCompile => None,
        }
    }
}

fn main() -> Result<()> {
    let arguments = Arguments::parse();
    let mut results = Results::default();
    let cases = if arguments.case.is_empty() { Case::value_variants() } else { &arguments.case };
    let of_data_path: Vec<data_path::Case> =
        cases.iter().filter_map(|case| case.of_data_path()).collect();
    if !of_data_path.is_empty() {
        data_path::run(&of_data_path, arguments.quick, &mut results)?;
    }
    for case in cases {
        match case {
            Case::Certificates => certificates::run(arguments.quick, &mut results)?,
            Case::AgentStart => agent_start::run(arguments.quick, &mut results)?,
            Case::TlsRecords => tls_records::run(arguments.quick, &mut results)?,
            Case::PolicyCompile => policy_compile::run(arguments.quick, &mut results)?,
            // Interleaved with one another, above.
            Case::Bulk1
            | Case::Bulk8
            | Case::Http1
            | Case::Http64
            | Case::Connections
            | Case::FirstByte
            | Case::Memory => {}
        }
    }
    results.print();
    if let Some(path) = &arguments.json {
        std::fs::write(path, results.json()?).with_context(|| path.display().to_string())?;
    }
    Ok(())
}
