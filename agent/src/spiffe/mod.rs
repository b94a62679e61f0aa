//! SPIFFE IDs, trust domains, bundles and SVIDs: parse, validate, encode. Pure.

pub mod bundle;
#[cfg(test)]
pub(crate) mod forge;
pub mod id;
pub mod jwks;
pub mod jwt;
pub mod jwt_bundle;
pub mod leaf;
pub mod svid;
pub mod validate;

pub use bundle::{Bundle, BundleError};
pub use id::{SpiffeId, SpiffeIdError, TrustDomain};
pub use jwks::{JwksError, SpiffeBundle};
pub use jwt::{JwtClaims, JwtError, JwtSigner, JwtSvid};
pub use jwt_bundle::{JwtBundle, JwtKey};
pub use svid::{Svid, SvidError};
