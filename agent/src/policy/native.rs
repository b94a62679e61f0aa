//! `IdentityPolicy` (`signet.dev/v1alpha1`) → the model.
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
//! ```

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
/// The kind read here.
pub const KIND: &str = "IdentityPolicy";

/// Rules of one direction.
const MAX_RULES: usize = 64;
/// Entries of `from` or `to`.
const MAX_PEERS: usize = 64;
/// Values of one field.
const MAX_VALUES: usize = 256;
/// Entries of `ports` or `notPorts`.
const MAX_PORTS: usize = 64;
/// Labels of a selector.
const MAX_LABELS: usize = 32;

/// Reads one policy object.
///
/// # Errors
///
/// The first field that is unknown, missing or holds what it may not.
pub fn read(object: &Node) -> Result<Policy, Fault> {
    let mut name = None;
    let mut spec = None;
    fields(
        object,
        &["apiVersion", "kind", "metadata", "spec", "status"],
        |field, node| match field {
            "apiVersion" if node.text()? != API_VERSION => {
                Err(node.fault(format!("{} is not served; write {API_VERSION}", node.describe())))
            }
            "kind" if node.text()? != KIND => Err(node.fault(format!(
                "{} is not a kind of {API_VERSION}; write {KIND}",
                node.describe()
            ))),
            "metadata" => {
                name = Some(read_name(node)?);
                Ok(())
            }
            "spec" => {
                spec = Some(node);
                Ok(())
            }
            _ => Ok(()),
        },
    )?;
    let name =
        name.ok_or_else(|| object.fault("missing; give name and namespace").within("metadata"))?;
    let spec =
        spec.ok_or_else(|| object.fault("missing; write action and rules").within("spec"))?;
    read_spec(name, spec).map_err(|fault| fault.within("spec"))
}

fn read_name(metadata: &Node) -> Result<PolicyName, Fault> {
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
    Ok(PolicyName {
        kind: KIND.into(),
        namespace: part("namespace", 63)?,
        name: part("name", 253)?,
    })
}

fn read_spec(name: PolicyName, spec: &Node) -> Result<Policy, Fault> {
    let selector = Selector { namespace: Some(name.namespace.clone()), labels: BTreeMap::new() };
    let mut policy = Policy::new(name, selector, Action::Allow);
    let namespace = policy.name.namespace.clone();
    fields(spec, &["selector", "action", "ingress", "egress"], |field, node| {
        match field {
            "selector" => policy.selector.labels = read_selector(node)?,
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

fn read_selector(node: &Node) -> Result<BTreeMap<Arc<str>, Arc<str>>, Fault> {
    let mut labels = BTreeMap::new();
    fields(node, &["matchLabels"], |_, node| {
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
    Ok(labels)
}

fn read_rule(rule: &Node, peers: &str, namespace: &str) -> Result<Rule, Fault> {
    let mut read = Rule::default();
    let mut to = Destination::default();
    fields(rule, &[peers, "ports", "notPorts", "unauthenticated"], |field, node| {
        match field {
            "ports" => to.ports = filled(node, MAX_PORTS, read_ports)?,
            "notPorts" => to.not_ports = filled(node, MAX_PORTS, read_ports)?,
            "unauthenticated" => read.unauthenticated = node.boolean()?,
            _ => read.peers = filled(node, MAX_PEERS, |n| read_peer(n, namespace))?,
        }
        Ok(())
    })?;
    if to != Destination::default() {
        read.to.push(to);
    }
    Ok(read)
}

fn read_ports(node: &Node) -> Result<Ports, Fault> {
    let (mut first, mut last, mut protocol) = (None, None, None);
    fields(node, &["port", "endPort", "protocol"], |field, node| {
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

fn read_peer(peer: &Node, namespace: &str) -> Result<Peer, Fault> {
    const FIELDS: &[&str] = &[
        "identities",
        "notIdentities",
        "namespaces",
        "notNamespaces",
        "serviceAccounts",
        "notServiceAccounts",
        "ipBlocks",
        "notIpBlocks",
    ];
    let mut read = Peer::default();
    fields(peer, FIELDS, |field, node| {
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

/// `name` (in the policy's namespace) or `namespace/name`.
fn read_account(node: &Node, namespace: &str) -> Result<(Arc<str>, Arc<str>), Fault> {
    let text = node.text()?;
    let (space, name) = text.split_once('/').unwrap_or((namespace, text));
    if !is_dns_name(space, 63) || !is_dns_name(name, 253) {
        return Err(node.fault(format!(
            "{:?} is not a service account; write name or namespace/name, without *",
            shorten(text)
        )));
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
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::config::yaml::parse_one;

    fn policy(spec: &str) -> Result<Policy, Fault> {
        let text = format!(
            "apiVersion: signet.dev/v1alpha1\nkind: IdentityPolicy\nmetadata: {{name: p, \
             namespace: shop}}\nspec:\n{spec}"
        );
        read(&parse_one(&text).unwrap().unwrap())
    }

    #[test]
    fn a_whole_policy() {
        let policy = policy(
            "  selector: {matchLabels: {app: payments}}
  action: Deny
  ingress:
  - from:
    - identities: ['spiffe://other.test/*', '*/sa/x', '*', spiffe://cluster.local/ns/a/sa/b]
      notNamespaces: [test-*]
      serviceAccounts: [frontend, web/front]
      ipBlocks: [10.0.0.0/8, 'fd00::1', '::ffff:10.1.0.0/112']
    ports: [{port: 80, endPort: 90}, {protocol: UDP}]
    notPorts: [{port: 81, protocol: TCP}]
    unauthenticated: true
  egress: []
",
        )
        .unwrap();
        assert_eq!(policy.action, Action::Deny);
        assert_eq!(policy.selector.labels.len(), 1);
        assert!(policy.governs_ingress && policy.governs_egress && policy.egress.is_empty());
        let rule = &policy.ingress[0];
        assert!(rule.unauthenticated);
        assert_eq!(
            rule.to[0].ports,
            [
                Ports { first: 80, last: 90, protocol: None },
                Ports { first: 0, last: 65535, protocol: Some(17) }
            ]
        );
        let peer = &rule.peers[0];
        assert_eq!(peer.identities.len(), 4);
        assert_eq!(
            peer.service_accounts,
            [("shop".into(), "frontend".into()), ("web".into(), "front".into())]
        );
        let blocks: Vec<String> = peer.ip_blocks.iter().map(ToString::to_string).collect();
        assert_eq!(blocks, ["10.0.0.0/8", "fd00::1/128", "10.1.0.0/16"]);
    }

    #[test]
    fn faults_name_line_field_value_and_remedy() {
        let cases = [
            (
                "  action: Block\n  ingress: []\n",
                5,
                "spec.action: \"Block\" is not an action; write Allow, Deny or Audit",
            ),
            (
                "  ingress:\n  - form: []\n",
                6,
                "spec.ingress[0].form: unknown field; did you mean from?",
            ),
            (
                "  ingress:\n  - from:\n    - identities: [cluster.local/ns/a/sa/b]\n",
                7,
                "spec.ingress[0].from[0].identities[0]: \"cluster.local/ns/a/sa/b\" is not a \
                 SPIFFE ID; it begins with spiffe:// (or with * for a suffix)",
            ),
            (
                "  ingress:\n  - from:\n    - identities: ['spiffe://a/*/b']\n",
                7,
                "spec.ingress[0].from[0].identities[0]: \"spiffe://a/*/b\" has a * inside; it may \
                 begin or end with one",
            ),
            (
                "  ingress:\n  - from:\n",
                6,
                "spec.ingress[0].from: no value; give one or leave the field out",
            ),
            (
                "  ingress:\n  - from: []\n",
                6,
                "spec.ingress[0].from: an empty list; give an entry or leave the field out",
            ),
            (
                "  ingress:\n  - from: [{}]\n",
                6,
                "spec.ingress[0].from[0]: an empty entry; leave the list out to mean everybody",
            ),
            (
                "  ingress:\n  - ports: [{port: 0}]\n",
                6,
                "spec.ingress[0].ports[0].port: the number 0 is not a whole number from 1 to \
                 65535",
            ),
            (
                "  ingress:\n  - ports: [{port: 9, endPort: 8}]\n",
                6,
                "spec.ingress[0].ports[0].endPort: 8 is below port 9",
            ),
            (
                "  ingress:\n  - ports: [{port: 9, protocol: SCTP}]\n",
                6,
                "spec.ingress[0].ports[0].protocol: \"SCTP\" is not a protocol with ports here; \
                 write TCP or UDP",
            ),
            (
                "  egress:\n  - to:\n    - serviceAccounts: ['a/*']\n",
                7,
                "spec.egress[0].to[0].serviceAccounts[0]: \"a/*\" is not a service account; write \
                 name or namespace/name, without *",
            ),
            (
                "  egress:\n  - to:\n    - ipBlocks: [10.0.0.300]\n",
                7,
                "spec.egress[0].to[0].ipBlocks[0]: \"10.0.0.300\" is not an address range; write \
                 it like 10.0.0.0/8 or fd00::/48",
            ),
            (
                "  action: Allow\n",
                5,
                "spec: neither ingress nor egress; write rules, or ingress: [] for an Allow that \
                 lets nothing in",
            ),
        ];
        for (spec, line, wanted) in cases {
            let fault = policy(spec).unwrap_err();
            assert_eq!(fault.to_string(), wanted);
            assert_eq!(fault.line, line, "{wanted}");
        }
    }

    #[test]
    fn limits_hold() {
        let ports = "{port: 1},".repeat(MAX_PORTS);
        assert!(policy(&format!("  ingress: [{{ports: [{ports}]}}]\n")).is_ok());
        let fault = policy(&format!("  ingress: [{{ports: [{ports}{{port: 1}}]}}]\n")).unwrap_err();
        assert_eq!(fault.to_string(), "spec.ingress[0].ports: 65 entries; 64 is the most");
    }

    proptest! {
        #[test]
        fn reading_never_panics(
            spec in "(  |- |ingress:|egress:|from:|to:|ports:|\\[|\\]|\\{|\\}|identities: |port: |\
                     '\\*a'|spiffe://a/b|[0-9]{1,6}|, |\n|namespaces: |unauthenticated: true){0,50}"
        ) {
            if let Ok(Some(node)) = parse_one(&format!("spec:\n{spec}")) {
                let _ = read(&node);
            }
            if let Ok(Some(node)) = parse_one(&format!("  ingress:\n{spec}")) {
                let _ = read_spec(
                    PolicyName { kind: "k".into(), namespace: "n".into(), name: "x".into() },
                    &node,
                );
            }
        }

        #[test]
        fn patterns_never_panic(text in "[*a-z:/.A]{0,40}") {
            let node = Node { line: 1, value: crate::config::yaml::Value::Text(text) };
            let _ = (read_identity(&node), read_namespace(&node), read_account(&node, "n"));
        }
    }
}
