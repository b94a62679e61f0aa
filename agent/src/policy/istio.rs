//! Istio's `security.istio.io/v1` and `v1beta1` objects → the model.
//!
//! Semantics: Istio's API documentation of AuthorizationPolicy, PeerAuthentication and
//! RequestAuthentication, what ztunnel makes of flows and Envoy of requests, with one
//! difference throughout: what cannot be evaluated
//! never widens access. Every such place becomes a [`Remark`] of the object.
//!
//! Two kinds of trouble are told apart. What is no such object (an unknown field, a list
//! where text is wanted) is a [`Fault`]: the API server would not take it either. A value
//! that cannot be evaluated fails closed within its rule.

mod authorization;
mod peer_authentication;
mod request_authentication;
mod resolve;
mod values;

use std::{collections::BTreeMap, sync::Arc};

use super::{
    model::{PolicyName, Remark},
    native::{is_dns_name, not_a_name},
};
use crate::config::yaml::{Fault, Node, shorten};

pub use self::{
    authorization::read as read_authorization,
    peer_authentication::{Mtls, PeerAuthentication, read as read_peer_authentication},
    request_authentication::read as read_request_authentication,
    resolve::{Applied, Demand, Demands, apply, resolve},
};

/// The kind of rules on who may reach whom.
pub const AUTHORIZATION_POLICY: &str = "AuthorizationPolicy";
/// The kind that says whether plaintext is taken.
pub const PEER_AUTHENTICATION: &str = "PeerAuthentication";
/// The kind that names the issuers of end users' tokens.
pub const REQUEST_AUTHENTICATION: &str = "RequestAuthentication";
/// The default of the configuration's `rootNamespace`.
pub const ROOT_NAMESPACE: &str = "istio-system";

/// Versions that are read alike.
const API_VERSIONS: [&str; 2] = ["security.istio.io/v1", "security.istio.io/v1beta1"];
/// The group of these kinds.
pub const GROUP: &str = "security.istio.io/";

/// Labels of a selector.
const MAX_LABELS: usize = 64;

/// The outside of an object.
struct Envelope<'a> {
    name: PolicyName,
    /// `metadata.annotations`.
    annotations: Option<&'a Node>,
    /// `metadata.creationTimestamp`.
    created: Option<&'a Node>,
    /// `None` means `{}`.
    spec: Option<&'a Node>,
}

impl<'a> Envelope<'a> {
    fn open(object: &'a Node, kind: &'static str) -> Result<Self, Fault> {
        let mut spec = None;
        let mut metadata = None;
        object.known_fields(
            &["apiVersion", "kind", "metadata", "spec", "status"],
            |field, node| match field {
                "apiVersion" if !API_VERSIONS.contains(&node.text()?) => Err(node.fault(format!(
                    "{} is not served; write {}",
                    node.describe(),
                    API_VERSIONS.join(" or ")
                ))),
                "kind" if node.text()? != kind => {
                    Err(node.fault(format!("{} is not {kind}", node.describe())))
                }
                "metadata" => {
                    node.fields()?;
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
        let part = |field: &str, most: usize| -> Result<Arc<str>, Fault> {
            let within = |fault: Fault| fault.within(field).within("metadata");
            let node = metadata
                .get(field)
                .ok_or_else(|| within(metadata.fault("missing; the kind is namespaced")))?;
            let text = node.text().map_err(within)?;
            if !is_dns_name(text, most) {
                return Err(within(node.fault(not_a_name(text, most))));
            }
            Ok(text.into())
        };
        let name = PolicyName {
            kind: kind.into(),
            namespace: part("namespace", 63)?,
            name: part("name", 253)?,
        };
        Ok(Self {
            name,
            annotations: metadata.get("annotations"),
            created: metadata.get("creationTimestamp"),
            spec,
        })
    }
}

/// Where a reader stands, and what it has to say of the object.
struct Reader {
    path: Vec<String>,
    remarks: Vec<Remark>,
}

impl Reader {
    fn new() -> Self {
        Self { path: vec!["spec".into()], remarks: Vec::new() }
    }

    /// Reads below a segment of the path.
    fn at<T>(&mut self, segment: impl Into<String>, read: impl FnOnce(&mut Self) -> T) -> T {
        self.path.push(segment.into());
        let value = read(self);
        self.path.pop();
        value
    }

    /// The fields of a mapping, all of them known, except those without a value.
    fn fields<'a>(
        &mut self,
        node: &'a Node,
        known: &[&str],
        mut read: impl FnMut(&mut Self, &'a str, &'a Node) -> Result<(), Fault>,
    ) -> Result<(), Fault> {
        node.known_fields(known, |field, node| self.at(field, |reader| read(reader, field, node)))
    }

    /// The items of a list.
    fn each<T>(
        &mut self,
        node: &Node,
        most: usize,
        mut read: impl FnMut(&mut Self, &Node) -> Result<T, Fault>,
    ) -> Result<Vec<T>, Fault> {
        let mut index = 0;
        node.list(most, |item| {
            let value = self.at(format!("[{index}]"), |reader| read(reader, item));
            index += 1;
            value
        })
    }

    /// A selector's labels.
    fn selector(&mut self, node: &Node) -> Result<BTreeMap<Arc<str>, Arc<str>>, Fault> {
        let mut labels = BTreeMap::new();
        self.fields(node, &["matchLabels"], |_, _, node| {
            let entries = node.fields()?;
            if entries.len() > MAX_LABELS {
                return Err(
                    node.fault(format!("{} labels; {MAX_LABELS} is the most", entries.len()))
                );
            }
            for field in entries {
                let value = field.node.text().map_err(|e| e.within(shorten(&field.name)))?;
                if value.contains('*') || field.name.contains('*') {
                    return Err(field
                        .node
                        .fault("selectors know no wildcards; write the whole label")
                        .within(shorten(&field.name)));
                }
                labels.insert(field.name.as_str().into(), value.into());
            }
            Ok(())
        })?;
        Ok(labels)
    }

    /// Says something at a place: a fault where the object does not do what it asks for.
    fn say(&mut self, node: &Node, is_fault: bool, message: impl Into<String>) {
        let mut field = String::new();
        for segment in &self.path {
            if !field.is_empty() && !segment.starts_with('[') {
                field.push('.');
            }
            field.push_str(segment);
        }
        self.remarks.push(Remark {
            line: node.line,
            field: field.into(),
            message: message.into().into(),
            is_fault,
        });
    }

    fn fault(&mut self, node: &Node, message: impl Into<String>) {
        self.say(node, true, message);
    }

    fn note(&mut self, node: &Node, message: impl Into<String>) {
        self.say(node, false, message);
    }
}
