//! Clippy over the eBPF programs, for the BPF target and with the compiler that builds them
//! (the workspace's own clippy run sees only the crate's shared library).

use std::process::Command;

use crate::{
    command, setup,
    toolchain::{Kind, Toolchain},
    workspace::{self, Workspace},
};

/// Runs clippy over the programs; where that compiler has no clippy it says so and passes.
pub fn clippy(workspace: &Workspace, toolchain: &Toolchain) -> anyhow::Result<()> {
    let cargo_clippy = toolchain.rustc.with_file_name("cargo-clippy");
    if !workspace::is_executable(&cargo_clippy)
        && let Err(error) = setup::install_clippy(toolchain.kind)
    {
        eprintln!("check: {error:#}");
    }
    if !workspace::is_executable(&cargo_clippy) {
        let package = match toolchain.kind {
            Kind::DebianWeb => "package rust-web-clippy",
            Kind::RustupNightly => "`rustup component add clippy --toolchain nightly`",
        };
        eprintln!("check: the eBPF compiler has no clippy ({package}): programs not linted");
        return Ok(());
    }
    // Called by its path: `cargo clippy` would prefer the one in cargo's own directory.
    let mut clippy = Command::new(cargo_clippy);
    clippy
        .current_dir(workspace.root.join("ebpf"))
        .args(["clippy", "--release", "-Z", "build-std=core", "--target", "bpfel-unknown-none"])
        .args(["--package", "signet-ebpf", "--features", "bpf", "--bins", "--", "-D", "warnings"])
        // Map keys are passed by reference: by value they would be copied once more onto a
        // stack of 512 bytes.
        .args(["-A", "clippy::needless_borrows_for_generic_args"])
        .env("CARGO", &toolchain.cargo)
        .env("RUSTC", &toolchain.rustc)
        .env("RUSTC_BOOTSTRAP", "1")
        .env("CARGO_TARGET_DIR", workspace.target.join("bpf"))
        .env("RUSTFLAGS", format!("--cfg=bpf_target_arch=\"{}\"", std::env::consts::ARCH))
        .env_remove("RUSTUP_TOOLCHAIN");
    command::run(&mut clippy)
}
