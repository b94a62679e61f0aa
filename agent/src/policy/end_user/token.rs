//! One token: taken apart, and checked against an issuer's rule.

use std::sync::Arc;

use base64::{Engine as _, prelude::BASE64_URL_SAFE_NO_PAD};
use jiff::Timestamp;
use serde::Deserialize;
use serde_json::{Map, Value};

use super::{EndUser, Invalid, JwtRule, KeyRing, KeySource, MAX_TOKEN_LEN, keys::SignedBy};
use crate::spiffe::jwt::LEEWAY;

/// Audiences of one token.
const MAX_AUDIENCES: usize = 256;

/// A token taken apart; nothing of it is proven.
pub(super) struct Token<'a> {
    message: &'a [u8],
    signature: Vec<u8>,
    by: SignedBy,
    kid: Option<String>,
    pub(super) issuer: String,
    subject: String,
    audiences: Vec<String>,
    expires: Option<Timestamp>,
    not_before: Option<Timestamp>,
    pub(super) claims: Map<String, Value>,
    /// The claims as they stand in the token.
    pub(super) payload: &'a str,
}

/// What counts of the header. Others are ignored, but for `crit`: it names extensions that
/// must be understood (RFC 7515 §4.1.11), and none is.
#[derive(Deserialize)]
struct Header {
    alg: String,
    kid: Option<String>,
    crit: Option<Value>,
}

/// The registered claims; each at most once.
#[derive(Deserialize)]
struct Claims {
    iss: String,
    sub: Option<String>,
    aud: Option<OneOrMany>,
    exp: Option<serde_json::Number>,
    nbf: Option<serde_json::Number>,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum OneOrMany {
    One(String),
    Many(Vec<String>),
}

impl<'a> Token<'a> {
    pub(super) fn parse(token: &'a str) -> Result<Self, Invalid> {
        if token.len() > MAX_TOKEN_LEN {
            return Err(Invalid::TooLong);
        }
        let mut parts = token.split('.');
        let (Some(header), Some(payload), Some(signature), None) =
            (parts.next(), parts.next(), parts.next(), parts.next())
        else {
            return Err(Invalid::Malformed);
        };
        let message = &token.as_bytes()[..header.len() + 1 + payload.len()];
        let decode =
            |part: &str| BASE64_URL_SAFE_NO_PAD.decode(part).map_err(|_| Invalid::Malformed);
        let header: Header = object(&decode(header)?)?;
        if header.crit.is_some() {
            return Err(Invalid::Malformed);
        }
        let by = SignedBy::parse(&header.alg).ok_or(Invalid::Algorithm)?;
        let bytes = decode(payload)?;
        let known: Claims = object(&bytes)?;
        let claims: Map<String, Value> = object(&bytes)?;
        let audiences = match known.aud {
            None => Vec::new(),
            Some(OneOrMany::One(one)) => vec![one],
            Some(OneOrMany::Many(many)) => many,
        };
        if audiences.len() > MAX_AUDIENCES {
            return Err(Invalid::Malformed);
        }
        let time = |number: Option<serde_json::Number>| {
            number.map(|number| numeric_date(&number).ok_or(Invalid::Malformed)).transpose()
        };
        Ok(Self {
            message,
            signature: decode(signature)?,
            by,
            kid: header.kid,
            issuer: known.iss,
            subject: known.sub.unwrap_or_default(),
            audiences,
            expires: time(known.exp)?,
            not_before: time(known.nbf)?,
            claims,
            payload,
        })
    }

    /// Checks it for one rule of its issuer.
    pub(super) fn check(
        &self,
        rule: &JwtRule,
        ring: &dyn KeyRing,
        now: Timestamp,
    ) -> Result<(), Invalid> {
        let keys = match &rule.keys {
            KeySource::Inline(keys) => Some(keys.clone()),
            KeySource::Unreadable => None,
            source => ring.keys(source),
        };
        let Some(keys) = keys else {
            ring.miss(&rule.keys);
            return Err(Invalid::NoKeys);
        };
        match keys.verify(self.kid.as_deref(), self.by, self.message, &self.signature) {
            Some(true) => {}
            Some(false) => return Err(Invalid::Signature),
            None => {
                ring.miss(&rule.keys);
                return Err(Invalid::UnknownKey);
            }
        }
        // Only now: what the issuer has not signed is never called "expired".
        if self.expires.is_some_and(|at| now.duration_since(at) > LEEWAY) {
            return Err(Invalid::Expired);
        }
        if self.not_before.is_some_and(|at| at.duration_since(now) > LEEWAY) {
            return Err(Invalid::NotYetValid);
        }
        let is_for_us = rule.audiences.is_empty()
            || self.audiences.iter().any(|own| rule.audiences.iter().any(|a| **a == **own));
        if is_for_us { Ok(()) } else { Err(Invalid::Audience) }
    }

    pub(super) fn into_user(self, spaced: Vec<Arc<str>>) -> EndUser {
        EndUser {
            issuer: self.issuer,
            subject: self.subject,
            audiences: self.audiences,
            claims: self.claims,
            spaced,
        }
    }
}

/// A JSON object. serde alone would take a list for a struct, by the fields' order.
fn object<T: serde::de::DeserializeOwned>(json: &[u8]) -> Result<T, Invalid> {
    if json.trim_ascii_start().first() != Some(&b'{') {
        return Err(Invalid::Malformed);
    }
    serde_json::from_slice(json).map_err(|_| Invalid::Malformed)
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
