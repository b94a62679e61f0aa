//! Field and label selectors.

use serde_json::Value;

use super::Refusal;

/// Fields that selectors may name.
const FIELDS: [&str; 4] = ["spec.nodeName", "metadata.name", "metadata.namespace", "status.phase"];

/// What of a kind is asked for.
#[derive(Clone, Debug, Default)]
pub(super) struct Selection {
    pub(super) plural: String,
    /// Empty: all.
    pub(super) namespace: String,
    fields: Vec<Term>,
    labels: Vec<Term>,
}

#[derive(Clone, Debug)]
struct Term {
    key: String,
    /// Empty with `is_in` false: the key must not be there at all.
    values: Vec<String>,
    is_in: bool,
    /// The key must be there, whatever its value.
    exists: bool,
}

impl Selection {
    pub(super) fn parse(
        plural: &str,
        namespace: &str,
        fields: &str,
        labels: &str,
    ) -> Result<Self, Refusal> {
        let fields = terms(fields)?;
        if let Some(unknown) = fields.iter().find(|term| !FIELDS.contains(&term.key.as_str())) {
            let message = format!("field label not supported: {}", unknown.key);
            return Err(Refusal::new(400, "BadRequest", message));
        }
        let (plural, namespace) = (plural.to_owned(), namespace.to_owned());
        Ok(Self { plural, namespace, fields, labels: terms(labels)? })
    }

    pub(super) fn fits(&self, plural: &str, namespace: &str, object: &Value) -> bool {
        let field = |path: &str| {
            let pointer = format!("/{}", path.replace('.', "/"));
            // A field that is not set is the empty text, which is unequal to any other.
            Some(object.pointer(&pointer).and_then(Value::as_str).unwrap_or_default().to_owned())
        };
        let label = |key: &str| object["metadata"]["labels"][key].as_str().map(str::to_owned);
        plural == self.plural
            && (self.namespace.is_empty() || namespace == self.namespace)
            && self.fields.iter().all(|term| term.fits(field(&term.key)))
            && self.labels.iter().all(|term| term.fits(label(&term.key)))
    }
}

/// Whether labels fit a selector as objects have it (`matchLabels`, `matchExpressions`).
pub(super) fn labels_fit(selector: &Value, labels: &Value) -> Result<bool, Refusal> {
    let label = |key: &str| labels[key].as_str();
    for (key, wanted) in selector["matchLabels"].as_object().into_iter().flatten() {
        if label(key) != wanted.as_str() {
            return Ok(false);
        }
    }
    for term in selector["matchExpressions"].as_array().into_iter().flatten() {
        let own = label(term["key"].as_str().unwrap_or_default());
        let is_in = || {
            let mut values = term["values"].as_array().into_iter().flatten();
            own.is_some_and(|own| values.any(|value| value == own))
        };
        let fits = match term["operator"].as_str() {
            Some("In") => is_in(),
            Some("NotIn") => !is_in(),
            Some("Exists") => own.is_some(),
            Some("DoesNotExist") => own.is_none(),
            other => {
                let message = format!("{other:?} is not a valid label selector operator");
                return Err(Refusal::new(400, "BadRequest", message));
            }
        };
        if !fits {
            return Ok(false);
        }
    }
    Ok(true)
}

/// The one value that a selector wants of a field, if it wants exactly one.
pub(super) fn exact(selector: &str, field: &str) -> Option<String> {
    let terms = terms(selector).ok()?;
    let mut fitting = terms.iter().filter(|term| term.key == field && term.is_in && !term.exists);
    let values = &fitting.next()?.values;
    (values.len() == 1).then(|| values[0].clone())
}

impl Term {
    fn fits(&self, value: Option<String>) -> bool {
        match value {
            Some(_) if self.exists => true,
            Some(value) => self.values.contains(&value) == self.is_in && !self.values.is_empty(),
            None => !self.is_in,
        }
    }
}

/// `a=b`, `a==b`, `a!=b`, `a in (b, c)`, `a notin (b)`, `a`, `!a`, comma-separated.
fn terms(selector: &str) -> Result<Vec<Term>, Refusal> {
    let mut parts = Vec::new();
    let (mut depth, mut start) = (0, 0);
    for (at, c) in selector.char_indices() {
        match c {
            '(' => depth += 1,
            ')' => depth -= 1,
            ',' if depth == 0 => {
                parts.push(&selector[start..at]);
                start = at + 1;
            }
            _ => {}
        }
    }
    parts.push(&selector[start..]);
    parts.into_iter().map(str::trim).filter(|part| !part.is_empty()).map(term).collect()
}

fn term(text: &str) -> Result<Term, Refusal> {
    let of = |key: &str, values: Vec<String>, is_in: bool, exists: bool| Term {
        key: key.trim().to_owned(),
        values,
        is_in,
        exists,
    };
    for (word, is_in) in [(" notin ", false), (" in ", true)] {
        if let Some((key, list)) = text.split_once(word) {
            let list = list.trim().strip_prefix('(').and_then(|list| list.strip_suffix(')'));
            let list = list.ok_or_else(|| {
                Refusal::new(400, "BadRequest", format!("unable to parse requirement {text:?}"))
            })?;
            let values = list.split(',').map(|value| value.trim().to_owned()).collect();
            return Ok(of(key, values, is_in, false));
        }
    }
    let one = |value: &str| vec![value.trim().to_owned()];
    Ok(match (text.split_once("!="), text.split_once('='), text.strip_prefix('!')) {
        (Some((key, value)), ..) => of(key, one(value), false, false),
        (None, Some((key, value)), _) => of(key, one(value.trim_start_matches('=')), true, false),
        (None, None, Some(key)) => of(key, Vec::new(), false, false),
        (None, None, None) => of(text, Vec::new(), true, true),
    })
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn selectors_choose_as_a_real_server_does() {
        let pod = json!({
            "metadata": {"name": "web", "namespace": "shop", "labels": {"app": "web"}},
            "spec": {"nodeName": "node-1"},
        });
        let unbound = json!({"metadata": {"name": "new", "namespace": "shop"}, "spec": {}});
        let fits = |fields: &str, labels: &str, object: &Value| {
            Selection::parse("pods", "", fields, labels).unwrap().fits("pods", "shop", object)
        };
        for (fields, labels, of_pod, of_unbound) in [
            ("", "", true, true),
            ("spec.nodeName=node-1", "", true, false),
            ("spec.nodeName!=node-1", "", false, true),
            ("spec.nodeName==node-1,metadata.name!=web", "", false, false),
            ("", "app=web", true, false),
            ("", "app!=web", false, true),
            ("", "app in (web, db)", true, false),
            ("", "app notin (web)", false, true),
            ("", "app", true, false),
            ("", "!app", false, true),
        ] {
            assert_eq!(fits(fields, labels, &pod), of_pod, "{fields} {labels}");
            assert_eq!(fits(fields, labels, &unbound), of_unbound, "{fields} {labels}");
        }
        let refused = Selection::parse("pods", "", "spec.hostIP=1", "").unwrap_err();
        assert_eq!(
            (refused.code, refused.message.as_str()),
            (400, "field label not supported: spec.hostIP")
        );
    }
}
