//! A real container runtime for a node: a containerd of the lab's own, driven over CRI as the
//! kubelet drives it, with runc and the reference CNI plugins.
//!
//! It has its own root, state, socket and configuration below the lab's directory; it runs in the
//! node's network namespace, so that CNI connects pods to the node's bridge. It is started and
//! ended by its pid.

mod contained;
mod cri;
pub mod image;

use std::{
    fs,
    net::IpAddr,
    path::{Path, PathBuf},
    process::Command,
    sync::Mutex,
    time::Duration,
};

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};

pub(crate) use self::contained::Contained;
use self::cri::*;
use crate::{
    address::{self, Addresses, Family},
    lab::eventually,
    process::{Place, Running},
};

/// What makes the pods of a lab's nodes.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Backend {
    /// The lab's own kubelet and runtime ([`crate::kubelet`]).
    #[default]
    Own,
    /// containerd, runc and CNI plugins.
    Containerd,
}

impl Backend {
    /// `SIGNET_LAB_BACKEND`, the lab's own when unset.
    pub fn from_env() -> Result<Self> {
        match std::env::var("SIGNET_LAB_BACKEND").as_deref() {
            Err(_) | Ok("own") => Ok(Self::Own),
            Ok("containerd") => Ok(Self::Containerd),
            Ok(other) => bail!("SIGNET_LAB_BACKEND={other}: say own or containerd"),
        }
    }
}

/// Where Debian's package has the CNI plugins.
const CNI_PLUGINS: &str = "/usr/lib/cni";
/// Longest that it may take to start on a busy machine.
const START: Duration = Duration::from_secs(30);

/// A node's runtime; ends, with all that it runs, when it is dropped.
#[derive(Debug)]
pub struct Runtime {
    directory: PathBuf,
    client: Client,
    runtime: tokio::runtime::Runtime,
    daemon: Mutex<Option<Running>>,
}

/// A pod's sandbox.
#[derive(Clone, Debug)]
pub(crate) struct Sandbox {
    pub(crate) id: String,
    pub(crate) config: PodSandboxConfig,
    pub(crate) addresses: Addresses,
    pub(crate) netns: PathBuf,
}

impl Runtime {
    /// Starts one for node `number`; `place` is where system services of the node run.
    pub(crate) fn start(
        directory: &Path,
        name: &str,
        number: u8,
        family: Family,
        place: &Place,
    ) -> Result<Self> {
        ensure!(
            Path::new(CNI_PLUGINS).join("bridge").is_file(),
            "no CNI plugins in {CNI_PLUGINS}: run `cargo xtask setup`"
        );
        for part in ["cni", "stdio", "logs"] {
            let path = directory.join(part);
            fs::create_dir_all(&path).with_context(|| path.display().to_string())?;
        }
        let network = network(directory, number, family).to_string();
        fs::write(directory.join("cni/10-lab.conflist"), network).context("the CNI network")?;
        let socket = directory.join("c.sock");
        let config = directory.join("config.toml");
        fs::write(&config, configuration(directory, &socket)).context("config.toml")?;
        let daemon = place.start_program(
            &format!("{name}-containerd"),
            &["containerd", "--config", &config.display().to_string()],
        )?;
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .thread_name("lab-cri")
            .enable_all()
            .build()
            .context("a runtime")?;
        let client = {
            let _inside = runtime.enter();
            Client::new(&socket)?
        };
        let this = Self {
            directory: directory.to_owned(),
            client,
            runtime,
            daemon: Mutex::new(Some(daemon)),
        };
        this.wait_ready().with_context(|| this.said())?;
        this.import(&socket).with_context(|| this.said())?;
        Ok(this)
    }

    /// Runs a pod's sandbox: cgroup, namespaces, addresses by CNI, pause.
    pub(crate) fn run_sandbox(
        &self,
        uid: &str,
        namespace: &str,
        name: &str,
        cgroup_parent: &str,
        host_network: bool,
    ) -> Result<Sandbox> {
        // A sandbox that is made anew counts as the next attempt; here a random one does.
        let attempt = u32::from(uuid::Uuid::new_v4().as_u128() as u16);
        let network = if host_network { NamespaceMode::Node } else { NamespaceMode::Pod };
        let config = PodSandboxConfig {
            metadata: Some(PodSandboxMetadata {
                name: name.to_owned(),
                uid: uid.to_owned(),
                namespace: namespace.to_owned(),
                attempt,
            }),
            hostname: if host_network { String::new() } else { name.to_owned() },
            log_directory: self.directory.join("logs").display().to_string(),
            linux: Some(LinuxPodSandboxConfig {
                cgroup_parent: cgroup_parent.to_owned(),
                security_context: Some(LinuxSandboxSecurityContext {
                    namespace_options: Some(NamespaceOption {
                        network: network.into(),
                        pid: NamespaceMode::Container.into(),
                    }),
                }),
            }),
        };
        let request = RunPodSandboxRequest { config: Some(config.clone()) };
        let answer: SandboxId = self.call("/runtime.v1.RuntimeService/RunPodSandbox", request)?;
        let id = answer.pod_sandbox_id;
        match self.sandbox(&id, config, host_network) {
            Ok(sandbox) => Ok(sandbox),
            Err(error) => {
                self.end_sandbox(&id);
                Err(error)
            }
        }
    }

    /// What became of a sandbox that was run.
    fn sandbox(&self, id: &str, config: PodSandboxConfig, host_network: bool) -> Result<Sandbox> {
        let request = SandboxId { pod_sandbox_id: id.to_owned(), verbose: true };
        let answer: PodSandboxStatusResponse =
            self.call("/runtime.v1.RuntimeService/PodSandboxStatus", request)?;
        let info: Value = serde_json::from_str(answer.info.get("info").context("no info")?)?;
        let (mut addresses, mut netns) = (Addresses::default(), PathBuf::new());
        if !host_network {
            let network = answer.status.and_then(|s| s.network).context("no network")?;
            let ips = std::iter::once(network.ip)
                .chain(network.additional_ips.into_iter().map(|ip| ip.ip));
            for ip in ips {
                match ip.parse().with_context(|| format!("the sandbox's address {ip:?}"))? {
                    IpAddr::V4(v4) => addresses.v4 = Some(v4),
                    IpAddr::V6(v6) => addresses.v6 = Some(v6),
                }
            }
            let namespaces = info["runtimeSpec"]["linux"]["namespaces"].as_array();
            let path = namespaces
                .into_iter()
                .flatten()
                .find(|namespace| namespace["type"] == "network")
                .and_then(|namespace| namespace["path"].as_str())
                .context("the sandbox has no network namespace")?;
            netns = path.into();
        }
        Ok(Sandbox { id: id.to_owned(), config, addresses, netns })
    }

    /// Ends a sandbox with its containers; CNI takes its addresses back.
    pub(crate) fn end_sandbox(&self, id: &str) {
        for method in [
            "/runtime.v1.RuntimeService/StopPodSandbox",
            "/runtime.v1.RuntimeService/RemovePodSandbox",
        ] {
            let request = SandboxId { pod_sandbox_id: id.to_owned(), verbose: false };
            if let Err(error) = self.call::<_, Nothing>(method, request) {
                eprintln!("sandbox {id}: {error:#}");
            }
        }
    }

    fn call<Q, A>(&self, method: &'static str, request: Q) -> Result<A>
    where
        Q: prost::Message + 'static,
        A: prost::Message + Default + 'static,
    {
        self.runtime.block_on(self.client.call(method, request))
    }

    fn wait_ready(&self) -> Result<()> {
        eventually("containerd and its network are ready", START, || {
            let answer: StatusResponse =
                self.call("/runtime.v1.RuntimeService/Status", StatusRequest { verbose: false })?;
            let conditions = answer.status.unwrap_or_default().conditions;
            ensure!(
                !conditions.is_empty() && conditions.iter().all(|c| c.status),
                "{conditions:?}"
            );
            Ok(Some(()))
        })
    }

    /// Brings the lab's image in, as an operator does without a registry.
    fn import(&self, socket: &Path) -> Result<()> {
        let archive = self.directory.join("image.tar");
        image::write(&archive)?;
        let output = Command::new("ctr")
            .arg("--address")
            .arg(socket)
            .args(["--namespace", "k8s.io", "images", "import"])
            .arg(&archive)
            .output()
            .context("cannot run `ctr`")?;
        ensure!(output.status.success(), "ctr images import: {output:?}");
        fs::remove_file(&archive).context("the archive")?;
        eventually("the image is known", START, || {
            let image = Some(ImageSpec { image: image::NAME.into() });
            let answer: ImageStatusResponse =
                self.call("/runtime.v1.ImageService/ImageStatus", ImageStatusRequest { image })?;
            Ok(answer.image.map(drop))
        })
    }

    /// Ends the daemon; sandboxes are ended before.
    pub(crate) fn stop(&self) {
        *self.daemon.lock().unwrap_or_else(std::sync::PoisonError::into_inner) = None;
    }

    /// What it logged last, for messages.
    fn said(&self) -> String {
        let daemon = self.daemon.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        daemon.as_ref().map(Running::said).unwrap_or_default()
    }
}

impl Drop for Runtime {
    fn drop(&mut self) {
        self.stop();
    }
}

/// A bridge with the node's pods' addresses, as the lab's own kubelet connects them.
fn network(directory: &Path, number: u8, family: Family) -> Value {
    let gateway = address::pod(family, number, 1);
    let (range, last) = (address::pod(family, number, 0), address::pod(family, number, 254));
    let mut ranges = Vec::new();
    if let (Some(net), Some(gateway), Some(last)) = (range.v4, gateway.v4, last.v4) {
        ranges.push(json!([{
            "subnet": format!("{net}/24"), "gateway": gateway, "rangeEnd": last,
        }]));
    }
    if let (Some(net), Some(gateway), Some(last)) = (range.v6, gateway.v6, last.v6) {
        ranges.push(json!([{
            "subnet": format!("{net}/64"), "gateway": gateway, "rangeEnd": last,
        }]));
    }
    json!({
        "cniVersion": "1.0.0", "name": "lab",
        "plugins": [{
            "type": "bridge", "bridge": "cni0", "isDefaultGateway": true, "ipMasq": false,
            "ipam": {
                "type": "host-local", "ranges": ranges,
                "dataDir": directory.join("ipam"),
            },
        }],
    })
}

fn configuration(directory: &Path, socket: &Path) -> String {
    let path = |part: &str| directory.join(part).display().to_string();
    let image = image::NAME;
    format!(
        r#"version = 2
root = "{root}"
state = "{state}"
disabled_plugins = [
  "io.containerd.snapshotter.v1.aufs", "io.containerd.snapshotter.v1.btrfs",
  "io.containerd.snapshotter.v1.devmapper", "io.containerd.snapshotter.v1.zfs",
  "io.containerd.internal.v1.opt", "io.containerd.internal.v1.tracing",
]

[grpc]
  address = "{socket}"

[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "{image}"
  # A host without CAP_SYS_RESOURCE cannot lower a process's score.
  restrict_oom_score_adj = true
  netns_mounts_under_state_dir = true
  disable_apparmor = true
  disable_hugetlb_controller = true
  stream_server_address = "127.0.0.1"
  stream_server_port = "0"
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = "{CNI_PLUGINS}"
    conf_dir = "{cni}"
  [plugins."io.containerd.grpc.v1.cri".containerd]
    snapshotter = "overlayfs"
    default_runtime_name = "runc"
    [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
      runtime_type = "io.containerd.runc.v2"
"#,
        root = path("root"),
        state = path("state"),
        cni = path("cni"),
        socket = socket.display(),
    )
}
