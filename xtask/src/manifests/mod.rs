//! `cargo xtask manifests --check`: what `kubectl kustomize` makes of `manifests/` is what a
//! cluster takes, and hangs together.

mod objects;
mod references;
mod surge;

use std::{
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, bail};
use serde_json::Value;

use crate::{
    failure::Failure,
    monitoring,
    workspace::{self, Workspace},
};

/// What is built: each can be applied by itself.
const ROOTS: [&str; 9] = [
    "base",
    "overlays/guard",
    "overlays/istio-ca",
    "overlays/k3s",
    "overlays/kind",
    "overlays/monitoring",
    "overlays/spiffe-csi",
    "overlays/taint",
    "uninstall",
];

/// Fields that a kustomization may have: what every kubectl understands.
const KUSTOMIZE_FIELDS: [&str; 4] = ["apiVersion", "kind", "resources", "patches"];

/// Options of `cargo xtask manifests`.
#[derive(clap::Args, Clone, Debug)]
pub struct Options {
    /// Check what is there; there is nothing else to do with them.
    #[arg(long, required = true)]
    check: bool,
}

/// Runs the check.
pub fn run(workspace: &Workspace, options: &Options) -> anyhow::Result<()> {
    debug_assert!(options.check, "clap requires it");
    check(workspace)
}

/// Builds everything and checks it.
pub fn check(workspace: &Workspace) -> anyhow::Result<()> {
    let Some(kubectl) = workspace::find_program("kubectl", &[]) else {
        return Err(Failure::host(
            "`kubectl` is missing: `cargo xtask setup` installs it where there is apt (package \
             kubernetes-client)",
        ));
    };
    let manifests = workspace.root.join("manifests");
    let mut problems = kustomizations(&manifests)?;
    let mut objects = 0;
    for root in ROOTS {
        let text = build(&kubectl, &manifests.join(root))?;
        let built = parse(&text).with_context(|| format!("manifests/{root}"))?;
        objects += built.len();
        problems
            .extend(faults(&built).into_iter().map(|fault| format!("manifests/{root}: {fault}")));
    }
    for problem in &problems {
        eprintln!("manifests: {problem}");
    }
    if !problems.is_empty() {
        bail!("{} faults in manifests/", problems.len());
    }
    monitoring::check(workspace)?;
    eprintln!("manifests: {} overlays, {objects} objects, all in order", ROOTS.len());
    Ok(())
}

/// Everything that is wrong with the objects of one build.
fn faults(objects: &[Value]) -> Vec<String> {
    let mut faults = Vec::new();
    for object in objects {
        faults.extend(objects::faults(object));
    }
    faults.extend(references::faults(objects));
    faults.extend(surge::faults(objects));
    faults
}

fn build(kubectl: &Path, directory: &Path) -> anyhow::Result<String> {
    let output = std::process::Command::new(kubectl)
        .arg("kustomize")
        .arg(directory)
        .output()
        .context("kubectl could not be started")?;
    if !output.status.success() {
        bail!(
            "kubectl kustomize {}: {}",
            directory.display(),
            String::from_utf8_lossy(&output.stderr).trim()
        );
    }
    String::from_utf8(output.stdout).context("kubectl kustomize wrote something that is not UTF-8")
}

fn parse(text: &str) -> anyhow::Result<Vec<Value>> {
    serde_saphyr::from_multiple(text).context("kubectl kustomize wrote something that is not YAML")
}

/// Kustomizations with other fields than the plain ones, and files that none of them names.
fn kustomizations(manifests: &Path) -> anyhow::Result<Vec<String>> {
    let mut problems = Vec::new();
    let mut directories = vec![manifests.to_owned()];
    while let Some(directory) = directories.pop() {
        let mut files = Vec::new();
        for entry in fs::read_dir(&directory).with_context(|| directory.display().to_string())? {
            let path = entry?.path();
            if path.is_dir() {
                // Examples are applied one by one.
                if path.file_name().is_none_or(|name| name != "examples") {
                    directories.push(path);
                }
            } else if path.extension().is_some_and(|e| e == "yaml") {
                files.push(path);
            }
        }
        let index = directory.join("kustomization.yaml");
        if files.contains(&index) {
            let text = fs::read_to_string(&index).with_context(|| index.display().to_string())?;
            problems.extend(kustomization(&text, &files).into_iter().map(|p| {
                let shown = index.strip_prefix(manifests).unwrap_or(&index);
                format!("manifests/{}: {p}", shown.display())
            }));
        }
    }
    problems.sort();
    Ok(problems)
}

fn kustomization(text: &str, files: &[PathBuf]) -> Vec<String> {
    let value: Value = match serde_saphyr::from_str(text) {
        Ok(value) => value,
        Err(error) => return vec![format!("not YAML: {error}")],
    };
    let mut problems: Vec<String> = value
        .as_object()
        .into_iter()
        .flat_map(|fields| fields.keys())
        .filter(|field| !KUSTOMIZE_FIELDS.contains(&field.as_str()))
        .map(|field| format!("field {field}: only {} are used", KUSTOMIZE_FIELDS.join(", ")))
        .collect();
    let list = |name: &str| value[name].as_array().cloned().unwrap_or_default();
    let resources = list("resources");
    let patches = list("patches");
    let named: Vec<&str> = resources
        .iter()
        .filter_map(Value::as_str)
        .chain(patches.iter().filter_map(|patch| patch["path"].as_str()))
        .collect();
    for file in files {
        let name = file.file_name().and_then(|name| name.to_str()).unwrap_or_default();
        if name != "kustomization.yaml" && !named.contains(&name) {
            problems.push(format!("{name} is beside it and not in it: add it, or remove it"));
        }
    }
    problems
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn planted_faults_of_a_kustomization_are_found() {
        let good = "apiVersion: kustomize.config.k8s.io/v1beta1\nkind: Kustomization\nresources: \
                    [a.yaml]\npatches:\n- path: b.yaml\n";
        let files = ["a.yaml", "b.yaml", "kustomization.yaml"].map(PathBuf::from);
        assert_eq!(kustomization(good, &files), [""; 0]);
        let images = format!("{good}images: []\n");
        assert!(kustomization(&images, &files)[0].contains("field images"));
        let forgotten = good.replace("- path: b.yaml", "- path: c.yaml");
        assert!(kustomization(&forgotten, &files)[0].contains("b.yaml is beside it"));
    }
}
