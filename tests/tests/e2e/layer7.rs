//! Requests judged where they arrive: plain Istio YAML, over both wires and in clear, with
//! curl, wrk, gRPC and websockets as others' programs speak them.

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;
use signet_lab::{LabOptions, cluster_dir::ObjectKey, eventually, pod::Pod};

use crate::mesh::{CHANGE, HTTP, Mesh, TCP, TIMEOUT, refused_soon, with_logs};

/// Debian's interpreter, which has Debian's packages.
const PYTHON: &str = "/usr/bin/python3";
const SCRIPT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/e2e/layer7_peer.py");

/// What api-gateway (here: the frontend) may ask of payments, in Istio's words.
fn policy() -> String {
    "apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: payments, namespace: shop}
spec:
  selector: {matchLabels: {app: payments}}
  action: ALLOW
  rules:
  - from:
    - source: {principals: [cluster.local/ns/shop/sa/frontend]}
    to:
    - operation: {methods: [POST], paths: [/api/v1/payments, /api/v1/refunds, \"/lab.Echo/*\"]}
    - operation: {methods: [GET], paths: [/ws]}
"
    .to_owned()
}

/// The status that curl gets, 000 where it gets none.
fn status(client: &Pod, url: &str, more: &[&str]) -> Result<String> {
    let mut argv = vec![
        "curl",
        "-s",
        "-o",
        "/dev/null",
        "-w",
        "%{http_code}",
        "--max-time",
        "10",
        "--path-as-is",
    ];
    argv.extend(more);
    argv.push(url);
    // curl's own exit code says no more than the status.
    Ok(client.exec(&argv)?.stdout.trim().to_owned())
}

fn expect(client: &Pod, url: &str, more: &[&str], wanted: &str) -> Result<()> {
    let status = status(client, url, more)?;
    ensure!(status == wanted, "{} {url} {more:?}: {status}, not {wanted}", client.full_name());
    Ok(())
}

/// Asks until it is answered so: a change takes a moment, and closes what was open.
fn soon(client: &Pod, url: &str, more: &[&str], wanted: &str) -> Result<()> {
    eventually(&format!("{url} {more:?} is {wanted}"), CHANGE, || {
        let status = status(client, url, more)?;
        if status == wanted {
            return Ok(Some(()));
        }
        bail!("{status}")
    })
}

/// The record of a request, as `signet flows` finds it by the request's own filters.
fn recorded(mesh: &Mesh, filters: &[&str], from: &str, verdict: &str) -> Result<Value> {
    eventually(&format!("{from} is {verdict} by {filters:?}"), CHANGE, || {
        let mut arguments = vec!["flows", "-o", "json"];
        arguments.extend(filters);
        let output = mesh.lab.agent("node-2")?.cli(&arguments)?;
        let found =
            output.stdout.lines().filter_map(|line| serde_json::from_str(line).ok()).find(
                |record: &Value| record["source"]["pod"] == from && record["verdict"] == verdict,
            );
        match found {
            Some(record) => Ok(Some(record)),
            None => bail!("{} {}", output.stdout, output.stderr),
        }
    })
}

/// api-gateway may only post two things, nobody else may do anything, and everybody else is told.
fn payments_by_request(mesh: &Mesh) -> Result<()> {
    let Mesh { lab, frontend, intruder, payments, .. } = mesh;
    let url = |path: &str| payments.url(HTTP, path);
    let post = ["-X", "POST", "-d", "amount=1"];
    // The control: without a policy everybody may do everything.
    for client in [frontend, intruder] {
        soon(client, &url("/api/v1/admin"), &[], "200")?;
    }
    lab.cluster().apply_yaml(&policy())?;
    soon(frontend, &url("/api/v1/admin"), &[], "403")?;
    for path in ["/api/v1/payments", "/api/v1/refunds", "/api/v1/payments?id=7"] {
        expect(frontend, &url(path), &post, "200")?;
    }
    expect(frontend, &url("/api/v1/payments"), &["-d", "x", "-H", "Expect: 100-continue"], "200")?;
    expect(frontend, &url("/api/v1/payments"), &[], "403")?;
    expect(frontend, &url("/api/v1/payments/7"), &post, "403")?;
    for (client, path) in [(intruder, "/api/v1/payments"), (intruder, "/")] {
        soon(client, &url(path), &post, "403")?;
    }
    // What was judged is what is forwarded.
    let shown = frontend.exec(&[
        "curl",
        "-s",
        "--path-as-is",
        "-d",
        "x",
        "-H",
        "X-Forwarded-Client-Cert: URI=admin",
        "-H",
        "X_Signet_Identity: admin",
        "-H",
        "X-Kept: yes",
        &url("/api//v1/x/../%70ayments"),
    ])?;
    let shown: Value = serde_json::from_str(shown.stdout.trim()).context(shown.stdout)?;
    ensure!(shown["path"] == "/api/v1/payments", "{shown}");
    let headers = shown["headers"].to_string();
    ensure!(headers.contains("X-Kept: yes") && !headers.contains("admin"), "{shown}");
    for (path, wanted) in [
        ("/api/v1/payments/../admin", "403"),
        ("/api/v1/admin/..%2fpayments", "400"),
        ("/api/v1/admin;/../payments", "400"),
        ("/api/v1/%2570ayments", "400"),
        ("/api/v1\\payments", "400"),
    ] {
        expect(frontend, &url(path), &post, wanted)?;
    }
    expect(
        frontend,
        &url("/api/v1/payments"),
        &["-d", "x", "-H", "Transfer-Encoding: chunked", "-H", "Content-Length: 1"],
        "400",
    )?;
    // What is no HTTP is refused, whoever asks.
    refused_soon(frontend, payments.at(TCP))?;

    let admin = ["--http-path", "^/api/v1/admin$", "--http-status", "403"];
    let denied = recorded(mesh, &admin, "frontend", "DROPPED")?;
    ensure!(denied["reason"] == "policy_no_match" && denied["via"] == "mtls", "{denied}");
    ensure!(denied["http"]["method"] == "GET" && denied["http"]["status"] == 403, "{denied}");
    let posted = ["--http-method", "POST", "--http-path", "refunds"];
    let passed = recorded(mesh, &posted, "frontend", "FORWARDED")?;
    ensure!(passed["http"]["status"] == 200 && passed["policy"]["name"] == "payments", "{passed}");
    recorded(mesh, &["--http-method", "POST", "--http-status", "4+"], "intruder", "DROPPED")?;
    Ok(())
}

/// Runs the script in a pod, until it has said what it found.
fn called(client: &Pod, role: &str, target: &str) -> Result<Value> {
    let output = client.exec(&["timeout", "60", PYTHON, SCRIPT, role, target])?;
    let last = output.stdout.lines().last().unwrap_or_default();
    serde_json::from_str(last).with_context(|| format!("{} {}", output.stdout, output.stderr))
}

/// Others' programs notice nothing but the denials.
fn others_programs(mesh: &Mesh) -> Result<()> {
    let Mesh { frontend, payments, .. } = mesh;
    let ip = payments.ip().to_string();
    let server =
        payments.place().start_program("layer7-server", &[PYTHON, SCRIPT, "server", &ip])?;
    eventually("the Python servers listen", TIMEOUT, || {
        let is_up = server.printed().iter().any(|event| event["event"] == "listening");
        if is_up { Ok(Some(())) } else { bail!("{:?}", server.printed()) }
    })?;
    let grpc = called(frontend, "grpc", &payments.at(8081).to_string())?;
    for kind in ["unary", "down", "up", "both", "again"] {
        ensure!(grpc[kind] == true, "{kind}: {grpc}");
    }
    ensure!(grpc["denied"] == "PERMISSION_DENIED: policy_no_match", "{grpc}");
    let websocket = called(frontend, "websocket", &format!("ws://{}", payments.at(8082)))?;
    ensure!(websocket["echoed"] == true && websocket["denied"] == 403, "{websocket}");
    let script = mesh.lab.directory().join("post.lua");
    std::fs::write(&script, "wrk.method = \"POST\"\nwrk.body = \"amount=1\"\n")?;
    let load = frontend.exec(&[
        "wrk",
        "-t1",
        "-c4",
        "-d2s",
        "-s",
        &script.display().to_string(),
        &payments.url(HTTP, "/api/v1/payments"),
    ])?;
    let load = load.success()?;
    ensure!(load.contains("requests in"), "{load}");
    for fault in ["Non-2xx", "Socket errors"] {
        ensure!(!load.contains(fault), "{load}");
    }
    Ok(())
}

#[test]
fn a_payment_service_whose_callers_may_only_post_over_the_native_wire() -> Result<()> {
    let mesh = Mesh::start(Some("strict"))?;
    with_logs(&mesh, |mesh| {
        payments_by_request(mesh)?;
        others_programs(mesh)
    })
}

#[test]
fn a_payment_service_whose_callers_may_only_post_over_hbone() -> Result<()> {
    let agent_flags = vec!["--tunnel".into(), "hbone".into()];
    let mesh = Mesh::with(LabOptions { agent_flags, ..LabOptions::default() }, Some("strict"))?;
    with_logs(&mesh, |mesh| {
        payments_by_request(mesh)?;
        others_programs(mesh)
    })
}

/// A permissive workload takes plaintext, and each of its requests meets the judge all the same.
#[test]
fn plaintext_to_a_judged_workload_is_judged_without_an_identity() -> Result<()> {
    let mesh = Mesh::start(Some("permissive"))?;
    with_logs(&mesh, |mesh| {
        let Mesh { lab, frontend, payments, reports, .. } = mesh;
        let url = |path: &str| payments.url(HTTP, path);
        soon(reports, &url("/healthy"), &[], "200")?;
        lab.cluster().apply_yaml(
            "apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: payments, namespace: shop}
spec:
  selector: {matchLabels: {app: payments}}
  action: ALLOW
  rules:
  - from:
    - source: {principals: [cluster.local/ns/shop/sa/frontend]}
    to:
    - operation: {methods: [POST], paths: [/api/v1/payments]}
  - to:
    - operation: {methods: [GET], paths: [/healthy]}
",
        )?;
        // In clear: what everybody may ask, and nothing that an identity is needed for.
        soon(reports, &url("/api/v1/payments"), &["-d", "x"], "403")?;
        expect(reports, &url("/healthy"), &[], "200")?;
        expect(reports, &url("/healthy/../api/v1/payments"), &["-d", "x"], "403")?;
        expect(reports, &url("/healthy%2f..%2fapi"), &[], "400")?;
        soon(frontend, &url("/api/v1/payments"), &["-d", "x"], "200")?;
        expect(frontend, &url("/other"), &[], "403")?;
        let denied = ["--http-path", "^/api/v1/payments$", "--via", "plaintext"];
        let record = recorded(mesh, &denied, "reports", "DROPPED")?;
        ensure!(record["reason"] == "policy_no_match", "{record}");
        ensure!(record["source"]["knownBy"] == "address", "{record}");
        let healthy = ["--http-path", "^/healthy$", "--via", "plaintext"];
        let record = recorded(mesh, &healthy, "reports", "FORWARDED")?;
        ensure!(record["http"]["method"] == "GET", "{record}");
        // The application sees the client's own address.
        let shown = reports.exec(&["curl", "-s", &url("/healthy")])?;
        let shown: Value = serde_json::from_str(shown.stdout.trim()).context(shown.stdout)?;
        let peer = shown["peer"].as_str().unwrap_or_default().to_owned();
        ensure!(peer.contains(&reports.ip().to_string()), "{shown}");
        // Without the policy nothing is steered any more.
        lab.cluster().delete(&ObjectKey::new("AuthorizationPolicy", "shop", "payments"))?;
        soon(reports, &url("/api/v1/payments"), &["-d", "x"], "200")
    })
}
