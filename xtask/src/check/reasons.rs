//! Every reason of a verdict has its row in the documentation, with the ABI's meaning.

use signet_ebpf::for_each_reason;

use super::Finding;

/// Where the rows are.
pub const FILE: &str = "docs/reasons.md";

macro_rules! list_reasons {
    ($($variant:ident = $number:literal $name:literal $meaning:literal,)*) => {
        /// Names and meanings, in order of their numbers.
        const REASONS: &[(&str, &str)] = &[$(($name, $meaning),)*];
    };
}
for_each_reason!(list_reasons);

/// Holds the table of the document against the ABI's list: every reason once, in order, with
/// its meaning and something to do about it.
pub fn check(document: &str, findings: &mut Vec<Finding>) {
    let rows: Vec<(usize, Vec<&str>)> = document
        .lines()
        .enumerate()
        .filter(|(_, line)| line.starts_with("| `"))
        .map(|(index, line)| {
            (index + 1, line.trim_matches('|').split('|').map(str::trim).collect())
        })
        .collect();
    let mut remaining = rows.iter();
    for (name, meaning) in REASONS {
        match remaining.next() {
            Some((_, row)) if row.as_slice().starts_with(&[&format!("`{name}`"), meaning]) => {
                let row_has_advice = row.get(2).is_some_and(|advice| !advice.is_empty());
                if !row_has_advice {
                    findings.push(Finding::error(
                        FILE,
                        1,
                        format!("the row of `{name}` does not say what to do"),
                    ));
                }
            }
            Some((line, row)) => {
                findings.push(Finding::error(
                    FILE,
                    *line,
                    format!(
                        "expected the row \"| `{name}` | {meaning} | … |\", found {}",
                        row.join(" | ")
                    ),
                ));
                return;
            }
            None => findings.push(Finding::error(
                FILE,
                1,
                format!("reason `{name}` has no row: add \"| `{name}` | {meaning} | … |\""),
            )),
        }
    }
    if let Some((line, row)) = remaining.next() {
        findings.push(Finding::error(FILE, *line, format!("{} is no reason", row[0])));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rows() -> Vec<String> {
        REASONS.iter().map(|(n, m)| format!("| `{n}` | {m} | look |")).collect()
    }

    fn findings(rows: &[String]) -> Vec<Finding> {
        let mut findings = Vec::new();
        check(&format!("# Reasons\n\n| Reason |\n|---|\n{}\n", rows.join("\n")), &mut findings);
        findings
    }

    #[test]
    fn a_complete_table_passes() {
        assert!(findings(&rows()).is_empty());
    }

    #[test]
    fn a_missing_a_changed_a_silent_and_a_strange_row_are_found() {
        let missing = rows();
        assert_eq!(findings(&missing[..missing.len() - 1]).len(), 1);

        let mut changed = rows();
        changed[3] = changed[3].replace(REASONS[3].1, "something else");
        assert_eq!(findings(&changed).len(), 1);

        let mut silent = rows();
        silent[2] = silent[2].replace("look", "");
        assert_eq!(findings(&silent).len(), 1);

        let mut strange = rows();
        strange.push("| `no_such_reason` | x | y |".to_owned());
        assert_eq!(findings(&strange).len(), 1);
    }
}
