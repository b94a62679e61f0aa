//! The authority inside the agent, for one node and for the lab: its root is a file.

use std::{path::Path, sync::Arc, time::Duration};

use jiff::Timestamp;
use tokio::sync::watch;

use super::{
    IssueError, IssueFuture, Issuer, JwtFuture, JwtIssuer, JwtRequest, SvidRequest,
    root_file::{self, RootFileError},
};
use crate::{
    ca::{CaError, Root},
    spiffe::{Bundle, JwtBundle, JwtClaims, JwtSigner, TrustDomain},
};

/// How long a JWT-SVID is valid when the request leaves it open, and at most.
const TOKEN: (Duration, Duration) = (Duration::from_secs(300), Duration::from_secs(3600));

/// Signs with a root that is kept in a directory.
#[derive(Debug)]
pub struct EmbeddedIssuer {
    root: Arc<Root>,
    bundle: Bundle,
    leaf_ttl: Duration,
    /// One key, as long as its file is there: the agents on the directory share it.
    jwt: JwtSigner,
    jwt_bundle: watch::Sender<Arc<JwtBundle>>,
}

impl EmbeddedIssuer {
    /// Opens the root in `dir`, or makes it there when there is none. Agents that start at
    /// once on one directory end with the same root.
    ///
    /// # Errors
    /// One that names file, field, value and remedy; nothing is changed then.
    pub fn open(
        dir: &Path,
        domain: &TrustDomain,
        leaf_ttl: Duration,
    ) -> Result<Self, RootFileError> {
        let root = root_file::open_or_create(dir, domain, Timestamp::now())?;
        let bundle = root.bundle().map_err(|source| RootFileError::invalid(dir, source))?;
        let jwt = root_file::open_or_create_jwt_key(dir)?;
        let mut jwt_bundle = JwtBundle::new();
        if let Err(error) = jwt_bundle.insert(jwt.kid(), jwt.public_key().clone()) {
            let source = CaError::Crypto(error.to_string());
            return Err(RootFileError::Create { path: dir.into(), source });
        }
        tracing::info!(
            trust_domain = %domain,
            directory = %dir.display(),
            root_not_after = %root.not_after(),
            "embedded authority is ready"
        );
        let jwt_bundle = watch::Sender::new(Arc::new(jwt_bundle));
        Ok(Self { root: Arc::new(root), bundle, leaf_ttl, jwt, jwt_bundle })
    }

    /// The trust domain's bundle: its one root.
    pub fn bundle(&self) -> Bundle {
        self.bundle.clone()
    }

    /// The trust domain that it signs for.
    pub fn trust_domain(&self) -> &TrustDomain {
        self.root.trust_domain()
    }
}

impl Issuer for EmbeddedIssuer {
    fn issue<'a>(&'a self, request: &'a SvidRequest) -> IssueFuture<'a> {
        Box::pin(async move {
            let now = Timestamp::now();
            let leaf =
                self.root.sign_leaf(request.id(), &request.public_key(), now, self.leaf_ttl)?;
            Ok(vec![leaf])
        })
    }
}

impl JwtIssuer for EmbeddedIssuer {
    fn issue_jwt<'a>(&'a self, request: &'a JwtRequest) -> JwtFuture<'a> {
        Box::pin(async move {
            if request.id.trust_domain() != *self.trust_domain() {
                return Err(IssueError::Authority(CaError::WrongTrustDomain {
                    id: request.id.clone(),
                    domain: self.trust_domain().clone(),
                }));
            }
            let now = Timestamp::now();
            let ttl = request.ttl.unwrap_or(TOKEN.0).min(TOKEN.1);
            Ok(self.jwt.sign(&JwtClaims {
                id: request.id.clone(),
                audiences: request.audiences.clone(),
                issued_at: now,
                expires_at: now.saturating_add(ttl).unwrap_or(now),
                issuer: None,
            })?)
        })
    }

    fn jwt_bundle(&self) -> watch::Receiver<Arc<JwtBundle>> {
        self.jwt_bundle.subscribe()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::spiffe::{
        SpiffeId,
        validate::{PeerRole, validate},
    };

    #[tokio::test]
    async fn two_agents_on_one_directory_trust_each_other() {
        let parent = tempfile::tempdir().unwrap();
        let dir = parent.path().join("authority");
        let td = TrustDomain::parse("td").unwrap();
        let open = || EmbeddedIssuer::open(&dir, &td, Duration::from_secs(60)).unwrap();
        let (one, two) = (open(), open());
        assert_eq!((one.trust_domain(), one.bundle()), (&td, two.bundle()));
        let id = SpiffeId::for_service_account(&td, "shop", "web").unwrap();
        let request = SvidRequest::new(id.clone()).unwrap();
        let chain = one.issue(&request).await.unwrap();
        let svid = request.finish(chain).unwrap();
        let bundle = Arc::new(two.bundle());
        let now = Timestamp::now();
        let peer =
            validate(&svid.chain_der[0], &[], |_| Some(bundle), PeerRole::Client, now).unwrap();
        assert_eq!((peer.id, svid.is_valid_at(now)), (id, true));

        let id = SpiffeId::for_service_account(&td, "shop", "web").unwrap();
        let request = JwtRequest { id: id.clone(), audiences: vec!["vault".into()], ttl: None };
        let token = one.issue_jwt(&request).await.unwrap();
        let keys = two.jwt_bundle().borrow().clone();
        let svid = crate::spiffe::JwtSvid::validate(&token, "vault", |_| Some(keys), now).unwrap();
        assert_eq!(svid.id, id);

        let foreign = SpiffeId::parse("spiffe://other/ns/shop/sa/web").unwrap();
        let request = JwtRequest { id: foreign.clone(), ..request };
        assert!(one.issue_jwt(&request).await.unwrap_err().to_string().contains("trust domain"));
        let error = one.issue(&SvidRequest::new(foreign).unwrap()).await.unwrap_err();
        assert!(error.to_string().contains("is not of the trust domain td"), "{error}");
    }
}
