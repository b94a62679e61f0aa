//! Who issues this agent's SVIDs, by the configuration.

use std::sync::Arc;

use tokio_util::sync::CancellationToken;

use super::DaemonError;
use crate::{
    config::{AgentConfig, values::Authority},
    spiffe::TrustDomain,
    svid::issuer::{EmbeddedIssuer, Issuer, JwtIssuer, RemoteConfig, RemoteIssuer},
    trust::Trust,
};

/// The issuer, opened but not asked anything yet.
pub(super) struct Identity {
    /// Issues SVIDs.
    pub(super) issuer: Arc<dyn Issuer>,
    /// Issues JWT-SVIDs.
    pub(super) jwt_issuer: Arc<dyn JwtIssuer>,
    /// As `status` names it.
    pub(super) name: String,
    /// Is to be followed.
    followed: Option<Followed>,
}

/// An authority whose bundle changes.
enum Followed {
    /// In this process; others share its directory.
    Embedded(Arc<EmbeddedIssuer>, Arc<Trust>),
    /// Asked over gRPC.
    Remote(Arc<RemoteIssuer>),
}

impl Identity {
    /// Opens the configured authority and puts its bundle into `trust`, now or as soon as the
    /// authority tells it.
    pub(super) fn open(
        config: &AgentConfig,
        domain: &TrustDomain,
        trust: &Arc<Trust>,
    ) -> Result<Self, DaemonError> {
        match config.authority {
            Authority::Embedded => {
                let dir = config.authority_dir();
                let issuer = Arc::new(EmbeddedIssuer::open(&dir, domain, config.svid_ttl)?);
                trust.set(domain.clone(), issuer.bundle());
                trust.set_jwt(domain.clone(), issuer.jwt_bundle().borrow().clone());
                Ok(Self {
                    issuer: issuer.clone(),
                    jwt_issuer: issuer.clone(),
                    name: config.authority.as_str().into(),
                    followed: Some(Followed::Embedded(issuer, trust.clone())),
                })
            }
            Authority::Grpc => {
                let missing = |key, remedy| DaemonError::Missing { key, remedy };
                let remote = RemoteConfig {
                    address: config.ca_address.clone().ok_or_else(|| {
                        missing("caAddress", "say where the authority is, as https://host:15012")
                    })?,
                    server_name: config.ca_server_name.clone(),
                    root_file: config.ca_root_file.clone().ok_or_else(|| {
                        missing("caRootFile", "give the PEM roots by which the authority is known")
                    })?,
                    token_file: config.ca_token_file.clone(),
                    cluster_id: config.cluster_id.clone(),
                    ttl: config.svid_ttl,
                };
                let name = format!("grpc {}", remote.address);
                let issuer = Arc::new(RemoteIssuer::new(remote, domain.clone(), trust.clone())?);
                Ok(Self {
                    issuer: issuer.clone(),
                    jwt_issuer: issuer.clone(),
                    name,
                    followed: Some(Followed::Remote(issuer)),
                })
            }
        }
    }

    /// Follows the authority's bundle until `stop`.
    pub(super) fn follow(&mut self, stop: CancellationToken) -> tokio::task::JoinHandle<()> {
        match self.followed.take() {
            Some(Followed::Embedded(issuer, trust)) => tokio::spawn(issuer.follow(trust, stop)),
            Some(Followed::Remote(remote)) => tokio::spawn(remote.follow(stop)),
            None => tokio::spawn(stop.cancelled_owned()),
        }
    }
}
