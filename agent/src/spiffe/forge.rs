//! For tests: certificates, good ones and every kind of bad one.

use jiff::{SignedDuration, Timestamp};
use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa,
    Issuer, KeyPair, KeyUsagePurpose, SanType,
};
use rustls::pki_types::{CertificateDer, PrivatePkcs8KeyDer};
use time::OffsetDateTime;

use super::{Bundle, Svid};

/// An authority that signs whatever it is asked to.
pub(crate) struct Forger {
    pub(crate) certificate: CertificateDer<'static>,
    issuer: Issuer<'static, KeyPair>,
}

/// A chain (leaf first) and the leaf's key.
pub(crate) struct Forged {
    pub(crate) chain: Vec<CertificateDer<'static>>,
    pub(crate) key: PrivatePkcs8KeyDer<'static>,
}

impl Forger {
    /// A root of this name, valid around now.
    pub(crate) fn root(name: &str) -> Self {
        Self::root_with(name, |_| {})
    }

    /// A root with changed parameters.
    pub(crate) fn root_with(name: &str, change: impl FnOnce(&mut CertificateParams)) -> Self {
        let key = KeyPair::generate().unwrap();
        let mut params = signer(name);
        change(&mut params);
        let certificate = params.self_signed(&key).unwrap().der().clone();
        Self { certificate, issuer: Issuer::new(params, key) }
    }

    /// An intermediate that this authority has signed.
    pub(crate) fn intermediate(
        &self,
        name: &str,
        change: impl FnOnce(&mut CertificateParams),
    ) -> Self {
        let key = KeyPair::generate().unwrap();
        let mut params = signer(name);
        change(&mut params);
        let certificate = params.signed_by(&key, &self.issuer).unwrap().der().clone();
        Self { certificate, issuer: Issuer::new(params, key) }
    }

    /// A leaf as it should be.
    pub(crate) fn leaf(&self, uri: &str) -> Forged {
        self.leaf_with(uri, |_| {})
    }

    /// A leaf that starts as it should be and is changed before it is signed.
    pub(crate) fn leaf_with(
        &self,
        uri: &str,
        change: impl FnOnce(&mut CertificateParams),
    ) -> Forged {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        params.subject_alt_names = vec![SanType::URI(uri.try_into().unwrap())];
        params.is_ca = IsCa::ExplicitNoCa;
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages =
            vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        valid(&mut params, -300, 3600);
        change(&mut params);
        let certificate = params.signed_by(&key, &self.issuer).unwrap();
        Forged {
            chain: vec![certificate.der().clone()],
            key: PrivatePkcs8KeyDer::from(key.serialize_der()),
        }
    }

    /// An SVID as it should be.
    pub(crate) fn svid(&self, uri: &str) -> Svid {
        self.leaf(uri).into_svid()
    }

    /// The bundle of this root.
    pub(crate) fn bundle(&self) -> Bundle {
        Bundle::from_der([self.certificate.clone()]).unwrap()
    }
}

impl Forged {
    pub(crate) fn into_svid(self) -> Svid {
        Svid::new(self.chain, self.key).unwrap()
    }

    /// With further certificates behind the leaf.
    pub(crate) fn with(mut self, more: &[&CertificateDer<'static>]) -> Self {
        self.chain.extend(more.iter().map(|&c| c.clone()));
        self
    }
}

fn signer(name: &str) -> CertificateParams {
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    params.distinguished_name.push(DnType::CommonName, name);
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
    valid(&mut params, -3600, 30 * 24 * 3600);
    params
}

/// Valid between two moments, in seconds from now.
pub(crate) fn valid(params: &mut CertificateParams, from: i64, until: i64) {
    let at = |seconds| {
        let t = Timestamp::now() + SignedDuration::from_secs(seconds);
        OffsetDateTime::from_unix_timestamp(t.as_second()).unwrap()
    };
    params.not_before = at(from);
    params.not_after = at(until);
}
