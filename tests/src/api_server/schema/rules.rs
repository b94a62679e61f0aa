//! `x-kubernetes-validations`: rules of a schema, in CEL.

use serde_json::Value;

use super::{
    super::{
        Refusal,
        cel::{self, Expression, Variables},
        http::cannot,
    },
    below, join,
};

/// Formats whose values are no texts in a real server's expressions.
const TYPED: [&str; 5] = ["date-time", "datetime", "date", "duration", "byte"];

fn rules(schema: &Value) -> impl Iterator<Item = &Value> {
    schema["x-kubernetes-validations"].as_array().into_iter().flatten()
}

/// Says by name what of a schema's rules cannot be evaluated here.
pub(super) fn usable(schema: &Value) -> Result<(), Refusal> {
    for rule in rules(schema) {
        let source = rule["rule"].as_str().unwrap_or_default();
        Expression::parse(source)?;
        if let Some(message) = rule["messageExpression"].as_str() {
            Expression::parse(message)?;
        }
        if rule["optionalOldSelf"] == true {
            return Err(cannot(&format!("optionalOldSelf: {source}")));
        }
        if has_typed(schema) {
            let what = "rules over fields with the format of a time, a duration or bytes";
            return Err(cannot(&format!("{what}: {source}")));
        }
    }
    // What becomes of an item of a list cannot be told here: there is no oldSelf for it.
    let items = &schema["items"];
    if rules_below(items).any(speaks_of_old) {
        return Err(cannot("rules over changes of a list's items"));
    }
    below(schema).into_iter().try_for_each(|(_, schema)| usable(schema))
}

fn rules_below(schema: &Value) -> Box<dyn Iterator<Item = &Value> + '_> {
    let deeper = below(schema).into_iter().flat_map(|(_, schema)| rules_below(schema));
    Box::new(rules(schema).chain(deeper))
}

fn speaks_of_old(rule: &Value) -> bool {
    let rule = Expression::parse(rule["rule"].as_str().unwrap_or_default());
    rule.is_ok_and(|rule| rule.speaks_of("oldSelf"))
}

fn has_typed(schema: &Value) -> bool {
    schema["format"].as_str().is_some_and(|format| TYPED.contains(&format))
        || below(schema).into_iter().any(|(_, schema)| has_typed(schema))
}

/// Adds the rules that a value breaks.
pub(super) fn check(
    schema: &Value,
    value: &Value,
    old: Option<&Value>,
    path: &str,
    faults: &mut Vec<String>,
) {
    for rule in rules(schema) {
        if let Some(fault) = broken(rule, schema, value, old) {
            let field = rule["fieldPath"].as_str().unwrap_or_default();
            let shown = match value {
                Value::Object(_) => "\"object\"".to_owned(),
                Value::Array(_) => "\"array\"".to_owned(),
                other => other.to_string(),
            };
            let place = match format!("{path}{field}") {
                place if place.is_empty() => "<nil>".to_owned(),
                place => place.trim_start_matches('.').to_owned(),
            };
            faults.push(format!("{place}: Invalid value: {shown}: {fault}"));
        }
    }
    match value {
        Value::Object(fields) => {
            for (name, field) in fields {
                let property = match &schema["properties"][name] {
                    Value::Null => &schema["additionalProperties"],
                    property => property,
                };
                if property.is_object() {
                    let old = old.and_then(|old| old.get(name));
                    check(property, field, old, &join(path, name), faults);
                }
            }
        }
        Value::Array(items) => {
            for (index, item) in items.iter().enumerate() {
                check(&schema["items"], item, None, &format!("{path}[{index}]"), faults);
            }
        }
        _ => {}
    }
}

/// What a broken rule says.
fn broken(rule: &Value, schema: &Value, value: &Value, old: Option<&Value>) -> Option<String> {
    let source = rule["rule"].as_str().unwrap_or_default();
    let expression = match Expression::parse(source) {
        Ok(expression) => expression,
        Err(refusal) => return Some(refusal.message),
    };
    let mut variables = Variables::default().with("self", seen(schema, value));
    if expression.speaks_of("oldSelf") {
        // A rule over a change holds where nothing was before.
        variables.set("oldSelf", seen(schema, old?));
    }
    match expression.holds(&variables) {
        Ok(true) => None,
        Ok(false) => {
            let expressed = rule["messageExpression"]
                .as_str()
                .and_then(|message| Expression::parse(message).ok()?.text(&variables).ok());
            let message = rule["message"].as_str().map(str::to_owned);
            Some(expressed.or(message).unwrap_or_else(|| format!("failed rule: {source}")))
        }
        Err(error) => Some(format!("rule evaluation error: {error}: {source}")),
    }
}

/// A value as rules see it: only what the schema names, by names that CEL has.
fn seen(schema: &Value, value: &Value) -> ::cel::Value {
    match value {
        Value::Object(fields) => {
            let entries = fields.iter().filter_map(|(name, field)| {
                if field.is_null() {
                    return None;
                }
                match (&schema["properties"][name], &schema["additionalProperties"]) {
                    (property @ Value::Object(_), _) => {
                        Some((cel::escaped(name)?, seen(property, field)))
                    }
                    (_, other @ Value::Object(_)) => Some((name.clone(), seen(other, field))),
                    _ => None,
                }
            });
            cel::map(entries)
        }
        Value::Array(items) => {
            let items: Vec<_> = items.iter().map(|item| seen(&schema["items"], item)).collect();
            items.into()
        }
        other => cel::value(other),
    }
}
