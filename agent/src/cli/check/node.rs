//! This host: kernel, BPF, bpffs, cgroups, ports, the authority.

use std::{net::SocketAddr, path::Path};

use super::{Findings, pods};
use crate::{
    cli::exit::Exit,
    config::{AgentConfig, values::Authority},
    kernel::{
        self,
        cgroup::{Cgroup, Hierarchy},
        features::{Features, MASK_VARIABLE},
        preflight::{self, Conflict},
    },
    spiffe::TrustDomain,
    svid::issuer::{RemoteConfig, RemoteError, RemoteIssuer},
    trust::Trust,
};

/// Looks at everything; what depends on something that failed is skipped.
pub(super) async fn look(config: &AgentConfig, findings: &mut Findings) {
    let release = rustix::system::uname();
    findings.ok("kernel", "release", format!("Linux {}", release.release().to_string_lossy()));
    let may_bpf = match kernel::check_permitted() {
        Ok(()) => {
            findings.ok("kernel", "bpf", "bpf(2) may be used");
            true
        }
        Err(error) => {
            findings.failed(
                "kernel",
                "bpf",
                Exit::Host,
                error.to_string(),
                "run this as root on the node, or in the agent's pod",
            );
            false
        }
    };
    if may_bpf {
        programs(findings);
        features(findings);
    } else {
        findings.skipped("kernel", "programs", "without bpf(2) they cannot be tried");
        findings.skipped("kernel", "features", "without bpf(2) they cannot be tried");
    }
    bpffs(&config.bpffs, findings);
    match cgroups(config, findings) {
        Some((hierarchy, workloads, node)) if may_bpf => {
            conflicts(&preflight::conflicts(&hierarchy, &workloads, &node), findings);
            pods::look(&workloads, findings).await;
        }
        Some((_, workloads, _)) => {
            findings.skipped("cgroups", "conflicts", "without bpf(2) they cannot be asked for");
            pods::look(&workloads, findings).await;
        }
        None => {
            findings.skipped("cgroups", "conflicts", "there is no root to look at");
            findings.skipped("pods", "links", "there is no root to look at");
        }
    }
    ports(config, findings).await;
    authority(config, findings).await;
}

fn programs(findings: &mut Findings) {
    let missing = preflight::missing_programs();
    if missing.is_empty() {
        findings.ok("kernel", "programs", "every kind of program that is needed loads");
    }
    for (kind, built) in missing {
        findings.failed(
            "kernel",
            "programs",
            Exit::Host,
            format!("no program of the kind {kind} loads"),
            format!("use a kernel of Linux 5.15 or later that is built with {built}"),
        );
    }
}

fn features(findings: &mut Findings) {
    match Features::probe(std::env::var(MASK_VARIABLE).ok().as_deref()) {
        Ok(features) => {
            let missing = features.missing();
            if missing.is_empty() {
                findings.ok("kernel", "features", "nothing is missing");
            }
            for feature in missing {
                findings.warning(
                    "kernel",
                    "features",
                    feature,
                    "nothing must be done: the agent does without it; a newer kernel has it",
                );
            }
        }
        Err(error) => findings.failed(
            "kernel",
            "features",
            Exit::No,
            error.to_string(),
            format!("correct {MASK_VARIABLE}, which is for tests"),
        ),
    }
}

fn bpffs(path: &Path, findings: &mut Findings) {
    match preflight::bpffs(path) {
        Ok(None) => findings.ok("kernel", "bpffs", format!("{} is on a bpffs", path.display())),
        Ok(Some(point)) => findings.warning(
            "kernel",
            "bpffs",
            format!("none is mounted for {}", path.display()),
            format!(
                "the agent mounts one on {}; in a pod that needs the host's mount with \
                 mountPropagation: Bidirectional",
                point.display()
            ),
        ),
        Err(error) => findings.failed(
            "kernel",
            "bpffs",
            Exit::Host,
            error.to_string(),
            "set bpffs to a directory below /sys/fs/bpf",
        ),
    }
}

fn cgroups(config: &AgentConfig, findings: &mut Findings) -> Option<(Hierarchy, Cgroup, Cgroup)> {
    let hierarchy = match Hierarchy::find() {
        Ok(hierarchy) => hierarchy,
        Err(error) => {
            findings.failed(
                "cgroups",
                "cgroup2",
                Exit::Host,
                error.to_string(),
                "boot with systemd.unified_cgroup_hierarchy=1, and mount the host's /sys/fs/cgroup \
                 into the agent's pod",
            );
            return None;
        }
    };
    findings.ok("cgroups", "cgroup2", format!("mounted on {}", hierarchy.mount().display()));
    let node = config.node_cgroup.clone().unwrap_or_else(|| "/".into());
    match preflight::roots(&hierarchy, Path::new(&config.cgroup_root), Path::new(&node)) {
        Ok((workloads, node)) => {
            findings.ok(
                "cgroups",
                "roots",
                format!(
                    "pods in {}, the node in {}",
                    workloads.name.display(),
                    node.name.display()
                ),
            );
            Some((hierarchy, workloads, node))
        }
        Err(error) => {
            findings.failed(
                "cgroups",
                "roots",
                Exit::Host,
                error.to_string(),
                "set cgroupRoot to the directory below which the kubelet makes pods' cgroups \
                 (its --cgroup-root with kubepods or kubepods.slice); start the kubelet first",
            );
            None
        }
    }
}

fn conflicts(found: &[Conflict], findings: &mut Findings) {
    if found.is_empty() {
        findings.ok("cgroups", "conflicts", "no other program is in the way");
    }
    for conflict in found {
        let (holder, owner) = (conflict.holder.display(), &conflict.owner);
        let remedy = "have its owner attach it by a link, or with BPF_F_ALLOW_MULTI";
        if conflict.is_exclusive {
            findings.failed(
                "cgroups",
                "conflicts",
                Exit::No,
                format!(
                    "{owner} on {holder} lets no other program be attached, so {} cannot be",
                    conflict.program
                ),
                remedy,
            );
        } else {
            findings.warning(
                "cgroups",
                "conflicts",
                format!("{} takes the place of {owner} on {holder} for the pods", conflict.program),
                remedy,
            );
        }
    }
}

/// The addresses that the agent listens on in the node's network. An agent that runs has them.
async fn ports(config: &AgentConfig, findings: &mut Findings) {
    let socket = config.admin_socket();
    let runs = tokio::net::UnixStream::connect(&socket).await.is_ok();
    if runs {
        findings.ok("node", "agent", format!("one answers at {}", socket.display()));
    } else {
        findings.ok("node", "agent", format!("none runs yet ({})", socket.display()));
    }
    let viewers = config.viewer_listen.filter(|_| config.cluster_dir.is_none());
    let listeners: [(&'static str, Option<SocketAddr>); 4] = [
        ("metricsListen", config.metrics_listen),
        ("readyListen", config.ready_listen),
        ("viewerListen", viewers),
        ("observerListen", config.observer_listen),
    ];
    for (key, address) in listeners {
        let Some(address) = address else { continue };
        match std::net::TcpListener::bind(address) {
            Ok(_) if runs => findings.warning(
                "node",
                key,
                format!("{address} is free, though an agent runs"),
                "is the configuration that was given here the agent's own?",
            ),
            Ok(_) => findings.ok("node", key, format!("{address} is free")),
            Err(error) if error.kind() == std::io::ErrorKind::AddrInUse && runs => {
                findings.ok("node", key, format!("{address} is taken, as by the agent that runs"));
            }
            Err(error) => findings.failed(
                "node",
                key,
                Exit::No,
                format!("{address}: {error}"),
                format!(
                    "find who has it (ss -ltnp 'sport = :{}') and stop that, or set {key}",
                    address.port()
                ),
            ),
        }
    }
}

async fn authority(config: &AgentConfig, findings: &mut Findings) {
    let (area, check) = ("authority", "reachable");
    if config.authority == Authority::Embedded {
        let dir = config.authority_dir();
        let detail = if dir.exists() {
            format!("embedded in the agent; its root is in {}", dir.display())
        } else {
            format!("embedded in the agent, which makes a root in {}", dir.display())
        };
        return findings.ok(area, check, detail);
    }
    match reach(config).await {
        Ok(address) => findings.ok(area, check, format!("{address} answers, and takes the token")),
        Err(error) => {
            let (exit, remedy) = match &error {
                RemoteError::Unreachable { .. } => {
                    (Exit::Unreachable, "start it, or correct caAddress, caServerName, caRootFile")
                }
                RemoteError::Refused { .. } => {
                    (Exit::Denied, "look at its log, which names the reason; is the token its own?")
                }
                _ => (Exit::No, "correct the key that is named"),
            };
            findings.failed(area, check, exit, error.to_string(), remedy);
        }
    }
}

async fn reach(config: &AgentConfig) -> Result<String, RemoteError> {
    let missing = |key, problem: &str| RemoteError::Setting { key, problem: problem.into() };
    let domain = TrustDomain::parse(&config.trust_domain)
        .map_err(|error| missing("trustDomain", &error.to_string()))?;
    let address = config
        .ca_address
        .clone()
        .ok_or_else(|| missing("caAddress", "is missing: say where the authority is"))?;
    let remote = RemoteConfig {
        address: address.clone(),
        server_name: config.ca_server_name.clone(),
        root_file: config
            .ca_root_file
            .clone()
            .ok_or_else(|| missing("caRootFile", "is missing: give the authority's PEM roots"))?,
        token_file: config.ca_token_file.clone(),
        cluster_id: config.cluster_id.clone(),
        ttl: config.svid_ttl,
    };
    RemoteIssuer::new(remote, domain, Trust::new())?.reach().await?;
    Ok(address)
}
