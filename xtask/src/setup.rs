//! `cargo xtask setup`: finds or installs what the eBPF build and the lab need.
//!
//! Debian and Ubuntu get packages by apt; elsewhere rustup's nightly is used. It prints what
//! it does, does nothing twice, and where it cannot go on it says exactly what to do.

use std::{env, path::Path, process::Command};

use anyhow::Context as _;

use crate::{
    command,
    failure::Failure,
    monitoring,
    toolchain::{self, BPF_LINKER, Compiler, Kind, OLDEST_RUSTC, Toolchain, Version},
    workspace::{self, Workspace},
};

/// Programs that the build and the lab run, with the package that brings each.
const PROGRAMS: &[(&str, &str, &str)] = &[
    ("cc", "gcc libc6-dev", "links the build, and compiles the crypto library"),
    ("ip", "iproute2", "lets you look around in the lab"),
    ("curl", "curl", "is the plain client of the lab's tests"),
    ("containerd", "containerd", "makes the lab's pods as a real node does"),
    ("runc", "runc", "is the runtime of those pods"),
    ("host-local", "containernetworking-plugins", "gives those pods their addresses"),
    ("nft", "nftables", "rewrites addresses where a test attacks by it"),
    ("chromium", "chromium", "shows the page of signet ui to its tests"),
    ("tmux", "tmux", "is the terminal of signet top in its tests"),
    ("kubectl", "kubernetes-client", "builds the manifests for their check"),
    ("wrk", "wrk", "loads the judge of HTTP requests in its test"),
    ("python3", "python3 python3-venv", "plays others' SPIFFE clients and odd ones in the tests"),
];

/// Modules of Debian's own Python, each with its package: others' gRPC and websockets.
const PYTHON_MODULES: &[(&str, &str)] =
    &[("grpc", "python3-grpcio"), ("websockets", "python3-websockets")];

/// Where Debian's packages of Python modules are.
const DIST_PACKAGES: &str = "/usr/lib/python3/dist-packages";

/// Sets of packages that bring a compiler with the source of `core`, best first.
const COMPILER_PACKAGES: &[[&str; 3]] =
    &[["rustc-web", "cargo-web", "rust-web-src"], ["rustc", "cargo", "rust-src"]];

/// Runs the set-up and returns the toolchain, which it also records for `agent/build.rs`.
pub fn run(workspace: &Workspace) -> anyhow::Result<Toolchain> {
    let mut apt = Apt::default();
    programs(&mut apt)?;
    python_modules(&mut apt)?;
    monitoring::install(workspace)?;
    let compiler = compiler(&mut apt)?;
    let bpf_linker = match toolchain::find_bpf_linker() {
        Some(path) => path,
        None => {
            install_bpf_linker(workspace, &compiler, &mut apt)?;
            toolchain::find_bpf_linker().with_context(|| {
                format!("bpf-linker {BPF_LINKER} was installed, but is not where `cargo install` puts programs: add that directory to PATH")
            })?
        }
    };
    let found = Toolchain {
        rustc: compiler.rustc,
        cargo: compiler.cargo,
        sysroot_has_src: true,
        bpf_linker,
        kind: compiler.kind,
    };
    toolchain::record(workspace, &found)?;
    eprintln!(
        "setup: rustc {} (LLVM {}) at {}, bpf-linker at {}",
        compiler.version,
        compiler.llvm,
        found.rustc.display(),
        found.bpf_linker.display(),
    );
    Ok(found)
}

/// Finds or installs the plain programs.
fn programs(apt: &mut Apt) -> anyhow::Result<()> {
    let missing = || PROGRAMS.iter().filter(|(program, ..)| !have(program)).collect::<Vec<_>>();
    let wanted = missing();
    if wanted.is_empty() {
        return Ok(());
    }
    for (program, package, purpose) in &wanted {
        eprintln!("setup: `{program}` is missing (package {package}; it {purpose})");
    }
    let packages: Vec<&str> = wanted.iter().flat_map(|(_, p, _)| p.split(' ')).collect();
    apt.install(&packages)?;
    match missing().as_slice() {
        [] => Ok(()),
        [(program, package, _), ..] => Err(Failure::host(format!(
            "`{program}` is still missing after installing {package}: put it into PATH"
        ))),
    }
}

/// Finds or installs what the tests' Python programs import.
fn python_modules(apt: &mut Apt) -> anyhow::Result<()> {
    let is_missing = |module: &str| !Path::new(DIST_PACKAGES).join(module).is_dir();
    let missing = PYTHON_MODULES.iter().filter(|(module, _)| is_missing(module));
    let packages: Vec<&str> = missing.map(|(_, package)| *package).collect();
    if packages.is_empty() {
        return Ok(());
    }
    eprintln!("setup: Python modules are missing (packages {})", packages.join(", "));
    apt.install(&packages)
}

fn have(program: &str) -> bool {
    // CNI plugins are on no PATH.
    let system = ["/usr/sbin", "/sbin", "/usr/bin", "/bin", "/usr/lib/cni"].map(Path::new);
    workspace::find_program(program, &system).is_some()
}

/// Finds or installs the compiler of the eBPF programs.
fn compiler(apt: &mut Apt) -> anyhow::Result<Compiler> {
    if let Some(found) = Compiler::of_distribution().or_else(Compiler::of_rustup) {
        return Ok(found);
    }
    eprintln!(
        "setup: no compiler for the eBPF programs yet (rustc {OLDEST_RUSTC} or newer with the source of `core`)"
    );
    if toolchain::has_apt() {
        let offered = match apt.compiler_packages() {
            Some(packages) => Some(packages),
            None => {
                apt.update()?;
                apt.compiler_packages()
            }
        };
        if let Some(packages) = offered {
            apt.install(packages)?;
            return Compiler::of_distribution().with_context(|| {
                format!("{} are installed, but /usr/bin/rustc is older than {OLDEST_RUSTC} or lacks the source of `core`", packages.join(", "))
            });
        }
    }
    if have("rustup") {
        let installed = command::run(Command::new("rustup").args([
            "toolchain",
            "install",
            "nightly",
            "--profile",
            "minimal",
            "--component",
            "rust-src",
        ]));
        if let Some(found) = installed.ok().and_then(|()| Compiler::of_rustup()) {
            return Ok(found);
        }
    }
    Err(Failure::host(format!(
        "no compiler for the eBPF programs: install rustup (https://rustup.rs), run \
         `rustup toolchain install nightly --component rust-src`, then `cargo xtask setup` again \
         (or, on Debian, make the packages {} installable in a version of {OLDEST_RUSTC} or newer)",
        COMPILER_PACKAGES[0].join(" ")
    )))
}

/// Builds bpf-linker against an LLVM that reads the compiler's bitcode.
fn install_bpf_linker(
    workspace: &Workspace,
    compiler: &Compiler,
    apt: &mut Apt,
) -> anyhow::Result<()> {
    let llvm = compiler.llvm;
    let package = format!("llvm-{llvm}-dev");
    eprintln!("setup: bpf-linker is missing; it is built against LLVM {llvm} (about a minute)");
    if toolchain::find_llvm(llvm).is_none() && toolchain::has_apt() {
        apt.install(&[&package])?;
    }
    let Some(prefix) = toolchain::find_llvm(llvm) else {
        let nightly = match compiler.kind {
            Kind::RustupNightly => " (nightly's LLVM; a newer LLVM does too)",
            Kind::DebianWeb => "",
        };
        return Err(Failure::host(format!(
            "bpf-linker needs the development files of LLVM {llvm}{nightly}: install them \
             ({package}, or your distribution's LLVM {llvm}) and run `cargo xtask setup` again, or \
             install bpf-linker {BPF_LINKER} or newer yourself (https://github.com/aya-rs/bpf-linker) into PATH"
        )));
    };
    command::run(&mut linker_build(workspace, llvm, &prefix))
        .context("bpf-linker could not be built")
}

fn linker_build(workspace: &Workspace, llvm: u32, prefix: &Path) -> Command {
    let mut cargo = workspace.cargo();
    cargo
        // Outside the workspace, so that its cargo configuration has no say.
        .current_dir("/")
        // llvm-sys and bpf-linker each have their own variable.
        .env("LLVM_PREFIX", prefix)
        .env(format!("LLVM_SYS_{llvm}1_PREFIX"), prefix)
        .args(["install", "bpf-linker", "--version", BPF_LINKER, "--locked", "--force"])
        .args(["--no-default-features", "--features", &format!("llvm-{llvm}")]);
    cargo
}

/// Installs clippy for the compiler of the eBPF programs (only `cargo xtask check` wants it).
pub fn install_clippy(kind: Kind) -> anyhow::Result<()> {
    match kind {
        Kind::DebianWeb => Apt::default().install(&["rust-web-clippy"]),
        Kind::RustupNightly => command::run(Command::new("rustup").args([
            "component",
            "add",
            "clippy",
            "--toolchain",
            "nightly",
        ])),
    }
}

/// The distribution's packages.
#[derive(Default)]
struct Apt {
    updated: bool,
}

impl Apt {
    /// The first set of compiler packages on offer that is new enough.
    fn compiler_packages(&self) -> Option<&'static [&'static str]> {
        COMPILER_PACKAGES
            .iter()
            .find(|set| {
                set.iter().all(|package| {
                    command::output("apt-cache", &["policy", package])
                        .as_deref()
                        .and_then(candidate)
                        .is_some_and(|version| version >= OLDEST_RUSTC)
                })
            })
            .map(|set| set.as_slice())
    }

    fn update(&mut self) -> anyhow::Result<()> {
        if self.updated {
            return Ok(());
        }
        command::run(privileged("apt-get")?.args(["update", "-qq"]))?;
        self.updated = true;
        Ok(())
    }

    fn install(&mut self, packages: &[&str]) -> anyhow::Result<()> {
        if !toolchain::has_apt() {
            return Err(Failure::host(format!(
                "this host has no apt: install what Debian calls {} with its own package manager, then run `cargo xtask setup` again",
                packages.join(", ")
            )));
        }
        self.update()?;
        let mut apt = privileged("apt-get")?;
        apt.args(["install", "-y", "-qq", "--no-install-recommends", "-o", "Dpkg::Use-Pty=0"])
            .args(packages);
        command::run(&mut apt)
    }
}

/// The version that `apt-cache policy` would install.
fn candidate(policy: &str) -> Option<Version> {
    policy.lines().find_map(|line| line.trim().strip_prefix("Candidate: ")).and_then(Version::parse)
}

/// A command with root's rights.
fn privileged(program: &str) -> anyhow::Result<Command> {
    let mut command = if toolchain::is_root() {
        Command::new(program)
    } else if let Some(sudo) = toolchain::sudo() {
        let mut command = Command::new(sudo);
        command.arg(program);
        command
    } else {
        return Err(Failure::host(
            "packages are missing and only root may install them: run `cargo xtask setup` as root",
        ));
    };
    if env::var_os("DEBIAN_FRONTEND").is_none() {
        command.env("DEBIAN_FRONTEND", "noninteractive");
    }
    Ok(command)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_candidate_is_read_from_the_policy() {
        let policy = "rustc-web:\n  Installed: (none)\n  Candidate: 1.96.0+dfsg1-1~deb12u2\n  Version table:\n";
        assert_eq!(candidate(policy), Some(Version { major: 1, minor: 96 }));
        assert_eq!(candidate("x:\n  Installed: (none)\n  Candidate: (none)\n"), None);
        assert_eq!(candidate(""), None);
    }

    #[test]
    fn the_linker_is_built_against_the_compilers_llvm() {
        let workspace = Workspace { root: "/w".into(), target: "/w/target".into() };
        let shown = command::shown(&linker_build(&workspace, 22, Path::new("/usr/lib/llvm-22")));
        assert!(shown.contains("LLVM_PREFIX=/usr/lib/llvm-22 "), "{shown}");
        assert!(shown.contains("LLVM_SYS_221_PREFIX=/usr/lib/llvm-22 "), "{shown}");
        assert!(shown.contains("--version 0.13.0 --locked"), "{shown}");
        assert!(shown.ends_with("--no-default-features --features llvm-22"), "{shown}");
    }
}
