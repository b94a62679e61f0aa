//! Signet's parsers of untrusted bytes, each as a function that a fuzzer calls.
//!
//! A target says whether the parser took the input, and panics where a parser breaks what it
//! promises: that what it took reads the same when it is written again. `cargo xtask fuzz`
//! runs them under libFuzzer; the tests here run every seed once.

#![forbid(unsafe_code)]

use http::{HeaderName, HeaderValue, Method, Request, Uri};
use prost::Message;
use signet::{
    cluster::{enrolment::Announcement, manifest},
    config::{ConfigSources, yaml},
    endpoint::identities::Identities,
    flow::edges,
    observer::{decode, filter::Filters},
    policy::{
        compile::{CompileInput, compile},
        evaluate::{FlowFacts, PeerIdentity},
        explain::explain,
        istio,
        model::{Action, Policy},
        native,
    },
    proto::flow,
    proxy::http::{
        framing::{self, Framing, Step},
        path,
    },
    spiffe::{SpiffeId, TrustDomain, bundle::Bundle, jwks::SpiffeBundle, jwt::JwtSvid, leaf::Leaf},
    trust::federation,
    tunnel::{
        hbone::head::{Open, parse_address},
        native::frame,
    },
    workload_api::authority::AuthorityFilter,
};
use signet_ebpf::abi::{Direction, Event, IDENTITY_NAME_LEN, IdentityName};
use std::sync::Arc;

/// Environment variable that chooses the target of the fuzzer's process.
pub const TARGET_VARIABLE: &str = "SIGNET_FUZZ_TARGET";

/// Environment variable that names the directory into which the target's seeds are written.
pub const CORPUS_VARIABLE: &str = "SIGNET_FUZZ_CORPUS";

/// A parser under test.
pub struct Target {
    /// Name on the command line and of the corpus' directory.
    pub name: &'static str,
    /// True when the parser takes the input.
    pub run: fn(&[u8]) -> bool,
    /// Inputs to begin with; the first one is taken.
    pub seeds: &'static [&'static [u8]],
}

/// Every target.
pub const TARGETS: &[Target] = &[
    Target {
        name: "spiffe-id",
        run: spiffe_id,
        seeds: &[b"spiffe://cluster.local/ns/shop/sa/web", b"SPIFFE://Td/a/../b", b"spiffe://"],
    },
    Target { name: "leaf", run: leaf, seeds: &[include_bytes!("../seeds/leaf.der")] },
    Target { name: "bundle", run: bundle, seeds: &[include_bytes!("../seeds/bundle.pem")] },
    Target {
        name: "jwks",
        run: jwks,
        seeds: &[
            br#"{"keys":[],"spiffe_sequence":1,"spiffe_refresh_hint":300}"#,
            br#"{"keys":[{"kty":"EC","use":"jwt-svid","kid":"a","crv":"P-256","x":"","y":""}]}"#,
        ],
    },
    Target {
        name: "jwt",
        run: jwt,
        seeds: &[
            b"eyJhbGciOiJFUzI1NiIsImtpZCI6ImEifQ.eyJzdWIiOiJzcGlmZmU6Ly90ZC93IiwiYXVkIjpbIngiXSwiZXhwIjo5OTk5OTk5OTk5fQ.AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA",
            b"e30.e30.",
        ],
    },
    Target {
        name: "authority-filter",
        run: authority_filter,
        seeds: &[
            b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\x00\x00\x0d\x01\x04\x00\x00\x00\x01\x41\x0btmp%2Fw.sock",
            b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\x00\x00\x09\x01\x2c\x00\x00\x00\x01\x01PRIO!\x01\x01%%",
        ],
    },
    Target { name: "yaml", run: yaml, seeds: &[b"a: [b, {c: 1}]\n", b"- &a x\n- *a\n", b"{"] },
    Target {
        name: "manifest",
        run: manifest,
        seeds: &[
            b"apiVersion: v1\nkind: Namespace\nmetadata: {name: shop, labels: {signet.dev/mode: strict}}\n",
            b"apiVersion: v1\nkind: Pod\nmetadata: {name: a, namespace: b, uid: c}\nspec: {nodeName: n, containers: []}\nstatus: {podIPs: [{ip: 10.0.0.1}]}\n",
            b"apiVersion: v1\nkind: Service\nmetadata: {name: a, namespace: b}\nspec: {clusterIP: 10.96.0.1, ports: [{port: 80}]}\n",
            b"apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {name: p, namespace: shop, annotations: {istio.io/dry-run: \"true\"}}\nspec:\n  selector: {matchLabels: {app: db}}\n  action: DENY\n  rules:\n  - from: [{source: {principals: [td/ns/a/*], notIpBlocks: [10.0.0.0/8], serviceAccounts: [a/b]}}]\n    to: [{operation: {ports: [\"80\"], methods: [GET]}}]\n    when: [{key: source.namespace, values: [x]}, {key: destination.ip, notValues: [fd00::1]}]\n",
            b"apiVersion: security.istio.io/v1beta1\nkind: PeerAuthentication\nmetadata: {name: p, namespace: shop, creationTimestamp: 2026-01-01T00:00:00Z}\nspec: {selector: {matchLabels: {app: db}}, mtls: {mode: STRICT}, portLevelMtls: {5432: {mode: DISABLE}}}\n",
            b"apiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\nmetadata: {name: a, namespace: b}\naddressType: IPv4\nendpoints: []\nports: []\n",
        ],
    },
    Target { name: "ranges", run: ranges, seeds: &[b"podRanges: [10.244.0.0/16]\nserviceRanges: [fd00::/108]\n"] },
    Target {
        name: "board",
        run: board,
        seeds: &[b"node: node-1\nrevision: 3\ntime: 2026-01-01T00:00:00Z\nserved:\n- uid: \"a\"\n  pod: \"b/c\"\n"],
    },
    Target {
        name: "policy",
        run: policy,
        seeds: &[
            b"apiVersion: signet.dev/v1alpha1\nkind: ClusterIdentityPolicy\nmetadata: {name: p}\nspec:\n  selector: {namespaces: [a*]}\n  egress:\n  - to: [{services: [a/b], trustDomains: [\"*\"]}]\n",
            b"apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {name: p, namespace: shop}\nspec:\n  rules:\n  - from: [{source: {principals: [\"*\"], ipBlocks: [x], serviceAccounts: [\"*\"]}}]\n    to: [{operation: {ports: [\"http\"]}}]\n    when: [{key: request.headers, values: [x]}]\n",
            b"apiVersion: security.istio.io/v1\nkind: PeerAuthentication\nmetadata: {name: p, namespace: istio-system}\nspec: {mtls: {mode: UNSET}, portLevelMtls: {80: {mode: STRICT}}}\n",
            b"apiVersion: signet.dev/v1alpha1\nkind: IdentityPolicy\nmetadata: {name: p, namespace: shop}\nspec:\n  action: Deny\n  ingress:\n  - from: [{identities: [\"spiffe://td/*\"], notNamespaces: [a*]}]\n    ports: [{port: 80, endPort: 90, protocol: TCP}]\n",
        ],
    },
    Target { name: "config", run: config, seeds: &[b"node: n\nsvidTtl: 1h\nlimits:\n  openFlows: 3\n", b"podRanges: [10.0.0.0/8]\n"] },
    Target {
        name: "http-path",
        run: http_path,
        seeds: &[b"/api/./v1//x/../%70ayments", b"/a%2Fb", b"/caf%c3%a9", b"/a;b"],
    },
    Target {
        name: "http-framing",
        run: http_framing,
        seeds: &[
            b"\x07POST /a HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\nGET / HTTP/1.1\r\nHost: x\r\n\r\n",
            b"\x01GET /ws HTTP/1.1\r\nHost: x\r\nConnection: upgrade\r\nUpgrade: websocket\r\n\r\nGET / HTTP/1.0\r\n\r\n",
            b"\xffPOST /a HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\n\r\nhelloGET /b HTTP/1.1\r\nHost: x\r\n\r\n",
        ],
    },
    Target {
        name: "native-frame",
        run: native_frame,
        seeds: &[
            b"\x01\x00\x00\x1a\x01\x04\x0a\x00\x02\x07\x1f\x90\xa3\x900123456789abcdef",
            b"\x05\x00\x00\x16\x01\x0fpolicy_no_matcha/b/c",
            b"\x04\x00\x00\x08draining",
            b"\x02\x00\x00\x05hello",
        ],
    },
    Target {
        name: "hbone-head",
        run: hbone_head,
        seeds: &[
            b"10.0.0.1:80\nforwarded: for=\"10.0.0.2:4242\"\nsignet-flow: 6f1c8b1e-6e9e-4f6c-9d3b-0a1b2c3d4e5f\n",
            b"[fd00::1]:443\nforwarded: For=\"[fd00::2]:1\";by=x\n",
        ],
    },
    Target { name: "filters", run: filters, seeds: &[b"", b"\x0a\x04shop"] },
    Target {
        name: "federation",
        run: federation,
        seeds: &[
            b"trustDomains:\n- name: a.example\n  endpoint: {url: \"https://a.example/b\", profile: https_web}\nremotePeers:\n- {cidr: 10.0.0.0/8, trustDomain: a.example, identities: [\"spiffe://a.example/x\"]}\n",
        ],
    },
    Target { name: "flow", run: seen_flow, seeds: &[] },
    Target {
        name: "edges",
        run: edges,
        seeds: &[
            b"{\"schema\":\"signet.dev/edges/v1\"}\n{\"reporter\":\"destination\",\"source\":{\"workload\":{\"namespace\":\"shop\",\"account\":\"web\"}},\"destination\":{\"network\":\"10.9.0.0/24\"},\"port\":80,\"protocol\":6,\"via\":\"mtls\",\"verdict\":\"FORWARDED\",\"reason\":\"allowed\",\"count\":2,\"first\":\"2026-08-06T10:12:04.318Z\",\"last\":\"2026-08-06T10:12:05Z\"}\n",
            b"{\"schema\":\"signet.dev/edges/v1\"}\n{\"reporter\":\"source\",\"source\":\"others\",\"destination\":{\"identity\":\"spiffe://td/a\"}}\n",
        ],
    },
    Target { name: "event", run: event, seeds: &[&[0; size_of::<Event>()], b"short"] },
    Target { name: "identity-row", run: identity_row, seeds: &[b"\x0d\x00spiffe://td/a"] },
];

/// The target of that name.
pub fn target(name: &str) -> Option<&'static Target> {
    TARGETS.iter().find(|target| target.name == name)
}

fn text(data: &[u8]) -> Option<&str> {
    std::str::from_utf8(data).ok()
}

fn spiffe_id(data: &[u8]) -> bool {
    let Some(text) = text(data) else { return false };
    if let Ok(domain) = TrustDomain::parse(text) {
        assert_eq!(TrustDomain::parse(domain.as_str()).as_ref(), Ok(&domain));
    }
    let Ok(id) = SpiffeId::parse(text) else { return false };
    assert_eq!(SpiffeId::parse(id.as_str()).as_ref(), Ok(&id));
    if let Some((namespace, account)) = id.workload() {
        let same = SpiffeId::for_service_account(&id.trust_domain(), namespace, account);
        assert_eq!(same.as_ref(), Ok(&id));
    }
    true
}

fn edges(data: &[u8]) -> bool {
    let Ok(read) = edges::parse(data) else { return false };
    let written = edges::write(&read).unwrap_or_default();
    assert_eq!(edges::parse(&written).ok(), Some(read));
    true
}

fn leaf(data: &[u8]) -> bool {
    Leaf::parse(data).is_ok()
}

fn bundle(data: &[u8]) -> bool {
    Bundle::from_pem(data).is_ok()
}

fn jwks(data: &[u8]) -> bool {
    let Ok(bundle) = SpiffeBundle::decode(data) else { return false };
    // A key that can be verified with but not published says so.
    if let Ok(document) = bundle.encode() {
        let again = SpiffeBundle::decode(document.as_bytes()).expect("its own document");
        assert_eq!(again.encode().expect("as before"), document);
    }
    true
}

fn jwt(data: &[u8]) -> bool {
    text(data).is_some_and(|token| JwtSvid::parse_unverified(token).is_ok())
}

/// True when it corrected something. No length changes, and nothing but percent signs does.
fn authority_filter(data: &[u8]) -> bool {
    let through = |pieces: &mut dyn Iterator<Item = &[u8]>| {
        let (mut filter, mut out) = (AuthorityFilter::new(), Vec::new());
        pieces.for_each(|piece| filter.feed(piece, &mut out));
        filter.end(&mut out);
        out
    };
    let out = through(&mut std::iter::once(data));
    assert_eq!(out, through(&mut data.chunks(3)), "the pieces that bytes come in do not count");
    assert_eq!(out.len(), data.len());
    assert!(data.iter().zip(&out).all(|(was, is)| was == is || (*was, *is) == (b'%', b'-')));
    out != data
}

fn yaml(data: &[u8]) -> bool {
    text(data).is_some_and(|text| yaml::parse(text).is_ok())
}

fn manifest(data: &[u8]) -> bool {
    text(data).is_some_and(|text| manifest::read("fuzz.yaml", text, "istio-system").is_ok())
}

fn ranges(data: &[u8]) -> bool {
    text(data).is_some_and(|text| manifest::read_ranges(text).is_ok())
}

fn board(data: &[u8]) -> bool {
    text(data).is_some_and(|text| Announcement::read("node-1", text).is_ok())
}

fn federation(data: &[u8]) -> bool {
    let Ok(own) = TrustDomain::parse("cluster.local") else { return false };
    text(data).is_some_and(|text| federation::read(text, &own).is_ok())
}

fn policy(data: &[u8]) -> bool {
    let Some(text) = text(data) else { return false };
    let Ok(Some(node)) = yaml::parse_one(text) else { return false };
    let policy = native::read(&node).or_else(|_| istio::read_authorization(&node, "istio-system"));
    let Ok(policy) = policy else {
        return istio::read_peer_authentication(&node, "istio-system").is_ok();
    };
    judge(policy);
    true
}

/// Whatever is read can be judged and compiled, and what cannot be evaluated of an ALLOW lets
/// nobody in.
fn judge(policy: Policy) {
    let id = SpiffeId::parse("spiffe://td/ns/shop/sa/web").expect("an identity");
    let domain = TrustDomain::parse("td").expect("a trust domain");
    let local = ["10.0.0.1".parse().expect("an address")];
    let policies = [Arc::new(policy)];
    for direction in [Direction::Ingress, Direction::Egress] {
        let facts = FlowFacts {
            direction,
            trust_domain: &domain,
            aliases: &[],
            peer: PeerIdentity::Authenticated(&id),
            peer_ip: "10.0.0.2".parse().expect("an address"),
            local_ips: &local,
            port: 80,
            protocol: 6,
        };
        let explained = explain(&policies, false, &facts, None);
        let [policy] = &policies;
        let by = explained.outcome.policy.is_some();
        let evaluable = policy.unsupported.is_empty()
            && policy.rules(direction).iter().any(|rule| rule.unsupported.is_empty());
        let allows = policy.action == Action::Allow && explained.outcome.is_allowed() && by;
        assert!(!allows || evaluable, "{policy:?}");
    }
    let rows = compile(&CompileInput {
        policies: &policies,
        default_deny: false,
        trust_domain: &domain,
        aliases: &[],
        identities: &[(256, id.clone())],
        number: &|_| 1,
        observe: true,
        local_ips: &local,
        max_entries: 4096,
    });
    // More than that is refused, never cut off.
    if let Ok(rows) = rows {
        assert!(rows.len() <= 4096);
    }
}

fn config(data: &[u8]) -> bool {
    text(data).is_some_and(|text| ConfigSources::default().load_with(Some(text)).is_ok())
}

/// The first line is the authority, the others are header fields.
/// A path that is taken has one spelling, which is taken as it is and leaves no root.
fn http_path(data: &[u8]) -> bool {
    let Ok(text) = std::str::from_utf8(data) else { return false };
    let Ok(spelt) = path::normalise(text) else { return false };
    assert_eq!(path::normalise(&spelt).as_deref(), Ok(&*spelt), "a fixed point of {text:?}");
    assert!(spelt.starts_with('/') && !spelt.contains("//"), "{spelt:?}");
    assert!(spelt.split('/').all(|segment| segment != "." && segment != ".."), "{spelt:?}");
    let has_none = |what: &[&str]| what.iter().all(|what| !spelt.contains(what));
    assert!(has_none(&["\\", ";", "%2F", "%2f", "%5C", "%5c", "%25", "%2E", "%2e", "%00"]));
    true
}

/// A stream of requests is cut the same way however its bytes arrive, and the HTTP library finds
/// the same requests in what passes.
fn http_framing(data: &[u8]) -> bool {
    let [size, data @ ..] = data else { return false };
    let whole = cut(data, data.len().max(1));
    assert_eq!(cut(data, usize::from(*size).max(1)), whole, "cut differently in pieces");
    let Some((first, end)) = whole.first() else { return false };
    let mut fields = [httparse::EMPTY_HEADER; framing::MOST_FIELDS];
    let mut parsed = httparse::Request::new(&mut fields);
    // What it refuses, the proxy refuses.
    let Ok(status) = parsed.parse(data) else { return true };
    assert_eq!(status, httparse::Status::Complete(*end));
    assert_eq!(parsed.method, Some(&*first.method));
    assert_eq!(parsed.path, Some(&*first.target));
    true
}

/// Every head that passes, with the length of the first one, until a fault or the end.
fn cut(data: &[u8], size: usize) -> Vec<(framing::Head, usize)> {
    let (mut framing, mut held, mut found) = (Framing::new(), Vec::new(), Vec::new());
    for piece in data.chunks(size) {
        held.extend_from_slice(piece);
        loop {
            match framing.step(&held) {
                Step::Head(n, head) => {
                    held.drain(..n);
                    found.push((head, n));
                }
                Step::Pass(n) => {
                    assert!(n > 0 && n <= held.len());
                    held.drain(..n);
                }
                Step::Hold => framing.go_on(false),
                Step::More => break,
                Step::Fault(_) => return found,
            }
        }
    }
    found
}

fn native_frame(data: &[u8]) -> bool {
    let Some((header, payload)) = data.split_first_chunk::<{ frame::HEADER }>() else {
        return false;
    };
    let Ok(parsed) = frame::Header::parse(*header) else { return false };
    assert_eq!(parsed.encode(), *header, "as it was sent");
    let Some(payload) = payload.get(..parsed.length) else { return false };
    let mut again = Vec::new();
    match parsed.kind {
        frame::Kind::Open => {
            let Ok(open) = frame::Open::parse(payload) else { return false };
            open.encode(&mut again);
            let read = frame::Open::parse(&again[frame::HEADER..]);
            assert_eq!(read.expect("as written"), open);
        }
        frame::Kind::Status => {
            let Ok(status) = frame::Status::parse(payload) else { return false };
            status.encode(&mut again);
            let read = frame::Status::parse(&again[frame::HEADER..]);
            assert_eq!(read.expect("as written"), status);
        }
        frame::Kind::Reset => {
            let reason = frame::parse_reset(payload);
            frame::encode_reset(reason, &mut again);
            assert_eq!(frame::parse_reset(&again[frame::HEADER..]), reason);
        }
        frame::Kind::Data | frame::Kind::Fin | frame::Kind::Close => {}
    }
    true
}

fn hbone_head(data: &[u8]) -> bool {
    let mut lines = data.split(|b| *b == b'\n');
    let Some(authority) = lines.next() else { return false };
    if let Some(address) = text(authority).and_then(parse_address) {
        assert_eq!(parse_address(&address.to_string()), Some(address));
    }
    let Ok(uri) = Uri::try_from(authority) else { return false };
    let mut request = Request::new(());
    *request.method_mut() = Method::CONNECT;
    *request.uri_mut() = uri;
    for line in lines {
        let mut parts = line.splitn(2, |b| *b == b':');
        let name = parts.next().and_then(|name| HeaderName::from_bytes(name).ok());
        let value = parts.next().and_then(|v| HeaderValue::from_bytes(v.trim_ascii()).ok());
        if let (Some(name), Some(value)) = (name, value) {
            request.headers_mut().append(name, value);
        }
    }
    let Ok(open) = Open::parse(&request) else { return false };
    let again = open.request().expect("what was read can be written");
    assert_eq!(Open::parse(&again).expect("as written"), open);
    true
}

fn filters(data: &[u8]) -> bool {
    let Ok(filter) = flow::FlowFilter::decode(data) else { return false };
    Filters::compile(vec![filter.clone()], vec![filter]).is_ok()
}

fn seen_flow(data: &[u8]) -> bool {
    flow::Flow::decode(data).is_ok_and(|message| decode::decode(&message).is_ok())
}

fn event(data: &[u8]) -> bool {
    Event::from_bytes(data).is_some()
}

fn identity_row(data: &[u8]) -> bool {
    let Some((len, name)) = data.split_first_chunk::<2>() else { return false };
    let mut row = IdentityName { len: u16::from_ne_bytes(*len), bytes: [0; IDENTITY_NAME_LEN] };
    let held = name.len().min(row.bytes.len());
    row.bytes[..held].copy_from_slice(&name[..held]);
    let table = Identities::from_rows(&[(256, row)]);
    table.names().contains_key(&256)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn seeds_run_and_the_first_is_taken() {
        for target in TARGETS {
            for (i, seed) in target.seeds.iter().enumerate() {
                let taken = (target.run)(seed);
                assert!(i > 0 || taken, "{} refuses its first seed", target.name);
            }
            assert!(!(target.run)(b"\xff\xfe\x00no"), "{} takes anything", target.name);
        }
    }
}
