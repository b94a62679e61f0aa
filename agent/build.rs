//! Builds the eBPF objects with the toolchain that `cargo xtask setup` found and puts them
//! into `OUT_DIR`, where the `kernel` room embeds them; generates the gRPC code.

use std::{
    env, fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, bail};

/// (binary of the `ebpf` crate, object's name in `OUT_DIR`).
const OBJECTS: [(&str, &str); 3] =
    [("signet-programs", "programs.o"), ("signet-lookup", "lookup.o"), ("signet-guard", "guard.o")];

/// Variables by which the outer build would reach into the inner one.
const OUTER: [&str; 8] = [
    "CARGO_BUILD_TARGET",
    "CARGO_ENCODED_RUSTFLAGS",
    "CARGO_TARGET_DIR",
    "RUSTC",
    "RUSTC_WORKSPACE_WRAPPER",
    "RUSTC_WRAPPER",
    "RUSTFLAGS",
    "RUSTUP_TOOLCHAIN",
];

#[path = "build/proto.rs"]
mod proto;

fn main() -> anyhow::Result<()> {
    proto::generate()?;
    programs()
}

/// Compiles the programs for the BPF target and copies the objects.
fn programs() -> anyhow::Result<()> {
    let out = PathBuf::from(env::var_os("OUT_DIR").context("OUT_DIR is not set")?);
    let manifest = PathBuf::from(env::var_os("CARGO_MANIFEST_DIR").context("no manifest dir")?);
    let ebpf = manifest.join("../ebpf");
    for path in ["src", "Cargo.toml"] {
        println!("cargo:rerun-if-changed={}", ebpf.join(path).display());
    }
    println!("cargo:rerun-if-changed={}", manifest.join("../Cargo.lock").display());
    println!("cargo:rerun-if-changed={}", manifest.join("build.rs").display());

    let (record, toolchain) = toolchain(&out, &manifest)?;
    println!("cargo:rerun-if-changed={}", record.display());
    // Beside the record, so that every profile of this target directory shares one build.
    let target = record.parent().context("the record has no directory")?.join("bpf");
    let arch = env::var("CARGO_CFG_TARGET_ARCH").unwrap_or_else(|_| "x86_64".into());

    let mut command = Command::new(&toolchain.cargo);
    for name in OUTER {
        command.env_remove(name);
    }
    command
        .current_dir(&ebpf)
        .args(["build", "--release", "-Z", "build-std=core", "--target", "bpfel-unknown-none"])
        .args(["--package", "signet-ebpf", "--features", "bpf", "--bins"])
        .env("RUSTC", &toolchain.rustc)
        .env("RUSTC_BOOTSTRAP", "1")
        .env("CARGO_TARGET_DIR", &target)
        .env("CARGO_PROFILE_RELEASE_LTO", "fat")
        .env("CARGO_PROFILE_RELEASE_CODEGEN_UNITS", "1")
        .env("CARGO_PROFILE_RELEASE_DEBUG", "2")
        .env(
            "RUSTFLAGS",
            format!(
                "-C linker={} -C link-arg=--btf -C debuginfo=2 --cfg=bpf_target_arch=\"{arch}\"",
                toolchain.bpf_linker.display()
            ),
        );
    let output = command.output().with_context(|| {
        format!("cannot run {}: run `cargo xtask setup`", toolchain.cargo.display())
    })?;
    if !output.status.success() {
        bail!(
            "the eBPF programs do not build ({}); if the toolchain changed, run `cargo xtask \
             setup`:\n{}",
            output.status,
            String::from_utf8_lossy(&output.stderr)
        );
    }
    for (binary, object) in OBJECTS {
        let from = target.join("bpfel-unknown-none/release").join(binary);
        fs::copy(&from, out.join(object))
            .with_context(|| format!("cannot copy {}", from.display()))?;
    }
    Ok(())
}

/// What `cargo xtask setup` recorded.
struct Toolchain {
    rustc: PathBuf,
    cargo: PathBuf,
    bpf_linker: PathBuf,
}

/// The record nearest to `OUT_DIR`, else in the workspace's own target directory.
fn toolchain(out: &Path, manifest: &Path) -> anyhow::Result<(PathBuf, Toolchain)> {
    const NAME: &str = "signet-toolchain.json";
    let record = out
        .ancestors()
        .map(|dir| dir.join(NAME))
        .chain([manifest.join("../target").join(NAME)])
        .find(|path| path.is_file())
        .context(
            "no toolchain for the eBPF programs is recorded: run `cargo xtask setup` once \
             (`cargo xtask demo` and `cargo xtask test` do)",
        )?;
    let text = fs::read_to_string(&record)?;
    let value: serde_json::Value = serde_json::from_str(&text)
        .with_context(|| format!("{} is not JSON: run `cargo xtask setup`", record.display()))?;
    let path = |key: &str| {
        value.get(key).and_then(|v| v.as_str()).map(PathBuf::from).with_context(|| {
            format!("{}: field {key} is missing: run `cargo xtask setup`", record.display())
        })
    };
    let toolchain =
        Toolchain { rustc: path("rustc")?, cargo: path("cargo")?, bpf_linker: path("bpf_linker")? };
    Ok((record, toolchain))
}
