//! End users: what a request's own token proves (Istio's `RequestAuthentication`).
//!
//! A [`RequestAuthentication`] names issuers for the pods that it selects. [`authenticate`]
//! looks for their tokens in a request: with none it passes unauthenticated, with a valid one
//! it has an [`EndUser`], with any other it is refused. Whether somebody must have one is for
//! policies to say (`notRequestPrincipals: ["*"]` in a DENY).
//!
//! Semantics: Istio's API documentation of RequestAuthentication and what Envoy's `jwt_authn`
//! makes of it. Stricter in two places: several different tokens in one request are refused
//! (Istio leaves open which counts), and tokens are signed with RS, ES, PS or EdDSA only,
//! never with a shared secret.
//!
//! Pure: keys come from a [`KeyRing`], the time from the caller.

mod keys;
mod token;

use std::sync::Arc;

use http::{
    HeaderMap, HeaderName, HeaderValue, StatusCode,
    header::{AUTHORIZATION, COOKIE},
};
use jiff::Timestamp;
use serde_json::{Map, Value};

use self::token::Token;
use super::model::{PolicyName, Remark, Selector};

pub use self::keys::{IssuerKeys, KeysError, MAX_DOCUMENT_LEN};

/// The longest token that is read, in bytes.
pub const MAX_TOKEN_LEN: usize = 16 * 1024;
/// Tokens that one request may carry, the same one in several places counted each time.
const MAX_TOKENS: usize = 8;
/// What a default header's value begins with.
const BEARER: &str = "Bearer ";
/// The default parameter of the query.
const ACCESS_TOKEN: &str = "access_token";

/// Which tokens the requests to some pods may carry.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct RequestAuthentication {
    /// Its name.
    pub name: PolicyName,
    /// Which pods it is about.
    pub selector: Selector,
    /// Any of them; none: it does nothing.
    pub rules: Vec<Arc<JwtRule>>,
    /// It is enforced elsewhere (a gateway's `targetRefs`), and by nobody here.
    pub ignored: bool,
    /// How it was understood.
    pub remarks: Vec<Remark>,
}

/// One issuer, and how its tokens come.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct JwtRule {
    /// The claim `iss`.
    pub issuer: Arc<str>,
    /// One of these is in the claim `aud`; empty: it is not looked at.
    pub audiences: Vec<Arc<str>>,
    /// What its tokens are signed with.
    pub keys: KeySource,
    /// Headers that hold a token.
    pub headers: Vec<TokenHeader>,
    /// Parameters of the query that hold one.
    pub params: Vec<Arc<str>>,
    /// Cookies that hold one.
    pub cookies: Vec<Arc<str>>,
    /// The token stays in the request.
    pub forward_original_token: bool,
    /// The header that is set to the token's claims, base64url.
    pub payload_header: Option<HeaderName>,
    /// Headers that are set to single claims, each with its path.
    pub claim_headers: Vec<(HeaderName, Vec<Arc<str>>)>,
    /// Claims whose text is a list with spaces between.
    pub spaced_claims: Vec<Arc<str>>,
}

/// Where an issuer's keys are.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum KeySource {
    /// In the object itself.
    Inline(Arc<IssuerKeys>),
    /// At an `http` or `https` URL.
    Url(Arc<str>),
    /// Where the issuer's OpenID Connect configuration says: below this URL, which is the
    /// issuer's own.
    Discovery(Arc<str>),
    /// What is given cannot be read: no token of the issuer is valid.
    Unreadable,
}

/// A header that holds a token.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct TokenHeader {
    /// Its name.
    pub name: HeaderName,
    /// What stands before the token; may be empty.
    pub prefix: Arc<str>,
}

/// Whose keys are at hand.
pub trait KeyRing: Send + Sync {
    /// The keys of a source that is not inline; `None`: they were never fetched.
    fn keys(&self, source: &KeySource) -> Option<Arc<IssuerKeys>>;

    /// A token names a key that is not among them: they may have changed.
    fn miss(&self, source: &KeySource);
}

/// A ring without keys.
impl KeyRing for () {
    fn keys(&self, _: &KeySource) -> Option<Arc<IssuerKeys>> {
        None
    }

    fn miss(&self, _: &KeySource) {}
}

/// What a valid token says.
#[derive(Clone, PartialEq, Debug)]
pub struct EndUser {
    issuer: String,
    subject: String,
    audiences: Vec<String>,
    claims: Map<String, Value>,
    spaced: Vec<Arc<str>>,
}

impl EndUser {
    /// Whom these claims name, as if a token had proven them: for questions about what would
    /// be. `None` when `iss` is missing, or a registered claim is not of its type.
    pub fn of_claims(claims: Map<String, Value>) -> Option<Self> {
        let text = |name: &str| claims.get(name).map(|value| value.as_str().map(str::to_owned));
        let audiences = match claims.get("aud") {
            None => Vec::new(),
            Some(Value::Array(many)) => {
                many.iter().map(|one| one.as_str().map(str::to_owned)).collect::<Option<_>>()?
            }
            Some(one) => vec![one.as_str()?.to_owned()],
        };
        let issuer = text("iss")??;
        let subject = text("sub").unwrap_or_else(|| Some(String::new()))?;
        Some(Self { issuer, subject, audiences, claims, spaced: Vec::new() })
    }

    /// The claim `iss`.
    pub fn issuer(&self) -> &str {
        &self.issuer
    }

    /// The claim `sub`; empty when there is none, and then no principal pattern matches.
    pub fn subject(&self) -> &str {
        &self.subject
    }

    /// `issuer/subject`, as Istio writes it.
    pub fn principal(&self) -> String {
        format!("{}/{}", self.issuer, self.subject)
    }

    /// The claim `aud`.
    pub fn audiences(&self) -> impl Iterator<Item = &str> {
        self.audiences.iter().map(String::as_str)
    }

    /// The claim `azp`: the client that the token was made for.
    pub fn presenter(&self) -> Option<&str> {
        self.claims.get("azp").and_then(Value::as_str)
    }

    /// Every claim.
    pub fn claims(&self) -> &Map<String, Value> {
        &self.claims
    }

    /// The texts of the claim at a path: one for a text, several for a list of them (and for
    /// `scope`, `permission` and those that the issuer's rule names: a list with spaces
    /// between). Numbers, booleans and objects have none, as in Istio.
    pub fn claim(&self, path: &[Arc<str>]) -> impl Iterator<Item = &str> {
        let is_spaced = match path {
            [name] => matches!(&**name, "scope" | "permission") || self.spaced.contains(name),
            _ => false,
        };
        let found = at_path(&self.claims, path);
        let texts: Vec<&str> = match found {
            Some(Value::String(text)) if is_spaced => text.split_ascii_whitespace().collect(),
            Some(Value::String(text)) => vec![text],
            Some(Value::Array(items)) => items.iter().filter_map(Value::as_str).collect(),
            _ => Vec::new(),
        };
        texts.into_iter()
    }
}

fn at_path<'a>(claims: &'a Map<String, Value>, path: &[Arc<str>]) -> Option<&'a Value> {
    let (first, rest) = path.split_first()?;
    rest.iter().try_fold(claims.get(&**first)?, |value, name| value.get(&**name))
}

/// Where in a request a token was found.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum TokenPlace {
    /// The header of this name (in lower case).
    Header(Arc<str>),
    /// The parameter of the query.
    Param(Arc<str>),
    /// The cookie.
    Cookie(Arc<str>),
}

/// A request whose token is valid.
#[derive(Clone, PartialEq, Debug)]
pub struct Validated {
    /// Whom it proves.
    pub user: EndUser,
    /// Where the token is to be taken out before the request goes on.
    pub remove: Vec<TokenPlace>,
    /// Headers that are to be set, in place of any that the client sent.
    pub set: Vec<(HeaderName, HeaderValue)>,
}

/// Why a request's token is refused. The texts go to the client and name nothing but the token.
#[derive(Debug, thiserror::Error, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Invalid {
    /// Longer than [`MAX_TOKEN_LEN`].
    #[error("the token is too long")]
    TooLong,
    /// Not a JWS in compact form, or its claims are not those of a JWT.
    #[error("the token is not a JWT")]
    Malformed,
    /// `none`, a shared secret's, or unknown.
    #[error("the token's signature algorithm is not accepted")]
    Algorithm,
    /// No rule names its issuer at this place.
    #[error("the token's issuer is not configured")]
    Issuer,
    /// The issuer's keys are not at hand.
    #[error("the keys of the token's issuer are not at hand")]
    NoKeys,
    /// None of the issuer's keys is the token's.
    #[error("the token is signed with a key that its issuer does not have")]
    UnknownKey,
    /// Changed, or forged.
    #[error("the token's signature does not verify")]
    Signature,
    /// It ran out.
    #[error("the token has expired")]
    Expired,
    /// Its time has not come.
    #[error("the token is not valid yet")]
    NotYetValid,
    /// It is for somebody else.
    #[error("the token is for another audience")]
    Audience,
    /// More than one.
    #[error("the request carries several tokens")]
    Several,
}

impl Invalid {
    /// The status of the answer, as Envoy's: 403 for a token that is for others, else 401.
    pub fn status(self) -> StatusCode {
        match self {
            Self::Audience => StatusCode::FORBIDDEN,
            _ => StatusCode::UNAUTHORIZED,
        }
    }

    /// A short stable name, for counters and records.
    pub const fn kind(self) -> &'static str {
        match self {
            Self::TooLong => "too_long",
            Self::Malformed => "malformed",
            Self::Algorithm => "algorithm",
            Self::Issuer => "unknown_issuer",
            Self::NoKeys => "no_keys",
            Self::UnknownKey => "unknown_key",
            Self::Signature => "signature",
            Self::Expired => "expired",
            Self::NotYetValid => "not_yet_valid",
            Self::Audience => "wrong_audience",
            Self::Several => "several",
        }
    }
}

/// Looks for the token of a request and validates it.
///
/// `query` is what stands behind the `?`, as received. `Ok(None)`: there is no token.
///
/// # Errors
///
/// A token that is not valid; the request is then refused, whatever policies say.
pub fn authenticate(
    all: &[Arc<RequestAuthentication>],
    ring: &dyn KeyRing,
    headers: &HeaderMap,
    query: Option<&str>,
    now: Timestamp,
) -> Result<Option<Validated>, Invalid> {
    let mut found: Vec<(TokenPlace, String, Vec<&Arc<JwtRule>>)> = Vec::new();
    for rule in rules(all) {
        for (place, token) in tokens_of(rule, headers, query)? {
            match found.iter().position(|(p, t, _)| *p == place && *t == token) {
                Some(index) => found[index].2.push(rule),
                None if found.len() == MAX_TOKENS => return Err(Invalid::Several),
                None => found.push((place, token, vec![rule])),
            }
        }
    }
    let Some((_, first, _)) = found.first() else { return Ok(None) };
    if found.iter().any(|(_, token, _)| token != first) {
        return Err(Invalid::Several);
    }
    let token = Token::parse(first)?;
    // A rule counts only where it looks for tokens itself.
    let of_issuer =
        |rules: &[&Arc<JwtRule>]| rules.iter().any(|rule| *rule.issuer == *token.issuer);
    if !found.iter().all(|(.., rules)| of_issuer(rules)) {
        return Err(Invalid::Issuer);
    }
    let candidates: Vec<&Arc<JwtRule>> = found
        .iter()
        .flat_map(|(.., rules)| rules.iter().copied())
        .filter(|rule| *rule.issuer == *token.issuer)
        .collect();
    let mut refusal = Invalid::Issuer;
    for rule in &candidates {
        match token.check(rule, ring, now) {
            Ok(()) => {
                let places = || found.iter().map(|(place, ..)| place.clone());
                let remove =
                    if rule.forward_original_token { Vec::new() } else { places().collect() };
                let set = outputs(rule, &token);
                let user = token.into_user(rule.spaced_claims.clone());
                return Ok(Some(Validated { user, remove, set }));
            }
            Err(error) => refusal = error,
        }
    }
    Err(refusal)
}

/// Headers that only a valid token sets: what a client sends under these names is removed
/// from every request.
pub fn output_headers(all: &[Arc<RequestAuthentication>]) -> impl Iterator<Item = &HeaderName> {
    rules(all).flat_map(|rule| {
        rule.payload_header.iter().chain(rule.claim_headers.iter().map(|(name, _)| name))
    })
}

fn rules(all: &[Arc<RequestAuthentication>]) -> impl Iterator<Item = &Arc<JwtRule>> {
    all.iter().filter(|object| !object.ignored).flat_map(|object| &object.rules)
}

/// The tokens at the places that a rule names; by default `Authorization: Bearer` and the
/// parameter `access_token`.
fn tokens_of(
    rule: &JwtRule,
    headers: &HeaderMap,
    query: Option<&str>,
) -> Result<Vec<(TokenPlace, String)>, Invalid> {
    let by_default = rule.headers.is_empty() && rule.params.is_empty() && rule.cookies.is_empty();
    let mut found = Vec::new();
    let mut header = |name: &HeaderName, prefix: &str| -> Result<(), Invalid> {
        for value in headers.get_all(name) {
            let bytes = value.as_bytes();
            // The name of the scheme is the same in any case (RFC 9110 §11.1).
            let begins = bytes.get(..prefix.len()).is_some_and(|begin| {
                if prefix == BEARER {
                    begin.eq_ignore_ascii_case(prefix.as_bytes())
                } else {
                    begin == prefix.as_bytes()
                }
            });
            if !begins {
                continue;
            }
            let token = std::str::from_utf8(&bytes[prefix.len()..])
                .map_err(|_| Invalid::Malformed)?
                .trim_ascii();
            found.push((TokenPlace::Header(name.as_str().into()), token.to_owned()));
        }
        Ok(())
    };
    if by_default {
        header(&AUTHORIZATION, BEARER)?;
    }
    for own in &rule.headers {
        header(&own.name, &own.prefix)?;
    }
    let by_default = by_default.then_some(ACCESS_TOKEN);
    for name in rule.params.iter().map(|name| &**name).chain(by_default) {
        let values = query.into_iter().flat_map(|query| params(query, name));
        found.extend(values.map(|value| (TokenPlace::Param(name.into()), value)));
    }
    for name in &rule.cookies {
        for value in headers.get_all(COOKIE) {
            let text = std::str::from_utf8(value.as_bytes()).map_err(|_| Invalid::Malformed)?;
            for pair in text.split(';') {
                if let Some((key, value)) = pair.trim_ascii().split_once('=')
                    && *key == **name
                {
                    found.push((TokenPlace::Cookie(name.clone()), value.to_owned()));
                }
            }
        }
    }
    Ok(found)
}

/// The values of a query's parameter. A token has no character that needs an escape: what is
/// escaped is left as it is, and then is no token.
fn params(query: &str, name: &str) -> Vec<String> {
    query
        .split('&')
        .filter_map(|pair| pair.split_once('='))
        .filter(|(key, _)| *key == name)
        .map(|(_, value)| value.to_owned())
        .collect()
}

/// The headers that a rule sets.
fn outputs(rule: &JwtRule, token: &Token<'_>) -> Vec<(HeaderName, HeaderValue)> {
    let payload = rule.payload_header.iter().map(|name| (name, token.payload.to_owned()));
    let claims = rule.claim_headers.iter().filter_map(|(name, path)| {
        let text = match at_path(&token.claims, path)? {
            Value::String(text) => text.clone(),
            Value::Number(number) => number.to_string(),
            Value::Bool(is) => is.to_string(),
            Value::Null | Value::Array(_) | Value::Object(_) => return None,
        };
        Some((name, text))
    });
    // A claim that no header can hold is left out; the client's own is removed all the same.
    payload
        .chain(claims)
        .filter_map(|(name, text)| Some((name.clone(), HeaderValue::from_str(&text).ok()?)))
        .collect()
}

#[cfg(test)]
pub(crate) mod tests;
