//! Who gets which certificate, who does not, and what is written about it.

use std::{collections::BTreeMap, fs, process::Command, time::Duration};

use anyhow::{Result, ensure};
use serde_json::Value;
use signet_lab::{authority::node_token, eventually};
use tonic::Code;

use crate::client::{Call, Cluster, by_openssl::Request, channel};

/// The one audit line that was written since there were `before`, within a moment.
fn audited(cluster: &Cluster, before: usize) -> Result<Value> {
    eventually("an audit line", Duration::from_secs(5), || {
        Ok(cluster.authority.audit().get(before).cloned())
    })
}

fn openssl(arguments: &[&str]) -> String {
    let output = Command::new("openssl").args(arguments).output().expect("openssl runs");
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    format!("{text}{}", String::from_utf8_lossy(&output.stderr))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_right_caller_gets_a_chain_that_openssl_verifies() -> Result<()> {
    let cluster = Cluster::start(&[])?;
    let roots = cluster.api.directory().join("authority.pem");
    let channel = channel(&cluster.authority, &roots).await?;
    let call = Call { seconds: 600, ..Call::good(&cluster.token("node-1")?) };
    let chain = call.make(&channel).await?;
    ensure!(chain.len() == 3, "leaf, intermediate, roots: {}", chain.len());
    ensure!(chain[2] == fs::read_to_string(&roots)?, "the roots come last");

    let dir = cluster.api.directory();
    let file = |name: &str, text: &str| {
        let path = dir.join(name);
        fs::write(&path, text).map(|()| path.display().to_string())
    };
    let (leaf, intermediate) = (file("leaf", &chain[0])?, file("intermediate", &chain[1])?);
    let root = file("root", &chain[2])?;
    let verified =
        openssl(&["verify", "-x509_strict", "-CAfile", &root, "-untrusted", &intermediate, &leaf]);
    ensure!(verified.contains("leaf: OK"), "{verified}");
    // The control: without the intermediate, or under another root, it does not verify.
    let alone = openssl(&["verify", "-CAfile", &root, &leaf]);
    ensure!(alone.contains("unable to get local issuer"), "{alone}");

    let text = openssl(&["x509", "-noout", "-text", "-in", &leaf]);
    for needed in [
        "X509v3 Subject Alternative Name: critical",
        "URI:spiffe://cluster.local/ns/shop/sa/web",
        "CA:FALSE",
        "X509v3 Key Usage: critical",
        "Digital Signature",
        "TLS Web Server Authentication, TLS Web Client Authentication",
        "Subject: \n",
    ] {
        ensure!(text.contains(needed), "no {needed:?} in {text}");
    }
    ensure!(!text.contains("Certificate Sign") && text.matches("URI:").count() == 1, "{text}");
    let text = openssl(&["x509", "-noout", "-text", "-in", &intermediate]);
    for needed in ["CA:TRUE, pathlen:0", "Certificate Sign", "URI:spiffe://cluster.local\n"] {
        ensure!(text.contains(needed), "no {needed:?} in {text}");
    }
    let line = audited(&cluster, 0)?;
    ensure!(
        line["outcome"] == "issued"
            && line["node"] == "node-1"
            && line["identity"] == "spiffe://cluster.local/ns/shop/sa/web",
        "{line}"
    );
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn everybody_else_is_refused_with_the_reason() -> Result<()> {
    let cluster = Cluster::start(&["--max-ttl", "2h"])?;
    let api = &cluster.api;
    api.pod_with("shop", "done-1", "done", "node-1", "Succeeded", &[])?;
    api.pod_with("shop", "failed-1", "failed", "node-1", "Failed", &[])?;
    let mirror = [("kubernetes.io/config.mirror", "x")];
    api.pod_with("shop", "static-1", "static", "node-1", "Running", &mirror)?;
    api.pod_with("shop", "new-1", "new", "node-1", "Pending", &[])?;
    let channel = channel(&cluster.authority, &api.directory().join("authority.pem")).await?;
    let good = Call::good(&cluster.token("node-1")?);
    let long = Duration::from_secs(3600);
    let agents = |audience: &str, pod: Option<&str>| {
        api.token("signet-system", "signet-agent", audience, pod, long)
    };
    let with_token = |token: String| Call { token: Some(token), ..good.clone() };
    let of = |account: &str| {
        let identity = format!("spiffe://cluster.local/ns/shop/sa/{account}");
        let csr = Request::new("ec:P-256").san(&format!("URI:{identity}")).pem();
        Call { identity: Some(identity), csr, ..good.clone() }
    };
    let named = |identity: &str| Call {
        identity: Some(identity.into()),
        csr: Request::new("ec:P-256").pem(),
        ..good.clone()
    };
    let csr = |request: Request| Call { csr: request.pem(), ..good.clone() };
    let own = format!("URI:{}", good.identity.clone().unwrap_or_default());
    let expired = api.token(
        "signet-system",
        "signet-agent",
        "signet-authority",
        Some("agent-node-1"),
        Duration::ZERO,
    )?;
    let (unknown, denied, invalid) =
        (Code::Unauthenticated, Code::PermissionDenied, Code::InvalidArgument);
    let cases = [
        // Callers.
        ("no token", Call { token: None, ..good.clone() }, unknown, "unauthenticated"),
        ("garbage", with_token("garbage".into()), unknown, "unauthenticated"),
        (
            "wrong audience",
            with_token(agents("vault", Some("agent-node-1"))?),
            unknown,
            "unauthenticated",
        ),
        (
            "not bound to a pod",
            with_token(agents("signet-authority", None)?),
            unknown,
            "unauthenticated",
        ),
        ("expired", with_token(expired), unknown, "unauthenticated"),
        (
            "a workload's token",
            with_token(api.token("shop", "web", "signet-authority", Some("web-1"), long)?),
            unknown,
            "unauthenticated",
        ),
        ("another node's token", with_token(cluster.token("node-2")?), denied, "no_pod_on_node"),
        // Identities.
        ("an account without a pod", of("nobody"), denied, "no_pod_on_node"),
        ("an account elsewhere", of("db"), denied, "no_pod_on_node"),
        ("a pod that succeeded", of("done"), denied, "pod_finished"),
        ("a pod that failed", of("failed"), denied, "pod_finished"),
        ("a mirror pod", of("static"), denied, "mirror_pod"),
        (
            "another trust domain",
            named("spiffe://other/ns/shop/sa/web"),
            denied,
            "foreign_trust_domain",
        ),
        ("another path", named("spiffe://cluster.local/admin"), denied, "not_a_service_account"),
        ("no identity", Call { identity: None, ..good.clone() }, invalid, "request"),
        ("no SPIFFE ID", named("https://cluster.local/ns/shop/sa/web"), invalid, "not_a_spiffe_id"),
        // Requests.
        (
            "an extra SAN",
            csr(Request::new("ec:P-256").san(&format!("{own},DNS:web.shop"))),
            invalid,
            "csr",
        ),
        (
            "another SAN",
            csr(Request::new("ec:P-256").san("URI:spiffe://cluster.local/ns/shop/sa/db")),
            invalid,
            "csr",
        ),
        (
            "a CA",
            csr(Request::new("ec:P-256").san(&own).extension("basicConstraints=CA:TRUE")),
            invalid,
            "csr",
        ),
        ("RSA-1024", csr(Request::new("rsa:1024").san(&own)), invalid, "csr"),
        ("1 MB", Call { csr: "A".repeat(1_000_000), ..good.clone() }, invalid, "csr"),
        ("garbage", Call { csr: "garbage".into(), ..good.clone() }, invalid, "csr"),
        ("too long a validity", Call { seconds: 7201, ..good.clone() }, invalid, "ttl"),
        ("a negative validity", Call { seconds: -1, ..good.clone() }, invalid, "ttl"),
    ];
    for (lines, (what, call, code, reason)) in cases.into_iter().enumerate() {
        let status = match call.make(&channel).await {
            Ok(_) => anyhow::bail!("{what}: issued"),
            Err(status) => status,
        };
        ensure!(status.code() == code, "{what}: {status}");
        let line = audited(&cluster, lines)?;
        ensure!(
            line["outcome"] == "refused" && line["reason"] == reason && line["level"] == "WARN",
            "{what}: {line}"
        );
        if code == denied {
            ensure!(!line["node"].is_null() && !line["identity"].is_null(), "{what}: {line}");
        }
    }
    // The controls: after all of this the right ones are served.
    good.make(&channel).await?;
    of("new").make(&channel).await?;
    csr(Request::new("rsa:2048").san(&own)).make(&channel).await?;
    csr(Request::new("ec:P-384")).make(&channel).await?;
    with_token(cluster.token("node-2")?).make(&channel).await.unwrap_err();
    metrics_say_what_the_audit_log_says(&cluster)
}

/// Counted is what was written, line by line, and nothing of what callers sent is a label.
fn metrics_say_what_the_audit_log_says(cluster: &Cluster) -> Result<()> {
    let mut written: BTreeMap<[String; 3], f64> = BTreeMap::new();
    for line in cluster.authority.audit() {
        let text = |field: &str| line[field].as_str().unwrap_or_default().to_owned();
        let method = text("method").rsplit('/').next().unwrap_or_default().to_owned();
        let reason = if text("outcome") == "issued" { "authorized".into() } else { text("reason") };
        *written.entry([text("outcome"), method, reason]).or_default() += 1.0;
    }
    let metrics = cluster.authority.metrics()?;
    let counted: BTreeMap<[String; 3], f64> = metrics
        .of("authority_audit_events_total")
        .into_iter()
        .map(|(labels, count)| (["outcome", "method", "reason"].map(|l| labels[l].clone()), count))
        .collect();
    ensure!(counted == written && counted.len() > 8, "{counted:?} is not {written:?}");
    let requests = |labels: &[(&str, &str)]| metrics.sum("authority_requests_total", labels);
    let by_code = |code: &str| requests(&[("method", "CreateCertificate"), ("code", code)]);
    ensure!(
        by_code("Ok") == 4.0
            && by_code("PermissionDenied") == 9.0
            && by_code("InvalidArgument") == 10.0
            && by_code("Unauthenticated") == 6.0
            && requests(&[("caller", "unknown")]) == 6.0
            && requests(&[]) == 29.0,
        "{:?}",
        metrics.of("authority_requests_total")
    );
    let took = metrics.sum("authority_request_duration_seconds_count", &[]);
    ensure!(took == requests(&[("caller", "agent")]), "{took}");
    let shaken = |result: &str| {
        metrics.sum("authority_handshakes_total", &[("listener", "grpc"), ("result", result)])
    };
    ensure!(shaken("ok") == 1.0 && shaken("failed") == 0.0);
    ensure!(metrics.sum("authority_rotation_phase", &[("phase", "none")]) == 1.0);
    ensure!(metrics.sum("authority_roots", &[]) == 1.0);
    let missing = metrics.undocumented(include_str!("../../../docs/metrics.md"));
    ensure!(missing.is_empty(), "not in docs/metrics.md: {missing:?}");
    for told in ["node-1", "shop", "web", "spiffe:", "127.0.0.1"] {
        ensure!(metrics.tellers(told).is_empty(), "{told} is in the metrics");
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn rights_come_and_go_with_the_pod() -> Result<()> {
    let cluster = Cluster::start(&[])?;
    let api = &cluster.api;
    let channel = channel(&cluster.authority, &api.directory().join("authority.pem")).await?;
    let identity = "spiffe://cluster.local/ns/shop/sa/late";
    let call = Call {
        identity: Some(identity.into()),
        csr: Request::new("ec:P-256").pem(),
        ..Call::good(&cluster.token("node-1")?)
    };
    ensure!(call.make(&channel).await.unwrap_err().code() == Code::PermissionDenied);
    // A miss is looked up: the pod counts at once, not when some list is renewed.
    api.pod("shop", "late-1", "late", "node-1")?;
    call.make(&channel).await?;
    // And a yes holds for seconds only.
    api.delete("pods", "shop", "late-1")?;
    let gone = eventually("the right is gone", Duration::from_secs(10), || {
        let again = tokio::task::block_in_place(|| {
            tokio::runtime::Handle::current().block_on(call.make(&channel))
        });
        Ok(again.err())
    })?;
    ensure!(gone.code() == Code::PermissionDenied, "{gone}");
    // An agent's pod that is gone takes its token with it.
    let token = cluster.token("node-1")?;
    Call::good(&token).make(&channel).await?;
    api.delete("pods", "signet-system", "agent-node-1")?;
    let gone = eventually("the token is worth nothing", Duration::from_secs(20), || {
        let again = tokio::task::block_in_place(|| {
            tokio::runtime::Handle::current().block_on(Call::good(&token).make(&channel))
        });
        Ok(again.err())
    })?;
    ensure!(gone.code() == Code::Unauthenticated, "{gone}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_that_asks_too_often_waits_and_others_do_not() -> Result<()> {
    let cluster = Cluster::start(&["--request-burst", "5", "--requests-per-second", "1"])?;
    let channel =
        channel(&cluster.authority, &cluster.api.directory().join("authority.pem")).await?;
    let call = Call::good(&cluster.token("node-1")?);
    let mut limited = None;
    for _ in 0..8 {
        if let Err(status) = call.make(&channel).await {
            limited = Some(status);
            break;
        }
    }
    let status = limited.ok_or_else(|| anyhow::anyhow!("never limited"))?;
    ensure!(status.code() == Code::ResourceExhausted, "{status}");
    let limited = [("outcome", "refused"), ("reason", "rate")];
    let counted = cluster.authority.metrics()?.sum("authority_audit_events_total", &limited);
    ensure!(counted == 1.0, "{counted}");
    let identity = "spiffe://cluster.local/ns/shop/sa/db";
    let other = Call {
        identity: Some(identity.into()),
        csr: Request::new("ec:P-256").pem(),
        ..Call::good(&cluster.token("node-2")?)
    };
    other.make(&channel).await?;
    tokio::time::sleep(Duration::from_secs(2)).await;
    call.make(&channel).await?;
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_api_server_that_is_down_is_no_refusal() -> Result<()> {
    let cluster = Cluster::start(&[])?;
    let channel =
        channel(&cluster.authority, &cluster.api.directory().join("authority.pem")).await?;
    let call = Call::good(&cluster.token("node-1")?);
    cluster.api.set_down(true);
    let status = call.make(&channel).await.unwrap_err();
    ensure!(status.code() == Code::Unavailable, "{status}");
    cluster.api.set_down(false);
    call.make(&channel).await?;
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn standalone_by_token_files_and_manifests() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let path = |name: &str| dir.path().join(name);
    let text = |name: &str| path(name).display().to_string();
    fs::create_dir(path("cluster"))?;
    let manifest = |phase: &str| {
        fs::write(
            path("cluster/shop.yaml"),
            format!(
                "apiVersion: v1\nkind: Namespace\nmetadata: {{name: shop}}\n---\n\
                 apiVersion: v1\nkind: Pod\nmetadata: {{name: web, namespace: shop, uid: u1}}\n\
                 spec: {{serviceAccountName: web, nodeName: node-1}}\nstatus: {{phase: {phase}}}\n"
            ),
        )
    };
    manifest("Running")?;
    let (one, two) =
        (node_token(&path("tokens"), "node-1")?, node_token(&path("tokens"), "node-2")?);
    let flags: Vec<String> = [
        ("--store-dir", text("store")),
        ("--cluster-dir", text("cluster")),
        ("--node-token-dir", text("tokens")),
        ("--bundle-file", text("bundle.pem")),
        ("--names", "localhost".into()),
    ]
    .into_iter()
    .flat_map(|(flag, value)| [flag.to_owned(), value])
    .collect();
    let authority = signet_lab::authority::Authority::start("authority", dir.path(), None, &flags)?;
    let channel = channel(&authority, &path("bundle.pem")).await?;
    Call::good(&one).make(&channel).await?;
    let status = Call::good(&two).make(&channel).await.unwrap_err();
    ensure!(status.code() == Code::PermissionDenied, "{status}");
    let status = Call::good("not-a-token").make(&channel).await.unwrap_err();
    ensure!(status.code() == Code::Unauthenticated, "{status}");
    manifest("Succeeded")?;
    let gone = eventually("the right is gone", Duration::from_secs(10), || {
        let again = tokio::task::block_in_place(|| {
            tokio::runtime::Handle::current().block_on(Call::good(&one).make(&channel))
        });
        Ok(again.err())
    })?;
    ensure!(gone.code() == Code::PermissionDenied && gone.message().contains("finished"), "{gone}");
    ensure!(authority.stop()? == Some(0), "a stop is no failure");
    Ok(())
}
