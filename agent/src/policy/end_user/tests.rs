use aws_lc_rs::signature::{Ed25519KeyPair, KeyPair as _};
use base64::{Engine as _, prelude::BASE64_URL_SAFE_NO_PAD};
use serde_json::json;

use super::*;
use crate::spiffe::{forge::JwtForger, jwt_bundle::Algorithm};

const ISSUER: &str = "https://login.example";
/// When the tables' requests come: Unix seconds.
const NOW: i64 = 1_800_000_000;

/// The end user of a token with these claims.
pub(crate) fn user(claims: &Value) -> EndUser {
    EndUser::of_claims(claims.as_object().unwrap().clone()).unwrap()
}

fn part(value: &Value) -> String {
    BASE64_URL_SAFE_NO_PAD.encode(value.to_string())
}

/// An issuer's key with the ID `k`.
pub(crate) struct Issuer {
    forger: JwtForger,
    algorithm: Algorithm,
}

impl Issuer {
    /// A fresh ES256 key.
    pub(crate) fn new() -> Self {
        let [forger, ..] = JwtForger::one_of_each();
        Self { forger, algorithm: Algorithm::ES256 }
    }

    /// A token of these claims.
    pub(crate) fn token(&self, header: &Value, claims: &Value) -> String {
        let message = format!("{}.{}", part(header), part(claims));
        let signature = self.forger.sign(self.algorithm, message.as_bytes()).unwrap();
        format!("{message}.{}", BASE64_URL_SAFE_NO_PAD.encode(signature))
    }

    /// Its keys, as a document.
    pub(crate) fn jwks(&self, kid: &str) -> String {
        let mut key: Map<String, Value> =
            self.forger.key().members().into_iter().map(|(n, v)| (n.into(), v.into())).collect();
        key.insert("kid".into(), kid.into());
        json!({ "keys": [key] }).to_string()
    }

    fn keys(&self) -> Arc<IssuerKeys> {
        Arc::new(IssuerKeys::decode(self.jwks("k").as_bytes()).unwrap())
    }
}

/// The header of good tokens.
pub(crate) fn header() -> Value {
    json!({"alg": "ES256", "kid": "k", "typ": "JWT"})
}

/// The claims of good tokens, with a change.
pub(crate) fn claims(change: impl FnOnce(&mut Value)) -> Value {
    let mut claims = json!({
        "iss": ISSUER, "sub": "alice", "aud": ["pay"], "exp": NOW + 300, "nbf": NOW - 300,
        "level": 7, "admin": true, "groups": ["ops"],
    });
    change(&mut claims);
    claims
}

/// A rule with nothing but an issuer and its keys.
pub(crate) fn rule(keys: KeySource) -> JwtRule {
    JwtRule {
        issuer: ISSUER.into(),
        audiences: Vec::new(),
        keys,
        headers: Vec::new(),
        params: Vec::new(),
        cookies: Vec::new(),
        forward_original_token: false,
        payload_header: None,
        claim_headers: Vec::new(),
        spaced_claims: Vec::new(),
    }
}

/// An object with these rules.
pub(crate) fn object(rules: Vec<JwtRule>) -> Arc<RequestAuthentication> {
    let name = PolicyName {
        kind: "RequestAuthentication".into(),
        namespace: "shop".into(),
        name: "login".into(),
    };
    Arc::new(RequestAuthentication {
        name,
        selector: Selector::of("shop"),
        rules: rules.into_iter().map(Arc::new).collect(),
        ignored: false,
        remarks: Vec::new(),
    })
}

fn bearer(token: &str) -> HeaderMap {
    let value = format!("Bearer {token}").parse().unwrap();
    HeaderMap::from_iter([(AUTHORIZATION, value)])
}

fn now() -> Timestamp {
    Timestamp::from_second(NOW).unwrap()
}

fn ask(
    rules: Vec<JwtRule>,
    headers: &HeaderMap,
    query: Option<&str>,
) -> Result<Option<Validated>, Invalid> {
    authenticate(&[object(rules)], &(), headers, query, now())
}

#[test]
fn a_good_token_is_taken_and_its_claims_are_known() {
    let issuer = Issuer::new();
    let rule = rule(KeySource::Inline(issuer.keys()));
    let headers = bearer(&issuer.token(&header(), &claims(|_| {})));
    let valid = ask(vec![rule.clone()], &headers, None).unwrap().unwrap();
    assert_eq!(valid.user.principal(), "https://login.example/alice");
    assert_eq!(valid.user.audiences().collect::<Vec<_>>(), ["pay"]);
    assert_eq!(valid.user.claim(&["groups".into()]).collect::<Vec<_>>(), ["ops"]);
    // It does not go on, unless it is to.
    assert_eq!(valid.remove, [TokenPlace::Header("authorization".into())]);
    let kept = JwtRule { forward_original_token: true, ..rule.clone() };
    assert!(ask(vec![kept], &headers, None).unwrap().unwrap().remove.is_empty());
    // Without a token nobody is known and nothing is refused; without a rule nothing is read.
    assert_eq!(ask(vec![rule], &HeaderMap::new(), Some("a=b")), Ok(None));
    assert_eq!(ask(vec![], &headers, None), Ok(None));
    let basic = HeaderMap::from_iter([(AUTHORIZATION, "Basic eDp5".parse().unwrap())]);
    assert_eq!(ask(vec![super::tests::rule(KeySource::Unreadable)], &basic, None), Ok(None));
}

#[test]
fn what_is_refused_and_why() {
    let (issuer, other) = (Issuer::new(), Issuer::new());
    let rule = rule(KeySource::Inline(issuer.keys()));
    let strict = JwtRule { audiences: vec!["pay".into(), "ledger".into()], ..rule.clone() };
    let good = issuer.token(&header(), &claims(|_| {}));
    let judged = |rule: &JwtRule, token: &str| {
        ask(vec![rule.clone()], &bearer(token), None).map(|valid| valid.is_some())
    };
    assert_eq!(judged(&rule, &good), Ok(true));
    assert_eq!(judged(&strict, &good), Ok(true));
    let signed = |change: fn(&mut Value)| issuer.token(&header(), &claims(change));
    let headed = |header: Value| issuer.token(&header, &claims(|_| {}));
    let (message, signature) = good.rsplit_once('.').unwrap();
    let forged = format!(
        "{}.{}.{signature}",
        part(&header()),
        part(&claims(|claims| claims["sub"] = "admin".into()))
    );
    let rows: Vec<(&str, String, Invalid)> = vec![
        ("empty", String::new(), Invalid::Malformed),
        ("two parts", message.to_owned(), Invalid::Malformed),
        ("four parts", format!("{good}.x"), Invalid::Malformed),
        ("padding", format!("{good}="), Invalid::Malformed),
        ("too long", "a".repeat(MAX_TOKEN_LEN + 1), Invalid::TooLong),
        ("no object", format!("{}.W10.{signature}", part(&header())), Invalid::Malformed),
        (
            "none",
            format!("{}.", headed(json!({"alg": "none"})).rsplit_once('.').unwrap().0),
            Invalid::Algorithm,
        ),
        ("HS256", headed(json!({"alg": "HS256", "kid": "k"})), Invalid::Algorithm),
        ("crit", headed(json!({"alg": "ES256", "kid": "k", "crit": ["b64"]})), Invalid::Malformed),
        ("other kid", headed(json!({"alg": "ES256", "kid": "x"})), Invalid::UnknownKey),
        ("other alg", headed(json!({"alg": "RS256", "kid": "k"})), Invalid::UnknownKey),
        ("forged", forged, Invalid::Signature),
        ("another's", other.token(&header(), &claims(|_| {})), Invalid::Signature),
        ("unsigned", format!("{message}."), Invalid::Signature),
        ("issuer", signed(|c| c["iss"] = "https://evil.example".into()), Invalid::Issuer),
        (
            "no issuer",
            signed(|c| drop(c.as_object_mut().unwrap().remove("iss"))),
            Invalid::Malformed,
        ),
        ("expired", signed(|c| c["exp"] = (NOW - 61).into()), Invalid::Expired),
        ("early", signed(|c| c["nbf"] = (NOW + 61).into()), Invalid::NotYetValid),
        ("exp text", signed(|c| c["exp"] = "tomorrow".into()), Invalid::Malformed),
        ("exp far", signed(|c| c["exp"] = 1e300.into()), Invalid::Malformed),
        ("sub list", signed(|c| c["sub"] = json!(["a"])), Invalid::Malformed),
    ];
    for (what, token, wanted) in rows {
        assert_eq!(judged(&rule, &token), Err(wanted), "{what}");
    }
    // The leeway, and what is not said.
    for change in [
        (|c| c["exp"] = (NOW - 60).into()) as fn(&mut Value),
        |c| c["nbf"] = (NOW + 60).into(),
        |c| drop(c.as_object_mut().unwrap().remove("exp")),
        |c| drop(c.as_object_mut().unwrap().remove("nbf")),
        |c| c["exp"] = (NOW as f64 + 0.5).into(),
    ] {
        assert_eq!(judged(&rule, &signed(change)), Ok(true));
    }
    for change in [
        (|c| c["aud"] = "other".into()) as fn(&mut Value),
        |c| c["aud"] = json!([]),
        |c| drop(c.as_object_mut().unwrap().remove("aud")),
    ] {
        let refused = judged(&strict, &signed(change)).unwrap_err();
        assert_eq!((refused, refused.status().as_u16()), (Invalid::Audience, 403));
        assert_eq!(judged(&rule, &signed(change)), Ok(true));
    }
    assert_eq!(judged(&strict, &signed(|c| c["aud"] = "ledger".into())), Ok(true));
    let nobody = JwtRule { keys: KeySource::Unreadable, ..rule.clone() };
    assert_eq!(judged(&nobody, &good), Err(Invalid::NoKeys));
    let away = JwtRule { keys: KeySource::Url("https://keys.example".into()), ..rule };
    assert_eq!(judged(&away, &good), Err(Invalid::NoKeys));
    assert_eq!(Invalid::NoKeys.status().as_u16(), 401);
}

#[test]
fn tokens_are_found_where_rules_say_and_nowhere_else() {
    let issuer = Issuer::new();
    let token = issuer.token(&header(), &claims(|_| {}));
    let by_default = rule(KeySource::Inline(issuer.keys()));
    let found = |rule: &JwtRule, headers: &HeaderMap, query: Option<&str>| {
        ask(vec![rule.clone()], headers, query).map(|valid| valid.map(|valid| valid.remove))
    };
    let place = |place: TokenPlace| Ok(Some(vec![place]));
    let query = format!("a=b&access_token={token}&c");
    let nothing = HeaderMap::new();
    assert_eq!(
        found(&by_default, &nothing, Some(&query)),
        place(TokenPlace::Param("access_token".into()))
    );
    let lower = format!("bearer {token}").parse().unwrap();
    let lower = HeaderMap::from_iter([(AUTHORIZATION, lower)]);
    assert_eq!(found(&by_default, &lower, None), place(TokenPlace::Header("authorization".into())));
    let own = JwtRule {
        headers: vec![
            TokenHeader { name: HeaderName::from_static("x-jwt"), prefix: "".into() },
            TokenHeader { name: HeaderName::from_static("x-own"), prefix: "jwt=".into() },
        ],
        params: vec!["t".into()],
        cookies: vec!["session".into()],
        ..by_default.clone()
    };
    let with = |name: &'static str, value: String| {
        HeaderMap::from_iter([(HeaderName::from_static(name), value.parse().unwrap())])
    };
    assert_eq!(
        found(&own, &with("x-jwt", token.clone()), None),
        place(TokenPlace::Header("x-jwt".into()))
    );
    assert_eq!(
        found(&own, &with("x-own", format!("jwt={token}")), None),
        place(TokenPlace::Header("x-own".into()))
    );
    assert_eq!(found(&own, &with("x-own", token.clone()), None), Ok(None));
    assert_eq!(
        found(&own, &with("cookie", format!("a=b; session={token}")), None),
        place(TokenPlace::Cookie("session".into()))
    );
    assert_eq!(
        found(&own, &nothing, Some(&format!("t={token}"))),
        place(TokenPlace::Param("t".into()))
    );
    // Its own places are the only ones.
    assert_eq!(found(&own, &bearer(&token), Some(&query)), Ok(None));
    assert_eq!(found(&own, &nothing, Some("t=%2E")), Err(Invalid::Malformed));

    // Twice the same is one; two are refused, in whichever order.
    let both = bearer(&token);
    assert!(found(&by_default, &both, Some(&query)).unwrap().is_some_and(|all| all.len() == 2));
    let bob = issuer.token(&header(), &claims(|claims| claims["sub"] = "bob".into()));
    assert_eq!(found(&by_default, &bearer(&bob), Some(&query)), Err(Invalid::Several));
    let mut twice = bearer(&token);
    twice.append(AUTHORIZATION, format!("Bearer {bob}").parse().unwrap());
    assert_eq!(found(&by_default, &twice, None), Err(Invalid::Several));
    let mut twice = bearer(&token);
    twice.append(AUTHORIZATION, "Bearer ".parse().unwrap());
    assert_eq!(found(&by_default, &twice, None), Err(Invalid::Several));
}

#[test]
fn each_issuer_signs_its_own_tokens_at_its_own_places() {
    let (a, b) = (Issuer::new(), Issuer::new());
    let rule_a = rule(KeySource::Inline(a.keys()));
    let rule_b = JwtRule {
        issuer: "https://b.example".into(),
        headers: vec![TokenHeader { name: HeaderName::from_static("x-b"), prefix: "".into() }],
        ..rule(KeySource::Inline(b.keys()))
    };
    let rules = || vec![rule_a.clone(), rule_b.clone()];
    let of_b = claims(|claims| claims["iss"] = "https://b.example".into());
    let at_b = |token: String| {
        HeaderMap::from_iter([(HeaderName::from_static("x-b"), token.parse().unwrap())])
    };
    let judged = |headers: &HeaderMap| {
        ask(rules(), headers, None).map(|valid| valid.map(|valid| valid.user.principal()))
    };
    let good_a = a.token(&header(), &claims(|_| {}));
    let good_b = b.token(&header(), &of_b);
    assert_eq!(judged(&bearer(&good_a)), Ok(Some("https://login.example/alice".into())));
    assert_eq!(judged(&at_b(good_b.clone())), Ok(Some("https://b.example/alice".into())));
    assert_eq!(judged(&bearer(&good_b)), Err(Invalid::Issuer));
    assert_eq!(judged(&at_b(good_a)), Err(Invalid::Issuer));
    assert_eq!(judged(&at_b(a.token(&header(), &of_b))), Err(Invalid::Signature));
    // An object that is in force elsewhere does nothing here.
    let elsewhere =
        RequestAuthentication { ignored: true, ..RequestAuthentication::clone(&object(rules())) };
    let judged = authenticate(&[Arc::new(elsewhere)], &(), &bearer(&good_b), None, now());
    assert_eq!(judged, Ok(None));
}

#[test]
fn claims_become_headers_that_no_client_can_set() {
    let issuer = Issuer::new();
    let path = |name: &str| vec![Arc::from(name)];
    let rule = JwtRule {
        payload_header: Some(HeaderName::from_static("x-payload")),
        claim_headers: vec![
            (HeaderName::from_static("x-sub"), path("sub")),
            (HeaderName::from_static("x-level"), path("level")),
            (HeaderName::from_static("x-admin"), path("admin")),
            (HeaderName::from_static("x-groups"), path("groups")),
            (HeaderName::from_static("x-none"), path("none")),
            (HeaderName::from_static("x-line"), path("line")),
        ],
        ..rule(KeySource::Inline(issuer.keys()))
    };
    let claims = claims(|claims| claims["line"] = "a\r\nx-admin: yes".into());
    let token = issuer.token(&header(), &claims);
    let valid = ask(vec![rule.clone()], &bearer(&token), None).unwrap().unwrap();
    let set: Vec<(&str, &str)> =
        valid.set.iter().map(|(n, v)| (n.as_str(), v.to_str().unwrap())).collect();
    let payload = part(&claims);
    let wanted =
        [("x-payload", &*payload), ("x-sub", "alice"), ("x-level", "7"), ("x-admin", "true")];
    assert_eq!(set, wanted);
    let all = [object(vec![rule])];
    let names: Vec<&str> = output_headers(&all).map(HeaderName::as_str).collect();
    assert_eq!(names, ["x-payload", "x-sub", "x-level", "x-admin", "x-groups", "x-none", "x-line"]);
}

#[test]
fn keys_of_every_kind_and_what_is_left_out() {
    const ALGORITHMS: [&[&str]; 4] = [
        &["ES256"],
        &["ES384"],
        &["ES512"],
        &["RS256", "RS384", "RS512", "PS256", "PS384", "PS512"],
    ];
    for (forger, algorithms) in JwtForger::one_of_each().into_iter().zip(ALGORITHMS) {
        let mut issuer = Issuer { forger, algorithm: Algorithm::ES256 };
        for name in algorithms {
            issuer.algorithm = Algorithm::parse(name).unwrap();
            let token = issuer.token(&json!({"alg": name}), &claims(|_| {}));
            let rule = rule(KeySource::Inline(issuer.keys()));
            assert!(ask(vec![rule], &bearer(&token), None).unwrap().is_some(), "{name}");
        }
    }
    let pair = Ed25519KeyPair::generate().unwrap();
    let x = BASE64_URL_SAFE_NO_PAD.encode(pair.public_key().as_ref());
    let key = json!({"kty": "OKP", "crv": "Ed25519", "x": x, "use": "sig", "alg": "EdDSA"});
    let message = format!("{}.{}", part(&json!({"alg": "EdDSA"})), part(&claims(|_| {})));
    let signature = BASE64_URL_SAFE_NO_PAD.encode(pair.sign(message.as_bytes()));
    let token = format!("{message}.{signature}");
    let judged = |keys: &Value| {
        let keys = IssuerKeys::decode(json!({ "keys": keys }).to_string().as_bytes());
        let rule = rule(KeySource::Inline(Arc::new(keys.map_err(|e| e.to_string())?)));
        ask(vec![rule], &bearer(&token), None).map_err(|e| e.to_string()).map(|v| v.is_some())
    };
    assert_eq!(judged(&json!([key])), Ok(true));
    // One that is not understood does not take the others away.
    let secret = json!({"kty": "oct", "k": "c2VjcmV0"});
    assert_eq!(judged(&json!([secret, {"kty": "RSA", "n": "AQ", "e": "AQAB"}, key])), Ok(true));
    let none = "none of its keys verifies tokens";
    for change in [
        ("use", json!("enc")),
        ("key_ops", json!(["sign"])),
        ("alg", json!("HS256")),
        ("crv", json!("X25519")),
        ("x", json!("AAAA")),
    ] {
        let mut changed = key.clone();
        changed[change.0] = change.1;
        assert!(judged(&json!([changed])).unwrap_err().contains(none), "{changed}");
    }
    let mut other = key.clone();
    other["alg"] = json!("RS256");
    assert!(judged(&json!([other])).unwrap_err().contains("does not have"));
    assert!(judged(&json!([secret])).unwrap_err().contains(none));
    assert!(judged(&json!([])).unwrap_err().contains(none));
    assert!(judged(&json!("x")).unwrap_err().contains("not a JWK set"));
    assert!(judged(&json!(vec![key; MAX_KEYS_AND_ONE])).unwrap_err().contains("is the most"));
    let long = vec![b' '; MAX_DOCUMENT_LEN + 1];
    assert_eq!(IssuerKeys::decode(&long), Err(KeysError::TooLarge(MAX_DOCUMENT_LEN + 1)));
}

/// More keys than a document may have.
const MAX_KEYS_AND_ONE: usize = 257;
