//! The lab's helper: enters a cgroup and a network namespace, then plays a role there.

#![forbid(unsafe_code)]

use std::{
    ffi::OsString,
    fs::{File, OpenOptions},
    os::unix::process::CommandExt,
    path::{Path, PathBuf},
    process::Command,
};

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
    /// Has its standard input and output in this directory, as pipes `in` and `out`.
    #[arg(long)]
    stdio: Option<PathBuf>,
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
    if let Some(directory) = &arguments.stdio {
        return Err(with_stdio(directory));
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

/// Executes this program anew, without the option, between the two pipes.
fn with_stdio(directory: &Path) -> anyhow::Error {
    let open = |name: &str, options: &OpenOptions| {
        let path = directory.join(name);
        options.open(&path).with_context(|| path.display().to_string())
    };
    let again = || -> Result<std::io::Error> {
        let input = open("in", File::options().read(true))?;
        let output = open("out", File::options().write(true))?;
        let mut own = std::env::args_os();
        let mut command = Command::new("/proc/self/exe");
        command.arg0(own.next().unwrap_or_default()).stdin(input).stdout(output);
        // The option and its value are the first two.
        command.args(own.skip(2));
        Ok(command.exec())
    };
    match again() {
        Ok(error) => anyhow::Error::new(error).context("cannot execute itself"),
        Err(error) => error,
    }
}
