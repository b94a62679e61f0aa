//! An authority that somebody else has made: Istio's four files.
//!
//! `ca-cert.pem` signs with `ca-key.pem`, `cert-chain.pem` leads from it to one of the roots in
//! `root-cert.pem`.

use std::{fmt, sync::Arc, time::Duration};

use jiff::Timestamp;
use rcgen::{Issuer, KeyPair, PublicKeyData};
use rustls::pki_types::{CertificateDer, pem::PemObject};
use x509_parser::{certificate::X509Certificate, prelude::FromDer};

use super::{
    CaError, Intermediate,
    sign::{Signer, crypto, uris},
};
use crate::spiffe::{
    Bundle, SpiffeId, TrustDomain,
    validate::{PeerRole, validate},
};

/// Names of the files.
pub const CA_CERT: &str = "ca-cert.pem";
/// The signing certificate's key.
pub const CA_KEY: &str = "ca-key.pem";
/// The roots.
pub const ROOT_CERT: &str = "root-cert.pem";
/// From the signing certificate to the root.
pub const CERT_CHAIN: &str = "cert-chain.pem";
/// The most certificates between leaf and root.
const MAX_CHAIN: usize = 4;

/// The files' contents.
#[derive(Clone)]
pub struct ProvidedFiles {
    /// [`CA_CERT`].
    pub ca_cert: Vec<u8>,
    /// [`CA_KEY`].
    pub ca_key: Vec<u8>,
    /// [`ROOT_CERT`].
    pub root_cert: Vec<u8>,
    /// [`CERT_CHAIN`]; may be empty when the signing certificate is a root.
    pub cert_chain: Vec<u8>,
}

/// A provided authority that can sign for its trust domain.
pub struct Provided {
    signer: Signer,
    key: String,
    /// From the signing certificate up, without the root.
    above: Vec<CertificateDer<'static>>,
    roots: Bundle,
    /// False when its path length forbids intermediates below it.
    delegates: bool,
}

impl Provided {
    /// Reads the files and tries the chain out: a leaf that it signs must verify.
    ///
    /// # Errors
    /// The file that is wrong, and why.
    pub fn read(
        files: &ProvidedFiles,
        domain: &TrustDomain,
        now: Timestamp,
    ) -> Result<Self, CaError> {
        let certificates = certificates(CA_CERT, &files.ca_cert)?;
        let [certificate] = &certificates[..] else {
            let problem = format!("{} certificates; give exactly one", certificates.len());
            return Err(CaError::Provided { file: CA_CERT, problem });
        };
        let roots = Bundle::from_pem(&files.root_cert)
            .map_err(|e| CaError::Provided { file: ROOT_CERT, problem: e.to_string() })?;
        let text = String::from_utf8(files.ca_key.clone()).map_err(|_| CaError::Key)?;
        let key = KeyPair::from_pem(&text).map_err(|_| CaError::Key)?;
        let (_, parsed) = X509Certificate::from_der(certificate).map_err(crypto)?;
        let delegates = check(&parsed, domain)?;
        if parsed.public_key().raw != key.subject_public_key_info() {
            return Err(CaError::KeyMismatch);
        }
        let is_root = |c: &CertificateDer<'_>| roots.certificates().any(|root| root == c);
        let mut above = Vec::new();
        if !is_root(certificate) {
            above.push(certificate.clone());
            let chain = self::certificates(CERT_CHAIN, &files.cert_chain)?;
            above.extend(chain.into_iter().filter(|c| c != certificate && !is_root(c)));
        }
        if above.len() > MAX_CHAIN {
            let problem = format!("{} certificates up to the root are too many", above.len());
            return Err(CaError::Provided { file: CERT_CHAIN, problem });
        }
        let mut not_after = Timestamp::MAX;
        for c in above.iter().chain([certificate]) {
            let (_, c) = X509Certificate::from_der(c).map_err(crypto)?;
            let end = Timestamp::from_second(c.validity().not_after.timestamp()).map_err(crypto)?;
            not_after = not_after.min(end);
        }
        if not_after <= now {
            return Err(CaError::Expired { domain: domain.clone(), not_after });
        }
        let issuer = Issuer::from_ca_cert_der(certificate, key).map_err(crypto)?;
        let signer = Signer { domain: domain.clone(), issuer, not_after };
        let provided = Self { signer, key: text, above, roots, delegates };
        provided.try_out(now)?;
        Ok(provided)
    }

    /// The roots' bundle.
    pub fn bundle(&self) -> &Bundle {
        &self.roots
    }

    /// When the signing certificate, or one above it, runs out.
    pub fn not_after(&self) -> Timestamp {
        self.signer.not_after
    }

    /// A replica's own intermediate below it; itself where its path length forbids one.
    pub fn intermediate(
        &self,
        now: Timestamp,
        lifetime: Duration,
    ) -> Result<Intermediate, CaError> {
        if self.delegates {
            return Intermediate::create(&self.signer, &self.above, now, lifetime);
        }
        let key = KeyPair::from_pem(&self.key).map_err(|_| CaError::Key)?;
        Intermediate::new(
            self.above.clone(),
            key,
            self.signer.domain.clone(),
            self.signer.not_after,
        )
    }

    fn try_out(&self, now: Timestamp) -> Result<(), CaError> {
        let wrong = |problem: String| CaError::Provided { file: CERT_CHAIN, problem };
        let id = SpiffeId::for_service_account(&self.signer.domain, "try", "out")
            .map_err(|e| wrong(e.to_string()))?;
        let key = KeyPair::generate().map_err(crypto)?.subject_public_key_info();
        let life = Duration::from_secs(60);
        let chain = self.intermediate(now, life)?.issue(&id, &key, now, life)?;
        let bundle = Arc::new(self.roots.clone());
        validate(&chain[0], &chain[1..], |_| Some(bundle), PeerRole::Server, now).map_err(|e| {
            wrong(format!("what {CA_CERT} signs does not verify under {ROOT_CERT} ({e})"))
        })?;
        Ok(())
    }
}

impl fmt::Debug for Provided {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Provided")
            .field("domain", &self.signer.domain)
            .field("not_after", &self.signer.not_after)
            .field("delegates", &self.delegates)
            .finish_non_exhaustive()
    }
}

/// Holds the signing certificate against what it is for; true when it may have intermediates.
fn check(certificate: &X509Certificate<'_>, domain: &TrustDomain) -> Result<bool, CaError> {
    let wrong = |problem: &str| CaError::Provided { file: CA_CERT, problem: problem.into() };
    let constraints = certificate.basic_constraints().map_err(crypto)?.map(|c| c.value);
    let Some(constraints) = constraints.filter(|c| c.ca) else {
        return Err(wrong("is no signing certificate (CA:TRUE)"));
    };
    let usage = certificate.key_usage().map_err(crypto)?;
    if usage.is_some_and(|usage| !usage.value.key_cert_sign()) {
        return Err(wrong("may not sign certificates (keyUsage lacks keyCertSign)"));
    }
    // Istio's own tools name the authority by DNS: a SPIFFE ID may be absent, not foreign.
    for uri in uris(certificate)? {
        if let Ok(id) = SpiffeId::parse(uri)
            && id.trust_domain() != *domain
        {
            return Err(CaError::ForeignTrustDomain {
                expected: domain.clone(),
                found: id.trust_domain(),
            });
        }
    }
    Ok(constraints.path_len_constraint.is_none_or(|length| length > 0))
}

fn certificates(file: &'static str, pem: &[u8]) -> Result<Vec<CertificateDer<'static>>, CaError> {
    CertificateDer::pem_slice_iter(pem)
        .take(MAX_CHAIN + 3)
        .collect::<Result<_, _>>()
        .map_err(|e| CaError::Provided { file, problem: format!("is not PEM ({e})") })
}

#[cfg(test)]
mod tests {
    use rcgen::{BasicConstraints, CertificateParams, DnType, IsCa, KeyUsagePurpose, SanType};

    use super::*;
    use crate::spiffe::forge::valid;

    const LIFE: Duration = Duration::from_secs(3600);

    fn td() -> TrustDomain {
        TrustDomain::parse("td").unwrap()
    }

    /// A signing certificate with its key.
    struct Made {
        params: CertificateParams,
        key: KeyPair,
        der: CertificateDer<'static>,
    }

    impl Made {
        fn new(
            name: &str,
            length: BasicConstraints,
            upper: Option<&Self>,
            change: impl FnOnce(&mut CertificateParams),
        ) -> Self {
            let key = KeyPair::generate().unwrap();
            let mut params = CertificateParams::default();
            params.distinguished_name.push(DnType::CommonName, name);
            params.is_ca = IsCa::Ca(length);
            params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
            valid(&mut params, -3600, 7200);
            change(&mut params);
            let der = match upper {
                None => params.self_signed(&key).unwrap().der().clone(),
                Some(upper) => {
                    let issuer = Issuer::from_params(&upper.params, &upper.key);
                    params.signed_by(&key, &issuer).unwrap().der().clone()
                }
            };
            Self { params, key, der }
        }

        fn pem(&self) -> Vec<u8> {
            pem::encode(&pem::Pem::new("CERTIFICATE", self.der.to_vec())).into_bytes()
        }
    }

    fn files(signer: &Made, chain: &[&Made], root: &Made) -> ProvidedFiles {
        ProvidedFiles {
            ca_cert: signer.pem(),
            ca_key: signer.key.serialize_pem().into_bytes(),
            root_cert: root.pem(),
            cert_chain: chain.iter().flat_map(|c| c.pem()).collect(),
        }
    }

    fn read(files: &ProvidedFiles) -> Result<Provided, CaError> {
        Provided::read(files, &td(), Timestamp::now())
    }

    fn issued(provided: &Provided) -> usize {
        let now = Timestamp::now();
        let id = SpiffeId::parse("spiffe://td/ns/a/sa/b").unwrap();
        let key = KeyPair::generate().unwrap().subject_public_key_info();
        let chain = provided.intermediate(now, LIFE).unwrap().issue(&id, &key, now, LIFE).unwrap();
        let bundle = Arc::new(provided.bundle().clone());
        validate(&chain[0], &chain[1..], |_| Some(bundle), PeerRole::Client, now).unwrap();
        chain.len()
    }

    #[test]
    fn roots_and_intermediates_sign_as_far_as_their_path_length_lets_them() {
        let free = BasicConstraints::Unconstrained;
        let root = Made::new("root", free, None, |_| {});
        assert_eq!(issued(&read(&files(&root, &[], &root)).unwrap()), 2, "leaf, our own");
        let middle = Made::new("middle", BasicConstraints::Constrained(1), Some(&root), |_| {});
        let provided = read(&files(&middle, &[&middle, &root], &root)).unwrap();
        assert_eq!(issued(&provided), 3, "leaf, our own, the provided one");
        let last = Made::new("last", BasicConstraints::Constrained(0), Some(&middle), |_| {});
        let provided = read(&files(&last, &[&last, &middle, &root], &root)).unwrap();
        assert_eq!(issued(&provided), 3, "leaf, the provided one, the one above it");
        assert!(!format!("{provided:?}").to_lowercase().contains("private"));
    }

    #[test]
    fn files_that_do_not_fit() {
        let free = BasicConstraints::Unconstrained;
        let root = Made::new("root", free, None, |_| {});
        let other = Made::new("other", free, None, |_| {});
        let middle = Made::new("middle", free, Some(&root), |_| {});
        let good = files(&middle, &[&middle], &root);
        assert!(read(&good).is_ok());

        let broken = |change: &dyn Fn(&mut ProvidedFiles)| {
            let mut files = good.clone();
            change(&mut files);
            read(&files).unwrap_err().to_string()
        };
        let key = other.key.serialize_pem().into_bytes();
        assert!(broken(&|f| f.ca_key = key.clone()).contains("does not belong"));
        assert!(broken(&|f| f.ca_key = b"garbage".to_vec()).contains("private key"));
        assert!(broken(&|f| f.root_cert = other.pem()).contains("does not verify"));
        assert!(broken(&|f| f.root_cert.clear()).contains(ROOT_CERT));
        assert!(broken(&|f| f.ca_cert.clear()).contains("0 certificates"));
        assert!(broken(&|f| f.ca_cert.extend(root.pem())).contains("2 certificates"));

        let foreign = Made::new("foreign", free, None, |p| {
            p.subject_alt_names = vec![SanType::URI("spiffe://other".try_into().unwrap())];
        });
        let error = read(&files(&foreign, &[], &foreign)).unwrap_err();
        assert!(matches!(error, CaError::ForeignTrustDomain { .. }), "{error}");
        let leaf = Made::new("leaf", free, Some(&root), |p| p.is_ca = IsCa::ExplicitNoCa);
        assert!(read(&files(&leaf, &[], &root)).unwrap_err().to_string().contains("CA:TRUE"));
        let old = Made::new("old", free, Some(&root), |p| valid(p, -7200, -60));
        assert!(matches!(read(&files(&old, &[], &root)), Err(CaError::Expired { .. })));
    }
}
