//! Signet's chores: `cargo xtask setup | build | check | manifests | image | test | fuzz | bench | demo`.
//!
//! Progress goes to standard error, results to standard output. Exit codes are those of
//! the product: 1 when the answer is no, 6 when this host cannot do what was asked.
#![forbid(unsafe_code)]

mod bench;
mod check;
mod command;
mod demo;
mod ebpf;
mod failure;
mod fuzz;
mod image;
mod manifests;
mod monitoring;
mod setup;
mod spiffe_python;
mod test;
mod toolchain;
mod workspace;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

use crate::{failure::Failure, workspace::Workspace};

/// Builds, checks, tests and shows Signet.
#[derive(Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask")]
struct Arguments {
    #[command(subcommand)]
    chore: Chore,
}

#[derive(Subcommand)]
enum Chore {
    /// Find or install what the eBPF build and the lab need; quick when nothing is missing.
    Setup,
    /// Set up, then build everything (the eBPF programs are embedded in `signet`).
    Build {
        /// The release profile.
        #[arg(long)]
        release: bool,
    },
    /// Hold the rules of the house: import floors, file sizes, names, `unsafe`, documentation;
    /// then rustfmt and clippy, of the eBPF programs too.
    Check {
        /// Only the rules, which need no build.
        #[arg(long)]
        rules: bool,
    },
    /// Build the container image as an OCI archive, without a daemon, the same each time.
    Image(image::Options),
    /// Build the manifests with kubectl and hold what comes out against the API's own types.
    Manifests(manifests::Options),
    /// Set up, build, and run every test: unit tests, then end to end in the lab (as root).
    Test(test::Selection),
    /// Run the parsers of untrusted bytes under libFuzzer.
    Fuzz(fuzz::Options),
    /// Build in the release profile and measure (as root).
    Bench(bench::Options),
    /// Set up, build, and show Signet at work on two nodes made on this machine (as root).
    Demo(demo::Options),
}

fn main() -> ExitCode {
    if std::env::var_os(fuzz::WRAPPER_VARIABLE).is_some() {
        return fuzz::compile();
    }
    let arguments = Arguments::parse();
    match run(arguments.chore) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::from(Failure::code_of(&error))
        }
    }
}

fn run(chore: Chore) -> anyhow::Result<()> {
    let workspace = Workspace::find()?;
    match chore {
        Chore::Setup => {
            setup::run(&workspace)?;
            spiffe_python::install(&workspace);
            Ok(())
        }
        Chore::Build { release } => {
            setup::run(&workspace)?;
            let mut build = workspace.cargo();
            build.args(["build", "--workspace"]);
            if release {
                build.arg("--release");
            }
            command::run(&mut build)
        }
        Chore::Check { rules } => check::run(&workspace, rules),
        Chore::Image(options) => image::run(&workspace, &options),
        Chore::Manifests(options) => manifests::run(&workspace, &options),
        Chore::Test(selection) => test::run(&workspace, &selection),
        Chore::Fuzz(options) => fuzz::run(&workspace, &options),
        Chore::Bench(options) => bench::run(&workspace, &options),
        Chore::Demo(options) => demo::run(&workspace, &options),
    }
}
