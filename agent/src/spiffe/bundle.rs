//! Bundles: the X.509 authorities of a trust domain.

use std::fmt;

use aws_lc_rs::digest::{SHA256, digest};
use jiff::Timestamp;
use rustls::pki_types::{CertificateDer, TrustAnchor, pem::PemObject};
use x509_parser::{certificate::X509Certificate, prelude::FromDer};

/// The most authorities that a bundle may have: rotation needs a handful.
pub const MAX_AUTHORITIES: usize = 64;

/// The X.509 authorities of one trust domain; may be empty (everything is revoked).
#[derive(Clone, PartialEq, Eq)]
pub struct Bundle {
    authorities: Vec<Authority>,
}

/// One signing certificate that SVIDs of the domain may chain to.
#[derive(Clone, PartialEq, Eq)]
pub(super) struct Authority {
    der: CertificateDer<'static>,
    pub(super) anchor: TrustAnchor<'static>,
    pub(super) not_before: Timestamp,
    pub(super) not_after: Timestamp,
}

/// Why certificates do not make a bundle.
#[derive(Debug, thiserror::Error, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum BundleError {
    /// More than [`MAX_AUTHORITIES`].
    #[error(
        "a bundle of {0} authorities is too large: at most {MAX_AUTHORITIES} are accepted; remove those that have expired"
    )]
    TooMany(usize),
    /// The PEM text is broken.
    #[error("the bundle is not PEM ({0}); give one or more blocks BEGIN CERTIFICATE")]
    Pem(String),
    /// A certificate is broken.
    #[error(
        "authority {index} of the bundle is not a usable certificate ({problem}); replace or remove it"
    )]
    Malformed {
        /// Its place, from 1.
        index: usize,
        /// What the parser says.
        problem: String,
    },
    /// A certificate may not sign.
    #[error(
        "authority {index} of the bundle may not sign SVIDs ({problem}); give the certificate of the authority, not one that it has signed"
    )]
    NotAuthority {
        /// Its place, from 1.
        index: usize,
        /// The missing property.
        problem: &'static str,
    },
}

impl Bundle {
    /// A bundle of DER certificates; duplicates count once.
    pub fn from_der<'a>(
        certificates: impl IntoIterator<Item = CertificateDer<'a>>,
    ) -> Result<Self, BundleError> {
        let mut authorities: Vec<Authority> = Vec::new();
        for (i, der) in certificates.into_iter().enumerate() {
            let authority = Authority::new(der.into_owned(), i + 1)?;
            if !authorities.contains(&authority) {
                authorities.push(authority);
            }
            if authorities.len() > MAX_AUTHORITIES {
                return Err(BundleError::TooMany(authorities.len()));
            }
        }
        Ok(Self { authorities })
    }

    /// A bundle of PEM certificates.
    pub fn from_pem(pem: &[u8]) -> Result<Self, BundleError> {
        let certificates = CertificateDer::pem_slice_iter(pem)
            .take(MAX_AUTHORITIES + 1)
            .collect::<Result<Vec<_>, _>>()
            .map_err(|e| BundleError::Pem(e.to_string()))?;
        // An empty bundle revokes everything: text without a block is a mistake, not that.
        if certificates.is_empty() {
            return Err(BundleError::Pem("no block found".into()));
        }
        Self::from_der(certificates)
    }

    /// The authorities' certificates in DER.
    pub fn certificates(&self) -> impl ExactSizeIterator<Item = &CertificateDer<'static>> {
        self.authorities.iter().map(|a| &a.der)
    }

    /// Until when each root is valid.
    pub fn expiries(&self) -> Vec<Timestamp> {
        self.authorities().iter().map(|authority| authority.not_after).collect()
    }

    /// Tells bundles apart: [`digest_of`] the certificates.
    pub fn digest(&self) -> [u8; 32] {
        digest_of(self.certificates())
    }

    pub(super) fn authorities(&self) -> &[Authority] {
        &self.authorities
    }
}

/// Tells bundles apart, whatever their order: SHA-256 over the certificates' SHA-256 digests
/// in ascending order.
pub fn digest_of<'a>(
    certificates: impl IntoIterator<Item = &'a CertificateDer<'static>>,
) -> [u8; 32] {
    let mut digests: Vec<[u8; 32]> = certificates.into_iter().map(|c| sha256(c)).collect();
    digests.sort_unstable();
    digests.dedup();
    sha256(&digests.concat())
}

fn sha256(bytes: &[u8]) -> [u8; 32] {
    let mut out = [0; 32];
    out.copy_from_slice(digest(&SHA256, bytes).as_ref());
    out
}

impl Authority {
    fn new(der: CertificateDer<'static>, index: usize) -> Result<Self, BundleError> {
        let malformed = |problem: String| BundleError::Malformed { index, problem };
        let not_authority = |problem| BundleError::NotAuthority { index, problem };
        let anchor = webpki::anchor_from_trusted_cert(&der)
            .map_err(|e| malformed(e.to_string()))?
            .to_owned();
        let (rest, certificate) =
            X509Certificate::from_der(&der).map_err(|e| malformed(e.to_string()))?;
        if !rest.is_empty() {
            return Err(malformed("bytes follow the certificate".into()));
        }
        let is_ca = certificate.basic_constraints().map_err(|e| malformed(e.to_string()))?;
        if !is_ca.is_some_and(|c| c.value.ca) {
            return Err(not_authority("basicConstraints does not say CA:TRUE"));
        }
        // Many roots carry no KeyUsage at all, and RFC 5280 takes only name and key of an anchor.
        let usage = certificate.key_usage().map_err(|e| malformed(e.to_string()))?;
        if usage.is_some_and(|u| !u.value.key_cert_sign()) {
            return Err(not_authority("keyUsage lacks keyCertSign"));
        }
        let validity = certificate.validity();
        let time = |t: x509_parser::time::ASN1Time| {
            Timestamp::from_second(t.timestamp()).map_err(|e| malformed(e.to_string()))
        };
        let (not_before, not_after) = (time(validity.not_before)?, time(validity.not_after)?);
        Ok(Self { der, anchor, not_before, not_after })
    }

    /// True while the certificate's own validity holds.
    pub(super) fn is_valid_at(&self, now: Timestamp) -> bool {
        self.not_before <= now && now <= self.not_after
    }
}

impl fmt::Debug for Bundle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Bundle").field("authorities", &self.authorities.len()).finish()
    }
}

#[cfg(test)]
mod tests {
    use rcgen::{IsCa, KeyUsagePurpose};

    use super::*;
    use crate::spiffe::forge::Forger;

    fn pem(certificate: &CertificateDer<'_>) -> String {
        pem::encode(&pem::Pem::new("CERTIFICATE", certificate.to_vec()))
    }

    #[test]
    fn pem_with_several_authorities() {
        let (a, b) = (Forger::root("a"), Forger::root("b"));
        let text = pem(&a.certificate) + &pem(&b.certificate) + &pem(&a.certificate);
        let bundle = Bundle::from_pem(text.as_bytes()).unwrap();
        assert!(
            bundle.certificates().eq([&a.certificate, &b.certificate]),
            "duplicates count once"
        );
        assert_eq!(Bundle::from_der([]).unwrap().certificates().len(), 0);
        assert_eq!(format!("{bundle:?}"), "Bundle { authorities: 2 }");
        let no_usage = Forger::root_with("c", |p| p.key_usages.clear());
        assert!(Bundle::from_der([no_usage.certificate]).is_ok());
    }

    #[test]
    fn what_is_no_bundle() {
        use BundleError as E;
        let root = Forger::root("a");
        let leaf = root.leaf("spiffe://td/a").chain.remove(0);
        let no_sign =
            Forger::root_with("b", |p| p.key_usages = vec![KeyUsagePurpose::DigitalSignature]);
        let no_ca = Forger::root_with("c", |p| p.is_ca = IsCa::ExplicitNoCa);
        let not_authority = |c| Bundle::from_der([root.certificate.clone(), c]).unwrap_err();
        for certificate in [leaf, no_sign.certificate, no_ca.certificate] {
            assert!(matches!(not_authority(certificate), E::NotAuthority { index: 2, .. }));
        }
        for text in
            ["", "garbage", "-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n"]
        {
            assert!(matches!(Bundle::from_pem(text.as_bytes()), Err(E::Pem(_))), "{text}");
        }
        let cut = pem(&root.certificate).replace("-----END CERTIFICATE-----", "");
        assert!(matches!(Bundle::from_pem(cut.as_bytes()), Err(E::Pem(_))));
        let broken = CertificateDer::from(root.certificate[..40].to_vec());
        assert!(matches!(Bundle::from_der([broken]), Err(E::Malformed { index: 1, .. })));
    }

    #[test]
    fn the_number_of_authorities_has_a_limit() {
        let roots: Vec<_> = (0..=MAX_AUTHORITIES).map(|_| Forger::root("a").certificate).collect();
        assert!(Bundle::from_der(roots[1..].iter().cloned()).is_ok());
        assert_eq!(Bundle::from_der(roots), Err(BundleError::TooMany(MAX_AUTHORITIES + 1)));
    }
}
