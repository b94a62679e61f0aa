//! A trust domain's root: create, read from PEM, sign leaves.

use std::{fmt, time::Duration};

use jiff::{SignedDuration, Timestamp};
use rcgen::{
    BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair, PublicKeyData, SerialNumber,
};
use rustls::pki_types::{
    CertificateDer, PrivatePkcs8KeyDer,
    pem::{SectionKind, SliceIter},
};
use x509_parser::{certificate::X509Certificate, prelude::FromDer};

use super::{
    Intermediate,
    sign::{Signer, authority_name, crypto, date, random_serial, uris},
};
use crate::spiffe::{Bundle, BundleError, SpiffeId, TrustDomain};

/// How far back `notBefore` lies, for clocks that run behind.
pub const BACKDATE: SignedDuration = SignedDuration::from_mins(5);
/// A new root's lifetime.
pub const ROOT_LIFETIME: SignedDuration = SignedDuration::from_hours(10 * 365 * 24);

/// A root certificate with its key. Neither `Debug` nor any error prints the key.
pub struct Root {
    certificate: CertificateDer<'static>,
    signer: Signer,
}

/// Why a root cannot be used or does not sign.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CaError {
    /// The PEM text does not hold exactly one certificate and one key.
    #[error("{0}; it must hold exactly one block BEGIN CERTIFICATE and one BEGIN PRIVATE KEY")]
    Pem(String),
    /// The certificate is none that may sign.
    #[error("the certificate is not an authority's: {0}")]
    NotAuthority(#[from] BundleError),
    /// The certificate names no trust domain.
    #[error("the certificate names no trust domain: its URI must be {expected}, it has {found}")]
    NoTrustDomain {
        /// The URI that is asked for.
        expected: SpiffeId,
        /// What there is.
        found: String,
    },
    /// The certificate is another trust domain's.
    #[error(
        "the root belongs to trust domain {found}, this agent to {expected}; set trustDomain to {found} or give another authority directory"
    )]
    ForeignTrustDomain {
        /// The configured domain.
        expected: TrustDomain,
        /// The certificate's.
        found: TrustDomain,
    },
    /// The key is no key, or not one that can sign here.
    #[error("the private key is not a PKCS #8 key that Signet can sign with (ECDSA P-256)")]
    Key,
    /// The key is not the certificate's.
    #[error("the private key does not belong to the certificate")]
    KeyMismatch,
    /// The root has run out, or will before anything useful could be signed.
    #[error("the root of {domain} was valid until {not_after}; replace it")]
    Expired {
        /// Its trust domain.
        domain: TrustDomain,
        /// When it ran out.
        not_after: Timestamp,
    },
    /// The requested identity is not of this trust domain.
    #[error("{id} is not of the trust domain {domain} that this authority signs for")]
    WrongTrustDomain {
        /// What was asked for.
        id: SpiffeId,
        /// The authority's domain.
        domain: TrustDomain,
    },
    /// A name under which a server should be known is no name.
    #[error("{0:?} is neither a DNS name nor an address; correct the authority's serving names")]
    ServerName(String),
    /// The provided certificates do not belong together.
    #[error("{file}: {problem}")]
    Provided {
        /// The file's name.
        file: &'static str,
        /// What is wrong, and what to do.
        problem: String,
    },
    /// The requested identity is a whole trust domain.
    #[error("{0} names a whole trust domain; only workloads get SVIDs")]
    NotAWorkload(SpiffeId),
    /// The public key is not readable.
    #[error("the public key for {0} is not a SubjectPublicKeyInfo that can be certified")]
    PublicKey(SpiffeId),
    /// A time is out of X.509's range.
    #[error("the time {0} cannot be written into a certificate; look at this node's clock")]
    Time(Timestamp),
    /// The library failed.
    #[error("making a certificate failed: {0}")]
    Crypto(String),
}

impl Root {
    /// Makes a new root for a trust domain, valid for [`ROOT_LIFETIME`] from `now`.
    pub fn create(domain: &TrustDomain, now: Timestamp) -> Result<Self, CaError> {
        let key = KeyPair::generate().map_err(crypto)?;
        let mut params = CertificateParams::default();
        params.serial_number = Some(SerialNumber::from_slice(&random_serial()));
        authority_name(&mut params, domain, "root")?;
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.not_before = date(now - BACKDATE)?;
        params.not_after = date(now + ROOT_LIFETIME)?;
        let certificate = params.self_signed(&key).map_err(crypto)?;
        let certificate = certificate.der().clone();
        Self::new(certificate, key, domain, now)
    }

    /// Reads a root from PEM: one certificate and one PKCS #8 key, of this trust domain.
    pub fn from_pem(pem: &[u8], domain: &TrustDomain, now: Timestamp) -> Result<Self, CaError> {
        let mut certificates = Vec::new();
        let mut keys = Vec::new();
        // One block too many is enough to refuse: the rest is not looked at.
        for section in SliceIter::<(SectionKind, Vec<u8>)>::new(pem).take(3) {
            match section {
                Ok((SectionKind::Certificate, der)) => certificates.push(der),
                Ok((SectionKind::PrivateKey, der)) => keys.push(der),
                Ok((kind, _)) => {
                    return Err(CaError::Pem(format!("a block of kind {kind:?} is not expected")));
                }
                Err(e) => return Err(CaError::Pem(format!("the PEM is broken ({e})"))),
            }
        }
        if (certificates.len(), keys.len()) != (1, 1) {
            return Err(CaError::Pem(format!(
                "{} certificate(s) and {} private key(s) found",
                certificates.len(),
                keys.len()
            )));
        }
        let key = PrivatePkcs8KeyDer::from(keys.remove(0));
        let key = KeyPair::try_from(&key).map_err(|_| CaError::Key)?;
        Self::new(CertificateDer::from(certificates.remove(0)), key, domain, now)
    }

    fn new(
        certificate: CertificateDer<'static>,
        key: KeyPair,
        domain: &TrustDomain,
        now: Timestamp,
    ) -> Result<Self, CaError> {
        Bundle::from_der([certificate.clone()])?;
        let (_, parsed) = X509Certificate::from_der(&certificate).map_err(crypto)?;
        check_domain(&parsed, domain)?;
        if parsed.public_key().raw != key.subject_public_key_info() {
            return Err(CaError::KeyMismatch);
        }
        let not_after =
            Timestamp::from_second(parsed.validity().not_after.timestamp()).map_err(crypto)?;
        if not_after <= now {
            return Err(CaError::Expired { domain: domain.clone(), not_after });
        }
        let issuer = Issuer::from_ca_cert_der(&certificate, key).map_err(crypto)?;
        Ok(Self { certificate, signer: Signer { domain: domain.clone(), issuer, not_after } })
    }

    /// Certificate and key in PEM: for a file that only its owner reads.
    pub fn to_pem(&self) -> String {
        let certificate =
            pem::encode(&pem::Pem::new("CERTIFICATE", self.certificate.as_ref().to_vec()));
        format!("{certificate}{}", self.signer.issuer.key().serialize_pem())
    }

    /// The trust domain.
    pub fn trust_domain(&self) -> &TrustDomain {
        &self.signer.domain
    }

    /// The root's certificate.
    pub fn certificate(&self) -> &CertificateDer<'static> {
        &self.certificate
    }

    /// When the root runs out.
    pub fn not_after(&self) -> Timestamp {
        self.signer.not_after
    }

    /// The bundle of just this root.
    pub fn bundle(&self) -> Result<Bundle, CaError> {
        Ok(Bundle::from_der([self.certificate.clone()])?)
    }

    /// Signs an SVID's leaf for a public key (DER SubjectPublicKeyInfo): exactly one URI SAN,
    /// valid from `now` − [`BACKDATE`] to `now + ttl` or the root's end, whichever is first.
    pub fn sign_leaf(
        &self,
        id: &SpiffeId,
        public_key: &[u8],
        now: Timestamp,
        ttl: Duration,
    ) -> Result<CertificateDer<'static>, CaError> {
        self.signer.leaf(id, public_key, now, ttl)
    }

    /// A new intermediate with a key of its own, valid for `lifetime` or until the root's end.
    pub fn intermediate(
        &self,
        now: Timestamp,
        lifetime: Duration,
    ) -> Result<Intermediate, CaError> {
        Intermediate::create(&self.signer, &[], now, lifetime)
    }
}

impl fmt::Debug for Root {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Root")
            .field("domain", &self.signer.domain)
            .field("not_after", &self.signer.not_after)
            .finish_non_exhaustive()
    }
}

/// The signing certificate's one URI must be the trust domain's own ID.
fn check_domain(certificate: &X509Certificate<'_>, domain: &TrustDomain) -> Result<(), CaError> {
    let uris = uris(certificate)?;
    let none = |found: String| CaError::NoTrustDomain { expected: domain.id(), found };
    let [uri] = uris[..] else {
        return Err(none(format!("{} URIs", uris.len())));
    };
    let id = SpiffeId::parse(uri).map_err(|e| none(e.to_string()))?;
    if !id.path().is_empty() {
        return Err(none(id.to_string()));
    }
    if id.trust_domain() != *domain {
        return Err(CaError::ForeignTrustDomain {
            expected: domain.clone(),
            found: id.trust_domain(),
        });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use rcgen::{IsCa, KeyUsagePurpose, SanType};
    use x509_parser::extensions::GeneralName;

    use super::*;
    use crate::spiffe::{forge::valid, leaf::Leaf};

    fn td() -> TrustDomain {
        TrustDomain::parse("td").unwrap()
    }

    fn now() -> Timestamp {
        Timestamp::from_second(1_800_000_000).unwrap()
    }

    fn web() -> SpiffeId {
        SpiffeId::for_service_account(&td(), "shop", "web").unwrap()
    }

    fn public_key() -> Vec<u8> {
        KeyPair::generate().unwrap().subject_public_key_info()
    }

    #[test]
    fn a_leaf_is_what_the_standard_asks_for() {
        let root = Root::create(&td(), now()).unwrap();
        let key = public_key();
        let der = root.sign_leaf(&web(), &key, now(), Duration::from_secs(3600)).unwrap();
        let leaf = Leaf::parse(&der).unwrap();
        assert_eq!(leaf.id, web());
        assert_eq!(leaf.not_before, now() - SignedDuration::from_mins(5));
        assert_eq!(leaf.not_after, now() + SignedDuration::from_hours(1));
        let (_, parsed) = X509Certificate::from_der(&der).unwrap();
        assert_eq!(parsed.public_key().raw, key);
        let constraints = parsed.basic_constraints().unwrap().expect("an explicit CA:FALSE");
        assert!(!constraints.value.ca);
        let usage = parsed.key_usage().unwrap().unwrap();
        assert!(usage.critical && usage.value.digital_signature() && usage.value.flags == 1);
        let usage = parsed.extended_key_usage().unwrap().unwrap().value;
        assert!(usage.server_auth && usage.client_auth && !usage.any);
        let san = parsed.subject_alternative_name().unwrap().unwrap();
        assert!(san.critical, "the subject is empty");
        assert_eq!(san.value.general_names, [GeneralName::URI(web().as_str())]);
        let again = root.sign_leaf(&web(), &key, now(), Duration::from_secs(3600)).unwrap();
        let (_, again) = X509Certificate::from_der(&again).unwrap();
        assert_ne!(parsed.raw_serial(), again.raw_serial());
    }

    #[test]
    fn a_leaf_does_not_outlive_the_root() {
        let root = Root::create(&td(), now()).unwrap();
        let late = root.not_after() - SignedDuration::from_secs(60);
        let sign = |at, ttl| root.sign_leaf(&web(), &public_key(), at, ttl);
        let leaf = Leaf::parse(&sign(late, Duration::from_secs(3600)).unwrap()).unwrap();
        assert_eq!(leaf.not_after, root.not_after());
        let leaf = Leaf::parse(&sign(late, Duration::MAX).unwrap()).unwrap();
        assert_eq!(leaf.not_after, root.not_after());
        let ended = sign(root.not_after(), Duration::from_secs(3600));
        assert!(matches!(ended, Err(CaError::Expired { .. })));
    }

    #[test]
    fn signs_for_workloads_of_its_own_domain_only() {
        let root = Root::create(&td(), now()).unwrap();
        let sign = |id: &str, key: &[u8]| {
            root.sign_leaf(&SpiffeId::parse(id).unwrap(), key, now(), Duration::from_secs(60))
        };
        assert!(sign("spiffe://td/ns/a/sa/b", &public_key()).is_ok());
        let foreign = sign("spiffe://other/ns/a/sa/b", &public_key());
        assert!(matches!(foreign, Err(CaError::WrongTrustDomain { .. })));
        assert!(matches!(sign("spiffe://td", &public_key()), Err(CaError::NotAWorkload(_))));
        assert!(matches!(sign("spiffe://td/a", b"no key"), Err(CaError::PublicKey(_))));
    }

    #[test]
    fn pem_round_trip() {
        let root = Root::create(&td(), now()).unwrap();
        let same = Root::from_pem(root.to_pem().as_bytes(), &td(), now()).unwrap();
        assert_eq!(same.certificate(), root.certificate());
        assert_eq!(same.bundle().unwrap(), root.bundle().unwrap());
        let leaf = same.sign_leaf(&web(), &public_key(), now(), Duration::from_secs(60)).unwrap();
        let bundle = std::sync::Arc::new(root.bundle().unwrap());
        use crate::spiffe::validate::{PeerRole, validate};
        assert!(validate(&leaf, &[], |_| Some(bundle), PeerRole::Server, now()).is_ok());
        assert!(!format!("{root:?}").to_lowercase().contains("key"));
    }

    #[test]
    fn files_that_are_no_root() {
        let root = Root::create(&td(), now()).unwrap();
        let other = Root::create(&td(), now()).unwrap();
        let text = root.to_pem();
        let (certificate, key) = text.split_at(text.find("-----BEGIN PRIVATE").unwrap());
        let (certificate, key) = (certificate.to_owned(), key.to_owned());
        let other_key = other.signer.issuer.key().serialize_pem();
        let read = |text: &str| Root::from_pem(text.as_bytes(), &td(), now());
        assert!(read(&(key.clone() + &certificate)).is_ok(), "in any order");

        let pem = |text: &str| matches!(read(text), Err(CaError::Pem(_)));
        assert!(pem(""));
        assert!(pem("garbage"));
        assert!(pem(&certificate));
        assert!(pem(&key));
        assert!(pem(&(root.to_pem() + &other_key)));
        assert!(pem(&(root.to_pem() + &certificate)));
        assert!(pem(&root.to_pem().replace("-----END PRIVATE KEY-----", "")));
        assert!(pem(&(root.to_pem().replace("PRIVATE KEY", "PUBLIC KEY"))));
        assert!(matches!(read(&(certificate.clone() + &other_key)), Err(CaError::KeyMismatch)));
        let no_key =
            certificate.clone() + "-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n";
        assert!(matches!(read(&no_key), Err(CaError::Key)));

        let foreign = TrustDomain::parse("other").unwrap();
        let error = Root::from_pem(root.to_pem().as_bytes(), &foreign, now()).unwrap_err();
        assert!(matches!(error, CaError::ForeignTrustDomain { .. }));
        assert!(error.to_string().contains("trustDomain"), "{error}");
        let late = root.not_after() + SignedDuration::from_secs(1);
        let error = Root::from_pem(root.to_pem().as_bytes(), &td(), late).unwrap_err();
        assert!(matches!(error, CaError::Expired { .. }));
    }

    #[test]
    fn certificates_that_are_no_root() {
        let key = KeyPair::generate().unwrap();
        let make = |change: &dyn Fn(&mut CertificateParams)| {
            let mut params = CertificateParams::default();
            params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
            params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
            params.subject_alt_names = vec![SanType::URI("spiffe://td".try_into().unwrap())];
            valid(&mut params, -60, 3600);
            change(&mut params);
            let certificate = params.self_signed(&key).unwrap();
            Root::from_pem(
                (certificate.pem() + &key.serialize_pem()).as_bytes(),
                &td(),
                Timestamp::now(),
            )
        };
        let uris = |uris: &[&str]| {
            let names: Vec<_> = uris.iter().map(|&u| SanType::URI(u.try_into().unwrap())).collect();
            make(&|p| p.subject_alt_names = names.clone())
        };
        assert!(make(&|_| {}).is_ok());
        for (no_domain, found) in [
            (uris(&[]), "0 URIs"),
            (uris(&["spiffe://td", "spiffe://other"]), "2 URIs"),
            (uris(&["https://td"]), "https://td"),
            (uris(&["spiffe://td/ns/a/sa/b"]), "spiffe://td/ns/a/sa/b"),
        ] {
            let error = no_domain.unwrap_err();
            assert!(matches!(error, CaError::NoTrustDomain { .. }));
            assert!(error.to_string().contains(found), "{error}");
        }
        assert!(matches!(make(&|p| p.is_ca = IsCa::ExplicitNoCa), Err(CaError::NotAuthority(_))));
        assert!(matches!(make(&|p| valid(p, -60, -30)), Err(CaError::Expired { .. })));
    }
}
