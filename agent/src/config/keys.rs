//! The table of configuration keys.

use std::{fmt::Display, net::SocketAddr, path::PathBuf, str::FromStr, time::Duration};

use rustls::pki_types::ServerName;

use super::{
    AgentConfig,
    values::{
        AccessLog, Authority, Builtin, DefaultAction, Enforcement, LogFormat, OtherProtocols,
        Resolver, TunnelWire, UnknownPods, WhenAgentDead, parse_range,
    },
    yaml::shorten,
};

/// When a changed value takes effect.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Apply {
    /// At once.
    Live,
    /// When the agent starts again.
    Restart,
}

/// A configuration key.
#[derive(Debug)]
pub struct Key {
    /// Name in the file; a dot leads into a section.
    pub name: &'static str,
    /// When a change takes effect.
    pub apply: Apply,
    /// True for a list: in the file a YAML list, elsewhere comma-separated.
    pub list: bool,
    /// What its values look like, for `--help` and the reference page.
    pub form: &'static str,
    /// What it means.
    pub doc: &'static str,
    /// Sets it from text; the error is value and remedy.
    pub(super) set: fn(&mut AgentConfig, &[String]) -> Result<(), String>,
    /// Its present value as text that parses again; empty when it is unset.
    pub(super) get: fn(&AgentConfig) -> Vec<String>,
}

impl Key {
    /// The key of this name.
    pub fn by_name(name: &str) -> Option<&'static Self> {
        KEYS.iter().find(|key| key.name == name)
    }

    /// Its environment variable.
    pub fn env(&self) -> String {
        format!("SIGNET_{}", self.split('_').to_uppercase())
    }

    /// Its flag, without the dashes.
    pub fn flag(&self) -> String {
        self.split('-')
    }

    /// The key in the file's top level: the name, or its section.
    pub(super) fn section(&self) -> &'static str {
        self.name.split('.').next().unwrap_or(self.name)
    }

    /// Its default as [`Self::show`] writes it.
    pub fn default_text(&self) -> String {
        self.show(&AgentConfig::default())
    }

    /// Its value in a configuration, as YAML.
    pub fn show(&self, config: &AgentConfig) -> String {
        let values = (self.get)(config);
        if self.list {
            let quoted: Vec<String> = values.iter().map(|v| quote(v)).collect();
            return format!("[{}]", quoted.join(", "));
        }
        match values.first() {
            Some(value) => quote(value),
            None => "null".into(),
        }
    }

    /// `limits.openFlows` → `limits-open-flows`.
    fn split(&self, by: char) -> String {
        let mut out = String::new();
        for c in self.name.chars() {
            match c {
                '.' => out.push(by),
                c if c.is_ascii_uppercase() => {
                    out.push(by);
                    out.push(c.to_ascii_lowercase());
                }
                c => out.push(c),
            }
        }
        out
    }
}

/// Plain where YAML reads the same text back, else quoted.
pub(super) fn quote(value: &str) -> String {
    let plain = !value.is_empty()
        && value.chars().all(|c| c.is_ascii_alphanumeric() || "/._-".contains(c))
        && !value.starts_with('-')
        && !["null", "true", "false"].contains(&value.to_ascii_lowercase().as_str());
    if plain { value.to_owned() } else { format!("{value:?}") }
}

type Set = Result<(), String>;

pub(super) fn one(values: &[String]) -> Result<&str, String> {
    match values {
        [value] if !value.is_empty() => Ok(value),
        [] | [_] => Err("nothing where a value is wanted".into()),
        _ => Err("several values where one is wanted".into()),
    }
}

pub(super) fn path(values: &[String]) -> Result<PathBuf, String> {
    let value = one(values)?;
    if !value.starts_with('/') {
        return Err(format!("{:?} is not an absolute path", shorten(value)));
    }
    Ok(value.into())
}

/// A path below the cgroup2 mount.
fn cgroup(value: &str) -> Result<String, String> {
    if !value.starts_with('/') || value.split('/').any(|part| part == "..") {
        return Err(format!(
            "{:?} is not a path below the cgroup2 mount; it begins with / and has no ..",
            shorten(value)
        ));
    }
    Ok(if value == "/" { value.into() } else { value.trim_end_matches('/').into() })
}

/// A name that becomes a directory's.
pub(super) fn label(value: &str, most: usize) -> Result<String, String> {
    let fine = value.len() <= most
        && value.starts_with(|c: char| c.is_ascii_lowercase() || c.is_ascii_digit())
        && value
            .bytes()
            .all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || b"-.".contains(&c));
    if !fine {
        return Err(format!(
            "{:?} is not a name of at most {most} characters a-z, 0-9, - and .",
            shorten(value)
        ));
    }
    Ok(value.into())
}

pub(super) fn trust_domain(value: &str) -> Result<String, String> {
    let fine = (1..=255).contains(&value.len())
        && value.bytes().all(|c| {
            c.is_ascii_lowercase() || c.is_ascii_digit() || matches!(c, b'.' | b'-' | b'_')
        });
    if !fine {
        return Err(format!(
            "{:?} is not a trust domain: 1 to 255 characters a-z, 0-9, ., - and _, without \
             spiffe://",
            shorten(value)
        ));
    }
    Ok(value.into())
}

pub(super) fn duration(values: &[String], least: u64, most: u64) -> Result<Duration, String> {
    let value = one(values)?;
    let wrong = || {
        format!(
            "{:?} is not a duration from {} to {}; write it like 90s, 10m or 1h",
            shorten(value),
            show_duration(Duration::from_secs(least)),
            show_duration(Duration::from_secs(most)),
        )
    };
    let parsed: jiff::SignedDuration = value.parse().map_err(|_| wrong())?;
    let duration = Duration::try_from(parsed).map_err(|_| wrong())?;
    if !(Duration::from_secs(least)..=Duration::from_secs(most)).contains(&duration) {
        return Err(wrong());
    }
    Ok(duration)
}

pub(super) fn show_duration(duration: Duration) -> String {
    let secs = duration.as_secs();
    let nanos = duration.subsec_nanos();
    match (secs, nanos) {
        (s, 0) if s % 3600 == 0 && s > 0 => format!("{}h", s / 3600),
        (s, 0) if s % 60 == 0 && s > 0 => format!("{}m", s / 60),
        (s, 0) => format!("{s}s"),
        (s, n) => format!("{s}s{n}ns"),
    }
}

pub(super) fn number<T>(values: &[String], least: T, most: T) -> Result<T, String>
where
    T: FromStr + PartialOrd + Display + Copy,
{
    let value = one(values)?;
    value
        .parse()
        .ok()
        .filter(|n| (least..=most).contains(n))
        .ok_or_else(|| format!("{:?} is not a whole number from {least} to {most}", shorten(value)))
}

pub(super) fn each<T>(
    values: &[String],
    read: impl Fn(&str) -> Result<T, String>,
) -> Result<Vec<T>, String> {
    values.iter().map(|value| read(value)).collect()
}

/// An address to listen on, or `off`.
pub(super) fn listener(value: &str) -> Result<Option<SocketAddr>, String> {
    if value == "off" {
        return Ok(None);
    }
    value.parse().map(Some).map_err(|_| {
        format!(
            "{:?} is not an address with a port; write it like 127.0.0.1:15020 or [::]:15020, or off",
            shorten(value)
        )
    })
}

/// The same, on this machine only.
fn loopback(value: &str) -> Result<Option<SocketAddr>, String> {
    match listener(value)? {
        Some(address) if !address.ip().is_loopback() => Err(format!(
            "{address} is not a loopback address; write it like 127.0.0.1:4255, or off"
        )),
        listener => Ok(listener),
    }
}

/// Roughly: whether the ID is valid, the agent says when it starts.
fn spiffe_id(value: &str) -> Result<String, String> {
    let rest = value.strip_prefix("spiffe://").filter(|rest| rest.contains('/'));
    if rest.is_none() || value.len() > 2048 || !value.bytes().all(|c| c.is_ascii_graphic()) {
        return Err(format!(
            "{:?} is not a SPIFFE ID; write it like \
             spiffe://cluster.local/ns/kube-system/sa/hubble-relay",
            shorten(value)
        ));
    }
    Ok(value.into())
}

/// `namespace/account`.
fn account(value: &str) -> Result<String, String> {
    let wrong = || {
        format!(
            "{:?} is not a service account; write it like signet-system/signet-agent",
            shorten(value)
        )
    };
    let (namespace, name) = value.split_once('/').ok_or_else(wrong)?;
    let fine = label(namespace, 63).is_ok() && label(name, 253).is_ok();
    if fine { Ok(value.into()) } else { Err(wrong()) }
}

/// A DNS name, in which `*` may stand for the node's own.
fn server_name(value: &str) -> Result<String, String> {
    let of_node = value.replacen('*', "node", 1);
    if ServerName::try_from(of_node.as_str()).is_err() || value.len() > 190 {
        return Err(format!(
            "{:?} is not a DNS name; write it like *.default.hubble-grpc.cilium.io",
            shorten(value)
        ));
    }
    Ok(value.into())
}

pub(super) fn shown_listener(listener: Option<SocketAddr>) -> String {
    listener.map_or_else(|| "off".into(), |address| address.to_string())
}

pub(super) fn shown<T: ToString>(values: &[T]) -> Vec<String> {
    values.iter().map(T::to_string).collect()
}

pub(super) fn shown_path(path: &std::path::Path) -> Vec<String> {
    vec![path.to_string_lossy().into_owned()]
}

macro_rules! keys {
    ($($name:literal $apply:ident $list:literal $form:literal $doc:literal
        set($sc:ident, $sv:ident) $set:block
        get($gc:ident) $get:expr;)*) => {
        /// Every key, in the order in which they are printed.
        pub static KEYS: &[Key] = &[$(Key {
            name: $name,
            apply: Apply::$apply,
            list: $list,
            form: $form,
            doc: $doc,
            set: |$sc: &mut AgentConfig, $sv: &[String]| -> Set { $set Ok(()) },
            get: |$gc: &AgentConfig| $get,
        },)*];
    };
}

keys! {
    "node" Restart false "name" "This node's name, as pods' spec.nodeName has it. Required."
        set(c, v) { c.node = label(one(v)?, 253)?; }
        get(c) if c.node.is_empty() { vec![] } else { vec![c.node.clone()] };
    "clusterDir" Restart false "directory"
        "Directory of manifests that is followed instead of the Kubernetes API (standalone mode)."
        set(c, v) { c.cluster_dir = Some(path(v)?); }
        get(c) c.cluster_dir.iter().flat_map(|p| shown_path(p)).collect();
    "kubeconfig" Restart false "file"
        "How the Kubernetes API is reached; the default is the pod's own service account. Not \
         used with clusterDir."
        set(c, v) { c.kubeconfig = Some(path(v)?); }
        get(c) c.kubeconfig.iter().flat_map(|p| shown_path(p)).collect();
    "namespace" Restart false "name"
        "The namespace of the ConfigMaps signet-enforcement and signet-federation; the default \
         is the service account's, or the kubeconfig's."
        set(c, v) { c.namespace = Some(label(one(v)?, 63)?); }
        get(c) shown(c.namespace.as_slice());
    "watchTimeout" Restart false "duration"
        "After this the API server ends each watch and it is begun anew, without a new list. A \
         watch that is silent for a minute (or, when that is shorter, this), and a quarter of \
         it, is begun anew, too. At most 290 s."
        set(c, v) { c.watch_timeout = duration(v, 1, 290)?; }
        get(c) vec![show_duration(c.watch_timeout)];
    "authority" Restart false "embedded|grpc"
        "Who signs SVIDs: the agent itself, from a root on disk, or a server of Istio's CA API at \
         caAddress (signet authority, istiod, istio-csr)."
        set(c, v) { c.authority = Authority::parse(one(v)?)?; }
        get(c) vec![c.authority.as_str().into()];
    "authorityDir" Restart false "directory"
        "Where the embedded authority keeps its root; the default is authority below stateDir."
        set(c, v) { c.authority_dir = Some(path(v)?); }
        get(c) c.authority_dir.iter().flat_map(|p| shown_path(p)).collect();
    "caAddress" Restart false "URL" "With authority grpc: where, as https://host:15012."
        set(c, v) { c.ca_address = Some(one(v)?.into()); }
        get(c) shown(c.ca_address.as_slice());
    "caServerName" Restart false "name"
        "The name in the authority's certificate; the default is the host of caAddress."
        set(c, v) { c.ca_server_name = Some(one(v)?.into()); }
        get(c) shown(c.ca_server_name.as_slice());
    "caRootFile" Restart false "file"
        "PEM roots that the authority's certificate must lead to; read again for each connection."
        set(c, v) { c.ca_root_file = Some(path(v)?); }
        get(c) c.ca_root_file.iter().flat_map(|p| shown_path(p)).collect();
    "caTokenFile" Restart false "file"
        "The token that the agent presents to the authority; read again for each call."
        set(c, v) { c.ca_token_file = path(v)?; }
        get(c) shown_path(&c.ca_token_file);
    "clusterId" Restart false "name" "Istio's name of this cluster, told to the authority."
        set(c, v) { c.cluster_id = one(v)?.into(); }
        get(c) vec![c.cluster_id.clone()];
    "trustDomain" Restart false "name" "The cluster's own trust domain."
        set(c, v) { c.trust_domain = trust_domain(one(v)?)?; }
        get(c) vec![c.trust_domain.clone()];
    "svidTtl" Restart false "duration" "How long a tunnel SVID is valid; renewed at half of it."
        set(c, v) { c.svid_ttl = duration(v, 10, 7 * 86_400)?; }
        get(c) vec![show_duration(c.svid_ttl)];
    "cgroupRoot" Restart false "path"
        "The cgroup that holds all pods, below the cgroup2 mount."
        set(c, v) { c.cgroup_root = cgroup(one(v)?)?; }
        get(c) vec![c.cgroup_root.clone()];
    "nodeCgroup" Restart false "path"
        "The cgroup that holds all of the node's processes, below the cgroup2 mount; the default \
         is the mount's root."
        set(c, v) { c.node_cgroup = Some(cgroup(one(v)?)?); }
        get(c) c.node_cgroup.iter().cloned().collect();
    "probeCgroups" Restart true "paths"
        "Cgroups whose connections to pods count as kubelet probes; empty: found from the \
         listener on port 10250."
        set(c, v) { c.probe_cgroups = each(v, cgroup)?; }
        get(c) c.probe_cgroups.clone();
    "bpffs" Restart false "directory" "Directory on a bpffs below which maps and links are pinned."
        set(c, v) { c.bpffs = path(v)?; }
        get(c) shown_path(&c.bpffs);
    "instance" Restart false "name" "Name of this agent's pins, for several agents on one kernel."
        set(c, v) { c.instance = label(one(v)?, 63)?; }
        get(c) vec![c.instance.clone()];
    "runDir" Restart false "directory"
        "Sockets are made here: admin/agent.sock and admin/handover.sock, in a directory of mode \
         0700, and workload/workload.sock."
        set(c, v) { c.run_dir = path(v)?; }
        get(c) shown_path(&c.run_dir);
    "ownSocket" Restart false "path"
        "This process's own admin socket, beside admin/agent.sock, which belongs to the agent \
         that serves the node: during an upgrade two run, and probes must reach their own. Its \
         directory becomes 0700. None by default."
        set(c, v) { c.own_socket = Some(path(v)?); }
        get(c) c.own_socket.iter().flat_map(|p| shown_path(p)).collect();
    "workloadSocket" Restart false "path"
        "Socket of the SPIFFE Workload API, alone in its directory, which pods mount; the \
         default is workload/workload.sock below runDir."
        set(c, v) { c.workload_socket = Some(path(v)?); }
        get(c) c.workload_socket.iter().flat_map(|p| shown_path(p)).collect();
    "workloadEntries" Restart false "directory"
        "Directory of WorkloadEntry manifests: identities of processes that are no pods, for the \
         Workload API. Read again when the agent reads its configuration again (SIGHUP)."
        set(c, v) { c.workload_entries = Some(path(v)?); }
        get(c) c.workload_entries.iter().flat_map(|p| shown_path(p)).collect();
    "stateDir" Restart false "directory" "What outlives the agent is kept here."
        set(c, v) { c.state_dir = path(v)?; }
        get(c) shown_path(&c.state_dir);
    "unknownPods" Live false "auto|deny|allow"
        "What becomes of pods that are not registered yet: auto refuses them while the agent is \
         alive and some namespace is enforced."
        set(c, v) { c.unknown_pods = UnknownPods::parse(one(v)?)?; }
        get(c) vec![c.unknown_pods.as_str().into()];
    "whenAgentDead" Live false "allow|deny"
        "With unknownPods auto: what becomes of unregistered pods when the agent has been dead \
         for 30 s. Registered pods stay as they are in any case."
        set(c, v) { c.when_agent_dead = WhenAgentDead::parse(one(v)?)?; }
        get(c) vec![c.when_agent_dead.as_str().into()];
    "enforcement" Live false "enforce|audit|off"
        "Overrides everything: audit lets pass what would be dropped and reports it, off touches \
         nothing. The cluster's enforcement.yaml goes before it."
        set(c, v) { c.enforcement = Enforcement::parse(one(v)?)?; }
        get(c) vec![c.enforcement.as_str().into()];
    "otherProtocols" Live false "allow|deny"
        "Protocols besides TCP and UDP, from and to pods that are not off."
        set(c, v) { c.other_protocols = OtherProtocols::parse(one(v)?)?; }
        get(c) vec![c.other_protocols.as_str().into()];
    "tunnel" Restart false "auto|native|hbone"
        "What travels in tunnels: `signet/1` where the other agent speaks it, else HBONE (auto), or \
         one of them alone, in both directions. A ztunnel speaks HBONE only."
        set(c, v) { c.tunnel = TunnelWire::parse(one(v)?)?; }
        get(c) vec![c.tunnel.as_str().into()];
    "rawGuard" Live false "true|false"
        "Whether frames that no socket of an enforced pod was let through with (packet sockets, \
         forged addresses) drop at the node's end of its veth."
        set(c, v) {
            c.raw_guard = match one(v)? {
                "true" => true,
                "false" => false,
                other => return Err(format!("{:?} is neither true nor false", shorten(other))),
            };
        }
        get(c) vec![c.raw_guard.to_string()];
    "neverDeny" Live true "namespaces"
        "Namespaces whose pods are registered first and never wait, besides kube-system."
        set(c, v) { c.never_deny = each(v, |n| label(n, 63))?; }
        get(c) c.never_deny.clone();
    "builtins" Live true "dns,kubelet-probes,webhooks"
        "What passes without a policy: DNS to the pod's own resolvers, unless a policy denies it, \
         probes of the node's own kubelet, and plaintext to the ports that the API server calls \
         (webhooks, aggregated APIs). What is left out is removed; signet policy list \
         shows them."
        set(c, v) { c.builtins = each(v, Builtin::parse)?; }
        get(c) c.builtins.iter().map(|b| b.as_str().into()).collect();
    "dnsResolvers" Live true "addresses or namespace/service"
        "Resolvers of the built-in dns (UDP and TCP port 53), besides the cluster's own: the \
         Service kube-system/kube-dns, and those in kube-system with the label k8s-app: kube-dns."
        set(c, v) { c.dns_resolvers = each(v, Resolver::parse)?; }
        get(c) shown(&c.dns_resolvers);
    "rootNamespace" Restart false "namespace"
        "The namespace whose AuthorizationPolicies and PeerAuthentications are the whole mesh's, \
         as Istio's meshConfig.rootNamespace."
        set(c, v) { c.root_namespace = label(one(v)?, 63)?; }
        get(c) vec![c.root_namespace.clone()];
    "jwksRoots" Restart false "file"
        "PEM file of web authorities, besides the system's, that vouch for the servers from which \
         the keys of RequestAuthentications' issuers are fetched (jwksUri, OpenID Connect discovery)."
        set(c, v) { c.jwks_roots = Some(path(v)?); }
        get(c) c.jwks_roots.iter().flat_map(|p| shown_path(p)).collect();
    "defaultAction" Restart false "allow|deny"
        "What becomes of flows to and from enforced pods that no ALLOW selects, in namespaces whose label \
         signet.dev/default does not say."
        set(c, v) { c.default_action = DefaultAction::parse(one(v)?)?; }
        get(c) vec![c.default_action.as_str().into()];
    "podRanges" Restart true "CIDRs"
        "Address ranges of pods: strict refuses an address inside them that nobody knows. The \
         default is what ranges.yaml declares, else what Nodes do (spec.podCIDRs)."
        set(c, v) { c.pod_ranges = each(v, parse_range)?; }
        get(c) shown(&c.pod_ranges);
    "serviceRanges" Restart true "CIDRs"
        "Address ranges of Services; the default is what ranges.yaml declares."
        set(c, v) { c.service_ranges = each(v, parse_range)?; }
        get(c) shown(&c.service_ranges);
    "outsideRanges" Restart true "CIDRs" "Parts of the above that lie outside the mesh all the same."
        set(c, v) { c.outside_ranges = each(v, parse_range)?; }
        get(c) shown(&c.outside_ranges);
    "strictGrace" Live false "duration"
        "How long open plaintext flows may live on after their namespace turned strict."
        set(c, v) { c.strict_grace = duration(v, 0, 7 * 86_400)?; }
        get(c) vec![show_duration(c.strict_grace)];
    "drainDeadline" Live false "duration"
        "How long open flows may go on in an agent whose place another one has taken (an upgrade \
         or a rollback); then they are cut. terminationGracePeriodSeconds must be longer."
        set(c, v) { c.drain_deadline = duration(v, 1, 86_400)?; }
        get(c) vec![show_duration(c.drain_deadline)];
    "unenrolGrace" Live false "duration"
        "How long a pod that is no longer enrolled is served for peers that have not heard."
        set(c, v) { c.unenrol_grace = duration(v, 0, 3600)?; }
        get(c) vec![show_duration(c.unenrol_grace)];
    "limits.openFlows" Live false "number" "Open flows of one pod; more are refused."
        set(c, v) { c.limits.open_flows = number(v, 1, 1_000_000)?; }
        get(c) vec![c.limits.open_flows.to_string()];
    "limits.handshakes" Live false "number" "Handshakes in flight towards one pod."
        set(c, v) { c.limits.handshakes = number(v, 1, 100_000)?; }
        get(c) vec![c.limits.handshakes.to_string()];
    "limits.handshakesPerSource" Live false "number"
        "Handshakes in flight towards one pod from one source address."
        set(c, v) { c.limits.handshakes_per_source = number(v, 1, 100_000)?; }
        get(c) vec![c.limits.handshakes_per_source.to_string()];
    "limits.backlog" Restart false "number" "Backlog of a pod's listeners."
        set(c, v) { c.limits.backlog = number(v, 1, 65_535)?; }
        get(c) vec![c.limits.backlog.to_string()];
    "metricsListen" Restart false "address:port|off"
        "Where metrics are served at /metrics, over HTTP and to everybody who can connect."
        set(c, v) { c.metrics_listen = listener(one(v)?)?; }
        get(c) vec![shown_listener(c.metrics_listen)];
    "readyListen" Restart false "address:port|off"
        "Where readiness is served at /healthz/ready, over HTTP and to everybody who can connect: \
         200, or 503 with the reason."
        set(c, v) { c.ready_listen = listener(one(v)?)?; }
        get(c) vec![shown_listener(c.ready_listen)];
    "viewerListen" Restart false "address:port|off"
        "With the Kubernetes API: a loopback address where whatever changes nothing is served for \
         signet's own command line, through the API server's port-forward and for tokens of the \
         audience signet.dev/observer only."
        set(c, v) { c.viewer_listen = loopback(one(v)?)?; }
        get(c) vec![shown_listener(c.viewer_listen)];
    "observerListen" Restart false "address:port|off"
        "Where Hubble's observer and peer services are served over TLS, for Hubble's own tools; \
         Hubble's port for this is 4254. Callers show a certificate of observerClients, or with \
         the Kubernetes API a bearer token of the audience signet.dev/observer. Off by default."
        set(c, v) { c.observer_listen = listener(one(v)?)?; }
        get(c) vec![shown_listener(c.observer_listen)];
    "observerClients" Restart true "SPIFFE IDs"
        "Whoever proves one of these identities by its certificate may see flows on observerListen."
        set(c, v) { c.observer_clients = each(v, spiffe_id)?; }
        get(c) c.observer_clients.clone();
    "observerAccount" Restart false "namespace/account"
        "The service account whose SVID is the certificate of observerListen, where no file is \
         given: the agent's own, which is signet-agent in its namespace by default."
        set(c, v) { c.observer_account = Some(account(one(v)?)?); }
        get(c) c.observer_account.iter().cloned().collect();
    "observerCertFile" Restart false "path"
        "Certificate chain of observerListen, PEM, leaf first, for clients that know names and no \
         SPIFFE IDs, as Hubble's relay; read again when it changes. With observerKeyFile."
        set(c, v) { c.observer_cert_file = Some(path(v)?); }
        get(c) c.observer_cert_file.iter().flat_map(|p| shown_path(p)).collect();
    "observerKeyFile" Restart false "path" "The private key to observerCertFile, PEM."
        set(c, v) { c.observer_key_file = Some(path(v)?); }
        get(c) c.observer_key_file.iter().flat_map(|p| shown_path(p)).collect();
    "observerServerName" Restart false "name"
        "The name that a node's certificate has, as Hubble's relay is told; * is the node's own \
         name with dashes for its dots."
        set(c, v) { c.observer_server_name = server_name(one(v)?)?; }
        get(c) vec![c.observer_server_name.clone()];
    "cores" Restart false "number" "Data-plane threads; the default is one a core."
        set(c, v) { c.cores = Some(number(v, 1, 1024)?); }
        get(c) shown(c.cores.as_slice());
    "eventsPerSecond" Live false "number"
        "Verdict events of one pod a second; more are counted only."
        set(c, v) { c.events_per_second = number(v, 1, 1_000_000)?; }
        get(c) vec![c.events_per_second.to_string()];
    "logLevel" Live false "directives"
        "Levels of the log: error, warn, info, debug, trace, or tracing's directives \
         (info,signet::proxy=debug)."
        set(c, v) {
            let value = one(v)?;
            if tracing_subscriber::EnvFilter::builder().parse(value).is_err() {
                return Err(format!(
                    "{:?} is not a log level; write error, warn, info, debug or trace",
                    shorten(value)
                ));
            }
            c.log_level = value.into();
        }
        get(c) vec![c.log_level.clone()];
    "accessLog" Live false "off|denied|all"
        "Which connections get a line in the log, under the target access: none, those that were \
         refused or would have been, or all."
        set(c, v) { c.access_log = AccessLog::parse(one(v)?)?; }
        get(c) vec![c.access_log.as_str().into()];
    "accessLogPerSecond" Live false "number"
        "Lines of the access log a second; more are counted only."
        set(c, v) { c.access_log_per_second = number(v, 1, 100_000)?; }
        get(c) vec![c.access_log_per_second.to_string()];
    "logFormat" Restart false "text|json" "How log lines are written."
        set(c, v) { c.log_format = LogFormat::parse(one(v)?)?; }
        get(c) vec![c.log_format.as_str().into()];
}
