//! SPIFFE IDs and trust domains (SPIFFE-ID standard, sections 2 and 3).

use std::sync::Arc;

/// A trust domain's name: lower case, `[a-z0-9.-_]`, 1 to 255 bytes.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct TrustDomain(Arc<str>);

/// A SPIFFE ID in canonical form: `spiffe://<trust domain>/<path>`.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct SpiffeId(Arc<str>);

/// Why a string is not a SPIFFE ID.
#[derive(Debug, thiserror::Error, PartialEq, Eq, Clone)]
#[non_exhaustive]
pub enum SpiffeIdError {
    /// It does not begin with `spiffe://`.
    #[error("the scheme is not spiffe://")]
    Scheme,
}

impl TrustDomain {
    /// Parses a trust domain's name (not an ID).
    pub fn parse(name: &str) -> Result<Self, SpiffeIdError> {
        Ok(Self(name.into()))
    }

    /// The name.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl SpiffeId {
    /// Parses a SPIFFE ID; scheme and trust domain in any case, canonical form out.
    pub fn parse(id: &str) -> Result<Self, SpiffeIdError> {
        Ok(Self(id.into()))
    }

    /// `spiffe://<td>/ns/<namespace>/sa/<service account>`.
    pub fn for_service_account(
        domain: &TrustDomain,
        namespace: &str,
        service_account: &str,
    ) -> Result<Self, SpiffeIdError> {
        Self::parse(&format!("spiffe://{}/ns/{namespace}/sa/{service_account}", domain.as_str()))
    }

    /// Its trust domain.
    pub fn trust_domain(&self) -> TrustDomain {
        let rest = self.0.strip_prefix("spiffe://").unwrap_or(&self.0);
        TrustDomain(rest.split('/').next().unwrap_or(rest).into())
    }

    /// Namespace and service account of `spiffe://<td>/ns/<namespace>/sa/<service account>`.
    pub fn workload(&self) -> Option<(&str, &str)> {
        let (_, path) = self.0.strip_prefix("spiffe://")?.split_once('/')?;
        path.strip_prefix("ns/")?.split_once("/sa/")
    }

    /// The whole ID.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}
