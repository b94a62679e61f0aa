//! `cargo xtask check`: the rules of the house, then rustfmt and clippy.

mod files;
mod floors;
mod lexer;
mod reasons;

use std::{fmt, fs};

use anyhow::{Context as _, bail};

use crate::{
    command, ebpf, manifests, setup,
    workspace::{self, Workspace},
};

/// Something that a check found.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Finding {
    /// The file, from the workspace's root.
    pub file: String,
    /// The line, from 1.
    pub line: usize,
    /// False for a warning.
    pub is_error: bool,
    /// What is wrong and what to do.
    pub message: String,
}

impl Finding {
    fn error(file: &str, line: usize, message: String) -> Self {
        Self { file: file.to_owned(), line, is_error: true, message }
    }

    fn warning(file: &str, line: usize, message: String) -> Self {
        Self { file: file.to_owned(), line, is_error: false, message }
    }
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let level = if self.is_error { "error" } else { "warning" };
        write!(f, "{}:{}: {level}: {}", self.file, self.line, self.message)
    }
}

/// Runs every check; fails when one finds an error.
pub fn run(workspace: &Workspace, rules_only: bool) -> anyhow::Result<()> {
    let findings = rules(workspace)?;
    for finding in &findings {
        eprintln!("{finding}");
    }
    let errors = findings.iter().filter(|f| f.is_error).count();
    eprintln!("check: rules of the house: {errors} errors, {} warnings", findings.len() - errors);
    let mut failed = Vec::new();
    if errors > 0 {
        failed.push("the rules of the house");
    }
    if !rules_only {
        let toolchain = setup::run(workspace)?;
        let mut step = |name: &'static str, result: anyhow::Result<()>| {
            if let Err(error) = result {
                eprintln!("check: {error:#}");
                failed.push(name);
            }
        };
        step("rustfmt", command::run(workspace.cargo().args(["fmt", "--all", "--check"])));
        step(
            "the lock file",
            command::quietly(workspace.cargo().args([
                "metadata",
                "--locked",
                "--format-version=1",
            ])),
        );
        step(
            "clippy",
            command::run(workspace.cargo().args([
                "clippy",
                "--workspace",
                "--all-targets",
                "--",
                "-D",
                "warnings",
            ])),
        );
        step("clippy of the eBPF programs", ebpf::clippy(workspace, &toolchain));
        step(
            "generated files",
            command::quietly(workspace.cargo().args([
                "test",
                "--package",
                "signet",
                "--lib",
                "generated_",
            ])),
        );
        step("manifests", manifests::check(workspace));
        step("dependencies", dependencies(workspace));
    }
    if failed.is_empty() {
        eprintln!("check: all is well");
        return Ok(());
    }
    bail!("not in order: {}", failed.join(", "))
}

/// The version that is installed where there is none.
const CARGO_DENY: &str = "0.20.2";

/// Licences, sources and banned crates, by deny.toml. Advisories are left out: their list is
/// fetched from the network, and a check must say the same twice.
fn dependencies(workspace: &Workspace) -> anyhow::Result<()> {
    if workspace::find_program("cargo-deny", &[]).is_none() {
        eprintln!("check: cargo-deny is missing; it is built now (some minutes)");
        let mut install = workspace.cargo();
        install.args(["install", "cargo-deny", "--version", CARGO_DENY, "--locked"]);
        // Into its own target directory, not the workspace's.
        install.env_remove("CARGO_TARGET_DIR");
        command::run(&mut install)?;
    }
    let checks = ["deny", "--all-features", "check", "bans", "licenses", "sources"];
    command::run(workspace.cargo().args(checks))
}

/// The rules that need no build.
fn rules(workspace: &Workspace) -> anyhow::Result<Vec<Finding>> {
    let mut findings = Vec::new();
    let read = |file: &str| {
        fs::read_to_string(workspace.root.join(file))
            .with_context(|| format!("{file} cannot be read"))
    };
    let lib = read("agent/src/lib.rs")?;
    let table = floors::read_table(&lib, &lexer::tokens(&lib), &mut findings);
    for file in sources(workspace)? {
        let source = read(&file)?;
        let tokens = lexer::tokens(&source);
        files::name(&file, &mut findings);
        files::size(&file, &source, &tokens, &mut findings);
        files::safety(&file, &tokens, &mut findings);
        if let Some(below) = file.strip_prefix("agent/src/")
            && !files::is_test_code(&file)
        {
            floors::check(&table, below, &tokens, &mut findings);
        }
    }
    reasons::check(&read(reasons::FILE)?, &mut findings);
    Ok(findings)
}

/// The workspace's Rust files, as git sees them (new ones too, ignored ones not).
fn sources(workspace: &Workspace) -> anyhow::Result<Vec<String>> {
    let root = workspace.root.to_str().context("the workspace's path is not UTF-8")?;
    let listed = command::output(
        "git",
        &["-C", root, "ls-files", "--cached", "--others", "--exclude-standard", "*.rs"],
    )
    .context("`git ls-files` failed: is this a git work tree?")?;
    Ok(listed
        .lines()
        .filter(|file| workspace.root.join(file).is_file())
        .map(str::to_owned)
        .collect())
}
