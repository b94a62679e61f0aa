//! Whose token it is, and whether that user may see flows: asked of the API server, remembered
//! for a moment.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use aws_lc_rs::digest::{SHA256, digest};
use tokio::sync::Semaphore;

use crate::{
    api_server::{ApiError, ApiServer, Right},
    spiffe::{SpiffeId, validate::ValidationError},
};

/// The one audience of tokens that are taken: a token for anything else proves nothing here, and
/// one of this audience opens nothing else.
pub const AUDIENCE: &str = "signet.dev/observer";

/// What its user must be allowed to do, as RBAC says it.
pub fn right() -> Right {
    Right::of("get", "signet.dev", "flows")
}

/// A good token is asked about again after this: so long a withdrawn right goes on.
const GOOD_FOR: Duration = Duration::from_secs(30);
/// A bad one after this: it may be made good meanwhile.
const BAD_FOR: Duration = Duration::from_secs(5);
/// Tokens that are remembered.
const MAX_KNOWN: usize = 1024;
/// The longest token, bytes.
const MAX_TOKEN: usize = 16 * 1024;
/// Questions to the API server at the same time.
const MAX_REVIEWS: usize = 4;
/// Failed tries at once, and a second in the long run; beyond, the API server is asked nothing.
const MAX_FAILURES: f64 = 20.0;
const FAILURES_PER_SECOND: f64 = 2.0;

/// Why a caller is not let in.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Refused {
    /// The call carries none.
    #[error("a bearer token of the audience {AUDIENCE} is wanted")]
    NoToken,
    /// It has neither a certificate nor a token, and tokens would not help.
    #[error("a client certificate of one of observerClients is wanted")]
    NoCertificate,
    /// It has a certificate of somebody who may not, and no token.
    #[error("{0} is not one of observerClients, and the call carries no bearer token")]
    NotListed(SpiffeId),
    /// Its certificate was good when it connected.
    #[error("the client certificate is not good any more: {0}; connect again with a new one")]
    Certificate(#[source] ValidationError),
    /// There is nobody to ask.
    #[error(
        "bearer tokens are not taken here: this agent does not follow the Kubernetes API, which would review them; show a client certificate of one of observerClients"
    )]
    NoReviews,
    /// It can be nobody's.
    #[error("the bearer token is malformed")]
    Malformed,
    /// The API server does not know it, or it is for something else, or it has run out.
    #[error("the token is not valid for the audience {AUDIENCE}")]
    Unknown,
    /// Its user may not.
    #[error("{0} may not get flows.signet.dev: bind the ClusterRole signet-viewer to it")]
    NotAllowed(Arc<str>),
    /// Too many tries failed.
    #[error("too many tries with bad tokens on this node; try again in a moment")]
    TooMany,
    /// The API server was asked in vain.
    #[error("the agent cannot have the token reviewed: {0}")]
    NotReviewed(#[source] Arc<ApiError>),
}

/// Judges callers by their tokens.
pub struct Callers {
    api: ApiServer,
    reviews: Semaphore,
    memory: Mutex<Memory>,
}

impl Callers {
    /// Judges by what this API server says.
    pub fn new(api: ApiServer) -> Self {
        let memory = Mutex::new(Memory::new(Instant::now()));
        Self { api, reviews: Semaphore::new(MAX_REVIEWS), memory }
    }

    /// The user's name.
    ///
    /// # Errors
    /// Who is not let in, and why.
    pub async fn check(&self, token: &str) -> Result<Arc<str>, Refused> {
        if token.is_empty()
            || token.len() > MAX_TOKEN
            || !token.bytes().all(|b| b.is_ascii_graphic())
        {
            return Err(Refused::Malformed);
        }
        // The token itself is kept nowhere.
        let key = Key::of(token);
        if let Some(known) = self.memory().known(&key, Instant::now()) {
            return known.outcome();
        }
        // Semaphores here are never closed.
        let _turn = self.reviews.acquire().await.map_err(|_| Refused::TooMany)?;
        {
            let mut memory = self.memory();
            // Somebody with the same token may have been quicker.
            if let Some(known) = memory.known(&key, Instant::now()) {
                return known.outcome();
            }
            if !memory.may_try(Instant::now()) {
                return Err(Refused::TooMany);
            }
        }
        let verdict = self.review(token).await?;
        match &verdict {
            Verdict::Good(user) => tracing::debug!(%user, "a viewer is let in"),
            Verdict::NotAllowed(user) => tracing::warn!(%user, "a viewer is refused: no right"),
            Verdict::Unknown => tracing::warn!("a viewer is refused: its token is not valid"),
        }
        self.memory().remember(key, verdict.clone(), Instant::now());
        verdict.outcome()
    }

    async fn review(&self, token: &str) -> Result<Verdict, Refused> {
        let down = |error| Refused::NotReviewed(Arc::new(error));
        let Some(user) = self.api.review_token(token, AUDIENCE).await.map_err(down)? else {
            return Ok(Verdict::Unknown);
        };
        let is_allowed = self.api.may(&user, &right()).await.map_err(down)?;
        let name = user.username.as_str().into();
        Ok(if is_allowed { Verdict::Good(name) } else { Verdict::NotAllowed(name) })
    }

    fn memory(&self) -> MutexGuard<'_, Memory> {
        self.memory.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl std::fmt::Debug for Callers {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Callers").finish_non_exhaustive()
    }
}

/// A token's digest.
#[derive(Clone, PartialEq, Eq, Hash)]
struct Key([u8; 32]);

impl Key {
    fn of(token: &str) -> Self {
        let mut key = [0; 32];
        for (to, from) in key.iter_mut().zip(digest(&SHA256, token.as_bytes()).as_ref()) {
            *to = *from;
        }
        Self(key)
    }
}

/// What the API server said.
#[derive(Clone, PartialEq, Eq, Debug)]
enum Verdict {
    Good(Arc<str>),
    NotAllowed(Arc<str>),
    Unknown,
}

impl Verdict {
    fn outcome(self) -> Result<Arc<str>, Refused> {
        match self {
            Self::Good(user) => Ok(user),
            Self::NotAllowed(user) => Err(Refused::NotAllowed(user)),
            Self::Unknown => Err(Refused::Unknown),
        }
    }
}

/// Verdicts of the last moments, and how many tries failed.
struct Memory {
    known: HashMap<Key, (Verdict, Instant)>,
    tries: f64,
    at: Instant,
}

impl Memory {
    fn new(now: Instant) -> Self {
        Self { known: HashMap::new(), tries: MAX_FAILURES, at: now }
    }

    fn known(&self, key: &Key, now: Instant) -> Option<Verdict> {
        let (verdict, until) = self.known.get(key)?;
        (now < *until).then(|| verdict.clone())
    }

    fn may_try(&mut self, now: Instant) -> bool {
        let passed = now.saturating_duration_since(self.at).as_secs_f64();
        self.tries = (self.tries + passed * FAILURES_PER_SECOND).min(MAX_FAILURES);
        self.at = now;
        self.tries >= 1.0
    }

    fn remember(&mut self, key: Key, verdict: Verdict, now: Instant) {
        let is_good = matches!(verdict, Verdict::Good(_));
        if !is_good {
            self.tries -= 1.0;
        }
        if self.known.len() >= MAX_KNOWN {
            self.known.retain(|_, (_, until)| now < *until);
        }
        if self.known.len() >= MAX_KNOWN {
            // What would go first anyway: a flood of bad tokens does not push good ones out.
            let soonest = self.known.iter().min_by_key(|(_, (_, until))| *until);
            if let Some(soonest) = soonest.map(|(key, _)| key.clone()) {
                self.known.remove(&soonest);
            }
        }
        let until = now + if is_good { GOOD_FOR } else { BAD_FOR };
        self.known.insert(key, (verdict, until));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn good() -> Verdict {
        Verdict::Good("viewer".into())
    }

    #[test]
    fn verdicts_are_remembered_for_a_moment_only() {
        let start = Instant::now();
        let mut memory = Memory::new(start);
        memory.remember(Key::of("a"), good(), start);
        memory.remember(Key::of("b"), Verdict::Unknown, start);
        let at = |seconds| start + Duration::from_secs(seconds);
        assert_eq!(memory.known(&Key::of("a"), at(29)), Some(good()));
        assert_eq!(memory.known(&Key::of("a"), at(30)), None);
        assert_eq!(memory.known(&Key::of("b"), at(4)), Some(Verdict::Unknown));
        assert_eq!(memory.known(&Key::of("b"), at(5)), None);
        assert_eq!(memory.known(&Key::of("c"), at(0)), None);
    }

    #[test]
    fn failures_run_out_and_successes_do_not() {
        let start = Instant::now();
        let mut memory = Memory::new(start);
        for n in 0..100 {
            assert!(memory.may_try(start));
            memory.remember(Key::of(&n.to_string()), good(), start);
        }
        for n in 0..20 {
            assert!(memory.may_try(start), "{n}");
            memory.remember(Key::of(&n.to_string()), Verdict::Unknown, start);
        }
        assert!(!memory.may_try(start));
        assert!(!memory.may_try(start + Duration::from_millis(400)));
        assert!(memory.may_try(start + Duration::from_millis(600)));
        assert!(memory.may_try(start + Duration::from_secs(3600)));
        assert!(memory.tries <= MAX_FAILURES, "{}", memory.tries);
    }

    #[test]
    fn memory_is_bounded_and_a_flood_of_bad_tokens_pushes_no_good_one_out() {
        let start = Instant::now();
        let mut memory = Memory::new(start);
        memory.remember(Key::of("good"), good(), start);
        for n in 0..2 * MAX_KNOWN {
            memory.remember(Key::of(&n.to_string()), Verdict::Unknown, start);
        }
        assert_eq!(memory.known.len(), MAX_KNOWN);
        assert_eq!(memory.known(&Key::of("good"), start), Some(good()));
    }
}
