//! Loading, attaching, pinning and replacing the programs.

mod follow;
mod raw_guard;

pub(super) use raw_guard::detach_all_filters;

use std::{
    collections::{BTreeMap, BTreeSet},
    fs::File,
    io,
    os::fd::{AsFd, BorrowedFd},
    path::{Path, PathBuf},
};

use aya::{Ebpf, EbpfLoader, programs::Program};

use super::{
    KernelError,
    bpf::{self, LinkTarget, attach},
    cgroup::{Cgroup, Hierarchy},
    features::Features,
    maps::{Maps, PINNED},
    pins::{self, Layout, Pins},
};
use crate::netns::NetnsFd;

/// Name of the object with the cgroup programs, for errors.
pub(super) const MAIN_OBJECT: &str = "signet-programs";
/// Name of the object with the sk_lookup program, for errors.
const LOOKUP_OBJECT: &str = "signet-lookup";
/// Name of the object with the raw guard's programs, for errors.
const GUARD_OBJECT: &str = "signet-guard";

static MAIN: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/programs.o"));
static LOOKUP: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/lookup.o"));
static GUARD: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/guard.o"));

/// Prefix of the pins of sk_lookup links; the namespace's cookie follows.
const LOOKUP_PREFIX: &str = "lookup-";

/// Where a program is attached.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Root {
    /// The pods' root: deciding hooks.
    Workloads,
    /// The node's root: recording only.
    Node,
    /// The agent's own cgroup: recording only.
    Agent,
}

/// (program, hook, where), in the order of a first attach: what records and answers comes
/// before what redirects.
pub(super) const HOOKS: [(&str, u32, Root); 13] = [
    ("ops_agent", attach::CGROUP_SOCK_OPS, Root::Agent),
    ("ops_node", attach::CGROUP_SOCK_OPS, Root::Node),
    ("ops_workloads", attach::CGROUP_SOCK_OPS, Root::Workloads),
    ("peername4", attach::CGROUP_INET4_GETPEERNAME, Root::Workloads),
    ("peername6", attach::CGROUP_INET6_GETPEERNAME, Root::Workloads),
    ("sockname4", attach::CGROUP_INET4_GETSOCKNAME, Root::Workloads),
    ("sockname6", attach::CGROUP_INET6_GETSOCKNAME, Root::Workloads),
    ("skb_ingress", attach::CGROUP_INET_INGRESS, Root::Workloads),
    ("skb_egress", attach::CGROUP_INET_EGRESS, Root::Workloads),
    ("sendmsg4", attach::CGROUP_UDP4_SENDMSG, Root::Workloads),
    ("sendmsg6", attach::CGROUP_UDP6_SENDMSG, Root::Workloads),
    ("connect4", attach::CGROUP_INET4_CONNECT, Root::Workloads),
    ("connect6", attach::CGROUP_INET6_CONNECT, Root::Workloads),
];

/// So many of [`HOOKS`], the first ones, only record and answer: two versions of them may be
/// attached at a time, each over its own maps.
const RECORDING: usize = 7;

/// What the loader must know.
#[derive(Clone, Debug)]
pub struct KernelConfig {
    /// Directory of the pins; a bpffs is mounted there if need be.
    pub bpffs: PathBuf,
    /// Name of this agent among several on one host.
    pub instance: String,
    /// The workloads root, a path below the cgroup2 mount.
    pub workloads: PathBuf,
    /// The node's root, a path below the cgroup2 mount.
    pub node: PathBuf,
    /// Value of [`super::features::MASK_VARIABLE`].
    pub mask_features: Option<String>,
    /// Another agent serves the node: its programs go on deciding, and nothing that it has
    /// pinned is touched, until [`Programs::activate`].
    pub succeeds: bool,
}

/// The loaded and attached programs.
#[derive(Debug)]
pub struct Programs {
    hierarchy: Hierarchy,
    workloads: Cgroup,
    node: Cgroup,
    agent: Cgroup,
    features: Features,
    host_netns: u64,
    pins: Pins,
    /// The object whose programs wait to be swapped in; `None` once they are attached.
    waiting: Option<Ebpf>,
    lookup_loader: ObjectLoader,
    lookups: BTreeSet<u64>,
    /// The raw guard's programs, attached to each device on its own.
    guard: Ebpf,
    guarded: BTreeSet<u32>,
    /// An agent of another version still has flows: what it records stays attached.
    predecessor: bool,
    warnings: Vec<String>,
}

impl Programs {
    /// Loads everything, and attaches it unless another version's or another agent's programs
    /// are attached: those go on deciding until [`Programs::activate`].
    ///
    /// Call it before the process makes any socket: it may move the agent to a cgroup of
    /// its own ([`Hierarchy::settle_agent`]).
    ///
    /// # Errors
    /// Whatever the host lacks, each with its remedy.
    pub fn load(config: &KernelConfig) -> Result<(Self, Maps), KernelError> {
        check_permitted()?;
        let hierarchy = Hierarchy::find()?;
        let workloads = open_workloads(&hierarchy, &config.workloads)?;
        let node = open_root(&hierarchy, &config.node, "--node-cgroup")?;
        if workloads.path == hierarchy.mount() {
            return Err(KernelError::WorkloadsIsRoot { root: workloads.path });
        }
        let agent = hierarchy.settle_agent(&workloads)?;
        let features = Features::probe(config.mask_features.as_deref())?;
        for missing in features.missing() {
            tracing::info!(feature = %missing, "kernel feature not used");
        }
        let host_netns = NetnsFd::of_this_process()
            .map_err(|source| KernelError::Io {
                what: "the cookie of the node's network namespace (SO_NETNS_COOKIE, Linux 5.14)"
                    .into(),
                source,
            })?
            .cookie;

        let layouts = layouts(MAIN, MAIN_OBJECT)?;
        let pins = Pins::open(&config.bpffs, &config.instance, &layouts, config.succeeds)?;
        let bits = features.bits();
        let mut ebpf = ObjectLoader::new(MAIN, MAIN_OBJECT, pins.maps(), bits).load()?;
        let lookup_loader = ObjectLoader::new(LOOKUP, LOOKUP_OBJECT, pins.maps(), bits);
        let maps = Maps::take(&mut ebpf, pins.maps())?;
        for (program, ..) in HOOKS {
            load_program(&mut ebpf, MAIN_OBJECT, program)?;
        }
        let mut guard = ObjectLoader::new(GUARD, GUARD_OBJECT, pins.maps(), bits).load()?;
        for program in ["guard_in", "guard_out"] {
            load_program(&mut guard, GUARD_OBJECT, program)?;
        }
        let mut programs = Self {
            hierarchy,
            workloads,
            node,
            agent,
            features,
            host_netns,
            pins,
            waiting: Some(ebpf),
            lookup_loader,
            lookups: BTreeSet::new(),
            guard,
            guarded: BTreeSet::new(),
            predecessor: config.succeeds,
            warnings: Vec::new(),
        };
        if !programs.pins.has_others() && !config.succeeds {
            programs.activate()?;
        }
        Ok((programs, maps))
    }

    /// Loads the programs anew, to take the place of whatever is attached by now: a successor
    /// has replaced some of them and is gone. They wait for [`Programs::activate`].
    ///
    /// # Errors
    /// As [`Programs::load`].
    pub fn reload(&mut self) -> Result<(), KernelError> {
        let mut ebpf =
            ObjectLoader::new(MAIN, MAIN_OBJECT, self.pins.maps(), self.features.bits()).load()?;
        for (program, ..) in HOOKS {
            load_program(&mut ebpf, MAIN_OBJECT, program)?;
        }
        self.pins.look_again();
        self.waiting = Some(ebpf);
        self.lookups.clear();
        self.guarded.clear();
        Ok(())
    }

    /// Attaches the programs in place of what is there. This version's are replaced hook by hook,
    /// each at once. Another version's have maps of their own, so a connection must meet one
    /// version alone on all of its hooks: this version's are attached beside them, first what
    /// records, last what redirects; then the other's go, first what redirects. What only records
    /// stays for as long as a predecessor has flows ([`Programs::predecessor_is_gone`]).
    ///
    /// The new maps must be filled before. Does nothing when the programs are attached already.
    ///
    /// # Errors
    /// Names the hook. What was replaced so far stays replaced.
    pub fn activate(&mut self) -> Result<(), KernelError> {
        let Some(mut ebpf) = self.waiting.take() else { return Ok(()) };
        for (program, hook, root) in HOOKS {
            let attached = program_fd(&mut ebpf, MAIN_OBJECT, program)
                .and_then(|fd| self.attach_hook(program, hook, root, fd));
            if let Err(error) = attached {
                self.waiting = Some(ebpf);
                return Err(error);
            }
        }
        for (program, ..) in HOOKS[RECORDING..].iter().rev() {
            for link in self.pins.other_links(program) {
                pins::detach(&link)?;
            }
        }
        if self.predecessor { Ok(()) } else { self.pins.remove_others() }
    }

    /// No other process has flows: what other versions have left goes.
    ///
    /// # Errors
    /// Where a pin cannot be removed.
    pub fn predecessor_is_gone(&mut self) -> Result<(), KernelError> {
        self.predecessor = false;
        if self.is_waiting() { Ok(()) } else { self.pins.remove_others() }
    }

    /// The directories of other versions' maps.
    pub fn other_pins(&self) -> &[PathBuf] {
        self.pins.others()
    }

    /// True while another version's programs decide ([`Programs::activate`]).
    pub fn is_waiting(&self) -> bool {
        self.waiting.is_some()
    }

    /// Attaches this version's sk_lookup program to a pod's network namespace, in place of
    /// whatever instance of ours is there.
    ///
    /// # Errors
    /// Names the namespace.
    pub fn attach_lookup(&mut self, netns: &NetnsFd) -> Result<(), KernelError> {
        if self.lookups.contains(&netns.cookie) {
            return Ok(());
        }
        let mut ebpf = self.lookup_loader.load_for(netns.cookie)?;
        load_program(&mut ebpf, LOOKUP_OBJECT, "lookup")?;
        let program = program_fd(&mut ebpf, LOOKUP_OBJECT, "lookup")?;
        let name = format!("{LOOKUP_PREFIX}{}", netns.cookie);
        let target = || format!("the network namespace {}", netns.cookie);
        // The kernel tells a namespace's inode in 32 bits.
        let inode = netns.inode().map(|(_, inode)| inode as u32).unwrap_or(0);
        let wanted = |found| found == LinkTarget::Netns(inode);
        if !self.replace(&name, wanted, program)? {
            let link = bpf::link_create(program, netns.fd.as_fd(), attach::SK_LOOKUP).map_err(
                |source| KernelError::Attach { program: "lookup", target: target(), source },
            )?;
            self.pin_link(link.as_fd(), &name)?;
        }
        self.lookups.insert(netns.cookie);
        Ok(())
    }

    /// Detaches the sk_lookup program of a pod that is gone or left alone.
    ///
    /// # Errors
    /// Where the pin cannot be removed.
    pub fn detach_lookup(&mut self, cookie: u64) -> Result<(), KernelError> {
        self.lookups.remove(&cookie);
        pins::unpin(&self.pins.link(&format!("{LOOKUP_PREFIX}{cookie}")))
    }

    /// Cookies of the network namespaces whose sk_lookup links are pinned, also of dead ones.
    pub fn pinned_lookups(&self) -> Vec<u64> {
        self.pins.links_with(LOOKUP_PREFIX).iter().filter_map(|c| c.parse().ok()).collect()
    }

    /// The directory of the pinned maps.
    pub fn pins(&self) -> &Path {
        self.pins.maps()
    }

    /// The cgroup hierarchy.
    pub fn hierarchy(&self) -> &Hierarchy {
        &self.hierarchy
    }

    /// The workloads root.
    pub fn workloads(&self) -> &Cgroup {
        &self.workloads
    }

    /// The agent's own cgroup.
    pub fn agent(&self) -> &Cgroup {
        &self.agent
    }

    /// Ancestor level of the workloads root, as the programs count.
    pub fn workloads_level(&self) -> u32 {
        self.hierarchy.level(&self.workloads)
    }

    /// What the kernel offers.
    pub fn features(&self) -> &Features {
        &self.features
    }

    /// Cookie of the node's own network namespace.
    pub fn host_netns(&self) -> u64 {
        self.host_netns
    }

    /// Every program, and whether its pinned link is on the cgroup that is meant.
    pub fn attached(&self) -> Vec<(&'static str, bool)> {
        HOOKS
            .iter()
            .map(|(program, _, root)| {
                let attached = bpf::object_get(&self.pins.link(program))
                    .and_then(|link| bpf::link_target(link.as_fd()))
                    .is_ok_and(|found| found == LinkTarget::Cgroup(self.root(*root).id));
                (*program, attached)
            })
            .collect()
    }

    /// Conflicts that were found and lived with, one sentence each.
    pub fn warnings(&self) -> &[String] {
        &self.warnings
    }

    fn root(&self, root: Root) -> &Cgroup {
        match root {
            Root::Workloads => &self.workloads,
            Root::Node => &self.node,
            Root::Agent => &self.agent,
        }
    }

    fn attach_hook(
        &mut self,
        name: &'static str,
        hook: u32,
        root: Root,
        program: BorrowedFd<'_>,
    ) -> Result<(), KernelError> {
        let cgroup = self.root(root).clone();
        let wanted = |found| found == LinkTarget::Cgroup(cgroup.id);
        if self.replace_at(vec![self.pins.link(name)], name, wanted, program)? {
            return Ok(());
        }
        if let Some(shadowed) = self.overridable(hook, &cgroup) {
            self.warnings.push(format!(
                "{name} on {} takes the place of {} for the pods: have its owner attach it by a \
                 link, or with BPF_F_ALLOW_MULTI",
                cgroup.path.display(),
                shadowed
            ));
        }
        let directory = cgroup.descriptor()?;
        let link = bpf::link_create(program, directory.as_fd(), hook)
            .map_err(|source| self.explain(name, hook, &cgroup, source))?;
        self.pin_link(link.as_fd(), name)
    }

    /// Replaces the program of the pinned link `name`, of this version's directory or of
    /// another's; false where there is none that is still attached to what is wanted.
    fn replace(
        &self,
        name: &str,
        wanted: impl Fn(LinkTarget) -> bool,
        program: BorrowedFd<'_>,
    ) -> Result<bool, KernelError> {
        let mut candidates = vec![self.pins.link(name)];
        candidates.extend(self.pins.other_links(name));
        self.replace_at(candidates, name, wanted, program)
    }

    /// The same for these pins alone.
    fn replace_at(
        &self,
        candidates: Vec<PathBuf>,
        name: &str,
        wanted: impl Fn(LinkTarget) -> bool,
        program: BorrowedFd<'_>,
    ) -> Result<bool, KernelError> {
        let path = self.pins.link(name);
        let mut replaced = false;
        for candidate in candidates.iter().filter(|path| path.exists()) {
            let failed = |source| KernelError::Replace { path: candidate.clone(), source };
            let link = bpf::object_get(candidate).map_err(failed)?;
            let usable = !replaced && bpf::link_target(link.as_fd()).is_ok_and(&wanted);
            if !usable {
                // Of a cgroup or namespace that is gone, or was re-made.
                pins::unpin(candidate)?;
                continue;
            }
            match bpf::link_update(link.as_fd(), program) {
                Ok(()) => {}
                Err(error) if error.raw_os_error() == Some(libc::ENOLINK) => {
                    pins::unpin(candidate)?;
                    continue;
                }
                Err(error) => return Err(failed(error)),
            }
            if *candidate != path {
                self.pin_link(link.as_fd(), name)?;
                pins::unpin(candidate)?;
            }
            replaced = true;
        }
        Ok(replaced)
    }

    fn pin_link(&self, link: BorrowedFd<'_>, name: &str) -> Result<(), KernelError> {
        let path = self.pins.link(name);
        bpf::object_pin(link, &path).map_err(|source| KernelError::Pin {
            action: "make",
            path,
            source,
        })
    }

    /// The owner of a program above `cgroup` that ours would silently replace.
    fn overridable(&self, hook: u32, cgroup: &Cgroup) -> Option<String> {
        self.holders(hook, cgroup)
            .skip(1)
            .find(|(_, found)| found.flags & bpf::attach_flags::ALLOW_OVERRIDE != 0)
            .map(|(holder, found)| {
                format!("{} on {}", describe(&found.programs), holder.path.display())
            })
    }

    /// Why an attach failed: EPERM is another tool's exclusive program more often than a
    /// lack of rights.
    fn explain(
        &self,
        program: &'static str,
        hook: u32,
        cgroup: &Cgroup,
        source: io::Error,
    ) -> KernelError {
        let target = cgroup.path.display().to_string();
        if source.raw_os_error() == Some(libc::EPERM) {
            let exclusive = self
                .holders(hook, cgroup)
                .find(|(_, found)| found.flags & bpf::attach_flags::ALLOW_MULTI == 0);
            if let Some((holder, found)) = exclusive {
                return KernelError::Conflict {
                    program,
                    target,
                    owner: describe(&found.programs),
                    holder: holder.path.display().to_string(),
                };
            }
        }
        KernelError::Attach { program, target, source }
    }

    /// `cgroup` and its ancestors that have programs at the hook, from below.
    fn holders(&self, hook: u32, cgroup: &Cgroup) -> impl Iterator<Item = (Cgroup, bpf::Attached)> {
        let ancestors: Vec<PathBuf> = cgroup.name.ancestors().map(Path::to_owned).collect();
        let hierarchy = self.hierarchy.clone();
        ancestors.into_iter().filter_map(move |name| {
            let cgroup = hierarchy.open(&name).ok()?;
            let directory = File::open(&cgroup.path).ok()?;
            let found = bpf::query(directory.as_fd(), hook).ok()?;
            (!found.programs.is_empty()).then_some((cgroup, found))
        })
    }
}

/// Names programs by id for people: `program 12 (cil_sock4_connect)`.
pub(super) fn describe(ids: &[u32]) -> String {
    let names: Vec<String> = ids
        .iter()
        .map(|id| {
            let info = aya::programs::loaded_programs().flatten().find(|info| info.id() == *id);
            match info.as_ref().and_then(|info| info.name_as_str()) {
                Some(name) => format!("program {id} ({name})"),
                None => format!("program {id}"),
            }
        })
        .collect();
    names.join(", ")
}

/// Tells "no BPF" and "no rights" apart before anything else fails less clearly.
/// Whether this process may use bpf(2) here at all.
///
/// # Errors
/// The kernel has none, or the process is not permitted to use it.
pub fn check_permitted() -> Result<(), KernelError> {
    match bpf::own_ancestor_cgroup(0) {
        Err(error) if error.raw_os_error() == Some(libc::ENOSYS) => Err(KernelError::NoBpf),
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
            Err(KernelError::NotPermitted)
        }
        _ => Ok(()),
    }
}

/// The workloads root; `kubepods` also where the systemd driver calls it `kubepods.slice`.
pub(super) fn open_workloads(hierarchy: &Hierarchy, name: &Path) -> Result<Cgroup, KernelError> {
    let given = open_root(hierarchy, name, "--cgroup-root");
    if let Err(KernelError::NoCgroup { .. }) = given {
        let mut slice = name.as_os_str().to_owned();
        slice.push(".slice");
        if let Ok(cgroup) = hierarchy.open(Path::new(&slice)) {
            tracing::info!(root = %cgroup.name.display(), "the pods' root is systemd's");
            return Ok(cgroup);
        }
    }
    given
}

pub(super) fn open_root(
    hierarchy: &Hierarchy,
    name: &Path,
    option: &'static str,
) -> Result<Cgroup, KernelError> {
    hierarchy.open(name).map_err(|error| match error.kind() {
        io::ErrorKind::NotFound | io::ErrorKind::NotADirectory => KernelError::NoCgroup {
            path: hierarchy.mount().join(name.strip_prefix("/").unwrap_or(name)),
            option,
            mount: hierarchy.mount().to_owned(),
        },
        _ => KernelError::Io { what: format!("the cgroup {}", name.display()), source: error },
    })
}

/// The layouts of the maps that an object declares, less its own data sections.
fn layouts(bytes: &[u8], object: &'static str) -> Result<BTreeMap<String, Layout>, KernelError> {
    let parsed = aya_obj::Object::parse(bytes).map_err(|error| KernelError::Load {
        object,
        source: Box::new(aya::EbpfError::ParseError(error)),
    })?;
    Ok(parsed
        .maps
        .iter()
        .filter(|(name, _)| PINNED.contains(&name.as_str()))
        .map(|(name, map)| {
            let layout = Layout {
                kind: map.map_type(),
                key_size: map.key_size(),
                value_size: map.value_size(),
                max_entries: map.max_entries(),
            };
            (name.clone(), layout)
        })
        .collect())
}

/// Loads one object any number of times. It is kept, because making a loader parses the
/// whole kernel's BTF: some tens of milliseconds, for nothing that these programs need.
#[derive(Debug)]
struct ObjectLoader {
    loader: EbpfLoader<'static>,
    bytes: &'static [u8],
    object: &'static str,
}

impl ObjectLoader {
    /// `features` goes into the programs' read-only data, where the object reads any.
    fn new(bytes: &'static [u8], object: &'static str, pins: &Path, features: u32) -> Self {
        let mut loader = EbpfLoader::new();
        loader.btf(None).default_map_pin_directory(pins);
        for name in PINNED {
            loader.map_pin_path(name, pins.join(name));
        }
        loader.override_global("FEATURES", forever(features), object == MAIN_OBJECT);
        Self { loader, bytes, object }
    }

    fn load(&mut self) -> Result<Ebpf, KernelError> {
        self.loader
            .load(self.bytes)
            .map_err(|source| KernelError::Load { object: self.object, source: Box::new(source) })
    }

    /// Loads an instance for the network namespace `cookie`.
    fn load_for(&mut self, cookie: u64) -> Result<Ebpf, KernelError> {
        self.loader.override_global("NETNS", forever(cookie), true);
        self.load()
    }
}

/// A value that is never freed: the loader borrows its globals for as long as it lives. One
/// word a pod.
fn forever<T>(value: T) -> &'static T {
    Box::leak(Box::new(value))
}

fn load_program(
    ebpf: &mut Ebpf,
    object: &'static str,
    name: &'static str,
) -> Result<(), KernelError> {
    let program = ebpf.program_mut(name).ok_or(KernelError::Missing { object, name })?;
    let loaded = match program {
        Program::CgroupSockAddr(p) => p.load(),
        Program::CgroupSkb(p) => p.load(),
        Program::SockOps(p) => p.load(),
        Program::SkLookup(p) => p.load(),
        Program::SchedClassifier(p) => p.load(),
        _ => return Err(KernelError::Missing { object, name }),
    };
    loaded.map_err(|source| KernelError::Program { program: name, source: Box::new(source) })
}

fn program_fd<'a>(
    ebpf: &'a mut Ebpf,
    object: &'static str,
    name: &'static str,
) -> Result<BorrowedFd<'a>, KernelError> {
    let program = ebpf.program(name).ok_or(KernelError::Missing { object, name })?;
    let fd = program
        .fd()
        .map_err(|source| KernelError::Program { program: name, source: Box::new(source) })?;
    Ok(fd.as_fd())
}

#[cfg(test)]
mod tests {
    use super::super::test_host::Host;
    use super::*;
    use signet_ebpf::abi::{Config, PodEntry, PolicyKey, PolicyValue};
    use std::fs;

    /// One test, because moving the process between cgroups is the whole process's affair.
    #[test]
    fn loads_attaches_restarts_and_swaps() {
        let Some(host) = Host::new("load") else { return };
        let config = host.config();

        // A first start.
        let (mut programs, mut maps) = Programs::load(&config).unwrap();
        assert!(!programs.is_waiting());
        assert_eq!(count(&programs), 13);
        assert!(programs.agent().name.ends_with("signet-agent"), "{:?}", programs.agent());
        assert!(!programs.workloads().contains(&programs.agent().name));
        maps.set_config(Config { revision: 7, ..Config::default() }).unwrap();
        maps.pods.set(42, PodEntry { identity: 300, ..PodEntry::default() }).unwrap();
        let rule = (96, PolicyKey::default(), PolicyValue { number: 1, ..PolicyValue::default() });
        maps.set_policy(42, &[rule]).unwrap();
        maps.set_policy(42, &[]).unwrap();
        assert_eq!(maps.policies().unwrap(), [42]);
        let netns = NetnsFd::of_this_process().unwrap();
        programs.attach_lookup(&netns).unwrap();
        assert_eq!(programs.pinned_lookups(), [netns.cookie]);
        drop((programs, maps));

        // A restart: the same maps, the links' programs replaced.
        let (mut programs, mut maps) = Programs::load(&config).unwrap();
        assert_eq!(count(&programs), 13);
        assert_eq!(maps.config().unwrap().revision, 7);
        assert_eq!(maps.pods.rows().unwrap().len(), 1);
        programs.attach_lookup(&netns).unwrap();
        maps.pods.remove(&42).unwrap();
        maps.pods.remove(&42).expect("removing twice is fine");
        maps.remove_policy(42).unwrap();
        maps.remove_policy(42).expect("removing twice is fine");
        drop((programs, maps));

        // Another version's pins: its programs go on until the new ones are activated.
        let base = config.bpffs.join("default");
        fs::rename(base.join("v1"), base.join("v0")).unwrap();
        let (mut programs, maps) = Programs::load(&config).unwrap();
        assert!(programs.is_waiting());
        assert_eq!(count(&programs), 0);
        assert_eq!(maps.config().unwrap().revision, 0, "maps of another version are not read");
        programs.activate().unwrap();
        assert_eq!(count(&programs), 13);
        assert!(!base.join("v0").exists());
        programs.detach_lookup(netns.cookie).unwrap();
        assert_eq!(programs.pinned_lookups(), [0u64; 0]);
        drop((programs, maps));

        // A map of another layout in our own directory is set aside, not used.
        fs::remove_file(base.join("v1/PROBES")).unwrap();
        aya::maps::HashMap::<_, u32, u32>::create(8, 0)
            .unwrap()
            .pin(base.join("v1/PROBES"))
            .unwrap();
        let (mut programs, mut maps) = Programs::load(&config).unwrap();
        assert!(programs.is_waiting());
        maps.probes.set(1, 1).expect("the new map has the right layout");
        programs.activate().unwrap();
        assert_eq!(count(&programs), 13);
        drop((programs, maps));

        // The workloads root is made anew, as a kubelet or systemd may: nothing is on it until
        // it is followed.
        let (mut programs, _maps) = Programs::load(&config).unwrap();
        assert!(!programs.follow_workloads().unwrap());
        let root = host.cgroup.join("kubepods");
        fs::remove_dir(&root).unwrap();
        assert!(!programs.follow_workloads().unwrap(), "one that is gone is waited for");
        fs::create_dir(&root).unwrap();
        let anew = programs.hierarchy().open(&host.name.join("kubepods")).unwrap();
        assert_ne!(anew.id, programs.workloads().id);
        assert!(programs.follow_workloads().unwrap());
        assert_eq!(programs.workloads(), &anew);
        assert_eq!(count(&programs), 13);
        assert!(!programs.follow_workloads().unwrap());
        drop((programs, _maps));

        // What is wrong is named with the option to change.
        let mut missing = config.clone();
        missing.workloads = host.name.join("nowhere");
        let error = Programs::load(&missing).map(drop).unwrap_err().to_string();
        assert!(error.contains("nowhere") && error.contains("--cgroup-root"), "{error}");

        // The systemd driver's name of the same directory is found.
        fs::create_dir(host.cgroup.join("pods.slice")).unwrap();
        let hierarchy = Hierarchy::find().unwrap();
        let found = open_workloads(&hierarchy, &host.name.join("pods")).unwrap();
        assert!(found.name.ends_with("pods.slice"));
        fs::remove_dir(host.cgroup.join("pods.slice")).unwrap();

        // Another tool's exclusive program on the parent is named.
        let workloads = host.cgroup.join("kubepods");
        fs::remove_file(base.join("v1/links/connect4")).unwrap();
        let mut foreign = foreign_object();
        let program = program_fd(&mut foreign, MAIN_OBJECT, "connect4").unwrap();
        let parent = File::open(&host.cgroup).unwrap();
        let exclusively =
            |on| bpf::attach_exclusively(program, parent.as_fd(), attach::CGROUP_INET4_CONNECT, on);
        exclusively(true).unwrap();
        let error = Programs::load(&config).map(drop).unwrap_err();
        assert!(matches!(error, KernelError::Conflict { .. }), "{error}");
        assert!(error.to_string().contains("connect4"), "{error}");
        exclusively(false).unwrap();
        let (programs, _) = Programs::load(&config).expect("it is gone: the control");
        assert_eq!(count(&programs), 13);
        assert!(hierarchy.open(&host.name).is_ok() && workloads.exists());
    }

    fn count(programs: &Programs) -> usize {
        programs.attached().iter().filter(|(_, attached)| *attached).count()
    }

    /// An object whose programs are nobody's: loaded over maps of a bpffs of its own.
    fn foreign_object() -> Ebpf {
        let pins = tempfile::tempdir().unwrap();
        super::super::bpffs::ensure(pins.path()).unwrap();
        let mut ebpf = ObjectLoader::new(MAIN, MAIN_OBJECT, pins.path(), 0).load().unwrap();
        load_program(&mut ebpf, MAIN_OBJECT, "connect4").unwrap();
        rustix::mount::unmount(pins.path(), rustix::mount::UnmountFlags::DETACH).unwrap();
        ebpf
    }
}
