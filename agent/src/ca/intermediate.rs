//! An intermediate: the certificate with which one replica of the authority signs.

use std::{fmt, time::Duration};

use jiff::Timestamp;
use rcgen::{Issuer, KeyPair};
use rustls::pki_types::{CertificateDer, PrivatePkcs8KeyDer};

use super::{
    CaError,
    sign::{Signer, crypto},
};
use crate::spiffe::{SpiffeId, TrustDomain};

/// A signing certificate below a root, with its key. Neither `Debug` nor any error prints
/// the key, and it is never written anywhere.
pub struct Intermediate {
    /// Its own certificate, then those between it and the root.
    chain: Vec<CertificateDer<'static>>,
    signer: Signer,
}

impl Intermediate {
    /// A new one below `upper`; `above` are the certificates from `upper`'s own up to, but
    /// without, the root.
    pub(super) fn create(
        upper: &Signer,
        above: &[CertificateDer<'static>],
        now: Timestamp,
        lifetime: Duration,
    ) -> Result<Self, CaError> {
        let key = KeyPair::generate().map_err(crypto)?;
        let certificate = upper.intermediate(&key, now, lifetime)?;
        let not_after = now.saturating_add(lifetime).unwrap_or(Timestamp::MAX);
        let mut chain = vec![certificate];
        chain.extend(above.iter().cloned());
        Self::new(chain, key, upper.domain.clone(), not_after.min(upper.not_after))
    }

    /// Signs with the first certificate of `chain`.
    pub(super) fn new(
        chain: Vec<CertificateDer<'static>>,
        key: KeyPair,
        domain: TrustDomain,
        not_after: Timestamp,
    ) -> Result<Self, CaError> {
        let own = chain.first().ok_or_else(|| crypto("no certificate"))?;
        let issuer = Issuer::from_ca_cert_der(own, key).map_err(crypto)?;
        // Certificates know whole seconds only.
        let not_after = Timestamp::from_second(not_after.as_second()).map_err(crypto)?;
        Ok(Self { chain, signer: Signer { domain, issuer, not_after } })
    }

    /// When it runs out.
    pub fn not_after(&self) -> Timestamp {
        self.signer.not_after
    }

    /// True when a leaf signed now may live for `ttl`: it does not outlive its signer.
    pub fn covers(&self, now: Timestamp, ttl: Duration) -> bool {
        now.saturating_add(ttl).is_ok_and(|end| end <= self.signer.not_after)
    }

    /// Its own certificate and those above it, without the root: what follows a leaf.
    pub fn chain(&self) -> &[CertificateDer<'static>] {
        &self.chain
    }

    /// Signs an SVID's leaf for a public key (DER SubjectPublicKeyInfo) and answers the chain:
    /// leaf, intermediate, whatever is between it and the root; without the root.
    pub fn issue(
        &self,
        id: &SpiffeId,
        public_key: &[u8],
        now: Timestamp,
        ttl: Duration,
    ) -> Result<Vec<CertificateDer<'static>>, CaError> {
        Ok(self.above(self.signer.leaf(id, public_key, now, ttl)?))
    }

    /// A serving certificate for DNS names and addresses: its chain without the root, and its
    /// PKCS #8 key.
    pub fn issue_server(
        &self,
        names: &[String],
        now: Timestamp,
        ttl: Duration,
    ) -> Result<(Vec<CertificateDer<'static>>, PrivatePkcs8KeyDer<'static>), CaError> {
        let key = KeyPair::generate().map_err(crypto)?;
        let chain = self.above(self.signer.server(names, &key, now, ttl)?);
        Ok((chain, PrivatePkcs8KeyDer::from(key.serialize_der())))
    }

    fn above(&self, leaf: CertificateDer<'static>) -> Vec<CertificateDer<'static>> {
        std::iter::once(leaf).chain(self.chain.iter().cloned()).collect()
    }
}

impl fmt::Debug for Intermediate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Intermediate")
            .field("domain", &self.signer.domain)
            .field("not_after", &self.signer.not_after)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use jiff::SignedDuration;
    use rcgen::PublicKeyData;
    use x509_parser::{certificate::X509Certificate, extensions::GeneralName, prelude::FromDer};

    use super::*;
    use crate::{
        ca::{BACKDATE, Root},
        spiffe::validate::{PeerRole, validate},
    };

    const HOUR: Duration = Duration::from_secs(3600);

    fn td() -> TrustDomain {
        TrustDomain::parse("td").unwrap()
    }

    fn now() -> Timestamp {
        Timestamp::from_second(1_800_000_000).unwrap()
    }

    fn public_key() -> Vec<u8> {
        KeyPair::generate().unwrap().subject_public_key_info()
    }

    #[test]
    fn a_chain_through_an_intermediate_is_valid_under_its_root_only() {
        let root = Root::create(&td(), now()).unwrap();
        let intermediate = root.intermediate(now(), HOUR).unwrap();
        let id = SpiffeId::for_service_account(&td(), "shop", "web").unwrap();
        let chain = intermediate.issue(&id, &public_key(), now(), HOUR).unwrap();
        assert_eq!(chain.len(), 2);
        assert_eq!(chain[1..], *intermediate.chain());
        let check = |root: &Root, at| {
            let bundle = Arc::new(root.bundle().unwrap());
            validate(&chain[0], &chain[1..], |_| Some(bundle), PeerRole::Server, at)
        };
        let valid = check(&root, now()).unwrap();
        assert_eq!((valid.id, valid.not_after), (id, now() + SignedDuration::from_hours(1)));
        assert!(check(&root, now() - BACKDATE).is_ok(), "a clock five minutes behind");
        assert!(check(&root, now() - BACKDATE - SignedDuration::from_secs(1)).is_err());
        assert!(check(&Root::create(&td(), now()).unwrap(), now()).is_err());

        let (_, parsed) = X509Certificate::from_der(&chain[1]).unwrap();
        let constraints = parsed.basic_constraints().unwrap().unwrap().value;
        assert!(constraints.ca && constraints.path_len_constraint == Some(0));
        let usage = parsed.key_usage().unwrap().unwrap();
        assert!(usage.critical && usage.value.key_cert_sign() && !usage.value.digital_signature());
        let names = parsed.subject_alternative_name().unwrap().unwrap();
        assert_eq!(names.value.general_names, [GeneralName::URI("spiffe://td")]);
        assert_ne!(parsed.subject(), parsed.issuer());
    }

    #[test]
    fn no_leaf_outlives_its_intermediate_and_no_intermediate_its_root() {
        let root = Root::create(&td(), now()).unwrap();
        let intermediate = root.intermediate(now(), HOUR).unwrap();
        assert!(intermediate.covers(now(), HOUR));
        assert!(!intermediate.covers(now() + SignedDuration::from_secs(1), HOUR));
        let id = SpiffeId::for_service_account(&td(), "shop", "web").unwrap();
        let chain = intermediate.issue(&id, &public_key(), now(), HOUR * 5).unwrap();
        let (_, leaf) = X509Certificate::from_der(&chain[0]).unwrap();
        assert_eq!(leaf.validity().not_after.timestamp(), intermediate.not_after().as_second());

        let late = root.not_after() - SignedDuration::from_mins(1);
        let short = root.intermediate(late, HOUR).unwrap();
        assert_eq!(short.not_after(), root.not_after());
        assert!(matches!(root.intermediate(root.not_after(), HOUR), Err(CaError::Expired { .. })));
        let end = intermediate.not_after();
        assert!(matches!(
            intermediate.issue(&id, &public_key(), end, HOUR),
            Err(CaError::Expired { .. })
        ));
    }

    #[test]
    fn a_serving_certificate_has_its_names_and_is_no_svid() {
        let root = Root::create(&td(), now()).unwrap();
        let intermediate = root.intermediate(now(), HOUR).unwrap();
        let names = ["authority.signet-system.svc".to_owned(), "10.0.0.1".to_owned()];
        let (chain, _) = intermediate.issue_server(&names, now(), HOUR).unwrap();
        let (_, leaf) = X509Certificate::from_der(&chain[0]).unwrap();
        let san = leaf.subject_alternative_name().unwrap().unwrap();
        assert_eq!(
            san.value.general_names,
            [GeneralName::DNSName(&names[0]), GeneralName::IPAddress(&[10, 0, 0, 1])]
        );
        let usage = leaf.extended_key_usage().unwrap().unwrap().value;
        assert!(usage.server_auth && !usage.client_auth);
        assert!(crate::spiffe::leaf::Leaf::parse(&chain[0]).is_err());
        let wrong = intermediate.issue_server(&["ümlaut".into()], now(), HOUR).unwrap_err();
        assert!(matches!(wrong, CaError::ServerName(_)), "{wrong}");
    }

    #[test]
    fn debug_shows_no_key() {
        let root = Root::create(&td(), now()).unwrap();
        let shown = format!("{:?}", root.intermediate(now(), HOUR).unwrap());
        assert!(shown.contains("td") && !shown.to_lowercase().contains("key"), "{shown}");
    }
}
