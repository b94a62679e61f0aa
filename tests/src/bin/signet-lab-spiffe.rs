//! A workload of the lab that uses SPIFFE libraries which others wrote: the crates `spiffe` and
//! `spiffe-rustls` against the Workload API that `SPIFFE_ENDPOINT_SOCKET` names.
//!
//! Every event is a JSON line. It ends when its standard input closes.

#![forbid(unsafe_code)]

use std::{collections::BTreeSet, net::SocketAddr, pin::pin, sync::Arc, time::Duration};

use anyhow::{Context, Result, bail};
use clap::{Parser, Subcommand};
use rustls::pki_types::ServerName;
use serde_json::{Value, json};
use spiffe::{WorkloadApiClient, X509Source, X509Svid};
use spiffe_rustls::{authorizer, mtls_client, mtls_server};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    time,
};
use tokio_rustls::{TlsAcceptor, TlsConnector};

#[derive(Parser)]
struct Arguments {
    #[command(subcommand)]
    role: Role,
}

#[derive(Subcommand)]
enum Role {
    /// Follows the workload's X509-SVIDs and tells each.
    Watch,
    /// Fetches bundles, a JWT-SVID for an audience, and has it validated.
    Jwt {
        #[arg(long)]
        audience: String,
    },
    /// Answers `pong` over mutual TLS to this peer.
    Server {
        #[arg(long)]
        listen: SocketAddr,
        #[arg(long)]
        peer: String,
    },
    /// Says `ping` over mutual TLS to this peer, again and again, on a new connection each time.
    Client {
        #[arg(long)]
        to: SocketAddr,
        #[arg(long)]
        peer: String,
    },
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<()> {
    match Arguments::parse().role {
        Role::Watch => until_told(watch()).await,
        Role::Jwt { audience } => jwt(&audience).await,
        Role::Server { listen, peer } => until_told(serve(listen, &peer)).await,
        Role::Client { to, peer } => call(to, &peer).await,
    }
}

fn say(value: &Value) {
    println!("{value}");
}

/// Done when standard input closes.
async fn told() {
    let read = || std::io::stdin().lines().count();
    let _ = tokio::task::spawn_blocking(read).await;
}

async fn until_told(work: impl Future<Output = Result<()>>) -> Result<()> {
    tokio::select! {
        result = work => result,
        () = told() => Ok(()),
    }
}

/// An SVID for a JSON line: the certificate tells it apart.
fn shown(svid: &X509Svid) -> Value {
    let leaf: String = svid.leaf().as_bytes().iter().map(|b| format!("{b:02x}")).collect();
    json!({"event": "svid", "id": svid.spiffe_id().to_string(), "leaf": leaf})
}

async fn watch() -> Result<()> {
    let source = X509Source::new().await.context("X509Source")?;
    say(&shown(&*source.svid()?));
    let mut updates = source.updated();
    loop {
        updates.changed().await?;
        say(&shown(&*source.svid()?));
    }
}

async fn jwt(audience: &str) -> Result<()> {
    let client = WorkloadApiClient::connect_env().await?;
    let bundles = client.fetch_x509_bundles().await?;
    let jwt_bundles = client.fetch_jwt_bundles().await?;
    let svid = client.fetch_jwt_svid([audience], None).await?;
    let valid = client.validate_jwt_token(audience, svid.token()).await?;
    if client.validate_jwt_token("another audience", svid.token()).await.is_ok() {
        bail!("a token for {audience} is valid for another audience");
    }
    say(&json!({
        "event": "jwt",
        "id": valid.spiffe_id().to_string(),
        "x509Domains": bundles.iter().count(),
        "jwtDomains": jwt_bundles.iter().count(),
    }));
    Ok(())
}

async fn serve(listen: SocketAddr, peer: &str) -> Result<()> {
    let source = X509Source::new().await.context("X509Source")?;
    let config = mtls_server(source.clone()).authorize(authorizer::exact([peer])?).build()?;
    let acceptor = TlsAcceptor::from(Arc::new(config));
    let listener = TcpListener::bind(listen).await?;
    say(&json!({"event": "listening"}));
    loop {
        let (tcp, _) = listener.accept().await?;
        let acceptor = acceptor.clone();
        tokio::spawn(async move {
            if let Err(error) = answer(&acceptor, tcp).await {
                say(&json!({"event": "failed", "why": format!("{error:#}")}));
            }
        });
    }
}

async fn answer(acceptor: &TlsAcceptor, tcp: TcpStream) -> Result<()> {
    let mut tls = acceptor.accept(tcp).await.context("handshake")?;
    let mut ping = [0; 4];
    tls.read_exact(&mut ping).await.context("read")?;
    tls.write_all(b"pong").await.context("write")?;
    tls.shutdown().await.context("shutdown")
}

async fn call(to: SocketAddr, peer: &str) -> Result<()> {
    let source = X509Source::new().await.context("X509Source")?;
    let config = mtls_client(source.clone()).authorize(authorizer::exact([peer])?).build()?;
    let connector = TlsConnector::from(Arc::new(config));
    let (mut exchanges, mut certificates, mut failures) = (0u64, BTreeSet::new(), Vec::new());
    let mut told = pin!(told());
    // The last exchange is brought to its end: the server would see one that is cut as a failure.
    loop {
        match exchange(&connector, to).await {
            Ok(leaf) => {
                exchanges += 1;
                certificates.insert(leaf);
            }
            Err(error) => failures.push(format!("{error:#}")),
        }
        if exchanges + failures.len() as u64 == 1 {
            say(&json!({"event": "first", "failures": failures}));
        }
        tokio::select! {
            () = time::sleep(Duration::from_millis(50)) => {}
            () = &mut told => break,
        }
    }
    say(&json!({
        "event": "report",
        "exchanges": exchanges,
        "peerCertificates": certificates.len(),
        "failures": failures,
    }));
    Ok(())
}

/// One ping; answers the peer's certificate.
async fn exchange(connector: &TlsConnector, to: SocketAddr) -> Result<Vec<u8>> {
    let tcp = time::timeout(Duration::from_secs(10), TcpStream::connect(to)).await??;
    // Not what is verified: the peer is known by its SPIFFE ID.
    let name = ServerName::try_from("workload.invalid").context("a name")?;
    let mut tls = connector.connect(name, tcp).await.context("handshake")?;
    tls.write_all(b"ping").await.context("write")?;
    let mut pong = Vec::new();
    tls.read_to_end(&mut pong).await.context("read")?;
    if pong != b"pong" {
        bail!("answered {pong:?}");
    }
    let (_, session) = tls.get_ref();
    let leaf = session.peer_certificates().and_then(|c| c.first()).context("no certificate")?;
    Ok(leaf.to_vec())
}
