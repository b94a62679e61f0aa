//! A whole lab: switch, nodes, pods, agents, one cluster; made and removed by itself.

use std::{
    fs,
    net::IpAddr,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use crate::{
    address::{self, Addresses, Family},
    agent::{Agent, Followed},
    api_server::ApiServer,
    capture::Capture,
    cgroup,
    cluster_dir::{self, ClusterDir},
    kubelet::CgroupDriver,
    leftovers::{self, LabId},
    link::Switch,
    netns,
    node::Node,
    pod::{Pod, PodBuilder, Surroundings, builder_of},
    process::{Place, tail_of},
    runtime::Backend,
    traffic::{Role, roles},
};

/// A lab. Dropping it, also in a panic, removes every part of it.
#[derive(Debug)]
pub struct Lab {
    id: LabId,
    directory: PathBuf,
    family: Family,
    cluster: Arc<ClusterDir>,
    /// What the agents follow instead of the directory, if they do.
    api: Option<Arc<ApiServer>>,
    /// Of the last node, when that is a cluster of its own.
    second: Option<Arc<ClusterDir>>,
    switch: Switch,
    nodes: Vec<Arc<Node>>,
    agents: Vec<Agent>,
    outside: Place,
    pods: Arc<Mutex<Vec<Pod>>>,
    next_service: Mutex<u16>,
    kept: bool,
}

/// What a lab shall have.
#[derive(Clone, Debug)]
pub struct LabOptions {
    /// How many nodes (1 to 9).
    pub nodes: u8,
    /// Address families; default from `SIGNET_LAB_FAMILY`.
    pub family: Option<Family>,
    /// How the nodes name cgroups.
    pub driver: CgroupDriver,
    /// What makes pods; default from `SIGNET_LAB_BACKEND`.
    pub backend: Option<Backend>,
    /// Further flags for every agent.
    pub agent_flags: Vec<String>,
    /// Further environment for every agent.
    pub agent_env: Vec<(String, String)>,
    /// Whether `ranges.yaml` is written.
    pub ranges: bool,
    /// The agents follow a test API server instead of the directory.
    pub api_server: bool,
    /// Makes the last node a cluster of its own, with this trust domain and an authority of
    /// its own.
    pub second_domain: Option<String>,
}

impl Default for LabOptions {
    fn default() -> Self {
        Self {
            nodes: 2,
            family: None,
            driver: CgroupDriver::default(),
            backend: None,
            agent_flags: Vec::new(),
            agent_env: Vec::new(),
            ranges: true,
            api_server: false,
            second_domain: None,
        }
    }
}

/// A Service of the lab.
#[derive(Clone, Debug)]
pub struct Service {
    /// `namespace/name`.
    pub name: String,
    /// Its virtual addresses.
    pub addresses: Addresses,
}

impl Lab {
    /// Two nodes, defaults otherwise.
    pub fn start() -> Result<Self> {
        Self::with(LabOptions::default())
    }

    /// Makes a lab; leftovers of dead runs are removed first.
    pub fn with(options: LabOptions) -> Result<Self> {
        ensure!(
            rustix::process::geteuid().is_root(),
            "the lab makes network namespaces and cgroups: run it as root"
        );
        leftovers::sweep(false)?;
        let id = LabId::new()?;
        match Self::build(&id, &options) {
            Ok(lab) => Ok(lab),
            Err(error) => {
                leftovers::remove(id.as_str());
                Err(error)
            }
        }
    }

    fn build(id: &LabId, options: &LabOptions) -> Result<Self> {
        let family = options.family.map_or_else(Family::from_env, Ok)?;
        let backend = options.backend.map_or_else(Backend::from_env, Ok)?;
        let directory = id.directory();
        fs::create_dir_all(directory.join("logs"))
            .with_context(|| directory.display().to_string())?;
        ensure!(
            !(options.api_server && options.second_domain.is_some()),
            "a second cluster has no API server in the lab"
        );
        let api = options.api_server.then(shipped_api_server).transpose()?.map(Arc::new);
        let cluster = Arc::new(ClusterDir::create_with(&directory.join("cluster"), api.clone())?);
        let second = match &options.second_domain {
            Some(_) => Some(Arc::new(ClusterDir::create(&directory.join("cluster-2"))?)),
            None => None,
        };
        let of_pods = |number| match second {
            Some(_) => address::pod_ranges_of(family, number),
            None => address::pod_ranges(family),
        };
        let services = address::service_ranges(family);
        if options.ranges {
            cluster.set_ranges(&of_pods(1), &services, &[])?;
            if let Some(second) = &second {
                second.set_ranges(&of_pods(options.nodes), &services, &[])?;
            }
        }
        let switch = Switch::create(id)?;
        let mut nodes = Vec::new();
        for number in 1..=options.nodes {
            let made = Node::create(id, number, options.nodes, family, options.driver, &switch);
            let mut node = made?;
            if backend == Backend::Containerd {
                node.start_runtime()?;
            }
            nodes.push(Arc::new(node));
        }
        let is_second = |node: &Node| second.is_some() && node.number == options.nodes;
        let cluster_of = |node: &Node| match &second {
            Some(second) if is_second(node) => second,
            _ => &cluster,
        };
        for node in &nodes {
            cluster_of(node).apply(node_object(node))?;
        }
        let outside = outside(id, family, options.nodes, &switch)?;
        let agents = nodes
            .iter()
            .map(|node| {
                let domain = options.second_domain.as_deref().filter(|_| is_second(node));
                let followed = match &api {
                    Some(api) => Followed::ApiServer(agent_kubeconfig(api, node)?),
                    None => Followed::Directory(cluster_of(node).path().to_owned()),
                };
                Ok(Agent::new(Arc::clone(node), &directory, followed, domain, options))
            })
            .collect::<Result<_>>()?;
        Ok(Self {
            id: id.clone(),
            directory,
            family,
            cluster,
            api,
            second,
            switch,
            nodes,
            agents,
            outside,
            pods: Arc::default(),
            next_service: Mutex::new(1),
            kept: false,
        })
    }

    /// Its unique name.
    pub fn id(&self) -> &LabId {
        &self.id
    }

    /// Where its files are: `cluster/`, `logs/`, `authority/`, a directory a node.
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// The address families that it has.
    pub fn family(&self) -> Family {
        self.family
    }

    /// The cluster's objects.
    pub fn cluster(&self) -> &ClusterDir {
        &self.cluster
    }

    /// The API server that the agents follow.
    pub fn api_server(&self) -> Result<&ApiServer> {
        self.api.as_deref().context("the lab has no API server; see LabOptions::api_server")
    }

    /// Gives every agent a new token of its own, in the kubeconfig that it is started with: its
    /// service account or its pod was made anew.
    pub fn renew_agents_tokens(&self) -> Result<()> {
        let api = self.api_server()?;
        self.nodes.iter().try_for_each(|node| agent_kubeconfig(api, node).map(drop))
    }

    /// All nodes.
    pub fn nodes(&self) -> &[Arc<Node>] {
        &self.nodes
    }

    /// A node by name (`node-1`).
    pub fn node(&self, name: &str) -> Result<&Arc<Node>> {
        self.nodes
            .iter()
            .find(|node| node.name == name)
            .with_context(|| format!("the lab has no node {name}"))
    }

    /// All agents, one a node; not started by themselves.
    pub fn agents(&self) -> &[Agent] {
        &self.agents
    }

    /// The agent of a node.
    pub fn agent(&self, node: &str) -> Result<&Agent> {
        self.agents
            .iter()
            .find(|agent| agent.node().name == node)
            .with_context(|| format!("the lab has no node {node}"))
    }

    /// Starts every node's agent and waits until all are ready.
    pub fn start_agents(&self) -> Result<()> {
        for agent in &self.agents {
            agent.start()?;
        }
        self.agents.iter().try_for_each(Agent::wait_ready)
    }

    /// Where processes of the machine outside the mesh run.
    pub fn outside(&self) -> &Place {
        &self.outside
    }

    /// The outside machine's public addresses.
    pub fn outside_addresses(&self) -> Addresses {
        address::outside(self.family)
    }

    /// Waits until the pod's own agent says `state` of it (see [`Agent::wait_state`]).
    pub fn wait_state(&self, pod: &Pod, state: &str) -> Result<()> {
        self.agent(&pod.node().name)?.wait_state(pod, state)
    }

    /// Captures what crosses between nodes, into `<directory>/<name>.pcap`.
    pub fn capture(&self, name: &str) -> Result<Capture> {
        self.switch.capture(&self.directory.join(format!("{name}.pcap")))
    }

    /// The objects of the last node's cluster, where that is one of its own.
    pub fn second_cluster(&self) -> Result<&ClusterDir> {
        self.second.as_deref().context("the lab has one cluster; see LabOptions::second_domain")
    }

    fn cluster_of(&self, node: &Node) -> &Arc<ClusterDir> {
        match &self.second {
            Some(second) if usize::from(node.number) == self.nodes.len() => second,
            _ => &self.cluster,
        }
    }

    /// Makes a namespace; `mode` is its label, `None` for no label.
    pub fn namespace(&self, name: &str, mode: Option<&str>) -> Result<()> {
        let labels: Vec<(&str, &str)> =
            mode.map(|mode| ("signet.dev/mode", mode)).into_iter().collect();
        self.cluster.namespace(name, &labels)
    }

    /// A pod to be started, on `node-1` unless told otherwise.
    pub fn pod(&self, namespace: &str, name: &str) -> PodBuilder {
        self.pod_on(&self.nodes[0], namespace, name)
    }

    /// A pod to be started on a node.
    pub fn pod_on(&self, node: &Arc<Node>, namespace: &str, name: &str) -> PodBuilder {
        PodBuilder::new(
            Surroundings {
                cluster: Arc::clone(self.cluster_of(node)),
                node: Arc::clone(node),
                logs: self.directory.join("logs"),
                lab: self.id.as_str().to_owned(),
                pods: Arc::clone(&self.pods),
            },
            namespace,
            name,
        )
    }

    /// Applies manifests: Pods go through the scheduler (`spec.nodeName`, else round robin) and
    /// the kubelet, Services get addresses and a proxy, everything else into the directory.
    ///
    /// Returns the pods that were started, in order.
    pub fn apply_yaml(&self, text: &str) -> Result<Vec<Pod>> {
        let mut started = Vec::new();
        for object in cluster_dir::parse(text)? {
            match cluster_dir::kind_of(&object) {
                "" if object["podRanges"].is_array() => {
                    // A `ranges.yaml`: the lab's own says what the lab really has.
                }
                "Pod" => {
                    let (namespace, name) = cluster_dir::name_of(&object);
                    let node = match object["spec"]["nodeName"].as_str() {
                        Some(node) => self.node(node)?,
                        None => &self.nodes[self.pods().len() % self.nodes.len()],
                    };
                    let builder = self.pod_on(node, namespace, name);
                    started.push(builder_of(builder, &object)?.start()?);
                }
                "Service" => {
                    self.apply_service(object)?;
                }
                _ => self.cluster.apply(object)?,
            }
        }
        Ok(started)
    }

    /// Makes a Service that selects `app: <app>`; ports are (name, port, target).
    pub fn service(
        &self,
        namespace: &str,
        name: &str,
        app: &str,
        ports: &[(&str, u16, Value)],
    ) -> Result<Service> {
        let ports: Vec<Value> = ports
            .iter()
            .map(|(name, port, target)| {
                json!({"name": name, "port": port, "protocol": "TCP", "targetPort": target})
            })
            .collect();
        self.apply_service(json!({
            "apiVersion": "v1", "kind": "Service",
            "metadata": {"name": name, "namespace": namespace},
            "spec": {"selector": {"app": app}, "ports": ports},
        }))
    }

    /// Applies a Service: gives it addresses where it has none, and starts the service proxy
    /// of each node (the part of kube-proxy) for it.
    pub fn apply_service(&self, mut object: Value) -> Result<Service> {
        let (namespace, name) = cluster_dir::name_of(&object);
        let (namespace, name) = (namespace.to_owned(), name.to_owned());
        let addresses = {
            let mut next = self.next_service.lock().unwrap_or_else(PoisonError::into_inner);
            let addresses = address::service(self.family, *next);
            *next += 1;
            addresses
        };
        let ips: Vec<String> = addresses.all().iter().map(IpAddr::to_string).collect();
        object["spec"]["clusterIP"] = json!(ips[0]);
        object["spec"]["clusterIPs"] = json!(ips);
        let ports: Vec<(String, u16, bool)> = object["spec"]["ports"]
            .as_array()
            .into_iter()
            .flatten()
            .filter_map(|port| {
                Some((
                    port["name"].as_str().unwrap_or_default().to_owned(),
                    u16::try_from(port["port"].as_u64()?).ok()?,
                    port["protocol"] == "UDP",
                ))
            })
            .collect();
        self.cluster.apply(object)?;
        for ip in addresses.all() {
            let family = if ip.is_ipv4() { "ipv4" } else { "ipv6" };
            let slice =
                self.cluster.path().join(format!("endpointslice.{namespace}.{name}-{family}.yaml"));
            for (port_name, port, udp) in &ports {
                let role = Role::ServiceProxy(roles::ServiceProxy {
                    listen: (ip, *port).into(),
                    slice: slice.clone(),
                    port_name: port_name.clone(),
                    udp: *udp,
                });
                for node in &self.nodes {
                    node.start_background(&format!("proxy-{namespace}-{name}-{family}"), &role)?;
                }
            }
        }
        Ok(Service { name: format!("{namespace}/{name}"), addresses })
    }

    /// Every pod that was started, also removed ones.
    pub fn pods(&self) -> Vec<Pod> {
        self.pods.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Leaves the lab up when this process ends; `signet-lab-worker sweep` removes it later.
    pub fn keep(mut self) -> Result<PathBuf> {
        fs::write(self.directory.join("keep"), "").context("keep")?;
        self.kept = true;
        let directory = self.directory.clone();
        // Whatever ends with its handle must not: the whole lab is left behind on purpose.
        std::mem::forget(self);
        Ok(directory)
    }

    /// The last lines of every agent's log, for messages.
    pub fn agent_logs(&self, lines: usize) -> String {
        self.agents
            .iter()
            .map(|agent| {
                format!("--- {} agent\n{}", agent.node().name, tail_of(&agent.log(), lines))
            })
            .collect()
    }

    fn dismantle(&mut self) {
        for pod in self.pods() {
            pod.dismantle();
        }
        for agent in &self.agents {
            agent.kill();
        }
        for node in &self.nodes {
            node.stop();
        }
        leftovers::remove(self.id.as_str());
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        if thread::panicking() || std::env::var_os("SIGNET_LAB_LOGS").is_some() {
            eprintln!("{}", self.agent_logs(80));
        }
        if thread::panicking() && std::env::var_os("SIGNET_LAB_KEEP_FAILED").is_some() {
            let copy = std::env::temp_dir().join(format!("{}-failed", self.id));
            let _ = fs::create_dir_all(&copy);
            for part in ["logs", "cluster"] {
                copy_files(&self.directory.join(part), &copy.join(part));
            }
            eprintln!("logs and cluster directory copied to {}", copy.display());
        }
        if !self.kept {
            self.dismantle();
        }
    }
}

/// An API server that has the shipped manifests.
fn shipped_api_server() -> Result<ApiServer> {
    let api = ApiServer::start()?;
    api.ship(&["crds", "agent", "authority"])?;
    Ok(api)
}

/// A kubeconfig in the node's network namespace with the agent's own token, which is bound to its
/// pod: what it may do the shipped roles say.
fn agent_kubeconfig(api: &ApiServer, node: &Node) -> Result<PathBuf> {
    let pod = format!("signet-agent-{}", node.name);
    api.apply(json!({
        "apiVersion": "v1", "kind": "Pod",
        "metadata": {
            "namespace": "signet-system", "name": pod,
            "labels": {"app.kubernetes.io/name": "signet-agent"},
        },
        "spec": {
            "serviceAccountName": "signet-agent", "nodeName": node.name, "hostNetwork": true,
            "containers": [{"name": "agent"}],
        },
        "status": {"phase": "Running"},
    }))?;
    let token = api.own_token("signet-system", "signet-agent", Some(&pod))?;
    api.listen_in(node.netns(), Some(&token))
}

/// The Node as the API has it.
fn node_object(node: &Node) -> Value {
    let addresses: Vec<Value> = node
        .addresses
        .all()
        .iter()
        .map(|ip| json!({"type": "InternalIP", "address": ip.to_string()}))
        .collect();
    json!({
        "apiVersion": "v1", "kind": "Node", "metadata": {"name": node.name},
        "status": {"addresses": addresses},
    })
}

fn copy_files(from: &Path, to: &Path) {
    let _ = fs::create_dir_all(to);
    for entry in fs::read_dir(from).into_iter().flatten().flatten() {
        let _ = fs::copy(entry.path(), to.join(entry.file_name()));
    }
}

/// The machine outside the mesh: on the switch, with public addresses behind its own.
fn outside(id: &LabId, family: Family, nodes: u8, switch: &Switch) -> Result<Place> {
    let namespace = format!("{id}-outside");
    let netns = netns::create(&namespace)?;
    switch.plug("outside", &namespace, family, &address::outside_on_link(family))?;
    let public = address::outside(family);
    let mut commands = Vec::new();
    if let Some(v4) = public.v4 {
        commands.push(format!("addr add {v4}/32 dev lo"));
    }
    if let Some(v6) = public.v6 {
        commands.push(format!("addr add {v6}/128 dev lo nodad"));
    }
    for number in 1..=nodes {
        let (via, range) = (address::node(family, number), address::pod(family, number, 0));
        if let (Some(via), Some(range)) = (via.v4, range.v4) {
            commands.push(format!("route add {range}/24 via {via}"));
        }
        if let (Some(via), Some(range)) = (via.v6, range.v6) {
            commands.push(format!("route add {range}/64 via {via}"));
        }
    }
    netns::batch(&namespace, &commands)?;
    let cgroup = cgroup::mount_point()?.join(id.as_str()).join("outside");
    cgroup::create(&cgroup)?;
    Ok(Place { cgroup, netns, runtime_netns: None, logs: id.directory().join("logs") })
}

/// Polls until `probe` gives a value; its last error says why it did not.
pub fn eventually<T>(
    what: &str,
    timeout: Duration,
    mut probe: impl FnMut() -> Result<Option<T>>,
) -> Result<T> {
    let deadline = Instant::now() + timeout;
    loop {
        let outcome = probe();
        match outcome {
            Ok(Some(value)) => return Ok(value),
            Ok(None) if Instant::now() > deadline => {
                anyhow::bail!("not within {timeout:?}: {what}")
            }
            Err(error) if Instant::now() > deadline => {
                return Err(error.context(format!("not within {timeout:?}: {what}")));
            }
            _ => thread::sleep(Duration::from_millis(10)),
        }
    }
}
