//! What every certificate of ours is made of: names, times, serial numbers, extensions.

use std::{fmt, time::Duration};

use jiff::Timestamp;
use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa,
    Issuer, KeyPair, KeyUsagePurpose, SanType, SerialNumber, SubjectPublicKeyInfo,
};
use rustls::pki_types::CertificateDer;
use time::OffsetDateTime;
use x509_parser::{certificate::X509Certificate, extensions::GeneralName};

use super::{BACKDATE, CaError};
use crate::spiffe::{SpiffeId, TrustDomain};

/// Somebody who signs: the key with its certificate's name, and until when.
pub(super) struct Signer {
    pub(super) domain: TrustDomain,
    pub(super) issuer: Issuer<'static, KeyPair>,
    pub(super) not_after: Timestamp,
}

impl Signer {
    /// Signs an SVID's leaf: exactly one URI SAN, valid from `now` − [`BACKDATE`] to
    /// `now + ttl` or the signer's end, whichever is first.
    pub(super) fn leaf(
        &self,
        id: &SpiffeId,
        public_key: &[u8],
        now: Timestamp,
        ttl: Duration,
    ) -> Result<CertificateDer<'static>, CaError> {
        if id.trust_domain() != self.domain {
            return Err(CaError::WrongTrustDomain { id: id.clone(), domain: self.domain.clone() });
        }
        if id.path().is_empty() {
            return Err(CaError::NotAWorkload(id.clone()));
        }
        let public_key = SubjectPublicKeyInfo::from_der(public_key)
            .map_err(|_| CaError::PublicKey(id.clone()))?;
        let mut params = self.end_entity(now, ttl)?;
        params.subject_alt_names = vec![uri(id)?];
        params.extended_key_usages =
            vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        Ok(params.signed_by(&public_key, &self.issuer).map_err(crypto)?.der().clone())
    }

    /// Signs a certificate by which a server is known under DNS names and addresses.
    pub(super) fn server(
        &self,
        names: &[String],
        key: &KeyPair,
        now: Timestamp,
        ttl: Duration,
    ) -> Result<CertificateDer<'static>, CaError> {
        let mut params = self.end_entity(now, ttl)?;
        params.subject_alt_names = names
            .iter()
            .map(|name| match name.parse() {
                Ok(address) => Ok(SanType::IpAddress(address)),
                Err(_) => name
                    .as_str()
                    .try_into()
                    .map(SanType::DnsName)
                    .map_err(|_| CaError::ServerName(name.clone())),
            })
            .collect::<Result<_, _>>()?;
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
        Ok(params.signed_by(key, &self.issuer).map_err(crypto)?.der().clone())
    }

    fn end_entity(&self, now: Timestamp, ttl: Duration) -> Result<CertificateParams, CaError> {
        let mut params = self.params(now, ttl)?;
        // An empty subject makes the alternative name critical (RFC 5280 section 4.2.1.6).
        params.distinguished_name = DistinguishedName::new();
        params.is_ca = IsCa::ExplicitNoCa;
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        Ok(params)
    }

    /// Signs an intermediate that may sign leaves only.
    pub(super) fn intermediate(
        &self,
        key: &KeyPair,
        now: Timestamp,
        lifetime: Duration,
    ) -> Result<CertificateDer<'static>, CaError> {
        let mut params = self.params(now, lifetime)?;
        authority_name(&mut params, &self.domain, "intermediate")?;
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        Ok(params.signed_by(key, &self.issuer).map_err(crypto)?.der().clone())
    }

    fn params(&self, now: Timestamp, life: Duration) -> Result<CertificateParams, CaError> {
        if self.not_after <= now {
            return Err(CaError::Expired {
                domain: self.domain.clone(),
                not_after: self.not_after,
            });
        }
        let not_after = now.saturating_add(life).unwrap_or(Timestamp::MAX).min(self.not_after);
        let mut params = CertificateParams::default();
        params.serial_number = Some(SerialNumber::from_slice(&random_serial()));
        params.use_authority_key_identifier_extension = true;
        params.not_before = date(now - BACKDATE)?;
        params.not_after = date(not_after)?;
        Ok(params)
    }
}

/// Gives a signing certificate its names: a subject of its own, so that paths are built
/// without guessing, and the trust domain's SPIFFE ID; and what it may do.
pub(super) fn authority_name(
    params: &mut CertificateParams,
    domain: &TrustDomain,
    what: &str,
) -> Result<(), CaError> {
    let mut name = DistinguishedName::new();
    name.push(DnType::OrganizationName, domain.as_str());
    let serial = params.serial_number.clone().unwrap_or_else(|| random_serial().to_vec().into());
    let serial = serial.to_bytes();
    let few = &serial[..serial.len().min(8)];
    name.push(DnType::CommonName, format!("Signet {what} {}", hex(few)));
    params.distinguished_name = name;
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    params.subject_alt_names = vec![uri(&domain.id())?];
    Ok(())
}

/// The SPIFFE IDs among a certificate's URI names, and how many other URIs it has.
pub(super) fn uris<'a>(certificate: &'a X509Certificate<'_>) -> Result<Vec<&'a str>, CaError> {
    let names = certificate.subject_alternative_name().map_err(crypto)?;
    Ok(names
        .iter()
        .flat_map(|names| &names.value.general_names)
        .filter_map(|name| if let GeneralName::URI(uri) = name { Some(*uri) } else { None })
        .collect())
}

pub(super) fn uri(id: &SpiffeId) -> Result<SanType, CaError> {
    Ok(SanType::URI(id.as_str().try_into().map_err(crypto)?))
}

pub(super) fn date(t: Timestamp) -> Result<OffsetDateTime, CaError> {
    // Certificates know whole seconds only.
    OffsetDateTime::from_unix_timestamp(t.as_second()).map_err(|_| CaError::Time(t))
}

/// 16 random bytes, positive and without a leading zero byte as DER wants it.
pub(super) fn random_serial() -> [u8; 16] {
    let mut serial: [u8; 16] = rand::random();
    serial[0] = serial[0] & 0x7f | 0x40;
    serial
}

pub(super) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

pub(super) fn crypto(error: impl fmt::Display) -> CaError {
    CaError::Crypto(error.to_string())
}
