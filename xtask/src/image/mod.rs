//! `cargo xtask image`: the container image as an OCI archive, made without a daemon and the same
//! each time.
//!
//! One layer: `signet`, `kubectl-signet` (a symbolic link), and the shared libraries that the
//! binary asks for, at the places where the build machine has them. Nothing else: no shell.

mod archive;
mod elf;
mod root;

use std::{
    env, fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, bail};

use self::archive::Image;
use crate::{
    command, setup, toolchain,
    workspace::{self, Workspace},
};

/// Options of `cargo xtask image`.
#[derive(clap::Args, Clone, Debug)]
pub struct Options {
    /// Where the archive is written.
    #[arg(long, value_name = "file", default_value = "target/signet-image.tar")]
    output: PathBuf,
    /// A binary that is built already, instead of one of the release profile.
    #[arg(long, value_name = "file")]
    binary: Option<PathBuf>,
    /// The image's name.
    #[arg(
        long,
        value_name = "name",
        default_value = concat!("localhost/signet:v", env!("CARGO_PKG_VERSION"))
    )]
    name: String,
}

/// Builds, writes and tries the image.
pub fn run(workspace: &Workspace, options: &Options) -> anyhow::Result<()> {
    let binary = match &options.binary {
        Some(binary) => binary.clone(),
        None => {
            setup::run(workspace)?;
            let package = ["build", "--release", "--package", "signet", "--bin", "signet"];
            command::run(workspace.cargo().args(package))?;
            let target = env::var_os("CARGO_TARGET_DIR")
                .map_or_else(|| workspace.root.join("target"), PathBuf::from);
            target.join("release/signet")
        }
    };
    let root = root::collect(&binary, "usr/bin/signet", &["usr/bin/kubectl-signet"])?;
    let image = Image::new(&root, &options.name, epoch()?)?;
    fs::write(&options.output, image.archive()?)
        .with_context(|| options.output.display().to_string())?;
    let read = archive::validate(&fs::read(&options.output)?)?;
    if toolchain::is_root() {
        eprintln!("image: {}", tried(&read, &["/usr/bin/kubectl-signet", "--version"])?.trim());
    } else {
        eprintln!("image: not tried: chroot(2) is root's");
    }
    println!("{} {} {}", options.output.display(), options.name, read.digest);
    Ok(())
}

/// The time of every file: `SOURCE_DATE_EPOCH` (reproducible-builds.org), else 1970.
fn epoch() -> anyhow::Result<u64> {
    match env::var("SOURCE_DATE_EPOCH") {
        Ok(text) => text.parse().with_context(|| {
            format!("SOURCE_DATE_EPOCH: {text:?} is not a number of seconds since 1970")
        }),
        Err(_) => Ok(0),
    }
}

/// Unpacks the image's layer and runs a program of it with that as its root; what it printed.
fn tried(image: &archive::Validated, argv: &[&str]) -> anyhow::Result<String> {
    let directory = Scratch::new()?;
    tar::Archive::new(image.layer.as_slice()).unpack(&directory.0)?;
    let system = ["/usr/sbin", "/usr/bin", "/sbin", "/bin"].map(Path::new);
    let chroot = workspace::find_program("chroot", &system)
        .context("`chroot` is missing (package coreutils)")?;
    let output = Command::new(chroot).arg(&directory.0).args(argv).env_clear().output()?;
    if !output.status.success() {
        bail!(
            "{argv:?} in the image: {} {}",
            output.status,
            String::from_utf8_lossy(&output.stderr)
        );
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// A directory that goes with its owner.
struct Scratch(PathBuf);

impl Scratch {
    fn new() -> anyhow::Result<Self> {
        let path = env::temp_dir().join(format!("signet-image-{}", std::process::id()));
        let _ = fs::remove_dir_all(&path);
        fs::create_dir_all(&path).with_context(|| path.display().to_string())?;
        Ok(Self(path))
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// The absolute path inside the image as one below its root.
fn inside(path: &Path) -> String {
    path.to_string_lossy().trim_start_matches('/').to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_the_same_twice_valid_and_runs_in_its_own_root() {
        // A program that prints its arguments stands for ours: small, and of this machine.
        let program = Path::new("/usr/bin/echo");
        let build = |time| {
            let root = root::collect(program, "usr/bin/signet", &["usr/bin/kubectl-signet"]);
            Image::new(&root.unwrap(), "localhost/signet:v0", time).unwrap().archive().unwrap()
        };
        let first = build(0);
        assert!(first == build(0), "built twice, two archives");
        let read = archive::validate(&first).unwrap();
        assert!(read.digest.starts_with("sha256:"));
        let other = archive::validate(&build(1)).unwrap();
        assert_ne!(read.digest, other.digest, "the control: the time is in the digest");

        let mut names: Vec<String> = Vec::new();
        for entry in tar::Archive::new(read.layer.as_slice()).entries().unwrap() {
            let entry = entry.unwrap();
            assert_eq!(entry.header().mtime().unwrap(), 0);
            assert_eq!((entry.header().uid().unwrap(), entry.header().gid().unwrap()), (0, 0));
            names.push(entry.path().unwrap().display().to_string());
        }
        assert!(names.is_sorted(), "{names:?}");
        assert!(names.iter().any(|name| name.contains("libc.so")), "{names:?}");
        if toolchain::is_root() {
            let said = tried(&read, &["/usr/bin/kubectl-signet", "in the image"]).unwrap();
            assert_eq!(said, "in the image\n");
            assert!(tried(&read, &["/bin/sh"]).is_err(), "there is no shell");
        }

        // What is damaged is refused, by name.
        let mut damaged = first.clone();
        let at = damaged.windows(9).position(|w| w == b"mediaType").expect("the manifest") + 20;
        damaged[at] ^= 1;
        assert!(archive::validate(&damaged).is_err());
    }
}
