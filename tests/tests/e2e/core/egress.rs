//! Egress policy: answered at connect where it is known there, by the proxy where an
//! endpoint is chosen first.

use std::net::SocketAddr;

use anyhow::{Result, ensure};
use serde_json::{Value, json};
use signet_lab::{eventually, traffic::Role};

use crate::mesh::{
    CHANGE, Mesh, TCP, TIMEOUT, answered, answered_soon, refused, refused_soon, server, verdict,
    with_logs,
};

/// An IdentityPolicy of `shop` with egress rules of `frontend`.
fn policy(action: &str, egress: Value) -> Value {
    json!({
        "apiVersion": "signet.dev/v1alpha1", "kind": "IdentityPolicy",
        "metadata": {"name": "frontend-egress", "namespace": "shop"},
        "spec": {
            "selector": {"matchLabels": {"app": "frontend"}}, "action": action, "egress": egress,
        },
    })
}

#[test]
fn a_denied_destination_is_refused_at_connect() -> Result<()> {
    let mesh = Mesh::start(Some("strict"))?;
    with_logs(&mesh, |mesh| {
        let Mesh { lab, frontend, intruder, payments, reports, .. } = mesh;
        for to in [payments.at(TCP), reports.at(TCP)] {
            answered_soon(frontend, to)?;
        }
        let blocks: Vec<String> = reports
            .ips()
            .iter()
            .map(|ip| format!("{ip}/{}", if ip.is_ipv4() { 32 } else { 128 }))
            .collect();
        lab.cluster().apply(policy(
            "Deny",
            json!([{"to": [{"serviceAccounts": ["payments"]}]}, {"to": [{"ipBlocks": blocks}]}]),
        ))?;
        for (to, name) in [(payments, "shop/payments"), (reports, "legacy/reports")] {
            refused_soon(frontend, to.at(TCP))?;
            for address in to.all_at(TCP) {
                let report = refused(frontend, address, "denied")?;
                // Known at connect, answered at connect: a retry will not help.
                ensure!(report.outcome == "connect:EPERM", "{report:?}");
            }
            let flow =
                verdict(lab, "node-1", "source", "shop/frontend", name, "DROPPED", "policy_deny")?;
            ensure!(flow.direction == "egress", "{flow}");
            ensure!(flow.policy_name() == "shop/frontend-egress", "{flow}");
            // The control: the policy selects frontend alone.
            answered(intruder, to.at(TCP), "not selected")?;
        }
        Ok(())
    })
}

#[test]
fn an_allowed_list_holds_for_pods_services_and_the_outside() -> Result<()> {
    let mesh = Mesh::start(Some("strict"))?;
    with_logs(&mesh, |mesh| {
        let Mesh { lab, frontend, intruder, payments, service, .. } = mesh;
        let other = server(lab, "node-2", "shop", "intruder-2")?;
        lab.wait_state(&other, "served")?;
        let outside = lab.outside().start_role("outside", &Role::tcp(TCP).argv()?)?;
        outside.wait_event("listening", TIMEOUT)?;
        let vips: Vec<SocketAddr> =
            service.addresses.all().into_iter().map(|ip| (ip, 80).into()).collect();
        let elsewhere: Vec<SocketAddr> =
            lab.outside_addresses().all().into_iter().map(|ip| (ip, TCP).into()).collect();
        let http = |to: &SocketAddr| frontend.curl(&format!("http://{to}/x"))?.success();
        for to in elsewhere.iter().copied().chain([other.at(TCP), payments.at(TCP)]) {
            answered_soon(frontend, to)?;
        }
        lab.cluster()
            .apply(policy("Allow", json!([{"to": [{"serviceAccounts": ["payments"]}]}])))?;
        refused_soon(frontend, other.at(TCP))?;
        // That one may have lost its right while it was being opened; this one never has it.
        refused(frontend, other.at(TCP), "not listed")?;
        answered(frontend, payments.at(TCP), "allowed")?;
        for to in &vips {
            http(to)?;
        }
        for to in &elsewhere {
            let report = refused(frontend, *to, "outside")?;
            ensure!(report.outcome == "connect:EPERM", "{report:?}");
            answered(intruder, *to, "not selected")?;
        }
        verdict(
            lab,
            "node-1",
            "source",
            "shop/frontend",
            "shop/intruder-2",
            "DROPPED",
            "policy_no_match",
        )?;

        // The same said the other way round: a Service's own address has no account, the
        // endpoint that is chosen has.
        lab.cluster()
            .apply(policy("Deny", json!([{"to": [{"notServiceAccounts": ["payments"]}]}])))?;
        // Refused before as after: the reason tells which policy is in force.
        eventually("the denial is in force", CHANGE, || {
            refused(frontend, elsewhere[0], "denied")?;
            let flows = lab.agent("node-1")?.flows(&["--reason", "policy_deny"])?;
            Ok((!flows.is_empty()).then_some(()))
        })?;
        refused(frontend, other.at(TCP), "denied")?;
        answered(frontend, payments.at(TCP), "allowed")?;
        for to in &vips {
            http(to)?;
        }
        lab.cluster()
            .apply(policy("Deny", json!([{"to": [{"serviceAccounts": ["payments"]}]}])))?;
        refused_soon(frontend, payments.at(TCP))?;
        for to in &vips {
            // A right is taken away in the kernel first; the proxy follows within a moment.
            eventually(&format!("a denied account behind {to} is refused"), CHANGE, || {
                Ok(http(to).is_err().then_some(()))
            })?;
        }
        verdict(
            lab,
            "node-1",
            "source",
            "shop/frontend",
            "shop/payments",
            "DROPPED",
            "policy_deny",
        )?;
        Ok(())
    })
}
