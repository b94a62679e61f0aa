//! The kernel's features: all in use, or, where the run masks some, their fallbacks shown.

use anyhow::{Result, ensure};

use crate::mesh::{Mesh, TCP, answered_soon, with_logs};

#[test]
fn missing_features_are_shown_and_everything_is_attached() -> Result<()> {
    let mesh = Mesh::start(Some("strict"))?;
    with_logs(&mesh, |mesh| {
        answered_soon(&mesh.frontend, mesh.payments.at(TCP))?;
        let masked = std::env::var("SIGNET_MASK_FEATURES").unwrap_or_default();
        for agent in mesh.lab.agents() {
            let programs = agent.status()?["programs"].clone();
            ensure!(programs["attached"] == programs["expected"], "{programs}");
            let fallbacks = programs["fallbacks"].to_string();
            // A variant that masks nothing in truth would prove nothing.
            ensure!(fallbacks.contains("masked") != masked.is_empty(), "{masked:?}: {programs}");
            if masked == "5.15" {
                ensure!(fallbacks.contains("set_retval"), "{programs}");
            }
        }
        Ok(())
    })
}
