//! `RequestAuthentication`: which end users' tokens requests may carry.

use std::sync::Arc;

use http::HeaderName;

use super::{Envelope, REQUEST_AUTHENTICATION, Reader, authorization::shown_targets};
use crate::{
    config::yaml::{Fault, Node, shorten},
    policy::{
        end_user::{IssuerKeys, JwtRule, KeySource, RequestAuthentication, TokenHeader},
        model::Selector,
    },
};

/// Entries of `jwtRules` of one object.
const MAX_RULES: usize = 64;
/// Values of one field of a rule.
const MAX_VALUES: usize = 64;
/// Characters of a value, but for `jwks`.
const MAX_CHARS: usize = 2048;

/// Reads one RequestAuthentication; one of the namespace `root` is about every namespace.
///
/// # Errors
///
/// The first field that is unknown or of the wrong shape.
pub fn read(object: &Node, root: &str) -> Result<RequestAuthentication, Fault> {
    let envelope = Envelope::open(object, REQUEST_AUTHENTICATION)?;
    let namespace = (*envelope.name.namespace != *root).then(|| envelope.name.namespace.clone());
    let mut reader = Reader::new();
    let mut read = RequestAuthentication {
        name: envelope.name,
        selector: Selector { namespace, ..Selector::default() },
        rules: Vec::new(),
        ignored: false,
        remarks: Vec::new(),
    };
    if let Some(spec) = envelope.spec {
        read_spec(&mut reader, &mut read, spec).map_err(|fault| fault.within("spec"))?;
    }
    if read.rules.is_empty() && !read.ignored {
        reader.note(object, "it has no jwtRules and so does nothing");
    }
    read.remarks = reader.remarks;
    Ok(read)
}

fn read_spec(
    reader: &mut Reader,
    read: &mut RequestAuthentication,
    spec: &Node,
) -> Result<(), Fault> {
    const FIELDS: &[&str] = &["selector", "targetRef", "targetRefs", "jwtRules"];
    reader.fields(spec, FIELDS, |reader, field, node| {
        match field {
            "selector" => read.selector.labels = reader.selector(node)?,
            "jwtRules" => {
                let rules = reader.each(node, MAX_RULES, read_rule)?;
                read.rules = rules.into_iter().map(Arc::new).collect();
            }
            _ if field == "targetRefs" && node.list(MAX_VALUES, |_| Ok(()))?.is_empty() => {}
            _ => {
                read.ignored = true;
                reader.fault(
                    node,
                    format!(
                        "it is about {}, where a waypoint or gateway enforces it: not in force \
                         here; write selector to have it enforced on pods",
                        shown_targets(node)
                    ),
                );
            }
        }
        Ok(())
    })
}

fn read_rule(reader: &mut Reader, node: &Node) -> Result<JwtRule, Fault> {
    const FIELDS: &[&str] = &[
        "issuer",
        "audiences",
        "jwksUri",
        "jwks_uri",
        "jwks",
        "fromHeaders",
        "fromParams",
        "fromCookies",
        "forwardOriginalToken",
        "outputPayloadToHeader",
        "outputClaimToHeaders",
        "spaceDelimitedClaims",
        "timeout",
    ];
    let mut issuer: Option<Arc<str>> = None;
    let (mut url, mut inline) = (None, None);
    let mut rule = JwtRule {
        issuer: "".into(),
        audiences: Vec::new(),
        keys: KeySource::Unreadable,
        headers: Vec::new(),
        params: Vec::new(),
        cookies: Vec::new(),
        forward_original_token: false,
        payload_header: None,
        claim_headers: Vec::new(),
        spaced_claims: Vec::new(),
    };
    reader.fields(node, FIELDS, |reader, field, node| {
        match field {
            "issuer" => issuer = Some(text(node)?.into()),
            "audiences" => rule.audiences = texts(reader, node)?,
            "jwksUri" | "jwks_uri" => url = Some((text(node)?, node)),
            "jwks" => inline = Some((node.text()?, node)),
            "fromHeaders" => {
                let headers = reader.each(node, MAX_VALUES, token_header)?;
                rule.headers = headers.into_iter().flatten().collect();
            }
            "fromParams" => rule.params = texts(reader, node)?,
            "fromCookies" => rule.cookies = texts(reader, node)?,
            "forwardOriginalToken" => rule.forward_original_token = node.boolean()?,
            "outputPayloadToHeader" => rule.payload_header = header_name(reader, node)?,
            "outputClaimToHeaders" => {
                let headers = reader.each(node, MAX_VALUES, claim_header)?;
                rule.claim_headers = headers.into_iter().flatten().collect();
            }
            "spaceDelimitedClaims" => rule.spaced_claims = texts(reader, node)?,
            // The agent has limits of its own for fetching keys.
            _ => drop(text(node)?),
        }
        Ok(())
    })?;
    rule.issuer = issuer
        .ok_or_else(|| node.fault("missing; write the claim iss of its tokens").within("issuer"))?;
    rule.keys = match (inline, url) {
        // Istio's order.
        (Some((jwks, node)), _) => match IssuerKeys::decode(jwks.as_bytes()) {
            Ok(keys) => KeySource::Inline(Arc::new(keys)),
            Err(error) => {
                reader.at("jwks", |reader| {
                    reader.fault(node, format!("{error}; no token of this issuer is valid"));
                });
                KeySource::Unreadable
            }
        },
        (None, Some((url, node))) => {
            reader.at("jwksUri", |reader| fetched(reader, node, url, KeySource::Url))
        }
        (None, None) => {
            let issuer = rule.issuer.clone();
            fetched(reader, node, &issuer, KeySource::Discovery)
        }
    };
    Ok(rule)
}

/// Keys that are fetched: over TLS only, because who changes them on the way is any end user.
fn fetched(
    reader: &mut Reader,
    node: &Node,
    url: &str,
    of: impl FnOnce(Arc<str>) -> KeySource,
) -> KeySource {
    let parsed: Option<http::Uri> = url.parse().ok();
    let is_fine = parsed.is_some_and(|uri| {
        uri.scheme_str() == Some("https") && uri.host().is_some_and(|host| !host.is_empty())
    });
    if is_fine {
        return of(url.into());
    }
    reader.fault(
        node,
        format!(
            "keys are fetched from https URLs only, and {:?} is none; no token of this issuer is \
             valid: give jwksUri with https, or jwks",
            shorten(url)
        ),
    );
    KeySource::Unreadable
}

fn text(node: &Node) -> Result<&str, Fault> {
    let text = node.text()?;
    match text.len() {
        0 => Err(node.fault("an empty text")),
        len if len > MAX_CHARS => Err(node.fault(format!("{len} bytes; {MAX_CHARS} is the most"))),
        _ => Ok(text),
    }
}

fn texts(reader: &mut Reader, node: &Node) -> Result<Vec<Arc<str>>, Fault> {
    reader.each(node, MAX_VALUES, |_, node| text(node).map(Into::into))
}

/// A header's name; `None`, and said, for what is none.
fn header_name(reader: &mut Reader, node: &Node) -> Result<Option<HeaderName>, Fault> {
    let text = text(node)?;
    let name = text.parse::<HeaderName>().ok();
    if name.is_none() {
        reader.fault(
            node,
            format!("{:?} is not the name of a header, and is ignored", shorten(text)),
        );
    }
    Ok(name)
}

fn token_header(reader: &mut Reader, node: &Node) -> Result<Option<TokenHeader>, Fault> {
    let (mut name, mut prefix) = (None, "");
    let mut is_named = false;
    reader.fields(node, &["name", "prefix"], |reader, field, node| {
        if field == "name" {
            is_named = true;
            name = header_name(reader, node)?;
        } else {
            prefix = node.text()?;
        }
        Ok(())
    })?;
    if !is_named {
        return Err(node.fault("missing; name the header").within("name"));
    }
    Ok(name.map(|name| TokenHeader { name, prefix: prefix.into() }))
}

fn claim_header(
    reader: &mut Reader,
    node: &Node,
) -> Result<Option<(HeaderName, Vec<Arc<str>>)>, Fault> {
    let (mut name, mut path) = (None, Vec::new());
    let mut is_named = false;
    reader.fields(node, &["header", "claim"], |reader, field, node| {
        if field == "header" {
            is_named = true;
            name = header_name(reader, node)?;
        } else {
            let text = text(node)?;
            // Dots lead into nested claims, but not in those that are named by a URL.
            path = match text.contains('/') {
                true => vec![text.into()],
                false => text.split('.').map(Into::into).collect(),
            };
        }
        Ok(())
    })?;
    if !is_named || path.is_empty() {
        return Err(node.fault("missing; give header and claim"));
    }
    Ok(name.map(|name| (name, path)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{config::yaml::parse_one, policy::end_user::tests::Issuer};

    fn read_text(namespace: &str, spec: &str) -> Result<RequestAuthentication, String> {
        let text = format!(
            "apiVersion: security.istio.io/v1\nkind: RequestAuthentication\nmetadata: {{name: \
             login, namespace: {namespace}}}\nspec: {spec}\n"
        );
        read(&parse_one(&text).unwrap().unwrap(), "istio-system").map_err(|e| e.to_string())
    }

    fn said(object: &RequestAuthentication) -> String {
        object.remarks.iter().map(ToString::to_string).collect::<Vec<_>>().join("; ")
    }

    #[test]
    fn every_field() {
        let jwks = Issuer::new().jwks("k");
        let object = read_text(
            "shop",
            &format!(
                "{{selector: {{matchLabels: {{app: pay}}}}, jwtRules: [{{issuer: \
                 'https://login.example', audiences: [pay, ledger], jwks: '{jwks}', fromHeaders: \
                 [{{name: X-JWT, prefix: 'Bearer '}}, {{name: x-raw}}], fromParams: [t], \
                 fromCookies: [session], forwardOriginalToken: true, outputPayloadToHeader: \
                 X-Payload, outputClaimToHeaders: [{{header: x-role, claim: realm.role}}, {{header: \
                 x-url, claim: 'https://a.b/c'}}], spaceDelimitedClaims: [roles], timeout: 5s}}]}}"
            ),
        )
        .unwrap();
        assert!(object.remarks.is_empty(), "{}", said(&object));
        let rule = &object.rules[0];
        assert_eq!(&*rule.issuer, "https://login.example");
        assert_eq!(rule.audiences, ["pay".into(), "ledger".into()]);
        assert!(matches!(rule.keys, KeySource::Inline(_)));
        let headers: Vec<_> = rule.headers.iter().map(|h| (h.name.as_str(), &*h.prefix)).collect();
        assert_eq!(headers, [("x-jwt", "Bearer "), ("x-raw", "")]);
        assert_eq!((rule.params.len(), rule.cookies.len()), (1, 1));
        assert!(rule.forward_original_token);
        assert_eq!(rule.payload_header.as_ref().unwrap(), "x-payload");
        assert_eq!(rule.claim_headers[0].1, ["realm".into(), "role".into()]);
        assert_eq!(rule.claim_headers[1].1, ["https://a.b/c".into()]);
        assert_eq!(rule.spaced_claims, ["roles".into()]);
        assert_eq!(object.selector.namespace.as_deref(), Some("shop"));
        assert_eq!(object.selector.labels.len(), 1);
    }

    #[test]
    fn where_keys_come_from() {
        let keys = |rule: &str| {
            let object = read_text("shop", &format!("{{jwtRules: [{{{rule}}}]}}")).unwrap();
            (object.rules[0].keys.clone(), said(&object))
        };
        let (source, said) = keys("issuer: a, jwksUri: 'https://keys.example/jwks'");
        assert_eq!(source, KeySource::Url("https://keys.example/jwks".into()));
        assert_eq!(said, "");
        let (source, said) = keys("issuer: 'https://login.example/a'");
        assert_eq!(source, KeySource::Discovery("https://login.example/a".into()));
        assert_eq!(said, "");
        for (rule, wanted) in [
            ("issuer: a, jwksUri: 'http://keys.example'", "https URLs only"),
            ("issuer: a, jwksUri: '/jwks'", "https URLs only"),
            ("issuer: accounts.example", "https URLs only"),
            ("issuer: a, jwks: '{}'", "not a JWK set"),
            ("issuer: a, jwks: '{\"keys\": []}'", "none of its keys"),
        ] {
            let (source, said) = keys(rule);
            assert_eq!(source, KeySource::Unreadable, "{rule}");
            assert!(said.contains(wanted) && said.contains("no token of this issuer"), "{said}");
        }
    }

    #[test]
    fn scopes_and_shapes() {
        let rule = "jwtRules: [{issuer: 'https://a.example'}]";
        let mesh = read_text("istio-system", &format!("{{{rule}}}")).unwrap();
        assert_eq!(mesh.selector, Selector::default());
        let target = "targetRefs: [{kind: Gateway, name: front}]";
        let gateway = read_text("shop", &format!("{{{target}, {rule}}}")).unwrap();
        assert!(gateway.ignored && said(&gateway).contains("Gateway front"));
        let nothing = read_text("shop", "{}").unwrap();
        assert!(said(&nothing).contains("does nothing"));
        for (spec, wanted) in [
            ("{jwtRules: [{jwksUri: 'https://a.example'}]}", "issuer: missing"),
            ("{jwtRules: [{issuer: ''}]}", "an empty text"),
            ("{jwtRules: [{issuer: a, extra: b}]}", "extra"),
            ("{jwtRules: [{issuer: a, fromHeaders: [{prefix: x}]}]}", "name the header"),
            ("{jwtRules: {issuer: a}}", "list"),
        ] {
            let error = read_text("shop", spec).unwrap_err();
            assert!(error.contains(wanted), "{spec}: {error}");
        }
        let odd = "{jwtRules: [{issuer: 'https://a.example', outputPayloadToHeader: 'a b'}]}";
        let odd = read_text("shop", odd).unwrap();
        assert!(said(&odd).contains("is not the name of a header") && !odd.rules.is_empty());
    }
}
