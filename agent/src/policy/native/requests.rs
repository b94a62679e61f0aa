//! What rules of `ingress` ask of HTTP requests.

use std::sync::Arc;

use http::HeaderName;

use super::{HTTP, MATCH, MAX_CHARS, MAX_CLAIM_PATH, MAX_VALUES, fields, filled};
use crate::{
    config::yaml::{Fault, Node, shorten},
    policy::{
        asked::{Operation, PathPattern, PrincipalPattern, RequestCondition, RequestKey},
        model::Condition,
    },
};

/// An entry of `http`.
pub(super) fn operation(node: &Node) -> Result<Operation, Fault> {
    let mut read = Operation::default();
    fields(node, HTTP, |field, node| {
        match field {
            "methods" => read.methods = filled(node, MAX_VALUES, method)?,
            "notMethods" => read.not_methods = filled(node, MAX_VALUES, method)?,
            "paths" => read.paths = filled(node, MAX_VALUES, path)?,
            "notPaths" => read.not_paths = filled(node, MAX_VALUES, path)?,
            "hosts" => read.hosts = filled(node, MAX_VALUES, host)?,
            _ => read.not_hosts = filled(node, MAX_VALUES, host)?,
        }
        Ok(())
    })?;
    if read.is_empty() {
        return Err(node.fault("an empty entry; leave http out to mean every request"));
    }
    Ok(read)
}

/// An entry of `headers`: `{name, values, notValues}`.
pub(super) fn header(node: &Node) -> Result<Condition, Fault> {
    let mut name = None;
    let (values, not_values) = matched(node, "name", |node| {
        let text = bounded(node)?;
        name =
            Some(text.parse::<HeaderName>().map_err(|_| {
                node.fault(format!("{:?} is not the name of a header", shorten(text)))
            })?);
        Ok(())
    })?;
    let name = name.ok_or_else(|| node.fault("missing; name the header").within("name"))?;
    Ok(condition(RequestKey::Header(name), values, not_values))
}

/// An entry of `claims`: `{path, values, notValues}`.
pub(super) fn claim(node: &Node) -> Result<Condition, Fault> {
    let mut path = Vec::new();
    let (values, not_values) = matched(node, "path", |node| {
        path = filled(node, MAX_CLAIM_PATH, text)?;
        Ok(())
    })?;
    if path.is_empty() {
        return Err(node.fault("missing; write the claim's name, as [role]").within("path"));
    }
    Ok(condition(RequestKey::Claim(path), values, not_values))
}

/// `issuer/subject`, or a pattern of it.
pub(super) fn principal(node: &Node) -> Result<PrincipalPattern, Fault> {
    let text = bounded(node)?;
    let pattern = PrincipalPattern::new(text);
    if !pattern.can_match() {
        return Err(node.fault(format!(
            "{:?} can never match; write issuer/subject, issuer/*, */subject or *",
            shorten(text)
        )));
    }
    Ok(pattern)
}

fn condition(key: RequestKey, values: Vec<Arc<str>>, not_values: Vec<Arc<str>>) -> Condition {
    Condition::Request(Box::new(RequestCondition { key, values, not_values }))
}

/// What is wanted of a property, and what is not.
type Wanted = (Vec<Arc<str>>, Vec<Arc<str>>);

/// The values of an entry that a field `by` names.
fn matched(
    node: &Node,
    by: &str,
    mut named: impl FnMut(&Node) -> Result<(), Fault>,
) -> Result<Wanted, Fault> {
    let (mut values, mut not_values) = (Vec::new(), Vec::new());
    let known: Vec<&str> = std::iter::once(by).chain(MATCH.iter().copied()).collect();
    fields(node, &known, |field, node| {
        match field {
            "values" => values = filled(node, MAX_VALUES, text)?,
            "notValues" => not_values = filled(node, MAX_VALUES, text)?,
            _ => named(node)?,
        }
        Ok(())
    })?;
    if values.is_empty() && not_values.is_empty() {
        return Err(node.fault("neither values nor notValues; values: [\"*\"] means present"));
    }
    Ok((values, not_values))
}

fn text(node: &Node) -> Result<Arc<str>, Fault> {
    Ok(bounded(node)?.into())
}

fn bounded(node: &Node) -> Result<&str, Fault> {
    let text = node.text()?;
    match text.len() {
        0 => Err(node.fault("an empty text; give a value, prefix*, *suffix or *")),
        len if len > MAX_CHARS => Err(node.fault(format!("{len} bytes; {MAX_CHARS} is the most"))),
        _ => Ok(text),
    }
}

/// A method (RFC 9110 §9.1: a token, in which case counts), `prefix*`, `*suffix` or `*`.
fn method(node: &Node) -> Result<Arc<str>, Fault> {
    let text = bounded(node)?;
    let bare = match text.strip_prefix('*') {
        Some(suffix) => suffix,
        None => text.strip_suffix('*').unwrap_or(text),
    };
    let is_token = |c: u8| c.is_ascii_alphanumeric() || b"!#$%&'+-.^_`|~".contains(&c);
    if !bare.bytes().all(is_token) {
        return Err(node.fault(format!(
            "{:?} is not a method; write one like GET, prefix*, *suffix or *",
            shorten(text)
        )));
    }
    Ok(text.into())
}

fn path(node: &Node) -> Result<PathPattern, Fault> {
    let text = bounded(node)?;
    let shown = shorten(text);
    if !text.starts_with(['/', '*']) || text.contains(['?', '#']) {
        return Err(node.fault(format!(
            "{shown:?} can never match; a path begins with / (or with * for a suffix) and stands \
             without the query"
        )));
    }
    PathPattern::parse(text)
        .map_err(|error| node.fault(format!("{shown:?} is not a path template: {error}")))
}

/// A host, with its port where the request names one, or a pattern; case does not count.
fn host(node: &Node) -> Result<Arc<str>, Fault> {
    let text = bounded(node)?;
    if text.contains(['/', '@', '?', '#']) || text.contains(char::is_whitespace) {
        return Err(node.fault(format!(
            "{:?} can never match; write a host like shop.example, shop.example:* or *.example",
            shorten(text)
        )));
    }
    Ok(text.to_ascii_lowercase().into())
}
