use std::{
    net::SocketAddr,
    sync::atomic::{AtomicUsize, Ordering},
};

use http::{HeaderMap, HeaderValue, header::AUTHORIZATION};
use jiff::Timestamp;
use rustls::{ServerConfig, crypto::aws_lc_rs};
use serde_json::json;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpListener,
};
use tokio_rustls::TlsAcceptor;

use super::*;
use crate::policy::end_user::{
    Invalid, authenticate,
    tests::{Issuer, claims, header, object, rule},
};

const SOON: Duration = Duration::from_secs(10);
/// Fast enough for a test; nothing below depends on how fast.
const FAST: Rhythm = Rhythm {
    refresh: Duration::from_secs(3600),
    retry: Duration::from_millis(20),
    least: Duration::from_millis(10),
};

/// A web server with documents by path, of a certificate for 127.0.0.1.
struct Server {
    at: SocketAddr,
    documents: Arc<Mutex<BTreeMap<String, String>>>,
    requests: Arc<AtomicUsize>,
    roots: tempfile::TempDir,
}

impl Server {
    async fn start() -> Self {
        let key = rcgen::KeyPair::generate().unwrap();
        let params = rcgen::CertificateParams::new(vec!["127.0.0.1".to_owned()]).unwrap();
        let certificate = params.self_signed(&key).unwrap();
        let roots = tempfile::tempdir().unwrap();
        std::fs::write(roots.path().join("web.pem"), certificate.pem()).unwrap();
        let config = ServerConfig::builder_with_provider(Arc::new(aws_lc_rs::default_provider()))
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_no_client_auth()
            .with_single_cert(
                vec![certificate.der().clone()],
                rustls::pki_types::PrivatePkcs8KeyDer::from(key.serialize_der()).into(),
            )
            .unwrap();
        let acceptor = TlsAcceptor::from(Arc::new(config));
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let at = listener.local_addr().unwrap();
        let documents: Arc<Mutex<BTreeMap<String, String>>> = Arc::default();
        let requests = Arc::new(AtomicUsize::new(0));
        let (served, count) = (documents.clone(), requests.clone());
        tokio::spawn(async move {
            loop {
                let (tcp, _) = listener.accept().await.unwrap();
                let (acceptor, served, count) = (acceptor.clone(), served.clone(), count.clone());
                tokio::spawn(async move {
                    let Ok(mut tls) = acceptor.accept(tcp).await else { return };
                    let mut request = vec![0; 4096];
                    let read = tls.read(&mut request).await.unwrap_or(0);
                    let head = String::from_utf8_lossy(&request[..read]).into_owned();
                    let path = head.split(' ').nth(1).unwrap_or_default();
                    count.fetch_add(1, Ordering::SeqCst);
                    let body = served.lock().unwrap().get(path).cloned();
                    let answer = match body {
                        Some(body) => format!(
                            "HTTP/1.1 200 OK\r\ncontent-length: {}\r\nconnection: \
                             close\r\n\r\n{body}",
                            body.len()
                        ),
                        None => "HTTP/1.1 503 Away\r\ncontent-length: 0\r\n\r\n".into(),
                    };
                    let _ = tls.write_all(answer.as_bytes()).await;
                    let _ = tls.shutdown().await;
                });
            }
        });
        Self { at, documents, requests, roots }
    }

    fn url(&self, path: &str) -> Arc<str> {
        format!("https://{}{path}", self.at).into()
    }

    fn says(&self, path: &str, body: Option<String>) {
        let mut documents = self.documents.lock().unwrap();
        match body {
            Some(body) => drop(documents.insert(path.into(), body)),
            None => drop(documents.remove(path)),
        }
    }

    fn follow(&self, places: &[Place]) -> (Arc<Issuers>, watch::Sender<BTreeSet<Place>>) {
        let issuers = Arc::new(Issuers::default());
        let (sender, wanted) = watch::channel(places.iter().cloned().collect());
        let roots = Some(self.roots.path().join("web.pem"));
        tokio::spawn(run(issuers.clone(), wanted, roots, FAST));
        (issuers, sender)
    }
}

async fn eventually(what: &str, holds: impl Fn() -> bool) {
    let waiting = async {
        while !holds() {
            sleep(Duration::from_millis(5)).await;
        }
    };
    if timeout(SOON, waiting).await.is_err() {
        panic!("never: {what}");
    }
}

/// What becomes of a request with a token that this issuer signed under this key ID.
fn judged(
    issuers: &Issuers,
    source: &KeySource,
    signer: &Issuer,
    kid: &str,
) -> Result<(), Invalid> {
    let mut header = header();
    header["kid"] = kid.into();
    let token = signer.token(&header, &claims(|_| {}));
    let value = HeaderValue::from_str(&format!("Bearer {token}")).unwrap();
    let headers = HeaderMap::from_iter([(AUTHORIZATION, value)]);
    let all = [object(vec![rule(source.clone())])];
    let now = Timestamp::from_second(1_800_000_000).unwrap();
    authenticate(&all, issuers, &headers, None, now).map(|valid| assert!(valid.is_some()))
}

#[tokio::test]
async fn keys_are_fetched_kept_while_the_server_is_away_and_fetched_again_for_an_unknown_key() {
    let server = Server::start().await;
    let (old, new) = (Issuer::new(), Issuer::new());
    let source = KeySource::Url(server.url("/jwks"));
    let place = Place::of(&source).unwrap();
    // Nobody asks before it is wanted.
    let (issuers, wanted) = server.follow(&[]);
    assert_eq!(judged(&issuers, &source, &old, "old"), Err(Invalid::NoKeys));
    assert_eq!(server.requests.load(Ordering::SeqCst), 0);
    // Wanted, and away: said, and tried again.
    wanted.send_replace(BTreeSet::from([place.clone()]));
    eventually("it is told", || {
        issuers.problems().iter().any(|(at, why)| *at == place && why.contains("answered 503"))
    })
    .await;
    assert_eq!(judged(&issuers, &source, &old, "old"), Err(Invalid::NoKeys));
    server.says("/jwks", Some(old.jwks("old")));
    eventually("the key is there", || judged(&issuers, &source, &old, "old") == Ok(())).await;
    assert!(issuers.problems().is_empty());
    assert_eq!(judged(&issuers, &source, &new, "old"), Err(Invalid::Signature));
    // What is known is kept, whatever the server does.
    server.says("/jwks", None);
    assert_eq!(judged(&issuers, &source, &new, "new"), Err(Invalid::UnknownKey));
    eventually("it was asked", || !issuers.problems().is_empty()).await;
    assert_eq!(judged(&issuers, &source, &old, "old"), Ok(()));
    server.says("/jwks", Some("{\"keys\": []}".into()));
    eventually("it says nothing of use", || {
        issuers.problems().iter().any(|(_, why)| why.contains("none of its keys"))
    })
    .await;
    assert_eq!(judged(&issuers, &source, &old, "old"), Ok(()));
    // The next key, within the hour.
    server.says("/jwks", Some(new.jwks("new")));
    eventually("the new key is there", || judged(&issuers, &source, &new, "new") == Ok(())).await;
    assert_eq!(judged(&issuers, &source, &old, "old"), Err(Invalid::UnknownKey));
    // Not wanted any more: gone.
    wanted.send_replace(BTreeSet::new());
    eventually("it is gone", || judged(&issuers, &source, &new, "new") == Err(Invalid::NoKeys))
        .await;
}

#[tokio::test]
async fn a_flood_of_unknown_keys_is_few_requests() {
    let server = Server::start().await;
    let issuer = Issuer::new();
    server.says("/jwks", Some(issuer.jwks("k")));
    let source = KeySource::Url(server.url("/jwks"));
    let issuers = Arc::new(Issuers::default());
    let (_sender, wanted) = watch::channel(BTreeSet::from([Place::of(&source).unwrap()]));
    let roots = Some(server.roots.path().join("web.pem"));
    let slow = Rhythm { least: Duration::from_secs(3600), ..FAST };
    tokio::spawn(run(issuers.clone(), wanted, roots, slow));
    eventually("the key is there", || judged(&issuers, &source, &issuer, "k") == Ok(())).await;
    for _ in 0..100 {
        assert_eq!(judged(&issuers, &source, &issuer, "x"), Err(Invalid::UnknownKey));
    }
    sleep(Duration::from_millis(50)).await;
    assert_eq!(server.requests.load(Ordering::SeqCst), 1);
}

#[tokio::test]
async fn an_issuer_s_own_configuration_says_where_its_keys_are() {
    let server = Server::start().await;
    let issuer = Issuer::new();
    server.says("/keys", Some(issuer.jwks("k")));
    let base = server.url("/realm");
    let configuration = |issuer: &str, uri: &str| {
        Some(json!({"issuer": issuer, "jwks_uri": uri, "more": []}).to_string())
    };
    let path = "/realm/.well-known/openid-configuration";
    let source = KeySource::Discovery(base.clone());
    let (issuers, _wanted) = server.follow(&[Place::of(&source).unwrap()]);
    let complains = async |of: &str| {
        eventually(of, || issuers.problems().iter().any(|(_, why)| why.contains(of))).await;
    };
    complains("answered 503").await;
    server.says(path, configuration("https://other.example", &server.url("/keys")));
    complains("configuration of \"https://other.example\"").await;
    server.says(path, configuration(&base, "http://127.0.0.1/keys"));
    complains("is not a URL").await;
    server.says(path, Some("[]".into()));
    complains("not an OpenID Connect configuration").await;
    assert_eq!(judged(&issuers, &source, &issuer, "k"), Err(Invalid::NoKeys));
    server.says(path, configuration(&base, &server.url("/keys")));
    eventually("its keys", || judged(&issuers, &source, &issuer, "k") == Ok(())).await;
}

#[tokio::test]
async fn a_server_that_nobody_vouches_for_is_not_believed() {
    let (server, other) = (Server::start().await, Server::start().await);
    let issuer = Issuer::new();
    for server in [&server, &other] {
        server.says("/jwks", Some(issuer.jwks("k")));
    }
    let source = KeySource::Url(other.url("/jwks"));
    let good = KeySource::Url(server.url("/jwks"));
    let places = [Place::of(&source).unwrap(), Place::of(&good).unwrap()];
    let (issuers, _wanted) = server.follow(&places);
    eventually("the control", || judged(&issuers, &good, &issuer, "k") == Ok(())).await;
    eventually("it is told", || !issuers.problems().is_empty()).await;
    let (place, why) = issuers.problems().remove(0);
    assert_eq!(place, places[0]);
    assert!(why.to_lowercase().contains("certificate"), "{why}");
    assert_eq!(other.requests.load(Ordering::SeqCst), 0);
    assert_eq!(judged(&issuers, &source, &issuer, "k"), Err(Invalid::NoKeys));
    // A file of authorities that is not there is named.
    let issuers = Arc::new(Issuers::default());
    let (_sender, wanted) = watch::channel(BTreeSet::from([places[1].clone()]));
    tokio::spawn(run(issuers.clone(), wanted, Some("/nowhere/roots.pem".into()), FAST));
    eventually("the file is named", || {
        issuers.problems().iter().any(|(_, why)| why.contains("/nowhere/roots.pem"))
    })
    .await;
}
