//! An X509-SVID with its private key.

use std::fmt;

use jiff::Timestamp;
use rcgen::PublicKeyData;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};
use x509_parser::{certificate::X509Certificate, prelude::FromDer};

use super::{
    SpiffeId,
    leaf::{Leaf, LeafError},
};

/// An identity's certificate chain (leaf first, without the root) and private key.
///
/// The key is in memory only and neither `Debug` nor any error prints it.
pub struct Svid {
    /// The identity, as the leaf's one URI SAN names it.
    pub id: SpiffeId,
    /// The chain in DER, leaf first.
    pub chain_der: Vec<CertificateDer<'static>>,
    key: PrivatePkcs8KeyDer<'static>,
    /// Valid from.
    pub not_before: Timestamp,
    /// Valid until; a session made with it takes no new flow afterwards.
    pub not_after: Timestamp,
}

/// Why chain and key do not make an SVID.
#[derive(Debug, thiserror::Error, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum SvidError {
    /// There is no certificate.
    #[error("the issuer answered without a certificate; look at the authority's log")]
    Empty,
    /// The leaf is not an SVID's.
    #[error("the issued certificate is not an X509-SVID: {0}")]
    Leaf(#[from] LeafError),
    /// The key cannot be read.
    #[error("the private key of {0} is not a PKCS #8 key that Signet can use; request a new SVID")]
    Key(SpiffeId),
    /// The certificate is another key's.
    #[error(
        "the certificate issued for {0} carries another public key; the authority must sign the key that was requested"
    )]
    KeyMismatch(SpiffeId),
}

impl Svid {
    /// Puts a chain (leaf first) and its PKCS #8 key together.
    pub fn new(
        chain_der: Vec<CertificateDer<'static>>,
        key: PrivatePkcs8KeyDer<'static>,
    ) -> Result<Self, SvidError> {
        let first = chain_der.first().ok_or(SvidError::Empty)?;
        let Leaf { id, not_before, not_after } = Leaf::parse(first)?;
        let pair = rcgen::KeyPair::try_from(&key).map_err(|_| SvidError::Key(id.clone()))?;
        let (_, certificate) =
            X509Certificate::from_der(first).map_err(|_| SvidError::Key(id.clone()))?;
        if certificate.public_key().raw != pair.subject_public_key_info() {
            return Err(SvidError::KeyMismatch(id));
        }
        Ok(Self { id, chain_der, key, not_before, not_after })
    }

    /// A copy of the private key, for a TLS configuration.
    pub fn private_key(&self) -> PrivateKeyDer<'static> {
        PrivateKeyDer::Pkcs8(self.key.clone_key())
    }

    /// True from `not_before` to `not_after`, both included.
    pub fn is_valid_at(&self, now: Timestamp) -> bool {
        self.not_before <= now && now <= self.not_after
    }
}

impl fmt::Debug for Svid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Svid")
            .field("id", &self.id)
            .field("not_before", &self.not_before)
            .field("not_after", &self.not_after)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::spiffe::forge::{Forged, Forger};

    const ID: &str = "spiffe://td/ns/shop/sa/web";

    #[test]
    fn chain_and_key_belong_together() {
        let root = Forger::root("root");
        let Forged { chain, key } = root.leaf(ID);
        let svid = Svid::new(chain.clone(), key.clone_key()).unwrap();
        assert_eq!(svid.id.as_str(), ID);
        assert!(svid.is_valid_at(Timestamp::now()) && !svid.is_valid_at(Timestamp::MAX));

        assert_eq!(Svid::new(vec![], key.clone_key()).unwrap_err(), SvidError::Empty);
        let other = root.leaf(ID).key;
        assert_eq!(
            Svid::new(chain.clone(), other).unwrap_err(),
            SvidError::KeyMismatch(svid.id.clone())
        );
        let junk = PrivatePkcs8KeyDer::from(vec![1, 2, 3]);
        assert_eq!(Svid::new(chain, junk).unwrap_err(), SvidError::Key(svid.id.clone()));
        let error = Svid::new(vec![root.certificate.clone()], key).unwrap_err();
        assert_eq!(error, SvidError::Leaf(LeafError::NoSan));
    }

    #[test]
    fn debug_shows_no_key() {
        let svid = Forger::root("root").svid(ID);
        let shown = format!("{svid:?}");
        assert!(shown.contains(ID) && !shown.contains("key"), "{shown}");
    }
}
