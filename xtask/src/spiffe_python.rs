//! The Python interpreter with others' SPIFFE packages, which end-to-end tests run in pods.

use std::{fs, path::PathBuf, process::Command};

use crate::{command, workspace::Workspace};

/// What is installed, pinned.
const REQUIREMENTS: &str = "tests/tests/e2e/spiffe_client.requirements.txt";

/// How the tests are told where the interpreter is.
pub const VARIABLE: &str = "SIGNET_SPIFFE_PYTHON";

/// The interpreter, when it has exactly what is pinned.
pub fn find(workspace: &Workspace) -> Option<PathBuf> {
    let wanted = fs::read_to_string(workspace.root.join(REQUIREMENTS)).ok()?;
    let installed = fs::read_to_string(record(workspace)).ok()?;
    let python = directory(workspace).join("bin/python");
    (wanted == installed && python.is_file()).then_some(python)
}

/// Installs the packages into a virtual environment of their own, once. Where that cannot be
/// done (no Python, no package index) it says so: the tests that need them count as skipped.
pub fn install(workspace: &Workspace) {
    if find(workspace).is_some() {
        return;
    }
    eprintln!("setup: Python's SPIFFE packages, for the tests against other people's clients");
    if let Err(error) = try_install(workspace) {
        eprintln!(
            "setup: they cannot be installed ({error:#}): the tests that use them are skipped; \
             they need Python 3.10 or newer with venv and pip, and a package index"
        );
    }
}

fn try_install(workspace: &Workspace) -> anyhow::Result<()> {
    let directory = directory(workspace);
    // A half-made one is made anew.
    if directory.exists() {
        fs::remove_dir_all(&directory)?;
    }
    command::run(Command::new("python3").args(["-m", "venv"]).arg(&directory))?;
    let requirements = workspace.root.join(REQUIREMENTS);
    command::run(
        Command::new(directory.join("bin/python"))
            .args(["-m", "pip", "install", "--quiet", "--disable-pip-version-check", "-r"])
            .arg(&requirements),
    )?;
    fs::copy(requirements, record(workspace))?;
    Ok(())
}

fn directory(workspace: &Workspace) -> PathBuf {
    workspace.target.join("spiffe-python")
}

/// Written last: what the environment holds.
fn record(workspace: &Workspace) -> PathBuf {
    directory(workspace).join("requirements.txt")
}
