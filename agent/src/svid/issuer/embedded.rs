//! The authority inside the agent, for one node and for the lab: its root is a file.

use std::{
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use arc_swap::ArcSwap;
use jiff::Timestamp;
use tokio::{sync::watch, time};
use tokio_util::sync::CancellationToken;

use super::{
    IssueError, IssueFuture, Issuer, JwtFuture, JwtIssuer, JwtRequest, SvidRequest, jwt_file,
    root_file::{self, RootFileError},
};
use crate::{
    ca::{CaError, Root, jwt_keys},
    spiffe::{Bundle, JwtBundle, JwtClaims, JwtSigner, TrustDomain},
    trust::Trust,
};

/// How long a JWT-SVID is valid when the request leaves it open, and at most.
const TOKEN: (Duration, Duration) = (Duration::from_secs(300), jwt_keys::LONGEST_TOKEN);
/// How often the file of keys is looked at.
const POLL: Duration = Duration::from_secs(10);
/// A key is in the bundle for twice as long before it signs first.
const PUBLISHED: Duration = Duration::from_secs(300);

/// Signs with a root that is kept in a directory.
#[derive(Debug)]
pub struct EmbeddedIssuer {
    root: Arc<Root>,
    bundle: Bundle,
    leaf_ttl: Duration,
    dir: PathBuf,
    /// The key that signs now, of those in the directory's file.
    jwt: ArcSwap<JwtSigner>,
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
        let (jwt, jwt_bundle) = jwt_keys(dir, Timestamp::now())?;
        tracing::info!(
            trust_domain = %domain,
            directory = %dir.display(),
            root_not_after = %root.not_after(),
            "embedded authority is ready"
        );
        Ok(Self {
            root: Arc::new(root),
            bundle,
            leaf_ttl,
            dir: dir.to_owned(),
            jwt: ArcSwap::from_pointee(jwt),
            jwt_bundle: watch::Sender::new(Arc::new(jwt_bundle)),
        })
    }

    /// Follows the keys of JWT-SVIDs, which are replaced once a day, and keeps `trust` in step,
    /// until `stop`. What fails is tried again; the keys that are there go on.
    pub async fn follow(self: Arc<Self>, trust: Arc<Trust>, stop: CancellationToken) {
        let mut said = None;
        loop {
            tokio::select! {
                () = stop.cancelled() => return,
                () = time::sleep(POLL) => {}
            }
            let issuer = Arc::clone(&self);
            // The lock may be another agent's for a moment.
            let turned = tokio::task::spawn_blocking(move || issuer.turn(Timestamp::now())).await;
            let error = match turned {
                Ok(Ok(())) => None,
                Ok(Err(error)) => Some(error.to_string()),
                Err(error) => Some(error.to_string()),
            };
            trust.set_jwt(self.trust_domain().clone(), self.jwt_bundle.borrow().clone());
            if error != said {
                if let Some(error) = &error {
                    tracing::error!(error, "the keys of JWT-SVIDs are not followed");
                }
                said = error;
            }
        }
    }

    /// Takes over the keys that should be there now.
    fn turn(&self, now: Timestamp) -> Result<(), RootFileError> {
        let (jwt, bundle) = jwt_keys(&self.dir, now)?;
        // Published first: nobody gets a token that nobody can verify.
        self.jwt_bundle.send_if_modified(|held| {
            let changed = **held != bundle;
            *held = Arc::new(bundle);
            changed
        });
        if self.jwt.load().kid() != jwt.kid() {
            self.jwt.store(Arc::new(jwt));
        }
        Ok(())
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

/// The key that signs now, and all that verify.
fn jwt_keys(dir: &Path, now: Timestamp) -> Result<(JwtSigner, JwtBundle), RootFileError> {
    let keys = jwt_file::current(dir, PUBLISHED, now)?;
    let wrong = |source| RootFileError::JwtKeys { path: dir.join(jwt_file::FILE), source };
    Ok((jwt_keys::signer(&keys, now).map_err(wrong)?, jwt_keys::bundle(&keys).map_err(wrong)?))
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
            Ok(self.jwt.load().sign(&JwtClaims {
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

        // A day later: each agent has the next key before any of them signs with it.
        let kid = |issuer: &EmbeddedIssuer| issuer.jwt.load().kid().to_owned();
        let (first, day) = (kid(&one), now + jwt_keys::LIFETIME);
        one.turn(day - PUBLISHED).unwrap();
        let published = one.jwt_bundle().borrow().clone();
        assert_eq!((published.iter().len(), kid(&one)), (2, first.clone()));
        two.turn(day - PUBLISHED).unwrap();
        assert_eq!(*two.jwt_bundle().borrow(), published);
        two.turn(day + PUBLISHED * 2).unwrap();
        assert!(kid(&two) != first && published.iter().any(|(name, _)| name == kid(&two)));
        let token = two.issue_jwt(&request).await.unwrap();
        let by_one =
            crate::spiffe::JwtSvid::validate(&token, "vault", |_| Some(published.clone()), now);
        assert_eq!(by_one.unwrap().id, id, "the other agent knew the key before");
        one.turn(day + jwt_keys::LONGEST_TOKEN + PUBLISHED * 4).unwrap();
        assert_eq!(one.jwt_bundle().borrow().iter().len(), 1, "the old one is gone");
        assert_eq!(kid(&one), kid(&two));

        let foreign = SpiffeId::parse("spiffe://other/ns/shop/sa/web").unwrap();
        let request = JwtRequest { id: foreign.clone(), ..request };
        assert!(one.issue_jwt(&request).await.unwrap_err().to_string().contains("trust domain"));
        let error = one.issue(&SvidRequest::new(foreign).unwrap()).await.unwrap_err();
        assert!(error.to_string().contains("is not of the trust domain td"), "{error}");
    }
}
