//! `cargo xtask test`: everything that is tested here, in one command.
//!
//! Unit tests first, then the end-to-end suite in the lab: whole on the dual-stack network
//! with every kernel feature in use, then its core once more for each variant.

use std::{
    fs,
    io::{BufRead as _, BufReader},
    path::Path,
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context as _, bail};

use crate::{
    command, failure::Failure, fuzz, setup, spiffe_python, toolchain, workspace::Workspace,
};

/// Connections of the storm under `--soak` (60,000 without).
const SOAK_STORM: &str = "300000";

/// What runs on a real container runtime too: where a pod's sandbox, cgroups and addresses come
/// from, and when.
const RUNTIME_TESTS: &[&str] = &[
    "core::calls::",
    "core::restart::",
    "first_packet::a_young",
    "first_packet::what_is_dialled",
    "lifecycle::a_guarded_boot",
    "reboot::",
];

/// Seconds for each fuzz target.
const FUZZ_SECONDS: u64 = 60;
/// The fuzz target that every full run has: policies as YAML, to the model.
const POLICY_TARGET: &str = "policy";

/// What to test.
#[derive(clap::Args)]
pub struct Selection {
    /// Only the unit tests, which need no rights.
    #[arg(long, conflicts_with = "e2e")]
    unit: bool,
    /// Only the end-to-end tests.
    #[arg(long)]
    e2e: bool,
    /// The whole end-to-end suite in every variant, with a storm five times as long; then the
    /// fuzz targets.
    #[arg(long, conflicts_with = "unit")]
    soak: bool,
    /// End-to-end tests at a time (each has its own nodes and network).
    #[arg(long, default_value_t = 1, value_name = "N")]
    threads: usize,
    /// Only these variants of the end-to-end suite (`dual` runs all of it, the others its core).
    #[arg(long, value_name = "VARIANT")]
    variant: Vec<Variant>,
    /// Only tests whose name contains this (in every variant asked for, `dual` by default).
    filter: Option<String>,
}

impl Selection {
    fn variants(&self) -> &[Variant] {
        match (self.variant.is_empty(), &self.filter) {
            (false, _) => &self.variant,
            (true, Some(_)) => &[Variant::Dual],
            (true, None) => &Variant::ALL,
        }
    }
}

/// Lines of a failed test's output that are repeated at the end.
const FAILURE_LINES: usize = 12;
/// Characters of each of them.
const FAILURE_WIDTH: usize = 400;

/// The circumstances under which the end-to-end suite runs.
#[derive(Clone, Copy, PartialEq, Eq, Debug, clap::ValueEnum)]
enum Variant {
    /// IPv4 and IPv6, every kernel feature: the whole suite.
    Dual,
    /// As if the kernel were 5.15.
    #[value(name = "5.15")]
    Masked,
    /// Only IPv6.
    V6,
    /// Only IPv4, and HBONE between agents.
    Hbone,
    /// Pods made by containerd, runc and CNI plugins instead of the lab's own kubelet.
    Runtime,
}

impl Variant {
    const ALL: [Self; 5] = [Self::Dual, Self::Masked, Self::V6, Self::Hbone, Self::Runtime];

    /// How the lab is told.
    fn environment(self) -> &'static [(&'static str, &'static str)] {
        match self {
            Self::Dual => &[("SIGNET_LAB_FAMILY", "dual")],
            Self::Masked => &[("SIGNET_LAB_FAMILY", "dual"), ("SIGNET_MASK_FEATURES", "5.15")],
            Self::V6 => &[("SIGNET_LAB_FAMILY", "v6")],
            Self::Hbone => &[("SIGNET_LAB_FAMILY", "v4"), ("SIGNET_TUNNEL", "hbone")],
            Self::Runtime => &[("SIGNET_LAB_FAMILY", "dual"), ("SIGNET_LAB_BACKEND", "containerd")],
        }
    }

    /// Which tests it runs, by parts of their names; none: all.
    fn tests(self) -> &'static [&'static str] {
        match self {
            Self::Dual => &[],
            // Those in modules named `core`.
            Self::Masked | Self::V6 | Self::Hbone => &["core::"],
            Self::Runtime => RUNTIME_TESTS,
        }
    }

    fn name(self) -> &'static str {
        match self {
            Self::Dual => "dual-stack",
            Self::Masked => "dual-stack, kernel features as of 5.15",
            Self::V6 => "IPv6 only",
            Self::Hbone => "IPv4 only, over HBONE",
            Self::Runtime => "pods by containerd",
        }
    }
}

/// What the test programs counted.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
struct Count {
    passed: u64,
    failed: u64,
    ignored: u64,
}

/// What the test programs printed of the tests that failed.
///
/// A long run's last lines are what is at hand when it failed somewhere else, so they name
/// every failed test and what it said.
#[derive(PartialEq, Eq, Default, Debug)]
struct Failures {
    tests: Vec<FailedTest>,
    /// The last test's output is being read.
    reading: bool,
}

/// A failed test and the beginning of its output.
#[derive(PartialEq, Eq, Debug)]
struct FailedTest {
    name: String,
    lines: Vec<String>,
}

/// One part of the run and how it ended.
struct Part {
    name: String,
    count: Count,
    failures: Failures,
    /// The test programs ran to their end and none failed.
    ok: bool,
    took: Duration,
}

/// Runs the tests; the last line is `N passed, N failed`.
pub fn run(workspace: &Workspace, selection: &Selection) -> anyhow::Result<()> {
    if !selection.unit && !toolchain::is_root() {
        return Err(Failure::host(
            "the end-to-end tests make network namespaces and load eBPF programs: run as root \
             (`sudo -E env PATH=$PATH cargo xtask test`), or only the unit tests \
             (`cargo xtask test --unit`)",
        ));
    }
    setup::run(workspace)?;
    if !selection.unit {
        spiffe_python::install(workspace);
    }
    // The lab runs the binaries, so they must be there before its tests are.
    command::run(workspace.cargo().args(["build", "--workspace", "--bins"]))?;
    command::run(workspace.cargo().args(["test", "--workspace", "--no-run"]))?;
    let mut parts = Vec::new();
    if !selection.e2e {
        parts.push(unit(workspace, selection)?);
    }
    if !selection.unit {
        for variant in selection.variants() {
            parts.push(end_to_end(workspace, selection, *variant)?);
        }
    }
    if selection.filter.is_none() && !selection.unit && (selection.soak || !selection.e2e) {
        parts.push(fuzzed(workspace, selection.soak));
    }
    conclude(&parts, selection.filter.as_deref())
}

/// Every fuzz target counts as a test: all of them, or the one of policies. What keeps them
/// from running is a failure beside the others', so that what ran before is still told.
fn fuzzed(workspace: &Workspace, all: bool) -> Part {
    eprintln!("test: fuzz targets");
    let start = Instant::now();
    let results = if all {
        fuzz::all(workspace, FUZZ_SECONDS)
    } else {
        fuzz::some(workspace, &[POLICY_TARGET], FUZZ_SECONDS)
    };
    let mut failures = Failures::default();
    let results = results.unwrap_or_else(|error| {
        let lines = vec![format!("{error:#}")];
        failures.tests.push(FailedTest { name: "fuzz".to_owned(), lines });
        Vec::new()
    });
    let passed = results.iter().filter(|result| result.ok).count() as u64;
    let failed = (results.len() + failures.tests.len()) as u64 - passed;
    Part {
        name: "fuzz targets".to_owned(),
        count: Count { passed, failed, ignored: 0 },
        failures,
        ok: failed == 0,
        took: start.elapsed(),
    }
}

fn unit(workspace: &Workspace, selection: &Selection) -> anyhow::Result<Part> {
    let mut cargo = workspace.cargo();
    cargo.args(["test", "--workspace", "--lib", "--bins", "--no-fail-fast"]);
    for member in ["agent", "ebpf", "xtask"] {
        select(&mut cargo, &test_targets(&workspace.root.join(member))?);
    }
    cargo.args(&selection.filter);
    part("unit tests", &mut cargo)
}

fn end_to_end(
    workspace: &Workspace,
    selection: &Selection,
    variant: Variant,
) -> anyhow::Result<Part> {
    let mut cargo = workspace.cargo();
    // The whole workspace, though only the lab's tests run: with fewer packages selected,
    // dependencies would have other features and be built once more.
    cargo.args(["test", "--workspace", "--no-fail-fast"]);
    select(&mut cargo, &test_targets(&workspace.root.join("tests"))?);
    cargo
        .arg("--")
        .arg(format!("--test-threads={}", selection.threads))
        .args(&selection.filter)
        .envs(variant.environment().iter().copied());
    // Those that need other people's Python packages are ignored where there are none.
    if let Some(python) = spiffe_python::find(workspace) {
        cargo.arg("--include-ignored").env(spiffe_python::VARIABLE, python);
    }
    if selection.soak {
        cargo.env("SIGNET_LAB_STORM", SOAK_STORM).env("SIGNET_LAB_SOAK", "1");
    }
    // A real CNI plugin gives no address by number, and the image has the lab's helper alone:
    // not every test can do with that.
    if selection.filter.is_none() && (!selection.soak || variant == Variant::Runtime) {
        cargo.args(variant.tests());
    }
    part(&format!("end to end, {}", variant.name()), &mut cargo)
}

fn select(cargo: &mut Command, targets: &[String]) {
    for target in targets {
        cargo.args(["--test", target]);
    }
}

/// Names of a crate's integration tests: `tests/<name>.rs` and `tests/<name>/main.rs`.
fn test_targets(member: &Path) -> anyhow::Result<Vec<String>> {
    let directory = member.join("tests");
    if !directory.is_dir() {
        return Ok(Vec::new());
    }
    let mut names = Vec::new();
    for entry in fs::read_dir(&directory).with_context(|| directory.display().to_string())? {
        let path = entry.with_context(|| directory.display().to_string())?.path();
        let is_target = path.join("main.rs").is_file() || path.extension() == Some("rs".as_ref());
        if let Some(name) = path.file_stem().and_then(|stem| stem.to_str())
            && is_target
        {
            names.push(name.to_owned());
        }
    }
    names.sort();
    Ok(names)
}

/// Runs test programs, passing their output on, and counts.
fn part(name: &str, command: &mut Command) -> anyhow::Result<Part> {
    eprintln!("test: {name}");
    eprintln!("$ {}", command::shown(command));
    let start = Instant::now();
    let mut child = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .with_context(|| format!("`{}` could not be started", command::shown(command)))?;
    let mut count = Count::default();
    let mut failures = Failures::default();
    if let Some(stdout) = child.stdout.take() {
        for line in BufReader::new(stdout).split(b'\n') {
            let line = line.context("the test programs' output cannot be read")?;
            let line = String::from_utf8_lossy(&line);
            println!("{line}");
            count.add(&line);
            failures.add(&line);
        }
    }
    let status = child.wait().context("the test programs cannot be waited for")?;
    Ok(Part { name: name.to_owned(), count, failures, ok: status.success(), took: start.elapsed() })
}

impl Failures {
    /// Takes a line of a test program's output: `---- NAME stdout ----` begins a failed test's,
    /// `failures:` ends the last one's.
    fn add(&mut self, line: &str) {
        let heading = line.strip_prefix("---- ").and_then(|rest| rest.strip_suffix(" stdout ----"));
        if let Some(name) = heading {
            self.tests.push(FailedTest { name: name.to_owned(), lines: Vec::new() });
            self.reading = true;
        } else if line == "failures:" || line.starts_with("test result: ") {
            self.reading = false;
        } else if let Some(test) = self.tests.last_mut()
            && self.reading
            && !line.trim().is_empty()
            && test.lines.len() < FAILURE_LINES
        {
            test.lines.push(line.chars().take(FAILURE_WIDTH).collect());
        }
    }
}

impl Count {
    /// Adds what a line `test result: ok. 3 passed; 0 failed; 1 ignored; …` says.
    fn add(&mut self, line: &str) {
        let Some(result) = line.trim().strip_prefix("test result: ") else { return };
        for part in result.split(['.', ';']) {
            let Some((number, what)) = part.trim().split_once(' ') else { continue };
            let Ok(number) = number.parse::<u64>() else { continue };
            match what {
                "passed" => self.passed += number,
                "failed" => self.failed += number,
                "ignored" => self.ignored += number,
                _ => {}
            }
        }
    }
}

/// Prints the failed tests, a line a part, then the sum; fails unless every part passed and tested something.
fn conclude(parts: &[Part], filter: Option<&str>) -> anyhow::Result<()> {
    let mut sum = Count::default();
    let mut bad = Vec::new();
    println!();
    for part in parts {
        for FailedTest { name, lines } in &part.failures.tests {
            println!("FAILED {name} ({})", part.name);
            for line in lines {
                println!("    {line}");
            }
        }
    }
    for Part { name, count, ok, took, .. } in parts {
        let verdict = match (ok, count.passed) {
            (false, _) => "FAILED",
            (true, 0) if filter.is_none() => "NO TEST RAN",
            (true, _) => "ok",
        };
        if verdict.chars().all(|c| c.is_ascii_uppercase() || c == ' ') {
            bad.push(name.as_str());
        }
        println!(
            "{verdict:<12} {:>4} passed {:>3} failed {:>3} ignored {:>5.0} s  {name}",
            count.passed,
            count.failed,
            count.ignored,
            took.as_secs_f64()
        );
        sum.passed += count.passed;
        sum.failed += count.failed;
        sum.ignored += count.ignored;
    }
    if sum.passed + sum.failed == 0 {
        bail!("no test ran: is the filter right?");
    }
    // A part can fail without a failed test (it did not build, or was killed).
    let failed = sum.failed.max(bad.len() as u64);
    println!("{} passed, {failed} failed, {} skipped", sum.passed, sum.ignored);
    if !bad.is_empty() {
        bail!("failed: {}", bad.join("; "));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn integration_tests_are_found_by_their_files() {
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
        let names = test_targets(&root.join("tests")).unwrap();
        assert!(names.contains(&"e2e".to_owned()), "{names:?}");
        assert!(test_targets(&root.join("docs")).unwrap().is_empty());
    }

    #[test]
    fn results_are_counted() {
        let mut count = Count::default();
        count.add("test result: ok. 12 passed; 0 failed; 1 ignored; 0 measured; 3 filtered out");
        count.add("test result: FAILED. 2 passed; 3 failed; 0 ignored; 0 measured");
        count.add("test proxy::says_12 passed ... ok");
        assert_eq!(count, Count { passed: 14, failed: 3, ignored: 1 });
    }

    #[test]
    fn failed_tests_are_kept_with_what_they_said() {
        let mut failures = Failures::default();
        let output = "test one::fails ... FAILED\n\nfailures:\n\n---- one::fails stdout ----\n\n\
                      thread 'one::fails' panicked at x.rs:1:1:\nno answer\n\n---- two stdout \
                      ----\nrefused\n\n\nfailures:\n    one::fails\n    two\n\ntest result: FAILED.";
        output.lines().for_each(|line| failures.add(line));
        let expected = [
            ("one::fails", vec!["thread 'one::fails' panicked at x.rs:1:1:", "no answer"]),
            ("two", vec!["refused"]),
        ];
        let found: Vec<(&str, Vec<&str>)> = failures
            .tests
            .iter()
            .map(|test| (test.name.as_str(), test.lines.iter().map(String::as_str).collect()))
            .collect();
        assert_eq!(found, expected);
    }

    #[test]
    fn a_part_that_fails_or_tests_nothing_fails_the_run() {
        let part = |passed, failed, ok| Part {
            name: "x".into(),
            count: Count { passed, failed, ignored: 0 },
            failures: Failures::default(),
            ok,
            took: Duration::ZERO,
        };
        assert!(conclude(&[part(1, 0, true)], None).is_ok());
        assert!(conclude(&[part(1, 0, true), part(0, 0, true)], None).is_err());
        assert!(conclude(&[part(1, 0, true), part(0, 0, true)], Some("name")).is_ok());
        assert!(conclude(&[part(0, 0, true)], Some("name")).is_err());
        assert!(conclude(&[part(1, 1, false)], None).is_err());
        assert!(conclude(&[part(1, 0, false)], None).is_err());
    }

    #[test]
    fn the_output_of_a_program_is_counted_and_its_failure_seen() {
        let mut passing = Command::new("printf");
        passing.arg("test result: ok. 2 passed; 0 failed;\n");
        let passed = part("x", &mut passing).unwrap();
        assert!(passed.ok);
        assert_eq!(passed.count.passed, 2);
        assert!(!part("x", &mut Command::new("false")).unwrap().ok);
    }
}
