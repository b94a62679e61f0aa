//! Generates the gRPC messages and services from `proto/`, without `protoc`.

use std::path::Path;

use anyhow::Context;

const FILES: [&str; 8] = [
    "flow.proto",
    "relay.proto",
    "observer.proto",
    "detail.proto",
    "admin.proto",
    "workload.proto",
    "istio_ca.proto",
    "authority.proto",
];

/// Writes one Rust file a package into `OUT_DIR`.
pub fn generate() -> anyhow::Result<()> {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("proto");
    println!("cargo::rerun-if-changed={}", dir.display());
    let files = protox::compile(FILES, [&dir])
        .with_context(|| format!("compiling the proto files in {}", dir.display()))?;
    tonic_prost_build::configure().compile_fds(files).context("generating code from proto files")
}
