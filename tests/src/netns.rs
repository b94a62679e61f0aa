//! Network namespaces: made by `ip netns`, entered only with setns.
//!
//! `ip netns exec` is never used: it remounts /sys, and cgroups vanish from sight.

use std::{
    fs::{self, File},
    io::Write,
    os::fd::AsFd,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    thread,
};

use anyhow::{Context, Result, bail, ensure};
use rustix::thread::LinkNameSpaceType;

/// Where named network namespaces are bound.
pub const DIRECTORY: &str = "/run/netns";

/// Makes a named network namespace and raises its loopback device.
pub fn create(name: &str) -> Result<PathBuf> {
    ip(&["netns", "add", name])?;
    batch(name, &["link set lo up".into()])?;
    Ok(path(name))
}

/// Unbinds the name; the namespace goes when its last process and socket have gone.
pub fn delete(name: &str) {
    let _ = Command::new("ip")
        .args(["netns", "del", name])
        .stderr(Stdio::null())
        .stdout(Stdio::null())
        .status();
}

/// The file that stands for the namespace.
pub fn path(name: &str) -> PathBuf {
    Path::new(DIRECTORY).join(name)
}

/// Names that begin with `prefix` as a whole word.
pub fn named_with_prefix(prefix: &str) -> Vec<String> {
    let Ok(entries) = fs::read_dir(DIRECTORY) else { return Vec::new() };
    entries
        .flatten()
        .map(|e| e.file_name().to_string_lossy().into_owned())
        .filter(|n| n.strip_prefix(prefix).is_some_and(|r| r.is_empty() || r.starts_with('-')))
        .collect()
}

/// Runs `ip` with these arguments.
pub fn ip(arguments: &[&str]) -> Result<String> {
    let output =
        Command::new("ip").args(arguments).output().context("cannot run `ip`: install iproute2")?;
    ensure!(
        output.status.success(),
        "`ip {}` failed: {}",
        arguments.join(" "),
        String::from_utf8_lossy(&output.stderr).trim()
    );
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// Runs many `ip` commands inside the namespace in one process.
pub fn batch(name: &str, commands: &[String]) -> Result<()> {
    let mut child = Command::new("ip")
        .args(["-n", name, "-batch", "-"])
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .context("cannot run `ip`: install iproute2")?;
    if let Some(mut stdin) = child.stdin.take() {
        // A command that fails ends the batch early: its message says more than EPIPE.
        let _ = stdin.write_all(commands.join("\n").as_bytes());
    }
    let output = child.wait_with_output().context("ip -batch")?;
    if !output.status.success() {
        bail!(
            "ip -n {name}: {}in:\n  {}",
            String::from_utf8_lossy(&output.stderr),
            commands.join("\n  ")
        );
    }
    Ok(())
}

/// Runs `f` on a thread of its own inside the namespace; sockets that it makes stay there.
pub fn inside<T: Send>(namespace: &Path, f: impl FnOnce() -> Result<T> + Send) -> Result<T> {
    thread::scope(|scope| {
        scope
            .spawn(|| {
                enter(namespace)?;
                f()
            })
            .join()
            .map_err(|_| anyhow::anyhow!("a thread inside {} panicked", namespace.display()))?
    })
}

/// Moves the calling thread into the namespace, for good.
pub fn enter(namespace: &Path) -> Result<()> {
    let file =
        File::open(namespace).with_context(|| format!("no netns {}", namespace.display()))?;
    rustix::thread::move_into_link_name_space(file.as_fd(), Some(LinkNameSpaceType::Network))
        .with_context(|| format!("setns to {}", namespace.display()))
}

/// Sets sysctls inside the namespace (`net/…` paths).
pub fn sysctl(namespace: &Path, settings: &[(&str, &str)]) -> Result<()> {
    inside(namespace, || {
        for (key, value) in settings {
            // /proc/sys/net shows the network namespace of the thread that opens it.
            fs::write(format!("/proc/sys/{key}"), value)
                .with_context(|| format!("sysctl {key}={value}"))?;
        }
        Ok(())
    })
}
