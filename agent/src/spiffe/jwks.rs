//! A SPIFFE bundle as a JWK set (SPIFFE Trust Domain and Bundle, section 4; RFC 7517).

use std::time::Duration;

use base64::{
    Engine as _,
    prelude::{BASE64_STANDARD, BASE64_URL_SAFE_NO_PAD},
};
use rustls::pki_types::CertificateDer;
use serde::Deserialize;
use serde_json::{Map, Value, json};
use x509_parser::{certificate::X509Certificate, prelude::FromDer, public_key::PublicKey};

use super::{
    Bundle, BundleError,
    bundle::MAX_AUTHORITIES,
    jwt_bundle::{Curve, JwtBundle, JwtKey, JwtKeyError, json_object},
};

/// The largest document that is read, in bytes.
pub const MAX_DOCUMENT_LEN: usize = 1024 * 1024;
/// The most keys of any kind that a document may have, those that are ignored included.
pub const MAX_KEYS: usize = 256;

/// All that a trust domain publishes. Which domain it is, is not part of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SpiffeBundle {
    /// What signs X509-SVIDs.
    pub x509: Bundle,
    /// What signs JWT-SVIDs.
    pub jwt: JwtBundle,
    /// Grows with every change.
    pub sequence: Option<u64>,
    /// How often to look for a change; whole seconds.
    pub refresh_hint: Option<Duration>,
}

/// Why a document is not a SPIFFE bundle, or a bundle cannot be written as one.
#[derive(Debug, thiserror::Error, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum JwksError {
    /// Larger than [`MAX_DOCUMENT_LEN`].
    #[error("a bundle document of {0} bytes is too large: at most {MAX_DOCUMENT_LEN} are accepted")]
    TooLarge(usize),
    /// Not JSON of the right shape.
    #[error(
        "the bundle is not a JWK set ({0}); it must be a JSON object with \"keys\", a list that may be empty"
    )]
    Json(String),
    /// More than [`MAX_KEYS`].
    #[error("the bundle has {0} keys; at most {MAX_KEYS} are accepted: remove those out of use")]
    TooManyKeys(usize),
    /// A key is malformed.
    #[error("key {index} of the bundle is refused: {problem}")]
    Key {
        /// Its place, from 1.
        index: usize,
        /// What is wrong.
        problem: String,
    },
    /// The certificates do not make a bundle.
    #[error(transparent)]
    X509(#[from] BundleError),
    /// A certificate's key has no form as a JWK here.
    #[error(
        "authority {0} has a key that cannot be published as a JWK: use ECDSA (P-256, P-384, P-521) or RSA of 2048 bits or more"
    )]
    Unpublishable(usize),
}

/// The document. Members that are not known are ignored, as the standard says.
#[derive(Deserialize)]
struct Document {
    keys: Vec<Value>,
    spiffe_sequence: Option<u64>,
    spiffe_refresh_hint: Option<u64>,
}

/// The members of a key that count here.
#[derive(Deserialize)]
struct RawKey {
    kid: Option<String>,
    x5c: Option<Vec<String>>,
    crv: Option<String>,
    x: Option<String>,
    y: Option<String>,
    n: Option<String>,
    e: Option<String>,
}

impl SpiffeBundle {
    /// Reads a document.
    ///
    /// Keys of an unknown `kty` or `use`, or without one, are ignored, as the standard says. A
    /// key that says what it is and is not that, is an error: with it left out, what the domain
    /// means would be guessed.
    pub fn decode(document: &[u8]) -> Result<Self, JwksError> {
        if document.len() > MAX_DOCUMENT_LEN {
            return Err(JwksError::TooLarge(document.len()));
        }
        let document: Document =
            json_object(document).map_err(|e| JwksError::Json(e.to_string()))?;
        if document.keys.len() > MAX_KEYS {
            return Err(JwksError::TooManyKeys(document.keys.len()));
        }
        let mut certificates = Vec::new();
        let mut jwt = JwtBundle::new();
        for (i, value) in document.keys.into_iter().enumerate() {
            let refused = |problem: String| JwksError::Key { index: i + 1, problem };
            if !value.is_object() {
                return Err(refused("it is not a JSON object".into()));
            }
            let member = |name| value.get(name).and_then(Value::as_str).map(str::to_owned);
            let (Some(kty), Some(r#use)) = (member("kty"), member("use")) else { continue };
            if !matches!(&*kty, "EC" | "RSA") || !matches!(&*r#use, "x509-svid" | "jwt-svid") {
                continue;
            }
            let raw: RawKey = serde_json::from_value(value).map_err(|e| refused(e.to_string()))?;
            if r#use == "x509-svid" {
                certificates.push(raw.certificate(&kty).map_err(refused)?);
                if certificates.len() > MAX_AUTHORITIES {
                    return Err(BundleError::TooMany(certificates.len()).into());
                }
            } else {
                let kid = raw.kid.as_deref().ok_or_else(|| {
                    refused("a jwt-svid key needs a \"kid\", by which tokens name it".into())
                })?;
                let key = raw.key(&kty).map_err(refused)?;
                jwt.insert(kid, key).map_err(|e| refused(e.to_string()))?;
            }
        }
        Ok(Self {
            x509: Bundle::from_der(certificates)?,
            jwt,
            sequence: document.spiffe_sequence,
            refresh_hint: document.spiffe_refresh_hint.map(Duration::from_secs),
        })
    }

    /// The document; the same bundle gives the same bytes.
    pub fn encode(&self) -> Result<String, JwksError> {
        let mut keys = Vec::new();
        for (i, certificate) in self.x509.certificates().enumerate() {
            let key = certificate_key(certificate).ok_or(JwksError::Unpublishable(i + 1))?;
            let mut members = members(&key);
            members.insert("use".into(), "x509-svid".into());
            members.insert("x5c".into(), json!([BASE64_STANDARD.encode(certificate)]));
            keys.push(Value::Object(members));
        }
        keys.extend(jwt_keys(&self.jwt));
        let mut document = Map::new();
        document.insert("keys".into(), keys.into());
        if let Some(sequence) = self.sequence {
            document.insert("spiffe_sequence".into(), sequence.into());
        }
        if let Some(hint) = self.refresh_hint {
            document.insert("spiffe_refresh_hint".into(), hint.as_secs().into());
        }
        Ok(Value::Object(document).to_string())
    }
}

/// The JWK set of the JWT keys alone, as the Workload API hands it out.
pub fn encode_jwt(bundle: &JwtBundle) -> String {
    json!({ "keys": jwt_keys(bundle).collect::<Vec<_>>() }).to_string()
}

fn jwt_keys(bundle: &JwtBundle) -> impl Iterator<Item = Value> {
    bundle.iter().map(|(kid, key)| {
        let mut members = members(key);
        members.insert("use".into(), "jwt-svid".into());
        members.insert("kid".into(), kid.into());
        Value::Object(members)
    })
}

fn members(key: &JwtKey) -> Map<String, Value> {
    key.members().into_iter().map(|(name, value)| (name.to_owned(), value.into())).collect()
}

impl RawKey {
    /// The certificate of an x509-svid key.
    fn certificate(&self, kty: &str) -> Result<CertificateDer<'static>, String> {
        let chain = self.x5c.as_deref().unwrap_or_default();
        let [one] = chain else {
            return Err(format!(
                "an x509-svid key has exactly one certificate in \"x5c\", this one has {}",
                chain.len()
            ));
        };
        let der = BASE64_STANDARD
            .decode(one)
            .map_err(|_| "\"x5c\" is not base64 (with padding, without line breaks)".to_owned())?;
        let certificate = CertificateDer::from(der);
        // RFC 7517, section 4.7: the certificate's key must be the one that the members name.
        let named = [&self.crv, &self.x, &self.y, &self.n, &self.e].iter().any(|m| m.is_some());
        if named {
            let theirs = certificate_key(&certificate);
            if theirs.is_none() || theirs != Some(self.key(kty)?) {
                return Err("the certificate in \"x5c\" has another key than its members".into());
            }
        }
        Ok(certificate)
    }

    /// The key that the members name.
    fn key(&self, kty: &str) -> Result<JwtKey, String> {
        let bytes = |name: &str, member: &Option<String>| {
            let text =
                member.as_deref().ok_or_else(|| format!("a key of kty {kty} needs \"{name}\""))?;
            BASE64_URL_SAFE_NO_PAD
                .decode(text)
                .map_err(|_| format!("\"{name}\" is not base64url without padding"))
        };
        let said = |e: JwtKeyError| e.to_string();
        if kty == "RSA" {
            return JwtKey::from_modulus(&bytes("n", &self.n)?, &bytes("e", &self.e)?)
                .map_err(said);
        }
        let curve = self
            .crv
            .as_deref()
            .and_then(Curve::parse)
            .ok_or("a key of kty EC needs \"crv\", one of P-256, P-384 and P-521")?;
        JwtKey::from_coordinates(curve, &bytes("x", &self.x)?, &bytes("y", &self.y)?).map_err(said)
    }
}

impl JwtKey {
    /// The key of a JWK of kty RSA or EC, whatever else the JWK says; `None` when it is none.
    pub fn from_jwk(value: &Value) -> Option<Self> {
        let raw: RawKey = serde::Deserialize::deserialize(value).ok()?;
        let kty = value.get("kty")?.as_str()?;
        if matches!(kty, "RSA" | "EC") { raw.key(kty).ok() } else { None }
    }
}

/// The public key of a certificate, when it is of a kind that has a JWK here.
fn certificate_key(der: &CertificateDer<'_>) -> Option<JwtKey> {
    let (_, certificate) = X509Certificate::from_der(der).ok()?;
    match certificate.public_key().parsed().ok()? {
        PublicKey::EC(point) => [Curve::P256, Curve::P384, Curve::P521]
            .into_iter()
            .find_map(|curve| JwtKey::from_point(curve, point.data()).ok()),
        PublicKey::RSA(key) => JwtKey::from_modulus(key.modulus, key.exponent).ok(),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::spiffe::forge::{Forger, JwtForger};

    fn bundle() -> SpiffeBundle {
        let (a, b) = (Forger::root("a"), Forger::root("b"));
        let mut jwt = JwtBundle::new();
        for (i, forger) in JwtForger::one_of_each().iter().enumerate() {
            jwt.insert(&format!("key/{i}\"\\"), forger.key()).unwrap();
        }
        SpiffeBundle {
            x509: Bundle::from_der([a.certificate, b.certificate]).unwrap(),
            jwt,
            sequence: Some(7),
            refresh_hint: Some(Duration::from_secs(300)),
        }
    }

    #[test]
    fn what_is_written_is_read() {
        let bundle = bundle();
        let text = bundle.encode().unwrap();
        assert_eq!(SpiffeBundle::decode(text.as_bytes()), Ok(bundle.clone()));
        assert_eq!(bundle.clone().encode().unwrap(), text);
        let value: Value = serde_json::from_str(&text).unwrap();
        assert_eq!(value["spiffe_sequence"], 7);
        assert_eq!(value["spiffe_refresh_hint"], 300);
        assert_eq!(value["keys"].as_array().unwrap().len(), 6);
        let first = &value["keys"][0];
        assert_eq!((&first["use"], &first["kty"]), (&json!("x509-svid"), &json!("EC")));
        assert!(first.get("kid").is_none() && first["x5c"].as_array().unwrap().len() == 1);

        let jwt_only = SpiffeBundle::decode(encode_jwt(&bundle.jwt).as_bytes()).unwrap();
        assert_eq!((jwt_only.jwt, jwt_only.x509.certificates().len()), (bundle.jwt, 0));

        let empty = SpiffeBundle::decode(br#"{"keys":[]}"#).unwrap();
        assert!(empty.jwt.is_empty() && empty.x509.certificates().len() == 0);
        assert_eq!((empty.sequence, empty.refresh_hint), (None, None));
        assert_eq!(empty.encode().unwrap(), r#"{"keys":[]}"#, "empty is revoked, not absent");
    }

    /// The document of [`bundle`] after a change.
    fn changed(change: impl FnOnce(&mut Value)) -> Result<SpiffeBundle, JwksError> {
        let mut value: Value = serde_json::from_str(&bundle().encode().unwrap()).unwrap();
        change(&mut value);
        SpiffeBundle::decode(value.to_string().as_bytes())
    }

    #[test]
    fn the_unknown_is_ignored() {
        let counts = |change: fn(&mut Value)| {
            let bundle = changed(change).unwrap();
            (bundle.x509.certificates().len(), bundle.jwt.iter().len())
        };
        assert_eq!(counts(|_| {}), (2, 4));
        assert_eq!(counts(|v| v["more"] = json!({"a": [1]})), (2, 4));
        assert_eq!(counts(|v| v["keys"][0]["use"] = json!("wit-svid")), (1, 4));
        assert_eq!(counts(|v| v["keys"][0]["use"] = json!(3)), (1, 4));
        assert_eq!(counts(|v| v["keys"][0]["use"] = json!(null)), (1, 4));
        assert_eq!(counts(|v| v["keys"][2]["kty"] = json!("AKP")), (2, 3));
        assert_eq!(counts(|v| v["keys"][2]["kty"] = json!(null)), (2, 3));
        assert_eq!(counts(|v| v["keys"][2] = json!({"n": []})), (2, 3));
        assert_eq!(counts(|v| v["keys"][2]["alg"] = json!("ES256")), (2, 4));
        assert_eq!(counts(|v| v["keys"][0]["kid"] = json!("not of use")), (2, 4));
        assert_eq!(
            counts(|v| {
                for name in ["crv", "x", "y"] {
                    v["keys"][0].as_object_mut().unwrap().remove(name);
                }
            }),
            (2, 4)
        );
        assert!(changed(|v| v["spiffe_sequence"] = json!(null)).unwrap().sequence.is_none());
    }

    #[test]
    fn what_is_no_bundle() {
        type Change = fn(&mut Value);
        let cases: [(Change, &str); 24] = [
            (|v| *v = json!([[], 1, 2]), "not a JSON object"),
            (|v| *v = json!([]), "not a JWK set"),
            (|v| *v = json!({}), "not a JWK set"),
            (|v| v["keys"] = json!({}), "not a JWK set"),
            (|v| v["keys"] = json!(null), "not a JWK set"),
            (|v| v["spiffe_sequence"] = json!(-1), "not a JWK set"),
            (|v| v["spiffe_refresh_hint"] = json!("5m"), "not a JWK set"),
            (|v| v["keys"][1] = json!(5), "key 2 of the bundle is refused: it is not"),
            (|v| v["keys"] = json!(vec![json!({}); MAX_KEYS + 1]), "257 keys"),
            (|v| v["keys"][0]["x5c"] = json!([]), "this one has 0"),
            (|v| v["keys"][0]["x5c"] = json!(null), "this one has 0"),
            (|v| v["keys"][0]["x5c"] = json!("MIIB"), "key 1"),
            (|v| v["keys"][0]["x5c"] = json!(["MII\nB"]), "not base64"),
            (|v| v["keys"][0]["x5c"] = json!(["MIIB"]), "another key"),
            (
                |v| {
                    let one = v["keys"][0]["x5c"][0].clone();
                    v["keys"][0]["x5c"] = json!([one, one]);
                },
                "this one has 2",
            ),
            (|v| v["keys"][0]["x5c"] = v["keys"][1]["x5c"].clone(), "another key"),
            (|v| v["keys"][0]["x"] = json!(null), "needs \"x\""),
            (|v| v["keys"][2]["kid"] = json!(null), "needs a \"kid\""),
            (|v| v["keys"][2]["kid"] = json!(""), "a key ID of 0 bytes"),
            (|v| v["keys"][3]["kid"] = v["keys"][2]["kid"].clone(), "the same key ID"),
            (|v| v["keys"][2]["crv"] = json!("secp256k1"), "needs \"crv\""),
            (|v| v["keys"][2]["y"] = v["keys"][2]["x"].clone(), "not a point on P-256"),
            (|v| v["keys"][2]["x"] = json!("AA=="), "not base64url"),
            (|v| v["keys"][5]["n"] = json!("AQAB"), "not an RSA key"),
        ];
        for (change, says) in cases {
            let error = changed(change).unwrap_err().to_string();
            assert!(error.contains(says), "{error} does not say {says}");
        }
        let leaf = Forger::root("a").leaf("spiffe://td/a").chain.remove(0);
        let leaf = BASE64_STANDARD.encode(leaf);
        let error = changed(|v| {
            v["keys"][0] = json!({"kty": "EC", "use": "x509-svid", "x5c": [leaf]});
        })
        .unwrap_err();
        assert!(matches!(error, JwksError::X509(BundleError::NotAuthority { .. })), "{error}");
        let twice = br#"{"keys":[],"keys":[]}"#;
        assert!(matches!(SpiffeBundle::decode(twice), Err(JwksError::Json(_))));
        let long = vec![b' '; MAX_DOCUMENT_LEN + 1];
        assert_eq!(SpiffeBundle::decode(&long), Err(JwksError::TooLarge(long.len())));
        let deep = "[".repeat(100_000);
        assert!(matches!(SpiffeBundle::decode(deep.as_bytes()), Err(JwksError::Json(_))));
        let root = Forger::root("a").certificate;
        let many: Vec<_> = (0..=MAX_AUTHORITIES)
            .map(|_| json!({"kty": "EC", "use": "x509-svid", "x5c": [BASE64_STANDARD.encode(&root)]}))
            .collect();
        let error = changed(|v| v["keys"] = many.into()).unwrap_err();
        assert_eq!(error, BundleError::TooMany(MAX_AUTHORITIES + 1).into());
    }

    #[test]
    fn a_key_without_a_jwk_is_not_left_out_silently() {
        let key = rcgen::KeyPair::generate_for(&rcgen::PKCS_ED25519).unwrap();
        let mut params = rcgen::CertificateParams::default();
        params.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
        let root = params.self_signed(&key).unwrap();
        let x509 = Bundle::from_der([root.der().clone()]).unwrap();
        let bundle =
            SpiffeBundle { x509, jwt: JwtBundle::new(), sequence: None, refresh_hint: None };
        assert_eq!(bundle.encode(), Err(JwksError::Unpublishable(1)));
    }

    proptest! {
        #[test]
        fn any_bytes_are_answered(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            prop_assert!(SpiffeBundle::decode(&bytes).is_err());
        }

        #[test]
        fn a_changed_byte_changes_one_key_at_most(at in any::<prop::sample::Index>(), to in any::<u8>()) {
            use std::sync::LazyLock;
            static GOOD: LazyLock<(SpiffeBundle, String)> = LazyLock::new(|| {
                let bundle = bundle();
                let text = bundle.encode().unwrap();
                (bundle, text)
            });
            let (bundle, text) = &*GOOD;
            let mut bytes = text.clone().into_bytes();
            let at = at.index(bytes.len());
            bytes[at] = to;
            if let Ok(read) = SpiffeBundle::decode(&bytes) {
                let known = |key: &JwtKey| bundle.jwt.iter().any(|(_, k)| k == key);
                prop_assert!(read.jwt.iter().filter(|(_, key)| !known(key)).count() <= 1);
                prop_assert!(read.x509.certificates().len() <= 2);
            }
        }
    }
}
