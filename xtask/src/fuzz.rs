//! `cargo xtask fuzz`: the parsers of untrusted bytes under libFuzzer.
//!
//! Only Signet's own crates are instrumented, by rustc's own coverage pass, so that no
//! nightly toolchain is needed; libFuzzer itself is C++ and is built from its crate.

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, ExitCode, Stdio},
    time::Instant,
};

use anyhow::{Context as _, bail};

use crate::{command, failure::Failure, setup, workspace::Workspace};

/// What libFuzzer needs to see where an input leads.
const COVERAGE: [&str; 5] = [
    "-Cpasses=sancov-module",
    "-Cllvm-args=-sanitizer-coverage-level=4",
    "-Cllvm-args=-sanitizer-coverage-inline-8bit-counters",
    "-Cllvm-args=-sanitizer-coverage-pc-table",
    "-Ccodegen-units=1",
];

/// The crates that are instrumented: dependencies and build scripts stay as they are.
const INSTRUMENTED: [&str; 3] = ["signet", "signet_ebpf", "signet_fuzz"];

/// Set for the compilers of the fuzzer's build, which run through [`compile`].
pub const WRAPPER_VARIABLE: &str = "SIGNET_XTASK_COMPILES";

/// What to fuzz, and for how long.
#[derive(clap::Args)]
pub struct Options {
    /// Seconds for each target.
    #[arg(long, default_value_t = 20, value_name = "N")]
    seconds: u64,
    /// Only this target (`list` shows them all).
    target: Option<String>,
}

/// How a target did.
pub struct Fuzzed {
    /// Its name.
    pub name: String,
    /// Inputs that were run.
    pub runs: u64,
    /// True when none broke a promise.
    pub ok: bool,
}

/// Fuzzes and prints a line a target; fails when an input broke a promise.
pub fn run(workspace: &Workspace, options: &Options) -> anyhow::Result<()> {
    let names = targets(workspace)?;
    if options.target.as_deref() == Some("list") {
        println!("{}", names.join("\n"));
        return Ok(());
    }
    let chosen: Vec<String> = match &options.target {
        None => names,
        Some(name) if names.contains(name) => vec![name.clone()],
        Some(name) => {
            bail!("no target {name:?}; there are {}", names.join(", "));
        }
    };
    let results = fuzz(workspace, &chosen, options.seconds)?;
    conclude(&results)
}

/// Runs the compiler whose path and arguments are ours, as cargo's workspace wrapper, with
/// coverage for the crates that are fuzzed.
pub fn compile() -> ExitCode {
    let mut arguments = std::env::args_os().skip(1);
    let Some(rustc) = arguments.next() else {
        eprintln!("error: {WRAPPER_VARIABLE} is for cargo to set");
        return ExitCode::from(2);
    };
    let arguments: Vec<_> = arguments.collect();
    let crate_name = arguments.iter().skip_while(|a| *a != "--crate-name").nth(1);
    let mut compiler = Command::new(rustc);
    if crate_name.is_some_and(|name| INSTRUMENTED.iter().any(|known| name == known)) {
        compiler.args(COVERAGE);
    }
    match compiler.args(arguments).status() {
        Ok(status) if status.success() => ExitCode::SUCCESS,
        Ok(_) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("error: the compiler does not start: {error}");
            ExitCode::FAILURE
        }
    }
}

/// Every target for `seconds` each.
pub fn all(workspace: &Workspace, seconds: u64) -> anyhow::Result<Vec<Fuzzed>> {
    let names = targets(workspace)?;
    fuzz(workspace, &names, seconds)
}

/// These targets for `seconds` each; fails when one is not there.
pub fn some(workspace: &Workspace, chosen: &[&str], seconds: u64) -> anyhow::Result<Vec<Fuzzed>> {
    let names = targets(workspace)?;
    if let Some(missing) = chosen.iter().find(|name| !names.iter().any(|known| known == *name)) {
        bail!("no target {missing:?}; there are {}", names.join(", "));
    }
    let chosen: Vec<String> = chosen.iter().map(|name| (*name).to_owned()).collect();
    fuzz(workspace, &chosen, seconds)
}

/// Names of the targets, as their table's source has them.
fn targets(workspace: &Workspace) -> anyhow::Result<Vec<String>> {
    let path = workspace.root.join("tests/fuzz/src/lib.rs");
    let source = fs::read_to_string(&path).with_context(|| path.display().to_string())?;
    let names: Vec<String> = source
        .split("name: \"")
        .skip(1)
        .filter_map(|rest| rest.split('"').next())
        .map(str::to_owned)
        .collect();
    if names.is_empty() {
        bail!("{}: no target is named there", path.display());
    }
    Ok(names)
}

fn fuzz(workspace: &Workspace, names: &[String], seconds: u64) -> anyhow::Result<Vec<Fuzzed>> {
    setup::run(workspace)?;
    if command::output("c++", &["--version"]).is_none() {
        return Err(Failure::host(
            "libFuzzer is C++ and there is no compiler for it: install g++ (or clang++)",
        ));
    }
    let this = std::env::current_exe().context("where is this program?")?;
    let this = replaced(&this);
    let mut build = workspace.cargo();
    // The whole workspace's features, so that no dependency is built once more.
    build.args(["build", "--workspace", "--bin", "signet-fuzz"]);
    build.args(["--features", "signet-fuzz/libfuzzer"]);
    build.env("RUSTC_WORKSPACE_WRAPPER", this).env(WRAPPER_VARIABLE, "1");
    command::run(&mut build)?;
    let target = workspace.root.join("target");
    let (program, directory) = (target.join("debug/signet-fuzz"), target.join("fuzz"));
    names.iter().map(|name| one(&program, &directory, name, seconds)).collect()
}

/// The program's path though its file was replaced while it ran: a build of the whole workspace
/// may link this program anew, and Linux then says ` (deleted)` of the old one's path
/// (proc_pid_exe(5)). What lies there now is built from the same source.
fn replaced(program: &Path) -> PathBuf {
    match program.to_str().and_then(|path| path.strip_suffix(" (deleted)")) {
        Some(path) => PathBuf::from(path),
        None => program.to_path_buf(),
    }
}

fn one(program: &Path, directory: &Path, name: &str, seconds: u64) -> anyhow::Result<Fuzzed> {
    let corpus = directory.join("corpus").join(name);
    let findings = directory.join("findings").join(name);
    for path in [&corpus, &findings] {
        fs::create_dir_all(path).with_context(|| path.display().to_string())?;
    }
    let mut fuzzer = Command::new(program);
    fuzzer
        .arg(&corpus)
        .arg(format!("-max_total_time={seconds}"))
        .arg(format!("-artifact_prefix={}/", findings.display()))
        .args(["-print_final_stats=1", "-timeout=10", "-rss_limit_mb=2048", "-max_len=16384"])
        .env("SIGNET_FUZZ_TARGET", name)
        .env("SIGNET_FUZZ_CORPUS", &corpus)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped());
    eprintln!("$ {}", command::shown(&fuzzer));
    let start = Instant::now();
    let output = fuzzer.output().with_context(|| program.display().to_string())?;
    let said = String::from_utf8_lossy(&output.stderr);
    let runs = runs_of(&said);
    let ok = output.status.success() && runs > 0;
    if !ok {
        eprintln!("{said}");
    }
    println!(
        "{:<6} {runs:>10} runs {:>4} s  {name}",
        if ok { "ok" } else { "FAILED" },
        start.elapsed().as_secs()
    );
    Ok(Fuzzed { name: name.to_owned(), runs, ok })
}

/// What libFuzzer's last statistics say.
fn runs_of(said: &str) -> u64 {
    said.lines()
        .filter_map(|line| line.strip_prefix("stat::number_of_executed_units:"))
        .find_map(|number| number.trim().parse().ok())
        .unwrap_or(0)
}

fn conclude(results: &[Fuzzed]) -> anyhow::Result<()> {
    let bad: Vec<&str> = results.iter().filter(|r| !r.ok).map(|r| r.name.as_str()).collect();
    let runs: u64 = results.iter().map(|r| r.runs).sum();
    println!("{} targets, {runs} inputs, {} failed", results.len(), bad.len());
    if !bad.is_empty() {
        bail!("failed: {} (inputs are under target/fuzz/findings)", bad.join(", "));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn targets_are_read_from_their_table() {
        let names = targets(&Workspace::find().unwrap()).unwrap();
        assert!(names.contains(&"spiffe-id".to_owned()), "{names:?}");
        assert!(names.len() > 10, "{names:?}");
    }

    #[test]
    fn a_program_linked_anew_while_it_runs_is_found() {
        let path = Path::new("/target/debug/xtask");
        assert_eq!(replaced(Path::new("/target/debug/xtask (deleted)")), path);
        assert_eq!(replaced(path), path);
    }

    #[test]
    fn a_fuzzer_that_ran_nothing_has_failed() {
        let text = "Done\nstat::number_of_executed_units: 1234\nstat::peak_rss_mb: 5\n";
        assert_eq!(runs_of(text), 1234);
        assert_eq!(runs_of("ERROR: libFuzzer: no such target"), 0);
        let fuzzed = |ok| Fuzzed { name: "x".into(), runs: 1, ok };
        assert!(conclude(&[fuzzed(true)]).is_ok());
        assert!(conclude(&[fuzzed(true), fuzzed(false)]).is_err());
    }
}
