//! What both services share: who may have which identity, for how long, and the audit log.

use std::{net::SocketAddr, sync::Arc, time::Duration};

use arc_swap::ArcSwap;
use tonic::{Code, Status};

use super::{
    authorize::{Denied, authorize},
    callers::Caller,
    keeper::Signing,
    metrics::AuthorityMetrics,
    pods::PodDirectory,
};
use crate::{
    api_server::ApiError,
    ca::{CaError, CsrError},
    spiffe::{SpiffeId, SpiffeIdError, TrustDomain, jwt::JwtSignerError},
};

/// The shortest validity that may be asked for.
const SHORTEST: Duration = Duration::from_secs(5);

/// The target of audit lines.
pub const AUDIT: &str = "signet::audit";

/// Everything that an answer is made from.
pub struct Authority {
    /// The trust domain that is signed for.
    pub domain: TrustDomain,
    /// Who is where.
    pub pods: Arc<dyn PodDirectory>,
    /// What is signed with.
    pub signing: Arc<ArcSwap<Signing>>,
    /// Counts what is audited.
    pub metrics: AuthorityMetrics,
}

/// Why a request of a known caller is refused.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Refusal {
    /// The request names no identity.
    #[error("{0}")]
    Request(String),
    /// What it names is none.
    #[error("the requested identity is not a SPIFFE ID: {0}")]
    Identity(#[from] SpiffeIdError),
    /// The validity is out of bounds.
    #[error("a validity of {asked} s is not from {} s to {} s", SHORTEST.as_secs(), longest.as_secs())]
    Ttl {
        /// As asked.
        asked: i64,
        /// The longest allowed.
        longest: Duration,
    },
    /// The certificate request.
    #[error(transparent)]
    Csr(#[from] CsrError),
    /// The node may not have it.
    #[error(transparent)]
    Denied(#[from] Denied),
    /// It is not known which pods there are.
    #[error("it is not known which pods are on the node: {0}")]
    Pods(#[from] ApiError),
    /// Signing failed.
    #[error(transparent)]
    Sign(#[from] CaError),
    /// Signing a token failed.
    #[error(transparent)]
    Token(#[from] JwtSignerError),
}

impl Refusal {
    /// The gRPC code, as Istio's API has them; a refused identity is told as such.
    pub const fn code(&self) -> Code {
        match self {
            Self::Request(_) | Self::Identity(_) | Self::Ttl { .. } | Self::Csr(_) => {
                Code::InvalidArgument
            }
            Self::Denied(_) => Code::PermissionDenied,
            Self::Pods(_) => Code::Unavailable,
            Self::Sign(CaError::PublicKey(_)) => Code::InvalidArgument,
            Self::Sign(_) | Self::Token(_) => Code::Internal,
        }
    }

    /// A short stable name, for the audit log.
    pub const fn kind(&self) -> &'static str {
        match self {
            Self::Request(_) => "request",
            Self::Identity(_) => "not_a_spiffe_id",
            Self::Ttl { .. } => "ttl",
            Self::Csr(_) => "csr",
            Self::Denied(denied) => denied.kind(),
            Self::Pods(_) => "pods_unknown",
            Self::Sign(_) | Self::Token(_) => "signing_failed",
        }
    }
}

/// Who asked, from where, for what: the beginning of an audit line.
pub struct Asked<'a> {
    /// Who is asked.
    pub authority: &'a Authority,
    /// The method.
    pub method: &'static str,
    /// The caller.
    pub caller: &'a Caller,
    /// Where the connection comes from.
    pub peer: Option<SocketAddr>,
    /// The identity, as written in the request; may be empty.
    pub identity: &'a str,
}

impl Asked<'_> {
    /// Notes the refusal and makes the answer of it.
    pub fn refused(&self, refusal: &Refusal) -> Status {
        self.authority.metrics.audit("refused", self.method, refusal.kind());
        let identity = crate::spiffe::id::Excerpt::new(self.identity);
        tracing::warn!(
            target: AUDIT,
            outcome = "refused",
            method = self.method,
            code = ?refusal.code(),
            reason = refusal.kind(),
            node = %self.caller.node,
            caller = %self.caller.by,
            peer = self.peer.map(tracing::field::display),
            %identity,
            error = %refusal,
            "request refused"
        );
        Status::new(refusal.code(), refusal.to_string())
    }

    /// Notes what was issued.
    pub fn issued(&self, pod: &str, not_after: jiff::Timestamp) {
        self.authority.metrics.audit("issued", self.method, "authorized");
        tracing::info!(
            target: AUDIT,
            outcome = "issued",
            method = self.method,
            node = %self.caller.node,
            caller = %self.caller.by,
            peer = self.peer.map(tracing::field::display),
            identity = self.identity,
            pod,
            %not_after,
            "issued"
        );
    }
}

impl Authority {
    /// The pod for which the caller may have `id`: as it is known, and looked up anew before
    /// it is refused.
    pub async fn authorize(&self, caller: &Caller, id: &SpiffeId) -> Result<String, Refusal> {
        for fresh in [false, true] {
            let pods = self.pods.on_node(&caller.node, fresh).await?;
            match authorize(id, &self.domain, &caller.node, &pods) {
                Ok(pod) => return Ok(format!("{}/{} {}", pod.namespace, pod.name, pod.uid)),
                Err(denied) if fresh || !denied.may_be_stale() => return Err(denied.into()),
                Err(_) => {}
            }
        }
        // The loop answers in its second turn at the latest.
        Err(Refusal::Request("the request cannot be decided".into()))
    }
}

/// The validity that a request gets: what it asks for (0: the usual), within bounds.
pub fn validity(asked: i64, usual: Duration, longest: Duration) -> Result<Duration, Refusal> {
    if asked == 0 {
        return Ok(usual);
    }
    u64::try_from(asked)
        .map(Duration::from_secs)
        .ok()
        .filter(|ttl| (SHORTEST..=longest).contains(ttl))
        .ok_or(Refusal::Ttl { asked, longest })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn validities_within_bounds() {
        let (usual, longest) = (Duration::from_secs(60), Duration::from_secs(100));
        let ask = |asked| validity(asked, usual, longest).ok();
        assert_eq!(ask(0), Some(usual));
        assert_eq!((ask(5), ask(100)), (Some(SHORTEST), Some(longest)));
        for wrong in [-1, i64::MIN, 1, 4, 101, i64::MAX] {
            assert_eq!(ask(wrong), None, "{wrong}");
            let refusal = validity(wrong, usual, longest).unwrap_err();
            assert_eq!((refusal.code(), refusal.kind()), (Code::InvalidArgument, "ttl"));
        }
    }
}
