//! Break-glass: enforcement ends on this node, or for one pod, whether an agent runs or not.
//!
//! The record on disk goes first: an agent follows it within half a second, and one that starts
//! later finds it. Then the pinned maps are written directly, so that nothing has to answer.

use jiff::Timestamp;
use signet_ebpf::abi::{Mode, enforcement};

use super::LifecycleError;
use crate::{
    config::AgentConfig,
    endpoint::released::{NodeRelease, PodRelease, Released},
    kernel::Pinned,
};

/// What came of it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Outcome {
    /// True when programs were there that were told.
    pub is_pinned: bool,
    /// Enforced pods that are open now, or are enforced again.
    pub pods: Vec<String>,
}

/// Ends enforcement of `pod` (`namespace/name`), or of the whole node.
///
/// # Errors
/// Where the record or the pins cannot be written, or no such pod is registered: nothing is
/// changed then.
pub fn release(config: &AgentConfig, pod: Option<&str>) -> Result<Outcome, LifecycleError> {
    let pinned = Pinned::find(&config.bpffs, &config.instance);
    let mut released = Released::load(&config.state_dir)?;
    let since = Timestamp::now();
    let Some(pod) = pod else {
        let before = pinned.as_ref().map(Pinned::config).transpose()?;
        let before = before.map_or(config.enforcement.number(), |c| c.enforcement);
        // Released twice is released once.
        let release = released.node.take().unwrap_or(NodeRelease { since, before });
        released.node = Some(release);
        released.save(&config.state_dir)?;
        if let Some(pinned) = &pinned {
            pinned.set_enforcement(enforcement::OFF)?;
        }
        return Ok(Outcome {
            is_pinned: pinned.is_some(),
            pods: pinned.as_ref().map(enforced).transpose()?.unwrap_or_default(),
        });
    };
    check_name(pod)?;
    let before = match &pinned {
        None => None,
        Some(pinned) => {
            let all = pinned.pods()?;
            let found = all.iter().find(|(_, name, _)| name.as_deref() == Some(pod));
            let Some((.., entry)) = found else {
                let mut known: Vec<_> = all.into_iter().filter_map(|(_, name, _)| name).collect();
                known.sort();
                let known = if known.is_empty() { "none".into() } else { known.join(", ") };
                return Err(LifecycleError::NoPod { name: pod.into(), known });
            };
            Some(entry.mode)
        }
    };
    released.pods.entry(pod.into()).or_insert(PodRelease { since, before });
    released.save(&config.state_dir)?;
    if let Some(pinned) = &pinned {
        pinned.set_mode(pod, |_| Mode::Off)?;
    }
    Ok(Outcome { is_pinned: pinned.is_some(), pods: vec![pod.into()] })
}

/// Ends the release of `pod`, or all releases of the node.
///
/// # Errors
/// Where the record or the pins cannot be written, or the pod is not released.
pub fn rearm(config: &AgentConfig, pod: Option<&str>) -> Result<Outcome, LifecycleError> {
    let pinned = Pinned::find(&config.bpffs, &config.instance);
    let mut released = Released::load(&config.state_dir)?;
    let (node, pods) = match pod {
        None => (released.node.take(), std::mem::take(&mut released.pods)),
        Some(pod) => {
            check_name(pod)?;
            let Some(release) = released.pods.remove(pod) else {
                let known: Vec<&str> = released.pods.keys().map(String::as_str).collect();
                let known = if known.is_empty() { "none".into() } else { known.join(", ") };
                return Err(LifecycleError::NotReleased { name: pod.into(), known });
            };
            (None, [(pod.into(), release)].into())
        }
    };
    released.save(&config.state_dir)?;
    let mut outcome = Outcome { is_pinned: pinned.is_some(), pods: Vec::new() };
    let Some(pinned) = pinned else { return Ok(outcome) };
    for (name, release) in pods {
        let Some(before) = release.before else { continue };
        // One that an agent registered anew meanwhile has its mode already.
        let back = |now| if now == Mode::Off { Mode::from_u8(before) } else { now };
        if !pinned.set_mode(&name, back)?.is_empty() {
            outcome.pods.push(name);
        }
    }
    if let Some(node) = node {
        pinned.set_enforcement(node.before)?;
        outcome.pods = enforced(&pinned)?;
    }
    Ok(outcome)
}

/// The enforced pods by name (or namespace cookie, where the name is not pinned).
fn enforced(pinned: &Pinned) -> Result<Vec<String>, LifecycleError> {
    let mut all: Vec<String> = pinned
        .pods()?
        .into_iter()
        .filter(|(.., entry)| Mode::from_u8(entry.mode).is_enforced())
        .map(|(netns, name, _)| name.unwrap_or_else(|| format!("network namespace {netns}")))
        .collect();
    all.sort();
    Ok(all)
}

fn check_name(name: &str) -> Result<(), LifecycleError> {
    match name.split_once('/') {
        Some((namespace, pod)) if !namespace.is_empty() && !pod.is_empty() => Ok(()),
        _ => Err(LifecycleError::PodName { name: name.into() }),
    }
}
