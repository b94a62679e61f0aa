//! SPIFFE libraries that others wrote, against the Workload API: the Rust crates `spiffe` and
//! `spiffe-rustls`, the Python packages `spiffe` and `spiffe-tls`. Versions are pinned, here in
//! the lock file, there by `cargo xtask setup`.

use std::{net::SocketAddr, path::PathBuf, thread, time::Duration};

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;
use signet_lab::{
    Lab, LabOptions, eventually,
    pod::Pod,
    process::{Running, spiffe_binary},
};

use crate::mesh::{Mesh, TIMEOUT, with_logs};

const PORT: u16 = 8443;
/// Several rotations at a TTL of 10 s, which is renewed at about half of it.
const LONG_ENOUGH: Duration = Duration::from_secs(15);

/// Starts the Rust workload in a pod.
pub fn start_rust(lab: &Lab, pod: &Pod, arguments: &[&str]) -> Result<Running> {
    let program = spiffe_binary()?.display().to_string();
    start(lab, pod, "rust", &[&[program.as_str()], arguments].concat())
}

/// Starts the Python workload in a pod.
fn start_python(lab: &Lab, pod: &Pod, arguments: &[&str]) -> Result<Running> {
    let python = python()?.display().to_string();
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/e2e/spiffe_client.py");
    start(lab, pod, "python", &[&[python.as_str(), script], arguments].concat())
}

fn start(lab: &Lab, pod: &Pod, language: &str, argv: &[&str]) -> Result<Running> {
    let socket = lab.agent(&pod.node().name)?.workload_socket();
    let endpoint = format!("SPIFFE_ENDPOINT_SOCKET=unix://{}", socket.display());
    let name = format!("{}-{}-{language}", pod.namespace(), pod.name());
    pod.place().start_program(&name, &[&["env", endpoint.as_str()], argv].concat())
}

/// The interpreter that has the packages.
fn python() -> Result<PathBuf> {
    let path = std::env::var_os("SIGNET_SPIFFE_PYTHON").map(PathBuf::from).context(
        "SIGNET_SPIFFE_PYTHON is not set: run this by `cargo xtask test`, after `cargo xtask \
         setup` has installed the Python packages",
    )?;
    ensure!(path.is_file(), "SIGNET_SPIFFE_PYTHON: {} is not there", path.display());
    Ok(path)
}

/// Waits until a follower has seen so many SVIDs.
pub fn followed(follower: &Running, svids: usize) -> Result<()> {
    eventually(&format!("{svids} SVIDs"), TIMEOUT, || {
        let seen = follower.printed().iter().filter(|v| v["event"] == "svid").count();
        if seen >= svids {
            return Ok(Some(()));
        }
        bail!("{seen} so far: {:?}", follower.printed())
    })
}

fn mesh() -> Result<Mesh> {
    let agent_flags = vec!["--svid-ttl".into(), "10s".into()];
    Mesh::with(LabOptions { agent_flags, ..Default::default() }, Some("strict"))
}

fn id(account: &str) -> String {
    format!("spiffe://cluster.local/ns/shop/sa/{account}")
}

type Start = fn(&Lab, &Pod, &[&str]) -> Result<Running>;

/// A client of one language calls a server of another across rotations: nothing fails. A client
/// of another identity is refused by the server, which wants the frontend only.
fn mutual_tls(server: (Start, &str), client: (Start, &str), intruder: Start) -> Result<()> {
    let mesh = mesh()?;
    with_logs(&mesh, |mesh| {
        let Mesh { lab, frontend, payments, .. } = mesh;
        // The Python library speaks IPv4 only.
        let ip = payments.ips().into_iter().find(|ip| ip.is_ipv4()).context("no IPv4")?;
        let to = SocketAddr::from((ip, PORT)).to_string();
        let own = format!("0.0.0.0:{PORT}");
        let (peer_of_server, peer_of_client) = (id("frontend"), id("payments"));
        let arguments =
            |language: &str, role: &'static str, address: &str, peer: &str| match language {
                "rust" if role == "server" => {
                    vec![
                        role.to_owned(),
                        "--listen".into(),
                        address.into(),
                        "--peer".into(),
                        peer.into(),
                    ]
                }
                "rust" => vec![
                    role.to_owned(),
                    "--to".into(),
                    address.into(),
                    "--peer".into(),
                    peer.into(),
                ],
                _ => vec![role.to_owned(), address.into(), peer.into()],
            };
        let run = |(start, language): (Start, &str), pod: &Pod, role, address: &str, peer: &str| {
            let owned = arguments(language, role, address, peer);
            start(lab, pod, &owned.iter().map(String::as_str).collect::<Vec<_>>())
        };
        let serving = run(server, payments, "server", &own, &peer_of_server)?;
        serving.wait_event("listening", TIMEOUT)?;
        let mut calling = run(client, frontend, "client", &to, &peer_of_client)?;
        calling.wait_event("first", TIMEOUT)?;
        thread::sleep(LONG_ENOUGH);
        calling.finish();
        let report = calling.wait_event("report", TIMEOUT)?;
        println!("{report}");
        let count = |name: &str| report[name].as_u64().unwrap_or(0);
        ensure!(report["failures"].as_array().is_some_and(Vec::is_empty), "{report}");
        ensure!(count("exchanges") >= 20, "{report}");
        ensure!(count("peerCertificates") >= 2, "no rotation was seen: {report}");
        let failed: Vec<Value> =
            serving.printed().into_iter().filter(|v| v["event"] == "failed").collect();
        ensure!(failed.is_empty(), "the server saw failures: {failed:?}");

        // Somebody else: the same server, the same bundle, another identity.
        let language =
            if std::ptr::fn_addr_eq(intruder, start_python as Start) { "python" } else { "rust" };
        let mut other = run((intruder, language), &mesh.intruder, "client", &to, &peer_of_client)?;
        other.wait_event("first", TIMEOUT)?;
        other.finish();
        let report = other.wait_event("report", TIMEOUT)?;
        ensure!(count_of(&report, "exchanges") == 0, "{report}");
        ensure!(report["failures"].as_array().is_some_and(|f| !f.is_empty()), "{report}");
        Ok(())
    })
}

fn count_of(report: &Value, name: &str) -> u64 {
    report[name].as_u64().unwrap_or(u64::MAX)
}

#[test]
fn rust_workloads_do_mutual_tls_across_rotations() -> Result<()> {
    mutual_tls((start_rust, "rust"), (start_rust, "rust"), start_rust)
}

#[test]
#[ignore = "needs the Python packages spiffe and spiffe-tls: cargo xtask setup installs them"]
fn python_workloads_do_mutual_tls_across_rotations() -> Result<()> {
    mutual_tls((start_python, "python"), (start_python, "python"), start_python)
}

#[test]
#[ignore = "needs the Python packages spiffe and spiffe-tls: cargo xtask setup installs them"]
fn a_python_client_and_a_rust_server() -> Result<()> {
    mutual_tls((start_rust, "rust"), (start_python, "python"), start_rust)
}

#[test]
#[ignore = "needs the Python packages spiffe and spiffe-tls: cargo xtask setup installs them"]
fn a_rust_client_and_a_python_server() -> Result<()> {
    mutual_tls((start_python, "python"), (start_rust, "rust"), start_python)
}

#[test]
#[ignore = "needs the Python packages spiffe and spiffe-tls: cargo xtask setup installs them"]
fn python_fetches_and_validates_every_kind_of_svid() -> Result<()> {
    let mesh = mesh()?;
    with_logs(&mesh, |mesh| {
        let fetching = start_python(&mesh.lab, &mesh.frontend, &["fetch", "payments"])?;
        let fetched = fetching.wait_event("fetched", TIMEOUT)?;
        ensure!(fetched["id"] == id("frontend") && fetched["bundles"] == 1, "{fetched}");
        ensure!(fetched["jwt"] == id("frontend"), "{fetched}");
        ensure!(fetched["jwtSource"] == id("frontend"), "{fetched}");
        Ok(())
    })
}

#[test]
fn rust_fetches_and_validates_a_jwt_svid() -> Result<()> {
    let mesh = mesh()?;
    with_logs(&mesh, |mesh| {
        let fetching = start_rust(&mesh.lab, &mesh.frontend, &["jwt", "--audience", "payments"])?;
        let fetched = fetching.wait_event("jwt", TIMEOUT)?;
        ensure!(fetched["id"] == id("frontend"), "{fetched}");
        ensure!(fetched["x509Domains"] == 1 && fetched["jwtDomains"] == 1, "{fetched}");
        Ok(())
    })
}
