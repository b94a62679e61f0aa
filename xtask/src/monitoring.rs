//! `manifests/monitoring/`: its alerts are tested by promtool, each has a runbook, and every
//! metric that an alert or the dashboard reads is one that is documented.

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, bail};
use serde_json::Value;

use crate::{
    command,
    failure::Failure,
    workspace::{self, Workspace},
};

const RULES: &str = "manifests/monitoring/rules.yaml";
const DASHBOARD: &str = "manifests/monitoring/dashboard.yaml";
const TESTS: &str = "tests/monitoring/rules.test.yaml";
const RUNBOOKS: &str = "docs/runbooks.md";
const METRICS: &str = "docs/metrics.md";

/// One of Prometheus' programs: of the system, or the one that [`install`] unpacked.
pub fn find(workspace: &Workspace, program: &str) -> Option<PathBuf> {
    let unpacked = directory(workspace).join("usr/bin");
    workspace::find_program(program, &[&unpacked])
}

/// Unpacks Debian's Prometheus below the build directory: installed, it would be started as a
/// service, which nobody asked for. Does nothing where it is there.
pub fn install(workspace: &Workspace) -> anyhow::Result<()> {
    if ["promtool", "prometheus"].iter().all(|program| find(workspace, program).is_some()) {
        return Ok(());
    }
    eprintln!("setup: `promtool` is missing (package prometheus; it tests the alerts)");
    let missing = |error: &str| {
        Failure::host(format!(
            "Prometheus cannot be had by apt ({error}): put `promtool` and `prometheus` (2.40 or \
             newer) into PATH"
        ))
    };
    if !crate::toolchain::has_apt() {
        return Err(missing("there is no apt"));
    }
    let directory = directory(workspace);
    fs::create_dir_all(&directory).with_context(|| directory.display().to_string())?;
    let download = || {
        command::run(
            Command::new("apt-get").args(["download", "prometheus"]).current_dir(&directory),
        )
    };
    if download().is_err() {
        command::run(Command::new("apt-get").args(["update", "-qq"]))?;
        download().map_err(|error| missing(&format!("{error:#}")))?;
    }
    for entry in fs::read_dir(&directory)? {
        let path = entry?.path();
        if path.extension().is_some_and(|extension| extension == "deb") {
            command::run(Command::new("dpkg-deb").arg("-x").arg(&path).arg(&directory))?;
            fs::remove_file(&path)?;
        }
    }
    match find(workspace, "promtool") {
        Some(_) => Ok(()),
        None => Err(missing("the package holds no promtool")),
    }
}

fn directory(workspace: &Workspace) -> PathBuf {
    workspace.target.join("prometheus")
}

/// Checks everything.
pub fn check(workspace: &Workspace) -> anyhow::Result<()> {
    let read =
        |path: &str| fs::read_to_string(workspace.root.join(path)).with_context(|| path.to_owned());
    let parse = |path: &str| -> anyhow::Result<Value> {
        serde_saphyr::from_str(&read(path)?).with_context(|| path.to_owned())
    };
    let (rules, tests, dashboard) = (parse(RULES)?, parse(TESTS)?, parse(DASHBOARD)?);
    let problems = faults(&rules, &tests, &dashboard, &read(RUNBOOKS)?, &read(METRICS)?);
    for problem in &problems {
        eprintln!("monitoring: {problem}");
    }
    if !problems.is_empty() {
        bail!("{} faults in manifests/monitoring", problems.len());
    }
    let Some(promtool) = find(workspace, "promtool") else {
        return Err(Failure::host("`promtool` is missing: `cargo xtask setup` brings it"));
    };
    test_rules(&promtool, &rules, &workspace.root.join(TESTS), &workspace.target)
}

/// Lets promtool run the tests of the rules, which it wants as a plain file beside the tests.
fn test_rules(promtool: &Path, rules: &Value, tests: &Path, target: &Path) -> anyhow::Result<()> {
    let directory = target.join("monitoring");
    fs::create_dir_all(&directory).with_context(|| directory.display().to_string())?;
    // JSON is YAML.
    fs::write(directory.join("rules.yaml"), serde_json::to_vec(&rules["spec"])?)?;
    fs::copy(tests, directory.join("rules.test.yaml"))?;
    for arguments in [["check", "rules", "rules.yaml"], ["test", "rules", "rules.test.yaml"]] {
        let output = Command::new(promtool)
            .args(arguments)
            .current_dir(&directory)
            .output()
            .context("promtool could not be started")?;
        if !output.status.success() {
            bail!(
                "promtool {}:\n{}{}",
                arguments.join(" "),
                String::from_utf8_lossy(&output.stdout),
                String::from_utf8_lossy(&output.stderr)
            );
        }
    }
    Ok(())
}

/// What is wrong besides what promtool finds.
fn faults(
    rules: &Value,
    tests: &Value,
    dashboard: &Value,
    runbooks: &str,
    metrics: &str,
) -> Vec<String> {
    let mut faults = Vec::new();
    let alerts: Vec<&Value> =
        list(&rules["spec"]["groups"]).flat_map(|group| list(&group["rules"])).collect();
    if alerts.is_empty() {
        faults.push(format!("{RULES}: no rules"));
    }
    let mut names = BTreeSet::new();
    for alert in alerts {
        let name = alert["alert"].as_str().unwrap_or_default();
        if name.is_empty() || !names.insert(name.to_owned()) {
            faults.push(format!("{RULES}: {name:?}: no name, or there twice"));
        }
        if !runbooks.lines().any(|line| line.strip_prefix("## ") == Some(name)) {
            faults.push(format!("{RUNBOOKS}: no section {name}"));
        }
        let wanted = format!("{RUNBOOKS}#{}", name.to_lowercase());
        if alert["annotations"]["runbook"] != *wanted {
            faults.push(format!("{RULES}: {name}: its runbook must be {wanted}"));
        }
        for field in ["summary", "description"] {
            if alert["annotations"][field].as_str().is_none_or(str::is_empty) {
                faults.push(format!("{RULES}: {name}: no {field}"));
            }
        }
        let asked: Vec<usize> = list(&tests["tests"])
            .flat_map(|test| list(&test["alert_rule_test"]))
            .filter(|test| test["alertname"] == *name)
            .map(|test| list(&test["exp_alerts"]).count())
            .collect();
        // An alert on what is absent has no time at which it is silent in the same test.
        let has_silence = asked.contains(&0) || absent(alert);
        if !asked.iter().any(|alerts| *alerts > 0) || !has_silence {
            faults.push(format!("{TESTS}: {name}: one time at which it fires, one at which not"));
        }
        faults.extend(undocumented(metrics, alert["expr"].as_str().unwrap_or_default(), name));
    }
    for section in runbooks.lines().filter_map(|line| line.strip_prefix("## ")) {
        if !names.contains(section) {
            faults.push(format!("{RUNBOOKS}: {section}: no such alert"));
        }
    }
    let json = dashboard["data"]["signet.json"].as_str().unwrap_or_default();
    match serde_json::from_str::<Value>(json) {
        Ok(board) => {
            let panels: Vec<_> = list(&board["panels"]).collect();
            if panels.is_empty() {
                faults.push(format!("{DASHBOARD}: no panels"));
            }
            for panel in panels {
                let title = panel["title"].as_str().unwrap_or_default();
                for target in list(&panel["targets"]) {
                    let expression = target["expr"].as_str().unwrap_or_default();
                    faults.extend(undocumented(metrics, expression, title));
                }
            }
        }
        Err(error) => faults.push(format!("{DASHBOARD}: signet.json: {error}")),
    }
    faults
}

fn absent(alert: &Value) -> bool {
    alert["expr"].as_str().is_some_and(|expression| expression.starts_with("absent("))
}

/// Metrics of an expression that the page of metrics does not have.
fn undocumented(page: &str, expression: &str, place: &str) -> Vec<String> {
    let words = expression.split(|c: char| !c.is_ascii_alphanumeric() && c != '_');
    words
        .filter(|word| word.starts_with("signet_") || word.starts_with("istio_"))
        .filter(|word| !page.contains(&format!("`{word}`")))
        .map(|word| format!("{place}: {word} is not in {METRICS}"))
        .collect()
}

fn list(value: &Value) -> impl Iterator<Item = &Value> {
    value.as_array().into_iter().flatten()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn rules() -> Value {
        json!({"spec": {"groups": [{"rules": [{
            "alert": "SignetX",
            "expr": "sum(signet_a) > 1",
            "annotations": {
                "summary": "s", "description": "d", "runbook": "docs/runbooks.md#signetx"
            }
        }]}]}})
    }

    fn tests() -> Value {
        json!({"tests": [{"alert_rule_test": [
            {"alertname": "SignetX", "exp_alerts": [{}]},
            {"alertname": "SignetX", "exp_alerts": []}
        ]}]})
    }

    fn dashboard(expression: &str) -> Value {
        let board = json!({"panels": [{"title": "P", "targets": [{"expr": expression}]}]});
        json!({"data": {"signet.json": board.to_string()}})
    }

    #[test]
    fn what_is_missing_is_named() {
        let (runbooks, metrics) = ("# Runbooks\n\n## SignetX\n", "| `signet_a`, `signet_b` |");
        let good = dashboard("rate(signet_b[5m])");
        assert_eq!(faults(&rules(), &tests(), &good, runbooks, metrics), Vec::<String>::new());

        let only = |faults: Vec<String>, words: &str| {
            assert!(faults.len() == 1 && faults[0].contains(words), "{faults:?}");
        };
        only(faults(&rules(), &tests(), &good, "", metrics), "no section SignetX");
        let stale = format!("{runbooks}\n## SignetY\n");
        only(faults(&rules(), &tests(), &good, &stale, metrics), "SignetY: no such alert");
        only(faults(&rules(), &tests(), &good, runbooks, "`signet_b`"), "signet_a is not in");
        let bad = dashboard("signet_c");
        only(faults(&rules(), &tests(), &bad, runbooks, metrics), "P: signet_c is not in");
        for dropped in [0, 1] {
            let mut tests = tests();
            tests["tests"][0]["alert_rule_test"].as_array_mut().unwrap().remove(dropped);
            only(faults(&rules(), &tests, &good, runbooks, metrics), "one time at which");
        }
        let mut silent = rules();
        silent["spec"]["groups"][0]["rules"][0]["annotations"]["summary"] = Value::Null;
        only(faults(&silent, &tests(), &good, runbooks, metrics), "no summary");
    }
}
