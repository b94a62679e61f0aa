//! The binary `signet`.

use std::process::ExitCode;

use signet::cli::{self, Exit, Failure};

fn main() -> ExitCode {
    cli::main(std::env::args_os(), |_, _| {
        Err(Failure::new(Exit::Host, "this build carries no node agent, only the command line"))
    })
}
