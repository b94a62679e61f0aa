//! Rules about single files: their names, their size, where `unsafe` may stand.

use super::{
    Finding,
    lexer::{self, Token},
};

/// Names that say nothing about what is inside.
const DRAWERS: &[&str] =
    &["common", "helper", "helpers", "misc", "shared", "stuff", "types", "util", "utils"];

/// More lines than this without tests: the file wants to be two.
const WARN_LINES: usize = 600;
/// More than this is an error.
const MOST_LINES: usize = 800;

/// Where `unsafe` is needed: everything else can do without. The last are bpf(2) as another
/// tool uses it, in the tests of conflicts, and clone3(2), which gives a process a chosen pid.
const UNSAFE_ROOMS: &[&str] = &[
    "agent/src/kernel/",
    "agent/src/netns/",
    "agent/src/workload_api/attest",
    "ebpf/src/",
    "tests/tests/e2e/foreign.rs",
    "tests/tests/e2e/pid_reuse.rs",
];

/// Checks a file's name: no part of its path below the crate is a drawer.
pub fn name(file: &str, findings: &mut Vec<Finding>) {
    for part in file.split('/') {
        let stem = part.strip_suffix(".rs").unwrap_or(part);
        if DRAWERS.contains(&stem) {
            findings.push(Finding::error(
                file,
                1,
                format!("`{stem}` is a drawer, not a name: say what lives there"),
            ));
        }
    }
}

/// True for a file that is a test module as a whole (`tests.rs`, or below a crate's `tests/`).
pub fn is_test_code(file: &str) -> bool {
    // The first part is the crate, and one crate is called `tests`.
    file.split('/').skip(1).any(|part| matches!(part, "tests" | "tests.rs"))
}

/// Checks a file's size, its test modules left out.
pub fn size(file: &str, source: &str, tokens: &[Token<'_>], findings: &mut Vec<Finding>) {
    if is_test_code(file) {
        return;
    }
    let tests: usize = lexer::test_lines(tokens).iter().map(|(first, last)| last - first + 1).sum();
    let lines = source.lines().count().saturating_sub(tests);
    let advice = format!("{lines} lines without tests: it wants to be two files");
    if lines > MOST_LINES {
        findings.push(Finding::error(file, 1, format!("{advice} (at most {MOST_LINES})")));
    } else if lines > WARN_LINES {
        findings.push(Finding::warning(file, 1, advice));
    }
}

/// Checks that `unsafe` stands only in the rooms that need it.
pub fn safety(file: &str, tokens: &[Token<'_>], findings: &mut Vec<Finding>) {
    if UNSAFE_ROOMS.iter().any(|room| file.starts_with(room)) {
        return;
    }
    for token in tokens.iter().filter(|t| t.text == "unsafe") {
        findings.push(Finding::error(
            file,
            token.line,
            format!("`unsafe` outside {}: use a safe wrapper there", UNSAFE_ROOMS.join(", ")),
        ));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn found(check: impl Fn(&mut Vec<Finding>)) -> Vec<Finding> {
        let mut findings = Vec::new();
        check(&mut findings);
        findings
    }

    #[test]
    fn drawers_are_refused() {
        assert_eq!(found(|f| name("agent/src/proxy/utils.rs", f)).len(), 1);
        assert_eq!(found(|f| name("agent/src/common/mod.rs", f)).len(), 1);
        assert!(found(|f| name("agent/src/proxy/open_flows.rs", f)).is_empty());
    }

    #[test]
    fn long_files_are_found_and_their_tests_do_not_count() {
        let check = |code: usize, tests: usize| {
            let source = format!(
                "{}#[cfg(test)]\nmod tests {{\n{}}}\n",
                "fn a() {}\n".repeat(code),
                "fn b() {}\n".repeat(tests)
            );
            found(|f| size("x.rs", &source, &lexer::tokens(&source), f))
        };
        assert!(check(600, 2000).is_empty());
        assert!(matches!(check(601, 0).as_slice(), [f] if !f.is_error));
        assert!(matches!(check(801, 0).as_slice(), [f] if f.is_error));
    }

    #[test]
    fn test_code_is_told_by_its_place() {
        assert!(is_test_code("agent/src/proxy/tests/flows.rs"));
        assert!(is_test_code("agent/src/tunnel/tls/tests.rs"));
        assert!(is_test_code("tests/tests/e2e/storm.rs"));
        assert!(!is_test_code("tests/src/lab.rs"));
        assert!(!is_test_code("agent/src/proxy/mod.rs"));
    }

    #[test]
    fn unsafe_is_found_outside_its_rooms() {
        let source = "#![forbid(unsafe_code)] // unsafe\nfn f() {\n    unsafe { g() }\n}";
        let tokens = lexer::tokens(source);
        let outside = found(|f| safety("agent/src/proxy/copy.rs", &tokens, f));
        assert!(matches!(outside.as_slice(), [f] if f.line == 3), "{outside:?}");
        assert!(found(|f| safety("agent/src/kernel/link.rs", &tokens, f)).is_empty());
    }
}
