//! Certificates that hostile peers present: signed by the lab's own root, or by a stranger's.

use std::{
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result};
use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, ExtendedKeyUsagePurpose, IsCa, Issuer,
    KeyPair, KeyUsagePurpose, SanType, date_time_ymd,
};

/// A root that signs whatever it is asked to.
pub struct Forger {
    issuer: Issuer<'static, KeyPair>,
    certificate: String,
    directory: PathBuf,
}

/// What a forged leaf says; the default is a leaf that would be right.
#[derive(Clone, Debug)]
pub struct Leaf {
    /// URI SANs.
    pub uris: Vec<String>,
    /// DNS SANs.
    pub names: Vec<String>,
    /// Validity as years: from the first of January of one to that of the other.
    pub years: (i32, i32),
    /// Claims to be an authority.
    pub authority: bool,
    /// Extended key usages.
    pub usages: Vec<ExtendedKeyUsagePurpose>,
}

impl Leaf {
    /// A leaf for these SPIFFE IDs (or whatever the texts are).
    pub fn of(uris: &[&str]) -> Self {
        Self {
            uris: uris.iter().map(|u| (*u).to_owned()).collect(),
            names: Vec::new(),
            years: (2020, 2035),
            authority: false,
            usages: vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth],
        }
    }
}

impl Forger {
    /// Somebody who has the key of the lab's own root.
    pub fn with_stolen_root(authority: &Path, directory: &Path) -> Result<Self> {
        let file = authority.join("root.pem");
        let text = fs::read_to_string(&file).with_context(|| file.display().to_string())?;
        let certificate = block(&text, "CERTIFICATE").context("no certificate in root.pem")?;
        let key = block(&text, "PRIVATE KEY").context("no key in root.pem")?;
        let key = KeyPair::from_pem(&key).context("the root's key")?;
        let issuer = Issuer::from_ca_cert_pem(&certificate, key).context("the root")?;
        Ok(Self { issuer, certificate, directory: directory.to_owned() })
    }

    /// Somebody with a root of his own for the same trust domain.
    pub fn stranger(trust_domain: &str, directory: &Path) -> Result<Self> {
        let key = KeyPair::generate().context("key")?;
        let mut params = CertificateParams::new(Vec::<String>::new()).context("parameters")?;
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        let id = format!("spiffe://{trust_domain}").try_into().context("URI")?;
        params.subject_alt_names = vec![SanType::URI(id)];
        params.not_before = date_time_ymd(2020, 1, 1);
        params.not_after = date_time_ymd(2040, 1, 1);
        let certificate = params.self_signed(&key).context("the root")?.pem();
        let issuer = Issuer::new(params, key);
        Ok(Self { issuer, certificate, directory: directory.to_owned() })
    }

    /// The root's certificate, PEM.
    pub fn root(&self) -> &str {
        &self.certificate
    }

    /// Signs a leaf; the file with certificate and key, named `<name>.pem`.
    pub fn sign(&self, name: &str, leaf: &Leaf) -> Result<PathBuf> {
        let key = KeyPair::generate().context("key")?;
        let mut params = CertificateParams::new(Vec::<String>::new()).context("parameters")?;
        params.distinguished_name = DistinguishedName::new();
        for uri in &leaf.uris {
            params.subject_alt_names.push(SanType::URI(uri.as_str().try_into().context("URI")?));
        }
        for dns in &leaf.names {
            params
                .subject_alt_names
                .push(SanType::DnsName(dns.as_str().try_into().context("DNS")?));
        }
        params.is_ca = if leaf.authority {
            IsCa::Ca(BasicConstraints::Unconstrained)
        } else {
            IsCa::ExplicitNoCa
        };
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = leaf.usages.clone();
        params.not_before = date_time_ymd(leaf.years.0, 1, 1);
        params.not_after = date_time_ymd(leaf.years.1, 1, 1);
        let certificate = params.signed_by(&key, &self.issuer).context("signing")?;
        let file = self.directory.join(format!("{name}.pem"));
        let text = format!("{}{}", certificate.pem(), key.serialize_pem());
        fs::write(&file, text).with_context(|| file.display().to_string())?;
        Ok(file)
    }
}

/// The first PEM block of a kind.
fn block(text: &str, kind: &str) -> Option<String> {
    let (begin, end) = (format!("-----BEGIN {kind}-----"), format!("-----END {kind}-----"));
    let from = text.find(&begin)?;
    let to = from + text[from..].find(&end)? + end.len();
    Some(format!("{}\n", &text[from..to]))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stranger_signs_leaves() {
        let directory = tempfile::tempdir().unwrap();
        let forger = Forger::stranger("cluster.local", directory.path()).unwrap();
        let file = forger
            .sign("two", &Leaf::of(&["spiffe://cluster.local/ns/a/sa/b", "spiffe://x/y"]))
            .unwrap();
        let text = fs::read_to_string(file).unwrap();
        assert!(block(&text, "CERTIFICATE").is_some() && block(&text, "PRIVATE KEY").is_some());
    }
}
