//! The cgroups whose flows are attested as the kubelet's probes (DESIGN §4.6): configured,
//! else the kubelet's own, found by its listener. Never "the host" as such.

use std::{
    fs,
    os::fd::AsFd,
    path::{Path, PathBuf},
};

use crate::kernel::{
    cgroup::{Cgroup, Hierarchy},
    destroy::{self, States},
};

/// The port that the kubelet's API listens on.
const KUBELET_PORT: u16 = 10250;

/// The cgroups that were found, and why others were not taken.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ProbeCgroups {
    /// They.
    pub cgroups: Vec<Cgroup>,
    /// What is wrong, for people: probes are refused where nothing was found.
    pub problems: Vec<String>,
}

impl ProbeCgroups {
    /// Looks `configured` paths up, or the kubelet where there are none.
    ///
    /// Must run in the node's network namespace.
    pub fn find(hierarchy: &Hierarchy, workloads: &Cgroup, configured: &[String]) -> Self {
        let mut found = Self::default();
        if configured.is_empty() {
            match kubelet(hierarchy) {
                Ok(name) => found.take(hierarchy, workloads, &name, "the kubelet's cgroup"),
                Err(problem) => found.problems.push(format!(
                    "{problem}: probes of strict pods are refused; name the kubelet's cgroup in \
                     probeCgroups"
                )),
            }
        }
        for name in configured {
            found.take(hierarchy, workloads, Path::new(name), "probeCgroups:");
        }
        found
    }

    /// True while every one of them is still there.
    pub fn is_current(&self, hierarchy: &Hierarchy) -> bool {
        !self.cgroups.is_empty()
            && self.cgroups.iter().all(|c| hierarchy.open(&c.name).is_ok_and(|now| now.id == c.id))
    }

    fn take(&mut self, hierarchy: &Hierarchy, workloads: &Cgroup, name: &Path, what: &str) {
        let name = Path::new("/").join(name);
        if let Some(why) = unfit(&name, &workloads.name) {
            self.problems.push(format!(
                "{what} {} {why}: probes from it are refused; give the kubelet a cgroup of its own",
                name.display()
            ));
            return;
        }
        match hierarchy.open(&name) {
            Ok(cgroup) => self.cgroups.push(cgroup),
            Err(error) => self.problems.push(format!(
                "{what} {} cannot be used ({error}): probes from it are refused",
                name.display()
            )),
        }
    }
}

/// Why a cgroup must not be trusted with probes.
fn unfit(name: &Path, workloads: &Path) -> Option<&'static str> {
    if name == Path::new("/") {
        return Some("is the root of the hierarchy");
    }
    if name.starts_with(workloads) {
        return Some("is among the workloads");
    }
    if workloads.starts_with(name) {
        return Some("holds the workloads too");
    }
    None
}

/// The kubelet's cgroup, by the process that listens on its port.
fn kubelet(hierarchy: &Hierarchy) -> Result<PathBuf, String> {
    let nobody = || format!("nothing listens on port {KUBELET_PORT} in the node's network");
    let socket = destroy::own_diag_socket().map_err(|error| format!("no sock_diag ({error})"))?;
    let inode = destroy::list(socket.as_fd(), States::Listening)
        .map_err(|error| error.to_string())?
        .iter()
        .find(|socket| socket.local.port() == KUBELET_PORT)
        .map(|socket| socket.inode)
        .ok_or_else(nobody)?;
    let target = format!("socket:[{inode}]");
    for process in fs::read_dir("/proc").into_iter().flatten().flatten() {
        if !process.file_name().as_encoded_bytes().iter().all(u8::is_ascii_digit) {
            continue;
        }
        let holds = fs::read_dir(process.path().join("fd"))
            .into_iter()
            .flatten()
            .flatten()
            .any(|fd| fs::read_link(fd.path()).is_ok_and(|link| link.as_os_str() == &*target));
        if holds && let Ok(text) = fs::read_to_string(process.path().join("cgroup")) {
            return hierarchy
                .of_process(&text)
                .ok_or_else(|| "the kubelet's cgroup is not below the cgroup2 mount".to_owned());
        }
    }
    Err(format!("no process of this pid namespace holds the listener on port {KUBELET_PORT}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_cgroup_apart_from_the_workloads_is_fit() {
        let workloads = Path::new("/node/kubepods");
        for (name, fit) in [
            ("/", false),
            ("/node", false),
            ("/node/kubepods", false),
            ("/node/kubepods/burstable", false),
            ("/node/kubelet", true),
            ("/system.slice/kubelet.service", true),
        ] {
            assert_eq!(unfit(Path::new(name), workloads).is_none(), fit, "{name}");
        }
    }
}
