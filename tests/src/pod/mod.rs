//! Pods: started by the unkind kubelet's steps, used by tests as `kubectl exec` would.

mod builder;
mod manifest;

use std::{
    net::{IpAddr, SocketAddr},
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, MutexGuard, OnceLock, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

pub(crate) use self::builder::Surroundings;
pub use self::{
    builder::{Container, PodBuilder},
    manifest::{Program, builder_of},
};
use crate::{
    address::Addresses,
    cgroup,
    cluster_dir::{ClusterDir, ObjectKey},
    kubelet, netns,
    node::Node,
    process::{Output, Place, Running},
    runtime::{self, Contained, Runtime},
    traffic::Role,
};

/// A pod that runs; clones are handles on the same one. It lives until [`Pod::remove`] or the
/// lab's end.
#[derive(Clone, Debug)]
pub struct Pod(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    namespace: String,
    name: String,
    uid: String,
    node: Arc<Node>,
    cluster: Arc<ClusterDir>,
    host: Option<u8>,
    addresses: Addresses,
    netns_name: Option<String>,
    netns: PathBuf,
    cgroup: PathBuf,
    /// Its network, and the pod's cgroup itself.
    sandbox: Place,
    /// Where its first container runs, once it does.
    main: OnceLock<Place>,
    /// What made it, when that is a real runtime.
    contained: Option<(Arc<Runtime>, runtime::Sandbox)>,
    processes: Mutex<Vec<(String, Running)>>,
    gone: AtomicBool,
}

impl Pod {
    /// Its namespace.
    pub fn namespace(&self) -> &str {
        &self.0.namespace
    }

    /// Its name.
    pub fn name(&self) -> &str {
        &self.0.name
    }

    /// `namespace/name`.
    pub fn full_name(&self) -> String {
        format!("{}/{}", self.0.namespace, self.0.name)
    }

    /// Its uid.
    pub fn uid(&self) -> &str {
        &self.0.uid
    }

    /// Its node.
    pub fn node(&self) -> &Node {
        &self.0.node
    }

    /// Its addresses (the node's for a hostNetwork pod).
    pub fn addresses(&self) -> Addresses {
        self.0.addresses
    }

    /// Its first address.
    pub fn ip(&self) -> IpAddr {
        self.0.addresses.first()
    }

    /// All its addresses.
    pub fn ips(&self) -> Vec<IpAddr> {
        self.0.addresses.all()
    }

    /// Its first address with a port.
    pub fn at(&self, port: u16) -> SocketAddr {
        (self.ip(), port).into()
    }

    /// An address of each family with a port.
    pub fn all_at(&self, port: u16) -> Vec<SocketAddr> {
        self.ips().into_iter().map(|ip| (ip, port).into()).collect()
    }

    /// `http://address:port/path`.
    pub fn url(&self, port: u16, path: &str) -> String {
        format!("http://{}{path}", self.at(port))
    }

    /// Its network namespace's file.
    pub fn netns(&self) -> &Path {
        &self.0.netns
    }

    /// Its network namespace's name for `ip -n`; hostNetwork pods have the node's.
    pub fn netns_name(&self) -> &str {
        self.0.netns_name.as_deref().unwrap_or_else(|| self.0.node.netns_name())
    }

    /// Its cgroup directory.
    pub fn cgroup(&self) -> &Path {
        &self.0.cgroup
    }

    /// Where its main container's processes run.
    pub fn place(&self) -> &Place {
        self.0.main.get().unwrap_or(&self.0.sandbox)
    }

    /// The key of its object in the cluster directory.
    pub fn key(&self) -> ObjectKey {
        ObjectKey::new("Pod", &self.0.namespace, &self.0.name)
    }

    /// Runs a command in the main container to its end.
    pub fn exec(&self, argv: &[&str]) -> Result<Output> {
        self.place().run(argv)
    }

    /// Plain curl, with a time limit of 5 s.
    pub fn curl(&self, url: &str) -> Result<Output> {
        self.exec(&["curl", "-sS", "-g", "--max-time", "5", url])
    }

    /// Starts a role in the main container.
    pub fn start(&self, role: &Role) -> Result<Running> {
        let name = format!("{}-{}-{}", self.0.namespace, self.0.name, role.name());
        self.place().start_role(&name, &role.argv()?)
    }

    /// Runs a role in the main container until its report.
    pub fn run<T: DeserializeOwned>(&self, role: &Role, timeout: Duration) -> Result<T> {
        let mut running = self.start(role)?;
        let report = running.report(timeout);
        if report.is_ok() {
            // Its sockets are closed when it has ended, not when it has reported.
            running.finish();
            running.wait(timeout)?;
        }
        report
    }

    /// The process of one of its containers, by name.
    pub fn with_container<T>(
        &self,
        container: &str,
        f: impl FnOnce(&mut Running) -> Result<T>,
    ) -> Result<T> {
        let mut processes = self.processes();
        let running = processes
            .iter_mut()
            .find(|(name, _)| name == container)
            .map(|(_, running)| running)
            .with_context(|| format!("{}: no container {container}", self.full_name()))?;
        f(running)
    }

    /// What a container has printed so far.
    pub fn printed(&self, container: &str) -> Result<Vec<Value>> {
        self.with_container(container, |running| Ok(running.printed()))
    }

    /// Asks a server role in a container for its report, as it is now.
    pub fn report_of<T: DeserializeOwned>(&self, container: &str) -> Result<T> {
        self.with_container(container, |running| {
            let before = running.printed().iter().filter(|v| v["event"] == "report").count();
            running.send("report")?;
            let deadline = Instant::now() + crate::START_TIMEOUT;
            loop {
                let reports: Vec<Value> =
                    running.printed().into_iter().filter(|v| v["event"] == "report").collect();
                if let Some(report) = reports.into_iter().nth(before) {
                    return serde_json::from_value(report).context("report");
                }
                ensure!(Instant::now() < deadline, "no report from {container}");
                thread::sleep(Duration::from_millis(2));
            }
        })
    }

    /// Waits until the API knows the pod's address.
    pub fn wait_published(&self) -> Result<()> {
        let deadline = Instant::now() + Duration::from_secs(10);
        loop {
            let object = self.0.cluster.get(&self.key()).context("the pod is gone")?;
            if object["status"]["podIP"].is_string() {
                return Ok(());
            }
            if Instant::now() > deadline {
                bail!("{}: no address in the API after 10 s", self.full_name());
            }
            thread::sleep(Duration::from_millis(10));
        }
    }

    /// Adds an address to the pod's `lo` or `eth0`, as an attacker inside it would.
    pub fn add_address(&self, ip: IpAddr, device: &str) -> Result<()> {
        let bits = if ip.is_ipv4() { 32 } else { 128 };
        let nodad = if ip.is_ipv4() { "" } else { " nodad" };
        netns::batch(self.netns_name(), &[format!("addr add {ip}/{bits} dev {device}{nodad}")])
    }

    /// Marks it as terminating in the API; its processes still run.
    pub fn mark_terminating(&self) -> Result<()> {
        self.0.cluster.change(&self.key(), |object| {
            object["metadata"]["deletionTimestamp"] = json!(jiff::Timestamp::now().to_string());
        })
    }

    /// Ends it as the kubelet does: terminating in the API, processes, namespace, cgroup, object.
    pub fn remove(&self) -> Result<()> {
        if self.0.gone.load(Ordering::Relaxed) {
            return Ok(());
        }
        self.mark_terminating()?;
        self.dismantle();
        self.0.cluster.delete(&self.key())
    }

    /// Deletes it from the API while its processes run on, as `kubectl delete --force` does;
    /// [`Self::dismantle`] ends them.
    pub fn forget(&self) -> Result<()> {
        self.0.cluster.delete(&self.key())
    }

    /// Ends its processes and removes its parts; the API's object stays.
    pub fn dismantle(&self) {
        self.end(|| cgroup::kill_and_remove_everywhere(&self.0.cgroup));
    }

    /// Its sandbox dies: processes, namespace, addresses. The pod's cgroup and object stay, for
    /// [`PodBuilder::remake`].
    pub fn end_sandbox(&self) {
        self.end(|| {
            for container in cgroup::children(&self.0.cgroup) {
                cgroup::kill_and_remove(&container);
            }
        });
    }

    fn end(&self, end_cgroup: impl FnOnce()) {
        if self.0.gone.swap(true, Ordering::Relaxed) {
            return;
        }
        if let Some((runtime, sandbox)) = &self.0.contained {
            if let Some(name) = &self.0.netns_name {
                // A link to what the runtime made: CNI ends that.
                let _ = std::fs::remove_file(netns::path(name));
            }
            runtime.end_sandbox(&sandbox.id);
            self.processes().clear();
            end_cgroup();
            return;
        }
        self.processes().clear();
        end_cgroup();
        if let Some(name) = &self.0.netns_name {
            netns::delete(name);
        }
        if let Some(host) = self.0.host {
            // As a CNI does: whoever still holds the namespace open keeps no link alive.
            self.0.node.disconnect_pod(host);
            self.0.node.free_addresses(host);
        }
    }

    fn processes(&self) -> MutexGuard<'_, Vec<(String, Running)>> {
        self.0.processes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The API learns of the address some time after the containers run.
    fn publish_after(&self, delay: Duration) -> Result<()> {
        let pod = Arc::downgrade(&self.0);
        thread::Builder::new()
            .name("kubelet status".into())
            .spawn(move || {
                thread::sleep(delay);
                let Some(pod) = pod.upgrade().map(Pod) else { return };
                // Nothing is said of a pod whose sandbox or object is gone.
                let is_gone = pod.0.gone.load(Ordering::Relaxed);
                if is_gone || pod.0.cluster.get(&pod.key()).is_none() {
                    return;
                }
                // A pod that was removed meanwhile has no object to change.
                if let Err(error) = pod.publish()
                    && !pod.0.gone.load(Ordering::Relaxed)
                {
                    eprintln!("{}: status not written: {error:#}", pod.full_name());
                }
            })
            .context("kubelet thread")?;
        Ok(())
    }

    /// Writes the pod's status with its addresses.
    pub fn publish(&self) -> Result<()> {
        let ips: Vec<Value> = self.ips().iter().map(|ip| json!({"ip": ip.to_string()})).collect();
        let status = json!({
            "phase": "Running",
            "podIP": self.ip().to_string(),
            "podIPs": ips,
            "hostIP": self.node().addresses.first().to_string(),
            "conditions": [{"type": "Ready", "status": "True"}],
        });
        self.0.cluster.change(&self.key(), |object| object["status"] = status)
    }

    /// Starts a container, in a cgroup of its own as the runtime makes it.
    fn start_container(&self, container: &Container) -> Result<(Running, Place)> {
        let name = format!("{}-{}-{}", self.0.namespace, self.0.name, container.name);
        let place_of = |id: &str| {
            let cgroup = self.0.cgroup.join(self.0.node.driver.container_directory(id));
            Place { cgroup, ..self.0.sandbox.clone() }
        };
        match &self.0.contained {
            None => {
                let place = place_of(&kubelet::container_id());
                cgroup::create(&place.cgroup)?;
                Ok((container.program.start(&place, &name)?, place))
            }
            Some((runtime, sandbox)) => {
                let arguments = container.program.arguments()?;
                let (contained, input, output) =
                    Contained::start(runtime, sandbox, &container.name, &arguments)?;
                let place = place_of(contained.id());
                let logs = &place.logs;
                Ok((Running::contained(contained, input, output, &name, logs)?, place))
            }
        }
    }
}
