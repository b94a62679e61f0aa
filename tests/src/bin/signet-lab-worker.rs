//! The lab's helper: enters a cgroup and a network namespace, then plays a role there.

#![forbid(unsafe_code)]

use std::{ffi::OsString, os::unix::process::CommandExt, path::PathBuf, process::Command};

use anyhow::{Context, Result, bail};
use clap::{Parser, Subcommand};
use signet_lab::{leftovers, netns, traffic::Role};

#[derive(Parser)]
#[command(about = "Roles of Signet's lab")]
struct Arguments {
    /// Enters this network namespace before anything else, as a container runtime's child
    /// comes from the node's.
    #[arg(long)]
    runtime_netns: Option<PathBuf>,
    /// Joins this cgroup first.
    #[arg(long)]
    cgroup: Option<PathBuf>,
    /// Then enters this network namespace.
    #[arg(long)]
    netns: Option<PathBuf>,
    #[command(subcommand)]
    what: What,
}

#[expect(clippy::large_enum_variant, reason = "parsed once, at the start of the process")]
#[derive(Subcommand)]
enum What {
    /// Executes a program.
    Exec {
        /// Program and arguments.
        #[arg(trailing_var_arg = true, allow_hyphen_values = true, required = true)]
        argv: Vec<OsString>,
    },
    /// Plays the role that a JSON text describes.
    Json {
        /// The text.
        role: String,
    },
    /// Removes labs that were left behind, also those that were kept on purpose.
    Sweep,
    #[command(flatten)]
    Role(Role),
}

fn main() -> Result<()> {
    let arguments = Arguments::parse();
    // Before any socket and any thread: what is made later belongs there.
    if let Some(namespace) = &arguments.runtime_netns {
        netns::enter(namespace)?;
    }
    if let Some(cgroup) = &arguments.cgroup {
        std::fs::write(cgroup.join("cgroup.procs"), "0")
            .with_context(|| format!("cannot join {}", cgroup.display()))?;
    }
    if let Some(namespace) = &arguments.netns {
        netns::enter(namespace)?;
    }
    match arguments.what {
        What::Exec { argv } => {
            let Some((program, rest)) = argv.split_first() else { bail!("an empty command") };
            let error = Command::new(program).args(rest).exec();
            Err(error).with_context(|| format!("cannot execute {}", program.display()))
        }
        What::Json { role } => serde_json::from_str::<Role>(&role).context("not a role")?.play(),
        What::Sweep => {
            for name in leftovers::sweep(true)? {
                println!("removed {name}");
            }
            Ok(())
        }
        What::Role(role) => role.play(),
    }
}
