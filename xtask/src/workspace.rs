//! Where things are: the workspace's root, its target directory, its cargo.

use std::{
    env,
    ffi::OsString,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::Context as _;

/// The workspace that this program was built from.
pub struct Workspace {
    /// The directory of the workspace's `Cargo.toml`.
    pub root: PathBuf,
    /// Where cargo builds (`CARGO_TARGET_DIR`, else `target`).
    pub target: PathBuf,
}

impl Workspace {
    /// Finds it from where cargo says that this crate is.
    pub fn find() -> anyhow::Result<Self> {
        let own = env::var_os("CARGO_MANIFEST_DIR")
            .map_or_else(|| PathBuf::from(env!("CARGO_MANIFEST_DIR")), PathBuf::from);
        let root = own.parent().context("xtask has no parent directory")?.to_owned();
        let target = match env::var_os("CARGO_TARGET_DIR") {
            Some(dir) => root.join(dir),
            None => root.join("target"),
        };
        Ok(Self { root, target })
    }

    /// The cargo that runs us, in the workspace's root.
    pub fn cargo(&self) -> Command {
        let mut cargo = Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
        cargo.current_dir(&self.root);
        cargo
    }
}

/// The directory into which `cargo install` puts programs.
pub fn cargo_bin() -> Option<PathBuf> {
    let named = |name: &str| env::var_os(name).filter(|v| !v.is_empty()).map(PathBuf::from);
    named("CARGO_INSTALL_ROOT")
        .or_else(|| named("CARGO_HOME"))
        .or_else(|| named("HOME").map(|home| home.join(".cargo")))
        .map(|root| root.join("bin"))
}

/// The first directory of `PATH` (then of `also`) that holds an executable `program`.
pub fn find_program(program: &str, also: &[&Path]) -> Option<PathBuf> {
    find_in(env::var_os("PATH"), program, also)
}

fn find_in(path: Option<OsString>, program: &str, also: &[&Path]) -> Option<PathBuf> {
    let path = path.unwrap_or_default();
    env::split_paths(&path)
        .chain(also.iter().map(|dir| dir.to_path_buf()))
        .filter(|dir| dir.is_absolute())
        .map(|dir| dir.join(program))
        .find(|candidate| is_executable(candidate))
}

/// True for a regular file that somebody may execute.
pub fn is_executable(path: &Path) -> bool {
    use std::os::unix::fs::PermissionsExt as _;
    path.metadata().is_ok_and(|m| m.is_file() && m.permissions().mode() & 0o111 != 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn programs_are_found_in_order_and_only_if_executable() {
        let found = find_in(Some("/nowhere:relative:/bin".into()), "sh", &[]);
        assert_eq!(found.as_deref(), Some(Path::new("/bin/sh")));
        assert_eq!(find_in(None, "sh", &[Path::new("/bin")]).as_deref(), found.as_deref());
        assert_eq!(find_in(Some("/etc".into()), "passwd", &[]), None);
    }
}
