//! Generates the gRPC messages and services from `proto/`, without `protoc`.

use std::path::Path;

use anyhow::Context;

const FILES: [&str; 9] = [
    "flow.proto",
    "relay.proto",
    "observer.proto",
    "peer.proto",
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
    let compile = || format!("compiling the proto files in {}", dir.display());
    let mut compiler = protox::Compiler::new([&dir]).with_context(compile)?;
    compiler.include_imports(true).open_files(FILES).with_context(compile)?;
    // The messages' own description: their JSON form is written by it.
    let out = std::env::var_os("OUT_DIR").context("OUT_DIR is not set")?;
    let descriptors = Path::new(&out).join("descriptors.binpb");
    std::fs::write(&descriptors, compiler.encode_file_descriptor_set())
        .with_context(|| format!("writing {}", descriptors.display()))?;
    tonic_prost_build::configure()
        .codec_path("crate::proto::StrictCodec")
        .compile_fds(compiler.file_descriptor_set())
        .context("generating code from proto files")
}
