//! The toolchain of the eBPF build: a rustc that may use unstable features, the source of
//! `core`, and a bpf-linker whose LLVM reads that rustc's bitcode.
//!
//! [`Toolchain`] is recorded in `target/signet-toolchain.json`, which `agent/build.rs` reads.

use std::{
    env, fs,
    path::{Path, PathBuf},
};

use anyhow::Context as _;
use serde::{Deserialize, Serialize};

use crate::{
    command,
    workspace::{self, Workspace},
};

/// The oldest compiler that builds the programs (the workspace's own minimum).
pub const OLDEST_RUSTC: Version = Version { major: 1, minor: 95 };

/// The bpf-linker that set-up installs, and the oldest that it accepts.
pub const BPF_LINKER: &str = "0.13.0";

/// What was found, as `agent/build.rs` reads it.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Toolchain {
    /// The compiler.
    pub rustc: PathBuf,
    /// Its cargo.
    pub cargo: PathBuf,
    /// True when the compiler's sysroot holds the source of `core`.
    pub sysroot_has_src: bool,
    /// The linker.
    pub bpf_linker: PathBuf,
    /// Where the compiler comes from.
    pub kind: Kind,
}

/// Where a compiler comes from.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Kind {
    /// The distribution's packages; unstable features by `RUSTC_BOOTSTRAP=1`.
    DebianWeb,
    /// rustup's nightly.
    RustupNightly,
}

/// A compiler that can build the programs once there is a linker.
#[derive(Clone, Debug)]
pub struct Compiler {
    /// The compiler.
    pub rustc: PathBuf,
    /// Its cargo.
    pub cargo: PathBuf,
    /// Where it comes from.
    pub kind: Kind,
    /// Its version.
    pub version: Version,
    /// Major version of its LLVM.
    pub llvm: u32,
}

/// A `major.minor` version.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct Version {
    /// Before the first dot.
    pub major: u32,
    /// After it.
    pub minor: u32,
}

impl Version {
    /// Reads the start of `1.96.0+dfsg1-1` or `0.13.0`; a package's epoch (`1:`) is skipped.
    pub fn parse(text: &str) -> Option<Self> {
        let text = text.split_once(':').map_or(text, |(_, rest)| rest);
        let mut parts = text.split('.');
        let mut number = || {
            let part = parts.next()?;
            let digits = part.find(|c: char| !c.is_ascii_digit()).unwrap_or(part.len());
            part[..digits].parse().ok()
        };
        Some(Self { major: number()?, minor: number()? })
    }
}

impl std::fmt::Display for Version {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}.{}", self.major, self.minor)
    }
}

impl Compiler {
    /// The distribution's compiler, when it is new enough and has the source of `core`.
    pub fn of_distribution() -> Option<Self> {
        Self::at("/usr/bin/rustc".into(), "/usr/bin/cargo".into(), Kind::DebianWeb)
    }

    /// rustup's nightly, when it is installed with the source of `core`.
    pub fn of_rustup() -> Option<Self> {
        let which = |program| {
            let path = command::output("rustup", &["which", "--toolchain", "nightly", program])?;
            Some(PathBuf::from(path.trim()))
        };
        Self::at(which("rustc")?, which("cargo")?, Kind::RustupNightly)
    }

    fn at(rustc: PathBuf, cargo: PathBuf, kind: Kind) -> Option<Self> {
        let program = rustc.to_str()?;
        let about = command::output(program, &["-vV"])?;
        let (version, llvm) = parse_about(&about)?;
        let sysroot = PathBuf::from(command::output(program, &["--print", "sysroot"])?.trim());
        let usable = version >= OLDEST_RUSTC
            && workspace::is_executable(&cargo)
            && sysroot.join("lib/rustlib/src/rust/library/core/src/lib.rs").is_file();
        usable.then_some(Self { rustc, cargo, kind, version, llvm })
    }
}

/// The version and the LLVM major version in what `rustc -vV` prints.
fn parse_about(about: &str) -> Option<(Version, u32)> {
    let field = |name: &str| about.lines().find_map(|line| line.strip_prefix(name));
    let version = Version::parse(field("release: ")?)?;
    let llvm = Version::parse(field("LLVM version: ")?)?.major;
    Some((version, llvm))
}

/// A bpf-linker that is new enough: in `PATH` or where `cargo install` puts it.
pub fn find_bpf_linker() -> Option<PathBuf> {
    let cargo_bin = workspace::cargo_bin();
    let also: Vec<&Path> = cargo_bin.as_deref().into_iter().collect();
    let path = workspace::find_program("bpf-linker", &also)?;
    let about = command::output(path.to_str()?, &["--version"])?;
    let version = Version::parse(about.trim().strip_prefix("bpf-linker ")?)?;
    (version >= Version::parse(BPF_LINKER)?).then_some(path)
}

/// The prefix of an installed LLVM of this major version, with its development files.
pub fn find_llvm(major: u32) -> Option<PathBuf> {
    let versioned = format!("/usr/lib/llvm-{major}/bin/llvm-config");
    let named = format!("llvm-config-{major}");
    [versioned.as_str(), named.as_str(), "llvm-config"].into_iter().find_map(|program| {
        let version = command::output(program, &["--version"])?;
        (Version::parse(version.trim())?.major == major)
            .then(|| command::output(program, &["--prefix"]))
            .flatten()
            .map(|prefix| PathBuf::from(prefix.trim()))
    })
}

/// Where the found toolchain is recorded.
pub fn record_path(workspace: &Workspace) -> PathBuf {
    workspace.target.join("signet-toolchain.json")
}

/// Records the toolchain; an unchanged record keeps its time, so that nothing is rebuilt.
pub fn record(workspace: &Workspace, toolchain: &Toolchain) -> anyhow::Result<()> {
    let path = record_path(workspace);
    let text = format!("{}\n", serde_json::to_string_pretty(toolchain)?);
    if fs::read_to_string(&path).is_ok_and(|old| old == text) {
        return Ok(());
    }
    fs::create_dir_all(&workspace.target)
        .and_then(|()| fs::write(&path, text))
        .with_context(|| format!("{} cannot be written", path.display()))
}

/// True when this process may install the distribution's packages.
pub fn is_root() -> bool {
    command::output("id", &["-u"]).is_some_and(|uid| uid.trim() == "0")
}

/// The program that lends us root's rights, when we lack them and it exists.
pub fn sudo() -> Option<PathBuf> {
    workspace::find_program("sudo", &[])
}

/// True on a distribution whose packages come by apt.
pub fn has_apt() -> bool {
    workspace::find_program("apt-get", &[]).is_some() && env::consts::OS == "linux"
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_read_from_packages_and_programs() {
        let v = |major, minor| Some(Version { major, minor });
        assert_eq!(Version::parse("1.96.0+dfsg1-1~deb12u2"), v(1, 96));
        assert_eq!(Version::parse("1:22.1.8-1~deb12u1"), v(22, 1));
        assert_eq!(Version::parse("0.13.0"), v(0, 13));
        assert_eq!(Version::parse("1.97.0-nightly"), v(1, 97));
        assert_eq!(Version::parse("(none)"), None);
        assert_eq!(Version::parse("1"), None);
        assert!(Version::parse("1.85.0") < Some(OLDEST_RUSTC));
    }

    #[test]
    fn the_compiler_tells_its_version_and_llvm() {
        let about = "rustc 1.96.0 (ac68faa20 2026-05-25)\nbinary: rustc\n\
                     release: 1.96.0\nLLVM version: 22.1.8\n";
        assert_eq!(parse_about(about), Some((Version { major: 1, minor: 96 }, 22)));
        assert_eq!(parse_about("rustc 1.96.0\n"), None);
    }

    #[test]
    fn the_record_is_what_the_build_script_reads() {
        let toolchain = Toolchain {
            rustc: "/usr/bin/rustc".into(),
            cargo: "/usr/bin/cargo".into(),
            sysroot_has_src: true,
            bpf_linker: "/opt/bin/bpf-linker".into(),
            kind: Kind::DebianWeb,
        };
        let value = serde_json::to_value(&toolchain).unwrap();
        assert_eq!(value["kind"], "debian-web");
        assert_eq!(value["bpf_linker"], "/opt/bin/bpf-linker");
        assert_eq!(value["sysroot_has_src"], true);
        assert_eq!(serde_json::from_value::<Toolchain>(value).unwrap(), toolchain);
    }
}
