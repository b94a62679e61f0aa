//! Completions for shells, and man pages: written from the description of the arguments.

use std::{io, path::PathBuf};

use clap::Command;
use clap_complete::Shell;

use super::exit::{Exit, Failure};

/// Arguments of `signet completion`.
#[derive(clap::Args, Debug)]
#[command(after_help = "\
Examples:
  signet completion bash > /etc/bash_completion.d/signet
  source <(signet completion zsh)
  signet completion fish > ~/.config/fish/completions/signet.fish")]
pub struct CompletionArgs {
    /// For which shell
    shell: Shell,
}

/// Arguments of `signet man`.
#[derive(clap::Args, Debug)]
#[command(after_help = "\
Examples:
  signet man /usr/local/share/man/man1
  man signet-flows")]
pub struct ManArgs {
    /// Where the pages go, one for each command; the directory must exist
    directory: PathBuf,
}

/// Prints a script.
pub fn completion(mut command: Command, args: &CompletionArgs) -> Result<Exit, Failure> {
    let mut script = Vec::new();
    clap_complete::generate(args.shell, &mut command, "signet", &mut script);
    match io::Write::write_all(&mut io::stdout().lock(), &script) {
        Err(e) if e.kind() != io::ErrorKind::BrokenPipe => {
            Err(Failure::new(Exit::Input, format!("stdout: {e}")))
        }
        _ => Ok(Exit::Done),
    }
}

/// Writes the pages.
pub fn man(command: Command, args: &ManArgs) -> Result<Exit, Failure> {
    clap_mangen::generate_to(command, &args.directory).map_err(|e| {
        Failure::new(
            Exit::Input,
            format!("{}: {e}; name a directory that exists", args.directory.display()),
        )
    })?;
    Ok(Exit::Done)
}
