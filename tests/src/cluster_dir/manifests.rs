//! Reading YAML manifests.

use anyhow::{Context, Result};
use serde_json::Value;

/// The objects of a YAML text with one or more documents.
pub fn parse(text: &str) -> Result<Vec<Value>> {
    let objects: Vec<Value> = serde_saphyr::from_multiple(text).context("not YAML")?;
    Ok(objects.into_iter().filter(|object| !object.is_null()).collect())
}

/// An object's kind, empty when it has none.
pub fn kind_of(object: &Value) -> &str {
    object["kind"].as_str().unwrap_or_default()
}

/// An object's namespace (empty when it has none) and name.
pub fn name_of(object: &Value) -> (&str, &str) {
    let metadata = &object["metadata"];
    (
        metadata["namespace"].as_str().unwrap_or_default(),
        metadata["name"].as_str().unwrap_or_default(),
    )
}
