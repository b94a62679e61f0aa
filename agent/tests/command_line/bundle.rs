//! `signet support-bundle`: what is in it, what never is, and how it is written.

use std::{
    collections::BTreeMap,
    fs,
    io::{Read, Write},
    net::TcpListener,
    os::unix::fs::PermissionsExt,
    path::Path,
    process::Output,
};

use flate2::read::GzDecoder;
use serde_json::Value;
use signet::{
    admin::{StatusInputs, SvidState},
    cluster::model::Problem,
};

use super::{Node, allowed, binary, code, denied, ended, inputs, stderr, stdout};

const KEY: &str =
    "-----BEGIN PRIVATE KEY-----\nMIGHAgEAMBMGByqGSM49AgEGCCqGSM49\n-----END PRIVATE KEY-----\n";
const TOKEN: &str =
    "eyJhbGciOiJSUzI1NiJ9.eyJzdWIiOiJzeXN0ZW0ifQ.c2lnbmF0dXJlLW9mLWEtdG9rZW4tMDEyMw";
/// What gives any of them away.
const SECRETS: [&str; 4] =
    ["PRIVATE KEY", "MIGHAgEAMBMGByqGSM49", "eyJhbGciOiJSUzI1NiJ9", "c2lnbmF0dXJl"];

fn secrets_in(text: &str) -> Vec<&'static str> {
    SECRETS.into_iter().filter(|secret| text.contains(secret)).collect()
}

/// Runs it in a directory, with these variables.
async fn bundle(dir: &Path, args: &[&str], variables: &[(&str, &str)]) -> Output {
    let mut command = binary(&[&["support-bundle"], args].concat());
    command.current_dir(dir).envs(variables.iter().copied());
    tokio::task::spawn_blocking(move || command.output().unwrap()).await.unwrap()
}

/// Texts by their names below the one directory that all are in.
fn unpacked(bytes: &[u8]) -> BTreeMap<String, String> {
    let mut archive = tar::Archive::new(GzDecoder::new(bytes));
    let mut parts = BTreeMap::new();
    for entry in archive.entries().unwrap() {
        let mut entry = entry.unwrap();
        assert_eq!(entry.header().mode().unwrap(), 0o600);
        let path = entry.path().unwrap().display().to_string();
        let (root, name) = path.split_once('/').unwrap();
        assert!(root.starts_with("signet-support-20"), "{path}");
        let mut text = String::new();
        entry.read_to_string(&mut text).unwrap();
        assert!(parts.insert(name.to_owned(), text).is_none(), "{path} twice");
    }
    parts
}

fn all(parts: &BTreeMap<String, String>) -> String {
    parts.iter().map(|(name, text)| format!("{name}\n{text}\n")).collect()
}

/// A page of metrics, for as long as the test runs.
fn metrics_page() -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap().to_string();
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let mut stream = stream.unwrap();
            let mut request = Vec::new();
            while !request.ends_with(b"\r\n\r\n") {
                let mut byte = [0];
                if stream.read(&mut byte).unwrap() == 0 {
                    break;
                }
                request.push(byte[0]);
            }
            // The check of this host looks whether something listens, and asks nothing.
            if !request.starts_with(b"GET /metrics ") {
                continue;
            }
            let page = "signet_problems 0\n# EOF\n";
            let length = page.len();
            let answer = format!("HTTP/1.1 200 OK\r\ncontent-length: {length}\r\n\r\n{page}");
            stream.write_all(answer.as_bytes()).unwrap();
        }
    });
    address
}

/// An agent that was told secrets in others' errors.
fn leaking() -> StatusInputs {
    let mut inputs = inputs("node-1");
    inputs.problems.push(Problem {
        subject: "file authority.yaml".into(),
        message: format!("cannot be read near \"{KEY}\" (authorization: Bearer {TOKEN})"),
    });
    for (_, svid) in &mut inputs.workload_svids {
        assert!(matches!(svid.state, SvidState::Missing));
        svid.error = Some(format!("the authority refused {TOKEN}: expired"));
    }
    inputs
}

#[tokio::test(flavor = "multi_thread")]
async fn it_holds_what_helps_and_no_secret() {
    let node = Node::start(leaking());
    node.record([allowed(), denied(), ended()]).await;
    let socket = node.socket();
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name).display().to_string();
    // What lies where the configuration points to.
    for file in ["state/authority/root.key", "observer.key", "token"] {
        let file = dir.path().join(file);
        fs::create_dir_all(file.parent().unwrap()).unwrap();
        fs::write(&file, format!("{KEY}{TOKEN}")).unwrap();
    }
    let config = path("agent.yaml");
    let text = format!(
        "node: node-1\nauthority: embedded\nstateDir: {}\nobserverKeyFile: {}\n\
         observerCertFile: {}\ncaTokenFile: \"/{TOKEN}\"\ntrustDomain: example.org\n",
        path("state"),
        path("observer.key"),
        path("observer.crt"),
    );
    fs::write(&config, &text).unwrap();
    let (metrics, bpffs) = (metrics_page(), path("bpf"));
    // Of an instance that has pinned nothing.
    fs::create_dir_all(path("bpf/default")).unwrap();
    node.log("the authority refused the request", TOKEN);
    let variables = [
        ("SIGNET_METRICS_LISTEN", &*metrics),
        ("SIGNET_READY_LISTEN", "127.0.0.1:0"),
        ("SIGNET_BPFFS", &*bpffs),
    ];
    let args = ["--socket", &socket, "--config", &config, "-o", "b.tar.gz"];
    let output = bundle(dir.path(), &args, &variables).await;
    assert_eq!((stdout(&output), stderr(&output)), ("b.tar.gz\n".into(), String::new()));
    assert_eq!(code(&output), 0);
    let file = dir.path().join("b.tar.gz");
    assert_eq!(fs::metadata(&file).unwrap().permissions().mode() & 0o7777, 0o600);
    let parts = unpacked(&fs::read(&file).unwrap());
    assert_eq!(
        parts.keys().collect::<Vec<_>>(),
        [
            "check.txt",
            "config.txt",
            "maps.ndjson",
            "metrics.txt",
            "nodes/node-1/edges.ndjson",
            "nodes/node-1/endpoints.json",
            "nodes/node-1/flows.ndjson",
            "nodes/node-1/identities.json",
            "nodes/node-1/log.txt",
            "nodes/node-1/policies.json",
            "nodes/node-1/services.json",
            "nodes/node-1/status.json",
            "nodes/node-1/status.txt",
            "nodes/node-1/svids.json",
            "problems.txt",
            "versions.json",
        ]
    );
    for (name, expected) in [
        ("check.txt", "kernel"),
        ("config.txt", "trustDomain: example.org"),
        ("config.txt", "observerKeyFile: "),
        ("metrics.txt", "signet_problems 0\n# EOF\n"),
        ("nodes/node-1/edges.ndjson", "\"serviceAccount\":\"intruder\""),
        ("nodes/node-1/endpoints.json", "payments-5b7f"),
        ("nodes/node-1/flows.ndjson", "\"event\":\"end\""),
        ("nodes/node-1/flows.ndjson", "policy_no_match"),
        ("nodes/node-1/identities.json", "signet.dev/identities/v1"),
        ("nodes/node-1/log.txt", "0 lines before these are not kept\n"),
        ("nodes/node-1/log.txt", "WARN the authority refused the request, token [redacted]\n"),
        ("nodes/node-1/policies.json", "signet.dev/policies/v1"),
        ("nodes/node-1/services.json", "signet.dev/services/v1"),
        ("nodes/node-1/status.json", "signet.dev/status/v1"),
        ("nodes/node-1/svids.json", "sa/payments"),
        ("problems.txt", "none\n"),
        // What surrounded the secrets is there, and they are not.
        ("config.txt", "/[redacted]"),
        ("nodes/node-1/status.txt", "cannot be read near"),
        ("nodes/node-1/status.json", "(authorization: Bearer [redacted])"),
        ("nodes/node-1/svids.json", "the authority refused [redacted]: expired"),
    ] {
        assert!(parts[name].contains(expected), "{name} has no {expected:?}:\n{}", parts[name]);
    }
    let versions: Value = serde_json::from_str(&parts["versions.json"]).unwrap();
    assert_eq!(versions["schema"], "signet.dev/support-bundle/v1");
    assert_eq!(versions["agents"][0]["node"], "node-1");
    assert_eq!(secrets_in(&all(&parts)), [""; 0]);
    // The control: they are found where they are, and the agent did tell them.
    assert_eq!(secrets_in(&text), SECRETS[2..]);
    assert_eq!(secrets_in(&fs::read_to_string(path("token")).unwrap()), SECRETS);
    let told = super::run(&["status", "-o", "json", "--socket", &socket]).await;
    assert_eq!(secrets_in(&stdout(&told)), SECRETS);

    // A file that is there stays, unless it is to be replaced.
    let before = fs::read(&file).unwrap();
    let output = bundle(dir.path(), &args, &variables).await;
    assert_eq!((code(&output), stdout(&output)), (3, String::new()));
    assert!(stderr(&output).contains("b.tar.gz exists"), "{}", stderr(&output));
    assert!(stderr(&output).contains("--force"), "{}", stderr(&output));
    assert_eq!(fs::read(&file).unwrap(), before);
    let few = [&args[..], &["--force", "--flows", "1"]].concat();
    let output = bundle(dir.path(), &few, &variables).await;
    assert_eq!(code(&output), 0, "{}", stderr(&output));
    let parts = unpacked(&fs::read(&file).unwrap());
    assert_eq!(parts["nodes/node-1/flows.ndjson"].lines().count(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be_had_is_named() {
    let node = Node::start(inputs("node-1"));
    let dir = tempfile::tempdir().unwrap();
    let (socket, gone) = (node.socket(), dir.path().join("gone.sock").display().to_string());
    let bpffs = dir.path().join("bpf").display().to_string();
    let closed = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().to_string();
    let variables = [("SIGNET_METRICS_LISTEN", &*closed), ("SIGNET_BPFFS", &*bpffs)];
    // To a pipe; a part that is missing is no failure.
    let output = bundle(dir.path(), &["--socket", &socket, "-o", "-"], &variables).await;
    assert_eq!(code(&output), 0, "{}", stderr(&output));
    let parts = unpacked(&output.stdout);
    let problems = &parts["problems.txt"];
    assert!(problems.starts_with("metrics.txt: http://127.0.0.1:"), "{problems}");
    assert!(problems.contains("\nmaps.ndjson: nothing is pinned at "), "{problems}");
    assert_eq!(problems.lines().count(), 2, "{problems}");
    let warned: String = problems.lines().map(|line| format!("warning: {line}\n")).collect();
    assert_eq!(stderr(&output), warned);
    assert!(parts.contains_key("nodes/node-1/status.json") && !parts.contains_key("metrics.txt"));

    // One of two agents.
    let args = ["--socket", &socket, "--socket", &gone, "-o", "two.tar.gz"];
    let output = bundle(dir.path(), &args, &variables).await;
    assert_eq!(code(&output), 4);
    let parts = unpacked(&fs::read(dir.path().join("two.tar.gz")).unwrap());
    assert!(parts["problems.txt"].contains("gone.sock"), "{}", parts["problems.txt"]);
    assert!(parts.contains_key("nodes/node-1/status.json"));

    // None, and a configuration that is none: there is an archive all the same.
    let config = dir.path().join("agent.yaml").display().to_string();
    fs::write(&config, format!("caTokenFile: {TOKEN}\n")).unwrap();
    let args = ["--socket", &gone, "--config", &config];
    let output = bundle(dir.path(), &args, &variables).await;
    assert_eq!(code(&output), 4);
    let name = stdout(&output).trim().to_owned();
    assert!(name.starts_with("signet-support-") && name.ends_with("Z.tar.gz"), "{name}");
    let parts = unpacked(&fs::read(dir.path().join(&name)).unwrap());
    assert_eq!(parts.keys().collect::<Vec<_>>(), ["problems.txt", "versions.json"]);
    let problems = &parts["problems.txt"];
    for part in ["nodes: ", "config.txt: ", "check.txt: ", "metrics.txt: ", "maps.ndjson: "] {
        assert!(problems.lines().any(|line| line.starts_with(part)), "{part} in {problems}");
    }
    // A token that was pasted where its path belongs is not in the complaint about it.
    let complaint = "agent.yaml:1: caTokenFile: \"[redacted]\" is not an absolute path";
    assert!(problems.contains(complaint), "{problems}");
    assert_eq!(secrets_in(&(all(&parts) + &stderr(&output))), [""; 0]);
}
