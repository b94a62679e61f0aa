//! `signet guard`: closes a node that has just booted, before the kubelet starts its pods and
//! until the agent knows them.
//!
//! A oneshot: what it attaches and pins stays in the kernel, which opens by itself when no
//! agent comes in time. The agent takes the pins over and ends the guard with its first
//! heartbeat.

use std::{fs, io, path::Path, time::Duration};

use signet_ebpf::abi::{Config, enforcement};

use super::LifecycleError;
use crate::{
    config::{AgentConfig, values::UnknownPods, yaml},
    endpoint::released::Released,
    kernel::{
        KernelConfig, Pinned, Programs,
        cgroup::{Cgroup, Hierarchy},
        clock,
    },
};

/// The longest that pods may be refused for want of an agent.
pub const MAX_TIMEOUT: Duration = Duration::from_secs(300);

/// Where systemd says that it is the init process.
const SYSTEMD: &str = "/run/systemd/system";

/// What the guard did.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Outcome {
    /// Programs are attached to this root, and pods are refused until then.
    Guarding {
        /// The workloads root.
        root: String,
    },
    /// An agent has been here since the node booted: its pins hold, nothing was changed.
    AgentWasHere,
    /// The node is released, `enforcement` is not `enforce`, or `unknownPods` is `allow`: nothing
    /// was changed.
    NotEnforced,
}

/// Attaches, and refuses every pod that is not registered for at most `timeout`.
///
/// # Errors
/// Whatever the host lacks.
pub fn guard(
    config: &AgentConfig,
    kernel: &KernelConfig,
    kubelet_config: &Path,
    timeout: Duration,
) -> Result<Outcome, LifecycleError> {
    let is_released = Released::load(&config.state_dir)?.node.is_some();
    if is_released
        || config.enforcement.number() != enforcement::ENFORCE
        || config.unknown_pods == UnknownPods::Allow
    {
        return Ok(Outcome::NotEnforced);
    }
    if let Some(pinned) = Pinned::find(&config.bpffs, &config.instance)
        && pinned.config().is_ok_and(|config| config.heartbeat != 0 && config.guarded_until == 0)
    {
        return Ok(Outcome::AgentWasHere);
    }
    let root = make_root(&Hierarchy::find()?, &kernel.workloads, kubelet_config)?;
    let kernel = KernelConfig { workloads: root.name.clone(), ..kernel.clone() };
    let (mut programs, mut maps) = Programs::load(&kernel)?;
    // Where other versions' pins are, the agent that left them was here before.
    if programs.is_waiting() {
        programs.activate()?;
    }
    let deadline =
        clock::monotonic().saturating_add(u64::try_from(timeout.as_nanos()).unwrap_or(u64::MAX));
    maps.set_config(Config {
        host_netns: programs.host_netns(),
        workloads_level: programs.workloads_level(),
        events_per_second: config.events_per_second,
        heartbeat: deadline,
        guarded_until: 1,
        unknown_pods: config.unknown_pods.number(),
        enforcement: config.enforcement.number(),
        ..Config::default()
    })?;
    Ok(Outcome::Guarding { root: root.name.display().to_string() })
}

/// The workloads root, made as the kubelet would where it is not there yet.
fn make_root(
    hierarchy: &Hierarchy,
    name: &Path,
    kubelet_config: &Path,
) -> Result<Cgroup, LifecycleError> {
    let mut slice = name.as_os_str().to_owned();
    slice.push(".slice");
    let is_slice = name.extension().is_some_and(|extension| extension == "slice");
    for candidate in [name, Path::new(&slice)] {
        if let Ok(found) = hierarchy.open(candidate) {
            return Ok(found);
        }
    }
    let name = if is_slice || !uses_systemd(kubelet_config) { name } else { Path::new(&slice) };
    let relative = name.strip_prefix("/").unwrap_or(name);
    let path = hierarchy.mount().join(relative);
    let made = fs::create_dir_all(&path).and_then(|()| hierarchy.open(name));
    made.map_err(|source| LifecycleError::Io { action: "make the cgroup", path, source })
}

/// Which driver the kubelet uses: what its configuration says, else what it would choose.
fn uses_systemd(kubelet_config: &Path) -> bool {
    let said = fs::read_to_string(kubelet_config)
        .map_err(|error| {
            if error.kind() != io::ErrorKind::NotFound {
                tracing::warn!(path = %kubelet_config.display(), %error, "the kubelet's configuration is not read");
            }
        })
        .ok()
        .and_then(|text| yaml::parse_one(&text).ok().flatten())
        .and_then(|root| root.get("cgroupDriver")?.text().ok().map(str::to_owned));
    match said.as_deref() {
        Some(driver) => driver == "systemd",
        None => Path::new(SYSTEMD).is_dir(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_driver_is_the_one_that_the_kubelet_names() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("config.yaml");
        let say = |text: &str| {
            fs::write(&file, text).unwrap();
            uses_systemd(&file)
        };
        assert!(say("kind: KubeletConfiguration\ncgroupDriver: systemd\n"));
        assert!(!say("kind: KubeletConfiguration\ncgroupDriver: cgroupfs\n"));
        let by_init = Path::new(SYSTEMD).is_dir();
        assert_eq!(say("kind: KubeletConfiguration\n"), by_init);
        assert_eq!(uses_systemd(&dir.path().join("none")), by_init);
    }
}
