//! Who issues JWT-SVIDs.

use std::{future::Future, pin::Pin, sync::Arc, time::Duration};

use tokio::sync::watch;

use super::IssueError;
use crate::spiffe::{JwtBundle, SpiffeId};

/// An authority that signs JWT-SVIDs for this node's pods. An authority that only has Istio's
/// CA API has no such thing.
pub trait JwtIssuer: Send + Sync + 'static {
    /// Signs a token for the request's identity and audiences; answers its compact form.
    fn issue_jwt<'a>(&'a self, request: &'a JwtRequest) -> JwtFuture<'a>;

    /// The keys that verify the tokens of the authority's own trust domain, followed: a key is
    /// in it before it signs first.
    fn jwt_bundle(&self) -> watch::Receiver<Arc<JwtBundle>>;

    /// False once it is known that the authority has no such thing.
    fn issues_jwts(&self) -> bool {
        true
    }
}

/// What [`JwtIssuer::issue_jwt`] answers.
pub type JwtFuture<'a> = Pin<Box<dyn Future<Output = Result<String, IssueError>> + Send + 'a>>;

/// A request for a JWT-SVID.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct JwtRequest {
    /// The identity, of the authority's trust domain.
    pub id: SpiffeId,
    /// Whom the token is for; not empty.
    pub audiences: Vec<String>,
    /// How long it should be valid; the authority may give less. `None`: the authority's own.
    pub ttl: Option<Duration>,
}
