//! `signet check` on a host: what fails says what to do, and the exit code what kind it is.

use std::{net::TcpListener, path::Path};

use serde_json::Value;

use super::{binary, code, stderr, stdout};

/// Findings of `signet check` under these variables, by area and check; the exit code.
async fn findings(variables: &[(&str, &str)]) -> (i32, Vec<Value>) {
    let mut command = binary(&["check", "-o", "json"]);
    command.envs(variables.iter().copied());
    let output = tokio::task::spawn_blocking(move || command.output().unwrap()).await.unwrap();
    let json: Value = serde_json::from_str(&stdout(&output))
        .unwrap_or_else(|error| panic!("{error}: {}", stderr(&output)));
    assert_eq!(json["schema"], "signet.dev/check/v1");
    (code(&output), json["findings"].as_array().unwrap().clone())
}

fn finding<'a>(all: &'a [Value], area: &str, check: &str) -> &'a Value {
    let found = all.iter().find(|f| f["area"] == area && f["check"] == check);
    found.unwrap_or_else(|| panic!("no {area} {check} in {all:#?}"))
}

#[tokio::test(flavor = "multi_thread")]
async fn a_host_is_checked_and_each_fault_names_its_remedy() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name).display().to_string();
    std::fs::create_dir(dir.path().join("cluster")).unwrap();
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap().to_string();
    let (cluster, run, state, bpffs) = (path("cluster"), path("run"), path("state"), path("bpf"));
    let sound = [
        ("SIGNET_CLUSTER_DIR", &*cluster),
        ("SIGNET_RUN_DIR", &*run),
        ("SIGNET_STATE_DIR", &*state),
        ("SIGNET_BPFFS", &*bpffs),
        ("SIGNET_METRICS_LISTEN", "127.0.0.1:0"),
        ("SIGNET_READY_LISTEN", "127.0.0.1:0"),
    ];
    let with = |more: &[(&'static str, &'static str)]| {
        let mut all: Vec<(&str, String)> =
            sound.iter().map(|(name, value)| (*name, (*value).to_owned())).collect();
        all.extend(more.iter().map(|(name, value)| (*name, (*value).to_owned())));
        all
    };
    let run_with = async |variables: Vec<(&str, String)>| {
        let variables: Vec<_> = variables.iter().map(|(n, v)| (*n, v.as_str())).collect();
        findings(&variables).await
    };

    let (_, all) = run_with(with(&[])).await;
    assert_eq!(finding(&all, "cluster", "directory")["state"], "ok");
    assert_eq!(finding(&all, "authority", "reachable")["state"], "ok");
    assert_eq!(finding(&all, "node", "metricsListen")["state"], "ok");
    // There is no bpffs yet, and looking makes none.
    assert_eq!(finding(&all, "kernel", "bpffs")["state"], "warning");
    assert!(!Path::new(&bpffs).exists() && !Path::new(&state).exists());

    let mut variables = with(&[("SIGNET_CGROUP_ROOT", "/signet-no-such-cgroup")]);
    variables.push(("SIGNET_METRICS_LISTEN", address));
    variables.push(("SIGNET_CLUSTER_DIR", path("gone")));
    let (exit, all) = run_with(variables).await;
    // The host's own fault goes before the others.
    assert_eq!(exit, 6, "{all:#?}");
    for (area, check, detail, remedy) in [
        ("cgroups", "roots", "signet-no-such-cgroup", "cgroupRoot"),
        ("node", "metricsListen", "in use", "ss -ltnp"),
        ("cluster", "directory", "is no directory", "clusterDir"),
    ] {
        let found = finding(&all, area, check);
        assert_eq!(found["state"], "failed", "{found}");
        assert!(found["detail"].as_str().unwrap().contains(detail), "{found}");
        assert!(found["remedy"].as_str().unwrap().contains(remedy), "{found}");
    }
    assert_eq!(finding(&all, "pods", "links")["state"], "skipped");

    let variables = with(&[
        ("SIGNET_AUTHORITY", "grpc"),
        ("SIGNET_CA_ADDRESS", "https://127.0.0.1:1"),
        ("SIGNET_CA_ROOT_FILE", "/signet/no-such-file"),
    ]);
    let (_, all) = run_with(variables).await;
    let found = finding(&all, "authority", "reachable");
    assert_eq!(found["state"], "failed");
    assert!(found["detail"].as_str().unwrap().contains("caRootFile"), "{found}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_configuration_that_does_not_read_is_input() {
    let output = binary(&["check", "--config", "/signet/no-such-file"]).output().unwrap();
    assert_eq!(code(&output), 3);
    assert!(stderr(&output).contains("/signet/no-such-file"), "{}", stderr(&output));
}
