//! Lists as tables, the way `kubectl get` asks for them.

use serde_json::{Value, json};

use super::kinds::Kind;

/// A column: its name, its type and where its value is.
struct Column {
    name: String,
    kind: String,
    path: String,
    priority: i64,
}

/// True when a client takes tables.
pub(super) fn is_wanted(accept: &str) -> bool {
    accept.split(',').any(|part| part.contains("as=Table") && part.contains("v=v1;"))
}

/// Objects as a table, with the columns of the kind's definition where there is one.
pub(super) fn of(kind: &Kind, version: &str, definition: Option<&Value>, list: Value) -> Value {
    let columns = columns(kind, version, definition);
    let is_list = list["items"].is_array();
    let items = match &list["items"] {
        Value::Array(items) => items.clone(),
        _ => vec![list.clone()],
    };
    let rows: Vec<Value> = items
        .iter()
        .map(|item| {
            let cells: Vec<Value> = columns.iter().map(|column| cell(column, item)).collect();
            json!({"cells": cells, "object": {
                "kind": "PartialObjectMetadata", "apiVersion": "meta.k8s.io/v1",
                "metadata": item["metadata"],
            }})
        })
        .collect();
    let definitions: Vec<Value> = columns
        .iter()
        .map(|column| {
            let format = if column.name == "Name" { "name" } else { "" };
            json!({
                "name": column.name, "type": column.kind, "format": format, "description": "",
                "priority": column.priority,
            })
        })
        .collect();
    let metadata = if is_list { list["metadata"].clone() } else { json!({}) };
    json!({
        "kind": "Table", "apiVersion": "meta.k8s.io/v1", "metadata": metadata,
        "columnDefinitions": definitions, "rows": rows,
    })
}

fn columns(kind: &Kind, version: &str, definition: Option<&Value>) -> Vec<Column> {
    let of = |name: &str, kind: &str, path: &str| Column {
        name: name.into(),
        kind: kind.into(),
        path: path.into(),
        priority: 0,
    };
    let mut columns = vec![of("Name", "string", ".metadata.name")];
    let age = || of("Age", "date", ".metadata.creationTimestamp");
    let versions = definition.map(|definition| definition["spec"]["versions"].clone());
    let versions = versions.as_ref().and_then(Value::as_array).into_iter().flatten();
    let mut own = versions.into_iter().filter(|known| known["name"] == version);
    let printed = own.next().map(|known| known["additionalPrinterColumns"].clone());
    match printed.as_ref().and_then(Value::as_array) {
        Some(printed) => {
            for column in printed {
                let text = |field: &str| column[field].as_str().unwrap_or_default().to_owned();
                columns.push(Column {
                    name: text("name"),
                    kind: text("type"),
                    path: text("jsonPath"),
                    priority: column["priority"].as_i64().unwrap_or(0),
                });
            }
        }
        None => {
            if matches!(kind.plural, "pods" | "namespaces") {
                columns.push(of("Status", "string", ".status.phase"));
            }
            columns.push(age());
        }
    }
    columns
}

fn cell(column: &Column, item: &Value) -> Value {
    let found = look(item, &column.path);
    match (column.kind.as_str(), found) {
        (_, None | Some(Value::Null)) => json!("<none>"),
        ("date", Some(Value::String(time))) => json!(age(&time)),
        (_, Some(Value::Object(_) | Value::Array(_))) => json!("<complex>"),
        (_, Some(value)) => value,
    }
}

/// How long ago a time was, as people are told.
fn age(time: &str) -> String {
    let Ok(time) = time.parse::<jiff::Timestamp>() else { return "<invalid>".into() };
    let seconds = (jiff::Timestamp::now() - time).get_seconds().max(0);
    match seconds {
        0..120 => format!("{seconds}s"),
        120..7_200 => format!("{}m", seconds / 60),
        7_200..172_800 => format!("{}h", seconds / 3600),
        _ => format!("{}d", seconds / 86_400),
    }
}

/// The value at a JSONPath of fields, indices and one comparison
/// (`.conditions[?(@.type=="Ready")].status`); anything else finds nothing.
fn look(item: &Value, path: &str) -> Option<Value> {
    let mut value = item;
    let mut rest = path;
    while !rest.is_empty() {
        if let Some(after) = rest.strip_prefix("[?(@.") {
            let (condition, after) = after.split_once(")]")?;
            let (field, wanted) = condition.split_once("==")?;
            let wanted = wanted.trim_matches(['"', '\'']);
            value = value.as_array()?.iter().find(|item| item[field] == wanted)?;
            rest = after;
        } else if let Some(after) = rest.strip_prefix('[') {
            let (index, after) = after.split_once(']')?;
            value = value.get(index.parse::<usize>().ok()?)?;
            rest = after;
        } else {
            let after = rest.strip_prefix('.')?;
            let end = after.find(['.', '[']).unwrap_or(after.len());
            value = value.get(&after[..end])?;
            rest = &after[end..];
        }
    }
    Some(value.clone())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_find_what_columns_show() {
        let item = json!({
            "a": {"b": 1}, "list": ["x", "y"],
            "conditions": [{"type": "Other", "status": "No"}, {"type": "Ready", "status": "Yes"}],
        });
        for (path, wanted) in [
            (".a.b", Some(json!(1))),
            (".list[1]", Some(json!("y"))),
            (".conditions[?(@.type==\"Ready\")].status", Some(json!("Yes"))),
            (".conditions[?(@.type==\"None\")].status", None),
            (".c", None),
            ("a", None),
        ] {
            assert_eq!(look(&item, path), wanted, "{path}");
        }
    }

    #[test]
    fn a_client_is_given_a_table_only_when_it_takes_one() {
        let kubectl = "application/json;as=Table;v=v1;g=meta.k8s.io,application/json";
        assert!(is_wanted(kubectl) && !is_wanted("application/json") && !is_wanted(""));
    }
}
