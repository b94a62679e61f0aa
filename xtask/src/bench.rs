//! `cargo xtask bench`: builds everything in the release profile, and measures.

use std::process::Command;

use anyhow::{Context as _, bail};

use crate::{command, failure::Failure, setup, toolchain, workspace::Workspace};

/// What is passed on to the benchmark.
#[derive(clap::Args)]
pub struct Options {
    /// Arguments of the benchmark: `--quick`, `--case CASE`, `--json FILE`, `--help`.
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    arguments: Vec<String>,
}

/// Runs it.
pub fn run(workspace: &Workspace, options: &Options) -> anyhow::Result<()> {
    if !toolchain::is_root() {
        return Err(Failure::host(
            "the benchmark makes network namespaces and loads eBPF programs: run it as root \
             (`sudo -E env PATH=$PATH cargo xtask bench`)",
        ));
    }
    setup::run(workspace)?;
    eprintln!("bench: building in the release profile (many minutes on a first run)");
    command::run(workspace.cargo().args(["build", "--workspace", "--bins", "--release"]))?;
    let release = workspace.target.join("release");
    let mut bench = Command::new(release.join("signet-bench"));
    bench
        .args(&options.arguments)
        .env("SIGNET_BIN", release.join("signet"))
        .env("SIGNET_LAB_WORKER", release.join("signet-lab-worker"));
    let status = bench.status().context("the benchmark could not be started")?;
    if !status.success() {
        bail!("the benchmark ended with {status}");
    }
    Ok(())
}
