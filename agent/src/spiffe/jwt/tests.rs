use proptest::prelude::*;
use serde_json::json;

use super::*;
use crate::spiffe::forge::JwtForger;

const ID: &str = "spiffe://td/ns/shop/sa/web";
const AUDIENCE: &str = "payments";
const NOW: i64 = 1_800_000_000;

fn now() -> Timestamp {
    Timestamp::from_second(NOW).unwrap()
}

fn encode(bytes: impl AsRef<[u8]>) -> String {
    BASE64_URL_SAFE_NO_PAD.encode(bytes)
}

/// Signs header and claims as they are written.
fn token(signer: &JwtForger, algorithm: Algorithm, header: &str, claims: &str) -> String {
    let message = format!("{}.{}", encode(header), encode(claims));
    let signature = signer.sign(algorithm, message.as_bytes()).unwrap();
    format!("{message}.{}", encode(signature))
}

fn bundle(keys: &[(&str, &JwtForger)]) -> JwtBundle {
    let mut bundle = JwtBundle::new();
    for (kid, forger) in keys {
        bundle.insert(kid, forger.key()).unwrap();
    }
    bundle
}

/// Validates against the bundle of the domain `td`.
fn check(token: &str, trusted: &JwtBundle) -> Result<JwtSvid, JwtError> {
    let bundle_of =
        |domain: &TrustDomain| (domain.as_str() == "td").then(|| Arc::new(trusted.clone()));
    JwtSvid::validate(token, AUDIENCE, bundle_of, now())
}

fn claims() -> String {
    json!({"sub": ID, "aud": [AUDIENCE], "exp": NOW + 300, "iat": NOW, "team": {"a": 1}})
        .to_string()
}

#[test]
fn every_algorithm_of_the_standard() {
    let forgers = JwtForger::one_of_each();
    let named =
        [("p256", &forgers[0]), ("p384", &forgers[1]), ("p521", &forgers[2]), ("rsa", &forgers[3])];
    let trusted = bundle(&named);
    let mut seen = 0;
    for name in ["ES256", "ES384", "ES512", "RS256", "RS384", "RS512", "PS256", "PS384", "PS512"] {
        let algorithm = Algorithm::parse(name).unwrap();
        for (kid, forger) in named.iter().filter(|(_, f)| f.key().fits(algorithm)) {
            for header in [
                json!({"alg": name, "kid": kid}),
                json!({"alg": name, "kid": kid, "typ": "JWT"}),
                json!({"alg": name, "kid": kid, "typ": "JOSE"}),
                json!({"alg": name}),
            ] {
                let token = token(forger, algorithm, &header.to_string(), &claims());
                let svid = check(&token, &trusted).unwrap_or_else(|e| panic!("{header}: {e}"));
                assert_eq!(svid.id.as_str(), ID);
                assert_eq!(svid.audiences, [AUDIENCE]);
                assert_eq!(svid.expires_at.as_second(), NOW + 300);
                assert_eq!(svid.claims["team"], json!({"a": 1}));
                seen += 1;
            }
        }
    }
    assert_eq!(seen, 9 * 4);
}

#[test]
fn headers_that_are_refused() {
    let forger = JwtForger::ec();
    let trusted = bundle(&[("k", &forger)]);
    let with = |header: &str| {
        check(&token(&forger, Algorithm::ES256, header, &claims()), &trusted).map_err(|e| e.kind())
    };
    assert!(with(r#"{"alg":"ES256","kid":"k","typ":"JWT"}"#).is_ok());
    for (kind, header) in [
        ("algorithm", r#"{"alg":"none","kid":"k"}"#),
        ("algorithm", r#"{"alg":"HS256","kid":"k"}"#),
        ("algorithm", r#"{"alg":"EdDSA","kid":"k"}"#),
        ("algorithm", r#"{"alg":"es256","kid":"k"}"#),
        ("signature", r#"{"alg":"ES384","kid":"k"}"#),
        ("signature", r#"{"alg":"RS256","kid":"k"}"#),
        ("unknown_key", r#"{"alg":"ES256","kid":"other"}"#),
        ("unknown_key", r#"{"alg":"ES256","kid":""}"#),
        ("header", r#"{"kid":"k"}"#),
        ("header", r#"{"alg":"ES256","kid":"k","typ":"at+jwt"}"#),
        ("header", r#"{"alg":"ES256","kid":"k","typ":"jwt"}"#),
        ("header", r#"{"alg":"ES256","kid":"k","jku":"https://evil"}"#),
        ("header", r#"{"alg":"ES256","kid":"k","crit":[]}"#),
        ("header", r#"{"alg":"ES256","alg":"ES256","kid":"k"}"#),
        ("header", r#"{"alg":"ES256","kid":"k","kid":"k"}"#),
        ("header", r#"{"alg":"ES256","kid":null}"#),
        ("header", r#"{"alg":["ES256"],"kid":"k"}"#),
        ("header", r#"["ES256"]"#),
        ("header", ""),
        ("header", r#"{"alg":"ES256","kid":"k"} x"#),
    ] {
        assert_eq!(with(header).unwrap_err(), kind, "{header}");
    }
}

#[test]
fn claims_that_are_refused() {
    let forger = JwtForger::ec();
    let trusted = bundle(&[("k", &forger)]);
    let with = |claims: &str| {
        let token = token(&forger, Algorithm::ES256, r#"{"alg":"ES256","kid":"k"}"#, claims);
        check(&token, &trusted).map_err(|e| e.kind())
    };
    let good = json!({"sub": ID, "aud": AUDIENCE, "exp": NOW + 1});
    let changed = |name: &str, value: serde_json::Value| {
        let mut claims = good.clone();
        claims[name] = value;
        claims.to_string()
    };
    let without = |name: &str| {
        let mut claims = good.clone();
        claims.as_object_mut().unwrap().remove(name);
        claims.to_string()
    };
    for accepted in [
        good.to_string(),
        changed("aud", json!(["a", AUDIENCE])),
        changed("sub", json!("SPIFFE://TD/ns/shop/sa/web")),
        changed("exp", json!(NOW as f64 + 1.5)),
        changed("nbf", json!(NOW + 60)),
        changed("iat", json!(NOW + 1000)),
    ] {
        assert_eq!(with(&accepted).map(|svid| svid.id.to_string()), Ok(ID.into()), "{accepted}");
    }
    let twice = format!(r#"{{"sub":"{ID}","sub":"{ID}","aud":"{AUDIENCE}","exp":{}}}"#, NOW + 1);
    for (kind, claims) in [
        ("claims", without("sub")),
        ("claims", without("aud")),
        ("claims", without("exp")),
        ("claims", changed("aud", json!([]))),
        ("claims", changed("aud", json!(1))),
        ("claims", changed("aud", json!(vec!["a"; MAX_AUDIENCES + 1]))),
        ("claims", changed("exp", json!("soon"))),
        ("claims", changed("exp", json!(null))),
        ("claims", changed("exp", json!(1e300))),
        ("claims", changed("nbf", json!(null))),
        ("claims", changed("nbf", json!("now"))),
        ("claims", changed("iat", json!([]))),
        ("claims", twice),
        ("claims", "[]".into()),
        ("claims", json!([ID, AUDIENCE, NOW + 1]).to_string()),
        ("claims", "{".into()),
        ("not_a_spiffe_id", changed("sub", json!("web"))),
        ("not_a_spiffe_id", changed("sub", json!("spiffe://td/ns/../web"))),
        ("wrong_trust_domain", changed("sub", json!("spiffe://other/ns/shop/sa/web"))),
        ("wrong_audience", changed("aud", json!("Payments"))),
        ("wrong_audience", changed("aud", json!(["pay", "ments"]))),
        ("expired", changed("exp", json!(NOW))),
        ("expired", changed("exp", json!(NOW as f64 + 0.5))),
        ("expired", changed("exp", json!(0))),
        ("not_yet_valid", changed("nbf", json!(NOW + 61))),
    ] {
        assert_eq!(with(&claims).unwrap_err(), kind, "{claims}");
    }
}

#[test]
fn tokens_that_are_no_tokens() {
    let forger = JwtForger::ec();
    let trusted = bundle(&[("k", &forger)]);
    let good = token(&forger, Algorithm::ES256, r#"{"alg":"ES256","kid":"k"}"#, &claims());
    assert!(check(&good, &trusted).is_ok());
    let (message, signature) = good.rsplit_once('.').unwrap();
    let kind = |token: &str| check(token, &trusted).unwrap_err().kind();
    for bad in [
        String::new(),
        "..".into(),
        format!("{good}."),
        format!("{good}="),
        format!(" {good}"),
        format!("{good}\n"),
        message.into(),
        good.replace('.', "/"),
    ] {
        assert!(["not_compact", "header"].contains(&kind(&bad)), "{bad:?}");
    }
    assert_eq!(kind(&format!("{message}.")), "signature");
    assert_eq!(kind(&format!("{message}.{}", encode([0; 64]))), "signature");
    assert_eq!(kind(&format!("{message}.{signature}AAAA")), "signature");
    assert_eq!(kind(&"a".repeat(MAX_TOKEN_LEN + 1)), "too_long");
    // An empty bundle has revoked everything, with and without a key ID.
    for header in [r#"{"alg":"ES256","kid":"k"}"#, r#"{"alg":"ES256"}"#] {
        let token = token(&forger, Algorithm::ES256, header, &claims());
        let error = check(&token, &JwtBundle::new()).unwrap_err();
        assert!(["unknown_key", "signature"].contains(&error.kind()), "{error}");
    }
    // What somebody else signed is not called expired.
    let expired = json!({"sub": ID, "aud": AUDIENCE, "exp": 1}).to_string();
    let forged =
        token(&JwtForger::ec(), Algorithm::ES256, r#"{"alg":"ES256","kid":"k"}"#, &expired);
    assert_eq!(kind(&forged), "signature");
}

fn signed(signer: &JwtSigner) -> String {
    let claims = JwtClaims {
        id: SpiffeId::parse(ID).unwrap(),
        audiences: vec![AUDIENCE.into(), "other".into()],
        issued_at: now(),
        expires_at: now() + SignedDuration::from_secs(300),
        issuer: Some("https://issuer.test".into()),
    };
    signer.sign(&claims).unwrap()
}

#[test]
fn what_we_sign_we_accept_and_so_does_another_implementation() {
    let signer = JwtSigner::generate().unwrap();
    let token = signed(&signer);
    let mut trusted = JwtBundle::new();
    trusted.insert(signer.kid(), signer.public_key().clone()).unwrap();
    let svid = check(&token, &trusted).unwrap();
    assert_eq!(svid.audiences, [AUDIENCE, "other"]);
    assert_eq!(svid.claims["iss"], "https://issuer.test");
    assert_eq!(svid.claims["iat"], NOW);
    assert_eq!(JwtSvid::parse_unverified(&token).unwrap(), svid);

    let stored = JwtSigner::from_pkcs8(&signer.to_pkcs8().unwrap()).unwrap();
    assert_eq!((stored.kid(), stored.public_key()), (signer.kid(), signer.public_key()));
    assert_eq!(JwtSigner::from_pkcs8(&[1, 2, 3]).unwrap_err(), JwtSignerError::Malformed);
    let shown = format!("{signer:?}");
    assert!(shown.contains(signer.kid()) && !shown.contains("pair"), "{shown}");

    let members: serde_json::Map<_, _> = signer
        .public_key()
        .members()
        .into_iter()
        .map(|(name, value)| (name.to_owned(), json!(value)))
        .collect();
    let jwk: jsonwebtoken::jwk::Jwk = serde_json::from_value(members.into()).unwrap();
    let key = jsonwebtoken::DecodingKey::from_jwk(&jwk).unwrap();
    let mut rules = jsonwebtoken::Validation::new(jsonwebtoken::Algorithm::ES256);
    rules.set_audience(&[AUDIENCE]);
    rules.sub = Some(ID.into());
    // NOW is not this clock's.
    rules.validate_exp = false;
    let theirs = jsonwebtoken::decode::<serde_json::Value>(&token, &key, &rules).unwrap();
    assert_eq!(theirs.header.kid.as_deref(), Some(signer.kid()));
    assert_eq!(theirs.claims, serde_json::Value::Object(svid.claims));

    // And what it signs, we accept.
    let pkcs8 = signer.to_pkcs8().unwrap();
    let mut header = jsonwebtoken::Header::new(jsonwebtoken::Algorithm::ES256);
    header.kid = Some(signer.kid().to_owned());
    let theirs = jsonwebtoken::encode(
        &header,
        &json!({"sub": ID, "aud": AUDIENCE, "exp": NOW + 9}),
        &jsonwebtoken::EncodingKey::from_ec_der(&pkcs8),
    )
    .unwrap();
    assert_eq!(check(&theirs, &trusted).unwrap().id.as_str(), ID);
}

static GOOD: std::sync::LazyLock<(String, JwtBundle)> = std::sync::LazyLock::new(|| {
    let signer = JwtSigner::generate().unwrap();
    let mut trusted = JwtBundle::new();
    trusted.insert(signer.kid(), signer.public_key().clone()).unwrap();
    (signed(&signer), trusted)
});

proptest! {
    #[test]
    fn a_changed_character_is_never_accepted(
        at in any::<prop::sample::Index>(), to in proptest::char::range('!', '~'),
    ) {
        let (token, trusted) = &*GOOD;
        let at = at.index(token.len());
        let mut changed = token.clone();
        changed.replace_range(at..=at, &to.to_string());
        prop_assert!(changed == *token || check(&changed, trusted).is_err());
    }

    #[test]
    fn any_text_is_answered(text in "\\PC{0,200}") {
        prop_assert!(check(&text, &GOOD.1).is_err());
    }

    #[test]
    fn any_json_is_answered(header in "\\PC{0,60}", claims in "\\PC{0,60}") {
        let token = format!("{}.{}.AAAA", encode(header), encode(claims));
        prop_assert!(check(&token, &GOOD.1).is_err());
    }

    #[test]
    fn only_its_own_audiences_accept_it(audiences in prop::collection::vec("[a-c]{1,2}", 1..5), asked in "[a-c]{1,2}") {
        let signer = JwtForger::ec();
        let claims = json!({"sub": ID, "aud": audiences, "exp": NOW + 1}).to_string();
        let token = token(&signer, Algorithm::ES256, r#"{"alg":"ES256","kid":"k"}"#, &claims);
        let trusted = Arc::new(bundle(&[("k", &signer)]));
        let answer = JwtSvid::validate(&token, &asked, |_| Some(trusted), now());
        prop_assert_eq!(answer.is_ok(), audiences.contains(&asked));
    }
}
