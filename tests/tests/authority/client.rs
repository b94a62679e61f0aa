//! A client of both services, and an authority with a cluster to ask about.

use std::{collections::BTreeMap, path::PathBuf, time::Duration};

use anyhow::{Context, Result};
use by_openssl::Request;
use prost_types::{Struct, Value, value::Kind};
use signet::proto::istio_ca::{
    IstioCertificateRequest, istio_certificate_service_client::IstioCertificateServiceClient,
};
use signet_lab::{api_server::ApiServer, authority::Authority};
use tonic::{
    Code, Status,
    metadata::MetadataValue,
    transport::{Certificate, Channel, ClientTlsConfig, Endpoint},
};

/// The audience of good tokens.
pub const AUDIENCE: &str = "signet-authority";
/// Longest that a call may take.
pub const TIMEOUT: Duration = Duration::from_secs(20);

/// An authority in front of a test API server that has two nodes with an agent each.
pub struct Cluster {
    pub api: ApiServer,
    pub authority: Authority,
}

impl Cluster {
    /// With further flags.
    pub fn start(flags: &[&str]) -> Result<Self> {
        let api = ApiServer::start()?;
        populate(&api)?;
        let authority = replica(&api, "authority", flags)?;
        Ok(Self { api, authority })
    }

    /// A good token of a node's agent.
    pub fn token(&self, node: &str) -> Result<String> {
        let pod = format!("agent-{node}");
        self.api.token("signet-system", "signet-agent", AUDIENCE, Some(&pod), TIMEOUT * 30)
    }
}

/// Two nodes, an agent on each, `shop/web` on node-1 and `shop/db` on node-2.
pub fn populate(api: &ApiServer) -> Result<()> {
    api.service_account("signet-system", "signet-agent")?;
    for node in ["node-1", "node-2"] {
        api.apply(serde_json::json!({
            "apiVersion": "v1", "kind": "Node", "metadata": {"name": node},
            "status": {"conditions": [{"type": "Ready", "status": "True"}]},
        }))?;
        api.pod("signet-system", &format!("agent-{node}"), "signet-agent", node)?;
    }
    api.service_account("shop", "web")?;
    api.service_account("shop", "db")?;
    api.pod("shop", "web-1", "web", "node-1")?;
    api.pod("shop", "db-1", "db", "node-2")?;
    Ok(())
}

/// An authority that keeps its root in the Secret `signet-system/root` of this API server.
pub fn replica(api: &ApiServer, name: &str, flags: &[&str]) -> Result<Authority> {
    let path = |p: PathBuf| p.display().to_string();
    let mut arguments = vec![
        "--kubeconfig".to_owned(),
        path(api.kubeconfig()),
        "--names".into(),
        "localhost".into(),
        "--metrics-listen".into(),
        "127.0.0.1:0".into(),
        "--bundle-file".into(),
        path(api.directory().join(format!("{name}.pem"))),
    ];
    if !flags.contains(&"--store-dir") {
        arguments.extend(["--store-secret".into(), "signet-system/root".into()]);
    }
    arguments.extend(flags.iter().map(|f| (*f).to_owned()));
    Authority::start(name, api.directory(), None, &arguments)
}

/// A channel that trusts only the roots in a PEM file.
pub async fn channel(authority: &Authority, roots: &std::path::Path) -> Result<Channel> {
    let pem = std::fs::read_to_string(roots).with_context(|| roots.display().to_string())?;
    let tls =
        ClientTlsConfig::new().ca_certificate(Certificate::from_pem(pem)).domain_name("localhost");
    Endpoint::from_shared(format!("https://{}", authority.address()))?
        .tls_config(tls)?
        .timeout(TIMEOUT)
        .connect()
        .await
        .context("cannot connect")
}

/// A call of `CreateCertificate`.
#[derive(Clone)]
pub struct Call {
    pub token: Option<String>,
    pub identity: Option<String>,
    pub csr: String,
    pub seconds: i64,
}

impl Call {
    /// A good call for `shop/web`.
    pub fn good(token: &str) -> Self {
        let identity = "spiffe://cluster.local/ns/shop/sa/web".to_owned();
        Self {
            token: Some(token.to_owned()),
            csr: Request::new("ec:P-256").san(&format!("URI:{identity}")).pem(),
            identity: Some(identity),
            seconds: 0,
        }
    }

    pub async fn make(&self, channel: &Channel) -> Result<Vec<String>, Status> {
        let mut client = IstioCertificateServiceClient::new(channel.clone());
        let mut fields = BTreeMap::new();
        if let Some(identity) = &self.identity {
            let kind = Some(Kind::StringValue(identity.clone()));
            fields.insert("ImpersonatedIdentity".to_owned(), Value { kind });
        }
        let mut request = tonic::Request::new(IstioCertificateRequest {
            csr: self.csr.clone(),
            validity_duration: self.seconds,
            metadata: Some(Struct { fields }),
        });
        if let Some(token) = &self.token {
            let value = MetadataValue::try_from(format!("Bearer {token}"))
                .map_err(|e| Status::new(Code::Internal, e.to_string()))?;
            request.metadata_mut().insert("authorization", value);
        }
        client.create_certificate(request).await.map(|r| r.into_inner().cert_chain)
    }
}

/// Certificate requests made by openssl: another implementation than the one under test.
pub mod by_openssl {
    use std::process::Command;

    pub struct Request {
        key: String,
        san: Option<String>,
        extra: Vec<String>,
    }

    impl Request {
        /// A request with a new key: `ec:<curve>` or `rsa:<bits>`.
        pub fn new(key: &str) -> Self {
            Self { key: key.into(), san: None, extra: Vec::new() }
        }

        pub fn san(mut self, san: &str) -> Self {
            self.san = Some(san.into());
            self
        }

        pub fn extension(mut self, extension: &str) -> Self {
            self.extra.push(extension.into());
            self
        }

        pub fn pem(&self) -> String {
            let mut command = Command::new("openssl");
            command.args(["req", "-new", "-nodes", "-subj", "/", "-keyout", "/dev/null"]);
            match self.key.split_once(':') {
                Some(("ec", curve)) => {
                    command.args(["-newkey", "ec", "-pkeyopt"]);
                    command.arg(format!("ec_paramgen_curve:{curve}"));
                }
                _ => {
                    command.args(["-newkey", &self.key]);
                }
            }
            if let Some(san) = &self.san {
                command.args(["-addext", &format!("subjectAltName={san}")]);
            }
            for extension in &self.extra {
                command.args(["-addext", extension]);
            }
            let output = command.output().expect("openssl runs");
            assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
            String::from_utf8(output.stdout).expect("PEM is text")
        }
    }
}
