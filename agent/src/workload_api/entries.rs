//! Static entries: identities of what is not a pod, by systemd unit, cgroup, user, executable.
//!
//! `WorkloadEntry` manifests in a directory of the node's. What an entry selects by, the kernel
//! says of the process: nothing that its user could write.

use std::{
    fs, io,
    os::unix::fs::MetadataExt,
    path::{Component, Path, PathBuf},
    sync::Arc,
};

use arc_swap::ArcSwap;
use tokio::sync::watch;

use super::attest::{AttestError, Caller};
use crate::{
    config::yaml::{self, Fault, Node},
    spiffe::{SpiffeId, TrustDomain},
};

/// `apiVersion` of an entry.
const API_VERSION: &str = "signet.dev/v1alpha1";
const KIND: &str = "WorkloadEntry";
/// The most entries that a node has.
const MAX_ENTRIES: usize = 1024;

/// A workload that is no pod.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Entry {
    /// Its name: one on the node.
    pub name: Arc<str>,
    /// The identity that it has.
    pub id: SpiffeId,
    selector: Selector,
}

/// What a process must be; everything that is given must hold.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
struct Selector {
    unit: Option<String>,
    cgroup: Option<PathBuf>,
    uid: Option<u32>,
    executable: Option<PathBuf>,
}

/// Why entries cannot be read; those in force stay.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum EntriesError {
    /// A file or the directory.
    #[error("workloadEntries: {}: {source}", path.display())]
    Read {
        /// Which.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// A manifest.
    #[error("workloadEntries: {}:{}: {fault}", path.display(), fault.line)]
    Manifest {
        /// Which file.
        path: PathBuf,
        /// What is wrong in it.
        fault: Fault,
    },
}

/// The entries in force, shared and replaced as a whole.
#[derive(Clone)]
pub struct Entries {
    current: Arc<ArcSwap<Vec<Entry>>>,
    changes: watch::Sender<u64>,
}

impl Entries {
    /// Reads those in `directory`; without one there are none.
    pub fn open(directory: Option<&Path>, domain: &TrustDomain) -> Result<Self, EntriesError> {
        let entries = directory.map_or(Ok(Vec::new()), |dir| read_directory(dir, domain))?;
        Ok(Self {
            current: Arc::new(ArcSwap::from_pointee(entries)),
            changes: watch::Sender::new(0),
        })
    }

    /// Reads them again. On an error those in force stay.
    pub fn reload(
        &self,
        directory: Option<&Path>,
        domain: &TrustDomain,
    ) -> Result<(), EntriesError> {
        let entries = directory.map_or(Ok(Vec::new()), |dir| read_directory(dir, domain))?;
        if **self.current.load() != entries {
            tracing::info!(entries = entries.len(), "workload entries changed");
            self.current.store(Arc::new(entries));
            self.changes.send_modify(|n| *n += 1);
        }
        Ok(())
    }

    /// Counts changes, followed.
    pub(super) fn subscribe(&self) -> watch::Receiver<u64> {
        self.changes.subscribe()
    }

    /// The identities of all entries.
    pub(super) fn ids(&self) -> Vec<SpiffeId> {
        self.current.load().iter().map(|entry| entry.id.clone()).collect()
    }

    /// The identity of the entry of this name.
    pub(super) fn id_of(&self, name: &str) -> Option<SpiffeId> {
        self.current.load().iter().find(|entry| *entry.name == *name).map(|e| e.id.clone())
    }

    /// The entry that selects the process, whose cgroup is `cgroup`: of several the one that
    /// says most, of these the first by name.
    pub(super) fn of(&self, caller: &Caller, cgroup: &Path) -> Result<Option<Entry>, AttestError> {
        let entries = self.current.load();
        let mut best: Option<&Entry> = None;
        for entry in entries.iter() {
            let better = best.is_none_or(|best| entry.selector.count() > best.selector.count());
            if better && entry.selector.selects(caller, cgroup)? {
                best = Some(entry);
            }
        }
        Ok(best.cloned())
    }
}

impl Selector {
    fn count(&self) -> usize {
        [self.unit.is_some(), self.cgroup.is_some(), self.uid.is_some(), self.executable.is_some()]
            .into_iter()
            .filter(|given| *given)
            .count()
    }

    fn selects(&self, caller: &Caller, cgroup: &Path) -> Result<bool, AttestError> {
        let unit = self.unit.as_deref().is_none_or(|unit| unit_of(cgroup) == Some(unit));
        let below = self.cgroup.as_deref().is_none_or(|wanted| cgroup.starts_with(wanted));
        let user = self.uid.is_none_or(|uid| caller.uid() == uid);
        if !(unit && below && user) {
            return Ok(false);
        }
        match &self.executable {
            Some(path) => is_executing(caller, path),
            None => Ok(true),
        }
    }
}

/// The systemd unit that a cgroup is of: the first name below the slices. Whatever is below
/// that is the unit's own affair, and may be named like another unit.
fn unit_of(cgroup: &Path) -> Option<&str> {
    let mut names = cgroup.components().filter_map(|c| match c {
        Component::Normal(name) => Some(name),
        _ => None,
    });
    names.find_map(|name| {
        let name = name.to_str().unwrap_or_default();
        (!name.ends_with(".slice")).then_some(name)
    })
}

/// True when the process runs the very file that the node has at `path`. Its name would say
/// nothing: in a mount namespace of its own, any file can have it.
fn is_executing(caller: &Caller, path: &Path) -> Result<bool, AttestError> {
    let running = caller.executable()?;
    Ok(fs::metadata(path).is_ok_and(|wanted| (wanted.dev(), wanted.ino()) == running))
}

fn read_directory(directory: &Path, domain: &TrustDomain) -> Result<Vec<Entry>, EntriesError> {
    let unread = |path: &Path| {
        let path = path.to_owned();
        move |source| EntriesError::Read { path, source }
    };
    let mut files: Vec<PathBuf> = Vec::new();
    for file in fs::read_dir(directory).map_err(unread(directory))? {
        let path = file.map_err(unread(directory))?.path();
        let is_manifest =
            path.extension().is_some_and(|extension| extension == "yaml" || extension == "yml");
        if is_manifest {
            files.push(path);
        }
    }
    files.sort();
    let mut entries: Vec<Entry> = Vec::new();
    for path in files {
        let text = fs::read_to_string(&path).map_err(unread(&path))?;
        let mut add = || -> Result<(), Fault> {
            for document in yaml::parse(&text)? {
                let entry = read(&document, domain)?;
                if entries.iter().any(|other| other.name == entry.name) {
                    let message = format!("the name {} is another entry's already", entry.name);
                    return Err(document.fault(message).within("metadata.name"));
                }
                if entries.len() == MAX_ENTRIES {
                    return Err(document.fault(format!("{MAX_ENTRIES} entries are the most")));
                }
                entries.push(entry);
            }
            Ok(())
        };
        add().map_err(|fault| EntriesError::Manifest { path: path.clone(), fault })?;
    }
    entries.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(entries)
}

fn read(document: &Node, domain: &TrustDomain) -> Result<Entry, Fault> {
    let (mut name, mut spec) = (None, None);
    document.known_fields(&["apiVersion", "kind", "metadata", "spec"], |field, node| {
        match field {
            "apiVersion" if node.text()? != API_VERSION => {
                return Err(
                    node.fault(format!("{} is not served; write {API_VERSION}", node.describe()))
                );
            }
            "kind" if node.text()? != KIND => {
                return Err(
                    node.fault(format!("{} is not read here; write {KIND}", node.describe()))
                );
            }
            "metadata" => {
                let given = node.get("name").ok_or_else(|| node.fault("missing").within("name"))?;
                name = Some(read_name(given).map_err(|fault| fault.within("name"))?);
            }
            "spec" => spec = Some(read_spec(node, domain)?),
            _ => {}
        }
        Ok(())
    })?;
    for required in ["apiVersion", "kind"] {
        if document.get(required).is_none() {
            let wanted = if required == "kind" { KIND } else { API_VERSION };
            return Err(document.fault(format!("missing; write {wanted}")).within(required));
        }
    }
    let name = name.ok_or_else(|| document.fault("missing; give a name").within("metadata"))?;
    let (id, selector) =
        spec.ok_or_else(|| document.fault("missing; give spiffeId and selector").within("spec"))?;
    Ok(Entry { name, id, selector })
}

fn read_name(node: &Node) -> Result<Arc<str>, Fault> {
    let text = node.text()?;
    let fine = !text.is_empty()
        && text.len() <= 253
        && text.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b"-.".contains(&b));
    if !fine {
        return Err(node.fault(format!(
            "{} is not a name of at most 253 characters a-z, 0-9, - and .",
            node.describe()
        )));
    }
    Ok(text.into())
}

fn read_spec(spec: &Node, domain: &TrustDomain) -> Result<(SpiffeId, Selector), Fault> {
    let (mut id, mut selector) = (None, None);
    spec.known_fields(&["spiffeId", "selector"], |field, node| {
        if field == "spiffeId" {
            let given = SpiffeId::parse(node.text()?).map_err(|e| node.fault(e.to_string()))?;
            if given.trust_domain() != *domain || given.path().is_empty() {
                return Err(node.fault(format!(
                    "{given} is no workload's of this agent's trust domain; write spiffe://{domain}/…"
                )));
            }
            id = Some(given);
        } else {
            selector = Some(read_selector(node)?);
        }
        Ok(())
    })?;
    let id = id.ok_or_else(|| spec.fault("missing; write spiffe://…").within("spiffeId"))?;
    let selector = selector
        .ok_or_else(|| spec.fault("missing; say which processes are meant").within("selector"))?;
    Ok((id, selector))
}

fn read_selector(node: &Node) -> Result<Selector, Fault> {
    let mut selector = Selector::default();
    let absolute = |node: &Node| -> Result<PathBuf, Fault> {
        let text = node.text()?;
        let plain = text.split('/').skip(1).all(|part| !matches!(part, "" | "." | ".."));
        if !text.starts_with('/') || text == "/" || !plain {
            return Err(node.fault(format!(
                "{} is not an absolute path without . and .. (and not / itself)",
                node.describe()
            )));
        }
        Ok(text.into())
    };
    node.known_fields(&["systemdUnit", "cgroup", "uid", "executable"], |field, node| {
        match field {
            "systemdUnit" => {
                let unit = node.text()?;
                let fine = [".service", ".scope"].iter().any(|end| unit.ends_with(end))
                    && !unit.contains('/');
                if !fine {
                    return Err(node.fault(format!(
                        "{} is no unit that processes run in; write its whole name, as backup.service",
                        node.describe()
                    )));
                }
                selector.unit = Some(unit.to_owned());
            }
            "cgroup" => selector.cgroup = Some(absolute(node)?),
            "uid" => {
                let uid = node.number(0, u64::from(u32::MAX) - 1)?;
                selector.uid = u32::try_from(uid).ok();
            }
            _ => selector.executable = Some(absolute(node)?),
        }
        Ok(())
    })?;
    if selector.count() == 0 {
        return Err(node.fault("it is empty; give systemdUnit, cgroup, uid or executable"));
    }
    if selector.count() == 1 && selector.executable.is_some() {
        return Err(node.fault(
            "executable alone proves nothing: any user can run it with code of their own \
             (LD_PRELOAD, ptrace); add uid, systemdUnit or cgroup",
        ));
    }
    Ok(selector)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn domain() -> TrustDomain {
        TrustDomain::parse("td").unwrap()
    }

    fn entries(selector: &str) -> Result<Vec<Entry>, EntriesError> {
        let dir = tempfile::tempdir().unwrap();
        let text = format!(
            "apiVersion: signet.dev/v1alpha1\nkind: WorkloadEntry\nmetadata: {{name: backup}}\n\
             spec:\n  spiffeId: spiffe://td/vm/backup\n  selector: {selector}\n"
        );
        fs::write(dir.path().join("a.yaml"), text).unwrap();
        fs::write(dir.path().join("README"), "not read").unwrap();
        read_directory(dir.path(), &domain())
    }

    #[test]
    fn units_are_named_by_who_made_their_cgroup() {
        let unit = |path: &str| unit_of(Path::new(path)).map(str::to_owned);
        assert_eq!(unit("/system.slice/backup.service"), Some("backup.service".into()));
        assert_eq!(unit("/system.slice/a.slice/backup.service/x"), Some("backup.service".into()));
        assert_eq!(
            unit("/user.slice/user-1000.slice/user@1000.service/app.slice/backup.service"),
            Some("user@1000.service".into()),
            "a user's own manager names what is below as it likes"
        );
        assert_eq!(unit("/docker/system.slice/backup.service"), Some("docker".into()));
        assert_eq!(unit("/"), None);
    }

    #[test]
    fn what_is_read() {
        let all = "{systemdUnit: backup.service, cgroup: /system.slice, uid: 7, executable: /usr/bin/backup}";
        let read = entries(all).unwrap();
        assert_eq!((read.len(), read[0].id.as_str()), (1, "spiffe://td/vm/backup"));
        assert_eq!(read[0].selector.count(), 4);
        assert!(entries("{uid: 0}").is_ok() && entries("{cgroup: /a/b}").is_ok());
        for (selector, says) in [
            ("{}", "it is empty"),
            ("{executable: /usr/bin/backup}", "executable alone"),
            ("{uid: -1}", "-1"),
            ("{uid: root}", "root"),
            ("{systemdUnit: backup}", "backup.service"),
            ("{systemdUnit: a/b.service}", "a/b.service"),
            ("{cgroup: a}", "absolute"),
            ("{cgroup: /a/../b}", "absolute"),
            ("{cgroup: /}", "absolute"),
            ("{user: 7}", "unknown field"),
            ("[uid]", "mapping"),
        ] {
            let error = entries(selector).unwrap_err().to_string();
            assert!(error.contains(says), "{selector}: {error}");
            assert!(error.contains("a.yaml:6") && error.contains("spec.selector"), "{error}");
        }
    }

    #[test]
    fn names_are_their_own_and_identities_the_domains() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("a.yaml");
        let entry = |name: &str, id: &str| {
            format!(
                "apiVersion: signet.dev/v1alpha1\nkind: WorkloadEntry\nmetadata: {{name: {name}}}\n\
                 spec: {{spiffeId: \"{id}\", selector: {{uid: 1}}}}\n---\n"
            )
        };
        let good = entry("b", "spiffe://td/b") + &entry("a", "spiffe://td/a");
        fs::write(&file, &good).unwrap();
        let open = Entries::open(Some(dir.path()), &domain()).unwrap();
        assert_eq!(open.id_of("a").unwrap().as_str(), "spiffe://td/a");
        for (text, says) in [
            (good.clone() + &entry("a", "spiffe://td/c"), "another entry's"),
            (entry("A", "spiffe://td/a"), "not a name"),
            (entry("a", "spiffe://other/a"), "trust domain"),
            (entry("a", "spiffe://td"), "trust domain"),
            (entry("a", "td/a"), "spiffe://"),
            (good.replace("WorkloadEntry", "Pod"), "write WorkloadEntry"),
            (good.replace("v1alpha1", "v2"), "signet.dev/v1alpha1"),
            (good.replace("kind: WorkloadEntry\n", ""), "kind: missing"),
            (good.replace("selector", "selectors"), "did you mean"),
        ] {
            fs::write(&file, text).unwrap();
            let error = open.reload(Some(dir.path()), &domain()).unwrap_err().to_string();
            assert!(error.contains(says), "{says}: {error}");
        }
        assert!(open.id_of("b").is_some(), "those in force stay");
        let changes = open.subscribe();
        fs::write(&file, entry("c", "spiffe://td/c")).unwrap();
        open.reload(Some(dir.path()), &domain()).unwrap();
        assert!(changes.has_changed().unwrap());
        assert_eq!((open.id_of("a"), open.id_of("c").is_some()), (None, true));
        let none = Entries::open(None, &domain()).unwrap();
        assert!(none.id_of("a").is_none());
        assert!(Entries::open(Some(&dir.path().join("no")), &domain()).is_err());
    }
}
