//! Pods that Istio's ambient mesh serves: reached over HBONE, under their account's identity,
//! though no agent of ours announces them. A server of the lab plays their ztunnel.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use anyhow::{Context, Result, ensure};
use signet_lab::{
    capture::TUNNEL_PORT,
    eventually,
    forge::{Forger, Leaf},
    traffic::{Role, roles::HostileServer},
};

use crate::mesh::{Mesh, TCP, TIMEOUT, answered_soon, dial, with_logs};

const REDIRECTION: &str = "ambient.istio.io/redirection";

#[test]
fn what_a_ztunnel_serves_is_reached_over_hbone_under_its_own_identity() -> Result<()> {
    let mesh = Mesh::start(Some("strict"))?;
    with_logs(&mesh, |mesh| {
        let lab = &mesh.lab;
        let authority = lab.agents()[0].authority_dir().to_owned();
        let forger = Forger::with_stolen_root(&authority, lab.directory())?;
        let server = |name: &str| {
            anyhow::Ok(
                lab.pod_on(lab.node("node-2")?, "legacy", name).container("tcp", Role::tcp(TCP)),
            )
        };
        // The control: as it is, its namespace is off, and it is reached in clear.
        let plain = server("plain")?.start()?;
        answered_soon(&mesh.frontend, plain.at(TCP))?;

        let captured = server("captured")?.annotation(REDIRECTION, "enabled").start()?;
        let to = captured.at(TCP);
        let unspecified: IpAddr = match captured.addresses().first() {
            IpAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
            IpAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
        };
        let agent = lab.agent("node-1")?;
        // Who answers there must be its account; then it is asked for the pod's own port.
        for (account, believed) in [("somebody", false), ("default", true)] {
            let id = format!("spiffe://cluster.local/ns/legacy/sa/{account}");
            let role = HostileServer {
                listen: vec![SocketAddr::new(unspecified, TUNNEL_PORT)],
                certificate: forger.sign(account, &Leaf::of(&[&id]))?,
                alpn: vec!["h2".into()],
            };
            let ztunnel = captured.start(&Role::HostileServer(role))?;
            ztunnel.wait_event("listening", TIMEOUT)?;
            eventually("the ztunnel is dialled", TIMEOUT, || {
                let report = dial(&mesh.frontend, to, "secret-77c1")?;
                ensure!(!report.answered(), "in clear: {report:?}");
                let filter = if believed { "forwarded" } else { "dropped" };
                let flows = agent.flows(&["--to-pod", "legacy/captured", "--verdict", filter])?;
                let is_so = |reason: &str, via: &str| {
                    flows.iter().any(|flow| flow.reason == reason && flow.via == via)
                };
                let told = if believed {
                    is_so("allowed", "mtls")
                } else {
                    flows.iter().any(|flow| flow.reason == "identity_mismatch")
                };
                Ok(told.then_some(()))
            })
            .with_context(|| ztunnel.said())?;
            let asked: Vec<_> = ztunnel
                .printed()
                .into_iter()
                .filter(|line| line["event"] == "fooled")
                .map(|line| line["request"].as_str().unwrap_or_default().to_owned())
                .collect();
            if believed {
                ensure!(asked.iter().all(|request| *request == to.to_string()), "{asked:?}");
                ensure!(!asked.is_empty(), "{}", ztunnel.said());
            } else {
                ensure!(asked.is_empty(), "it was believed: {asked:?}");
            }
            drop(ztunnel);
        }
        Ok(())
    })
}
