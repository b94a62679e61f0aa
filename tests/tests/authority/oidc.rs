//! What the authority serves to everybody over HTTPS: OIDC discovery and its bundle.

use std::{
    io::Write,
    net::TcpListener,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::Duration,
};

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use signet::{
    proto::authority::{FetchJwtsvidRequest, authority_client::AuthorityClient},
    spiffe::{JwtClaims, JwtSigner, JwtSvid, SpiffeBundle, SpiffeId},
};

use crate::client::{Cluster, channel};

/// An authority with discovery, its issuer and its roots.
struct Web {
    cluster: Cluster,
    issuer: String,
    base: String,
    roots: PathBuf,
}

impl Web {
    fn start(further: &[&str]) -> Result<Self> {
        // Free a moment ago; the issuer must be known before the authority starts.
        let port = TcpListener::bind("127.0.0.1:0")?.local_addr()?.port();
        let (listen, base) = (format!("127.0.0.1:{port}"), format!("https://localhost:{port}"));
        let issuer = format!("{base}/clusters/a");
        let mut flags = vec!["--web-listen", &listen, "--oidc-issuer", &issuer];
        flags.extend(further);
        let cluster = Cluster::start(&flags)?;
        let roots = cluster.api.directory().join("authority.pem");
        Ok(Self { cluster, issuer, base, roots })
    }

    /// A JWT-SVID of `shop/web` for one audience.
    async fn token(&self, audience: &str) -> Result<String> {
        let channel = channel(&self.cluster.authority, &self.roots).await?;
        let mut request = tonic::Request::new(FetchJwtsvidRequest {
            spiffe_id: "spiffe://cluster.local/ns/shop/sa/web".into(),
            audience: vec![audience.into()],
            validity_duration: 120,
        });
        let bearer = format!("Bearer {}", self.cluster.token("node-1")?);
        request.metadata_mut().insert("authorization", bearer.parse()?);
        Ok(AuthorityClient::new(channel).fetch_jwtsvid(request).await?.into_inner().token)
    }
}

/// Status and body, by curl, under these roots.
fn get(url: &str, roots: &Path) -> Result<(String, String)> {
    let output = Command::new("curl")
        .args(["--silent", "--show-error", "--max-time", "10", "--write-out", "\n%{http_code}"])
        .arg("--cacert")
        .arg(roots)
        .arg(url)
        .output()
        .context("curl")?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let (body, status) = text.rsplit_once('\n').context("no status")?;
    Ok((status.into(), body.into()))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn discovery_and_bundle_are_there_for_everybody() -> Result<()> {
    let web = Web::start(&[])?;
    let (status, body) =
        get(&format!("{}/.well-known/openid-configuration", web.issuer), &web.roots)?;
    let document: Value = serde_json::from_str(&body)?;
    ensure!(status == "200" && document["issuer"] == *web.issuer, "{status} {document}");
    let (_, body) = get(document["jwks_uri"].as_str().context("jwks_uri")?, &web.roots)?;
    let keys: Value = serde_json::from_str(&body)?;
    let key = &keys["keys"][0];
    ensure!(
        key["use"] == "sig"
            && key["alg"] == "ES256"
            && key["kty"] == "EC"
            && key.get("d").is_none(),
        "{keys}"
    );
    let (_, body) = get(&format!("{}/bundle", web.base), &web.roots)?;
    let bundle = SpiffeBundle::decode(body.as_bytes())?;
    ensure!(bundle.sequence == Some(1) && bundle.refresh_hint == Some(Duration::from_secs(300)));
    let token = web.token("vault").await?;
    let keys = std::sync::Arc::new(bundle.jwt);
    let now = jiff::Timestamp::now();
    let svid = JwtSvid::validate(&token, "vault", |_| Some(keys), now)?;
    ensure!(svid.claims["iss"] == *web.issuer, "{:?}", svid.claims);
    ensure!(get(&format!("{}/keys", web.base), &web.roots)?.0 == "404", "only below the issuer");

    // A certificate of one's own, and the control: the authority's roots do not verify it.
    let key = rcgen::KeyPair::generate()?;
    let own = rcgen::CertificateParams::new(vec!["localhost".to_owned()])?.self_signed(&key)?;
    let dir = tempfile::tempdir()?;
    let (certificate, private) = (dir.path().join("cert.pem"), dir.path().join("key.pem"));
    std::fs::write(&certificate, own.pem())?;
    std::fs::write(&private, key.serialize_pem())?;
    let (c, k) = (certificate.display().to_string(), private.display().to_string());
    let web = Web::start(&["--web-cert-file", &c, "--web-key-file", &k])?;
    ensure!(get(&format!("{}/bundle", web.base), &certificate)?.0 == "200");
    ensure!(get(&format!("{}/bundle", web.base), &web.roots).is_err());
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs PyJWT: run by `cargo xtask test`, after `cargo xtask setup`"]
async fn a_relying_party_verifies_a_token_by_discovery() -> Result<()> {
    let python = std::env::var_os("SIGNET_SPIFFE_PYTHON").context("SIGNET_SPIFFE_PYTHON")?;
    let web = Web::start(&[])?;
    let verify = |token: &str, audience: &str| -> Result<Value> {
        let mut child = Command::new(&python)
            .arg(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/authority/oidc_client.py"))
            .args([web.issuer.as_str(), &web.roots.display().to_string(), audience])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()?;
        child.stdin.take().context("stdin")?.write_all(token.as_bytes())?;
        let output = child.wait_with_output()?;
        ensure!(output.status.success(), "{}", output.status);
        Ok(serde_json::from_slice(&output.stdout)?)
    };
    let token = web.token("sts.example").await?;
    let answer = verify(&token, "sts.example")?;
    ensure!(answer["claims"]["sub"] == "spiffe://cluster.local/ns/shop/sa/web", "{answer}");
    let answer = verify(&token, "other.example")?;
    ensure!(answer["refused"] == "InvalidAudienceError", "{answer}");
    // Somebody else's key is not among those that are published.
    let now = jiff::Timestamp::now();
    let forged = JwtSigner::generate()?.sign(&JwtClaims {
        id: SpiffeId::parse("spiffe://cluster.local/ns/shop/sa/web")?,
        audiences: vec!["sts.example".into()],
        issued_at: now,
        expires_at: now + jiff::SignedDuration::from_mins(5),
        issuer: Some(web.issuer.clone()),
    })?;
    let answer = verify(&forged, "sts.example")?;
    ensure!(answer["refused"] == "PyJWKClientError", "{answer}");
    Ok(())
}
