//! `signet authority rotate-root`: begins a rotation in the shared document and follows it. The
//! replicas that run take its steps.

use std::{collections::BTreeSet, time::Duration};

use jiff::Timestamp;
use tokio::time::{self, Instant};

use super::{
    AuthorityError, KeeperError, Surroundings, runtime,
    state::{Phase, State},
    store::{RootStore, Version},
};
use crate::{config::authority::AuthorityConfig, spiffe::TrustDomain};

/// How often the document is looked at.
const POLL: Duration = Duration::from_millis(500);

/// How a rotation ended, as far as was waited for.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Outcome {
    /// The old root is gone.
    Done,
    /// Time ran out; the rotation goes on by itself.
    Waiting {
        /// What it waits for.
        phase: Phase,
        /// Nodes that have not reported the new bundle.
        laggards: Vec<String>,
    },
}

/// Begins a rotation, or joins the one in progress, and follows it for at most `timeout`;
/// `say` gets a line for each step.
pub fn run(
    config: &AuthorityConfig,
    excluded: BTreeSet<String>,
    timeout: Duration,
    say: impl Fn(&str),
) -> Result<Outcome, AuthorityError> {
    runtime()?.block_on(follow(config, excluded, timeout, say))
}

async fn follow(
    config: &AuthorityConfig,
    excluded: BTreeSet<String>,
    timeout: Duration,
    say: impl Fn(&str),
) -> Result<Outcome, AuthorityError> {
    let deadline = Instant::now() + timeout;
    let Surroundings { domain, store, pods, .. } = Surroundings::open(config).await?;
    let first = begin(&*store, &domain, &excluded).await?;
    let mut shown = String::new();
    let mut state = first;
    loop {
        let Some(rotation) = state.rotation() else {
            say("done: the old root is out of the bundle");
            return Ok(Outcome::Done);
        };
        let laggards = match rotation.phase {
            Phase::Published => rotation.laggards(&pods.ready_nodes().await?),
            Phase::Signing => Vec::new(),
        };
        let line = match rotation.phase {
            Phase::Published if laggards.is_empty() => format!(
                "published: every node has the new root; it signs two refresh hints after {}",
                rotation.since
            ),
            Phase::Published => format!(
                "published: waiting for {} node(s) to report the new bundle: {}",
                laggards.len(),
                laggards.join(", ")
            ),
            Phase::Signing => format!(
                "signing: the new root signs since {}; the old one retires after the longest TTL",
                rotation.since
            ),
        };
        if line != shown {
            say(&line);
            shown = line;
        }
        if Instant::now() >= deadline {
            return Ok(Outcome::Waiting { phase: rotation.phase, laggards });
        }
        time::sleep(POLL.min(deadline.saturating_duration_since(Instant::now()))).await;
        state = read(&*store, &domain).await?.0;
    }
}

async fn begin(
    store: &dyn RootStore,
    domain: &TrustDomain,
    excluded: &BTreeSet<String>,
) -> Result<State, AuthorityError> {
    loop {
        let (state, version) = read(store, domain).await?;
        let next = state
            .begin_rotation(domain, excluded, Timestamp::now())
            .map_err(|source| KeeperError::State { place: store.place(), source })?;
        if next == state || store.replace(&next.write(), Some(&version)).await?.is_some() {
            return Ok(next);
        }
        // A replica took a step meanwhile.
    }
}

async fn read(
    store: &dyn RootStore,
    domain: &TrustDomain,
) -> Result<(State, Version), AuthorityError> {
    let stored = store.read().await?;
    let (Some(document), Some(version)) = (stored.document, stored.version) else {
        return Err(AuthorityError::NoDocument(store.place()));
    };
    let state = State::read(&document, domain, Timestamp::now())
        .map_err(|source| KeeperError::State { place: store.place(), source })?;
    Ok((state, version))
}
