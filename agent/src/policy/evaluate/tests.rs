use super::*;
use crate::{
    config::yaml::parse_one,
    policy::{model::PolicyName, native},
};

fn domain() -> TrustDomain {
    TrustDomain::parse("cluster.local").unwrap()
}

/// Policies of namespace `shop` as written, named p0, p1, …
fn policies(specs: &[&str]) -> Vec<Arc<Policy>> {
    specs
        .iter()
        .enumerate()
        .map(|(index, spec)| {
            let text = format!(
                "apiVersion: signet.dev/v1alpha1\nkind: IdentityPolicy\nmetadata: {{name: \
                 p{index}, namespace: shop}}\nspec: {spec}\n"
            );
            Arc::new(native::read(&parse_one(&text).unwrap().unwrap()).unwrap())
        })
        .collect()
}

#[derive(Clone, Copy)]
enum Who {
    Nobody,
    Address(&'static str),
    Proven(&'static str),
}
use Who::{Address, Nobody, Proven};

const FRONT: &str = "spiffe://cluster.local/ns/shop/sa/front";
const EVIL: &str = "spiffe://cluster.local/ns/evil/sa/front";
const PARTNER: &str = "spiffe://partner.test/ns/shop/sa/front";

fn judge_in(
    direction: Direction,
    policies: &[Arc<Policy>],
    default_deny: bool,
    who: Who,
    ip: &str,
    port: u16,
    protocol: u8,
) -> (Reason, Option<String>) {
    let id = match who {
        Nobody => None,
        Address(id) | Proven(id) => Some(SpiffeId::parse(id).unwrap()),
    };
    let peer = match (who, &id) {
        (Address(_), Some(id)) => PeerIdentity::Address(id),
        (Proven(_), Some(id)) => PeerIdentity::Authenticated(id),
        _ => PeerIdentity::Unknown,
    };
    let facts = FlowFacts {
        direction,
        trust_domain: &domain(),
        aliases: &[],
        peer,
        peer_ip: ip.parse().unwrap(),
        local_ips: &[],
        port,
        protocol,
    };
    let outcome = evaluate(policies, default_deny, &facts);
    (outcome.reason, outcome.policy.map(|p| p.name.name.to_string()))
}

fn judge(specs: &[&str], who: Who) -> Reason {
    judge_in(Direction::Ingress, &policies(specs), false, who, "10.0.0.1", 80, 6).0
}

use Reason::{Allowed, PolicyDeny, PolicyNoMatch, PolicyUnsupported};

#[test]
fn deny_goes_before_allow_before_the_default() {
    let deny = "{action: Deny, ingress: [{from: [{namespaces: [evil]}]}]}";
    let allow = "{action: Allow, ingress: [{from: [{namespaces: [evil, shop]}]}]}";
    let all = policies(&[allow, deny]);
    let judged = |who| {
        let (reason, policy) = judge_in(Direction::Ingress, &all, false, who, "10.0.0.1", 80, 6);
        (reason, policy.unwrap_or_default())
    };
    assert_eq!(judged(Proven(EVIL)), (PolicyDeny, "p1".into()));
    assert_eq!(judged(Proven(FRONT)), (Allowed, "p0".into()));
    assert_eq!(judged(Nobody), (PolicyNoMatch, "p0".into()));
    assert_eq!(judge(&[deny], Proven(FRONT)), Allowed);
    // The other direction is not governed, unless the default is deny.
    let egress = |default| judge_in(Direction::Egress, &all, default, Nobody, "10.0.0.1", 80, 6);
    assert_eq!(egress(false), (Allowed, None));
    assert_eq!(egress(true), (PolicyNoMatch, None));
}

#[test]
fn empty_shapes() {
    assert_eq!(judge(&["{action: Allow, ingress: []}"], Proven(FRONT)), PolicyNoMatch);
    assert_eq!(judge(&["{action: Deny, ingress: []}"], Proven(FRONT)), Allowed);
    assert_eq!(judge(&["{action: Allow, ingress: [{}]}"], Nobody), Allowed);
    assert_eq!(judge(&["{action: Deny, ingress: [{}]}"], Nobody), PolicyDeny);
    assert_eq!(judge(&["{action: Deny, egress: [{}]}"], Nobody), Allowed);
}

#[test]
fn an_identity_known_by_its_address_denies_but_does_not_allow() {
    let fields = ["namespaces: [shop]", "serviceAccounts: [front]", "identities: ['*/sa/front']"];
    for field in fields {
        let rule = format!("ingress: [{{from: [{{{field}}}]");
        let allow = format!("{{action: Allow, {rule}}}]}}");
        let deny = format!("{{action: Deny, {rule}}}]}}");
        let open = format!("{{action: Allow, {rule}, unauthenticated: true}}]}}");
        assert_eq!(judge(&[&allow], Proven(FRONT)), Allowed, "{field}");
        assert_eq!(judge(&[&allow], Address(FRONT)), PolicyNoMatch, "{field}");
        assert_eq!(judge(&[&open], Address(FRONT)), Allowed, "{field}");
        assert_eq!(judge(&[&open], Nobody), PolicyNoMatch, "{field}");
        assert_eq!(judge(&[&deny], Address(FRONT)), PolicyDeny, "{field}");
        assert_eq!(judge(&[&deny], Nobody), Allowed, "{field}");
    }
    // An ALLOW by address block alone needs no identity.
    let block = "{action: Allow, ingress: [{from: [{ipBlocks: [10.0.0.0/8]}]}]}";
    assert_eq!(judge(&[block], Address(FRONT)), Allowed);
    assert_eq!(judge(&[block], Nobody), Allowed);
}

#[test]
fn an_address_averts_no_deny_and_opens_no_negative_allow() {
    let deny = "{action: Deny, ingress: [{from: [{notNamespaces: [shop]}]}]}";
    assert_eq!(judge(&[deny], Proven(FRONT)), Allowed);
    assert_eq!(judge(&[deny], Address(FRONT)), PolicyDeny);
    assert_eq!(judge(&[deny], Nobody), PolicyDeny);
    let taken = deny.replace("}]}]}", "}], unauthenticated: true}]}");
    assert_eq!(judge(&[&taken], Address(FRONT)), Allowed);
    // What the pod itself dials is taken as it is.
    let egress = policies(&["{action: Deny, egress: [{to: [{notNamespaces: [shop]}]}]}"]);
    let dial = |who| judge_in(Direction::Egress, &egress, false, who, "10.0.0.1", 80, 6).0;
    assert_eq!(dial(Address(FRONT)), Allowed);
    assert_eq!(dial(Address(EVIL)), PolicyDeny);
    let allow = "{action: Allow, ingress: [{from: [{notNamespaces: [evil]}]}]}";
    assert_eq!(judge(&[allow], Proven(FRONT)), Allowed);
    assert_eq!(judge(&[allow], Address(FRONT)), PolicyNoMatch);
    // Nobody: negative fields are true.
    assert_eq!(judge(&[allow], Nobody), Allowed);
}

#[test]
fn foreign_domains_pass_only_where_they_are_named() {
    assert_eq!(judge(&[], Proven(PARTNER)), PolicyNoMatch);
    assert_eq!(judge(&[], Proven(FRONT)), Allowed);
    let allows = [
        ("ingress: [{}]", PolicyNoMatch),
        ("ingress: [{from: [{namespaces: [shop]}]}]", PolicyNoMatch),
        ("ingress: [{from: [{serviceAccounts: [front]}]}]", PolicyNoMatch),
        ("ingress: [{from: [{identities: ['*']}]}]", PolicyNoMatch),
        ("ingress: [{from: [{identities: ['*/sa/front']}]}]", PolicyNoMatch),
        ("ingress: [{from: [{identities: ['spiffe://partner*']}]}]", PolicyNoMatch),
        ("ingress: [{from: [{identities: ['spiffe://partner.test.evil/*']}]}]", PolicyNoMatch),
        ("ingress: [{from: [{ipBlocks: [10.0.0.0/8]}]}]", PolicyNoMatch),
        ("ingress: [{from: [{identities: ['spiffe://partner.test/*']}]}]", Allowed),
        ("ingress: [{from: [{identities: ['spiffe://partner.test/ns/shop/sa/front']}]}]", Allowed),
        (
            "ingress: [{from: [{identities: ['spiffe://partner.test/*'], notIdentities: \
             ['*/sa/front']}]}]",
            PolicyNoMatch,
        ),
    ];
    for (rule, wanted) in allows {
        let spec = format!("{{action: Allow, {rule}}}");
        assert_eq!(judge(&[&spec], Proven(PARTNER)), wanted, "{rule}");
    }
    let named = "{action: Allow, ingress: [{from: [{identities: ['spiffe://partner.test/*']}]}]}";
    // Namespaces are our own domain's, in a DENY too; a bare pattern denies everywhere.
    let by_space = "{action: Deny, ingress: [{from: [{namespaces: [shop]}]}]}";
    assert_eq!(judge(&[named, by_space], Proven(PARTNER)), Allowed);
    let by_suffix = "{action: Deny, ingress: [{from: [{identities: ['*/sa/front']}]}]}";
    assert_eq!(judge(&[named, by_suffix], Proven(PARTNER)), PolicyDeny);
    // … and a bare exception from a DENY excepts our own only.
    let except = "{action: Deny, ingress: [{from: [{notIdentities: ['*/sa/front']}]}]}";
    assert_eq!(judge(&[named, except], Proven(PARTNER)), PolicyDeny);
    assert_eq!(judge(&[except], Proven(FRONT)), Allowed);
}

#[test]
fn string_forms_on_each_field_with_and_without_identity() {
    let rows = [
        ("identities: [spiffe://cluster.local/ns/shop/sa/front]", true, false, false),
        ("identities: ['spiffe://cluster.local/ns/shop/*']", true, false, false),
        ("identities: ['*/sa/front']", true, true, false),
        ("identities: ['*']", true, true, false),
        ("notIdentities: ['*']", false, false, true),
        ("notIdentities: ['spiffe://cluster.local/ns/shop/*']", false, true, true),
        ("namespaces: [shop]", true, false, false),
        ("namespaces: ['sh*']", true, false, false),
        ("namespaces: ['*op']", true, false, false),
        ("namespaces: ['*']", true, true, false),
        ("notNamespaces: [shop]", false, true, true),
        ("serviceAccounts: [front]", true, false, false),
        ("serviceAccounts: [evil/front]", false, true, false),
        ("notServiceAccounts: [evil/front]", true, false, true),
        ("namespaces: [shop], notServiceAccounts: [front]", false, false, false),
    ];
    for (field, front, evil, nobody) in rows {
        let spec = format!("{{action: Allow, ingress: [{{from: [{{{field}}}]}}]}}");
        let verdict = |passes| if passes { Allowed } else { PolicyNoMatch };
        assert_eq!(judge(&[&spec], Proven(FRONT)), verdict(front), "{field}");
        assert_eq!(judge(&[&spec], Proven(EVIL)), verdict(evil), "{field}");
        assert_eq!(judge(&[&spec], Nobody), verdict(nobody), "{field}");
    }
}

#[test]
fn ports_protocols_and_addresses() {
    let all = policies(&[
        "{action: Allow, ingress: [{from: [{ipBlocks: [10.0.0.0/8, 'fd00::/16'], notIpBlocks: \
         [10.1.0.0/16]}], ports: [{port: 80, endPort: 90, protocol: TCP}, {port: 53}], notPorts: \
         [{port: 85}]}]}",
    ]);
    let rows = [
        ("10.0.0.1", 80, 6, true),
        ("10.0.0.1", 90, 6, true),
        ("10.0.0.1", 85, 6, false),
        ("10.0.0.1", 91, 6, false),
        ("10.0.0.1", 80, 17, false),
        ("10.0.0.1", 53, 17, true),
        ("10.1.0.1", 80, 6, false),
        ("11.0.0.1", 80, 6, false),
        ("::ffff:10.0.0.1", 80, 6, true),
        ("fd00::1", 80, 6, true),
        ("fd01::1", 80, 6, false),
    ];
    for (ip, port, protocol, passes) in rows {
        let (reason, _) = judge_in(Direction::Ingress, &all, false, Nobody, ip, port, protocol);
        let wanted = if passes { Allowed } else { PolicyNoMatch };
        assert_eq!(reason, wanted, "{ip} {port} {protocol}");
    }
}

#[test]
fn what_is_not_understood_never_widens() {
    let broken = |action, ingress: Vec<Rule>| {
        let name = PolicyName { kind: "K".into(), namespace: "shop".into(), name: "b".into() };
        let selector = super::super::model::Selector::default();
        Arc::new(Policy {
            ingress,
            governs_ingress: true,
            unsupported: vec!["layer 7".into()],
            ..Policy::new(name, selector, action)
        })
    };
    let judged = |policies: &[Arc<Policy>], who| {
        judge_in(Direction::Ingress, policies, false, who, "10.0.0.1", 80, 6).0
    };
    let everybody = || vec![Rule::default()];
    assert_eq!(judged(&[broken(Action::Allow, everybody())], Proven(FRONT)), PolicyUnsupported);
    assert_eq!(judged(&[broken(Action::Deny, vec![])], Proven(FRONT)), PolicyUnsupported);
    assert_eq!(judged(&[broken(Action::Audit, vec![])], Proven(FRONT)), Allowed);
    // Another ALLOW still allows what it lists, and what it does not is its no-match.
    let mut both = policies(&["{action: Allow, ingress: [{from: [{namespaces: [shop]}]}]}"]);
    both.insert(0, broken(Action::Allow, everybody()));
    assert_eq!(judged(&both, Proven(FRONT)), Allowed);
    assert_eq!(judged(&both, Proven(EVIL)), PolicyNoMatch);
}

#[test]
fn audit_reports_and_changes_nothing() {
    let audit = "{action: Audit, ingress: [{from: [{namespaces: [evil]}]}]}";
    let all = policies(&[audit]);
    let facts = |id| FlowFacts {
        direction: Direction::Ingress,
        trust_domain: Box::leak(Box::new(domain())),
        aliases: &[],
        peer: PeerIdentity::Authenticated(id),
        peer_ip: "10.0.0.1".parse().unwrap(),
        local_ips: &[],
        port: 80,
        protocol: 6,
    };
    let evil = SpiffeId::parse(EVIL).unwrap();
    let front = SpiffeId::parse(FRONT).unwrap();
    let outcome = evaluate(&all, false, &facts(&evil));
    assert!(outcome.is_allowed() && outcome.policy.is_none());
    assert_eq!(outcome.audit.unwrap().name.to_string(), "IdentityPolicy/shop/p0");
    assert!(evaluate(&all, false, &facts(&front)).audit.is_none());
}

#[test]
fn an_alias_is_our_own_domain_in_identities_and_in_patterns() {
    let old = TrustDomain::parse("old.example").unwrap();
    let renamed = |id: &str| {
        let path = SpiffeId::parse(id).unwrap().path().to_owned();
        SpiffeId::parse(&format!("spiffe://old.example{path}")).unwrap()
    };
    let judged = |spec: &str, id: &SpiffeId, aliases: &[TrustDomain]| {
        let domain = domain();
        let facts = FlowFacts {
            direction: Direction::Ingress,
            trust_domain: &domain,
            aliases,
            peer: PeerIdentity::Authenticated(id),
            peer_ip: "10.0.0.1".parse().unwrap(),
            local_ips: &[],
            port: 80,
            protocol: 6,
        };
        evaluate(&policies(&[spec]), false, &facts).reason
    };
    let (front, was) = (SpiffeId::parse(FRONT).unwrap(), renamed(FRONT));
    let aliases = std::slice::from_ref(&old);
    let by_namespace = "{ingress: [{from: [{namespaces: [shop]}]}]}";
    assert_eq!(judged(by_namespace, &was, &[]), PolicyNoMatch, "without the alias it is foreign");
    assert_eq!(judged(by_namespace, &was, aliases), Allowed);
    let by_name = |id: &SpiffeId| format!("{{ingress: [{{from: [{{identities: [\"{id}\"]}}]}}]}}");
    for (pattern, peer) in [(&front, &was), (&was, &front), (&was, &was), (&front, &front)] {
        assert_eq!(judged(&by_name(pattern), peer, aliases), Allowed, "{pattern} {peer}");
    }
    assert_eq!(judged(&by_name(&was), &front, &[]), PolicyNoMatch);
    // Neither widens what a DENY spares, nor what another account may.
    let deny = "{action: Deny, ingress: [{from: [{notNamespaces: [shop]}]}]}";
    assert_eq!(judged(deny, &was, aliases), Allowed);
    assert_eq!(judged(&by_name(&front), &renamed(EVIL), aliases), PolicyNoMatch);
    let third = SpiffeId::parse("spiffe://third.example/ns/shop/sa/frontend").unwrap();
    assert_eq!(judged(by_namespace, &third, aliases), PolicyNoMatch);
}

#[test]
fn selectors_choose_pods() {
    let all = crate::policy::model::PolicySet::new(policies(&[
        "{selector: {matchLabels: {app: pay}}, ingress: []}",
        "{ingress: []}",
    ]));
    let labels = |pairs: &[(&str, &str)]| {
        pairs.iter().map(|(k, v)| (Arc::from(*k), Arc::from(*v))).collect()
    };
    let count = |namespace, pairs: &[_]| all.selecting(namespace, &labels(pairs)).len();
    assert_eq!(count("shop", &[("app", "pay"), ("x", "y")]), 2);
    assert_eq!(count("shop", &[("app", "web")]), 1);
    assert_eq!(count("other", &[("app", "pay")]), 0);
}
