//! The cluster's objects as the agents see them: a directory of YAML files.
//!
//! The part of an API server and of the endpoints controller: objects are applied, changed
//! and deleted; each is one file that is replaced atomically; EndpointSlices follow from
//! Services, labels and published pod addresses, as in a cluster. Where the lab has a test API
//! server, every object goes to it as well, and the agents follow that.

mod manifests;
mod slices;

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};

use crate::api_server::ApiServer;

pub use self::manifests::{kind_of, name_of, parse};

/// Kind, namespace (empty for cluster-wide objects) and name.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct ObjectKey {
    /// `Pod`, `Namespace`, …
    pub kind: String,
    /// Namespace, or empty.
    pub namespace: String,
    /// Name.
    pub name: String,
}

/// The directory and what is in it.
#[derive(Debug)]
pub struct ClusterDir {
    directory: PathBuf,
    /// Files are written here and renamed: a watcher never sees half of one.
    staging: PathBuf,
    objects: Mutex<BTreeMap<ObjectKey, Value>>,
    /// Everything goes there, too.
    api: Option<Arc<ApiServer>>,
}

impl ClusterDir {
    /// Makes the directory (and `<directory>.staging` beside it).
    pub fn create(directory: &Path) -> Result<Self> {
        Self::create_with(directory, None)
    }

    /// The same; everything that is written goes to an API server, too.
    pub fn create_with(directory: &Path, api: Option<Arc<ApiServer>>) -> Result<Self> {
        let staging = directory.with_extension("staging");
        for path in [directory, &staging] {
            fs::create_dir_all(path).with_context(|| path.display().to_string())?;
        }
        let directory = directory.to_owned();
        Ok(Self { directory, staging, objects: Mutex::new(BTreeMap::new()), api })
    }

    /// The directory, for `--cluster-dir`.
    pub fn path(&self) -> &Path {
        &self.directory
    }

    /// Writes `ranges.yaml`.
    pub fn set_ranges(
        &self,
        pods: &[String],
        services: &[String],
        outside: &[String],
    ) -> Result<()> {
        let ranges =
            json!({"podRanges": pods, "serviceRanges": services, "outsideRanges": outside});
        if let Some(api) = &self.api {
            // As a cluster declares them: with Calico's pools and the kinds that it then has.
            api.install("ippools")?;
            api.install("servicecidrs")?;
            for (index, range) in pods.iter().enumerate() {
                api.apply(json!({
                    "apiVersion": "crd.projectcalico.org/v1", "kind": "IPPool",
                    "metadata": {"name": format!("pool-{index}")}, "spec": {"cidr": range},
                }))?;
            }
            api.apply(json!({
                "apiVersion": "networking.k8s.io/v1", "kind": "ServiceCIDR",
                "metadata": {"name": "kubernetes"}, "spec": {"cidrs": services},
            }))?;
        }
        self.write_file("ranges.yaml", &to_yaml(&ranges)?)
    }

    /// Creates or replaces an object.
    pub fn apply(&self, object: Value) -> Result<()> {
        self.store(&mut self.objects(), object)
    }

    fn store(&self, objects: &mut BTreeMap<ObjectKey, Value>, object: Value) -> Result<()> {
        let key = key_of(&object)?;
        self.write_object(&key, &object)?;
        objects.insert(key.clone(), object);
        self.follow_endpoints(objects, &key)
    }

    fn write_object(&self, key: &ObjectKey, object: &Value) -> Result<()> {
        self.write_file(&file_name(key), &to_yaml(object)?)?;
        if let Some(api) = &self.api {
            api.apply(object.clone())?;
        }
        Ok(())
    }

    fn remove_object(&self, key: &ObjectKey) -> Result<()> {
        let file = self.directory.join(file_name(key));
        fs::remove_file(&file).with_context(|| file.display().to_string())?;
        if let Some(api) = &self.api {
            api.delete_kind(&key.kind, &key.namespace, &key.name)?;
        }
        Ok(())
    }

    /// Every object of a YAML text, one after the other.
    pub fn apply_yaml(&self, text: &str) -> Result<()> {
        parse(text)?.into_iter().try_for_each(|object| self.apply(object))
    }

    /// Changes an object that is there.
    pub fn change(&self, key: &ObjectKey, change: impl FnOnce(&mut Value)) -> Result<()> {
        let mut objects = self.objects();
        let mut object = objects.get(key).cloned().with_context(|| format!("no {key:?}"))?;
        change(&mut object);
        self.store(&mut objects, object)
    }

    /// Deletes an object; one that is not there is no error.
    pub fn delete(&self, key: &ObjectKey) -> Result<()> {
        let mut objects = self.objects();
        if objects.remove(key).is_some() {
            self.remove_object(key)?;
        }
        self.follow_endpoints(&mut objects, key)
    }

    /// The object as it was last applied.
    pub fn get(&self, key: &ObjectKey) -> Option<Value> {
        self.objects().get(key).cloned()
    }

    /// Writes any file into the directory, atomically: also broken ones, for tests of that.
    pub fn write_file(&self, name: &str, text: &str) -> Result<()> {
        let staged = self.staging.join(name);
        let target = self.directory.join(name);
        fs::write(&staged, text).with_context(|| staged.display().to_string())?;
        fs::rename(&staged, &target).with_context(|| target.display().to_string())
    }

    /// Writes a node's announcement of whom it serves, as a forger would.
    pub fn write_board(&self, node: &str, text: &str) -> Result<()> {
        fs::create_dir_all(self.directory.join("status")).context("status")?;
        let staged = self.staging.join(format!("board-{node}.yaml"));
        let target = self.directory.join("status").join(format!("{node}.yaml"));
        fs::write(&staged, text).with_context(|| staged.display().to_string())?;
        fs::rename(&staged, &target).with_context(|| target.display().to_string())
    }

    /// Removes a file that [`Self::write_file`] wrote.
    pub fn remove_file(&self, name: &str) -> Result<()> {
        let file = self.directory.join(name);
        fs::remove_file(&file).with_context(|| file.display().to_string())
    }

    /// Makes a Namespace with these labels, and its `default` ServiceAccount.
    pub fn namespace(&self, name: &str, labels: &[(&str, &str)]) -> Result<()> {
        self.apply(json!({
            "apiVersion": "v1", "kind": "Namespace",
            "metadata": {"name": name, "labels": map(labels)},
        }))?;
        self.service_account(name, "default")
    }

    /// Sets or removes (`None`) a Namespace's label.
    pub fn label_namespace(&self, name: &str, label: &str, value: Option<&str>) -> Result<()> {
        self.change(&ObjectKey::cluster("Namespace", name), |object| {
            set(&mut object["metadata"]["labels"], label, value);
        })
    }

    /// Sets or removes (`None`) a Namespace's annotation.
    pub fn annotate_namespace(&self, name: &str, key: &str, value: Option<&str>) -> Result<()> {
        self.change(&ObjectKey::cluster("Namespace", name), |object| {
            set(&mut object["metadata"]["annotations"], key, value);
        })
    }

    /// Sets or removes (`None`) a pod's label.
    pub fn label_pod(&self, ns: &str, name: &str, label: &str, value: Option<&str>) -> Result<()> {
        self.change(&ObjectKey::new("Pod", ns, name), |object| {
            set(&mut object["metadata"]["labels"], label, value);
        })
    }

    /// Sets a Namespace's mode, `None` for no label.
    pub fn set_mode(&self, namespace: &str, mode: Option<&str>) -> Result<()> {
        self.label_namespace(namespace, "signet.dev/mode", mode)
    }

    /// Makes a ServiceAccount.
    pub fn service_account(&self, namespace: &str, name: &str) -> Result<()> {
        self.apply(json!({
            "apiVersion": "v1", "kind": "ServiceAccount",
            "metadata": {"name": name, "namespace": namespace},
        }))
    }

    fn objects(&self) -> MutexGuard<'_, BTreeMap<ObjectKey, Value>> {
        self.objects.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The endpoints controller: after a change of a Pod or Service, the slices that follow.
    fn follow_endpoints(
        &self,
        objects: &mut BTreeMap<ObjectKey, Value>,
        changed: &ObjectKey,
    ) -> Result<()> {
        if changed.kind != "Pod" && changed.kind != "Service" {
            return Ok(());
        }
        let wanted = slices::of_namespace(objects, &changed.namespace);
        let present: Vec<ObjectKey> = objects
            .iter()
            .filter(|(key, value)| {
                key.kind == "EndpointSlice"
                    && key.namespace == changed.namespace
                    && value["metadata"]["labels"][slices::MANAGED_BY] == slices::MANAGER
            })
            .map(|(key, _)| key.clone())
            .collect();
        for key in present.iter().filter(|key| !wanted.contains_key(key)) {
            objects.remove(key);
            self.remove_object(key)?;
        }
        for (key, slice) in wanted {
            if objects.get(&key) != Some(&slice) {
                self.write_object(&key, &slice)?;
                objects.insert(key, slice);
            }
        }
        Ok(())
    }
}

impl ObjectKey {
    /// A namespaced object's key.
    pub fn new(kind: &str, namespace: &str, name: &str) -> Self {
        Self { kind: kind.into(), namespace: namespace.into(), name: name.into() }
    }

    /// A cluster-wide object's key.
    pub fn cluster(kind: &str, name: &str) -> Self {
        Self::new(kind, "", name)
    }
}

fn key_of(object: &Value) -> Result<ObjectKey> {
    let Some(kind) = object["kind"].as_str() else { bail!("an object without kind: {object}") };
    let Some(name) = object["metadata"]["name"].as_str() else {
        bail!("a {kind} without metadata.name")
    };
    let namespace = object["metadata"]["namespace"].as_str().unwrap_or_default();
    Ok(ObjectKey::new(kind, namespace, name))
}

fn file_name(key: &ObjectKey) -> String {
    let kind = key.kind.to_lowercase();
    if key.namespace.is_empty() {
        format!("{kind}.{}.yaml", key.name)
    } else {
        format!("{kind}.{}.{}.yaml", key.namespace, key.name)
    }
}

/// YAML text of an object.
pub fn to_yaml(object: &Value) -> Result<String> {
    serde_saphyr::to_string(object).context("YAML")
}

/// A JSON object of pairs.
pub fn map(pairs: &[(&str, &str)]) -> Value {
    pairs.iter().map(|(k, v)| ((*k).to_owned(), json!(v))).collect::<serde_json::Map<_, _>>().into()
}

fn set(object: &mut Value, key: &str, value: Option<&str>) {
    match value {
        Some(value) => object[key] = json!(value),
        None => {
            if let Some(map) = object.as_object_mut() {
                map.remove(key);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn endpoint_slices_follow_services_and_published_pods() {
        let temp = tempfile::tempdir().unwrap();
        let cluster = ClusterDir::create(&temp.path().join("cluster")).unwrap();
        cluster.namespace("shop", &[("signet.dev/mode", "strict")]).unwrap();
        cluster
            .apply(json!({"apiVersion": "v1", "kind": "Service",
                "metadata": {"name": "payments", "namespace": "shop"},
                "spec": {"selector": {"app": "payments"}, "clusterIPs": ["10.96.0.1"],
                    "ports": [{"name": "web", "port": 80, "protocol": "TCP", "targetPort": "http"}]}}))
            .unwrap();
        let pod = |ip: Value| {
            json!({"apiVersion": "v1", "kind": "Pod",
                "metadata": {"name": "p", "namespace": "shop", "labels": {"app": "payments"}},
                "spec": {"nodeName": "node-1", "containers": [
                    {"name": "main", "ports": [{"name": "http", "containerPort": 8080}]}]},
                "status": {"phase": "Running", "podIPs": ip,
                    "conditions": [{"type": "Ready", "status": "True"}]}})
        };
        cluster.apply(pod(json!([]))).unwrap();
        let slice = ObjectKey::new("EndpointSlice", "shop", "payments-ipv4");
        assert_eq!(cluster.get(&slice).unwrap()["endpoints"], json!([]));
        cluster.apply(pod(json!([{"ip": "10.244.1.2"}]))).unwrap();
        let now = cluster.get(&slice).unwrap();
        assert_eq!(now["endpoints"][0]["addresses"], json!(["10.244.1.2"]));
        assert_eq!(now["ports"][0]["port"], json!(8080));
        let file = cluster.path().join("endpointslice.shop.payments-ipv4.yaml");
        let text = fs::read_to_string(&file).unwrap();
        assert_eq!(parse(&text).unwrap(), [now]);
        cluster.delete(&ObjectKey::new("Service", "shop", "payments")).unwrap();
        assert!(!file.exists());
    }

    #[test]
    fn labels_change_and_go() {
        let temp = tempfile::tempdir().unwrap();
        let cluster = ClusterDir::create(&temp.path().join("cluster")).unwrap();
        cluster.namespace("shop", &[]).unwrap();
        let key = ObjectKey::cluster("Namespace", "shop");
        let label = || cluster.get(&key).unwrap()["metadata"]["labels"]["signet.dev/mode"].clone();
        cluster.set_mode("shop", Some("observe")).unwrap();
        assert_eq!(label(), "observe");
        cluster.set_mode("shop", None).unwrap();
        assert_eq!(label(), Value::Null);
    }
}
