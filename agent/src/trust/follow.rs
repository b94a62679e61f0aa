//! Follows the bundles of foreign trust domains (SPIFFE Federation, sections 4 and 5).
//!
//! A source that fails changes nothing: what was read last stays trusted. A domain that is
//! taken out of the federation is distrusted at once.

use std::{
    collections::BTreeMap,
    io,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use tokio::{sync::watch, task::JoinHandle, time::sleep};

use super::{
    Trust,
    endpoint::{self, EndpointError, Verify},
    federation::{BundleSource, Federation},
};
use crate::spiffe::{
    Bundle, JwtBundle, TrustDomain,
    bundle::BundleError,
    jwks::{JwksError, SpiffeBundle},
};

/// How often a file is read.
const FILE_EVERY: Duration = Duration::from_secs(1);
/// Between two looks at an endpoint whose bundle gives no hint.
const DEFAULT_HINT: Duration = Duration::from_secs(300);
/// Hints beyond these are taken for them.
const HINTS: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(3600));
/// After the first failure; doubles up to the hint.
const FIRST_RETRY: Duration = Duration::from_secs(1);
/// Largest file of a bundle.
const MAX_FILE: u64 = 1 << 20;

/// Why a foreign bundle was not read.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum FollowError {
    /// A file cannot be read.
    #[error("{}: cannot be read ({source}); what was read last stays trusted", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A file is too large.
    #[error("{}: more than {MAX_FILE} bytes; is it a bundle?", .0.display())]
    TooLarge(PathBuf),
    /// A document is no SPIFFE bundle.
    #[error("{place}: {source}")]
    Jwks {
        /// File or URL.
        place: String,
        /// What is wrong.
        source: JwksError,
    },
    /// A PEM file is no bundle.
    #[error("{place}: {source}")]
    Pem {
        /// The file.
        place: String,
        /// What is wrong.
        source: BundleError,
    },
    /// The endpoint did not answer with a document.
    #[error(transparent)]
    Endpoint(Box<EndpointError>),
    /// Nobody vouches for the endpoint yet.
    #[error("there is no bundle of {0} that could verify the endpoint; name one as bootstrap")]
    NoBootstrap(TrustDomain),
}

/// What goes wrong, by domain; for `status`.
pub type Failures = BTreeMap<TrustDomain, String>;

/// Follows what `federation` says until its sender is gone.
pub async fn run(
    trust: Arc<Trust>,
    mut federation: watch::Receiver<Arc<Federation>>,
    failures: watch::Sender<Failures>,
) {
    let failures = Arc::new(failures);
    let mut followed: BTreeMap<TrustDomain, (BundleSource, Following)> = BTreeMap::new();
    loop {
        let wanted = federation.borrow_and_update().clone();
        followed.retain(|domain, (source, following)| {
            let kept = wanted.domains.get(domain) == Some(source);
            if !kept {
                // First: its task may be about to set what it has read.
                following.end();
            }
            if !wanted.domains.contains_key(domain) {
                tracing::info!(trust_domain = %domain, "federated no longer");
                trust.remove(domain);
            }
            if !kept {
                failures.send_if_modified(|all| all.remove(domain).is_some());
            }
            kept
        });
        for (domain, source) in &wanted.domains {
            if !followed.contains_key(domain) {
                let following = Following::start(domain, source, &trust, &failures);
                followed.insert(domain.clone(), (source.clone(), following));
            }
        }
        if federation.changed().await.is_err() {
            return;
        }
    }
}

/// A domain's task, ended when dropped; once it is, nothing is set any more.
struct Following {
    task: JoinHandle<()>,
    live: Arc<Mutex<bool>>,
}

impl Following {
    fn start(
        domain: &TrustDomain,
        source: &BundleSource,
        trust: &Arc<Trust>,
        failures: &Arc<watch::Sender<Failures>>,
    ) -> Self {
        let live = Arc::new(Mutex::new(true));
        let follower = Follower {
            domain: domain.clone(),
            source: source.clone(),
            trust: trust.clone(),
            failures: failures.clone(),
            live: live.clone(),
            last: None,
        };
        Self { task: tokio::spawn(follower.run()), live }
    }
}

impl Following {
    /// Ends the task; what it holds by then is not set any more. (Aborting alone takes effect
    /// at the task's next pause.)
    fn end(&self) {
        *self.live.lock().unwrap_or_else(PoisonError::into_inner) = false;
        self.task.abort();
    }
}

impl Drop for Following {
    fn drop(&mut self) {
        self.end();
    }
}

struct Follower {
    domain: TrustDomain,
    source: BundleSource,
    trust: Arc<Trust>,
    failures: Arc<watch::Sender<Failures>>,
    live: Arc<Mutex<bool>>,
    /// What was read last.
    last: Option<Vec<u8>>,
}

impl Follower {
    async fn run(mut self) {
        let (mut hint, mut retry) = (DEFAULT_HINT, FIRST_RETRY);
        loop {
            let read = self.read().await;
            self.note(read.is_ok());
            let wait = match read {
                Ok(new) => {
                    retry = FIRST_RETRY;
                    if let Some(found) = new {
                        hint = found.unwrap_or(DEFAULT_HINT).clamp(HINTS.0, HINTS.1);
                    }
                    self.failures.send_if_modified(|all| all.remove(&self.domain).is_some());
                    hint
                }
                Err(error) => {
                    self.report(&error);
                    let wait = retry;
                    retry = (retry * 2).min(hint);
                    wait
                }
            };
            sleep(if matches!(self.source, BundleSource::File(_)) { FILE_EVERY } else { wait })
                .await;
        }
    }

    /// Reads the source; the hint of a new bundle, `None` for the one that was read before.
    async fn read(&mut self) -> Result<Option<Option<Duration>>, FollowError> {
        let (place, document) = match &self.source {
            BundleSource::File(path) => (path.display().to_string(), read_file(path).await?),
            BundleSource::Web { url, roots } => {
                let roots = match roots {
                    Some(path) => Some(read_file(path).await?),
                    None => None,
                };
                let verify = Verify::Web { roots };
                (url.to_string(), fetch(url, verify).await?)
            }
            BundleSource::Spiffe { url, id, bootstrap } => {
                let bundle = match (self.trust.bundle(&id.trust_domain()), bootstrap) {
                    (Some(bundle), _) => bundle,
                    (None, Some(path)) => {
                        let document = read_file(path).await?;
                        Arc::new(parse(&path.display().to_string(), &document)?.x509)
                    }
                    (None, None) => return Err(FollowError::NoBootstrap(id.trust_domain())),
                };
                let verify = Verify::Spiffe { id: id.clone(), bundle };
                (url.to_string(), fetch(url, verify).await?)
            }
        };
        if self.last.as_ref() == Some(&document) {
            return Ok(None);
        }
        let bundle = parse(&place, &document)?;
        let hint = bundle.refresh_hint;
        self.set(bundle);
        self.last = Some(document);
        Ok(Some(hint))
    }

    fn set(&self, bundle: SpiffeBundle) {
        let live = self.live.lock().unwrap_or_else(PoisonError::into_inner);
        if !*live {
            return;
        }
        let roots = bundle.x509.certificates().len();
        let x509 = self.trust.set(self.domain.clone(), bundle.x509);
        let jwt = self.trust.set_jwt(self.domain.clone(), Arc::new(bundle.jwt));
        if x509 || jwt {
            tracing::info!(trust_domain = %self.domain, roots, "foreign bundle read");
        }
    }

    /// Counts the look, unless the domain is followed no longer.
    fn note(&self, good: bool) {
        let live = self.live.lock().unwrap_or_else(PoisonError::into_inner);
        if *live {
            self.trust.note_refresh(&self.domain, good);
        }
    }

    fn report(&self, error: &FollowError) {
        let mut message = error.to_string();
        let mut source = std::error::Error::source(error);
        while let Some(cause) = source {
            let cause_text = cause.to_string();
            if !message.contains(&cause_text) {
                message = format!("{message}: {cause_text}");
            }
            source = cause.source();
        }
        let new = self.failures.send_if_modified(|all| {
            all.insert(self.domain.clone(), message.clone()).as_ref() != Some(&message)
        });
        if new {
            tracing::warn!(trust_domain = %self.domain, error = message, "foreign bundle not read");
        }
    }
}

async fn fetch(url: &http::Uri, verify: Verify) -> Result<Vec<u8>, FollowError> {
    endpoint::fetch(url, verify).await.map_err(|e| FollowError::Endpoint(Box::new(e)))
}

/// JWKS where it begins like JSON, else PEM.
fn parse(place: &str, document: &[u8]) -> Result<SpiffeBundle, FollowError> {
    if document.trim_ascii_start().starts_with(b"{") {
        return SpiffeBundle::decode(document)
            .map_err(|source| FollowError::Jwks { place: place.to_owned(), source });
    }
    let x509 = Bundle::from_pem(document)
        .map_err(|source| FollowError::Pem { place: place.to_owned(), source })?;
    Ok(SpiffeBundle { x509, jwt: JwtBundle::new(), sequence: None, refresh_hint: None })
}

async fn read_file(path: &Path) -> Result<Vec<u8>, FollowError> {
    let failed = |source| FollowError::File { path: path.to_owned(), source };
    let length = tokio::fs::metadata(path).await.map_err(failed)?.len();
    if length > MAX_FILE {
        return Err(FollowError::TooLarge(path.to_owned()));
    }
    tokio::fs::read(path).await.map_err(failed)
}

#[cfg(test)]
mod tests;
