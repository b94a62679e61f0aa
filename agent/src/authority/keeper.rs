//! What one replica signs with: follows the shared document, keeps an intermediate and a
//! serving certificate of its own, and takes the document's next steps.

use std::{
    collections::BTreeMap,
    path::PathBuf,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use arc_swap::ArcSwap;
use jiff::Timestamp;
use rustls::{pki_types::PrivateKeyDer, sign::CertifiedKey};
use tokio::time;

use super::{
    metrics::AuthorityMetrics,
    output::BundleOutput,
    pods::PodDirectory,
    state::{Pace, Phase, State, StateError},
    store::{RootStore, StoreError, Version, open_or_create},
};
use crate::{
    ca::{CaError, Intermediate, Provided, provided},
    config::authority::AuthorityConfig,
    spiffe::{Bundle, BundleError, JwtBundle, JwtSigner, TrustDomain},
};

/// How often the store is looked at, at most; a short refresh hint shortens it.
const POLL: Duration = Duration::from_secs(2);

/// What a replica signs with, and what it publishes; immutable.
pub struct Signing {
    /// Signs SVIDs.
    pub intermediate: Intermediate,
    /// Tells the root above it.
    root: String,
    /// Every root of the trust domain.
    pub bundle: Bundle,
    /// Signs JWT-SVIDs.
    pub jwt: JwtSigner,
    /// Every key that verifies JWT-SVIDs.
    pub jwt_bundle: JwtBundle,
    /// Grows with every change of the bundle.
    pub sequence: u64,
    serving_until: Timestamp,
    serving: Arc<CertifiedKey>,
}

impl Signing {
    /// Until when that certificate is valid.
    pub fn serving_until(&self) -> Timestamp {
        self.serving_until
    }

    /// The certificate that the replica serves with.
    pub fn serving(&self) -> &Arc<CertifiedKey> {
        &self.serving
    }
}

/// Why nothing can be signed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum KeeperError {
    /// The store.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The document.
    #[error("{place}: the document {source}")]
    State {
        /// Where.
        place: String,
        /// What is wrong.
        source: StateError,
    },
    /// Signing.
    #[error(transparent)]
    Ca(#[from] CaError),
    /// The bundle.
    #[error("the authority's own bundle: {0}")]
    Bundle(#[from] BundleError),
    /// A provided file.
    #[error("caDir: {}: {source}", path.display())]
    Provided {
        /// Which.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The serving certificate.
    #[error("the serving certificate: {0}")]
    Serving(String),
}

/// Keeps a replica's [`Signing`] up to date.
pub struct Keeper {
    config: Arc<AuthorityConfig>,
    domain: TrustDomain,
    store: Arc<dyn RootStore>,
    pods: Arc<dyn PodDirectory>,
    output: BundleOutput,
    current: Arc<ArcSwap<Signing>>,
    reports: Arc<Reports>,
    rotation: Arc<RotationPhase>,
    metrics: AuthorityMetrics,
    state: State,
    version: Version,
    provided: Option<Provided>,
}

/// The digest of the bundle that each node's agent has reported last, to this replica.
#[derive(Debug, Default)]
pub struct Reports(Mutex<BTreeMap<String, [u8; 32]>>);

impl Reports {
    /// Notes a node's report.
    pub fn note(&self, node: &str, digest: [u8; 32]) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).insert(node.into(), digest);
    }

    /// How many nodes have reported this digest last, and how many another.
    pub fn count(&self, digest: &[u8; 32]) -> (usize, usize) {
        let all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let current = all.values().filter(|reported| *reported == digest).count();
        (current, all.len() - current)
    }

    fn all(&self) -> BTreeMap<String, [u8; 32]> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

/// The phase of a rotation and since when it is in it; `None`: there is no rotation.
#[derive(Debug, Default)]
pub struct RotationPhase(Mutex<Option<(Phase, Timestamp)>>);

impl RotationPhase {
    /// As of the last look at the document.
    pub fn get(&self) -> Option<(Phase, Timestamp)> {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn set(&self, phase: Option<(Phase, Timestamp)>) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = phase;
    }
}

impl Keeper {
    /// Opens the store, makes the root where there is none, and an intermediate.
    pub async fn open(
        config: Arc<AuthorityConfig>,
        domain: TrustDomain,
        store: Arc<dyn RootStore>,
        pods: Arc<dyn PodDirectory>,
        output: BundleOutput,
        metrics: AuthorityMetrics,
    ) -> Result<Self, KeeperError> {
        let now = Timestamp::now();
        let provided = read_provided(&config, &domain, now)?;
        let (state, version) = open_or_create(&*store, &domain, provided.is_some(), now).await?;
        let signing = make(&config, &domain, &*store, &state, provided.as_ref(), None, now)?;
        let current = Arc::new(ArcSwap::from_pointee(signing));
        let keeper = Self {
            config,
            domain,
            store,
            pods,
            output,
            current,
            reports: Arc::default(),
            rotation: Arc::default(),
            metrics,
            state,
            version,
            provided,
        };
        keeper.publish().await;
        Ok(keeper)
    }

    /// What the replica signs with, followed.
    pub fn signing(&self) -> Arc<ArcSwap<Signing>> {
        self.current.clone()
    }

    /// Where agents' reports go.
    pub fn reports(&self) -> Arc<Reports> {
        self.reports.clone()
    }

    /// How far a rotation has come, followed.
    pub fn rotation(&self) -> Arc<RotationPhase> {
        self.rotation.clone()
    }

    /// Follows the store until the task is dropped. What fails is tried again; what was last
    /// good stays.
    pub async fn run(mut self) {
        let poll = POLL.min(self.config.refresh_hint / 2).max(Duration::from_millis(200));
        loop {
            time::sleep(poll).await;
            let turned = self.turn().await;
            self.metrics.turn(turned.is_ok());
            if let Err(error) = turned {
                tracing::error!(%error, "the authority's state is not followed; trying again");
            }
        }
    }

    async fn turn(&mut self) -> Result<(), KeeperError> {
        let now = Timestamp::now();
        let stored = self.store.read().await?;
        match (stored.document, stored.version) {
            (Some(document), Some(version)) if version != self.version => {
                let state = State::read(&document, &self.domain, now).map_err(|e| self.state(e))?;
                tracing::info!(state = ?state, "the authority's state has changed");
                (self.state, self.version) = (state, version);
            }
            (Some(_), Some(_)) => {}
            // Removed under our feet: what is signed with is not given up for a new root.
            _ => {
                tracing::error!(place = %self.store.place(), "the authority's document is gone: restore it");
            }
        }
        if let Some(next) = self.next(now).await? {
            match self.store.replace(&next.write(), Some(&self.version)).await? {
                Some(version) => {
                    tracing::info!(state = ?next, "the authority's state goes on");
                    (self.state, self.version) = (next, version);
                }
                // Another replica was first: the next turn reads what it did.
                None => return Ok(()),
            }
        }
        match read_provided(&self.config, &self.domain, now) {
            Ok(provided) => self.provided = provided,
            Err(error) => {
                tracing::error!(%error, "the provided authority is not reloaded; the one in force stays");
            }
        }
        let old = self.current.load_full();
        let provided = self.provided.as_ref();
        let (config, store) = (&self.config, &*self.store);
        if is_stale(&old, config, &self.state, provided, now).map_err(|e| self.state(e))? {
            let new = make(config, &self.domain, store, &self.state, provided, Some(&old), now)?;
            self.current.store(Arc::new(new));
        }
        self.publish().await;
        Ok(())
    }

    /// The document's next step.
    async fn next(&self, now: Timestamp) -> Result<Option<State>, KeeperError> {
        let wrong = |e| self.state(e);
        if let Some(next) = self.state.note_reports(&self.reports.all()) {
            return Ok(Some(next));
        }
        if self.state.rotation().is_some() {
            let pace =
                Pace { refresh_hint: self.config.refresh_hint, longest_ttl: self.config.max_ttl };
            match self.pods.ready_nodes().await {
                Ok(nodes) => {
                    if let Some(next) = self.state.advance(&nodes, pace, now) {
                        return Ok(Some(next));
                    }
                }
                Err(error) => {
                    tracing::warn!(%error, "the rotation waits: it is not known which nodes are ready");
                }
            }
        }
        self.state.advance_jwt_keys(self.config.refresh_hint, now).map_err(wrong)
    }

    async fn publish(&self) {
        let rotation = self.state.rotation().map(|rotation| (rotation.phase, rotation.since));
        self.rotation.set(rotation);
        let signing = self.current.load_full();
        self.output.write(&signing.bundle).await;
    }

    fn state(&self, source: StateError) -> KeeperError {
        KeeperError::State { place: self.store.place(), source }
    }
}

/// True when what is signed with does not fit the document, or will soon be too short.
fn is_stale(
    old: &Signing,
    config: &AuthorityConfig,
    state: &State,
    provided: Option<&Provided>,
    now: Timestamp,
) -> Result<bool, StateError> {
    let bundle = match provided {
        Some(provided) => provided.bundle().clone(),
        None => Bundle::from_der(state.certificates()?)
            .map_err(|e| StateError::Malformed(e.to_string()))?,
    };
    Ok(old.sequence != state.sequence()
        || old.root != root_name(state, provided)
        || old.bundle != bundle
        || old.jwt.kid() != state.jwt_signer(now)?.kid()
        || is_short(&old.intermediate, config, now)
        || now.saturating_add(config.max_ttl / 2).is_ok_and(|t| t >= old.serving_until))
}

/// True when the intermediate should be replaced: half of what it has beyond the longest leaf
/// is gone.
fn is_short(intermediate: &Intermediate, config: &AuthorityConfig, now: Timestamp) -> bool {
    let spare = config.intermediate_ttl.saturating_sub(config.max_ttl) / 2;
    !intermediate.covers(now, config.max_ttl + spare)
}

/// Tells signers apart: the root that signs, or the provided authority by its end.
fn root_name(state: &State, provided: Option<&Provided>) -> String {
    match provided {
        Some(provided) => format!("{:?}", provided.not_after()),
        None => state.signing().to_owned(),
    }
}

fn make(
    config: &AuthorityConfig,
    domain: &TrustDomain,
    store: &dyn RootStore,
    state: &State,
    provided: Option<&Provided>,
    old: Option<&Signing>,
    now: Timestamp,
) -> Result<Signing, KeeperError> {
    let wrong = |source| KeeperError::State { place: store.place(), source };
    let root = root_name(state, provided);
    let life = config.intermediate_ttl;
    let (intermediate, bundle) = match provided {
        Some(provided) => (provided.intermediate(now, life)?, provided.bundle().clone()),
        None => {
            let signer = state.signing_root(domain, now).map_err(wrong)?;
            let certificates = state.certificates().map_err(wrong)?;
            (signer.intermediate(now, life)?, Bundle::from_der(certificates)?)
        }
    };
    if old.is_none_or(|old| old.root != root) {
        tracing::info!(not_after = %intermediate.not_after(), root, "signing with a new intermediate");
    }
    let serving_life = config.max_ttl;
    let (chain, key) = intermediate.issue_server(&config.names, now, serving_life)?;
    let key = rustls::crypto::aws_lc_rs::sign::any_supported_type(&PrivateKeyDer::Pkcs8(key))
        .map_err(|e| KeeperError::Serving(e.to_string()))?;
    let serving_until = now.saturating_add(serving_life).unwrap_or(Timestamp::MAX);
    Ok(Signing {
        root,
        bundle,
        jwt: state.jwt_signer(now).map_err(wrong)?,
        jwt_bundle: state.jwt_bundle().map_err(wrong)?,
        sequence: state.sequence(),
        serving_until: serving_until.min(intermediate.not_after()),
        serving: Arc::new(CertifiedKey::new(chain, key)),
        intermediate,
    })
}

/// The provided authority, when one is configured.
fn read_provided(
    config: &AuthorityConfig,
    domain: &TrustDomain,
    now: Timestamp,
) -> Result<Option<Provided>, KeeperError> {
    let Some(dir) = &config.ca_dir else { return Ok(None) };
    let read = |name: &str, required: bool| {
        let path = dir.join(name);
        match std::fs::read(&path) {
            Ok(content) => Ok(content),
            Err(e) if !required && e.kind() == std::io::ErrorKind::NotFound => Ok(Vec::new()),
            Err(source) => Err(KeeperError::Provided { path, source }),
        }
    };
    let files = provided::ProvidedFiles {
        ca_cert: read(provided::CA_CERT, true)?,
        ca_key: read(provided::CA_KEY, true)?,
        root_cert: read(provided::ROOT_CERT, true)?,
        cert_chain: read(provided::CERT_CHAIN, false)?,
    };
    Ok(Some(Provided::read(&files, domain, now)?))
}
