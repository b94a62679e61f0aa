//! `IdentityPolicy` and `ClusterIdentityPolicy` (`signet.dev/v1alpha1`) → the model.
//!
//! Strict: a field that nobody reads, an empty list or nothing where a value belongs, a
//! pattern that could never match are faults of the object, never silently "everybody".
//!
//! ```yaml
//! apiVersion: signet.dev/v1alpha1
//! kind: IdentityPolicy
//! metadata: {name: payments-callers, namespace: shop}
//! spec:
//!   selector: {matchLabels: {app: payments}}   # absent: every pod of the namespace
//!   action: Allow                              # Allow (default), Deny, Audit
//!   ingress:                                   # rules are ORed; [] matches nothing
//!     - from:                                  # absent: everybody; entries are ORed
//!         - serviceAccounts: [frontend]        # fields are ANDed, values ORed
//!       ports: [{port: 8080, protocol: TCP}]   # absent: every port
//!       http:                                  # absent: every request, and what is not HTTP
//!         - methods: [POST]
//!           paths: [/api/v1/payments]
//! ```
//!
//! What `http`, `headers`, `claims` and a peer's `requestPrincipals` ask of HTTP requests is
//! judged request by request ([`super::request`]); they mean what they mean in Istio's
//! AuthorizationPolicy.
//!
//! A ClusterIdentityPolicy has no namespace: its `selector.namespaces` says where it holds
//! (absent: everywhere), and service accounts and services are written `namespace/name`.

mod requests;
pub mod schema;

use std::{collections::BTreeMap, sync::Arc};

use signet_ebpf::abi::proto;

use super::model::{Action, Destination, Peer, Policy, PolicyName, Ports, Rule, Selector};
use crate::{
    config::{
        values::parse_range,
        yaml::{Fault, Node, shorten, unknown_field},
    },
    spiffe::SpiffeId,
};

/// The group and version read here.
pub const API_VERSION: &str = "signet.dev/v1alpha1";
/// The kind of a namespace's policies.
pub const KIND: &str = "IdentityPolicy";
/// The kind of the cluster's.
pub const CLUSTER_KIND: &str = "ClusterIdentityPolicy";

/// Fields of `spec`.
const SPEC: &[&str] = &["selector", "action", "ingress", "egress"];
/// Fields of `selector`; the last one is a ClusterIdentityPolicy's.
const SELECTOR: &[&str] = &["matchLabels", "namespaces"];
/// Fields of a rule, besides `from` or `to`; the first three are of `ingress` alone.
const RULE: &[&str] = &["http", "headers", "claims", "ports", "notPorts", "unauthenticated"];
/// Fields of an entry of `http`.
const HTTP: &[&str] = &["methods", "notMethods", "paths", "notPaths", "hosts", "notHosts"];
/// Fields of an entry of `headers` and of `claims`, besides what names it.
const MATCH: &[&str] = &["values", "notValues"];
/// Fields of an entry of `ports`.
const PORTS: &[&str] = &["port", "endPort", "protocol"];
/// Fields of an entry of `from` and `to`; the first two are of `from` alone, the last one is
/// of `to` alone.
const PEER: &[&str] = &[
    "requestPrincipals",
    "notRequestPrincipals",
    "identities",
    "notIdentities",
    "namespaces",
    "notNamespaces",
    "serviceAccounts",
    "notServiceAccounts",
    "ipBlocks",
    "notIpBlocks",
    "trustDomains",
    "notTrustDomains",
    "services",
];

/// Rules of one direction.
const MAX_RULES: usize = 64;
/// Entries of `from` or `to`.
const MAX_PEERS: usize = 64;
/// Values of one field.
const MAX_VALUES: usize = 256;
/// Entries of `ports` or `notPorts`.
const MAX_PORTS: usize = 64;
/// Entries of `http`, `headers` or `claims`.
const MAX_REQUESTS: usize = 32;
/// Characters of a value that requests are compared with.
const MAX_CHARS: usize = 1024;
/// Names in the path of a claim.
const MAX_CLAIM_PATH: usize = 16;
/// Labels of a selector.
const MAX_LABELS: usize = 32;

/// Reads one policy object.
///
/// # Errors
///
/// The first field that is unknown, missing or holds what it may not.
pub fn read(object: &Node) -> Result<Policy, Fault> {
    let (mut kind, mut metadata, mut spec) = (None, None, None);
    fields(
        object,
        &["apiVersion", "kind", "metadata", "spec", "status"],
        |field, node| match field {
            "apiVersion" if node.text()? != API_VERSION => {
                Err(node.fault(format!("{} is not served; write {API_VERSION}", node.describe())))
            }
            "kind" => {
                kind = Some(match node.text()? {
                    KIND => KIND,
                    CLUSTER_KIND => CLUSTER_KIND,
                    _ => {
                        return Err(node.fault(format!(
                            "{} is not a kind of {API_VERSION}; write {KIND} or {CLUSTER_KIND}",
                            node.describe()
                        )));
                    }
                });
                Ok(())
            }
            "metadata" => {
                metadata = Some(node);
                Ok(())
            }
            "spec" => {
                spec = Some(node);
                Ok(())
            }
            _ => Ok(()),
        },
    )?;
    let metadata = metadata
        .ok_or_else(|| object.fault("missing; give name and namespace").within("metadata"))?;
    let name = read_name(metadata, kind.unwrap_or(KIND)).map_err(|f| f.within("metadata"))?;
    let spec =
        spec.ok_or_else(|| object.fault("missing; write action and rules").within("spec"))?;
    read_spec(name, spec).map_err(|fault| fault.within("spec"))
}

fn read_name(metadata: &Node, kind: &'static str) -> Result<PolicyName, Fault> {
    let part = |field: &str, most: usize| -> Result<Arc<str>, Fault> {
        let node = metadata
            .get(field)
            .ok_or_else(|| metadata.fault("missing; policies are namespaced").within(field))?;
        let text = node.text().map_err(|e| e.within(field))?;
        if !is_dns_name(text, most) {
            return Err(node.fault(not_a_name(text, most)).within(field));
        }
        Ok(text.into())
    };
    metadata.fields()?;
    let namespace = match (kind == CLUSTER_KIND, metadata.get("namespace")) {
        (true, Some(node)) => {
            return Err(node
                .fault(format!("a {CLUSTER_KIND} has none; leave it out"))
                .within("namespace"));
        }
        (true, None) => "".into(),
        (false, _) => part("namespace", 63)?,
    };
    Ok(PolicyName { kind: kind.into(), namespace, name: part("name", 253)? })
}

fn read_spec(name: PolicyName, spec: &Node) -> Result<Policy, Fault> {
    let is_cluster = *name.kind == *CLUSTER_KIND;
    let selector = if is_cluster { Selector::default() } else { Selector::of(&name.namespace) };
    let mut policy = Policy::new(name, selector, Action::Allow);
    let namespace = policy.name.namespace.clone();
    fields(spec, SPEC, |field, node| {
        match field {
            "selector" => {
                (policy.selector.labels, policy.selector.among) = read_selector(node, is_cluster)?;
            }
            "action" => policy.action = read_action(node)?,
            "ingress" => {
                policy.governs_ingress = true;
                policy.ingress = node.list(MAX_RULES, |n| read_rule(n, "from", &namespace))?;
            }
            _ => {
                policy.governs_egress = true;
                policy.egress = node.list(MAX_RULES, |n| read_rule(n, "to", &namespace))?;
            }
        }
        Ok(())
    })?;
    if !policy.governs_ingress && !policy.governs_egress {
        return Err(spec.fault(
            "neither ingress nor egress; write rules, or ingress: [] for an Allow that lets \
             nothing in",
        ));
    }
    Ok(policy)
}

fn read_action(node: &Node) -> Result<Action, Fault> {
    match node.text()? {
        "Allow" => Ok(Action::Allow),
        "Deny" => Ok(Action::Deny),
        "Audit" => Ok(Action::Audit),
        _ => {
            Err(node
                .fault(format!("{} is not an action; write Allow, Deny or Audit", node.describe())))
        }
    }
}

/// Labels, and of a cluster's policy patterns of namespaces.
#[allow(clippy::type_complexity, reason = "the two fields of a selector")]
fn read_selector(
    node: &Node,
    is_cluster: bool,
) -> Result<(BTreeMap<Arc<str>, Arc<str>>, Vec<Arc<str>>), Fault> {
    let (mut labels, mut among) = (BTreeMap::new(), Vec::new());
    fields(node, known_selector(is_cluster), |field, node| {
        if field == "namespaces" {
            among = filled(node, MAX_VALUES, read_namespace)?;
            return Ok(());
        }
        let entries = node.fields()?;
        if entries.len() > MAX_LABELS {
            return Err(node.fault(format!("{} labels; {MAX_LABELS} is the most", entries.len())));
        }
        for field in entries {
            let value = field.node.text().map_err(|e| e.within(shorten(&field.name)))?;
            labels.insert(field.name.as_str().into(), value.into());
        }
        Ok(())
    })?;
    Ok((labels, among))
}

fn read_rule(rule: &Node, peers: &'static str, namespace: &str) -> Result<Rule, Fault> {
    let mut read = Rule::default();
    let mut to = Destination::default();
    let mut requests = Vec::new();
    let is_egress = peers == "to";
    let known: Vec<&str> = std::iter::once(peers).chain(known_rule(is_egress)).collect();
    fields(rule, &known, |field, node| {
        match field {
            "http" => requests = filled(node, MAX_REQUESTS, requests::operation)?,
            "headers" => read.when.extend(filled(node, MAX_REQUESTS, requests::header)?),
            "claims" => read.when.extend(filled(node, MAX_REQUESTS, requests::claim)?),
            "ports" => to.ports = filled(node, MAX_PORTS, read_ports)?,
            "notPorts" => to.not_ports = filled(node, MAX_PORTS, read_ports)?,
            "unauthenticated" => read.unauthenticated = node.boolean()?,
            _ => read.peers = filled(node, MAX_PEERS, |n| read_peer(n, namespace, is_egress))?,
        }
        Ok(())
    })?;
    if requests.is_empty() && to != Destination::default() {
        read.to.push(to);
    } else {
        let each = requests.into_iter().map(|operation| Destination { operation, ..to.clone() });
        read.to.extend(each);
    }
    Ok(read)
}

fn read_ports(node: &Node) -> Result<Ports, Fault> {
    let (mut first, mut last, mut protocol) = (None, None, None);
    fields(node, PORTS, |field, node| {
        let port = || node.number(1, u64::from(u16::MAX)).map(|n| n as u16);
        match field {
            "port" => first = Some(port()?),
            "endPort" => last = Some((port()?, node)),
            _ => {
                protocol = Some(match node.text()? {
                    "TCP" => proto::TCP,
                    "UDP" => proto::UDP,
                    _ => {
                        return Err(node.fault(format!(
                            "{} is not a protocol with ports here; write TCP or UDP",
                            node.describe()
                        )));
                    }
                });
            }
        }
        Ok(())
    })?;
    match (first, last) {
        (None, Some((_, node))) => Err(node.fault("given without port").within("endPort")),
        (None, None) if protocol.is_none() => {
            Err(node.fault("an empty entry; give port or protocol"))
        }
        (None, None) => Ok(Ports { first: 0, last: u16::MAX, protocol }),
        (Some(first), None) => Ok(Ports { first, last: first, protocol }),
        (Some(first), Some((last, node))) if last < first => {
            Err(node.fault(format!("{last} is below port {first}")).within("endPort"))
        }
        (Some(first), Some((last, _))) => Ok(Ports { first, last, protocol }),
    }
}

fn read_peer(peer: &Node, namespace: &str, is_egress: bool) -> Result<Peer, Fault> {
    let mut read = Peer::default();
    fields(peer, known_peer(is_egress), |field, node| {
        match field {
            "identities" => read.identities = filled(node, MAX_VALUES, read_identity)?,
            "notIdentities" => read.not_identities = filled(node, MAX_VALUES, read_identity)?,
            "namespaces" => read.namespaces = filled(node, MAX_VALUES, read_namespace)?,
            "notNamespaces" => read.not_namespaces = filled(node, MAX_VALUES, read_namespace)?,
            "serviceAccounts" => {
                read.service_accounts = filled(node, MAX_VALUES, |n| read_account(n, namespace))?;
            }
            "notServiceAccounts" => {
                read.not_service_accounts =
                    filled(node, MAX_VALUES, |n| read_account(n, namespace))?;
            }
            "trustDomains" => read.trust_domains = filled(node, MAX_VALUES, read_domain)?,
            "notTrustDomains" => read.not_trust_domains = filled(node, MAX_VALUES, read_domain)?,
            "services" => {
                read.services = filled(node, MAX_VALUES, |n| read_service(n, namespace))?;
            }
            "requestPrincipals" => {
                read.request.principals = filled(node, MAX_VALUES, requests::principal)?;
            }
            "notRequestPrincipals" => {
                read.request.not_principals = filled(node, MAX_VALUES, requests::principal)?;
            }
            "ipBlocks" => read.ip_blocks = filled(node, MAX_VALUES, read_block)?,
            _ => read.not_ip_blocks = filled(node, MAX_VALUES, read_block)?,
        }
        Ok(())
    })?;
    if read == Peer::default() {
        return Err(peer.fault("an empty entry; leave the list out to mean everybody"));
    }
    Ok(read)
}

/// Only what is dialled has a Service, only what is received has an end user.
fn known_peer(is_egress: bool) -> &'static [&'static str] {
    if is_egress { &PEER[2..] } else { &PEER[..PEER.len() - 1] }
}

/// Requests are judged where they arrive.
fn known_rule(is_egress: bool) -> impl Iterator<Item = &'static str> {
    RULE.iter().copied().skip(if is_egress { 3 } else { 0 })
}

/// Only a cluster's policy chooses namespaces.
fn known_selector(is_cluster: bool) -> &'static [&'static str] {
    if is_cluster { SELECTOR } else { &SELECTOR[..SELECTOR.len() - 1] }
}

/// A SPIFFE ID, `prefix*`, `*suffix` or `*`.
fn read_identity(node: &Node) -> Result<Arc<str>, Fault> {
    let text = node.text()?;
    let shown = shorten(text);
    let is_path = |c: char| c.is_ascii_alphanumeric() || "./-_".contains(c);
    if let Some(suffix) = text.strip_prefix('*') {
        // A suffix may reach back over the trust domain, to `://` at most.
        if suffix.chars().all(|c| is_path(c) || c == ':') && text.len() <= 2048 {
            return Ok(text.into());
        }
        return Err(node.fault(format!(
            "{shown:?} can never match; behind a leading * there are only a-z, A-Z, 0-9 and ./-_"
        )));
    }
    if !text.starts_with("spiffe://") {
        return Err(node.fault(format!(
            "{shown:?} is not a SPIFFE ID; it begins with spiffe:// (or with * for a suffix)"
        )));
    }
    if let Some(prefix) = text.strip_suffix('*') {
        let rest = prefix.strip_prefix("spiffe://").unwrap_or_default();
        let (domain, path) = rest.split_once('/').unwrap_or((rest, ""));
        let domain_fine = domain.len() <= 255
            && domain.chars().all(|c| is_path(c) && c != '/' && !c.is_ascii_uppercase())
            && !(domain.is_empty() && rest.contains('/'));
        if domain_fine && path.chars().all(is_path) && text.len() <= 2048 {
            return Ok(text.into());
        }
        return Err(node.fault(format!(
            "{shown:?} can never match; before the * there is the beginning of a SPIFFE ID, its \
             trust domain in lower case"
        )));
    }
    if text.contains('*') {
        return Err(node.fault(format!("{shown:?} has a * inside; it may begin or end with one")));
    }
    match SpiffeId::parse(text) {
        Ok(id) => Ok(id.as_str().into()),
        Err(error) => Err(node.fault(format!(
            "{shown:?} is not a SPIFFE ID ({error}); write it like \
             spiffe://cluster.local/ns/shop/sa/frontend"
        ))),
    }
}

/// A namespace, `prefix*`, `*suffix` or `*`.
fn read_namespace(node: &Node) -> Result<Arc<str>, Fault> {
    let text = node.text()?;
    let bare = match text.strip_prefix('*') {
        Some(suffix) => suffix,
        None => text.strip_suffix('*').unwrap_or(text),
    };
    let fine = (text.len() > bare.len() || !bare.is_empty())
        && bare.len() <= 63
        && bare.bytes().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || c == b'-');
    if !fine {
        return Err(node.fault(format!(
            "{:?} is not a namespace; write a name, prefix*, *suffix or *",
            shorten(text)
        )));
    }
    Ok(text.into())
}

/// A trust domain, `prefix*`, `*suffix` or `*`.
fn read_domain(node: &Node) -> Result<Arc<str>, Fault> {
    let text = node.text()?;
    let bare = match text.strip_prefix('*') {
        Some(suffix) => suffix,
        None => text.strip_suffix('*').unwrap_or(text),
    };
    let fine = !text.is_empty()
        && bare.len() <= 255
        && bare.bytes().all(|c| {
            c.is_ascii_lowercase() || c.is_ascii_digit() || matches!(c, b'.' | b'-' | b'_')
        });
    if !fine {
        return Err(node.fault(format!(
            "{:?} is not a trust domain; write a name, prefix*, *suffix or *",
            shorten(text)
        )));
    }
    Ok(text.into())
}

/// `name` (in the policy's namespace) or `namespace/name`.
fn read_account(node: &Node, namespace: &str) -> Result<(Arc<str>, Arc<str>), Fault> {
    read_named(node, namespace, "service account")
}

fn read_service(node: &Node, namespace: &str) -> Result<(Arc<str>, Arc<str>), Fault> {
    read_named(node, namespace, "Service")
}

fn read_named(node: &Node, namespace: &str, what: &str) -> Result<(Arc<str>, Arc<str>), Fault> {
    let text = node.text()?;
    let (space, name) = text.split_once('/').unwrap_or((namespace, text));
    if !is_dns_name(space, 63) || !is_dns_name(name, 253) {
        let forms = if namespace.is_empty() { "namespace/name" } else { "name or namespace/name" };
        return Err(
            node.fault(format!("{:?} is not a {what}; write {forms}, without *", shorten(text)))
        );
    }
    Ok((space.into(), name.into()))
}

fn read_block(node: &Node) -> Result<ipnet::IpNet, Fault> {
    parse_range(node.text()?).map_err(|message| node.fault(message))
}

/// A list that is not empty: in a policy "no entry" must not come to mean "everybody".
fn filled<T>(
    node: &Node,
    most: usize,
    read: impl FnMut(&Node) -> Result<T, Fault>,
) -> Result<Vec<T>, Fault> {
    let values = node.list(most, read)?;
    if values.is_empty() {
        return Err(node.fault("an empty list; give an entry or leave the field out"));
    }
    Ok(values)
}

/// As [`Node::known_fields`], and a field without a value is a fault, too.
fn fields<'a>(
    node: &'a Node,
    known: &[&str],
    mut read: impl FnMut(&str, &'a Node) -> Result<(), Fault>,
) -> Result<(), Fault> {
    for field in node.fields()? {
        if !known.contains(&field.name.as_str()) {
            return Err(unknown_field(field, known));
        }
        if field.node.is_null() && field.name != "status" {
            return Err(Fault::new(field.line, "no value; give one or leave the field out")
                .within(&field.name));
        }
        read(&field.name, &field.node).map_err(|fault| fault.within(&field.name))?;
    }
    Ok(())
}

/// True for a name as Kubernetes takes it: lower-case letters, digits, `-` and, between them, `.`.
pub fn is_dns_name(text: &str, most: usize) -> bool {
    let label = |label: &str| {
        !label.is_empty()
            && !label.starts_with('-')
            && !label.ends_with('-')
            && label.bytes().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || c == b'-')
    };
    // A namespace (63) is one label; other names may be several.
    text.len() <= most && (most > 63 || !text.contains('.')) && text.split('.').all(label)
}

/// The fault of a text for which [`is_dns_name`] is false.
pub fn not_a_name(text: &str, most: usize) -> String {
    format!("{:?} is not a name; write at most {most} characters a-z, 0-9 and -", shorten(text))
}

#[cfg(test)]
mod tests;
