//! SVIDs, bundles and claims as the Workload API's messages.

use std::{collections::HashMap, sync::Arc};

use prost_types::{ListValue, Struct, Value, value::Kind};
use rustls::pki_types::PrivateKeyDer;

use crate::{
    proto::workload::{JwtBundlesResponse, X509BundlesResponse, X509svid, X509svidResponse},
    spiffe::{Bundle, Svid, TrustDomain, jwks},
    trust::Trust,
};

/// A workload's X509-SVID with its key, its domain's bundle and the foreign ones. `None` while
/// there is no bundle of its own domain.
pub(super) fn x509_svid(svid: &Svid, trust: &Trust) -> Option<X509svidResponse> {
    let own = svid.id.trust_domain();
    let bundles = trust.bundles();
    let key = match svid.private_key() {
        PrivateKeyDer::Pkcs8(key) => key.secret_pkcs8_der().to_vec(),
        // An SVID's key is PKCS #8 by construction.
        _ => return None,
    };
    let message = X509svid {
        spiffe_id: svid.id.to_string(),
        x509_svid: svid.chain_der.iter().flat_map(|c| c.iter().copied()).collect(),
        x509_svid_key: key,
        bundle: der(bundles.get(&own)?),
        hint: String::new(),
    };
    let federated_bundles = bundles
        .iter()
        .filter(|(domain, _)| **domain != own)
        .map(|(domain, bundle)| (domain.id().to_string(), der(bundle)))
        .collect();
    Some(X509svidResponse { svids: vec![message], crl: Vec::new(), federated_bundles })
}

/// All X.509 bundles. `None` while there is none of the domain `own`.
pub(super) fn x509_bundles(trust: &Trust, own: &TrustDomain) -> Option<X509BundlesResponse> {
    let bundles = trust.bundles();
    bundles.get(own)?;
    let bundles =
        bundles.iter().map(|(domain, bundle)| (domain.id().to_string(), der(bundle))).collect();
    Some(X509BundlesResponse { crl: Vec::new(), bundles })
}

/// All JWT bundles. `None` while there is none of the domain `own`.
pub(super) fn jwt_bundles(trust: &Trust, own: &TrustDomain) -> Option<JwtBundlesResponse> {
    let bundles = trust.jwt_bundles();
    bundles.get(own)?;
    let bundles: HashMap<_, _> = bundles
        .iter()
        .map(|(domain, bundle)| (domain.id().to_string(), jwks::encode_jwt(bundle).into_bytes()))
        .collect();
    Some(JwtBundlesResponse { bundles })
}

/// Claims as a protobuf Struct. Numbers become doubles, as that has no others.
pub(super) fn claims(claims: serde_json::Map<String, serde_json::Value>) -> Struct {
    Struct { fields: claims.into_iter().map(|(name, value)| (name, proto_value(value))).collect() }
}

/// The depth is bounded: the JSON parser takes no more than 128 levels.
fn proto_value(value: serde_json::Value) -> Value {
    use serde_json::Value as Json;
    let kind = match value {
        Json::Null => Kind::NullValue(0),
        Json::Bool(b) => Kind::BoolValue(b),
        Json::Number(n) => Kind::NumberValue(n.as_f64().unwrap_or(f64::NAN)),
        Json::String(s) => Kind::StringValue(s),
        Json::Array(list) => {
            Kind::ListValue(ListValue { values: list.into_iter().map(proto_value).collect() })
        }
        Json::Object(map) => Kind::StructValue(claims(map)),
    };
    Value { kind: Some(kind) }
}

/// Certificates in DER, one behind another.
fn der(bundle: &Arc<Bundle>) -> Vec<u8> {
    bundle.certificates().flat_map(|c| c.iter().copied()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::spiffe::JwtBundle;
    use crate::spiffe::forge::{Forger, JwtForger};

    #[test]
    fn an_svid_comes_with_every_bundle_in_its_place() {
        let (own, other) = (Forger::root("own"), Forger::root("other"));
        let trust = Trust::new();
        let domain = |name| TrustDomain::parse(name).unwrap();
        let svid = own.svid("spiffe://td/ns/shop/sa/web");
        trust.set(domain("other"), other.bundle());
        assert!(x509_svid(&svid, &trust).is_none(), "no SVID without its bundle");
        assert!(x509_bundles(&trust, &domain("td")).is_none());
        trust.set(domain("td"), own.bundle());
        let message = x509_svid(&svid, &trust).unwrap();
        let one = &message.svids[0];
        assert_eq!(one.spiffe_id, "spiffe://td/ns/shop/sa/web");
        assert_eq!(one.x509_svid, svid.chain_der[0].as_ref());
        assert_eq!(one.x509_svid_key, svid.private_key().secret_der());
        assert_eq!(one.bundle, own.certificate.as_ref());
        let foreign = HashMap::from([("spiffe://other".to_owned(), other.certificate.to_vec())]);
        assert_eq!(message.federated_bundles, foreign);
        let bundles = x509_bundles(&trust, &domain("td")).unwrap().bundles;
        assert_eq!(bundles["spiffe://td"], own.certificate.as_ref());
        assert_eq!(bundles["spiffe://other"], other.certificate.as_ref());

        assert!(jwt_bundles(&trust, &domain("td")).is_none());
        let mut keys = JwtBundle::new();
        keys.insert("k", JwtForger::ec().key()).unwrap();
        trust.set_jwt(domain("td"), Arc::new(keys.clone()));
        let message = jwt_bundles(&trust, &domain("td")).unwrap();
        let read = jwks::SpiffeBundle::decode(&message.bundles["spiffe://td"]).unwrap();
        assert_eq!((read.jwt, message.bundles.len()), (keys, 1));
    }

    #[test]
    fn claims_keep_their_shape() {
        let json = serde_json::json!({"a": [1, null, {"b": true}], "s": "x"});
        let serde_json::Value::Object(map) = json else { unreachable!() };
        let claims = claims(map);
        assert_eq!(claims.fields["s"].kind, Some(Kind::StringValue("x".into())));
        let Some(Kind::ListValue(list)) = &claims.fields["a"].kind else { panic!() };
        assert_eq!(list.values[0].kind, Some(Kind::NumberValue(1.0)));
        assert_eq!(list.values[1].kind, Some(Kind::NullValue(0)));
    }
}
