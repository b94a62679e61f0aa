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

#[cfg(test)]
mod tests {
    use std::sync::LazyLock;

    use proptest::prelude::*;
    use rcgen::{
        BasicConstraints, CertificateParams, CustomExtension, DnType,
        ExtendedKeyUsagePurpose as Eku, IsCa, KeyUsagePurpose as Usage, SanType,
    };

    use super::*;
    use crate::spiffe::forge::{Forged, Forger, valid};

    const ID: &str = "spiffe://td/ns/shop/sa/web";
    const SAN_OID: &[u64] = &[2, 5, 29, 17];
    const KEY_USAGE_OID: &[u64] = &[2, 5, 29, 15];

    /// Validates against a table of domains and their roots, now, as both roles.
    fn check(forged: &Forged, trusted: &[(&str, &Forger)]) -> Result<Validated, ValidationError> {
        let verdict = |role| {
            let bundle_of = |domain: &TrustDomain| {
                let found = trusted.iter().find(|(name, _)| *name == domain.as_str());
                found.map(|(_, root)| Arc::new(root.bundle()))
            };
            validate(&forged.chain[0], &forged.chain[1..], bundle_of, role, Timestamp::now())
        };
        let (client, server) = (verdict(PeerRole::Client), verdict(PeerRole::Server));
        assert_eq!(client, server);
        client
    }

    fn names(names: &[SanType]) -> impl FnOnce(&mut CertificateParams) {
        let names = names.to_vec();
        |params| params.subject_alt_names = names
    }

    fn uri(text: &str) -> SanType {
        SanType::URI(text.try_into().unwrap())
    }

    fn dns(text: &str) -> SanType {
        SanType::DnsName(text.try_into().unwrap())
    }

    #[test]
    fn leaves_that_are_accepted() {
        let root = Forger::root("root");
        let good = [
            root.leaf(ID),
            root.leaf("SPIFFE://TD/ns/shop/sa/web"),
            root.leaf_with(ID, names(&[dns("web.shop"), uri(ID)])),
            root.leaf_with(ID, |p| p.extended_key_usages.clear()),
            root.leaf_with(ID, |p| p.is_ca = IsCa::NoCa),
            root.leaf_with(ID, |p| p.distinguished_name.push(DnType::CommonName, "web")),
            root.leaf_with(ID, |p| p.key_usages.push(Usage::KeyEncipherment)),
        ];
        for (i, forged) in good.iter().enumerate() {
            let peer = check(forged, &[("td", &root)]).unwrap_or_else(|e| panic!("{i}: {e}"));
            assert_eq!(peer.id.as_str(), ID);
            let left = peer.not_after.duration_since(Timestamp::now()).as_secs();
            assert!((3500..=3600).contains(&left), "{left}");
        }
    }

    #[test]
    fn leaves_that_are_refused() {
        let root = Forger::root("root");
        let critical = |oid: &[u64], content: &[u8]| {
            let mut extension = CustomExtension::from_oid_content(oid, content.to_vec());
            extension.set_criticality(true);
            extension
        };
        // KeyUsage ::= BIT STRING { digitalSignature } but not critical; SAN without names.
        let loose_usage = CustomExtension::from_oid_content(KEY_USAGE_OID, vec![3, 2, 7, 0x80]);
        let second_san = CustomExtension::from_oid_content(SAN_OID, vec![0x30, 0]);
        let unknown = critical(&[1, 3, 6, 1, 4, 1, 99999, 1], &[5, 0]);
        let broken_constraints = critical(&[2, 5, 29, 19], &[0x30, 3, 1, 1]);
        let cases: Vec<(&str, Forged)> = vec![
            ("no_san", root.leaf_with(ID, names(&[]))),
            ("no_uri_san", root.leaf_with(ID, names(&[dns("web.shop")]))),
            ("several_uri_sans", root.leaf_with(ID, names(&[uri(ID), uri("spiffe://td/admin")]))),
            ("several_uri_sans", root.leaf_with(ID, names(&[uri(ID), uri("https://a")]))),
            ("several_uri_sans", root.leaf_with(ID, names(&[uri(ID), uri(ID)]))),
            ("not_a_spiffe_id", root.leaf("https://td/ns/shop/sa/web")),
            ("not_a_spiffe_id", root.leaf("spiffe://td/ns/shop/sa/web?admin")),
            ("not_a_spiffe_id", root.leaf("spiffe://td/ns/shop/../sa/web")),
            ("no_path", root.leaf("spiffe://td")),
            (
                "leaf_is_ca",
                root.leaf_with(ID, |p| p.is_ca = IsCa::Ca(BasicConstraints::Unconstrained)),
            ),
            (
                "malformed_certificate",
                root.leaf_with(ID, |p| {
                    p.is_ca = IsCa::NoCa;
                    p.custom_extensions.push(broken_constraints);
                }),
            ),
            ("key_usage", root.leaf_with(ID, |p| p.key_usages.clear())),
            ("key_usage", root.leaf_with(ID, |p| p.key_usages = vec![Usage::KeyAgreement])),
            ("key_usage", root.leaf_with(ID, |p| p.key_usages.push(Usage::KeyCertSign))),
            ("key_usage", root.leaf_with(ID, |p| p.key_usages.push(Usage::CrlSign))),
            (
                "key_usage",
                root.leaf_with(ID, |p| {
                    p.key_usages.clear();
                    p.custom_extensions.push(loose_usage);
                }),
            ),
            (
                "extended_key_usage",
                root.leaf_with(ID, |p| p.extended_key_usages = vec![Eku::ClientAuth]),
            ),
            (
                "extended_key_usage",
                root.leaf_with(ID, |p| p.extended_key_usages = vec![Eku::ServerAuth]),
            ),
            ("malformed_certificate", root.leaf_with(ID, |p| p.custom_extensions.push(second_san))),
            ("path_invalid", root.leaf_with(ID, |p| p.custom_extensions.push(unknown))),
        ];
        for (i, (kind, forged)) in cases.iter().enumerate() {
            let error = check(forged, &[("td", &root)]).expect_err(kind);
            assert_eq!(
                (error.kind(), error.reason()),
                (*kind, Reason::UntrustedPeer),
                "{i}: {error}"
            );
        }
    }

    #[test]
    fn bytes_that_are_no_certificate() {
        let root = Forger::root("root");
        let good = root.leaf(ID).chain.remove(0);
        let longer = [good.as_ref(), &[0]].concat();
        let shorter = good[..good.len() - 1].to_vec();
        let huge = vec![0x30; crate::spiffe::leaf::MAX_LEAF_LEN + 1];
        for bytes in [longer, shorter, huge, vec![], b"GET / HTTP/1.1".to_vec()] {
            let mut forged = root.leaf(ID);
            forged.chain = vec![CertificateDer::from(bytes)];
            let error = check(&forged, &[("td", &root)]).unwrap_err();
            assert_eq!(error.kind(), "malformed_certificate", "{error}");
        }
    }

    #[test]
    fn only_the_bundle_of_the_own_trust_domain_counts() {
        let (ours, theirs) = (Forger::root("ours"), Forger::root("theirs"));
        let same_name = Forger::root("ours");
        let both = [("td", &ours), ("other", &theirs)];
        let foreign = "spiffe://other/ns/shop/sa/web";
        let kind = |forged: Forged, trusted: &[_]| check(&forged, trusted).map_err(|e| e.kind());

        assert!(kind(ours.leaf(ID), &both).is_ok());
        assert!(kind(theirs.leaf(foreign), &both).is_ok());
        for (expected, forged, trusted) in [
            ("other_root", theirs.leaf(ID), &both[..]),
            ("other_root", ours.leaf(foreign), &both),
            ("other_root", same_name.leaf(ID), &both),
            ("wrong_trust_domain", theirs.leaf(foreign), &both[..1]),
            ("wrong_trust_domain", ours.leaf(foreign), &both[..1]),
            ("wrong_trust_domain", ours.leaf(ID), &[]),
        ] {
            assert_eq!(kind(forged, trusted), Err(expected));
        }

        let revoked = |_: &TrustDomain| Some(Arc::new(Bundle::from_der([]).unwrap()));
        let leaf = &ours.leaf(ID).chain[0];
        let error = validate(leaf, &[], revoked, PeerRole::Client, Timestamp::now()).unwrap_err();
        assert_eq!(error.kind(), "other_root", "an empty bundle trusts nothing");
    }

    #[test]
    fn times() {
        let root = Forger::root("root");
        let other = Forger::root("other");
        let expired = |from: &Forger| from.leaf_with(ID, |p| valid(p, -7200, -60));
        let early = |from: &Forger| from.leaf_with(ID, |p| valid(p, 60, 7200));
        let old_root = Forger::root_with("old", |p| valid(p, -7200, -60));
        let trusted = [("td", &root)];
        for (kind, reason, forged, trusted) in [
            ("expired", Reason::SvidExpired, expired(&root), &trusted),
            ("not_yet_valid", Reason::UntrustedPeer, early(&root), &trusted),
            // What nobody trusted has signed is never called "expired".
            ("other_root", Reason::UntrustedPeer, expired(&other), &trusted),
            ("other_root", Reason::UntrustedPeer, early(&other), &trusted),
            ("authority_expired", Reason::UntrustedPeer, old_root.leaf(ID), &[("td", &old_root)]),
            ("other_root", Reason::UntrustedPeer, other.leaf(ID), &[("td", &old_root)]),
        ] {
            let error = check(&forged, trusted).unwrap_err();
            assert_eq!((error.kind(), error.reason()), (kind, reason), "{error}");
        }
        assert!(check(&root.leaf_with(ID, |p| valid(p, -1, 60)), &trusted).is_ok());
    }

    #[test]
    fn intermediates() {
        let root = Forger::root("root");
        let trusted = [("td", &root)];
        let middle = root.intermediate("middle", |p| valid(p, -60, 600));
        let peer = check(&middle.leaf(ID).with(&[&middle.certificate]), &trusted).unwrap();
        let left = peer.not_after.duration_since(Timestamp::now()).as_secs();
        assert!((500..=600).contains(&left), "the chain ends with its first certificate: {left}");
        let junk = CertificateDer::from(vec![1, 2, 3]);
        assert!(check(&root.leaf(ID).with(&[&junk]), &trusted).is_ok(), "not on the path");

        let no_ca = root.intermediate("a", |p| p.is_ca = IsCa::ExplicitNoCa);
        let no_sign = root.intermediate("b", |p| p.key_usages = vec![Usage::DigitalSignature]);
        let no_usage = root.intermediate("c", |p| p.key_usages.clear());
        let ended = root.intermediate("d", |p| valid(p, -600, -60));
        let narrow =
            root.intermediate("e", |p| p.is_ca = IsCa::Ca(BasicConstraints::Constrained(0)));
        let below = narrow.intermediate("f", |_| {});
        for (kind, forged) in [
            ("other_root", middle.leaf(ID)),
            ("unfit_intermediate", no_ca.leaf(ID).with(&[&no_ca.certificate])),
            ("unfit_intermediate", no_sign.leaf(ID).with(&[&no_sign.certificate])),
            ("unfit_intermediate", no_usage.leaf(ID).with(&[&no_usage.certificate])),
            ("path_invalid", ended.leaf(ID).with(&[&ended.certificate])),
            ("path_invalid", below.leaf(ID).with(&[&below.certificate, &narrow.certificate])),
            ("chain_too_long", root.leaf(ID).with(&[&middle.certificate; MAX_INTERMEDIATES + 1])),
        ] {
            let error = check(&forged, &trusted).expect_err(kind);
            assert_eq!((error.kind(), error.reason()), (kind, Reason::UntrustedPeer), "{error}");
        }
    }

    static GOOD: LazyLock<(Forger, Forged)> = LazyLock::new(|| {
        let root = Forger::root("root");
        let leaf = root.leaf(ID);
        (root, leaf)
    });

    proptest! {
        #[test]
        fn a_changed_byte_is_never_accepted(at in any::<prop::sample::Index>(), bits in 1u8..) {
            let (root, leaf) = &*GOOD;
            let mut bytes = leaf.chain[0].to_vec();
            let i = at.index(bytes.len());
            bytes[i] ^= bits;
            let bundle_of = |_: &TrustDomain| Some(Arc::new(root.bundle()));
            let leaf = CertificateDer::from(bytes);
            prop_assert!(validate(&leaf, &[], bundle_of, PeerRole::Client, Timestamp::now()).is_err());
        }
    }
}
