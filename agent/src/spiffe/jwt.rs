//! JWT-SVIDs (the JWT-SVID standard; RFC 7515, 7519): sign, parse, validate.

use std::{fmt, sync::Arc};

use aws_lc_rs::{
    rand::SystemRandom,
    signature::{ECDSA_P256_SHA256_FIXED_SIGNING, EcdsaKeyPair, KeyPair as _},
};
use base64::{Engine as _, prelude::BASE64_URL_SAFE_NO_PAD};
use jiff::{SignedDuration, Timestamp};
use serde::{Deserialize, Serialize};

use super::{
    SpiffeId, SpiffeIdError, TrustDomain,
    id::Excerpt,
    jwt_bundle::{Algorithm, Curve, JwtBundle, JwtKey, json_object},
};

/// The longest token that is looked at, in bytes.
pub const MAX_TOKEN_LEN: usize = 16 * 1024;
/// The most audiences of one token.
pub const MAX_AUDIENCES: usize = 64;
/// How far ahead of this clock `nbf` may lie: the signer's clock may be before ours. A token
/// that has run out has run out: `exp` gets no leeway.
pub const LEEWAY: SignedDuration = SignedDuration::from_secs(60);

/// What a JWT-SVID says, once its signature and its claims have been checked.
#[derive(Clone, Debug, PartialEq)]
pub struct JwtSvid {
    /// The identity: the claim `sub`.
    pub id: SpiffeId,
    /// The claim `aud`; not empty.
    pub audiences: Vec<String>,
    /// The claim `exp`: from then on the token is not accepted.
    pub expires_at: Timestamp,
    /// All claims, as they are in the token.
    pub claims: serde_json::Map<String, serde_json::Value>,
}

/// What a token is to say.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct JwtClaims {
    /// The identity.
    pub id: SpiffeId,
    /// Whom the token is for; not empty.
    pub audiences: Vec<String>,
    /// When it is made.
    pub issued_at: Timestamp,
    /// When it runs out; whole seconds count.
    pub expires_at: Timestamp,
    /// The claim `iss`, for OIDC: the issuer's URL.
    pub issuer: Option<String>,
}

/// A key that signs JWT-SVIDs with ES256. Neither `Debug` nor any error prints it.
pub struct JwtSigner {
    pair: EcdsaKeyPair,
    public: JwtKey,
    kid: String,
}

/// A key that cannot sign.
#[derive(Debug, thiserror::Error, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum JwtSignerError {
    /// The random numbers or the memory failed.
    #[error("no JWT key could be made: the system's random numbers or memory failed")]
    Generate,
    /// Not PKCS #8 of a P-256 key.
    #[error("the JWT key is not PKCS #8 of an ECDSA P-256 key")]
    Malformed,
    /// The library did not sign.
    #[error("the JWT key did not sign: the system's random numbers or memory failed")]
    Sign,
}

/// Why a token is not a valid JWT-SVID.
#[derive(Debug, thiserror::Error, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum JwtError {
    /// Longer than [`MAX_TOKEN_LEN`].
    #[error("a token of {0} bytes is too long: at most {MAX_TOKEN_LEN} are accepted")]
    TooLong(usize),
    /// Not three parts, or a part is not base64url without padding.
    #[error(
        "the token is no JWS in compact form: three parts of base64url without padding, with dots between"
    )]
    NotCompact,
    /// The header breaks the standard.
    #[error("the token's header is refused ({0}); it may have alg, kid and typ (JWT or JOSE) only")]
    Header(String),
    /// The algorithm is not one of the standard's.
    #[error("the token is signed with {0}; a JWT-SVID uses RS, ES or PS with 256, 384 or 512")]
    Algorithm(Excerpt),
    /// A claim is missing or malformed.
    #[error("the token's claims are refused: {0}")]
    Claims(String),
    /// `sub` is not a SPIFFE ID.
    #[error("the token's subject is refused: {0}")]
    Subject(#[from] SpiffeIdError),
    /// No bundle for the token's trust domain.
    #[error(
        "the token of {0} belongs to a trust domain for which there is no JWT bundle; if it should be trusted, federate with that domain"
    )]
    UntrustedDomain(SpiffeId),
    /// No key of the bundle has the token's key ID.
    #[error(
        "no key with the token's key ID is in the bundle of {0}'s trust domain; it was signed by another authority, or with a key that is out of use"
    )]
    UnknownKey(SpiffeId),
    /// The signature is not the key's.
    #[error("the signature of the token of {0} does not verify; it was changed, or is forged")]
    Signature(SpiffeId),
    /// It is for somebody else.
    #[error("the token of {0} is not for this audience; ask for one with the right audience")]
    Audience(SpiffeId),
    /// It ran out.
    #[error("the token of {id} ran out at {expires_at}; fetch a new one, or look at both clocks")]
    Expired {
        /// The identity.
        id: SpiffeId,
        /// When it ran out.
        expires_at: Timestamp,
    },
    /// Its time has not come.
    #[error("the token of {id} is valid only from {not_before}; look at both clocks")]
    NotYetValid {
        /// The identity.
        id: SpiffeId,
        /// From when it is valid.
        not_before: Timestamp,
    },
}

impl JwtError {
    /// A short stable name, for counters.
    pub const fn kind(&self) -> &'static str {
        match self {
            Self::TooLong(_) => "too_long",
            Self::NotCompact => "not_compact",
            Self::Header(_) => "header",
            Self::Algorithm(_) => "algorithm",
            Self::Claims(_) => "claims",
            Self::Subject(_) => "not_a_spiffe_id",
            Self::UntrustedDomain(_) => "wrong_trust_domain",
            Self::UnknownKey(_) => "unknown_key",
            Self::Signature(_) => "signature",
            Self::Audience(_) => "wrong_audience",
            Self::Expired { .. } => "expired",
            Self::NotYetValid { .. } => "not_yet_valid",
        }
    }
}

impl JwtSvid {
    /// Validates a token for `audience` (JWT-SVID section 5), with the bundle of the token's
    /// own trust domain and no other; `bundle_of` answers for the domains that are trusted.
    pub fn validate(
        token: &str,
        audience: &str,
        bundle_of: impl FnOnce(&TrustDomain) -> Option<Arc<JwtBundle>>,
        now: Timestamp,
    ) -> Result<Self, JwtError> {
        let parsed = Parsed::parse(token)?;
        let id = parsed.svid.id.clone();
        let bundle =
            bundle_of(&id.trust_domain()).ok_or_else(|| JwtError::UntrustedDomain(id.clone()))?;
        parsed.verify(&bundle)?;
        // Only now: what nobody trusted has signed is never called "expired".
        let Parsed { svid, not_before, .. } = parsed;
        if svid.expires_at <= now {
            return Err(JwtError::Expired { id, expires_at: svid.expires_at });
        }
        if let Some(not_before) = not_before
            && not_before.duration_since(now) > LEEWAY
        {
            return Err(JwtError::NotYetValid { id, not_before });
        }
        if !svid.audiences.iter().any(|a| a == audience) {
            return Err(JwtError::Audience(id));
        }
        Ok(svid)
    }

    /// Reads a token without checking its signature, its audience or its time: for the holder
    /// of a token, to show it. Nothing is authenticated by it.
    pub fn parse_unverified(token: &str) -> Result<Self, JwtError> {
        Ok(Parsed::parse(token)?.svid)
    }
}

impl JwtSigner {
    /// A fresh key.
    pub fn generate() -> Result<Self, JwtSignerError> {
        let pair = EcdsaKeyPair::generate(&ECDSA_P256_SHA256_FIXED_SIGNING)
            .map_err(|_| JwtSignerError::Generate)?;
        Self::new(pair)
    }

    /// A key that [`Self::to_pkcs8`] gave.
    pub fn from_pkcs8(pkcs8: &[u8]) -> Result<Self, JwtSignerError> {
        let pair = EcdsaKeyPair::from_pkcs8(&ECDSA_P256_SHA256_FIXED_SIGNING, pkcs8)
            .map_err(|_| JwtSignerError::Malformed)?;
        Self::new(pair)
    }

    fn new(pair: EcdsaKeyPair) -> Result<Self, JwtSignerError> {
        let public = JwtKey::from_point(Curve::P256, pair.public_key().as_ref())
            .map_err(|_| JwtSignerError::Malformed)?;
        let kid = public.thumbprint();
        Ok(Self { pair, public, kid })
    }

    /// The private key, PKCS #8, for an authority's own store.
    pub fn to_pkcs8(&self) -> Result<Vec<u8>, JwtSignerError> {
        let document = self.pair.to_pkcs8v1().map_err(|_| JwtSignerError::Malformed)?;
        Ok(document.as_ref().to_vec())
    }

    /// The key's ID: its thumbprint, so that replicas which share the key agree on it.
    pub fn kid(&self) -> &str {
        &self.kid
    }

    /// The public key.
    pub fn public_key(&self) -> &JwtKey {
        &self.public
    }

    /// A signed token in compact form.
    pub fn sign(&self, claims: &JwtClaims) -> Result<String, JwtSignerError> {
        let header = Header { alg: "ES256", kid: &self.kid, typ: "JWT" };
        let payload = Payload {
            aud: &claims.audiences,
            exp: claims.expires_at.as_second(),
            iat: claims.issued_at.as_second(),
            iss: claims.issuer.as_deref(),
            sub: claims.id.as_str(),
        };
        let part = |json: serde_json::Result<Vec<u8>>| {
            Ok(BASE64_URL_SAFE_NO_PAD.encode(json.map_err(|_| JwtSignerError::Sign)?))
        };
        let message = format!(
            "{}.{}",
            part(serde_json::to_vec(&header))?,
            part(serde_json::to_vec(&payload))?
        );
        let signature = self
            .pair
            .sign(&SystemRandom::new(), message.as_bytes())
            .map_err(|_| JwtSignerError::Sign)?;
        Ok(format!("{message}.{}", BASE64_URL_SAFE_NO_PAD.encode(signature)))
    }
}

impl fmt::Debug for JwtSigner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("JwtSigner").field("kid", &self.kid).finish_non_exhaustive()
    }
}

#[derive(Serialize)]
struct Header<'a> {
    alg: &'static str,
    kid: &'a str,
    typ: &'static str,
}

#[derive(Serialize)]
struct Payload<'a> {
    aud: &'a [String],
    exp: i64,
    iat: i64,
    #[serde(skip_serializing_if = "Option::is_none")]
    iss: Option<&'a str>,
    sub: &'a str,
}

/// The header of a token that came; a field twice or an unknown one is an error of serde's.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawHeader {
    alg: String,
    #[serde(default, deserialize_with = "present")]
    kid: Option<String>,
    #[serde(default, deserialize_with = "present")]
    typ: Option<String>,
}

/// The claims that the standard knows; each at most once.
#[derive(Deserialize)]
struct RawClaims {
    sub: String,
    aud: OneOrMany,
    exp: serde_json::Number,
    #[serde(default, deserialize_with = "present")]
    nbf: Option<serde_json::Number>,
    #[serde(default, deserialize_with = "present")]
    iat: Option<serde_json::Number>,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum OneOrMany {
    One(String),
    Many(Vec<String>),
}

/// A token taken apart.
struct Parsed<'a> {
    message: &'a [u8],
    signature: Vec<u8>,
    algorithm: Algorithm,
    kid: Option<String>,
    svid: JwtSvid,
    not_before: Option<Timestamp>,
}

impl<'a> Parsed<'a> {
    fn parse(token: &'a str) -> Result<Self, JwtError> {
        if token.len() > MAX_TOKEN_LEN {
            return Err(JwtError::TooLong(token.len()));
        }
        let mut parts = token.split('.');
        let (Some(header), Some(claims), Some(signature), None) =
            (parts.next(), parts.next(), parts.next(), parts.next())
        else {
            return Err(JwtError::NotCompact);
        };
        let decode =
            |part: &str| BASE64_URL_SAFE_NO_PAD.decode(part).map_err(|_| JwtError::NotCompact);
        let message = &token.as_bytes()[..header.len() + 1 + claims.len()];
        let (header, claims, signature) = (decode(header)?, decode(claims)?, decode(signature)?);

        let header: RawHeader = json_object(&header).map_err(|e| JwtError::Header(said(&e)))?;
        let algorithm = Algorithm::parse(&header.alg)
            .ok_or_else(|| JwtError::Algorithm(Excerpt::new(&header.alg)))?;
        if let Some(typ) = header.typ
            && typ != "JWT"
            && typ != "JOSE"
        {
            return Err(JwtError::Header(format!("typ is {}", Excerpt::new(&typ))));
        }

        let refused = |e: serde_json::Error| JwtError::Claims(said(&e));
        let known: RawClaims = json_object(&claims).map_err(refused)?;
        let all = json_object(&claims).map_err(refused)?;
        let audiences = match known.aud {
            OneOrMany::One(one) => vec![one],
            OneOrMany::Many(many) => many,
        };
        if audiences.is_empty() || audiences.len() > MAX_AUDIENCES {
            return Err(JwtError::Claims(format!(
                "aud has {} audiences; 1 to {MAX_AUDIENCES} are accepted",
                audiences.len()
            )));
        }
        let time = |name, number: &serde_json::Number| {
            numeric_date(number)
                .ok_or_else(|| JwtError::Claims(format!("{name} is not a time in seconds")))
        };
        let expires_at = time("exp", &known.exp)?;
        let not_before = known.nbf.as_ref().map(|nbf| time("nbf", nbf)).transpose()?;
        known.iat.as_ref().map(|iat| time("iat", iat)).transpose()?;
        let id = SpiffeId::parse(&known.sub)?;
        let svid = JwtSvid { id, audiences, expires_at, claims: all };
        Ok(Self { message, signature, algorithm, kid: header.kid, svid, not_before })
    }

    /// Checks the signature with the key that the token names. The standard leaves the key ID
    /// optional: without one, any key of the bundle that fits the algorithm may have signed.
    fn verify(&self, bundle: &JwtBundle) -> Result<(), JwtError> {
        let verifies = |key: &JwtKey| key.verifies(self.algorithm, self.message, &self.signature);
        let id = || self.svid.id.clone();
        let verified = match &self.kid {
            Some(kid) => {
                let key = bundle.get(kid).ok_or_else(|| JwtError::UnknownKey(id()))?;
                verifies(key)
            }
            None => bundle.iter().any(|(_, key)| verifies(key)),
        };
        if verified { Ok(()) } else { Err(JwtError::Signature(id())) }
    }
}

/// An optional field that is there has a value: `null` is not one.
fn present<'de, D, T>(deserializer: D) -> Result<Option<T>, D::Error>
where
    D: serde::Deserializer<'de>,
    T: Deserialize<'de>,
{
    T::deserialize(deserializer).map(Some)
}

/// What the JSON parser says, without quoting more of the input than is safe to print.
fn said(error: &serde_json::Error) -> String {
    Excerpt::new(&error.to_string()).to_string()
}

/// RFC 7519's NumericDate: seconds, maybe with a fraction, which does not count.
fn numeric_date(number: &serde_json::Number) -> Option<Timestamp> {
    let seconds = match (number.as_i64(), number.as_f64()) {
        (Some(whole), _) => whole,
        // What lies outside of what a timestamp can hold saturates here and fails below.
        (None, Some(fraction)) => fraction.floor() as i64,
        (None, None) => return None,
    };
    Timestamp::from_second(seconds).ok()
}

#[cfg(test)]
mod tests;
