//! What a pod shall be, and the kubelet's steps to it.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, OnceLock, atomic::AtomicBool},
    time::Duration,
};

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};

use super::{Inner, Pod, Program};
use crate::{
    address::Addresses,
    cgroup,
    cluster_dir::ClusterDir,
    kubelet::{self, Qos},
    lab::eventually,
    netns,
    node::Node,
    process::{Place, Running},
    runtime::{self, Runtime},
    traffic::{Role, roles},
};

/// A container of a pod.
#[derive(Clone, Debug)]
pub struct Container {
    /// Its name.
    pub name: String,
    /// What it runs.
    pub program: Program,
}

/// Where a pod is put.
#[derive(Debug)]
pub(crate) struct Surroundings {
    pub(crate) cluster: Arc<ClusterDir>,
    pub(crate) node: Arc<Node>,
    pub(crate) logs: PathBuf,
    /// The lab's name, which the pod's parts carry.
    pub(crate) lab: String,
    /// The lab's list of its pods.
    pub(crate) pods: Arc<Mutex<Vec<Pod>>>,
}

/// A pod to be started.
#[derive(Debug)]
pub struct PodBuilder {
    surroundings: Surroundings,
    pub(super) namespace: String,
    pub(super) name: String,
    pub(super) uid: String,
    pub(super) service_account: String,
    pub(super) labels: BTreeMap<String, String>,
    pub(super) annotations: BTreeMap<String, String>,
    pub(super) init: Vec<Container>,
    pub(super) containers: Vec<Container>,
    pub(super) ports: Vec<(String, u16)>,
    pub(super) qos: Qos,
    pub(super) host: Option<u8>,
    pub(super) host_network: bool,
    pub(super) delay: Option<Duration>,
    pub(super) owner: Option<(String, String)>,
    pub(super) runtime_class: Option<String>,
    /// Its object is in the API already, as it was before its sandbox died.
    pub(super) remade: bool,
    /// A manifest that the object is built from.
    pub(super) object: Option<Value>,
}

impl PodBuilder {
    pub(crate) fn new(surroundings: Surroundings, namespace: &str, name: &str) -> Self {
        Self {
            surroundings,
            namespace: namespace.to_owned(),
            name: name.to_owned(),
            uid: uuid::Uuid::new_v4().to_string(),
            service_account: "default".into(),
            labels: [("app".to_owned(), name.to_owned())].into(),
            annotations: BTreeMap::new(),
            init: Vec::new(),
            containers: Vec::new(),
            ports: Vec::new(),
            qos: Qos::default(),
            host: None,
            host_network: false,
            delay: None,
            owner: None,
            runtime_class: None,
            remade: false,
            object: None,
        }
    }

    /// Another service account than `default`.
    pub fn service_account(mut self, name: &str) -> Self {
        self.service_account = name.into();
        self
    }

    /// The workload that it belongs to, by kind and name.
    pub fn owner(mut self, kind: &str, name: &str) -> Self {
        self.owner = Some((kind.into(), name.into()));
        self
    }

    /// A label.
    pub fn label(mut self, key: &str, value: &str) -> Self {
        self.labels.insert(key.into(), value.into());
        self
    }

    /// An annotation.
    pub fn annotation(mut self, key: &str, value: &str) -> Self {
        self.annotations.insert(key.into(), value.into());
        self
    }

    /// A container that runs a role; the first one is where [`Pod::exec`] runs.
    pub fn container(mut self, name: &str, role: Role) -> Self {
        self.containers.push(Container { name: name.into(), program: Program::Role(role) });
        self
    }

    /// An init container that runs a role to its end before the containers start.
    pub fn init_container(mut self, name: &str, role: Role) -> Self {
        self.init.push(Container { name: name.into(), program: Program::Role(role) });
        self
    }

    /// A named container port.
    pub fn port(mut self, name: &str, port: u16) -> Self {
        self.ports.push((name.into(), port));
        self
    }

    /// The QoS class, which decides where its cgroup is.
    pub fn qos(mut self, qos: Qos) -> Self {
        self.qos = qos;
        self
    }

    /// The address with this host number, e.g. one that another pod has just freed.
    pub fn host_number(mut self, host: u8) -> Self {
        self.host = Some(host);
        self
    }

    /// A given uid.
    pub fn uid(mut self, uid: &str) -> Self {
        self.uid = uid.into();
        self
    }

    /// The same pod with a new sandbox, as the kubelet makes one when the old one has died
    /// ([`Pod::end_sandbox`]): the API goes on saying the old address until the new one is known.
    pub fn remake(mut self, old: &Pod) -> Self {
        self.remade = true;
        self.uid(old.uid())
    }

    /// Runs in the node's network.
    pub fn host_network(mut self) -> Self {
        self.host_network = true;
        self
    }

    /// `spec.runtimeClassName`.
    pub fn runtime_class(mut self, name: &str) -> Self {
        self.runtime_class = Some(name.into());
        self
    }

    /// How long after the containers' start the API learns of the address.
    pub fn publish_after(mut self, delay: Duration) -> Self {
        self.delay = Some(delay);
        self
    }

    /// Starts it; returns when its containers run (and servers listen), not when the API or
    /// the agent know of it.
    pub fn start(self) -> Result<Pod> {
        let what = format!("pod {}/{}", self.namespace, self.name);
        self.start_now().context(what)
    }

    fn start_now(mut self) -> Result<Pod> {
        // Bind: the API knows the pod and its node, nothing else exists yet.
        if !self.remade {
            let object = self.bound_object();
            self.surroundings.cluster.apply(object)?;
        }

        // Sandbox: cgroup, network namespace, addresses, pause.
        let cgroup = self.surroundings.node.driver.pod_directory(
            &self.surroundings.node.workloads(),
            self.qos,
            &self.uid,
        );
        cgroup::create(&cgroup)?;
        let sandbox = self.sandbox(&cgroup)?;
        let runtime_netns = self.surroundings.node.netns().to_owned();
        let pod = Pod(Arc::new(Inner {
            namespace: self.namespace,
            name: self.name,
            uid: self.uid,
            node: self.surroundings.node,
            cluster: self.surroundings.cluster,
            host: sandbox.host,
            addresses: sandbox.addresses,
            netns_name: sandbox.netns_name,
            cgroup: cgroup.clone(),
            sandbox: Place {
                runtime_netns: Some(runtime_netns),
                cgroup,
                netns: sandbox.netns.clone(),
                logs: self.surroundings.logs.clone(),
            },
            netns: sandbox.netns,
            contained: sandbox.contained,
            main: OnceLock::new(),
            processes: Mutex::new(Vec::new()),
            gone: AtomicBool::new(false),
        }));
        self.surroundings.pods.lock().unwrap_or_else(|e| e.into_inner()).push(pod.clone());
        if pod.0.contained.is_none() {
            let pause = Container { name: "pause".into(), program: Program::Role(Role::Pause) };
            let (mut running, place) = pod.start_container(&pause)?;
            pause.program.wait_started(&place, &mut running)?;
            pod.processes().push((pause.name, running));
        }

        for container in &self.init {
            let (mut running, _) = pod.start_container(container)?;
            let status = running.wait(Duration::from_secs(60));
            let said = running.said();
            pod.processes().push((container.name.clone(), running));
            let status = status?;
            ensure!(status.success(), "init container {}: {status}: {said}", container.name);
        }
        if self.containers.is_empty() {
            self.containers
                .push(Container { name: "main".into(), program: Program::Role(Role::Pause) });
        }
        for container in &self.containers {
            let (mut running, place) = pod.start_container(container)?;
            // The first one is where commands run.
            let _ = pod.0.main.set(place.clone());
            container.program.wait_started(&place, &mut running)?;
            pod.processes().push((container.name.clone(), running));
        }
        pod.publish_after(self.delay.unwrap_or_else(kubelet::publish_delay))?;
        Ok(pod)
    }

    fn sandbox(&self, cgroup: &Path) -> Result<Sandbox> {
        if let Some(runtime) = self.surroundings.node.runtime() {
            return self.contained(runtime, cgroup);
        }
        if self.host_network {
            return Ok(Sandbox {
                host: None,
                addresses: self.surroundings.node.addresses,
                netns_name: None,
                netns: self.surroundings.node.netns().to_owned(),
                contained: None,
            });
        }
        let (host, addresses) = self.surroundings.node.take_addresses(self.host)?;
        let netns_name = self.netns_name();
        let netns = netns::create(&netns_name)?;
        self.surroundings.node.connect_pod(host, &netns_name, &addresses)?;
        let (host, netns_name) = (Some(host), Some(netns_name));
        Ok(Sandbox { host, addresses, netns_name, netns, contained: None })
    }

    /// The lab's and the pod's number: short, and unique while the pod lives.
    fn netns_name(&self) -> String {
        format!("{}-pod-{}", self.surroundings.lab, &self.uid[..self.uid.len().min(18)])
    }

    /// A sandbox that a real runtime makes.
    fn contained(&self, runtime: &Arc<Runtime>, cgroup: &Path) -> Result<Sandbox> {
        ensure!(self.host.is_none(), "a real CNI plugin gives what address it likes");
        let node = &self.surroundings.node;
        let parent = cgroup::path_below_mount(cgroup)?;
        let made = runtime.run_sandbox(
            &self.uid,
            &self.namespace,
            &self.name,
            &parent,
            self.host_network,
        )?;
        let (addresses, netns, netns_name) = if self.host_network {
            (node.addresses, node.netns().to_owned(), None)
        } else {
            // `ip -n` knows namespaces by their names in one directory.
            let name = self.netns_name();
            let link = netns::path(&name);
            std::os::unix::fs::symlink(&made.netns, &link)
                .with_context(|| link.display().to_string())?;
            (made.addresses, made.netns.clone(), Some(name))
        };
        let contained = Some((Arc::clone(runtime), made));
        Ok(Sandbox { host: None, addresses, netns_name, netns, contained })
    }

    /// The object as the scheduler leaves it: bound to a node, pending.
    fn bound_object(&self) -> Value {
        if let Some(mut object) = self.object.clone() {
            object["metadata"]["uid"] = json!(self.uid);
            object["metadata"]["namespace"] = json!(self.namespace);
            object["spec"]["nodeName"] = json!(self.surroundings.node.name);
            object["status"] = json!({"phase": "Pending"});
            return object;
        }
        let container = |c: &Container| json!({"name": c.name, "image": "signet-lab"});
        let mut containers: Vec<Value> = self.containers.iter().map(container).collect();
        if containers.is_empty() {
            containers.push(json!({"name": "main", "image": "signet-lab"}));
        }
        let ports: Vec<Value> = self
            .ports
            .iter()
            .map(|(name, port)| json!({"name": name, "containerPort": port}))
            .collect();
        if !ports.is_empty() {
            containers[0]["ports"] = ports.into();
        }
        let mut spec = json!({
            "nodeName": self.surroundings.node.name,
            "serviceAccountName": self.service_account,
            "containers": containers,
        });
        if !self.init.is_empty() {
            spec["initContainers"] = self.init.iter().map(container).collect();
        }
        if self.host_network {
            spec["hostNetwork"] = json!(true);
        }
        if let Some(class) = &self.runtime_class {
            spec["runtimeClassName"] = json!(class);
        }
        let mut metadata = json!({
            "name": self.name, "namespace": self.namespace, "uid": self.uid,
            "labels": self.labels,
        });
        if !self.annotations.is_empty() {
            metadata["annotations"] = json!(self.annotations);
        }
        if let Some((kind, name)) = &self.owner {
            metadata["ownerReferences"] = json!([{
                "apiVersion": "apps/v1", "kind": kind, "name": name, "uid": format!("{name}-uid"),
                "controller": true,
            }]);
        }
        json!({
            "apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": spec,
            "status": {"phase": "Pending"},
        })
    }
}

struct Sandbox {
    host: Option<u8>,
    addresses: Addresses,
    netns_name: Option<String>,
    netns: PathBuf,
    contained: Option<(Arc<Runtime>, runtime::Sandbox)>,
}

impl Program {
    /// Starts it at a place.
    pub(super) fn start(&self, place: &Place, name: &str) -> Result<Running> {
        match self {
            Self::Role(role) => place.start_role(name, &role.argv()?),
            Self::Worker(arguments) => place.start_role(name, arguments),
            Self::Command(argv) => {
                let argv: Vec<&str> = argv.iter().map(String::as_str).collect();
                place.start_program(name, &argv)
            }
        }
    }

    /// The helper's arguments, for a container of an image that has nothing else.
    pub(super) fn arguments(&self) -> Result<Vec<String>> {
        match self {
            Self::Role(role) => role.argv(),
            Self::Worker(arguments) => Ok(arguments.clone()),
            Self::Command(argv) => bail!("the lab's image has the helper alone, not {argv:?}"),
        }
    }

    /// Waits until it runs at its place and, for a server, listens, so that a client that
    /// comes next is not too early.
    pub(super) fn wait_started(&self, place: &Place, running: &mut Running) -> Result<()> {
        let listens = match self {
            Self::Role(role) => role.announces_listening(),
            Self::Worker(arguments) => arguments.first().is_some_and(|role| roles::is_server(role)),
            Self::Command(_) => false,
        };
        if listens {
            running.wait_event("listening", crate::START_TIMEOUT)?;
        }
        eventually("the process has joined its cgroup", crate::START_TIMEOUT, || {
            let there = cgroup::processes(&place.cgroup).contains(&running.pid());
            Ok((there || running.ended().is_some()).then_some(()))
        })
    }
}
