//! `cargo xtask demo`: sets up, builds, and runs the demo of the lab.

use std::process::Command;

use anyhow::Context as _;

use crate::{command, failure::Failure, setup, toolchain, workspace::Workspace};

/// How the demo runs.
#[derive(clap::Args)]
pub struct Options {
    /// Leave the nodes up at the end, and tell how to look around.
    #[arg(long)]
    keep: bool,
    /// One JSON record an expectation on standard output.
    #[arg(long)]
    json: bool,
}

/// Runs it; the demo's own exit code is ours (1 when an expectation failed).
pub fn run(workspace: &Workspace, options: &Options) -> anyhow::Result<()> {
    if !toolchain::is_root() {
        return Err(Failure::host(
            "the demo makes network namespaces and loads eBPF programs: run it as root \
             (`sudo -E env PATH=$PATH cargo xtask demo`)",
        ));
    }
    setup::run(workspace)?;
    eprintln!("demo: building (minutes on a first run)");
    command::run(workspace.cargo().args(["build", "--workspace", "--bins"]))?;
    let mut demo = Command::new(workspace.target.join("debug/signet-demo"));
    demo.arg("--examples").arg(workspace.root.join("manifests/examples"));
    if options.keep {
        demo.arg("--keep");
    }
    if options.json {
        demo.arg("--json");
    }
    let status = demo.status().context("the demo could not be started")?;
    match status.code() {
        Some(0) => Ok(()),
        Some(code @ 1..=255) => {
            Err(Failure::of_code(code as u8, "the demo did not go as expected"))
        }
        _ => Err(Failure::of_code(70, &format!("the demo ended with {status}"))),
    }
}
