//! What Prometheus reads of an agent is what happened.

use std::collections::BTreeSet;

use anyhow::{Result, ensure};
use signet_lab::eventually;

use crate::mesh::{Mesh, TCP, TIMEOUT, answered, answered_soon, refused, refused_soon, with_logs};

#[test]
fn an_agents_metrics_count_what_happened() -> Result<()> {
    let mesh = Mesh::start(Some("strict"))?;
    with_logs(&mesh, |mesh| {
        let to = mesh.payments.at(TCP);
        mesh.allow_payments(&["frontend"])?;
        answered_soon(&mesh.frontend, to)?;
        refused_soon(&mesh.intruder, to)?;

        let (source, destination) = (mesh.lab.agent("node-1")?, mesh.lab.agent("node-2")?);
        let (source_before, before) = (source.metrics()?, destination.metrics()?);
        for n in 0..5 {
            answered(&mesh.frontend, to, &format!("call-{n}"))?;
        }
        for n in 0..3 {
            refused(&mesh.intruder, to, &format!("attempt-{n}"))?;
        }
        let forwarded = [("origin", "proxy"), ("verdict", "FORWARDED")];
        let after = eventually("all flows are counted", TIMEOUT, || {
            let after = destination.metrics()?;
            let count = after.sum("verdicts_total", &forwarded);
            Ok((count >= before.sum("verdicts_total", &forwarded) + 5.0).then_some(after))
        })?;
        let grown = |name: &str, labels: &[(&str, &str)]| {
            after.sum(name, labels) - before.sum(name, labels)
        };
        ensure!(grown("verdicts_total", &forwarded) == 5.0);
        ensure!(grown("flows_forwarded_total", &[]) == 5.0);
        ensure!(grown("drops_total", &[("reason", "policy_no_match")]) == 3.0, "{after:?}");
        ensure!(grown("drops_total", &[]) == 3.0, "for no other reason: {after:?}");
        ensure!(grown("lost_events_total", &[]) == 0.0);
        // The same in Istio's words, from both ends.
        let pair = [
            ("source_workload_namespace", "shop"),
            ("source_principal", "spiffe://cluster.local/ns/shop/sa/frontend"),
            ("destination_principal", "spiffe://cluster.local/ns/shop/sa/payments"),
            ("connection_security_policy", "mutual_tls"),
            ("response_flags", "-"),
        ];
        for (node, before, reporter) in
            [(&destination, &before, "destination"), (&source, &source_before, "source")]
        {
            let labels: Vec<_> = pair.iter().copied().chain([("reporter", reporter)]).collect();
            eventually("Istio's metrics count the closed ones", TIMEOUT, || {
                let now = node.metrics()?;
                let grown = |name: &str| now.sum(name, &labels) - before.sum(name, &labels);
                let bytes =
                    ["istio_tcp_sent_bytes_total", "istio_tcp_received_bytes_total"].map(grown);
                let done = grown("istio_tcp_connections_opened_total") == 5.0
                    && grown("istio_tcp_connections_closed_total") == 5.0
                    && bytes.iter().all(|bytes| *bytes > 0.0);
                Ok(done.then_some(()))
            })?;
        }
        let denied = [
            ("reporter", "destination"),
            ("source_principal", "spiffe://cluster.local/ns/shop/sa/intruder"),
            ("response_flags", "DENY"),
        ];
        ensure!(grown("istio_tcp_connections_failed_total", &denied) == 3.0, "{after:?}");
        ensure!(grown("istio_tcp_connections_failed_total", &[]) == 3.0, "{after:?}");
        ensure!(after.sum("handshakes_total", &[("role", "server")]) >= 2.0);
        let source_after = source.metrics()?;
        ensure!(source_after.sum("handshakes_total", &[("role", "client")]) >= 2.0);
        let redirected = |m: &signet_lab::metrics::Metrics| m.sum("kernel_redirected_total", &[]);
        ensure!(redirected(&source_after) - redirected(&source_before) == 8.0);

        // node-1 has frontend and intruder, node-2 payments; legacy pods need no tunnel.
        for (metrics, svids) in [(&source_after, 2.0), (&after, 1.0)] {
            let count = |state| metrics.sum("svids", &[("use", "tunnel"), ("state", state)]);
            ensure!((count("valid"), count("expired"), count("missing")) == (svids, 0.0, 0.0));
            let issued = [("use", "tunnel"), ("kind", "first"), ("result", "issued")];
            ensure!(metrics.sum("svid_requests_total", &issued) == svids);
            ensure!(metrics.sum("svid_request_duration_seconds_count", &[]) == svids);
            let age = metrics.sum("svid_oldest_age_ratio", &[("use", "tunnel")]);
            ensure!((0.0..0.2).contains(&age), "an hour's SVID, some seconds old: {age}");
            ensure!(metrics.sum("bundle_authorities", &[("trust_domain", "cluster.local")]) == 1.0);
            // Nothing that grows with pods or identities is a label of our own.
            for told in ["frontend", "payments", "intruder", "spiffe:"] {
                let tellers = metrics.tellers(told);
                ensure!(tellers.is_empty(), "{told} is in {tellers:?}");
            }
            ensure!(metrics.tellers("shop") == BTreeSet::from(["signet_plaintext_flows"]));
            ensure!(metrics.sum("enforcement", &[("state", "enforce")]) == 1.0);
            ensure!(metrics.of("program_attached").iter().all(|(_, attached)| *attached == 1.0));
            let strict = metrics.sum("pods", &[("mode", "strict")]);
            ensure!(strict == svids, "one pod an account is strict: {strict}");
            ensure!(metrics.sum("kernel_map_capacity", &[("map", "ADDRESSES")]) > 0.0);
            let missing = metrics.undocumented(include_str!("../../../../docs/metrics.md"));
            ensure!(missing.is_empty(), "not in docs/metrics.md: {missing:?}");
            ensure!(metrics.series() < 400, "{} series", metrics.series());
        }
        let (code, why) = source.readiness()?;
        ensure!(code == 200 && why.contains("is applied"), "{code}: {why}");
        let status = source.status()?;
        let age = status["svids"]["oldestPercent"].as_u64();
        ensure!(
            age.is_some_and(|percent| percent < 20),
            "status does not count backdating: {status}"
        );
        Ok(())
    })
}
