//! An unkind kubelet: it starts pods as a real one does and waits for nobody.
//!
//! bind → sandbox cgroup and network namespace → addresses → pause → init containers →
//! containers → (0.2 to 2 s later) the address in the API. The agent gets no hint but what a
//! real node shows: cgroupfs, /proc, the namespace and the API's objects.

use std::{
    path::{Path, PathBuf},
    time::Duration,
};

/// How a node's container runtime names cgroups.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum CgroupDriver {
    /// `kubepods/burstable/pod<uid>/<container id>`.
    #[default]
    Cgroupfs,
    /// `kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod<uid>.slice/…scope`.
    Systemd,
}

/// A pod's quality-of-service class.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Qos {
    /// Directly below the root.
    Guaranteed,
    /// Below `burstable`.
    Burstable,
    /// Below `besteffort`.
    #[default]
    BestEffort,
}

impl CgroupDriver {
    /// The workloads root's name.
    pub fn root(self) -> &'static str {
        match self {
            Self::Cgroupfs => "kubepods",
            Self::Systemd => "kubepods.slice",
        }
    }

    /// A pod's directory below the workloads root's directory.
    pub fn pod_directory(self, root: &Path, qos: Qos, uid: &str) -> PathBuf {
        let class = match qos {
            Qos::Guaranteed => None,
            Qos::Burstable => Some("burstable"),
            Qos::BestEffort => Some("besteffort"),
        };
        match self {
            Self::Cgroupfs => {
                class.map_or_else(|| root.to_owned(), |c| root.join(c)).join(format!("pod{uid}"))
            }
            Self::Systemd => {
                // systemd reads dashes as levels: the uid's become underscores.
                let uid = uid.replace('-', "_");
                match class {
                    None => root.join(format!("kubepods-pod{uid}.slice")),
                    Some(c) => root
                        .join(format!("kubepods-{c}.slice"))
                        .join(format!("kubepods-{c}-pod{uid}.slice")),
                }
            }
        }
    }

    /// A container's directory name inside the pod's.
    pub fn container_directory(self, id: &str) -> String {
        match self {
            Self::Cgroupfs => id.to_owned(),
            Self::Systemd => format!("cri-containerd-{id}.scope"),
        }
    }
}

/// A container id as containerd makes them: 64 hexadecimal digits.
pub fn container_id() -> String {
    format!("{}{}", uuid::Uuid::new_v4().simple(), uuid::Uuid::new_v4().simple())
}

/// How long the API takes to learn a pod's address: between 0.2 and 2 s.
pub fn publish_delay() -> Duration {
    let random = u64::from(uuid::Uuid::new_v4().as_u128() as u16);
    Duration::from_millis(200 + random % 1800)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_as_the_runtimes_make_them() {
        let root = Path::new("/c/kubepods");
        let uid = "0f1e-2d";
        let of =
            |driver: CgroupDriver, qos| driver.pod_directory(root, qos, uid).display().to_string();
        assert_eq!(of(CgroupDriver::Cgroupfs, Qos::Guaranteed), "/c/kubepods/pod0f1e-2d");
        assert_eq!(
            of(CgroupDriver::Cgroupfs, Qos::BestEffort),
            "/c/kubepods/besteffort/pod0f1e-2d"
        );
        assert_eq!(
            of(CgroupDriver::Systemd, Qos::Burstable),
            "/c/kubepods/kubepods-burstable.slice/kubepods-burstable-pod0f1e_2d.slice"
        );
        assert_eq!(container_id().len(), 64);
        let delay = publish_delay();
        assert!(delay >= Duration::from_millis(200) && delay <= Duration::from_secs(2));
    }
}
