//! What this kernel offers beyond the baseline (5.15), found by trying, never by version.
//!
//! `SIGNET_MASK_FEATURES` makes the probe report features as missing, so that every fallback
//! is tested on the kernel at hand: names of features, or of a set, separated by commas.

use std::{collections::BTreeSet, fmt, io, os::fd::AsRawFd};

use aya::{
    programs::ProgramType,
    sys::{BpfHelper, is_helper_supported},
};
use signet_ebpf::abi::feature;

use super::KernelError;

/// Name of the environment variable that masks features.
pub const MASK_VARIABLE: &str = "SIGNET_MASK_FEATURES";

/// Something that newer kernels offer and Signet can do without.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Feature {
    /// Any errno from connect and sendmsg hooks; else every refusal is EPERM.
    SetRetval,
    /// The packet's network namespace in cgroup_skb; else the socket's cgroup names the pod.
    SkbNetnsCookie,
    /// Programs on a device by link; else clsact filters.
    Tcx,
    /// A pidfd of a unix socket's peer; else its pid alone.
    PeerPidfd,
    /// Destroying others' sockets; else their packets are dropped.
    SockDestroy,
}

/// A feature's facts.
struct Facts {
    feature: Feature,
    name: &'static str,
    /// The first kernel that has it.
    since: &'static str,
    /// Where that is said.
    source: &'static str,
    /// Its bit in the programs' read-only data.
    bit: u32,
}

const FACTS: [Facts; 5] = [
    Facts {
        feature: Feature::SetRetval,
        name: "set_retval",
        since: "5.18",
        source: "Linux commit b44123b4a3dc (\"bpf: Add cgroup helpers bpf_{get,set}_retval to get/set syscall return value\")",
        bit: feature::SET_RETVAL,
    },
    Facts {
        feature: Feature::SkbNetnsCookie,
        name: "skb_netns_cookie",
        since: "6.15",
        source: "Linux commit \"bpf: add get_netns_cookie helper to cgroup_skb programs\" (2025); docs.ebpf.io lists bpf_get_netns_cookie for other cgroup programs only",
        bit: feature::SKB_NETNS_COOKIE,
    },
    Facts {
        feature: Feature::Tcx,
        name: "tcx",
        since: "6.6",
        source: "Linux commit e420bed02507 (\"bpf: Add fd-based tcx multi-prog infra with link support\")",
        bit: 0,
    },
    Facts {
        feature: Feature::PeerPidfd,
        name: "peer_pidfd",
        since: "6.5",
        source: "Linux commit 7b26952a91cf (\"net: core: add getsockopt SO_PEERPIDFD\")",
        bit: 0,
    },
    Facts {
        feature: Feature::SockDestroy,
        name: "sock_destroy",
        since: "4.5",
        source: "Linux commit 64be0aed59ad (\"net: diag: Add the ability to destroy a socket.\"), where CONFIG_INET_DIAG_DESTROY is set",
        bit: feature::SOCK_DESTROY,
    },
];

/// Named sets: what a kernel of that version lacks.
const SETS: [(&str, &[Feature]); 1] =
    [("5.15", &[Feature::SetRetval, Feature::SkbNetnsCookie, Feature::Tcx, Feature::PeerPidfd])];

/// What this kernel has, less what is masked.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Features {
    present: BTreeSet<Feature>,
    masked: BTreeSet<Feature>,
}

impl Features {
    /// Tries every feature; `mask` is the value of [`MASK_VARIABLE`].
    ///
    /// # Errors
    /// [`KernelError::UnknownFeature`] for a name that means nothing.
    pub fn probe(mask: Option<&str>) -> Result<Self, KernelError> {
        let masked = parse_mask(mask.unwrap_or(""))?;
        let present =
            FACTS.iter().map(|f| f.feature).filter(|f| !masked.contains(f) && is_present(*f));
        Ok(Self { present: present.collect(), masked })
    }

    /// True when the kernel has it and it is not masked.
    pub fn has(&self, feature: Feature) -> bool {
        self.present.contains(&feature)
    }

    /// The value for the programs' `FEATURES`.
    pub fn bits(&self) -> u32 {
        FACTS.iter().filter(|f| self.has(f.feature)).fold(0, |bits, f| bits | f.bit)
    }

    /// What is missing or masked, one sentence each, for `signet status` and the log.
    pub fn missing(&self) -> Vec<String> {
        FACTS
            .iter()
            .filter(|f| !self.has(f.feature))
            .map(|f| {
                let why = if self.masked.contains(&f.feature) { "masked" } else { "missing" };
                format!("{} is {why} (Linux {}: {})", f.name, f.since, f.source)
            })
            .collect()
    }
}

impl fmt::Display for Feature {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name =
            FACTS.iter().find(|facts| facts.feature == *self).map_or("?", |facts| facts.name);
        f.write_str(name)
    }
}

fn parse_mask(mask: &str) -> Result<BTreeSet<Feature>, KernelError> {
    let mut masked = BTreeSet::new();
    for name in mask.split(',').map(str::trim).filter(|name| !name.is_empty()) {
        if let Some(facts) = FACTS.iter().find(|f| f.name == name) {
            masked.insert(facts.feature);
        } else if let Some((_, set)) = SETS.iter().find(|(set, _)| *set == name) {
            masked.extend(set.iter().copied());
        } else {
            let known: Vec<_> =
                FACTS.iter().map(|f| f.name).chain(SETS.iter().map(|(name, _)| *name)).collect();
            return Err(KernelError::UnknownFeature {
                name: name.to_owned(),
                known: known.join(", "),
            });
        }
    }
    Ok(masked)
}

/// Tries one feature. What cannot be tried counts as missing: the fallback always works.
fn is_present(feature: Feature) -> bool {
    match feature {
        Feature::SetRetval => {
            is_helper_supported(ProgramType::CgroupSockAddr, BpfHelper::BPF_FUNC_set_retval)
                .unwrap_or(false)
        }
        Feature::SkbNetnsCookie => {
            is_helper_supported(ProgramType::CgroupSkb, BpfHelper::BPF_FUNC_get_netns_cookie)
                .unwrap_or(false)
        }
        Feature::Tcx => super::bpf::has_tcx(),
        Feature::PeerPidfd => has_peer_pidfd().unwrap_or(false),
        Feature::SockDestroy => super::destroy::is_supported(),
    }
}

fn has_peer_pidfd() -> io::Result<bool> {
    let (one, _other) = std::os::unix::net::UnixStream::pair()?;
    let mut pidfd: libc::c_int = -1;
    let mut len = size_of::<libc::c_int>() as libc::socklen_t;
    // SAFETY: the buffer is an int and `len` says so.
    let r = unsafe {
        libc::getsockopt(
            one.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_PEERPIDFD,
            (&raw mut pidfd).cast(),
            &raw mut len,
        )
    };
    if r == 0 && pidfd >= 0 {
        // SAFETY: the kernel just returned it as new; nobody else knows it.
        drop(unsafe { <std::os::fd::OwnedFd as std::os::fd::FromRawFd>::from_raw_fd(pidfd) });
        return Ok(true);
    }
    Ok(false)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn masks_name_features_and_sets() {
        assert_eq!(parse_mask("").unwrap(), BTreeSet::new());
        assert_eq!(parse_mask(" set_retval ,").unwrap(), [Feature::SetRetval].into());
        let set = parse_mask("5.15").unwrap();
        assert!(set.contains(&Feature::SkbNetnsCookie) && set.contains(&Feature::Tcx));
        assert!(!set.contains(&Feature::SockDestroy), "older than 5.15");
        let error = parse_mask("set_retval,warp").unwrap_err().to_string();
        assert!(error.contains("\"warp\"") && error.contains("5.15"), "{error}");
    }

    #[test]
    fn a_masked_feature_is_reported_missing() {
        let masked = Features::probe(Some("set_retval")).unwrap();
        assert!(!masked.has(Feature::SetRetval));
        assert_eq!(masked.bits() & feature::SET_RETVAL, 0);
        assert!(masked.missing().iter().any(|m| m.starts_with("set_retval is masked")));
    }

    #[test]
    fn every_feature_has_its_facts() {
        for facts in &FACTS {
            assert_eq!(facts.feature.to_string(), facts.name);
            assert!(!facts.source.is_empty());
        }
    }
}
