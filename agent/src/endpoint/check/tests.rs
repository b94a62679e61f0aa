//! The tables of Istio's semantics, through what `signet policy check` runs.

mod authorization;
mod native;
mod peer_authentication;
mod requests;

use std::path::Path;

use super::*;
use crate::{
    cluster::{offline::Manifests, source::SourceParams},
    policy::istio::ROOT_NAMESPACE,
    spiffe::TrustDomain,
};

/// Who dials in the tables, in the order of their columns: `shop/front` and `evil/front`,
/// whose certificates prove them; `legacy/old` in clear, known by its address; the outside.
const COLUMNS: [Who; 4] = [Who::Front, Who::Evil, Who::Legacy, Who::Outside];

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Who {
    Front,
    Evil,
    Legacy,
    Outside,
    /// A federated domain's `shop/front`.
    Partner,
}

pub(super) fn domain() -> TrustDomain {
    TrustDomain::parse("cluster.local").unwrap()
}

fn pod(namespace: &str, name: &str, account: &str, ip: &str) -> String {
    format!(
        "---\napiVersion: v1\nkind: Pod\nmetadata: {{name: {name}, namespace: {namespace}, uid: \
         {namespace}-{name}, labels: {{app: {name}}}}}\nspec: {{nodeName: n, serviceAccountName: \
         {account}, containers: []}}\nstatus: {{phase: Running, podIPs: [{{ip: {ip}}}]}}\n"
    )
}

fn namespace(name: &str, labels: &str) -> String {
    format!(
        "---\napiVersion: v1\nkind: Namespace\nmetadata: {{name: {name}, labels: {{{labels}}}}}\n"
    )
}

/// `shop` with these labels, with pods `db` (10.0.0.1), `front` and `web`; `evil` permissive;
/// `legacy` off; and `more`.
pub(super) fn world_with(shop: &str, more: &str) -> World {
    let text = [
        namespace("shop", shop),
        namespace("evil", "signet.dev/mode: permissive"),
        namespace("legacy", ""),
        pod("shop", "db", "db", "10.0.0.1"),
        pod("shop", "web", "web", "10.0.0.5"),
        pod("shop", "front", "front", "10.0.0.2"),
        pod("evil", "front", "front", "10.0.0.3"),
        pod("legacy", "old", "old", "10.0.0.4"),
        more.to_owned(),
    ]
    .concat();
    let mut manifests = Manifests::default();
    manifests.add(Path::new("t.yaml"), &text, ROOT_NAMESPACE).unwrap();
    manifests.world(&SourceParams::new(domain()), Arc::default())
}

pub(super) fn world(more: &str) -> World {
    world_with("signet.dev/mode: permissive", more)
}

/// An AuthorizationPolicy of `shop` with this spec.
pub(super) fn authorization(name: &str, spec: &str) -> String {
    authorization_in("shop", name, "", spec)
}

pub(super) fn authorization_in(space: &str, name: &str, annotations: &str, spec: &str) -> String {
    format!(
        "---\napiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {{name: \
         {name}, namespace: {space}, annotations: {{{annotations}}}}}\nspec: {spec}\n"
    )
}

pub(super) fn ask_for(world: &World, who: Who, to: &str, port: u16, protocol: u8) -> Answer {
    let id = |text: &str| Some(SpiffeId::parse(text).unwrap());
    let at = |ip: &str| Some(ip.parse().unwrap());
    let from = match who {
        Who::Front => {
            From { identity: id("spiffe://cluster.local/ns/shop/sa/front"), address: None }
        }
        Who::Evil => {
            From { identity: id("spiffe://cluster.local/ns/evil/sa/front"), address: None }
        }
        Who::Legacy => From { identity: None, address: at("10.0.0.4") },
        Who::Outside => From { identity: None, address: at("192.0.2.9") },
        Who::Partner => {
            From { identity: id("spiffe://partner.test/ns/shop/sa/front"), address: None }
        }
    };
    let (namespace, name) = to.split_once('/').unwrap();
    let question = Question {
        from,
        to: ObjectName { namespace: namespace.into(), name: name.into() },
        port,
        protocol,
        plaintext: false,
        request: None,
    };
    let answer = check(world, &Setting::default(), &question).unwrap();
    for side in &answer.sides {
        // Where policy was asked, the kernel's word and the evaluation's are one.
        if let Some(explanation) = &side.explanation {
            assert_eq!(side.reason, explanation.outcome.reason, "{side:?}");
        }
    }
    answer
}

pub(super) fn ask(world: &World, who: Who, port: u16) -> Answer {
    ask_for(world, who, "shop/db", port, proto::TCP)
}

/// `A`llowed, by a `D`ENY, `N`o match, `U`nsupported, `P`laintext refused; in lower case
/// where it is only reported.
pub(super) fn letter(answer: &Answer) -> char {
    let letter = match answer.reason {
        Reason::Allowed => 'A',
        Reason::PolicyDeny => 'D',
        Reason::PolicyNoMatch => 'N',
        Reason::PolicyUnsupported => 'U',
        Reason::PlaintextRefused => 'P',
        _ => '?',
    };
    if answer.verdict == Verdict::Audit { letter.to_ascii_lowercase() } else { letter }
}

/// The four columns at a port.
pub(super) fn row(world: &World, port: u16) -> String {
    COLUMNS.iter().map(|who| letter(&ask(world, *who, port))).collect()
}

#[test]
fn the_four_that_dial_are_known_as_they_should_be() {
    let world = world("");
    for (who, tunnelled) in
        [(Who::Front, true), (Who::Evil, true), (Who::Legacy, false), (Who::Outside, false)]
    {
        assert_eq!(ask(&world, who, 80).tunnelled, tunnelled, "{who:?}");
    }
    assert_eq!(row(&world, 80), "AAAA");
    assert_eq!(row(&world_with("signet.dev/mode: strict", ""), 80), "AAPP");
    assert_eq!(row(&world_with("signet.dev/mode: observe", ""), 80), "aapp".replace("aa", "AA"));
    assert_eq!(row(&world_with("", ""), 80), "AAAA");
    assert_eq!(
        row(&world_with("signet.dev/mode: permissive, signet.dev/default: deny", ""), 80),
        "NNNN"
    );
}

#[test]
fn what_is_no_pod_is_told() {
    let world = world("");
    let question = Question {
        from: From { identity: None, address: None },
        to: ObjectName { namespace: "shop".into(), name: "nobody".into() },
        port: 1,
        protocol: proto::TCP,
        plaintext: false,
        request: None,
    };
    let error = check(&world, &Setting::default(), &question).unwrap_err();
    assert!(error.to_string().contains("no pod shop/nobody"), "{error}");
}

#[test]
fn enforcement_off_and_audit_override_everything() {
    let world =
        world_with("signet.dev/mode: strict", &authorization("p", "{action: DENY, rules: [{}]}"));
    let question = |who: &str| Question {
        from: From { identity: None, address: Some(who.parse().unwrap()) },
        to: ObjectName { namespace: "shop".into(), name: "db".into() },
        port: 80,
        protocol: proto::TCP,
        plaintext: false,
        request: None,
    };
    let with = |enforcement, who| {
        let setting = Setting { enforcement, ..Setting::default() };
        check(&world, &setting, &question(who)).unwrap()
    };
    for who in ["10.0.0.2", "192.0.2.9"] {
        assert_eq!(with(enforcement::ENFORCE, who).verdict, Verdict::Dropped);
        assert_eq!(with(enforcement::AUDIT, who).verdict, Verdict::Audit);
        let off = with(enforcement::OFF, who);
        assert_eq!((off.verdict, off.reason), (Verdict::Forwarded, Reason::Allowed));
    }
}
