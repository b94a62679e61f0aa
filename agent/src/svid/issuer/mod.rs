//! Who issues SVIDs.

use std::{future::Future, pin::Pin};

use rcgen::PublicKeyData;
use rustls::pki_types::{CertificateDer, PrivatePkcs8KeyDer};

use crate::{
    ca::CaError,
    spiffe::{SpiffeId, Svid, SvidError, jwt::JwtSignerError},
};

pub mod embedded;
mod jwt;
mod jwt_file;
pub mod remote;
mod root_file;

pub use embedded::EmbeddedIssuer;
pub use jwt::{JwtFuture, JwtIssuer, JwtRequest};
pub use remote::{RemoteConfig, RemoteError, RemoteIssuer};
pub use root_file::RootFileError;

/// An authority that certifies this node's keys. The private key stays here.
pub trait Issuer: Send + Sync + 'static {
    /// Certifies the request's public key for its identity; answers the chain, leaf first.
    fn issue<'a>(&'a self, request: &'a SvidRequest) -> IssueFuture<'a>;
}

/// What [`Issuer::issue`] answers.
pub type IssueFuture<'a> =
    Pin<Box<dyn Future<Output = Result<Vec<CertificateDer<'static>>, IssueError>> + Send + 'a>>;

/// Why an SVID was not issued.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum IssueError {
    /// The authority refused or failed.
    #[error("the authority did not sign: {0}")]
    Authority(#[from] CaError),
    /// The authority that is asked over gRPC gave no SVID.
    #[error(transparent)]
    Remote(#[from] RemoteError),
    /// Signing a token failed.
    #[error(transparent)]
    Jwt(#[from] JwtSignerError),
    /// The answer is not the SVID that was asked for.
    #[error(transparent)]
    Svid(#[from] SvidError),
    /// The answer is for another identity.
    #[error("asked for {wanted}, the authority issued {issued}; look at its configuration")]
    OtherIdentity {
        /// What was asked for.
        wanted: SpiffeId,
        /// What came.
        issued: SpiffeId,
    },
    /// The answer is out of its time already.
    #[error(
        "the SVID issued for {0} is not valid now; compare this node's clock with the authority's"
    )]
    NotValidNow(SpiffeId),
    /// No key could be made.
    #[error("no key could be made for {0}: the system's random numbers or memory failed")]
    Key(SpiffeId),
    /// The authority did not answer in time.
    #[error("the authority did not answer within {0:?}; look whether it runs and can be reached")]
    Timeout(std::time::Duration),
    /// The task that asked failed.
    #[error("requesting the SVID failed inside the agent: {0}")]
    Internal(String),
}

impl IssueError {
    /// A short stable name, for metrics.
    pub const fn kind(&self) -> &'static str {
        match self {
            Self::Authority(_) | Self::Jwt(_) => "not_signed",
            Self::Remote(error) => error.kind(),
            Self::Svid(_) => "no_svid",
            Self::OtherIdentity { .. } => "other_identity",
            Self::NotValidNow(_) => "not_valid_now",
            Self::Key(_) => "no_key",
            Self::Timeout(_) => "timeout",
            Self::Internal(_) => "internal",
        }
    }
}

/// A request: an identity and a fresh key.
pub struct SvidRequest {
    id: SpiffeId,
    key: rcgen::KeyPair,
}

impl SvidRequest {
    /// A request with a fresh ECDSA P-256 key.
    pub fn new(id: SpiffeId) -> Result<Self, IssueError> {
        match rcgen::KeyPair::generate() {
            Ok(key) => Ok(Self { id, key }),
            Err(_) => Err(IssueError::Key(id)),
        }
    }

    /// The identity that is asked for.
    pub fn id(&self) -> &SpiffeId {
        &self.id
    }

    /// The public key, DER SubjectPublicKeyInfo.
    pub fn public_key(&self) -> Vec<u8> {
        self.key.subject_public_key_info()
    }

    /// A certificate signing request (PEM) whose only name is the identity's URI.
    pub fn csr(&self) -> Result<String, IssueError> {
        let failed = |_| IssueError::Key(self.id.clone());
        let mut params = rcgen::CertificateParams::default();
        params.distinguished_name = rcgen::DistinguishedName::new();
        let uri = self.id.as_str().try_into().map_err(failed)?;
        params.subject_alt_names = vec![rcgen::SanType::URI(uri)];
        params.serialize_request(&self.key).and_then(|csr| csr.pem()).map_err(failed)
    }

    /// Puts the issued chain and the key together and holds them against the request.
    pub fn finish(self, chain: Vec<CertificateDer<'static>>) -> Result<Svid, IssueError> {
        let svid = Svid::new(chain, PrivatePkcs8KeyDer::from(self.key.serialize_der()))?;
        if svid.id != self.id {
            return Err(IssueError::OtherIdentity { wanted: self.id, issued: svid.id });
        }
        Ok(svid)
    }
}
