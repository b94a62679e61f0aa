//! Flow records as `signet flows -o json` prints them (reference/cli.md).

use std::fmt;

use anyhow::{Context, Result};
use serde::Deserialize;

/// A record.
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Flow {
    /// `verdict` or `end`.
    pub event: String,
    /// RFC 3339.
    pub time: String,
    /// Shared by both ends.
    pub uuid: String,
    /// The reporting node.
    pub node: String,
    /// `source` or `destination`.
    pub reporter: String,
    /// `ingress` or `egress`.
    pub direction: String,
    /// `tcp`, `udp`, …
    pub protocol: String,
    /// `mtls`, `kernel` or `plaintext`.
    pub via: String,
    /// `FORWARDED`, `DROPPED` or `AUDIT`.
    pub verdict: String,
    /// A reason's name.
    pub reason: String,
    /// Revision that decided.
    #[serde(default)]
    pub revision: u64,
    /// The deciding policy.
    #[serde(default)]
    pub policy: Option<Policy>,
    /// The client.
    pub source: Party,
    /// The server.
    pub destination: Party,
}

/// A policy's name.
#[derive(Clone, Debug, Deserialize)]
pub struct Policy {
    /// Kind.
    pub kind: String,
    /// Namespace.
    #[serde(default)]
    pub namespace: String,
    /// Name.
    pub name: String,
}

/// One side.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Party {
    /// Namespace.
    pub namespace: Option<String>,
    /// Pod.
    pub pod: Option<String>,
    /// Service account.
    pub service_account: Option<String>,
    /// SPIFFE ID.
    pub identity: Option<String>,
    /// `mtls`, `kernel`, `address` or `unknown`.
    pub known_by: Option<String>,
    /// Service that was dialled.
    pub service: Option<String>,
    /// Address.
    pub ip: Option<String>,
    /// Port.
    pub port: Option<u16>,
}

impl Flow {
    /// True when both pods have these names (`namespace/name`).
    pub fn between(&self, source: &str, destination: &str) -> bool {
        self.source.full_name() == source && self.destination.full_name() == destination
    }

    /// True for this verdict and reason.
    pub fn is(&self, verdict: &str, reason: &str) -> bool {
        self.event == "verdict" && self.verdict == verdict && self.reason == reason
    }

    /// The deciding policy's `namespace/name`, or empty.
    pub fn policy_name(&self) -> String {
        self.policy.as_ref().map(|p| format!("{}/{}", p.namespace, p.name)).unwrap_or_default()
    }
}

impl Party {
    /// `namespace/pod`, or the address.
    pub fn full_name(&self) -> String {
        match (&self.namespace, &self.pod) {
            (Some(namespace), Some(pod)) => format!("{namespace}/{pod}"),
            _ => self.ip.clone().unwrap_or_default(),
        }
    }
}

impl fmt::Display for Flow {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} {} {} {}:{} ({}) -> {}:{} {} {} {} {} {} {}",
            self.node,
            self.event,
            self.reporter,
            self.source.full_name(),
            self.source.port.unwrap_or_default(),
            self.source.known_by.as_deref().unwrap_or("-"),
            self.destination.full_name(),
            self.destination.port.unwrap_or_default(),
            self.protocol,
            self.via,
            self.verdict,
            self.reason,
            self.policy_name(),
            self.uuid
        )
    }
}

/// The records of NDJSON text.
pub fn parse(text: &str) -> Result<Vec<Flow>> {
    text.lines()
        .filter(|line| !line.trim().is_empty())
        .map(|line| serde_json::from_str(line).with_context(|| format!("not a flow: {line}")))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_a_record_of_the_contract() {
        let flows = parse(
            r#"{"schema":"signet.dev/flow/v1","event":"verdict","time":"2026-08-06T10:12:04Z","uuid":"u","node":"node-2","reporter":"destination","direction":"ingress","protocol":"tcp","via":"mtls","verdict":"FORWARDED","reason":"allowed","revision":118,"policy":{"kind":"IdentityPolicy","namespace":"shop","name":"payments-callers"},"source":{"namespace":"shop","pod":"frontend-7d9c","serviceAccount":"frontend","identity":"spiffe://cluster.local/ns/shop/sa/frontend","knownBy":"mtls","ip":"10.0.1.5","port":41872},"destination":{"namespace":"shop","pod":"payments-5b7f","service":"shop/payments","ip":"10.0.2.3","port":8080}}"#,
        )
        .unwrap();
        assert!(flows[0].between("shop/frontend-7d9c", "shop/payments-5b7f"));
        assert!(flows[0].is("FORWARDED", "allowed"));
        assert_eq!(flows[0].policy_name(), "shop/payments-callers");
    }
}
