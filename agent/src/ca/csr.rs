//! A certificate signing request (PKCS #10, RFC 2986), read strictly.
//!
//! Only its public key is used, and that the requester holds the private one. Names in it
//! prove nothing: a subject is ignored, a subject alternative name must be the one that was
//! authorized, and everything else that could end in a certificate is refused.

use rustls::pki_types::pem::{SectionKind, SliceIter};
use x509_parser::{
    certification_request::X509CertificationRequest,
    cri_attributes::ParsedCriAttribute,
    extensions::{GeneralName, ParsedExtension, X509Extension},
    prelude::FromDer,
    public_key::PublicKey,
    x509::SubjectPublicKeyInfo,
};

use crate::spiffe::{SpiffeId, id::Excerpt};

/// The longest request that is read, in bytes of PEM.
pub const MAX_CSR_LEN: usize = 16 * 1024;
/// The shortest RSA modulus, in bits.
const MIN_RSA_BITS: usize = 2048;
/// The longest: verifying grows with its square.
const MAX_RSA_BITS: usize = 8192;
const P256: &str = "1.2.840.10045.3.1.7";
const P384: &str = "1.3.132.0.34";

/// A request that may be signed.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Csr {
    /// The public key, DER SubjectPublicKeyInfo; the requester holds the private one.
    pub public_key: Vec<u8>,
}

/// Why a request is not signed.
#[derive(Debug, thiserror::Error, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum CsrError {
    /// It is too long.
    #[error("the CSR has {0} bytes; at most {MAX_CSR_LEN} are read")]
    TooLong(usize),
    /// It is no PEM block of the right kind.
    #[error("the CSR is not exactly one PEM block BEGIN CERTIFICATE REQUEST ({0})")]
    Pem(String),
    /// It is no well-formed request.
    #[error("the CSR is not a well-formed PKCS #10 request ({0})")]
    Malformed(String),
    /// Its key is of another kind.
    #[error("the CSR's key is {0}; use ECDSA P-256 or P-384, or RSA of at least 2048 bits")]
    Key(String),
    /// It is not signed by its own key.
    #[error("the CSR's signature does not belong to its key")]
    Signature,
    /// It asks for a name.
    #[error("the CSR asks for the name {0}; it may have none but the URI of the identity itself")]
    Name(Excerpt),
    /// It asks for more than one name.
    #[error(
        "the CSR asks for {0} alternative names; it may have none but the URI of the identity itself"
    )]
    Names(usize),
    /// It asks to become an authority.
    #[error("the CSR asks for CA:TRUE; only the authority itself may sign")]
    Authority,
    /// It asks for anything else.
    #[error(
        "the CSR has the {what} {oid}, which is not accepted; request a key and at most a URI name"
    )]
    Unexpected {
        /// Extension or attribute.
        what: &'static str,
        /// Its object identifier.
        oid: String,
    },
}

impl Csr {
    /// Reads a PEM request for `id`.
    ///
    /// # Errors
    /// The first rule that it breaks.
    pub fn read(pem: &[u8], id: &SpiffeId) -> Result<Self, CsrError> {
        if pem.len() > MAX_CSR_LEN {
            return Err(CsrError::TooLong(pem.len()));
        }
        let mut blocks = Vec::new();
        for block in SliceIter::<(SectionKind, Vec<u8>)>::new(pem).take(2) {
            blocks.push(block.map_err(|e| CsrError::Pem(e.to_string()))?);
        }
        match &blocks[..] {
            [(SectionKind::Csr, der)] => Self::from_der(der, id),
            [(kind, _)] => Err(CsrError::Pem(format!("there is a block of kind {kind:?}"))),
            [] => Err(CsrError::Pem("there is no block".into())),
            _ => Err(CsrError::Pem("there are several blocks".into())),
        }
    }

    fn from_der(der: &[u8], id: &SpiffeId) -> Result<Self, CsrError> {
        let (rest, request) = X509CertificationRequest::from_der(der).map_err(malformed)?;
        if !rest.is_empty() {
            return Err(CsrError::Malformed("bytes follow the request".into()));
        }
        let info = &request.certification_request_info;
        check_key(&info.subject_pki)?;
        let mut extended = false;
        for attribute in info.iter_attributes() {
            match attribute.parsed_attribute() {
                ParsedCriAttribute::ExtensionRequest(extensions) if !extended => {
                    extended = true;
                    check_extensions(&extensions.extensions, id)?;
                }
                _ => {
                    let oid = attribute.oid.to_id_string();
                    return Err(CsrError::Unexpected { what: "attribute", oid });
                }
            }
        }
        // After the key's size: a library that refuses short keys by itself says less.
        request.verify_signature().map_err(|_| CsrError::Signature)?;
        Ok(Self { public_key: info.subject_pki.raw.to_vec() })
    }
}

fn check_key(key: &SubjectPublicKeyInfo<'_>) -> Result<(), CsrError> {
    match key.parsed().map_err(malformed)? {
        PublicKey::EC(_) => {
            let curve = key.algorithm.parameters.as_ref().and_then(|p| p.as_oid().ok());
            let curve = curve.map(|oid| oid.to_id_string()).unwrap_or_default();
            if curve == P256 || curve == P384 {
                return Ok(());
            }
            Err(CsrError::Key(format!("on the curve {curve}")))
        }
        PublicKey::RSA(rsa) => match rsa.key_size() {
            MIN_RSA_BITS..=MAX_RSA_BITS => Ok(()),
            bits => Err(CsrError::Key(format!("RSA of {bits} bits"))),
        },
        _ => Err(CsrError::Key(format!("of algorithm {}", key.algorithm.algorithm.to_id_string()))),
    }
}

fn check_extensions(extensions: &[X509Extension<'_>], id: &SpiffeId) -> Result<(), CsrError> {
    let mut named = false;
    for extension in extensions {
        match extension.parsed_extension() {
            ParsedExtension::SubjectAlternativeName(names) if !named => {
                named = true;
                match &names.general_names[..] {
                    [GeneralName::URI(uri)] if is_same(uri, id) => {}
                    [name] => return Err(CsrError::Name(Excerpt::new(&name.to_string()))),
                    names => return Err(CsrError::Names(names.len())),
                }
            }
            ParsedExtension::BasicConstraints(constraints) if constraints.ca => {
                return Err(CsrError::Authority);
            }
            _ => {
                let oid = extension.oid.to_id_string();
                return Err(CsrError::Unexpected { what: "extension", oid });
            }
        }
    }
    Ok(())
}

fn is_same(uri: &str, id: &SpiffeId) -> bool {
    SpiffeId::parse(uri).is_ok_and(|parsed| parsed == *id)
}

fn malformed(error: impl std::fmt::Display) -> CsrError {
    CsrError::Malformed(error.to_string())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use rcgen::{
        Attribute, BasicConstraints, CertificateParams, CustomExtension, IsCa, KeyPair,
        KeyUsagePurpose, PKCS_ECDSA_P256_SHA256, PKCS_ECDSA_P384_SHA384, PKCS_ECDSA_P521_SHA512,
        PKCS_ED25519, PublicKeyData, RsaKeySize, SanType, SignatureAlgorithm,
    };

    use super::*;

    const ID: &str = "spiffe://td/ns/shop/sa/web";

    fn id() -> SpiffeId {
        SpiffeId::parse(ID).unwrap()
    }

    fn uri(text: &str) -> SanType {
        SanType::URI(text.try_into().unwrap())
    }

    fn with_key(key: &KeyPair, change: impl FnOnce(&mut CertificateParams)) -> String {
        let mut params = CertificateParams::default();
        params.subject_alt_names = vec![uri(ID)];
        change(&mut params);
        params.serialize_request(key).unwrap().pem().unwrap()
    }

    fn make(change: impl FnOnce(&mut CertificateParams)) -> String {
        with_key(&KeyPair::generate().unwrap(), change)
    }

    fn read(pem: &str) -> Result<Csr, CsrError> {
        Csr::read(pem.as_bytes(), &id())
    }

    #[test]
    fn the_key_is_taken_and_nothing_else() {
        let key = KeyPair::generate().unwrap();
        let csr = read(&with_key(&key, |_| {})).unwrap();
        assert_eq!(csr.public_key, key.subject_public_key_info());
        assert!(read(&make(|p| p.subject_alt_names.clear())).is_ok(), "no name is fine");
        assert!(
            read(&make(|p| p.subject_alt_names = vec![uri("SPIFFE://TD/ns/shop/sa/web")])).is_ok()
        );
        let subject = make(|p| p.distinguished_name.push(rcgen::DnType::CommonName, "admin"));
        assert!(read(&subject).is_ok(), "a subject is not looked at");
    }

    #[test]
    fn names_that_were_not_authorized() {
        let names = |names: Vec<SanType>| read(&make(|p| p.subject_alt_names = names)).unwrap_err();
        for other in [
            uri("spiffe://td/ns/shop/sa/admin"),
            uri("spiffe://other/ns/shop/sa/web"),
            uri("https://td"),
            SanType::DnsName("web.shop.svc".try_into().unwrap()),
            SanType::IpAddress([10, 0, 0, 1].into()),
        ] {
            let error = names(vec![other.clone()]);
            assert!(matches!(error, CsrError::Name(_)), "{other:?}: {error}");
            assert_eq!(names(vec![uri(ID), other]), CsrError::Names(2));
        }
        assert_eq!(names(vec![uri(ID), uri(ID)]), CsrError::Names(2));
    }

    #[test]
    fn nothing_else_may_be_asked_for() {
        assert!(read(&make(|_| {})).is_ok());
        let ca = make(|p| p.is_ca = IsCa::Ca(BasicConstraints::Unconstrained));
        assert_eq!(read(&ca), Err(CsrError::Authority));
        let usage = make(|p| p.key_usages = vec![KeyUsagePurpose::KeyCertSign]);
        assert!(matches!(read(&usage), Err(CsrError::Unexpected { what: "extension", oid })
            if oid == "2.5.29.15"));
        let custom = make(|p| {
            p.custom_extensions =
                vec![CustomExtension::from_oid_content(&[1, 2, 3, 4], vec![5, 0])];
        });
        assert!(matches!(read(&custom), Err(CsrError::Unexpected { oid, .. }) if oid == "1.2.3.4"));
        let key = KeyPair::generate().unwrap();
        // challengePassword, as openssl would ask for it.
        let attribute = Attribute {
            oid: &[1, 2, 840, 113_549, 1, 9, 7],
            values: vec![0x31, 0x03, 0x0c, 0x01, b'x'],
        };
        let request = CertificateParams::default()
            .serialize_request_with_attributes(&key, vec![attribute])
            .unwrap();
        assert!(matches!(
            read(&request.pem().unwrap()),
            Err(CsrError::Unexpected { what: "attribute", .. })
        ));
    }

    #[test]
    fn keys_that_are_strong_enough() {
        let generate = |algorithm: &'static SignatureAlgorithm| {
            read(&with_key(&KeyPair::generate_for(algorithm).unwrap(), |_| {}))
        };
        assert!(generate(&PKCS_ECDSA_P256_SHA256).is_ok());
        assert!(generate(&PKCS_ECDSA_P384_SHA384).is_ok());
        for weak in [&PKCS_ED25519, &PKCS_ECDSA_P521_SHA512] {
            let error = generate(weak).unwrap_err();
            assert!(matches!(error, CsrError::Key(_)), "{error}");
        }
        let rsa = KeyPair::generate_rsa_for(&rcgen::PKCS_RSA_SHA256, RsaKeySize::_2048).unwrap();
        let csr = read(&with_key(&rsa, |_| {})).unwrap();
        assert_eq!(csr.public_key, rsa.subject_public_key_info());
    }

    #[test]
    fn a_short_rsa_key_is_named() {
        // openssl makes what our own library refuses to.
        let dir = tempfile::tempdir().unwrap();
        let out = dir.path().join("short.csr");
        let status = std::process::Command::new("openssl")
            .args(["req", "-new", "-newkey", "rsa:1024", "-nodes", "-subj", "/CN=x", "-keyout"])
            .arg(dir.path().join("key"))
            .arg("-out")
            .arg(&out)
            .stderr(std::process::Stdio::null())
            .status()
            .expect("openssl is needed for this test");
        assert!(status.success());
        let error = read(&std::fs::read_to_string(out).unwrap()).unwrap_err();
        assert_eq!(error, CsrError::Key("RSA of 1024 bits".into()));
    }

    #[test]
    fn the_signature_must_be_the_keys() {
        let pem = make(|_| {});
        let mut der = pem::parse(&pem).unwrap().into_contents();
        assert!(Csr::from_der(&der, &id()).is_ok());
        let last = der.len() - 1;
        der[last] ^= 1;
        assert_eq!(Csr::from_der(&der, &id()), Err(CsrError::Signature));
        der.push(0);
        assert!(matches!(Csr::from_der(&der, &id()), Err(CsrError::Malformed(_))));
    }

    #[test]
    fn text_that_is_no_request() {
        let good = make(|_| {});
        for bad in ["", "garbage", &format!("{good}{good}"), &good.replace("-----END", "")] {
            assert!(matches!(read(bad), Err(CsrError::Pem(_))), "{bad}");
        }
        let wrong_kind = good.replace("CERTIFICATE REQUEST", "CERTIFICATE");
        assert!(matches!(read(&wrong_kind), Err(CsrError::Pem(_))));
        let long = "a".repeat(MAX_CSR_LEN + 1);
        assert_eq!(read(&long), Err(CsrError::TooLong(MAX_CSR_LEN + 1)));
        let padded = format!("{}{good}", " \n".repeat(100));
        assert!(read(&padded).is_ok(), "white space around it does not matter");
    }

    proptest! {
        #[test]
        fn a_flipped_bit_never_gets_another_key_signed(at in 0usize..200, bit in 0u8..8) {
            let key = KeyPair::generate().unwrap();
            let mut der = pem::parse(with_key(&key, |_| {})).unwrap().into_contents();
            let at = at % der.len();
            der[at] ^= 1 << bit;
            // Some bits carry nothing (the count of a bit string's unused bits).
            if let Ok(csr) = Csr::from_der(&der, &id()) {
                prop_assert_eq!(csr.public_key, key.subject_public_key_info());
            }
        }

        #[test]
        fn garbage_is_refused_without_a_panic(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            prop_assert!(Csr::from_der(&bytes, &id()).is_err());
        }
    }
}
