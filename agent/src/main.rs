//! The binary `signet`.

use std::process::ExitCode;

use signet::{
    cli::{self, Exit, Failure},
    daemon::{self, Fault},
};

fn main() -> ExitCode {
    cli::main(std::env::args_os(), |loaded, sources| {
        daemon::run(loaded, sources).map_err(|error| {
            let exit = match error.fault() {
                Fault::Input => Exit::Input,
                Fault::Host => Exit::Host,
                Fault::Bug => Exit::Bug,
            };
            Failure::caused(exit, error)
        })
    })
}
