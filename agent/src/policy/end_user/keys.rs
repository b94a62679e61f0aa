//! The keys of an issuer of end users' tokens: a JWK set (RFC 7517).

use aws_lc_rs::signature::{ED25519, UnparsedPublicKey};
use base64::{Engine as _, prelude::BASE64_URL_SAFE_NO_PAD};
use serde::Deserialize;
use serde_json::Value;

use crate::spiffe::jwt_bundle::{Algorithm, JwtKey};

/// The largest document that is read, in bytes.
pub const MAX_DOCUMENT_LEN: usize = 1024 * 1024;
/// The most keys that a document may have, those that are ignored included.
const MAX_KEYS: usize = 256;
/// An Ed25519 public key's length (RFC 8032 §5.1.5).
const ED25519_LEN: usize = 32;

/// The public keys of one issuer; at least one.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct IssuerKeys(Vec<IssuerKey>);

#[derive(Clone, PartialEq, Eq, Debug)]
struct IssuerKey {
    kid: Option<String>,
    /// The only algorithm that it is for, when it says so.
    alg: Option<SignedBy>,
    material: Material,
}

#[derive(Clone, PartialEq, Eq, Debug)]
enum Material {
    Known(JwtKey),
    Ed25519([u8; ED25519_LEN]),
}

/// What a token says that it is signed with.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum SignedBy {
    /// RS, ES or PS.
    Known(Algorithm),
    /// EdDSA with Ed25519 (RFC 8037).
    EdDsa,
}

impl SignedBy {
    /// The algorithm of this name; `none` and those with a shared secret are not there.
    pub(super) fn parse(name: &str) -> Option<Self> {
        match name {
            "EdDSA" | "Ed25519" => Some(Self::EdDsa),
            _ => Algorithm::parse(name).map(Self::Known),
        }
    }
}

/// Why a document has no keys.
#[derive(Debug, thiserror::Error, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum KeysError {
    /// Larger than [`MAX_DOCUMENT_LEN`].
    #[error("a key set of {0} bytes is too large; {MAX_DOCUMENT_LEN} is the most")]
    TooLarge(usize),
    /// Not JSON of the right shape.
    #[error("it is not a JWK set ({0}); write an object with \"keys\", a list")]
    Json(String),
    /// More than 256.
    #[error("{0} keys; {MAX_KEYS} is the most")]
    TooMany(usize),
    /// Nothing in it verifies a token.
    #[error("none of its keys verifies tokens; keys of kty RSA (2048 bits or more), EC or OKP do")]
    NoKeys,
}

#[derive(Deserialize)]
struct Document {
    keys: Vec<Value>,
}

impl IssuerKeys {
    /// Reads a JWK set. Keys of other kinds or uses, and malformed ones, are ignored: one that
    /// is not understood must not take the others away.
    ///
    /// # Errors
    ///
    /// A document that is none, or has no key left.
    pub fn decode(document: &[u8]) -> Result<Self, KeysError> {
        if document.len() > MAX_DOCUMENT_LEN {
            return Err(KeysError::TooLarge(document.len()));
        }
        let document: Document =
            serde_json::from_slice(document).map_err(|e| KeysError::Json(e.to_string()))?;
        if document.keys.len() > MAX_KEYS {
            return Err(KeysError::TooMany(document.keys.len()));
        }
        let keys: Vec<IssuerKey> = document.keys.iter().filter_map(IssuerKey::read).collect();
        if keys.is_empty() { Err(KeysError::NoKeys) } else { Ok(Self(keys)) }
    }

    /// Whether `signature` is one of the keys' over `message`; `None` when none of them can be
    /// the token's: of another ID, or for another algorithm.
    pub(super) fn verify(
        &self,
        kid: Option<&str>,
        by: SignedBy,
        message: &[u8],
        signature: &[u8],
    ) -> Option<bool> {
        let mut candidates = self.0.iter().filter(|key| key.is_for(kid, by)).peekable();
        candidates.peek()?;
        Some(candidates.any(|key| key.verifies(by, message, signature)))
    }
}

impl IssuerKey {
    fn read(value: &Value) -> Option<Self> {
        let member = |name: &str| value.get(name).and_then(Value::as_str);
        if value.get("use").is_some() && member("use") != Some("sig") {
            return None;
        }
        if let Some(operations) = value.get("key_ops")
            && !operations.as_array()?.iter().any(|operation| operation == "verify")
        {
            return None;
        }
        let alg = match value.get("alg") {
            None => None,
            Some(name) => Some(SignedBy::parse(name.as_str()?)?),
        };
        let material = match member("kty")? {
            "OKP" if member("crv") == Some("Ed25519") => {
                let x = BASE64_URL_SAFE_NO_PAD.decode(member("x")?).ok()?;
                Material::Ed25519(x.try_into().ok()?)
            }
            "RSA" | "EC" => Material::Known(JwtKey::from_jwk(value)?),
            _ => return None,
        };
        Some(Self { kid: member("kid").map(str::to_owned), alg, material })
    }

    fn is_for(&self, kid: Option<&str>, by: SignedBy) -> bool {
        let is_named = match (&self.kid, kid) {
            (Some(own), Some(kid)) => own == kid,
            _ => true,
        };
        let fits = match (&self.material, by) {
            (Material::Known(key), SignedBy::Known(algorithm)) => key.fits(algorithm),
            (Material::Ed25519(_), SignedBy::EdDsa) => true,
            _ => false,
        };
        is_named && fits && self.alg.is_none_or(|alg| alg == by)
    }

    fn verifies(&self, by: SignedBy, message: &[u8], signature: &[u8]) -> bool {
        match (&self.material, by) {
            (Material::Known(key), SignedBy::Known(algorithm)) => {
                key.verifies(algorithm, message, signature)
            }
            (Material::Ed25519(x), SignedBy::EdDsa) => {
                UnparsedPublicKey::new(&ED25519, x).verify(message, signature).is_ok()
            }
            _ => false,
        }
    }
}
