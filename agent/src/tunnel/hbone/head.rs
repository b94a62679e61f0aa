//! What a CONNECT request and its answer say in their headers.
//!
//! Everything that a peer sends is limited and parsed here, once. What a header cannot
//! be trusted with (names, identities, the client's address) is not even read.

use std::net::{IpAddr, SocketAddr};

use http::{
    HeaderMap, HeaderName, HeaderValue, Method, Request, Response, StatusCode, Uri, header,
};
use signet_ebpf::abi::Reason;
use uuid::Uuid;

use crate::{policy::model::PolicyName, telemetry::reason};

/// The flow's uuid, the same in both ends' records.
pub const FLOW: HeaderName = HeaderName::from_static("signet-flow");
/// In a refusal: the reason's name.
pub const REASON: HeaderName = HeaderName::from_static("signet-reason");
/// In a refusal: the deciding policy as `kind/namespace/name`.
pub const POLICY: HeaderName = HeaderName::from_static("signet-policy");
/// W3C baggage: who the client is, for peers that show it. Never read by us.
pub const BAGGAGE: HeaderName = HeaderName::from_static("baggage");

/// Longest `forwarded` value that is looked at, bytes.
const FORWARDED_MAX: usize = 256;
/// Longest `signet-policy` value that is looked at, bytes.
pub(crate) const POLICY_MAX: usize = 512;

/// What a client asks for.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Open {
    /// The application's address.
    pub destination: SocketAddr,
    /// The client application's address; a server takes at most its port from it.
    pub client: Option<SocketAddr>,
    /// The flow's uuid.
    pub flow: Option<Uuid>,
    /// W3C baggage about the client.
    pub baggage: Option<HeaderValue>,
}

/// Why a request is refused before anybody is asked.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum HeadError {
    /// Not a CONNECT.
    #[error("the method is {0}, only CONNECT opens a flow")]
    NotConnect(Method),
    /// A CONNECT without an authority, or with a path or scheme (extended CONNECT).
    #[error("the CONNECT is not of the form `authority` alone")]
    NotPlainConnect,
    /// A host name, or something else that is not `ip:port`.
    #[error("the authority is not a literal ip:port")]
    NotAnAddress,
}

impl HeadError {
    /// The reason in flow records.
    pub fn reason(&self) -> Reason {
        match self {
            Self::NotConnect(_) | Self::NotPlainConnect => Reason::ProtocolError,
            Self::NotAnAddress => Reason::WrongDestination,
        }
    }
}

impl Open {
    /// The request as it is sent.
    pub fn request(&self) -> Result<Request<()>, http::Error> {
        let authority = self.destination.to_string();
        let uri = Uri::builder().authority(authority.as_str()).build()?;
        let mut request = Request::builder().method(Method::CONNECT).uri(uri).body(())?;
        let headers = request.headers_mut();
        if let Some(client) = self.client {
            headers.insert(header::FORWARDED, HeaderValue::try_from(format!("for=\"{client}\""))?);
        }
        if let Some(flow) = self.flow {
            let mut buffer = Uuid::encode_buffer();
            let text: &str = flow.hyphenated().encode_lower(&mut buffer);
            headers.insert(FLOW, HeaderValue::from_str(text)?);
        }
        if let Some(baggage) = &self.baggage {
            headers.insert(BAGGAGE, baggage.clone());
        }
        Ok(request)
    }

    /// Reads a request; [`Open::baggage`] is never taken from a peer.
    pub fn parse<B>(request: &Request<B>) -> Result<Self, HeadError> {
        if request.method() != Method::CONNECT {
            return Err(HeadError::NotConnect(request.method().clone()));
        }
        if request.extensions().get::<h2::ext::Protocol>().is_some()
            || request.uri().scheme().is_some()
            || !matches!(request.uri().path(), "" | "/")
        {
            return Err(HeadError::NotPlainConnect);
        }
        let authority = request.uri().authority().ok_or(HeadError::NotPlainConnect)?;
        let destination = parse_address(authority.as_str()).ok_or(HeadError::NotAnAddress)?;
        Ok(Self {
            destination,
            client: single(request.headers(), &header::FORWARDED).and_then(parse_forwarded),
            flow: single(request.headers(), &FLOW).and_then(parse_flow),
            baggage: None,
        })
    }
}

/// The only value of a header, as text; `None` when absent, repeated or not ASCII.
fn single<'a>(headers: &'a HeaderMap, name: &HeaderName) -> Option<&'a str> {
    let mut values = headers.get_all(name).iter();
    let value = values.next()?.to_str().ok()?;
    values.next().is_none().then_some(value)
}

/// `ip:port` or `[ip6]:port`; no scope, no mapped IPv4, no port 0.
pub fn parse_address(text: &str) -> Option<SocketAddr> {
    if text.contains('%') {
        return None;
    }
    let address: SocketAddr = text.parse().ok()?;
    let mapped = matches!(address.ip(), IpAddr::V6(v6) if v6.to_ipv4_mapped().is_some());
    (address.port() != 0 && !mapped).then_some(address)
}

/// The first element's `for` in an RFC 7239 header, when it is an address with a port.
pub fn parse_forwarded(value: &str) -> Option<SocketAddr> {
    if value.len() > FORWARDED_MAX || value.contains(',') {
        return None;
    }
    let mut found = None;
    for pair in value.split(';') {
        let (name, text) = pair.split_once('=')?;
        if name.trim().eq_ignore_ascii_case("for") {
            if found.is_some() {
                return None;
            }
            let text = text.trim();
            let text = match text.strip_prefix('"') {
                Some(rest) => rest.strip_suffix('"')?,
                None => text,
            };
            found = Some(parse_address(text)?);
        }
    }
    found
}

/// A hyphenated uuid that is not nil.
fn parse_flow(value: &str) -> Option<Uuid> {
    if value.len() != 36 {
        return None;
    }
    Uuid::try_parse(value).ok().filter(|uuid| !uuid.is_nil())
}

/// A server's refusal.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Refusal {
    /// HTTP status: 400, 401 or 503.
    pub status: StatusCode,
    /// Why.
    pub reason: Reason,
    /// The policy that refused, when there is one and the peer may know it.
    pub policy: Option<PolicyName>,
}

impl Refusal {
    /// A refusal with the status that a ztunnel would answer for this reason.
    pub fn new(reason: Reason) -> Self {
        let status = match reason {
            Reason::WrongDestination | Reason::ProtocolError => StatusCode::BAD_REQUEST,
            Reason::PolicyDeny
            | Reason::PolicyNoMatch
            | Reason::PolicyUnsupported
            | Reason::UntrustedPeer
            | Reason::SvidExpired
            | Reason::RightWithdrawn
            | Reason::IdentityMismatch
            | Reason::IdentityUnknown => StatusCode::UNAUTHORIZED,
            _ => StatusCode::SERVICE_UNAVAILABLE,
        };
        Self { status, reason, policy: None }
    }

    /// Names the deciding policy.
    pub fn with_policy(mut self, policy: Option<PolicyName>) -> Self {
        self.policy = policy;
        self
    }

    /// The answer as it is sent.
    pub fn response(&self) -> Response<()> {
        let mut response = Response::new(());
        *response.status_mut() = self.status;
        let headers = response.headers_mut();
        headers.insert(REASON, HeaderValue::from_static(reason::name(self.reason)));
        if let Some(policy) = &self.policy
            && let Ok(value) = HeaderValue::from_str(&policy_text(policy))
        {
            headers.insert(POLICY, value);
        }
        response
    }

    /// Reads an answer that is not 200. A peer that claims `allowed`, or nothing that we
    /// know, gets the reason of its status.
    pub fn parse<B>(response: &Response<B>) -> Self {
        let status = response.status();
        let claimed = single(response.headers(), &REASON)
            .and_then(reason::parse)
            .filter(|&reason| reason != Reason::Allowed);
        let reason = claimed.unwrap_or(match status {
            StatusCode::BAD_REQUEST => Reason::WrongDestination,
            StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => Reason::PolicyDeny,
            StatusCode::SERVICE_UNAVAILABLE => Reason::AppUnreachable,
            _ => Reason::ProtocolError,
        });
        let policy = single(response.headers(), &POLICY).and_then(parse_policy);
        Self { status, reason, policy }
    }
}

/// A policy's name as peers write it: `kind/namespace/name`.
pub(crate) fn policy_text(policy: &PolicyName) -> String {
    format!("{}/{}/{}", policy.kind, policy.namespace, policy.name)
}

/// `kind/namespace/name` of a policy, in the characters that such names may have.
pub(crate) fn parse_policy(value: &str) -> Option<PolicyName> {
    let plain =
        |s: &str| s.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'.' | b'_'));
    if value.len() > POLICY_MAX {
        return None;
    }
    let mut parts = value.split('/');
    let (kind, namespace, name) = (parts.next()?, parts.next()?, parts.next()?);
    let known = parts.next().is_none() && !kind.is_empty() && !name.is_empty();
    (known && plain(kind) && plain(namespace) && plain(name)).then(|| PolicyName {
        kind: kind.into(),
        namespace: namespace.into(),
        name: name.into(),
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn connect(authority: &str) -> Request<()> {
        Request::builder()
            .method(Method::CONNECT)
            .uri(Uri::builder().authority(authority).build().unwrap())
            .body(())
            .unwrap()
    }

    #[test]
    fn a_request_reads_back_as_it_was_sent() {
        let open = Open {
            destination: "10.0.2.7:8080".parse().unwrap(),
            client: Some("10.0.1.5:41872".parse().unwrap()),
            flow: Some(Uuid::from_u128(0x1234_5678_9abc_4def_8123_4567_89ab_cdef)),
            baggage: None,
        };
        assert_eq!(Open::parse(&open.request().unwrap()), Ok(open.clone()));
        let six = Open { destination: "[fd00::7]:80".parse().unwrap(), ..open };
        assert_eq!(Open::parse(&six.request().unwrap()), Ok(six));
    }

    #[test]
    fn only_a_plain_connect_to_a_literal_address_is_read() {
        assert!(Open::parse(&connect("10.0.2.7:8080")).is_ok());
        for authority in [
            "payments.shop:8080",
            "localhost:80",
            "10.0.2.7",
            "10.0.2.7:0",
            "10.0.2.7:99999",
            "user@10.0.2.7:80",
            "[::ffff:10.0.2.7]:80",
            "010.0.2.7:80",
        ] {
            let error = Open::parse(&connect(authority)).unwrap_err();
            assert_eq!(error.reason(), Reason::WrongDestination, "{authority}");
        }
        let get = Request::builder().uri("https://10.0.2.7:80/").body(()).unwrap();
        assert_eq!(Open::parse(&get).unwrap_err().reason(), Reason::ProtocolError);
    }

    #[test]
    fn forwarded_is_one_address_or_nothing() {
        let expected: SocketAddr = "10.0.1.5:41872".parse().unwrap();
        for good in [
            "for=\"10.0.1.5:41872\"",
            "for=10.0.1.5:41872",
            "host=svc;For=\"10.0.1.5:41872\";proto=tcp",
        ] {
            assert_eq!(parse_forwarded(good), Some(expected), "{good}");
        }
        assert_eq!(parse_forwarded("for=\"[fd00::5]:4\""), Some("[fd00::5]:4".parse().unwrap()));
        for bad in [
            "",
            "for=",
            "for=\"10.0.1.5:41872",
            "for=10.0.1.5",
            "for=10.0.1.5:0",
            "for=unknown",
            "for=10.0.1.5:1, for=10.0.1.6:2",
            "for=10.0.1.5:1;for=10.0.1.6:2",
            "10.0.1.5:41872",
        ] {
            assert_eq!(parse_forwarded(bad), None, "{bad}");
        }
        assert_eq!(parse_forwarded(&format!("for=10.0.1.5:1;x={}", "y".repeat(300))), None);
    }

    #[test]
    fn a_refusal_reads_back_and_never_as_allowed() {
        let policy = PolicyName {
            kind: "IdentityPolicy".into(),
            namespace: "shop".into(),
            name: "payments-callers".into(),
        };
        let refusal = Refusal::new(Reason::PolicyNoMatch).with_policy(Some(policy));
        assert_eq!(refusal.status, StatusCode::UNAUTHORIZED);
        assert_eq!(Refusal::parse(&refusal.response()), refusal);

        let mut lie = refusal.response();
        lie.headers_mut().insert(REASON, HeaderValue::from_static("allowed"));
        lie.headers_mut().insert(POLICY, HeaderValue::from_static("a/b/c/../d"));
        let read = Refusal::parse(&lie);
        assert_eq!((read.reason, read.policy), (Reason::PolicyDeny, None));
    }

    proptest! {
        #[test]
        fn parsers_never_panic_and_accept_only_what_they_print(text in ".{0,300}") {
            let _ = parse_policy(&text);
            if let Some(address) = parse_address(&text) {
                prop_assert_eq!(parse_address(&address.to_string()), Some(address));
            }
            if let Some(address) = parse_forwarded(&text) {
                prop_assert!(address.port() != 0);
            }
        }
    }
}
