//! Pods from manifests: `image: signet-lab` runs the lab's roles with the container's `args`.

use anyhow::{Context, Result, bail};
use serde_json::Value;

use super::{Container, PodBuilder};
use crate::traffic::Role;

/// What a container runs.
#[expect(clippy::large_enum_variant, reason = "a handful live at once, in a test's set-up")]
#[derive(Clone, Debug)]
pub enum Program {
    /// A role of the lab's helper.
    Role(Role),
    /// The helper with these arguments (`tcp-server --listen [::]:80`).
    Worker(Vec<String>),
    /// Any program of this machine.
    Command(Vec<String>),
}

/// Fills a builder from a Pod manifest.
///
/// A container's `command` is run as it is; without one, `args` are the helper's.
pub fn builder_of(mut builder: PodBuilder, manifest: &Value) -> Result<PodBuilder> {
    let spec = &manifest["spec"];
    let metadata = &manifest["metadata"];
    if let Some(account) = spec["serviceAccountName"].as_str() {
        builder = builder.service_account(account);
    }
    builder.labels.clear();
    for (key, value) in metadata["labels"].as_object().into_iter().flatten() {
        builder = builder.label(key, value.as_str().unwrap_or_default());
    }
    if spec["hostNetwork"] == true {
        builder = builder.host_network();
    }
    if let Some(uid) = metadata["uid"].as_str() {
        builder = builder.uid(uid);
    }
    for container in spec["initContainers"].as_array().into_iter().flatten() {
        builder.init.push(container_of(container)?);
    }
    for container in spec["containers"].as_array().into_iter().flatten() {
        builder.containers.push(container_of(container)?);
    }
    builder.object = Some(manifest.clone());
    Ok(builder)
}

fn container_of(container: &Value) -> Result<Container> {
    let name = container["name"].as_str().context("a container without name")?.to_owned();
    let strings = |field: &str| -> Vec<String> {
        container[field]
            .as_array()
            .into_iter()
            .flatten()
            .map(|v| v.as_str().map_or_else(|| v.to_string(), str::to_owned))
            .collect()
    };
    let (command, arguments) = (strings("command"), strings("args"));
    let program = if !command.is_empty() {
        Program::Command(command.into_iter().chain(arguments).collect())
    } else if !arguments.is_empty() {
        Program::Worker(arguments)
    } else if container["image"].as_str().is_some_and(|i| i.contains("pause")) {
        Program::Role(Role::Pause)
    } else {
        bail!("container {name}: no `command`, and no `args` for the lab's helper")
    };
    Ok(Container { name, program })
}
