//! What Prometheus reads of an agent is what happened.

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
            // Nothing that grows with pods or identities is a label.
            for told in ["frontend", "payments", "intruder", "shop", "spiffe:"] {
                ensure!(!metrics.tells(told), "{told} is in the metrics");
            }
            let missing = metrics.undocumented(include_str!("../../../../docs/metrics.md"));
            ensure!(missing.is_empty(), "not in docs/metrics.md: {missing:?}");
            ensure!(metrics.series() < 300, "{} series", metrics.series());
        }
        let status = source.status()?;
        let age = status["svids"]["oldestPercent"].as_u64();
        ensure!(
            age.is_some_and(|percent| percent < 20),
            "status does not count backdating: {status}"
        );
        Ok(())
    })
}
