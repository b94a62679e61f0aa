//! For tests: certificates, good ones and every kind of bad one.

use aws_lc_rs::{
    rand::SystemRandom,
    rsa,
    signature::{self, EcdsaKeyPair, KeyPair as _, RsaKeyPair},
};
use jiff::{SignedDuration, Timestamp};
use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa,
    Issuer, KeyPair, KeyUsagePurpose, SanType,
};
use rustls::pki_types::{CertificateDer, PrivatePkcs8KeyDer};
use time::OffsetDateTime;

use super::{
    Bundle, Svid,
    jwt_bundle::{Algorithm, Curve, JwtKey},
};

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

/// A key that signs any bytes as a JWT-SVID's.
pub(crate) enum JwtForger {
    Ec(Curve, EcdsaKeyPair),
    Rsa(RsaKeyPair),
}

impl JwtForger {
    /// A P-256 key.
    pub(crate) fn ec() -> Self {
        Self::on(Curve::P256)
    }

    fn on(curve: Curve) -> Self {
        let algorithm = match curve {
            Curve::P256 => &signature::ECDSA_P256_SHA256_FIXED_SIGNING,
            Curve::P384 => &signature::ECDSA_P384_SHA384_FIXED_SIGNING,
            Curve::P521 => &signature::ECDSA_P521_SHA512_FIXED_SIGNING,
        };
        Self::Ec(curve, EcdsaKeyPair::generate(algorithm).unwrap())
    }

    /// One key of each kind.
    pub(crate) fn one_of_each() -> [Self; 4] {
        let rsa = RsaKeyPair::generate(rsa::KeySize::Rsa2048).unwrap();
        [Self::on(Curve::P256), Self::on(Curve::P384), Self::on(Curve::P521), Self::Rsa(rsa)]
    }

    /// The public key.
    pub(crate) fn key(&self) -> JwtKey {
        match self {
            Self::Ec(curve, pair) => {
                JwtKey::from_point(*curve, pair.public_key().as_ref()).unwrap()
            }
            Self::Rsa(pair) => {
                let key = pair.public_key();
                let (n, e) = (key.modulus(), key.exponent());
                JwtKey::from_modulus(
                    n.big_endian_without_leading_zero(),
                    e.big_endian_without_leading_zero(),
                )
                .unwrap()
            }
        }
    }

    /// The signature over `message`; `None` when the key cannot make one of this algorithm.
    pub(crate) fn sign(&self, algorithm: Algorithm, message: &[u8]) -> Option<Vec<u8>> {
        let random = SystemRandom::new();
        match self {
            Self::Ec(curve, pair) => (curve.algorithm() == algorithm)
                .then(|| pair.sign(&random, message).unwrap().as_ref().to_vec()),
            Self::Rsa(pair) => {
                let encoding = match algorithm {
                    Algorithm::RS256 => &signature::RSA_PKCS1_SHA256,
                    Algorithm::RS384 => &signature::RSA_PKCS1_SHA384,
                    Algorithm::RS512 => &signature::RSA_PKCS1_SHA512,
                    Algorithm::PS256 => &signature::RSA_PSS_SHA256,
                    Algorithm::PS384 => &signature::RSA_PSS_SHA384,
                    Algorithm::PS512 => &signature::RSA_PSS_SHA512,
                    _ => return None,
                };
                let mut out = vec![0; pair.public_modulus_len()];
                pair.sign(encoding, &random, message, &mut out).unwrap();
                Some(out)
            }
        }
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
