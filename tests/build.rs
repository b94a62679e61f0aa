//! Generates a client of Hubble's API from the tests' own description of it, so that nothing of
//! the product's is on that side of the wire.

use std::path::Path;

use anyhow::Context as _;

fn main() -> anyhow::Result<()> {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("proto");
    println!("cargo::rerun-if-changed={}", dir.display());
    let files = ["flow.proto", "observer.proto", "peer.proto", "health.proto"];
    let descriptors = protox::compile(files, [&dir])
        .with_context(|| format!("compiling the proto files in {}", dir.display()))?;
    tonic_prost_build::configure()
        .build_server(false)
        .compile_fds(descriptors)
        .context("generating code from proto files")
}
