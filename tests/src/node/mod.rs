//! A node: a network namespace, a cgroup subtree and directories of its own.
//!
//! ```text
//! <cgroup2 mount>/<lab>/<node>/{kubepods,kubelet,agent,system}
//! netns: eth0 on the switch, cni0 (bridge) with the pods, a veth each
//! ```

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
};

use anyhow::{Context, Result, bail, ensure};
use rustix::mount::MountFlags;

use crate::{
    address::{self, Addresses, Family},
    cgroup,
    kubelet::CgroupDriver,
    leftovers::LabId,
    link::Switch,
    netns,
    process::{Output, Place, Running},
    runtime::Runtime,
    traffic::{Role, roles},
};

/// Where the kubelet of a node listens.
pub const KUBELET_PORT: u16 = 10250;

/// A node.
#[derive(Debug)]
pub struct Node {
    /// `node-1`, `node-2`, …
    pub name: String,
    /// From 1.
    pub number: u8,
    /// Addresses on the link.
    pub addresses: Addresses,
    /// How its kubelet names cgroups.
    pub driver: CgroupDriver,
    /// The agent's bpffs, mounted for this node alone.
    pub bpffs: PathBuf,
    /// The agent's `--run-dir`.
    pub run_dir: PathBuf,
    /// The agent's `--state-dir`.
    pub state_dir: PathBuf,
    namespace: String,
    netns: PathBuf,
    cgroup: PathBuf,
    logs: PathBuf,
    family: Family,
    taken: Mutex<Hosts>,
    kubelet: Mutex<Option<Running>>,
    /// What makes its pods, when that is not the lab itself.
    runtime: Option<Arc<Runtime>>,
    background: Mutex<Vec<Running>>,
}

/// Host numbers of the pods' range that are in use.
#[derive(Debug)]
struct Hosts {
    taken: BTreeSet<u8>,
    last: u8,
}

impl Node {
    pub(crate) fn create(
        id: &LabId,
        number: u8,
        nodes: u8,
        family: Family,
        driver: CgroupDriver,
        switch: &Switch,
    ) -> Result<Self> {
        let name = format!("node-{number}");
        let namespace = format!("{id}-{name}");
        let netns = netns::create(&namespace)?;
        let addresses = address::node(family, number);
        switch.plug(&name, &namespace, family, &addresses)?;
        netns::sysctl(&netns, &forwarding(family))?;
        netns::batch(&namespace, &network(family, number, nodes))?;

        let cgroup = cgroup::mount_point()?.join(id.as_str()).join(&name);
        for part in [driver.root(), "kubelet", "agent", "system"] {
            cgroup::create(&cgroup.join(part))?;
        }
        let directory = id.directory().join(&name);
        let bpffs = directory.join("bpffs");
        for path in [&bpffs, &directory.join("run"), &directory.join("state")] {
            fs::create_dir_all(path).with_context(|| path.display().to_string())?;
        }
        rustix::mount::mount("bpf", &bpffs, "bpf", MountFlags::empty(), None)
            .with_context(|| format!("cannot mount bpffs at {}", bpffs.display()))?;
        let node = Self {
            name,
            number,
            addresses,
            driver,
            bpffs,
            run_dir: directory.join("run"),
            state_dir: directory.join("state"),
            namespace,
            netns,
            cgroup,
            logs: id.directory().join("logs"),
            family,
            taken: Mutex::new(Hosts { taken: BTreeSet::new(), last: 1 }),
            kubelet: Mutex::new(None),
            runtime: None,
            background: Mutex::new(Vec::new()),
        };
        node.start_kubelet()?;
        Ok(node)
    }

    /// Gives it a real container runtime, before its first pod.
    pub(crate) fn start_runtime(&mut self) -> Result<()> {
        ensure!(
            self.driver == CgroupDriver::Cgroupfs,
            "containerd asks systemd for the systemd driver's cgroups: the lab has none"
        );
        let directory = self.run_dir.with_file_name("containerd");
        let place = self.system_place();
        let started = Runtime::start(&directory, &self.name, self.number, self.family, &place)
            .with_context(|| format!("{}: containerd", self.name))?;
        self.runtime = Some(Arc::new(started));
        Ok(())
    }

    /// Its container runtime, when it has a real one.
    pub(crate) fn runtime(&self) -> Option<&Arc<Runtime>> {
        self.runtime.as_ref()
    }

    /// Its network namespace's file.
    pub fn netns(&self) -> &Path {
        &self.netns
    }

    /// Its network namespace's name, for `ip -n`.
    pub fn netns_name(&self) -> &str {
        &self.namespace
    }

    /// Its cgroup directory: what the node's cgroup2 root would be.
    pub fn cgroup(&self) -> &Path {
        &self.cgroup
    }

    /// The workloads root's directory.
    pub fn workloads(&self) -> PathBuf {
        self.cgroup.join(self.driver.root())
    }

    /// Where the agent runs.
    pub fn agent_place(&self) -> Place {
        self.place("agent")
    }

    /// Where the kubelet runs: what starts here is a kubelet's probe.
    pub fn kubelet_place(&self) -> Place {
        self.place("kubelet")
    }

    /// Where any other process of the host runs.
    pub fn system_place(&self) -> Place {
        self.place("system")
    }

    fn place(&self, part: &str) -> Place {
        Place {
            cgroup: self.cgroup.join(part),
            netns: self.netns.clone(),
            runtime_netns: None,
            logs: self.logs.clone(),
        }
    }

    /// Runs a command as a process of the host (not the kubelet's).
    pub fn exec(&self, argv: &[&str]) -> Result<Output> {
        self.system_place().run(argv)
    }

    /// Starts a role as a process of the host; it ends with the lab.
    pub fn start_background(&self, name: &str, role: &Role) -> Result<()> {
        let running =
            self.system_place().start_role(&format!("{}-{name}", self.name), &role.argv()?)?;
        if role.announces_listening() {
            running.wait_event("listening", crate::START_TIMEOUT)?;
        }
        self.background.lock().unwrap_or_else(PoisonError::into_inner).push(running);
        Ok(())
    }

    /// An HTTP probe as the kubelet makes it: from its cgroup, over the node's own address.
    pub fn probe(&self, url: &str) -> Result<Output> {
        self.kubelet_place().run(&["curl", "-sS", "-g", "--max-time", "3", url])
    }

    /// Starts the kubelet's listener again after [`Self::stop_kubelet`].
    pub fn start_kubelet(&self) -> Result<()> {
        let listen = self.addresses.all().into_iter().map(|ip| (ip, KUBELET_PORT).into()).collect();
        let role = Role::TcpServer(roles::TcpServer { listen, ..Default::default() });
        let running =
            self.kubelet_place().start_role(&format!("{}-kubelet", self.name), &role.argv()?)?;
        running.wait_event("listening", crate::START_TIMEOUT)?;
        *self.kubelet.lock().unwrap_or_else(PoisonError::into_inner) = Some(running);
        Ok(())
    }

    /// Stops the kubelet's listener (probes can still be made).
    pub fn stop_kubelet(&self) {
        *self.kubelet.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }

    /// Takes addresses of the pods' range: `host`, or the next free one.
    ///
    /// A freed address comes again only after all others, unless asked for by `host`.
    pub(crate) fn take_addresses(&self, host: Option<u8>) -> Result<(u8, Addresses)> {
        let mut hosts = self.taken.lock().unwrap_or_else(PoisonError::into_inner);
        let host = match host {
            Some(host) if hosts.taken.contains(&host) => {
                bail!("{}: pod address {host} is in use", self.name)
            }
            Some(host) => host,
            None => {
                let last = hosts.last;
                let free = (last + 1..=254).chain(2..=last).find(|h| !hosts.taken.contains(h));
                let host = free.with_context(|| format!("{}: no free pod address", self.name))?;
                hosts.last = host;
                host
            }
        };
        hosts.taken.insert(host);
        Ok((host, address::pod(self.family, self.number, host)))
    }

    pub(crate) fn free_addresses(&self, host: u8) {
        self.taken.lock().unwrap_or_else(PoisonError::into_inner).taken.remove(&host);
    }

    /// Takes a pod's link away. One that went with its namespace already is no fault.
    pub(crate) fn disconnect_pod(&self, host: u8) {
        let _ = netns::batch(&self.namespace, &[format!("link del {}", device(host))]);
    }

    /// Connects a pod's namespace to the bridge: `eth0` there, a device of its number here.
    pub(crate) fn connect_pod(
        &self,
        host: u8,
        pod_namespace: &str,
        addresses: &Addresses,
    ) -> Result<()> {
        let device = device(host);
        netns::batch(
            &self.namespace,
            &[
                format!("link add {device} type veth peer name eth0 netns {pod_namespace}"),
                format!("link set {device} master cni0 up"),
            ],
        )?;
        let gateway = address::pod(self.family, self.number, 1);
        let mut commands = Vec::new();
        if let Some(v4) = addresses.v4 {
            commands.push(format!("addr add {v4}/24 dev eth0"));
        }
        if let Some(v6) = addresses.v6 {
            commands.push(format!("addr add {v6}/64 dev eth0 nodad"));
        }
        commands.push("link set eth0 up".into());
        if let Some(v4) = gateway.v4 {
            commands.push(format!("route add default via {v4}"));
        }
        if let Some(v6) = gateway.v6 {
            commands.push(format!("route add default via {v6}"));
        }
        netns::batch(pod_namespace, &commands)
    }

    /// Ends what runs on the node besides pods and agent.
    pub(crate) fn stop(&self) {
        self.stop_kubelet();
        if let Some(runtime) = &self.runtime {
            runtime.stop();
        }
        self.background.lock().unwrap_or_else(PoisonError::into_inner).clear();
    }
}

fn forwarding(family: Family) -> Vec<(&'static str, &'static str)> {
    let mut settings = vec![("net/ipv4/ip_forward", "1")];
    if family.has_v6() {
        settings.push(("net/ipv6/conf/all/forwarding", "1"));
    }
    settings
}

/// The bridge for the pods, routes to the other nodes' pods, services to the node itself
/// (where the lab's service proxy listens), everything else to the machine outside.
fn network(family: Family, number: u8, nodes: u8) -> Vec<String> {
    let mut commands: Vec<String> = vec![
        // An address of its own: a bridge without one takes its ports' lowest, so that each
        // new pod could change the gateway's under the feet of the others' neighbour tables.
        "link add cni0 address 02:00:00:00:00:01 type bridge mcast_snooping 0".into(),
        "link set cni0 up".into(),
    ];
    let gateway = address::pod(family, number, 1);
    let outside = address::outside_on_link(family);
    if let (Some(own), Some(outside)) = (gateway.v4, outside.v4) {
        commands.push(format!("addr add {own}/24 dev cni0"));
        commands.push(format!("route add default via {outside}"));
        commands.push("route add local 10.96.0.0/16 dev lo".into());
    }
    if let (Some(own), Some(outside)) = (gateway.v6, outside.v6) {
        commands.push(format!("addr add {own}/64 dev cni0 nodad"));
        commands.push(format!("route add default via {outside}"));
        commands.push("route add local fd00:96::/64 dev lo".into());
    }
    for other in (1..=nodes).filter(|n| *n != number) {
        let via = address::node(family, other);
        let range = address::pod(family, other, 0);
        if let (Some(via), Some(range)) = (via.v4, range.v4) {
            commands.push(format!("route add {range}/24 via {via}"));
        }
        if let (Some(via), Some(range)) = (via.v6, range.v6) {
            commands.push(format!("route add {range}/64 via {via}"));
        }
    }
    commands
}

/// The node's end of a pod's link.
fn device(host: u8) -> String {
    format!("veth{host}")
}
