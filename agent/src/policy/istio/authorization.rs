//! `AuthorizationPolicy` → a policy on ingress.

use std::sync::Arc;

use super::{AUTHORIZATION_POLICY, Envelope, Reader, values::Values};
use crate::{
    config::yaml::{Fault, Node, shorten},
    policy::{
        asked::{RequestCondition, RequestKey},
        model::{Action, Condition, Destination, Peer, Policy, Rule, Selector},
    },
};

/// Entries of `rules`, `from` and `to` (the limits of Istio's own schema).
const MAX_ENTRIES: usize = 512;
/// Entries of `when`.
const MAX_WHEN: usize = 128;
/// The annotation of a dry run.
const DRY_RUN: &str = "istio.io/dry-run";

/// Reads one AuthorizationPolicy; one of the namespace `root` is about every namespace.
///
/// # Errors
///
/// The first field that is unknown or of the wrong shape.
pub fn read(object: &Node, root: &str) -> Result<Policy, Fault> {
    let envelope = Envelope::open(object, AUTHORIZATION_POLICY)?;
    let namespace = (*envelope.name.namespace != *root).then(|| envelope.name.namespace.clone());
    let selector = Selector { namespace, ..Selector::default() };
    let mut reader = Authorization {
        reader: Reader::new(),
        namespace: envelope.name.namespace.clone(),
        allow: true,
        policy: Policy::new(envelope.name.clone(), selector, Action::Allow),
    };
    reader.dry_run(&envelope);
    let spec = envelope.spec.unwrap_or(object);
    if let Some(spec) = envelope.spec {
        reader.spec(spec).map_err(|fault| fault.within("spec"))?;
    } else {
        reader.policy.governs_ingress = true;
    }
    reader.explain_shape(spec);
    let mut policy = reader.policy;
    policy.remarks = reader.reader.remarks;
    Ok(policy)
}

struct Authorization {
    reader: Reader,
    namespace: Arc<str>,
    allow: bool,
    policy: Policy,
}

impl Authorization {
    fn dry_run(&mut self, envelope: &Envelope<'_>) {
        let Some(node) = envelope.annotations.and_then(|a| a.get(DRY_RUN)) else { return };
        let inside = std::mem::replace(&mut self.reader.path, vec!["metadata.annotations".into()]);
        match node.text() {
            Ok("true") => {
                self.policy.dry_run = true;
                self.reader.note(node, "a dry run: reported as AUDIT, never enforced");
            }
            Ok("false") => {}
            _ => self.reader.fault(
                node,
                format!(
                    "annotation {DRY_RUN}: {} is not \"true\" or \"false\"; the policy is enforced",
                    node.describe()
                ),
            ),
        }
        self.reader.path = inside;
    }

    fn spec(&mut self, spec: &Node) -> Result<(), Fault> {
        const FIELDS: &[&str] =
            &["selector", "targetRef", "targetRefs", "action", "provider", "rules"];
        // The action says what becomes of what is not understood, wherever it stands.
        let mut custom = None;
        if let Some(node) = spec.get("action") {
            let action = node.text().map_err(|fault| fault.within("action"))?;
            self.policy.action = match action {
                "ALLOW" => Action::Allow,
                "DENY" => Action::Deny,
                "AUDIT" => Action::Audit,
                "CUSTOM" => {
                    custom = Some(node);
                    Action::Deny
                }
                _ => {
                    return Err(node
                        .fault(format!(
                            "{} is not an action; write ALLOW, DENY, AUDIT or CUSTOM",
                            node.describe()
                        ))
                        .within("action"));
                }
            };
            self.allow = self.policy.action == Action::Allow;
        }
        let mut targets = None;
        let mut rules = None;
        let mut labels = None;
        self.reader.fields(spec, FIELDS, |reader, field, node| {
            match field {
                "selector" => labels = Some(reader.selector(node)?),
                "rules" => rules = Some(node),
                "targetRefs" if !node.list(MAX_ENTRIES, |_| Ok(()))?.is_empty() => {
                    targets = Some(node);
                }
                "targetRef" => targets = Some(node),
                "provider" if custom.is_none() => {
                    reader.fault(node, "only CUSTOM has a provider; it is ignored");
                }
                _ => {}
            }
            Ok(())
        })?;
        self.policy.selector.labels = labels.unwrap_or_default();
        if let Some(rules) = rules {
            // With CUSTOM they are read for their form only.
            let said = self.reader.remarks.len();
            let read = self.rules(rules).map_err(|fault| fault.within("rules"))?;
            if custom.is_none() {
                self.policy.ingress = read;
            } else {
                self.reader.remarks.truncate(said);
            }
        }
        if let Some(node) = custom {
            let message = "CUSTOM asks an external authorizer, which is not supported: the pods \
                           that it selects are reached by nobody";
            self.reader.at("action", |reader| reader.fault(node, message));
            self.policy.unsupported.push(message.into());
        }
        if let Some(node) = targets {
            // A waypoint's or gateway's layer 7 enforces it; there it stays open to nobody here.
            let shown = shown_targets(node);
            self.reader.at("targetRefs", |reader| {
                reader.fault(
                    node,
                    format!(
                        "it is about {shown}, where a waypoint or gateway enforces it: not in \
                         force here; write selector to have it enforced on pods"
                    ),
                );
            });
            return Ok(());
        }
        self.policy.governs_ingress = true;
        Ok(())
    }

    /// Says what shapes mean that people get wrong.
    fn explain_shape(&mut self, spec: &Node) {
        let policy = &self.policy;
        if !policy.governs_ingress || !policy.unsupported.is_empty() {
            return;
        }
        match policy.action {
            Action::Allow if policy.ingress.is_empty() => {
                self.reader.note(spec, "an ALLOW without rules: nobody reaches what it selects");
            }
            Action::Deny | Action::Audit if policy.ingress.is_empty() => {
                self.reader.note(spec, "it has no rules and so does nothing");
            }
            _ if policy.ingress.iter().any(Rule::asks_requests) => {
                self.reader.note(
                    spec,
                    "it asks about HTTP requests; what is none, or none that is seen, fails closed",
                );
            }
            _ => {}
        }
    }

    fn rules(&mut self, node: &Node) -> Result<Vec<Rule>, Fault> {
        self.each("rules", node, MAX_ENTRIES, Self::rule)
    }

    /// As [`Reader::each`], for methods of this reader.
    fn each<T>(
        &mut self,
        field: &str,
        node: &Node,
        most: usize,
        mut read: impl FnMut(&mut Self, &Node) -> Result<T, Fault>,
    ) -> Result<Vec<T>, Fault> {
        let mut index = 0;
        self.reader.path.push(field.into());
        let values = node.list(most, |item| {
            self.reader.path.push(format!("[{index}]"));
            let value = read(self, item);
            self.reader.path.pop();
            index += 1;
            value
        });
        self.reader.path.pop();
        values
    }

    fn rule(&mut self, node: &Node) -> Result<Rule, Fault> {
        let mut rule = Rule::default();
        node.known_fields(&["from", "to", "when"], |field, node| {
            match field {
                "from" => {
                    let sources =
                        self.each("from", node, MAX_ENTRIES, |this, n| this.source(n, &mut rule))?;
                    // A clause without entries is no clause; one whose entries can match
                    // nobody matches nobody.
                    let some = !sources.is_empty();
                    rule.peers = sources.into_iter().flatten().collect();
                    rule.never |= some && rule.peers.is_empty();
                }
                "to" => {
                    let operations =
                        self.each("to", node, MAX_ENTRIES, |this, n| this.operation(n, &mut rule))?;
                    let some = !operations.is_empty();
                    rule.to = operations.into_iter().flatten().collect();
                    rule.never |= some && rule.to.is_empty();
                }
                _ => {
                    let conditions =
                        self.each("when", node, MAX_WHEN, |this, n| this.condition(n, &mut rule))?;
                    rule.when = conditions.into_iter().flatten().collect();
                }
            }
            Ok(())
        })?;
        Ok(rule)
    }

    /// What cannot be evaluated: it never widens.
    fn unsupported(&mut self, node: &Node, rule: &mut Rule, what: &str) {
        let effect = match self.policy.action {
            Action::Allow => "its rule lets nobody in",
            Action::Deny => "it counts as matching, so its rule denies whatever the rest covers",
            Action::Audit => "it counts as matching, so its rule reports whatever the rest covers",
        };
        self.reader.fault(node, format!("{what}: {effect}"));
        let mut field = self.reader.path.iter().skip(3).cloned().collect::<Vec<_>>().join(".");
        field = field.replace(".[", "[");
        rule.unsupported.push(format!("{field} {what}"));
    }

    /// Values that may not have been readable.
    fn known<T>(&mut self, node: &Node, rule: &mut Rule, values: Values<T>) -> Vec<T> {
        values.unwrap_or_else(|| {
            self.unsupported(node, rule, "cannot be evaluated");
            Vec::new()
        })
    }

    /// `None` for one that can match nobody.
    fn source(&mut self, entry: &Node, rule: &mut Rule) -> Result<Option<Peer>, Fault> {
        const FIELDS: &[&str] = &[
            "principals",
            "notPrincipals",
            "requestPrincipals",
            "notRequestPrincipals",
            "namespaces",
            "notNamespaces",
            "serviceAccounts",
            "notServiceAccounts",
            "trustDomains",
            "notTrustDomains",
            "ipBlocks",
            "notIpBlocks",
            "remoteIpBlocks",
            "notRemoteIpBlocks",
        ];
        let mut peer = Peer::default();
        let mut said = false;
        entry.known_fields(&["source"], |_, source| {
            self.reader.path.push("source".into());
            source.known_fields(FIELDS, |field, node| {
                self.reader.path.push(field.into());
                said |= !node.list(usize::MAX, |_| Ok(()))?.is_empty();
                let namespace = self.namespace.clone();
                let reader = &mut self.reader;
                match field {
                    "principals" => peer.identities = reader.principals(node)?,
                    "notPrincipals" => peer.not_identities = reader.principals(node)?,
                    "namespaces" => peer.namespaces = reader.namespaces(node)?,
                    "notNamespaces" => peer.not_namespaces = reader.namespaces(node)?,
                    "trustDomains" => peer.trust_domains = reader.trust_domains(node)?,
                    "notTrustDomains" => peer.not_trust_domains = reader.trust_domains(node)?,
                    "serviceAccounts" => {
                        let values = reader.accounts(node, &namespace)?;
                        peer.service_accounts = self.known(node, rule, values);
                    }
                    "notServiceAccounts" => {
                        let values = reader.accounts(node, &namespace)?;
                        peer.not_service_accounts = self.known(node, rule, values);
                    }
                    "ipBlocks" => {
                        let values = reader.blocks(node)?;
                        peer.ip_blocks = self.known(node, rule, values);
                    }
                    "notIpBlocks" => {
                        let values = reader.blocks(node)?;
                        peer.not_ip_blocks = self.known(node, rule, values);
                    }
                    "requestPrincipals" => {
                        peer.request.principals = reader.request_principals(node)?;
                    }
                    "notRequestPrincipals" => {
                        peer.request.not_principals = reader.request_principals(node)?;
                    }
                    "remoteIpBlocks" => {
                        let values = reader.blocks(node)?;
                        peer.request.remote_blocks = self.known(node, rule, values);
                    }
                    _ => {
                        let values = reader.blocks(node)?;
                        peer.request.not_remote_blocks = self.known(node, rule, values);
                    }
                }
                self.reader.path.pop();
                Ok(())
            })?;
            self.reader.path.pop();
            Ok(())
        })?;
        if !said {
            self.reader.fault(entry, "an empty source matches nobody; leave from out to mean all");
            return Ok(None);
        }
        let accounts = !peer.service_accounts.is_empty() || !peer.not_service_accounts.is_empty();
        let others =
            [&peer.identities, &peer.not_identities, &peer.namespaces, &peer.not_namespaces];
        if accounts && others.iter().any(|values| !values.is_empty()) {
            // The API server would refuse it; which of the two is meant nobody knows.
            self.unsupported(
                entry,
                rule,
                "has service accounts beside principals or namespaces, which exclude each other",
            );
            return Ok(Some(Peer {
                ip_blocks: peer.ip_blocks,
                not_ip_blocks: peer.not_ip_blocks,
                request: peer.request,
                ..Peer::default()
            }));
        }
        Ok(Some(peer))
    }

    /// `None` for one that can match nothing.
    fn operation(&mut self, entry: &Node, rule: &mut Rule) -> Result<Option<Destination>, Fault> {
        const FIELDS: &[&str] = &[
            "hosts",
            "notHosts",
            "ports",
            "notPorts",
            "methods",
            "notMethods",
            "paths",
            "notPaths",
        ];
        let mut to = Destination::default();
        let mut said = false;
        entry.known_fields(&["operation"], |_, operation| {
            self.reader.path.push("operation".into());
            operation.known_fields(FIELDS, |field, node| {
                self.reader.path.push(field.into());
                said |= !node.list(usize::MAX, |_| Ok(()))?.is_empty();
                match field {
                    "ports" => {
                        let values = self.reader.ports(node)?;
                        to.ports = self.known(node, rule, values);
                    }
                    "notPorts" => {
                        let values = self.reader.ports(node)?;
                        to.not_ports = self.known(node, rule, values);
                    }
                    "methods" => to.operation.methods = self.reader.methods(node)?,
                    "notMethods" => to.operation.not_methods = self.reader.methods(node)?,
                    "hosts" => to.operation.hosts = self.reader.hosts(node)?,
                    "notHosts" => to.operation.not_hosts = self.reader.hosts(node)?,
                    "paths" => {
                        let values = self.reader.paths(node)?;
                        to.operation.paths = self.known(node, rule, values);
                    }
                    _ => {
                        let values = self.reader.paths(node)?;
                        to.operation.not_paths = self.known(node, rule, values);
                    }
                }
                self.reader.path.pop();
                Ok(())
            })?;
            self.reader.path.pop();
            Ok(())
        })?;
        if !said {
            self.reader.fault(
                entry,
                "an empty operation matches nothing; leave to out to mean every port",
            );
            return Ok(None);
        }
        Ok(Some(to))
    }

    /// `None` for one that counts as holding, or whose rule matches nothing anyhow.
    fn condition(&mut self, entry: &Node, rule: &mut Rule) -> Result<Option<Condition>, Fault> {
        let (mut key, mut values, mut not_values) = (None, None, None);
        entry.known_fields(&["key", "values", "notValues"], |field, node| {
            match field {
                "key" => key = Some(node.text()?),
                "values" => values = Some(node),
                _ => not_values = Some(node),
            }
            if field != "key" && node.list(usize::MAX, |n| n.text().map(drop))?.is_empty() {
                match field {
                    "values" => values = None,
                    _ => not_values = None,
                }
            }
            Ok(())
        })?;
        let key =
            key.ok_or_else(|| entry.fault("missing; write source.ip or another").within("key"))?;
        if values.is_none() && not_values.is_none() {
            self.reader.fault(entry, "neither values nor notValues: its rule matches nothing");
            rule.never = true;
            return Ok(None);
        }
        let mut peer = Peer::default();
        let condition = match key {
            "source.ip" => {
                peer.ip_blocks = self.listed("values", values, rule, Reader::blocks)?;
                peer.not_ip_blocks = self.listed("notValues", not_values, rule, Reader::blocks)?;
                Condition::Peer(Box::new(peer))
            }
            "source.namespace" => {
                let read = |reader: &mut Reader, node: &Node| reader.namespaces(node).map(Some);
                peer.namespaces = self.listed("values", values, rule, read)?;
                peer.not_namespaces = self.listed("notValues", not_values, rule, read)?;
                Condition::Peer(Box::new(peer))
            }
            "source.principal" => {
                let read = |reader: &mut Reader, node: &Node| reader.principals(node).map(Some);
                peer.identities = self.listed("values", values, rule, read)?;
                peer.not_identities = self.listed("notValues", not_values, rule, read)?;
                Condition::Peer(Box::new(peer))
            }
            "destination.ip" => Condition::Local {
                blocks: self.listed("values", values, rule, Reader::blocks)?,
                not_blocks: self.listed("notValues", not_values, rule, Reader::blocks)?,
            },
            "destination.port" => Condition::To(Destination {
                ports: self.listed("values", values, rule, Reader::ports)?,
                not_ports: self.listed("notValues", not_values, rule, Reader::ports)?,
                ..Destination::default()
            }),
            "remote.ip" => {
                let request = &mut peer.request;
                request.remote_blocks = self.listed("values", values, rule, Reader::blocks)?;
                request.not_remote_blocks =
                    self.listed("notValues", not_values, rule, Reader::blocks)?;
                Condition::Peer(Box::new(peer))
            }
            "request.auth.principal" => {
                let read =
                    |reader: &mut Reader, node: &Node| reader.request_principals(node).map(Some);
                peer.request.principals = self.listed("values", values, rule, read)?;
                peer.request.not_principals = self.listed("notValues", not_values, rule, read)?;
                Condition::Peer(Box::new(peer))
            }
            other => match request_key(other) {
                Ok(key) => {
                    let read = |reader: &mut Reader, node: &Node| reader.texts(node).map(Some);
                    Condition::Request(Box::new(RequestCondition {
                        key,
                        values: self.listed("values", values, rule, read)?,
                        not_values: self.listed("notValues", not_values, rule, read)?,
                    }))
                }
                Err(why) => {
                    self.unsupported(entry, rule, &format!("{:?} {why}", shorten(other)));
                    return Ok(None);
                }
            },
        };
        Ok(Some(condition))
    }

    fn listed<T>(
        &mut self,
        field: &str,
        node: Option<&Node>,
        rule: &mut Rule,
        read: impl FnOnce(&mut Reader, &Node) -> Result<Values<T>, Fault>,
    ) -> Result<Vec<T>, Fault> {
        let Some(node) = node else { return Ok(Vec::new()) };
        self.reader.path.push(field.into());
        let values = read(&mut self.reader, node).map_err(|fault| fault.within(field))?;
        let known = self.known(node, rule, values);
        self.reader.path.pop();
        Ok(known)
    }
}

/// The property of a request that a key of `when` names.
fn request_key(key: &str) -> Result<RequestKey, &'static str> {
    match key {
        "request.auth.audiences" => return Ok(RequestKey::Audiences),
        "request.auth.presenter" => return Ok(RequestKey::Presenter),
        "connection.sni" => return Ok(RequestKey::Sni),
        _ => {}
    }
    let within = |prefix: &str| key.strip_prefix(prefix)?.strip_prefix('[')?.strip_suffix(']');
    if let Some(name) = within("request.headers") {
        return name
            .parse()
            .map(RequestKey::Header)
            .map_err(|_| "does not name a header; write it like request.headers[x-tier]");
    }
    if let Some(path) = within("request.auth.claims") {
        let names: Vec<Arc<str>> = path.split("][").map(Into::into).collect();
        if names.iter().all(|name| !name.is_empty() && !name.contains(['[', ']'])) {
            return Ok(RequestKey::Claim(names));
        }
        return Err("does not name a claim; write it like request.auth.claims[realm][role]");
    }
    Err("is not a key that is known here")
}

/// `Service shop/db, Gateway shop/front`.
pub(super) fn shown_targets(node: &Node) -> String {
    let one = |node: &Node| {
        let text = |field: &str| node.get(field).and_then(|n| n.text().ok()).unwrap_or("?");
        format!("{} {}", shorten(text("kind")), shorten(text("name")))
    };
    let several = node.list(16, |n| Ok(one(n)));
    several.map_or_else(|_| one(node), |all| all.join(", "))
}
