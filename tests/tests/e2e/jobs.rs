//! What the manifests run once on a node: it gets done with the capabilities that its container
//! is given, and each that is taken away is missed.

use std::{fs, os::unix::fs::PermissionsExt, path::Path, process::Command};

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use signet_lab::{
    cluster_dir,
    process::{signet_binary, without_own_variables},
};

const GUARD: &str = include_str!("../../../manifests/overlays/guard/agent.yaml");

/// The names of a list of capabilities, as setpriv writes them.
fn names(list: &Value) -> Vec<String> {
    let names = list.as_array().into_iter().flatten().filter_map(Value::as_str);
    names.map(str::to_lowercase).collect()
}

/// A host's directories that belong to root and that nobody may write to by their mode.
fn host() -> Result<tempfile::TempDir> {
    let root = tempfile::tempdir()?;
    for directory in ["opt/signet", "etc/systemd/system"] {
        let path = root.path().join(directory);
        fs::create_dir_all(&path)?;
        fs::set_permissions(&path, fs::Permissions::from_mode(0o555))?;
    }
    Ok(root)
}

/// Runs a container's command with these capabilities: its exit code and what it says.
fn run(container: &Value, capabilities: &[String], root: &Path) -> Result<(i32, String)> {
    let root = root.display().to_string();
    let words = container["args"].as_array().context("no args")?.iter();
    let words =
        words.filter_map(Value::as_str).map(|word| if word == "/host" { &*root } else { word });
    let mut set = "-all".to_owned();
    for capability in capabilities {
        set.push_str(",+");
        set.push_str(capability);
    }
    let mut command = Command::new("setpriv");
    without_own_variables(&mut command);
    if container["securityContext"]["allowPrivilegeEscalation"] == false {
        command.arg("--no-new-privs");
    }
    // What a runtime does for user 0: nothing beyond the bounding set.
    let output = command
        .args(["--bounding-set", &set, "--"])
        .arg(signet_binary()?)
        .args(words)
        .output()
        .context("setpriv (util-linux)")?;
    let text = [output.stdout, output.stderr].concat();
    Ok((output.status.code().unwrap_or(-1), String::from_utf8_lossy(&text).into_owned()))
}

#[test]
fn the_guard_is_installed_with_what_its_container_is_given() -> Result<()> {
    let objects = cluster_dir::parse(GUARD)?;
    let set = objects.first().context("no DaemonSet")?;
    let container = &set["spec"]["template"]["spec"]["initContainers"][0];
    let security = &container["securityContext"];
    ensure!(security["runAsUser"] == 0 && security["privileged"].is_null(), "{security}");
    ensure!(names(&security["capabilities"]["drop"]) == ["all"], "{security}");
    let given = names(&security["capabilities"]["add"]);
    ensure!(!given.is_empty(), "{security}");

    let root = host()?;
    let (code, said) = run(container, &given, root.path())?;
    ensure!(code == 0, "{code}: {said}");
    let installed = ["opt/signet/bin/signet", "etc/systemd/system/signet-guard.service"];
    for path in installed {
        ensure!(root.path().join(path).is_file(), "no {path}: {said}");
    }
    for (at, taken) in given.iter().enumerate() {
        let mut fewer = given.clone();
        fewer.remove(at);
        let root = host()?;
        let (code, said) = run(container, &fewer, root.path())?;
        ensure!(code != 0, "{taken} is not needed: {said}");
        ensure!(said.contains("opt/signet") && said.contains("Permission denied"), "{said}");
        ensure!(installed.iter().all(|path| !root.path().join(path).exists()), "{said}");
    }
    Ok(())
}
