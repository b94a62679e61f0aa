//! Where the shared document is kept: a directory or a Secret, behind one trait.

use std::pin::Pin;

use jiff::Timestamp;

use super::state::{State, StateError};
use crate::{api_server::ApiError, spiffe::TrustDomain};

pub mod directory;
pub mod secret;

pub use directory::DirectoryStore;
pub use secret::SecretStore;

/// How often a document is tried to be made, when others make it too.
const ATTEMPTS: usize = 20;

/// A document's version; opaque.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Version(pub(super) String);

/// What is in the store.
pub struct Stored {
    /// The document; `None`: there is none.
    pub document: Option<Vec<u8>>,
    /// Of what is there; `None`: nothing, not even an empty object.
    pub version: Option<Version>,
}

/// Why the store cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StoreError {
    /// The directory.
    #[error(transparent)]
    Directory(#[from] directory::DirectoryError),
    /// The API server.
    #[error(transparent)]
    Api(#[from] ApiError),
    /// The document.
    #[error("{place}: the document {source}")]
    State {
        /// Where.
        place: String,
        /// What is wrong.
        source: StateError,
    },
    /// Others change it all the time.
    #[error("{0}: changes faster than it can be read; look at who else writes there")]
    Busy(String),
}

/// What a store's calls answer.
pub type Answer<'a, T> = Pin<Box<dyn Future<Output = Result<T, StoreError>> + Send + 'a>>;

/// Keeps one document; a write takes effect only in place of the version it was made from.
pub trait RootStore: Send + Sync + 'static {
    /// What is there now.
    fn read(&self) -> Answer<'_, Stored>;

    /// Replaces `version` (`None`: nothing); `None`: somebody else was first.
    fn replace<'a>(
        &'a self,
        document: &'a [u8],
        version: Option<&'a Version>,
    ) -> Answer<'a, Option<Version>>;

    /// Where it is, for messages.
    fn place(&self) -> String;
}

/// The document in the store; made when there is none. All who start at once get the same.
pub async fn open_or_create(
    store: &dyn RootStore,
    domain: &TrustDomain,
    provided: bool,
    now: Timestamp,
) -> Result<(State, Version), StoreError> {
    let wrong = |source| StoreError::State { place: store.place(), source };
    for _ in 0..ATTEMPTS {
        let stored = store.read().await?;
        if let (Some(document), Some(version)) = (stored.document, &stored.version) {
            let state = State::read(&document, domain, now).map_err(wrong)?;
            return Ok((state, version.clone()));
        }
        let state =
            if provided { State::without_root(domain, now) } else { State::create(domain, now) };
        let state = state.map_err(wrong)?;
        if let Some(version) = store.replace(&state.write(), stored.version.as_ref()).await? {
            tracing::info!(place = %store.place(), root = state.signing(), "new root made");
            return Ok((state, version));
        }
        // Another replica was first: its root is the root.
    }
    Err(StoreError::Busy(store.place()))
}
