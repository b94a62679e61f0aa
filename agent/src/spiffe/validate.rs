//! Validation of an X509-SVID (X509-SVID section 5): the leaf's rules, then RFC 5280 path
//! building against the bundle of the SVID's *own* trust domain and no other.

use std::{sync::Arc, time::Duration};

use jiff::Timestamp;
use rustls::pki_types::{CertificateDer, TrustAnchor, UnixTime};
use signet_ebpf::abi::Reason;
use x509_parser::{certificate::X509Certificate, prelude::FromDer};

use super::{
    Bundle, SpiffeId, TrustDomain,
    leaf::{Leaf, LeafError},
};

/// The most intermediates that a peer may present.
pub const MAX_INTERMEDIATES: usize = 6;

/// The side that the peer is on.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum PeerRole {
    /// The peer dialled.
    Client,
    /// The peer was dialled.
    Server,
}

/// An SVID whose path holds.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Validated {
    /// The peer's identity.
    pub id: SpiffeId,
    /// When the first certificate of the chain (leaf or intermediate) runs out.
    pub not_after: Timestamp,
}

/// Why a chain is not a valid SVID of a trusted domain.
#[derive(Debug, thiserror::Error, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum ValidationError {
    /// The leaf breaks one of the standard's rules.
    #[error("the peer's certificate is no X509-SVID: {0}")]
    Leaf(#[from] LeafError),
    /// No bundle for the SVID's trust domain.
    #[error(
        "the peer {0} belongs to a trust domain for which there is no bundle; if it should be trusted, federate with that domain"
    )]
    UntrustedDomain(SpiffeId),
    /// The path does not lead to the bundle.
    #[error(
        "the certificate that claims {0} was not signed by an authority of its trust domain; the peer was enrolled with another root, or is forged"
    )]
    UnknownAuthority(SpiffeId),
    /// The path leads to authorities that are out of date themselves.
    #[error(
        "no authority in the bundle of {0}'s trust domain is valid at this time; renew the authority's certificate and look at this node's clock"
    )]
    AuthorityExpired(SpiffeId),
    /// The leaf ran out.
    #[error(
        "the certificate of {id} ran out at {not_after}; look at the peer's renewal and at both clocks"
    )]
    Expired {
        /// The identity.
        id: SpiffeId,
        /// When it ran out.
        not_after: Timestamp,
    },
    /// The leaf's time has not come.
    #[error("the certificate of {id} is valid only from {not_before}; look at both clocks")]
    NotYetValid {
        /// The identity.
        id: SpiffeId,
        /// From when it is valid.
        not_before: Timestamp,
    },
    /// An intermediate may not sign.
    #[error(
        "an intermediate in the chain of {0} is no signing certificate (CA:TRUE with keyCertSign); the peer's authority must issue it so"
    )]
    UnfitIntermediate(SpiffeId),
    /// Too many intermediates.
    #[error("the peer's chain has {0} intermediates; at most {MAX_INTERMEDIATES} are accepted")]
    ChainTooLong(usize),
    /// Another rule of RFC 5280 is broken.
    #[error("the chain of {id} does not verify: {problem}")]
    Path {
        /// The identity that the leaf claims.
        id: SpiffeId,
        /// What the path builder says.
        problem: webpki::Error,
    },
}

impl ValidationError {
    /// The verdict's reason.
    pub const fn reason(&self) -> Reason {
        match self {
            Self::Expired { .. } => Reason::SvidExpired,
            Self::Leaf(_)
            | Self::UntrustedDomain(_)
            | Self::UnknownAuthority(_)
            | Self::AuthorityExpired(_)
            | Self::NotYetValid { .. }
            | Self::UnfitIntermediate(_)
            | Self::ChainTooLong(_)
            | Self::Path { .. } => Reason::UntrustedPeer,
        }
    }

    /// A short stable name, for counters.
    pub const fn kind(&self) -> &'static str {
        match self {
            Self::Leaf(e) => e.kind(),
            Self::UntrustedDomain(_) => "wrong_trust_domain",
            Self::UnknownAuthority(_) => "other_root",
            Self::AuthorityExpired(_) => "authority_expired",
            Self::Expired { .. } => "expired",
            Self::NotYetValid { .. } => "not_yet_valid",
            Self::UnfitIntermediate(_) => "unfit_intermediate",
            Self::ChainTooLong(_) => "chain_too_long",
            Self::Path { .. } => "path_invalid",
        }
    }
}

/// Validates a chain as the peer presented it.
///
/// `bundle_of` gives the bundle of a trust domain that is trusted. Certificate signatures are
/// checked here; that the peer holds the leaf's key is for the handshake to prove.
pub fn validate(
    leaf: &CertificateDer<'_>,
    intermediates: &[CertificateDer<'_>],
    bundle_of: impl FnOnce(&TrustDomain) -> Option<Arc<Bundle>>,
    role: PeerRole,
    now: Timestamp,
) -> Result<Validated, ValidationError> {
    if intermediates.len() > MAX_INTERMEDIATES {
        return Err(ValidationError::ChainTooLong(intermediates.len()));
    }
    let Leaf { id, not_before, not_after } = Leaf::parse(leaf)?;
    let Some(bundle) = bundle_of(&id.trust_domain()) else {
        return Err(ValidationError::UntrustedDomain(id));
    };
    let signers = Signers::of(intermediates);
    // Out of its time, the leaf is refused in any case. Whether an authority of ours signed it
    // is still asked, at a time when it was valid: "expired" is an operator's problem,
    // "another root" an attack or a wrong enrolment, and must not pass for the former.
    if now < not_before || now > not_after {
        let then = now.clamp(not_before.min(not_after), not_after);
        build_path(&id, leaf, &signers, &anchors(&bundle, None), role, then)?;
        return Err(if now > not_after {
            ValidationError::Expired { id, not_after }
        } else {
            ValidationError::NotYetValid { id, not_before }
        });
    }
    let valid = anchors(&bundle, Some(now));
    match build_path(&id, leaf, &signers, &valid, role, now) {
        Ok(signers_not_after) => Ok(Validated { id, not_after: not_after.min(signers_not_after) }),
        // With the authorities that are out of date it would have held.
        Err(ValidationError::UnknownAuthority(id))
            if build_path(&id, leaf, &signers, &anchors(&bundle, None), role, now).is_ok() =>
        {
            Err(ValidationError::AuthorityExpired(id))
        }
        Err(e) => Err(e),
    }
}

/// The intermediates that may sign. The path builder ignores KeyUsage, hence the sieve.
struct Signers<'a> {
    certificates: Vec<CertificateDer<'a>>,
    /// When the first of them runs out.
    not_after: Timestamp,
    /// Some were left out.
    sieved: bool,
}

impl<'a> Signers<'a> {
    fn of(intermediates: &'a [CertificateDer<'_>]) -> Self {
        let mut signers =
            Self { certificates: Vec::new(), not_after: Timestamp::MAX, sieved: false };
        for der in intermediates {
            match signer_not_after(der) {
                Some(not_after) => {
                    signers.certificates.push(CertificateDer::from(der.as_ref()));
                    signers.not_after = signers.not_after.min(not_after);
                }
                None => signers.sieved = true,
            }
        }
        signers
    }
}

/// When a signing certificate runs out; `None` for what is none.
fn signer_not_after(der: &CertificateDer<'_>) -> Option<Timestamp> {
    let (rest, certificate) = X509Certificate::from_der(der).ok()?;
    let is_ca = certificate.basic_constraints().ok()??.value.ca;
    let may_sign = certificate.key_usage().ok()??.value.key_cert_sign();
    let not_after = Timestamp::from_second(certificate.validity().not_after.timestamp()).ok()?;
    (rest.is_empty() && is_ca && may_sign).then_some(not_after)
}

/// The bundle's anchors, those valid at `at` only when it is given.
fn anchors(bundle: &Bundle, at: Option<Timestamp>) -> Vec<TrustAnchor<'_>> {
    let valid = bundle.authorities().iter().filter(|a| at.is_none_or(|t| a.is_valid_at(t)));
    valid.map(|a| a.anchor.clone()).collect()
}

/// Builds a path; answers when the first intermediate runs out.
fn build_path(
    id: &SpiffeId,
    leaf: &CertificateDer<'_>,
    signers: &Signers<'_>,
    anchors: &[TrustAnchor<'_>],
    role: PeerRole,
    at: Timestamp,
) -> Result<Timestamp, ValidationError> {
    use webpki::Error as E;
    let usage = match role {
        PeerRole::Client => webpki::KeyUsage::client_auth(),
        PeerRole::Server => webpki::KeyUsage::server_auth(),
    };
    let seconds = u64::try_from(at.as_second()).unwrap_or(0);
    let at = UnixTime::since_unix_epoch(Duration::from_secs(seconds));
    let failed = |problem| match problem {
        E::UnknownIssuer if signers.sieved => ValidationError::UnfitIntermediate(id.clone()),
        // Two roots of one name and different keys: the name is found, the signature fails.
        E::UnknownIssuer | E::InvalidSignatureForPublicKey => {
            ValidationError::UnknownAuthority(id.clone())
        }
        problem => ValidationError::Path { id: id.clone(), problem },
    };
    let entity = webpki::EndEntityCert::try_from(leaf).map_err(failed)?;
    entity
        .verify_for_usage(
            webpki::ALL_VERIFICATION_ALGS,
            anchors,
            &signers.certificates,
            at,
            usage,
            None,
            None,
        )
        .map_err(failed)?;
    Ok(signers.not_after)
}
