use std::{fs, net::SocketAddr};

use rustls::{ServerConfig, crypto::aws_lc_rs};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpListener,
    time::timeout,
};
use tokio_rustls::TlsAcceptor;

use super::*;
use crate::spiffe::{SpiffeId, Svid, forge::Forger};

const SOON: Duration = Duration::from_secs(10);

fn domain() -> TrustDomain {
    TrustDomain::parse("other.example").unwrap()
}

fn jwks(bundle: Bundle, hint: Option<u64>) -> String {
    let refresh_hint = hint.map(Duration::from_secs);
    SpiffeBundle { x509: bundle, jwt: JwtBundle::new(), sequence: Some(1), refresh_hint }
        .encode()
        .unwrap()
}

fn federation(source: Option<BundleSource>) -> Arc<Federation> {
    let domains = source.into_iter().map(|source| (domain(), source)).collect();
    Arc::new(Federation { domains, ..Federation::default() })
}

struct Scene {
    trust: Arc<Trust>,
    wanted: watch::Sender<Arc<Federation>>,
    failures: watch::Receiver<Failures>,
}

impl Scene {
    fn start(source: BundleSource) -> Self {
        let trust = Trust::new();
        let (wanted, federation) = watch::channel(federation(Some(source)));
        let (report, failures) = watch::channel(Failures::new());
        tokio::spawn(run(trust.clone(), federation, report));
        Self { trust, wanted, failures }
    }

    async fn holds(&self, wanted: Option<&Bundle>) {
        let waiting = async {
            while self.trust.bundle(&domain()).as_deref() != wanted {
                sleep(Duration::from_millis(10)).await;
            }
        };
        timeout(SOON, waiting).await.expect("the bundle that is wanted");
    }

    async fn fails(&mut self, says: &str) {
        let said =
            self.failures.wait_for(|all| all.get(&domain()).is_some_and(|m| m.contains(says)));
        if timeout(SOON, said).await.is_err() {
            panic!("not {says:?} but {:?}", *self.failures.borrow());
        }
    }
}

#[tokio::test]
async fn a_file_is_followed_and_a_domain_that_is_taken_out_is_distrusted() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("bundle");
    let (first, second) =
        (Forger::root("other.example").bundle(), Forger::root("other.example").bundle());
    fs::write(&path, jwks(first.clone(), None)).unwrap();
    let mut scene = Scene::start(BundleSource::File(path.clone()));
    scene.holds(Some(&first)).await;
    // What breaks keeps what was there, and says so.
    fs::write(&path, "{\"keys\": 3}").unwrap();
    scene.fails("bundle").await;
    scene.holds(Some(&first)).await;
    let pem: String = second
        .certificates()
        .map(|c| pem::encode(&pem::Pem::new("CERTIFICATE", c.to_vec())))
        .collect();
    fs::write(&path, pem).unwrap();
    scene.holds(Some(&second)).await;
    assert!(scene.failures.borrow_and_update().is_empty(), "it is well again");
    fs::remove_file(&path).unwrap();
    scene.fails("cannot be read").await;
    scene.holds(Some(&second)).await;
    scene.wanted.send_replace(federation(None));
    scene.holds(None).await;
    let settled = async { scene.failures.wait_for(Failures::is_empty).await.map(drop) };
    timeout(SOON, settled).await.expect("nothing to complain of").unwrap();
}

/// Serves a document over HTTPS with an SVID or any other certificate; counts requests.
async fn endpoint_with(svid: Svid, document: Arc<Mutex<String>>) -> SocketAddr {
    let provider = Arc::new(aws_lc_rs::default_provider());
    let config = ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(svid.chain_der.clone(), svid.private_key())
        .unwrap();
    let acceptor = TlsAcceptor::from(Arc::new(config));
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        loop {
            let (tcp, _) = listener.accept().await.unwrap();
            let (acceptor, document) = (acceptor.clone(), document.clone());
            tokio::spawn(async move {
                let Ok(mut tls) = acceptor.accept(tcp).await else { return };
                let mut request = [0; 4096];
                let _ = tls.read(&mut request).await;
                let body = document.lock().unwrap().clone();
                let head = if body.starts_with("HTTP/") {
                    body
                } else {
                    format!(
                        "HTTP/1.1 200 OK\r\ncontent-length: {}\r\nconnection: close\r\n\r\n{body}",
                        body.len()
                    )
                };
                let _ = tls.write_all(head.as_bytes()).await;
                let _ = tls.shutdown().await;
            });
        }
    });
    address
}

fn spiffe_source(at: SocketAddr, id: &str, bootstrap: Option<PathBuf>) -> BundleSource {
    BundleSource::Spiffe {
        url: format!("https://{at}/bundle").parse().unwrap(),
        id: SpiffeId::parse(id).unwrap(),
        bootstrap,
    }
}

const ENDPOINT: &str = "spiffe://other.example/bundles";

#[tokio::test]
async fn an_endpoint_with_an_svid_is_bootstrapped_and_its_hint_followed() {
    let dir = tempfile::tempdir().unwrap();
    let root = Forger::root("other.example");
    let bootstrap = dir.path().join("bootstrap.json");
    fs::write(&bootstrap, jwks(root.bundle(), None)).unwrap();
    let document = Arc::new(Mutex::new(jwks(root.bundle(), Some(1))));
    let at = endpoint_with(root.svid(ENDPOINT), document.clone()).await;
    let mut scene = Scene::start(spiffe_source(at, ENDPOINT, Some(bootstrap)));
    scene.holds(Some(&root.bundle())).await;
    // The next root joins: found at the hint's pace, verified by the bundle itself.
    fs::remove_dir_all(dir.path()).unwrap();
    let mut both: Vec<_> = root.bundle().certificates().cloned().collect();
    both.extend(Forger::root("other.example").bundle().certificates().cloned());
    let both = Bundle::from_der(both).unwrap();
    *document.lock().unwrap() = jwks(both.clone(), Some(1));
    scene.holds(Some(&both)).await;
    *document.lock().unwrap() = "HTTP/1.1 500 Oops\r\ncontent-length: 0\r\n\r\n".into();
    scene.fails("answered 500").await;
    scene.holds(Some(&both)).await;
}

#[tokio::test]
async fn endpoints_that_are_somebody_else_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let root = Forger::root("other.example");
    let bootstrap = dir.path().join("bootstrap.json");
    fs::write(&bootstrap, jwks(root.bundle(), None)).unwrap();
    let document = Arc::new(Mutex::new(jwks(root.bundle(), None)));
    let stranger = Forger::root("other.example");
    let cases = [
        (
            root.svid("spiffe://other.example/ns/a/sa/b"),
            ENDPOINT,
            "not spiffe://other.example/bundles",
        ),
        (stranger.svid(ENDPOINT), ENDPOINT, "was not signed by an authority"),
    ];
    for (svid, expected, says) in cases {
        let at = endpoint_with(svid, document.clone()).await;
        let mut scene = Scene::start(spiffe_source(at, expected, Some(bootstrap.clone())));
        scene.fails(says).await;
        scene.holds(None).await;
    }
    let at = endpoint_with(root.svid(ENDPOINT), document.clone()).await;
    let mut scene = Scene::start(spiffe_source(at, ENDPOINT, None));
    scene.fails("name one as bootstrap").await;
    // The control.
    let scene = Scene::start(spiffe_source(at, ENDPOINT, Some(bootstrap)));
    scene.holds(Some(&root.bundle())).await;
}

#[tokio::test]
async fn a_web_endpoint_needs_a_web_certificate_and_redirects_are_bounded() {
    let dir = tempfile::tempdir().unwrap();
    let key = rcgen::KeyPair::generate().unwrap();
    let params = rcgen::CertificateParams::new(vec!["127.0.0.1".to_owned()]).unwrap();
    let certificate = params.self_signed(&key).unwrap();
    let roots = dir.path().join("web.pem");
    fs::write(&roots, certificate.pem()).unwrap();
    let provider = Arc::new(aws_lc_rs::default_provider());
    let config = ServerConfig::builder_with_provider(provider)
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
    let root = Forger::root("other.example");
    let body = jwks(root.bundle(), None);
    tokio::spawn(async move {
        loop {
            let (tcp, _) = listener.accept().await.unwrap();
            let Ok(mut tls) = acceptor.accept(tcp).await else { continue };
            let mut request = [0; 4096];
            let n = tls.read(&mut request).await.unwrap_or(0);
            let request = String::from_utf8_lossy(&request[..n]).into_owned();
            let answer = if request.starts_with("GET /moved") {
                format!(
                    "HTTP/1.1 307 Moved\r\nlocation: https://{at}/bundle\r\ncontent-length: 0\r\nconnection: close\r\n\r\n"
                )
            } else if request.starts_with("GET /round") {
                format!(
                    "HTTP/1.1 307 Moved\r\nlocation: https://{at}/round\r\ncontent-length: 0\r\nconnection: close\r\n\r\n"
                )
            } else if request.starts_with("GET /plain") {
                format!(
                    "HTTP/1.1 302 Moved\r\nlocation: http://{at}/bundle\r\ncontent-length: 0\r\nconnection: close\r\n\r\n"
                )
            } else if request.starts_with("GET /for-good") {
                format!(
                    "HTTP/1.1 301 Moved\r\nlocation: https://{at}/bundle\r\ncontent-length: 0\r\nconnection: close\r\n\r\n"
                )
            } else {
                format!(
                    "HTTP/1.1 200 OK\r\ncontent-length: {}\r\nconnection: close\r\n\r\n{body}",
                    body.len()
                )
            };
            let _ = tls.write_all(answer.as_bytes()).await;
            let _ = tls.shutdown().await;
        }
    });
    let source = |path: &str, roots: Option<PathBuf>| BundleSource::Web {
        url: format!("https://{at}{path}").parse().unwrap(),
        roots,
    };
    for path in ["/bundle", "/moved"] {
        let scene = Scene::start(source(path, Some(roots.clone())));
        scene.holds(Some(&root.bundle())).await;
    }
    for (path, says) in [
        ("/round", "too many times"),
        ("/plain", "no absolute https URL"),
        ("/for-good", "answered 301"),
    ] {
        let mut scene = Scene::start(source(path, Some(roots.clone())));
        scene.fails(says).await;
        scene.holds(None).await;
    }
    // Another authority than the one that signed it.
    let other = rcgen::CertificateParams::new(vec!["127.0.0.1".to_owned()]).unwrap();
    fs::write(&roots, other.self_signed(&rcgen::KeyPair::generate().unwrap()).unwrap().pem())
        .unwrap();
    let mut scene = Scene::start(source("/bundle", Some(roots)));
    scene.fails("https://127.0.0.1").await;
    scene.holds(None).await;
}
