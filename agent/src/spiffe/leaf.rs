//! An X509-SVID's leaf certificate: the standard's own rules (X509-SVID sections 3 to 5).

use jiff::Timestamp;
use x509_parser::{
    certificate::X509Certificate,
    extensions::{GeneralName, ParsedExtension, X509Extension},
    prelude::FromDer,
};

use super::{SpiffeId, SpiffeIdError};

/// The largest leaf that is parsed, in bytes.
pub const MAX_LEAF_LEN: usize = 16 * 1024;

/// What a leaf says, once it has passed the standard's rules. Nothing is authenticated by it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Leaf {
    /// The identity: the one URI SAN.
    pub id: SpiffeId,
    /// Valid from.
    pub not_before: Timestamp,
    /// Valid until.
    pub not_after: Timestamp,
}

/// Which rule of an X509-SVID's leaf a certificate breaks.
#[derive(Debug, thiserror::Error, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum LeafError {
    /// It is not one DER certificate.
    #[error("it is not one well-formed X.509 certificate ({0})")]
    Malformed(String),
    /// It has no subject alternative name.
    #[error(
        "it has no subject alternative name; an X509-SVID has exactly one, a URI with its SPIFFE ID"
    )]
    NoSan,
    /// It has names, but none is a URI.
    #[error(
        "its {0} subject alternative name(s) include no URI; an X509-SVID has exactly one, with its SPIFFE ID"
    )]
    NoUriSan(usize),
    /// It has several URI names.
    #[error("it has {0} URI subject alternative names; an X509-SVID has exactly one")]
    SeveralUriSans(usize),
    /// The URI is not a SPIFFE ID.
    #[error("its URI is not a SPIFFE ID: {0}")]
    NotSpiffeId(#[from] SpiffeIdError),
    /// The ID names a whole trust domain.
    #[error("its SPIFFE ID {0} has no path and names the whole trust domain; a workload's has one")]
    NoPath(SpiffeId),
    /// It is a signing certificate.
    #[error("it is a signing certificate (CA:TRUE); an X509-SVID's leaf says CA:FALSE")]
    IsCa,
    /// Its key usage is absent, not critical, or wrong.
    #[error(
        "its keyUsage {0}; an X509-SVID's is critical, has digitalSignature and neither keyCertSign nor cRLSign"
    )]
    KeyUsage(&'static str),
    /// Its extended key usage lacks one side.
    #[error(
        "its extendedKeyUsage lacks serverAuth or clientAuth; an X509-SVID that has one has both"
    )]
    ExtendedKeyUsage,
}

impl Leaf {
    /// Parses a DER certificate and holds it against the leaf's rules.
    pub fn parse(der: &[u8]) -> Result<Self, LeafError> {
        if der.len() > MAX_LEAF_LEN {
            return Err(LeafError::Malformed(format!(
                "{} bytes, more than {MAX_LEAF_LEN}",
                der.len()
            )));
        }
        let (rest, certificate) = X509Certificate::from_der(der).map_err(malformed)?;
        if !rest.is_empty() {
            return Err(LeafError::Malformed("bytes follow the certificate".into()));
        }
        // The parser's accessors take some broken extensions for absent ones.
        let broken = |e: &X509Extension<'_>| {
            matches!(e.parsed_extension(), ParsedExtension::ParseError { .. })
        };
        if let Some(extension) = certificate.extensions().iter().find(|e| broken(e)) {
            return Err(LeafError::Malformed(format!(
                "extension {} is not decodable",
                extension.oid
            )));
        }
        let id = uri_san(&certificate)?;
        if id.path().is_empty() {
            return Err(LeafError::NoPath(id));
        }
        if certificate.basic_constraints().map_err(malformed)?.is_some_and(|c| c.value.ca) {
            return Err(LeafError::IsCa);
        }
        check_key_usage(&certificate)?;
        if let Some(usage) = certificate.extended_key_usage().map_err(malformed)?
            && !(usage.value.server_auth && usage.value.client_auth)
        {
            return Err(LeafError::ExtendedKeyUsage);
        }
        let validity = certificate.validity();
        Ok(Self {
            id,
            not_before: timestamp(validity.not_before)?,
            not_after: timestamp(validity.not_after)?,
        })
    }
}

impl LeafError {
    /// A short stable name, for counters.
    pub const fn kind(&self) -> &'static str {
        match self {
            Self::Malformed(_) => "malformed_certificate",
            Self::NoSan => "no_san",
            Self::NoUriSan(_) => "no_uri_san",
            Self::SeveralUriSans(_) => "several_uri_sans",
            Self::NotSpiffeId(_) => "not_a_spiffe_id",
            Self::NoPath(_) => "no_path",
            Self::IsCa => "leaf_is_ca",
            Self::KeyUsage(_) => "key_usage",
            Self::ExtendedKeyUsage => "extended_key_usage",
        }
    }
}

fn uri_san(certificate: &X509Certificate<'_>) -> Result<SpiffeId, LeafError> {
    // A duplicated extension is an error here, never the first of two.
    let names =
        certificate.subject_alternative_name().map_err(malformed)?.ok_or(LeafError::NoSan)?;
    let names = &names.value.general_names;
    if names.iter().any(|name| matches!(name, GeneralName::Invalid(..))) {
        return Err(LeafError::Malformed("a subject alternative name is not decodable".into()));
    }
    let uris: Vec<&str> = names
        .iter()
        .filter_map(|name| if let GeneralName::URI(uri) = name { Some(*uri) } else { None })
        .collect();
    match uris[..] {
        [] => Err(LeafError::NoUriSan(names.len())),
        [uri] => Ok(SpiffeId::parse(uri)?),
        _ => Err(LeafError::SeveralUriSans(uris.len())),
    }
}

fn check_key_usage(certificate: &X509Certificate<'_>) -> Result<(), LeafError> {
    let Some(usage) = certificate.key_usage().map_err(malformed)? else {
        return Err(LeafError::KeyUsage("is absent"));
    };
    if !usage.critical {
        Err(LeafError::KeyUsage("is not critical"))
    } else if !usage.value.digital_signature() {
        Err(LeafError::KeyUsage("lacks digitalSignature"))
    } else if usage.value.key_cert_sign() {
        Err(LeafError::KeyUsage("has keyCertSign"))
    } else if usage.value.crl_sign() {
        Err(LeafError::KeyUsage("has cRLSign"))
    } else {
        Ok(())
    }
}

fn timestamp(time: x509_parser::time::ASN1Time) -> Result<Timestamp, LeafError> {
    Timestamp::from_second(time.timestamp()).map_err(malformed)
}

fn malformed(error: impl std::fmt::Display) -> LeafError {
    LeafError::Malformed(error.to_string())
}
