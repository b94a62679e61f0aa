//! A request's head: checked, judged by its normalised path, and forwarded as it was judged.

use std::borrow::Cow;

use http::{
    HeaderMap, HeaderName, HeaderValue, Method, Request, Uri, Version,
    header::{CONNECTION, CONTENT_TYPE, COOKIE, HOST, TE, UPGRADE},
    request::Parts,
    uri::{Authority, PathAndQuery},
};

use super::{
    framing::{Fault, Head, is_host},
    path::{Ambiguous, LARGEST_TARGET, normalise},
};
use crate::{cluster::model::IdentityHeaders, policy::end_user::TokenPlace, spiffe::SpiffeId};

/// Envoy's header about the client's certificate.
pub const CLIENT_CERT: HeaderName = HeaderName::from_static("x-forwarded-client-cert");
/// The plain header that no client may send, whatever its namespace calls its own.
pub const IDENTITY: HeaderName = HeaderName::from_static("x-signet-identity");
/// HTTP/1's way into HTTP/2, which is not followed.
const HTTP2_SETTINGS: HeaderName = HeaderName::from_static("http2-settings");

/// Why a request is refused before anybody judges it.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Malformed {
    /// HTTP/1 that has more than one meaning.
    #[error("{0}")]
    Framing(#[from] Fault),
    /// A path that has more than one meaning.
    #[error("{0}")]
    Path(#[from] Ambiguous),
    /// Asks for a tunnel.
    #[error("CONNECT is not served")]
    Connect,
    /// Two parsers found two requests.
    #[error("the request has more than one reading")]
    TwoReadings,
    /// HTTP/2 without an authority or with a strange one, or with another `host`.
    #[error("the authority is missing, malformed, or not the host's")]
    Authority,
    /// HTTP/2 with something of HTTP/1 in its head.
    #[error("an HTTP/2 request has a header field of HTTP/1")]
    Mixed,
}

/// A request, as it is judged.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Target {
    /// The normalised path, without the query.
    pub path: String,
    /// The authority or host.
    pub host: String,
}

/// Checks a head and says what it asks for. `seen` is what [`super::framing`] made of it, over
/// HTTP/1.
///
/// # Errors
/// Where it has more than one meaning.
pub fn check<B>(request: &Request<B>, seen: Option<&Head>) -> Result<Target, Malformed> {
    if *request.method() == Method::CONNECT {
        return Err(Malformed::Connect);
    }
    let hosts = || request.headers().get_all(HOST).iter();
    let host = match seen {
        Some(seen) => {
            if request.method().as_str() != seen.method
                || !is_same_target(request.uri(), &seen.target)
            {
                return Err(Malformed::TwoReadings);
            }
            if hosts().count() > 1 {
                return Err(Fault::Host.into());
            }
            hosts().next().map_or(&b""[..], HeaderValue::as_bytes)
        }
        None => {
            let is_mixed = request.version() != Version::HTTP_2
                || [CONNECTION, UPGRADE, http::header::TRANSFER_ENCODING, HTTP2_SETTINGS]
                    .iter()
                    .any(|name| request.headers().contains_key(name));
            if is_mixed {
                return Err(Malformed::Mixed);
            }
            if request.method().as_str().bytes().any(|b| b.is_ascii_lowercase()) {
                return Err(Fault::Method.into());
            }
            let authority = request.uri().authority().map_or("", Authority::as_str).as_bytes();
            if authority.is_empty() && hosts().count() != 1 {
                return Err(Malformed::Authority);
            }
            let named = if authority.is_empty() {
                hosts().next().map_or(&b""[..], HeaderValue::as_bytes)
            } else {
                authority
            };
            if !is_host(named) || !hosts().all(|h| h.as_bytes().eq_ignore_ascii_case(named)) {
                return Err(Malformed::Authority);
            }
            named
        }
    };
    let path = match (request.method(), request.uri().path()) {
        // The server as a whole (RFC 9112 §3.2.4).
        (&Method::OPTIONS, "*") => Cow::Borrowed("*"),
        // An absolute target without a path means the root.
        (_, "") => Cow::Borrowed("/"),
        (_, path) => normalise(path)?,
    };
    if request.uri().query().is_some_and(|query| query.len() > LARGEST_TARGET) {
        return Err(Ambiguous::TooLong.into());
    }
    Ok(Target { path: path.into_owned(), host: String::from_utf8_lossy(host).into_owned() })
}

/// True when the parsed target is the one that was sent.
fn is_same_target(uri: &Uri, sent: &str) -> bool {
    match (uri.scheme_str(), uri.authority()) {
        (Some(scheme), Some(authority)) => {
            let rest = uri.path_and_query().map_or("", PathAndQuery::as_str);
            let whole = format!("{scheme}://{authority}{rest}");
            // The library completes a target without a path.
            sent.eq_ignore_ascii_case(&whole)
                || (rest.starts_with('/')
                    && sent.eq_ignore_ascii_case(&format!("{scheme}://{authority}{}", &rest[1..])))
        }
        (None, None) => uri.path_and_query().is_some_and(|found| found.as_str() == sent),
        _ => false,
    }
}

/// Makes the head what was judged: the normalised path, nothing of the hop before, no identity
/// that the client claims.
///
/// # Errors
/// Where the judged path makes no URI: then it was none.
pub fn rewrite(
    parts: &mut Parts,
    target: &Target,
    upgrades: bool,
    told: &IdentityHeaders,
) -> Result<(), Malformed> {
    let query = parts.uri.query();
    let is_as_sent = parts.uri.path() == target.path && parts.uri.scheme().is_none();
    if !is_as_sent {
        let spelt = match query {
            Some(query) => format!("{}?{query}", target.path),
            None => target.path.clone(),
        };
        let spelt = PathAndQuery::try_from(spelt).map_err(|_| Ambiguous::Character)?;
        let mut uri = std::mem::take(&mut parts.uri).into_parts();
        uri.path_and_query = Some(spelt);
        if parts.version != Version::HTTP_2 {
            // To the application itself: the host is in its header.
            (uri.scheme, uri.authority) = (None, None);
        }
        parts.uri = Uri::from_parts(uri).map_err(|_| Ambiguous::Character)?;
    }
    strip(&mut parts.headers, told);
    if parts.version != Version::HTTP_2 {
        hop(&mut parts.headers, upgrades);
    }
    Ok(())
}

/// Removes what only a proxy may say about the client, in every spelling that a server could
/// take for it.
pub fn strip(headers: &mut HeaderMap, told: &IdentityHeaders) {
    let claims = |name: &HeaderName| is_claim(name.as_str(), told);
    let claimed: Vec<HeaderName> = headers.keys().filter(|name| claims(name)).cloned().collect();
    for name in claimed {
        headers.remove(name);
    }
}

fn is_claim(name: &str, told: &IdentityHeaders) -> bool {
    // Servers that make variables of fields take `_` and `-` for the same.
    let same = |known: &str| {
        name.len() == known.len()
            && name.bytes().zip(known.bytes()).all(|(a, b)| {
                let (a, b) = (a.to_ascii_lowercase(), b.to_ascii_lowercase());
                a == b || (matches!(a, b'-' | b'_') && matches!(b, b'-' | b'_'))
            })
    };
    same(CLIENT_CERT.as_str())
        || same(IDENTITY.as_str())
        || told.plain.as_ref().is_some_and(|plain| same(plain.as_str()))
}

/// Keeps of what is about this hop only what the next may know: a client must not have the
/// application's side drop a header by calling it one of this hop.
fn hop(headers: &mut HeaderMap, upgrades: bool) {
    let mut kept = Vec::new();
    for value in headers.get_all(CONNECTION) {
        for token in value.as_bytes().split(|&b| b == b',') {
            let token = token.trim_ascii().to_ascii_lowercase();
            match &*token {
                b"close" => kept.push("close"),
                b"keep-alive" => kept.push("keep-alive"),
                b"te" if headers.contains_key(TE) => kept.push("te"),
                b"upgrade" if upgrades => kept.push("upgrade"),
                _ => {}
            }
        }
    }
    if !upgrades {
        headers.remove(UPGRADE);
    }
    headers.remove(HTTP2_SETTINGS);
    kept.dedup();
    if headers.contains_key(CONNECTION) {
        headers.remove(CONNECTION);
        if let Ok(value) = HeaderValue::from_str(&kept.join(", "))
            && !kept.is_empty()
        {
            headers.insert(CONNECTION, value);
        }
    }
}

/// Tells the application who its client is: `peer` as its certificate proves it, at `own`.
pub fn tell(
    headers: &mut HeaderMap,
    told: &IdentityHeaders,
    peer: Option<&SpiffeId>,
    own: &SpiffeId,
) {
    let Some(peer) = peer else { return };
    let value = |text: String| HeaderValue::try_from(text).ok();
    if told.client_cert
        && let Some(value) = value(format!("By={};URI={}", own.as_str(), peer.as_str()))
    {
        headers.insert(CLIENT_CERT, value);
    }
    if let Some(plain) = &told.plain
        && let Some(value) = value(peer.as_str().to_owned())
    {
        headers.insert(plain.clone(), value);
    }
}

/// Takes the token of an end user out, which was for us.
pub fn take_tokens(parts: &mut Parts, places: &[TokenPlace]) {
    for place in places {
        match place {
            TokenPlace::Header(name) => {
                parts.headers.remove(&**name);
            }
            TokenPlace::Param(name) => {
                let query = parts.uri.query().unwrap_or_default();
                let is_other = |pair: &&str| pair.split('=').next() != Some(&**name);
                let rest: Vec<&str> = query.split('&').filter(is_other).collect();
                let path = parts.uri.path();
                let spelt = match rest.join("&") {
                    rest if rest.is_empty() => path.to_owned(),
                    rest => format!("{path}?{rest}"),
                };
                replace(parts, spelt);
            }
            TokenPlace::Cookie(name) => {
                let cookies: Vec<HeaderValue> = parts
                    .headers
                    .get_all(COOKIE)
                    .iter()
                    .filter_map(|value| {
                        let is_other = |cookie: &&[u8]| {
                            let own = cookie.split(|&b| b == b'=').next().unwrap_or_default();
                            own.trim_ascii() != name.as_bytes()
                        };
                        let parts = value.as_bytes().split(|&b| b == b';').filter(is_other);
                        let rest = parts.collect::<Vec<_>>().join(&b';');
                        let rest = rest.trim_ascii();
                        (!rest.is_empty()).then(|| HeaderValue::from_bytes(rest).ok()).flatten()
                    })
                    .collect();
                parts.headers.remove(COOKIE);
                for cookie in cookies {
                    parts.headers.append(COOKIE, cookie);
                }
            }
        }
    }
}

/// Replaces path and query; what is no URI is left, because it came from one.
fn replace(parts: &mut Parts, spelt: String) {
    let Ok(spelt) = PathAndQuery::try_from(spelt) else { return };
    let mut uri = parts.uri.clone().into_parts();
    uri.path_and_query = Some(spelt);
    if let Ok(uri) = Uri::from_parts(uri) {
        parts.uri = uri;
    }
}

/// True for a gRPC call, which hears of refusals in its own form.
pub fn is_grpc(headers: &HeaderMap) -> bool {
    headers
        .get(CONTENT_TYPE)
        .is_some_and(|value| value.as_bytes().to_ascii_lowercase().starts_with(b"application/grpc"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::spiffe::TrustDomain;

    fn request(method: &str, uri: &str, version: Version, fields: &[(&str, &str)]) -> Request<()> {
        let mut request = Request::builder().method(method).uri(uri).version(version);
        for (name, value) in fields {
            request = request.header(*name, *value);
        }
        request.body(()).unwrap()
    }

    fn head(method: &str, target: &str) -> Head {
        Head { method: method.into(), target: target.into(), upgrades: false }
    }

    #[test]
    fn what_was_judged_is_what_is_forwarded() {
        for (sent, path, forwarded) in [
            ("/api/v1/payments?x=/../y", "/api/v1/payments", "/api/v1/payments?x=/../y"),
            ("//api/./v1/%70ayments?a", "/api/v1/payments", "/api/v1/payments?a"),
            ("http://shop/a/../b", "/b", "/b"),
            ("http://shop", "/", "/"),
            ("/", "/", "/"),
        ] {
            let asked = request("GET", sent, Version::HTTP_11, &[("host", "shop")]);
            let target = check(&asked, Some(&head("GET", sent))).unwrap();
            let mut parts = asked.into_parts().0;
            assert_eq!((&*target.path, &*target.host), (path, "shop"));
            rewrite(&mut parts, &target, false, &IdentityHeaders::default()).unwrap();
            assert_eq!(parts.uri.to_string(), forwarded);
        }
        let uri = "http://shop:80/a//b?c";
        let asked = request("GET", uri, Version::HTTP_2, &[]);
        let target = check(&asked, None).unwrap();
        let mut parts = asked.into_parts().0;
        rewrite(&mut parts, &target, false, &IdentityHeaders::default()).unwrap();
        assert_eq!(parts.uri.to_string(), "http://shop:80/a/b?c");
        assert_eq!(target.host, "shop:80");
    }

    #[test]
    fn strange_heads_are_refused() {
        let h1 = |method: &str, target: &str, seen: Head| {
            check(&request(method, target, Version::HTTP_11, &[("host", "shop")]), Some(&seen))
        };
        assert!(h1("GET", "/a", head("GET", "/a")).is_ok(), "control");
        assert_eq!(h1("GET", "/a", head("GET", "/b")), Err(Malformed::TwoReadings));
        assert_eq!(h1("GET", "/a", head("POST", "/a")), Err(Malformed::TwoReadings));
        assert_eq!(h1("CONNECT", "/a", head("CONNECT", "/a")), Err(Malformed::Connect));
        assert_eq!(h1("OPTIONS", "*", head("OPTIONS", "*")).unwrap().path, "*");
        assert_eq!(
            h1("GET", "/a%2fb", head("GET", "/a%2fb")),
            Err(Malformed::Path(Ambiguous::Separator))
        );
        let h2 = |uri: &str, fields: &[(&str, &str)]| {
            check(&request("GET", uri, Version::HTTP_2, fields), None)
        };
        assert!(h2("http://shop/a", &[("host", "SHOP")]).is_ok(), "control");
        assert_eq!(h2("http://shop/a", &[("host", "admin")]), Err(Malformed::Authority));
        assert_eq!(
            h2("http://shop/a", &[("host", "shop"), ("host", "admin")]),
            Err(Malformed::Authority)
        );
        assert_eq!(h2("/a", &[]), Err(Malformed::Authority));
        assert_eq!(h2("http://u@shop/a", &[]), Err(Malformed::Authority));
        for field in ["connection", "upgrade", "transfer-encoding", "http2-settings"] {
            assert_eq!(h2("http://shop/a", &[(field, "x")]), Err(Malformed::Mixed), "{field}");
        }
    }

    #[test]
    fn a_client_says_nothing_about_who_it_is() {
        let forged = [
            ("x-forwarded-client-cert", "URI=spiffe://cluster.local/ns/a/sa/admin"),
            ("X_Forwarded-Client_Cert", "URI=spiffe://cluster.local/ns/a/sa/admin"),
            ("x-signet-identity", "spiffe://cluster.local/ns/a/sa/admin"),
            ("X_SIGNET_IDENTITY", "spiffe://cluster.local/ns/a/sa/admin"),
            ("x-signet-identity", "again"),
            ("X_Caller", "spiffe://cluster.local/ns/a/sa/admin"),
        ];
        let mut parts = request("GET", "/", Version::HTTP_11, &forged).into_parts().0;
        parts.headers.insert("x-signet-identities", HeaderValue::from_static("another name"));
        let id = |account| {
            let domain = TrustDomain::parse("cluster.local").unwrap();
            SpiffeId::for_service_account(&domain, "shop", account).unwrap()
        };
        let own = HeaderName::from_static("x-caller");
        let both = IdentityHeaders { client_cert: true, plain: Some(own.clone()) };
        strip(&mut parts.headers, &both);
        assert_eq!(parts.headers.len(), 1, "control: only those");
        tell(&mut parts.headers, &both, None, &id("payments"));
        assert_eq!(parts.headers.len(), 1, "nobody is known over plaintext");
        tell(&mut parts.headers, &both, Some(&id("web")), &id("payments"));
        assert_eq!(parts.headers[own], "spiffe://cluster.local/ns/shop/sa/web");
        assert_eq!(
            parts.headers[CLIENT_CERT],
            "By=spiffe://cluster.local/ns/shop/sa/payments;URI=spiffe://cluster.local/ns/shop/sa/web"
        );
    }

    #[test]
    fn a_token_is_taken_out_and_nothing_else() {
        let fields = [("authorization", "Bearer t"), ("cookie", "a=1; token=t; b=2")];
        let sent = "/a?x=1&access_token=t&y=2";
        let mut parts = request("GET", sent, Version::HTTP_11, &fields).into_parts().0;
        take_tokens(&mut parts, &[]);
        assert_eq!(parts.uri, sent, "control");
        let places = [
            TokenPlace::Header("authorization".into()),
            TokenPlace::Param("access_token".into()),
            TokenPlace::Cookie("token".into()),
        ];
        take_tokens(&mut parts, &places);
        assert_eq!(parts.uri, "/a?x=1&y=2");
        assert!(!parts.headers.contains_key("authorization"));
        assert_eq!(parts.headers["cookie"], "a=1; b=2");
        parts.uri = Uri::from_static("/a?access_token=t");
        take_tokens(&mut parts, &places);
        assert_eq!(parts.uri, "/a");
    }

    #[test]
    fn a_hop_is_not_the_clients_to_shape() {
        let fields = [
            ("connection", "keep-alive, x-signet-identity, Upgrade"),
            ("connection", "HTTP2-Settings"),
            ("upgrade", "h2c"),
            ("http2-settings", "AAMAAABkAAQAAP__"),
        ];
        let mut h2c = request("GET", "/", Version::HTTP_11, &fields).into_parts().0;
        hop(&mut h2c.headers, false);
        assert_eq!(h2c.headers.len(), 1);
        assert_eq!(h2c.headers[CONNECTION], "keep-alive");
        let fields = [("connection", "Upgrade"), ("upgrade", "websocket")];
        let mut websocket = request("GET", "/", Version::HTTP_11, &fields).into_parts().0;
        hop(&mut websocket.headers, true);
        assert_eq!(websocket.headers[UPGRADE], "websocket");
        assert_eq!(websocket.headers[CONNECTION], "upgrade");
    }
}
