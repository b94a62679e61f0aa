//! The keys that a trust domain signs JWT-SVIDs with, and the signatures that they accept.

use std::{collections::BTreeMap, fmt};

use aws_lc_rs::signature::{self, ParsedPublicKey, RsaPublicKeyComponents, VerificationAlgorithm};
use base64::{Engine as _, prelude::BASE64_URL_SAFE_NO_PAD};

/// The most keys that a bundle may have: rotation needs a handful.
pub const MAX_JWT_KEYS: usize = 64;
/// The longest key ID, in bytes.
pub const MAX_KID_LEN: usize = 512;

/// The public keys of one trust domain by key ID; may be empty (everything is revoked).
#[derive(Clone, Default, PartialEq, Eq)]
pub struct JwtBundle {
    keys: BTreeMap<String, JwtKey>,
}

/// A public key that verifies JWT-SVIDs: a point on P-256, P-384 or P-521, or an RSA key of
/// 2048 to 8192 bits. It is known to be well-formed.
#[derive(Clone, PartialEq, Eq)]
pub struct JwtKey(Material);

#[derive(Clone, PartialEq, Eq)]
enum Material {
    /// `point` is uncompressed: 4, x, y.
    Ec { curve: Curve, point: Vec<u8> },
    /// Big-endian, without leading zeros.
    Rsa { n: Vec<u8>, e: Vec<u8> },
}

/// An elliptic curve of RFC 7518, section 6.2.1.1.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Curve {
    /// NIST P-256.
    P256,
    /// NIST P-384.
    P384,
    /// NIST P-521.
    P521,
}

/// The signature algorithms that a JWT-SVID may use (JWT-SVID section 2.1, RFC 7518 section 3.1).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Algorithm {
    /// RSASSA-PKCS1-v1_5 with SHA-256.
    RS256,
    /// RSASSA-PKCS1-v1_5 with SHA-384.
    RS384,
    /// RSASSA-PKCS1-v1_5 with SHA-512.
    RS512,
    /// ECDSA with P-256 and SHA-256.
    ES256,
    /// ECDSA with P-384 and SHA-384.
    ES384,
    /// ECDSA with P-521 and SHA-512.
    ES512,
    /// RSASSA-PSS with SHA-256.
    PS256,
    /// RSASSA-PSS with SHA-384.
    PS384,
    /// RSASSA-PSS with SHA-512.
    PS512,
}

/// Why something is not a key, or keys are not a bundle.
#[derive(Debug, thiserror::Error, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum JwtKeyError {
    /// The point is not on the curve.
    #[error("x and y are not a point on {0}; give each coordinate in full length")]
    Point(&'static str),
    /// The RSA key is malformed, too small or too large.
    #[error("n and e are not an RSA key of 2048 to 8192 bits (both odd, e at least 3)")]
    Rsa,
    /// The key ID is empty or too long.
    #[error(
        "a key ID of {0} bytes is not accepted: it must have 1 to {MAX_KID_LEN}; set \"kid\" on each jwt-svid key"
    )]
    KidLength(usize),
    /// A key ID is taken.
    #[error("two keys have the same key ID; each jwt-svid key needs a \"kid\" of its own")]
    DuplicateKid,
    /// More than [`MAX_JWT_KEYS`].
    #[error(
        "a bundle of more than {MAX_JWT_KEYS} jwt-svid keys is too large; remove those that are out of use"
    )]
    TooMany,
}

impl JwtBundle {
    /// A bundle without keys: nothing verifies.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a key.
    pub fn insert(&mut self, kid: &str, key: JwtKey) -> Result<(), JwtKeyError> {
        if kid.is_empty() || kid.len() > MAX_KID_LEN {
            return Err(JwtKeyError::KidLength(kid.len()));
        }
        if self.keys.contains_key(kid) {
            return Err(JwtKeyError::DuplicateKid);
        }
        if self.keys.len() == MAX_JWT_KEYS {
            return Err(JwtKeyError::TooMany);
        }
        self.keys.insert(kid.to_owned(), key);
        Ok(())
    }

    /// The key of this ID.
    pub fn get(&self, kid: &str) -> Option<&JwtKey> {
        self.keys.get(kid)
    }

    /// Key IDs and keys, in the order of the IDs.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = (&str, &JwtKey)> {
        self.keys.iter().map(|(kid, key)| (kid.as_str(), key))
    }

    /// True when nothing verifies.
    pub fn is_empty(&self) -> bool {
        self.keys.is_empty()
    }
}

impl JwtKey {
    /// A key from a curve's coordinates, each of the curve's full length, big-endian.
    pub fn from_coordinates(curve: Curve, x: &[u8], y: &[u8]) -> Result<Self, JwtKeyError> {
        let len = curve.coordinate_len();
        if x.len() != len || y.len() != len {
            return Err(JwtKeyError::Point(curve.name()));
        }
        Self::from_point(curve, &[&[4], x, y].concat())
    }

    /// A key from an uncompressed point (SEC 1, section 2.3.3).
    pub fn from_point(curve: Curve, point: &[u8]) -> Result<Self, JwtKeyError> {
        let whole = point.len() == 1 + 2 * curve.coordinate_len() && point.first() == Some(&4);
        if !whole || ParsedPublicKey::new(curve.algorithm().ecdsa(), point).is_err() {
            return Err(JwtKeyError::Point(curve.name()));
        }
        Ok(Self(Material::Ec { curve, point: point.to_vec() }))
    }

    /// A key from an RSA modulus and exponent, big-endian.
    pub fn from_modulus(n: &[u8], e: &[u8]) -> Result<Self, JwtKeyError> {
        let (n, e) = (without_zeros(n), without_zeros(e));
        let components = RsaPublicKeyComponents { n, e };
        components
            .to_parsed_public_key(&signature::RSA_PKCS1_2048_8192_SHA256)
            .map_err(|_| JwtKeyError::Rsa)?;
        // Bits, not bytes: the parser looks at the length alone.
        let bits = n.len() * 8 - n.first().map_or(0, |b| b.leading_zeros() as usize);
        let odd = |number: &[u8]| number.last().is_some_and(|b| b & 1 == 1);
        if !(2048..=8192).contains(&bits) || !odd(n) || !odd(e) || e == [1] {
            return Err(JwtKeyError::Rsa);
        }
        Ok(Self(Material::Rsa { n: n.to_vec(), e: e.to_vec() }))
    }

    /// True when the key can verify signatures of this algorithm.
    pub fn fits(&self, algorithm: Algorithm) -> bool {
        match &self.0 {
            Material::Ec { curve, .. } => algorithm == curve.algorithm(),
            Material::Rsa { .. } => !algorithm.is_ecdsa(),
        }
    }

    /// True when `signature` is this key's over `message`, by `algorithm`.
    pub fn verifies(&self, algorithm: Algorithm, message: &[u8], signature: &[u8]) -> bool {
        if !self.fits(algorithm) {
            return false;
        }
        match &self.0 {
            Material::Ec { point, .. } => {
                signature::UnparsedPublicKey::new(algorithm.ecdsa(), point)
                    .verify(message, signature)
                    .is_ok()
            }
            Material::Rsa { n, e } => {
                let key = RsaPublicKeyComponents { n, e };
                algorithm.rsa().is_some_and(|rsa| key.verify(rsa, message, signature).is_ok())
            }
        }
    }

    /// The JWK's members that make the key, in the order of RFC 7638: `(name, value)`.
    pub fn members(&self) -> Vec<(&'static str, String)> {
        let base64 = |bytes: &[u8]| BASE64_URL_SAFE_NO_PAD.encode(bytes);
        match &self.0 {
            Material::Ec { curve, point } => {
                let (x, y) = point[1..].split_at(curve.coordinate_len());
                vec![
                    ("crv", curve.name().to_owned()),
                    ("kty", "EC".to_owned()),
                    ("x", base64(x)),
                    ("y", base64(y)),
                ]
            }
            Material::Rsa { n, e } => {
                vec![("e", base64(e)), ("kty", "RSA".to_owned()), ("n", base64(n))]
            }
        }
    }

    /// The key's thumbprint (RFC 7638, SHA-256): a key ID that two holders of one key agree on.
    pub fn thumbprint(&self) -> String {
        // No value needs escaping: names, base64url.
        let members: Vec<_> =
            self.members().iter().map(|(name, value)| format!("\"{name}\":\"{value}\"")).collect();
        let json = format!("{{{}}}", members.join(","));
        let digest = aws_lc_rs::digest::digest(&aws_lc_rs::digest::SHA256, json.as_bytes());
        BASE64_URL_SAFE_NO_PAD.encode(digest)
    }
}

impl Curve {
    /// The curve's name in a JWK.
    pub const fn name(self) -> &'static str {
        match self {
            Self::P256 => "P-256",
            Self::P384 => "P-384",
            Self::P521 => "P-521",
        }
    }

    /// The curve of this name.
    pub fn parse(name: &str) -> Option<Self> {
        [Self::P256, Self::P384, Self::P521].into_iter().find(|curve| curve.name() == name)
    }

    const fn coordinate_len(self) -> usize {
        match self {
            Self::P256 => 32,
            Self::P384 => 48,
            Self::P521 => 66,
        }
    }

    /// The one algorithm that goes with the curve (RFC 7518, section 3.4).
    pub const fn algorithm(self) -> Algorithm {
        match self {
            Self::P256 => Algorithm::ES256,
            Self::P384 => Algorithm::ES384,
            Self::P521 => Algorithm::ES512,
        }
    }
}

impl Algorithm {
    const ALL: [Self; 9] = [
        Self::RS256,
        Self::RS384,
        Self::RS512,
        Self::ES256,
        Self::ES384,
        Self::ES512,
        Self::PS256,
        Self::PS384,
        Self::PS512,
    ];

    /// The name in a header's `alg`.
    pub const fn name(self) -> &'static str {
        match self {
            Self::RS256 => "RS256",
            Self::RS384 => "RS384",
            Self::RS512 => "RS512",
            Self::ES256 => "ES256",
            Self::ES384 => "ES384",
            Self::ES512 => "ES512",
            Self::PS256 => "PS256",
            Self::PS384 => "PS384",
            Self::PS512 => "PS512",
        }
    }

    /// The algorithm of this name; `none`, HMAC and all others are not there.
    pub fn parse(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|algorithm| algorithm.name() == name)
    }

    const fn is_ecdsa(self) -> bool {
        matches!(self, Self::ES256 | Self::ES384 | Self::ES512)
    }

    /// The ECDSA verifier; P-256's for what is not ECDSA, which no caller asks for.
    fn ecdsa(self) -> &'static dyn VerificationAlgorithm {
        match self {
            Self::ES384 => &signature::ECDSA_P384_SHA384_FIXED,
            Self::ES512 => &signature::ECDSA_P521_SHA512_FIXED,
            _ => &signature::ECDSA_P256_SHA256_FIXED,
        }
    }

    fn rsa(self) -> Option<&'static signature::RsaParameters> {
        Some(match self {
            Self::RS256 => &signature::RSA_PKCS1_2048_8192_SHA256,
            Self::RS384 => &signature::RSA_PKCS1_2048_8192_SHA384,
            Self::RS512 => &signature::RSA_PKCS1_2048_8192_SHA512,
            Self::PS256 => &signature::RSA_PSS_2048_8192_SHA256,
            Self::PS384 => &signature::RSA_PSS_2048_8192_SHA384,
            Self::PS512 => &signature::RSA_PSS_2048_8192_SHA512,
            Self::ES256 | Self::ES384 | Self::ES512 => return None,
        })
    }
}

impl fmt::Debug for JwtBundle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("JwtBundle").field("keys", &self.keys.keys()).finish()
    }
}

impl fmt::Debug for JwtKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("JwtKey").field(&self.thumbprint()).finish()
    }
}

/// Reads a JSON object. serde alone would take a list for a struct, by the fields' order.
pub(super) fn json_object<T: serde::de::DeserializeOwned>(json: &[u8]) -> serde_json::Result<T> {
    if json.trim_ascii_start().first() != Some(&b'{') {
        return Err(serde::de::Error::custom("it is not a JSON object"));
    }
    serde_json::from_slice(json)
}

fn without_zeros(bytes: &[u8]) -> &[u8] {
    let zeros = bytes.iter().take_while(|b| **b == 0).count();
    &bytes[zeros..]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::spiffe::forge::JwtForger;

    #[test]
    fn the_thumbprint_of_rfc_7638() {
        // The example of RFC 7638, section 3.1.
        let n = "0vx7agoebGcQSuuPiLJXZptN9nndrQmbXEps2aiAFbWhM78LhWx4cbbfAAtVT86zwu1RK7aPFFxuhDR1L6tSoc_BJECPebWKRXjBZCiFV4n3oknjhMstn64tZ_2W-5JsGY4Hc5n9yBXArwl93lqt7_RN5w6Cf0h4QyQ5v-65YGjQR0_FDW2QvzqY368QQMicAtaSqzs8KJZgnYb9c7d0zgdAZHzu6qMQvRL5hajrn1n91CbOpbISD08qNLyrdkt-bFTWhAI4vMQFh6WeZu0fM4lFd2NcRwr3XPksINHaQ-G_xBniIqbw0Ls1jF44-csFCur-kEgU8awapJzKnqDKgw";
        let n = BASE64_URL_SAFE_NO_PAD.decode(n).unwrap();
        let key = JwtKey::from_modulus(&n, &[1, 0, 1]).unwrap();
        assert_eq!(key.thumbprint(), "NzbLsXh8uDCcd-6MNwXF4W_7noWXFZAfHkxZsRGC9Xs");
        assert_eq!(JwtKey::from_modulus(&[&[0, 0], &n[..]].concat(), &[0, 1, 0, 1]), Ok(key));
    }

    #[test]
    fn a_key_verifies_its_own_algorithms_only() {
        let forgers = JwtForger::one_of_each();
        for signer in &forgers {
            for algorithm in Algorithm::ALL {
                let key = signer.key();
                let Some(signature) = signer.sign(algorithm, b"message") else {
                    assert!(!key.fits(algorithm), "{algorithm:?}");
                    continue;
                };
                assert!(key.fits(algorithm) && key.verifies(algorithm, b"message", &signature));
                assert!(!key.verifies(algorithm, b"massage", &signature), "{algorithm:?}");
                assert!(!key.verifies(algorithm, b"message", &signature[1..]), "{algorithm:?}");
                for other in Algorithm::ALL.into_iter().filter(|other| *other != algorithm) {
                    assert!(
                        !key.verifies(other, b"message", &signature),
                        "{algorithm:?} {other:?}"
                    );
                }
            }
        }
        let [a, b] = [JwtForger::ec(), JwtForger::ec()];
        let signature = a.sign(Algorithm::ES256, b"message").unwrap();
        assert!(!b.key().verifies(Algorithm::ES256, b"message", &signature));
    }

    #[test]
    fn what_is_no_key() {
        let key = JwtForger::ec().key();
        let Material::Ec { point, .. } = &key.0 else { unreachable!() };
        assert_eq!(JwtKey::from_point(Curve::P256, point).as_ref(), Ok(&key));
        let (x, y) = point[1..].split_at(32);
        assert_eq!(JwtKey::from_coordinates(Curve::P256, x, y), Ok(key.clone()));
        let off_the_curve = [&point[..64], &[point[64] ^ 1]].concat();
        let compressed = [&[2 + (y[31] & 1)], x].concat();
        for bad in [&off_the_curve[..], &compressed, &point[..64], &[], &[0]] {
            assert_eq!(JwtKey::from_point(Curve::P256, bad), Err(JwtKeyError::Point("P-256")));
        }
        assert_eq!(JwtKey::from_point(Curve::P384, point), Err(JwtKeyError::Point("P-384")));
        // Short coordinates that together have the right length.
        let moved = (&point[1..32], &point[32..]);
        assert!(JwtKey::from_coordinates(Curve::P256, moved.0, moved.1).is_err());

        let odd = |bytes| vec![0xff_u8; bytes];
        assert!(JwtKey::from_modulus(&odd(256), &[1, 0, 1]).is_ok());
        for (n, e) in [
            (odd(128), vec![1, 0, 1]),
            (odd(1025), vec![1, 0, 1]),
            ([vec![0x7f], odd(255)].concat(), vec![1, 0, 1]),
            (vec![], vec![1, 0, 1]),
            (odd(256), vec![]),
            (odd(256), vec![0]),
            (odd(256), vec![2]),
            (odd(256), vec![1]),
            ([odd(255), vec![0xfe]].concat(), vec![1, 0, 1]),
        ] {
            assert_eq!(JwtKey::from_modulus(&n, &e), Err(JwtKeyError::Rsa), "{} {e:?}", n.len());
        }
    }

    #[test]
    fn bundles_have_limits() {
        let key = JwtForger::ec().key();
        let mut bundle = JwtBundle::new();
        assert_eq!(bundle.insert("", key.clone()), Err(JwtKeyError::KidLength(0)));
        let long = "k".repeat(MAX_KID_LEN + 1);
        assert_eq!(bundle.insert(&long, key.clone()), Err(JwtKeyError::KidLength(long.len())));
        assert!(bundle.is_empty());
        for i in 0..MAX_JWT_KEYS {
            bundle.insert(&format!("k{i:02}"), key.clone()).unwrap();
        }
        assert_eq!(bundle.insert("k00", key.clone()), Err(JwtKeyError::DuplicateKid));
        assert_eq!(bundle.insert("more", key.clone()), Err(JwtKeyError::TooMany));
        assert_eq!(bundle.iter().len(), MAX_JWT_KEYS);
        assert_eq!(bundle.get("k63"), Some(&key));
    }
}
