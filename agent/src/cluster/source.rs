//! Where a World comes from: a directory of manifests or the Kubernetes API.

use std::{sync::Arc, time::Duration};

use jiff::Timestamp;
use tokio::sync::watch;

use super::model::{Ranges, World};
use crate::{policy::istio::ROOT_NAMESPACE, spiffe::TrustDomain};

/// A source of Worlds that runs.
pub trait ClusterSource: Send + Sync + 'static {
    /// The Worlds: every one that is published differs from the one before, and its revision is
    /// one more. Ends with the source.
    fn worlds(&self) -> watch::Receiver<Arc<World>>;

    /// `files` or `kubernetes`.
    fn name(&self) -> &'static str;

    /// The directory, or the API server's address.
    fn location(&self) -> String;

    /// What is watched by itself, with its state at this moment; nothing where all is read at
    /// once.
    fn watches(&self) -> Vec<WatchFacts>;
}

/// What every source needs to know.
#[derive(Clone, Debug)]
pub struct SourceParams {
    /// The cluster's own trust domain.
    pub trust_domain: TrustDomain,
    /// Configured ranges; an empty list falls back to what the cluster declares.
    pub ranges: Ranges,
    /// The namespace whose Istio objects are the mesh's.
    pub root_namespace: Arc<str>,
    /// Where no ALLOW selects and the namespace's label does not say, nothing passes.
    pub default_deny: bool,
    /// How long it must be quiet before a new World is made; about 30 ms.
    pub debounce: Duration,
}

impl SourceParams {
    /// The usual parameters.
    pub fn new(trust_domain: TrustDomain) -> Self {
        Self {
            trust_domain,
            ranges: Ranges::default(),
            root_namespace: ROOT_NAMESPACE.into(),
            default_deny: false,
            debounce: Duration::from_millis(30),
        }
    }
}

/// How far a watch has got.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum WatchState {
    /// No list has been completed yet.
    #[default]
    Waiting,
    /// A list was completed; changes are followed.
    Listed,
    /// The API server knows no such kind: there are none of it.
    Absent,
}

impl WatchState {
    /// Its name, for people and metrics.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Waiting => "waiting",
            Self::Listed => "listed",
            Self::Absent => "absent",
        }
    }
}

/// A watch at one moment.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct WatchFacts {
    /// What is watched, as `Pod (this node)`.
    pub kind: &'static str,
    /// How far it has got.
    pub state: WatchState,
    /// Objects that are known by it.
    pub objects: usize,
    /// Objects that could not be read, of [`Self::objects`].
    pub faulty: usize,
    /// Completed lists since the start.
    pub lists: u64,
    /// Objects that were told by lists and changes since the start.
    pub events: u64,
    /// Lists and watches that failed since the start.
    pub errors: u64,
    /// The last change that was told, or the end of the last list.
    pub last_event: Option<Timestamp>,
    /// When anything, also a bookmark, came from the API server for it.
    pub last_heard: Option<Timestamp>,
    /// Why it does not work at this moment, if it does not; what it told stays in force.
    pub error: Option<Arc<str>>,
}
