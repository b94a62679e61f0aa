//! The keys of end users' issuers, fetched and kept fresh: the [`KeyRing`] of this node.
//!
//! Keys are fetched over HTTPS as soon as a pod of the node wants them, and again every
//! [`Rhythm::refresh`]. A server that is away takes nothing: what was fetched last stays. A
//! token with an unknown key asks for them at once, but not more often than
//! [`Rhythm::least`], whatever clients send.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use arc_swap::ArcSwap;
use http::Uri;
use serde::Deserialize;
use tokio::{
    sync::{Notify, watch},
    task::JoinHandle,
    time::{sleep, timeout},
};

use super::endpoint::{EndpointError, Verify, fetch};
use crate::policy::end_user::{IssuerKeys, KeyRing, KeySource, KeysError};

/// The largest file of authorities.
const MAX_ROOTS: u64 = 1 << 20;

/// How often keys are fetched.
#[derive(Clone, Copy, Debug)]
pub struct Rhythm {
    /// Between two fetches that went well.
    pub refresh: Duration,
    /// After one that failed; doubled with each until [`Rhythm::refresh`].
    pub retry: Duration,
    /// Between two fetches in any case.
    pub least: Duration,
}

impl Default for Rhythm {
    /// Istio's 20 minutes.
    fn default() -> Self {
        Self {
            refresh: Duration::from_secs(20 * 60),
            retry: Duration::from_secs(5),
            least: Duration::from_secs(5),
        }
    }
}

/// Where keys are fetched from.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Place {
    /// At this URL.
    Url(Arc<str>),
    /// Where the OpenID Connect configuration of this issuer says.
    Discovery(Arc<str>),
}

impl Place {
    /// The place of a source that is fetched.
    pub fn of(source: &KeySource) -> Option<Self> {
        match source {
            KeySource::Url(url) => Some(Self::Url(url.clone())),
            KeySource::Discovery(issuer) => Some(Self::Discovery(issuer.clone())),
            KeySource::Inline(_) | KeySource::Unreadable => None,
        }
    }
}

impl std::fmt::Display for Place {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Url(url) => f.write_str(url),
            Self::Discovery(issuer) => write!(f, "issuer {issuer}"),
        }
    }
}

/// The keys that are at hand. Readers never block.
#[derive(Default)]
pub struct Issuers {
    keys: ArcSwap<BTreeMap<Place, Arc<IssuerKeys>>>,
    places: Mutex<BTreeMap<Place, Standing>>,
}

/// A place that is followed.
#[derive(Default)]
struct Standing {
    missed: Arc<Notify>,
    problem: Option<String>,
}

impl Issuers {
    /// Why the newest keys are not at hand, by place; for `signet status`.
    pub fn problems(&self) -> Vec<(Place, String)> {
        let places = self.places();
        let with = |(place, standing): (&Place, &Standing)| {
            Some((place.clone(), standing.problem.clone()?))
        };
        places.iter().filter_map(with).collect()
    }

    fn places(&self) -> MutexGuard<'_, BTreeMap<Place, Standing>> {
        // A panic under the lock leaves a whole map behind.
        self.places.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Sets what was fetched from a place that is still followed.
    fn set(&self, place: &Place, keys: Arc<IssuerKeys>) {
        // Held meanwhile, so that a place that is given up cannot come back.
        let mut places = self.places();
        let Some(standing) = places.get_mut(place) else { return };
        standing.problem = None;
        self.keys.rcu(|held| {
            let mut held = BTreeMap::clone(held);
            held.insert(place.clone(), keys.clone());
            held
        });
    }

    /// Notes a failure; true when it is another than the last.
    fn fail(&self, place: &Place, message: String) -> bool {
        let mut places = self.places();
        let Some(standing) = places.get_mut(place) else { return false };
        let is_new = standing.problem.as_ref() != Some(&message);
        standing.problem = Some(message);
        is_new
    }

    fn forget(&self, place: &Place) {
        let mut places = self.places();
        places.remove(place);
        self.keys.rcu(|held| {
            let mut held = BTreeMap::clone(held);
            held.remove(place);
            held
        });
    }
}

impl KeyRing for Issuers {
    fn keys(&self, source: &KeySource) -> Option<Arc<IssuerKeys>> {
        self.keys.load().get(&Place::of(source)?).cloned()
    }

    fn miss(&self, source: &KeySource) {
        if let Some(place) = Place::of(source)
            && let Some(standing) = self.places().get(&place)
        {
            // Kept until the follower asks, so that no miss is lost and many are one.
            standing.missed.notify_one();
        }
    }
}

/// Follows the places that `wanted` names until its sender is gone. `roots` is a PEM file of
/// web authorities that count besides the system's.
pub async fn run(
    issuers: Arc<Issuers>,
    mut wanted: watch::Receiver<BTreeSet<Place>>,
    roots: Option<PathBuf>,
    rhythm: Rhythm,
) {
    let mut followed: BTreeMap<Place, Following> = BTreeMap::new();
    loop {
        let places = wanted.borrow_and_update().clone();
        followed.retain(|place, _| {
            let kept = places.contains(place);
            if !kept {
                issuers.forget(place);
            }
            kept
        });
        for place in places {
            followed.entry(place).or_insert_with_key(|place| {
                let missed = Arc::new(Notify::new());
                let standing = Standing { missed: missed.clone(), problem: None };
                issuers.places().insert(place.clone(), standing);
                let follower = Follower {
                    place: place.clone(),
                    issuers: issuers.clone(),
                    missed,
                    roots: roots.clone(),
                    rhythm,
                };
                Following(tokio::spawn(follower.run()))
            });
        }
        if wanted.changed().await.is_err() {
            return;
        }
    }
}

/// A place's task, ended when dropped.
struct Following(JoinHandle<()>);

impl Drop for Following {
    fn drop(&mut self) {
        self.0.abort();
    }
}

struct Follower {
    place: Place,
    issuers: Arc<Issuers>,
    missed: Arc<Notify>,
    roots: Option<PathBuf>,
    rhythm: Rhythm,
}

/// Why there are no new keys.
#[derive(Debug, thiserror::Error)]
enum FetchError {
    #[error("{path}: {source}; jwksRoots names it")]
    Roots { path: String, source: std::io::Error },
    #[error("{path}: more than {MAX_ROOTS} bytes; jwksRoots names it")]
    RootsTooLarge { path: String },
    #[error("{url:?} is not a URL")]
    Url { url: String },
    #[error(transparent)]
    Endpoint(Box<EndpointError>),
    #[error("{url}: {source}")]
    Keys { url: Uri, source: KeysError },
    #[error("{url}: {why}")]
    Configuration { url: Uri, why: String },
}

/// What counts of an OpenID Connect configuration (OpenID Connect Discovery 1.0, section 3).
#[derive(Deserialize)]
struct Configuration {
    issuer: String,
    jwks_uri: String,
}

impl Follower {
    async fn run(self) {
        let mut retry = self.rhythm.retry;
        loop {
            let wait = match self.fetch().await {
                Ok(keys) => {
                    retry = self.rhythm.retry;
                    self.issuers.set(&self.place, Arc::new(keys));
                    self.rhythm.refresh
                }
                Err(error) => {
                    let mut message = error.to_string();
                    let mut source = std::error::Error::source(&error);
                    while let Some(cause) = source {
                        if !message.contains(&cause.to_string()) {
                            message = format!("{message}: {cause}");
                        }
                        source = cause.source();
                    }
                    if self.issuers.fail(&self.place, message.clone()) {
                        tracing::warn!(place = %self.place, error = message, "keys not fetched");
                    }
                    let wait = retry;
                    retry = (retry * 2).min(self.rhythm.refresh);
                    wait
                }
            };
            let least = self.rhythm.least.min(wait);
            sleep(least).await;
            // A token with an unknown key, or the time.
            let _ = timeout(wait - least, self.missed.notified()).await;
        }
    }

    async fn fetch(&self) -> Result<IssuerKeys, FetchError> {
        let more = match &self.roots {
            Some(path) => Some(read_roots(path).await?),
            None => None,
        };
        let get = async |url: &Uri| {
            let verify = Verify::WebAnd { more: more.clone() };
            fetch(url, verify).await.map_err(|error| FetchError::Endpoint(Box::new(error)))
        };
        let url = match &self.place {
            Place::Url(url) => https(url)?,
            Place::Discovery(issuer) => {
                let bare = issuer.trim_end_matches('/');
                let url = https(&format!("{bare}/.well-known/openid-configuration"))?;
                let document = get(&url).await?;
                let wrong = |why: String| FetchError::Configuration { url: url.clone(), why };
                let said: Configuration = serde_json::from_slice(&document).map_err(|error| {
                    wrong(format!("it is not an OpenID Connect configuration ({error})"))
                })?;
                // Section 4.3: whoever answers speaks for this issuer and no other.
                if said.issuer != **issuer {
                    return Err(wrong(format!("it is the configuration of {:?}", said.issuer)));
                }
                https(&said.jwks_uri)?
            }
        };
        let document = get(&url).await?;
        IssuerKeys::decode(&document).map_err(|source| FetchError::Keys { url, source })
    }
}

fn https(url: &str) -> Result<Uri, FetchError> {
    url.parse::<Uri>()
        .ok()
        .filter(|url| url.scheme_str() == Some("https"))
        .ok_or_else(|| FetchError::Url { url: url.to_owned() })
}

async fn read_roots(path: &Path) -> Result<Vec<u8>, FetchError> {
    let shown = || path.display().to_string();
    let failed = |source| FetchError::Roots { path: shown(), source };
    if tokio::fs::metadata(path).await.map_err(failed)?.len() > MAX_ROOTS {
        return Err(FetchError::RootsTooLarge { path: shown() });
    }
    tokio::fs::read(path).await.map_err(failed)
}

#[cfg(test)]
mod tests;
