//! The words of a schema, and what they say of a value.

use std::collections::BTreeSet;

use serde_json::Value;

use super::join;

fn shown(value: &Value) -> String {
    match value {
        Value::Object(_) => "\"object\"".into(),
        Value::Array(_) => "\"array\"".into(),
        other => other.to_string(),
    }
}

/// Adds what is wrong with a value.
pub(super) fn check(schema: &Value, value: &Value, path: &str, faults: &mut Vec<String>) {
    let mut bad =
        |what: String| faults.push(format!("{path}: Invalid value: {}: {what}", shown(value)));
    let in_body = |what: &str| format!("{path} in body {what}");
    if value.is_null() && schema["nullable"] == true {
        return;
    }
    if let Some(wanted) = schema["type"].as_str()
        && !is_of(wanted, value)
    {
        bad(in_body(&format!("must be of type {wanted}: {}", kind_of(value))));
        return;
    }
    if schema["x-kubernetes-int-or-string"] == true && !(value.is_i64() || value.is_string()) {
        bad(in_body("must be of type integer or string"));
        return;
    }
    if let Some(allowed) = schema["enum"].as_array()
        && !allowed.contains(value)
    {
        let allowed: Vec<String> = allowed.iter().map(Value::to_string).collect();
        let allowed = allowed.join(", ");
        faults.push(format!("{path}: Unsupported value: {value}: supported values: {allowed}"));
        return;
    }
    match value {
        Value::Number(number) => numbers(schema, number.as_f64().unwrap_or_default(), |what| {
            bad(in_body(&what));
        }),
        Value::String(text) => texts(schema, text, |what| bad(in_body(&what))),
        Value::Array(items) => {
            let (least, most) = (schema["minItems"].as_u64(), schema["maxItems"].as_u64());
            let count = items.len() as u64;
            if least.is_some_and(|least| count < least) {
                bad(in_body(&format!("should have at least {} items", least.unwrap_or(0))));
            }
            if most.is_some_and(|most| count > most) {
                let most = most.unwrap_or(0);
                faults.push(format!("{path}: Too many: {count}: must have at most {most} items"));
            }
            duplicates(schema, items, path, faults);
            for (index, item) in items.iter().enumerate() {
                check(&schema["items"], item, &format!("{path}[{index}]"), faults);
            }
        }
        Value::Object(fields) => {
            let (least, most) =
                (schema["minProperties"].as_u64(), schema["maxProperties"].as_u64());
            let count = fields.len() as u64;
            if least.is_some_and(|least| count < least) {
                bad(in_body(&format!("should have at least {} properties", least.unwrap_or(0))));
            }
            if most.is_some_and(|most| count > most) {
                let most = most.unwrap_or(0);
                faults.push(format!("{path}: Too many: {count}: must have at most {most} items"));
            }
            for name in schema["required"].as_array().into_iter().flatten() {
                let name = name.as_str().unwrap_or_default();
                if !fields.contains_key(name) {
                    faults.push(format!("{}: Required value", join(path, name)));
                }
            }
            for (name, field) in fields {
                if path.is_empty() && matches!(name.as_str(), "apiVersion" | "kind" | "metadata") {
                    continue;
                }
                let property = match &schema["properties"][name] {
                    Value::Null => &schema["additionalProperties"],
                    property => property,
                };
                if property.is_object() {
                    check(property, field, &join(path, name), faults);
                }
            }
        }
        _ => {}
    }
    combinations(schema, value, path, faults);
}

fn combinations(schema: &Value, value: &Value, path: &str, faults: &mut Vec<String>) {
    let fits = |schema: &Value| {
        let mut faults = Vec::new();
        check(schema, value, path, &mut faults);
        faults.is_empty()
    };
    for schema in schema["allOf"].as_array().into_iter().flatten() {
        check(schema, value, path, faults);
    }
    let mut bad = |what: &str| {
        faults.push(format!("{path}: Invalid value: {}: {path} in body {what}", shown(value)));
    };
    if let Some(any) = schema["anyOf"].as_array()
        && !any.iter().any(fits)
    {
        bad("must validate at least one schema (anyOf)");
    }
    if let Some(one) = schema["oneOf"].as_array()
        && one.iter().filter(|schema| fits(schema)).count() != 1
    {
        bad("must validate one and only one schema (oneOf)");
    }
    if schema["not"].is_object() && fits(&schema["not"]) {
        bad("must not validate the schema (not)");
    }
}

fn kind_of(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "boolean",
        Value::Number(number) if number.is_f64() => "number",
        Value::Number(_) => "integer",
        Value::String(_) => "string",
        Value::Array(_) => "array",
        Value::Object(_) => "object",
    }
}

fn is_of(wanted: &str, value: &Value) -> bool {
    let own = kind_of(value);
    own == wanted || (wanted == "number" && own == "integer")
}

fn numbers(schema: &Value, number: f64, mut bad: impl FnMut(String)) {
    if let Some(least) = schema["minimum"].as_f64() {
        let excluded = schema["exclusiveMinimum"] == true;
        if number < least || (excluded && number == least) {
            bad(format!(
                "should be greater than {}{least}",
                if excluded { "" } else { "or equal to " }
            ));
        }
    }
    if let Some(most) = schema["maximum"].as_f64() {
        let excluded = schema["exclusiveMaximum"] == true;
        if number > most || (excluded && number == most) {
            bad(format!(
                "should be less than {}{most}",
                if excluded { "" } else { "or equal to " }
            ));
        }
    }
    if let Some(of) = schema["multipleOf"].as_f64()
        && number % of != 0.0
    {
        bad(format!("should be a multiple of {of}"));
    }
    if schema["format"] == "int32" && i32::try_from(number as i64).is_err() {
        bad("must be of type int32".into());
    }
}

fn texts(schema: &Value, text: &str, mut bad: impl FnMut(String)) {
    let count = text.chars().count() as u64;
    if let Some(least) = schema["minLength"].as_u64()
        && count < least
    {
        bad(format!("should be at least {least} chars long"));
    }
    if let Some(most) = schema["maxLength"].as_u64()
        && count > most
    {
        bad(format!("should be at most {most} chars long"));
    }
    if let Some(pattern) = schema["pattern"].as_str()
        && regex::Regex::new(pattern).is_ok_and(|pattern| !pattern.is_match(text))
    {
        bad(format!("should match '{pattern}'"));
    }
    if schema["format"] == "date-time" && text.parse::<jiff::Timestamp>().is_err() {
        bad(format!("must be of type date-time: {text:?}"));
    }
}

/// Lists that are sets or maps have each key once.
fn duplicates(schema: &Value, items: &[Value], path: &str, faults: &mut Vec<String>) {
    let keys: Vec<&str> = match schema["x-kubernetes-list-type"].as_str() {
        Some("set") => Vec::new(),
        Some("map") => {
            let keys = schema["x-kubernetes-list-map-keys"].as_array().into_iter().flatten();
            keys.filter_map(Value::as_str).collect()
        }
        _ => return,
    };
    let mut seen = BTreeSet::new();
    for (index, item) in items.iter().enumerate() {
        let key = match keys.as_slice() {
            [] => item.to_string(),
            keys => {
                let own: Vec<String> =
                    keys.iter().map(|key| format!("\"{key}\":{}", item[*key])).collect();
                format!("{{{}}}", own.join(","))
            }
        };
        if !seen.insert(key.clone()) {
            faults.push(format!("{path}[{index}]: Duplicate value: {key}"));
        }
    }
}
