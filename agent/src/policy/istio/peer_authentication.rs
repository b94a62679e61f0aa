//! `PeerAuthentication`: whether plaintext is taken.

use std::{collections::BTreeMap, sync::Arc};

use super::{Envelope, PEER_AUTHENTICATION, Reader};
use crate::{
    config::yaml::{Fault, Field, Node, shorten},
    policy::model::{PolicyName, Remark},
};

/// Entries of `portLevelMtls`.
const MAX_PORTS: usize = 64;

/// Istio's word on plaintext.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub enum Mtls {
    /// Nothing is said: as on the level above.
    #[default]
    Unset,
    /// No mutual TLS; without sidecars there is nothing to leave out, so as `Permissive`.
    Disable,
    /// Both are taken.
    Permissive,
    /// Plaintext is refused.
    Strict,
}

/// One PeerAuthentication.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct PeerAuthentication {
    /// Its name.
    pub name: PolicyName,
    /// The labels of the pods that it is about; `None`: the whole namespace, or, in the root
    /// namespace, the mesh.
    pub selector: Option<BTreeMap<Arc<str>, Arc<str>>>,
    /// For every port.
    pub mode: Mtls,
    /// For single ports of the pod.
    pub ports: BTreeMap<u16, Mtls>,
    /// Creation, Unix seconds; the oldest of a level holds. One without a time is the newest.
    pub created: i64,
    /// It was ignored as a whole while it was read; a remark says why.
    pub ignored: bool,
    /// How it was understood, and what became of it.
    pub remarks: Vec<Remark>,
}

/// Reads one PeerAuthentication; `root` is the mesh's root namespace.
///
/// # Errors
///
/// The first field that is unknown or of the wrong shape.
pub fn read(object: &Node, root: &str) -> Result<PeerAuthentication, Fault> {
    let envelope = Envelope::open(object, PEER_AUTHENTICATION)?;
    let mut reader = Reader::new();
    let created = match envelope.created {
        None => i64::MAX,
        Some(node) => {
            let within = |fault: Fault| fault.within("metadata.creationTimestamp");
            let text = node.text().map_err(within)?;
            let time: jiff::Timestamp = text.parse().map_err(|_| {
                within(node.fault(format!(
                    "{:?} is not a time; write it like 2026-01-31T10:00:00Z",
                    shorten(text)
                )))
            })?;
            time.as_second()
        }
    };
    let mut read = PeerAuthentication {
        name: envelope.name,
        selector: None,
        mode: Mtls::Unset,
        ports: BTreeMap::new(),
        created,
        ignored: false,
        remarks: Vec::new(),
    };
    if let Some(spec) = envelope.spec {
        read_spec(&mut reader, &mut read, spec, root).map_err(|fault| fault.within("spec"))?;
    }
    read.remarks = reader.remarks;
    Ok(read)
}

fn read_spec(
    reader: &mut Reader,
    read: &mut PeerAuthentication,
    spec: &Node,
    root: &str,
) -> Result<(), Fault> {
    let mut ports = None;
    reader.fields(spec, &["selector", "mtls", "portLevelMtls"], |reader, field, node| {
        match field {
            "selector" => {
                // One that selects every pod is about the namespace.
                let labels = reader.selector(node)?;
                read.selector = (!labels.is_empty()).then_some(labels);
            }
            "mtls" => read.mode = mode_of(node)?,
            _ => ports = Some(node),
        }
        Ok(())
    })?;
    if let Some(node) = ports {
        let all = node.fields().map_err(|fault| fault.within("portLevelMtls"))?;
        let read_port = |field: &Field| -> Result<(u16, Mtls), Fault> {
            let port =
                field.name.parse::<u16>().ok().filter(|port| *port != 0).ok_or_else(|| {
                    Fault::new(
                        field.line,
                        format!(
                            "{:?} is not a port; write a number from 1 to 65535",
                            shorten(&field.name)
                        ),
                    )
                })?;
            let mode = if field.node.is_null() { Mtls::Unset } else { mode_of(&field.node)? };
            Ok((port, mode))
        };
        if all.len() > MAX_PORTS {
            return Err(node
                .fault(format!("{} ports; {MAX_PORTS} is the most", all.len()))
                .within("portLevelMtls"));
        }
        for field in all {
            let (port, mode) = read_port(field)
                .map_err(|fault| fault.within(shorten(&field.name)).within("portLevelMtls"))?;
            read.ports.insert(port, mode);
        }
        if read.selector.is_none() && !read.ports.is_empty() {
            read.ports.clear();
            reader.at("portLevelMtls", |reader| {
                reader.fault(node, "it needs a selector of pods, and is ignored without one");
            });
        }
    }
    if *read.name.namespace == *root && read.selector.is_some() {
        read.ignored = true;
        reader.at("selector", |reader| {
            reader.fault(
                spec,
                format!(
                    "in the root namespace {root} a PeerAuthentication with a selector is ignored; \
                     write it in the pods' own namespace"
                ),
            );
        });
    }
    Ok(())
}

fn mode_of(node: &Node) -> Result<Mtls, Fault> {
    let mut mode = Mtls::Unset;
    node.known_fields(&["mode"], |_, node| {
        mode = match node.text()? {
            "UNSET" => Mtls::Unset,
            "DISABLE" => Mtls::Disable,
            "PERMISSIVE" => Mtls::Permissive,
            "STRICT" => Mtls::Strict,
            _ => {
                return Err(node.fault(format!(
                    "{} is not a mode; write UNSET, DISABLE, PERMISSIVE or STRICT",
                    node.describe()
                )));
            }
        };
        Ok(())
    })?;
    Ok(mode)
}
