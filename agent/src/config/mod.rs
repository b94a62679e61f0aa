//! The agent's configuration: a file, below the environment, below flags.
//!
//! [`KEYS`] is the one table: name in the file (camelCase), environment variable, flag,
//! default, live or restart, and what it means; loading, `--print-config` and the reference
//! page are made from it. Unknown keys are refused wherever they stand.

pub mod authority;
mod keys;
#[cfg(test)]
mod reference;
pub mod values;
pub mod watch;
pub mod yaml;

use std::{
    collections::BTreeMap,
    fmt,
    net::SocketAddr,
    path::{Path, PathBuf},
    time::Duration,
};

use ipnet::IpNet;

pub use self::keys::{Apply, KEYS, Key};
use self::values::{
    AccessLog, Authority, Builtin, DefaultAction, Enforcement, LogFormat, OtherProtocols, Resolver,
    TunnelWire, UnknownPods, WhenAgentDead,
};
use self::yaml::{Fault, Node, Value};

/// The agent's configuration, complete and valid.
#[derive(Clone, PartialEq, Eq, Debug)]
#[expect(missing_docs, reason = "KEYS documents every field, for the reference page too")]
pub struct AgentConfig {
    pub node: String,
    pub cluster_dir: Option<PathBuf>,
    pub kubeconfig: Option<PathBuf>,
    pub namespace: Option<String>,
    pub watch_timeout: Duration,
    pub authority: Authority,
    pub authority_dir: Option<PathBuf>,
    pub ca_address: Option<String>,
    pub ca_server_name: Option<String>,
    pub ca_root_file: Option<PathBuf>,
    pub ca_token_file: PathBuf,
    pub cluster_id: String,
    pub trust_domain: String,
    pub svid_ttl: Duration,
    pub cgroup_root: String,
    pub node_cgroup: Option<String>,
    pub probe_cgroups: Vec<String>,
    pub bpffs: PathBuf,
    pub instance: String,
    pub run_dir: PathBuf,
    pub own_socket: Option<PathBuf>,
    pub workload_socket: Option<PathBuf>,
    pub workload_entries: Option<PathBuf>,
    pub state_dir: PathBuf,
    pub unknown_pods: UnknownPods,
    pub when_agent_dead: WhenAgentDead,
    pub enforcement: Enforcement,
    pub other_protocols: OtherProtocols,
    pub tunnel: TunnelWire,
    pub raw_guard: bool,
    pub never_deny: Vec<String>,
    pub builtins: Vec<Builtin>,
    pub dns_resolvers: Vec<Resolver>,
    pub root_namespace: String,
    pub jwks_roots: Option<PathBuf>,
    pub default_action: DefaultAction,
    pub pod_ranges: Vec<IpNet>,
    pub service_ranges: Vec<IpNet>,
    pub outside_ranges: Vec<IpNet>,
    pub strict_grace: Duration,
    pub drain_deadline: Duration,
    pub unenrol_grace: Duration,
    pub limits: Limits,
    pub metrics_listen: Option<SocketAddr>,
    pub ready_listen: Option<SocketAddr>,
    pub viewer_listen: Option<SocketAddr>,
    pub observer_listen: Option<SocketAddr>,
    pub observer_clients: Vec<String>,
    pub observer_account: Option<String>,
    pub observer_cert_file: Option<PathBuf>,
    pub observer_key_file: Option<PathBuf>,
    pub observer_server_name: String,
    pub cores: Option<usize>,
    pub events_per_second: u32,
    pub log_level: String,
    pub access_log: AccessLog,
    pub access_log_per_second: u32,
    pub log_format: LogFormat,
}

/// Limits of one endpoint.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Limits {
    /// Open flows, both directions together.
    pub open_flows: u32,
    /// Handshakes in flight.
    pub handshakes: u32,
    /// Handshakes in flight from one source address.
    pub handshakes_per_source: u32,
    /// Backlog of each listener.
    pub backlog: u32,
}

impl Default for AgentConfig {
    /// Every default; [`AgentConfig::node`] is empty, which loading refuses.
    fn default() -> Self {
        Self {
            node: String::new(),
            cluster_dir: None,
            kubeconfig: None,
            namespace: None,
            watch_timeout: Duration::from_secs(290),
            authority: Authority::Embedded,
            authority_dir: None,
            ca_address: None,
            ca_server_name: None,
            ca_root_file: None,
            ca_token_file: "/var/run/secrets/tokens/signet-authority".into(),
            cluster_id: "Kubernetes".into(),
            trust_domain: "cluster.local".into(),
            svid_ttl: Duration::from_secs(3600),
            cgroup_root: "/kubepods".into(),
            node_cgroup: None,
            probe_cgroups: Vec::new(),
            bpffs: "/sys/fs/bpf/signet".into(),
            instance: "default".into(),
            run_dir: "/run/signet".into(),
            own_socket: None,
            workload_socket: None,
            workload_entries: None,
            state_dir: "/var/lib/signet".into(),
            unknown_pods: UnknownPods::Auto,
            when_agent_dead: WhenAgentDead::Allow,
            enforcement: Enforcement::Enforce,
            other_protocols: OtherProtocols::Allow,
            tunnel: TunnelWire::Auto,
            raw_guard: true,
            never_deny: Vec::new(),
            builtins: Builtin::ALL.to_vec(),
            dns_resolvers: Vec::new(),
            root_namespace: "istio-system".into(),
            jwks_roots: None,
            default_action: DefaultAction::Allow,
            pod_ranges: Vec::new(),
            service_ranges: Vec::new(),
            outside_ranges: Vec::new(),
            strict_grace: Duration::from_secs(600),
            drain_deadline: Duration::from_secs(60),
            unenrol_grace: Duration::from_secs(60),
            limits: Limits {
                open_flows: 16_384,
                handshakes: 256,
                handshakes_per_source: 64,
                backlog: 1024,
            },
            metrics_listen: Some(SocketAddr::from(([127, 0, 0, 1], 15020))),
            ready_listen: Some(SocketAddr::from(([127, 0, 0, 1], 15021))),
            viewer_listen: Some(SocketAddr::from(([127, 0, 0, 1], 4255))),
            observer_listen: None,
            observer_clients: Vec::new(),
            observer_account: None,
            observer_cert_file: None,
            observer_key_file: None,
            observer_server_name: "*".into(),
            cores: None,
            events_per_second: 1000,
            log_level: "info".into(),
            access_log: AccessLog::Off,
            access_log_per_second: 1000,
            log_format: LogFormat::Text,
        }
    }
}

impl AgentConfig {
    /// Where the embedded authority keeps its root.
    pub fn authority_dir(&self) -> PathBuf {
        self.authority_dir.clone().unwrap_or_else(|| self.state_dir.join("authority"))
    }

    /// The admin socket's path.
    pub fn admin_socket(&self) -> PathBuf {
        self.run_dir.join("admin").join("agent.sock")
    }

    /// The Workload API's socket.
    pub fn workload_socket(&self) -> PathBuf {
        self.workload_socket
            .clone()
            .unwrap_or_else(|| self.run_dir.join("workload").join("workload.sock"))
    }

    /// The directory of this instance's pins, without the ABI's version.
    pub fn pin_dir(&self) -> PathBuf {
        self.bpffs.join(&self.instance)
    }

    /// The keys whose values differ, with how a change takes effect.
    pub fn changes(&self, other: &Self) -> Vec<(&'static Key, Apply)> {
        KEYS.iter()
            .filter(|key| (key.get)(self) != (key.get)(other))
            .map(|key| (key, key.apply))
            .collect()
    }

    /// This configuration with the live keys of `newer`; the others wait for a restart.
    #[must_use]
    pub fn with_live_keys_of(&self, newer: &Self) -> Self {
        let mut merged = self.clone();
        for key in KEYS.iter().filter(|key| key.apply == Apply::Live) {
            // A printed value always parses again; a test holds that for every key.
            let _ = (key.set)(&mut merged, &(key.get)(newer));
        }
        merged
    }
}

/// Where configuration comes from, weakest first.
#[derive(Clone, Debug, Default)]
pub struct ConfigSources {
    /// A YAML file.
    pub file: Option<PathBuf>,
    /// The environment; only `SIGNET_*` is read.
    pub env: Vec<(String, String)>,
    /// Flags as (name without `--`, value); a later one replaces an earlier one, except that
    /// lists add up.
    pub flags: Vec<(String, String)>,
}

impl ConfigSources {
    /// The process's own environment, no file and no flags.
    pub fn from_process_env() -> Self {
        let env = std::env::vars_os()
            .filter_map(|(k, v)| Some((k.into_string().ok()?, v.to_string_lossy().into_owned())))
            .filter(|(name, _)| name.starts_with("SIGNET_"))
            .collect();
        Self { file: None, env, flags: Vec::new() }
    }

    /// Reads the file and merges all sources.
    ///
    /// # Errors
    ///
    /// The first key that is unknown or whose value does not parse.
    pub fn load(&self) -> Result<Loaded, ConfigError> {
        let text = match &self.file {
            None => None,
            Some(path) => Some(read_bounded(path)?),
        };
        self.load_with(text.as_deref())
    }

    /// As [`Self::load`], for commands on a node that need no node's name.
    ///
    /// # Errors
    ///
    /// As [`Self::load`]; a missing `node` is none.
    pub fn load_without_node(&self) -> Result<Loaded, ConfigError> {
        let text = match &self.file {
            None => None,
            Some(path) => Some(read_bounded(path)?),
        };
        self.merge(text.as_deref())
    }

    /// As [`Self::load`], with the file's text given. Pure.
    pub fn load_with(&self, file_text: Option<&str>) -> Result<Loaded, ConfigError> {
        let loaded = self.merge(file_text)?;
        if loaded.config.node.is_empty() {
            return Err(ConfigError::Missing {
                key: "node",
                remedy: "give this node's name with --node, SIGNET_NODE or node: in the file",
            });
        }
        Ok(loaded)
    }

    fn merge(&self, file_text: Option<&str>) -> Result<Loaded, ConfigError> {
        let mut loaded = Loaded { config: AgentConfig::default(), origins: BTreeMap::new() };
        if let Some(text) = file_text {
            let path = self.file.clone().unwrap_or_else(|| "configuration".into());
            loaded
                .apply_file(&path, text)
                .map_err(|fault| ConfigError::File { path: path.clone(), fault })?;
        }
        for (name, value) in &self.env {
            loaded.apply_env(name, value)?;
        }
        loaded.apply_flags(&self.flags)?;
        Ok(loaded)
    }
}

/// A configuration with where each value comes from.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Loaded {
    /// The values.
    pub config: AgentConfig,
    origins: BTreeMap<&'static str, Origin>,
}

/// Where a value comes from.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Origin {
    /// Nobody set it.
    Default,
    /// The file, at a line.
    File(PathBuf, u64),
    /// An environment variable.
    Env(String),
    /// A flag.
    Flag(String),
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Default => f.write_str("default"),
            Self::File(path, line) => write!(f, "file {}:{line}", path.display()),
            Self::Env(name) => write!(f, "env {name}"),
            Self::Flag(name) => write!(f, "flag --{name}"),
        }
    }
}

/// Why a configuration is refused; exit code 3.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("configuration file {}: cannot be read ({source}); check --config", path.display())]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The file holds something wrong.
    #[error("{}{}: {fault}", path.display(), at_line(fault.line))]
    File {
        /// The file.
        path: PathBuf,
        /// What and where.
        fault: Fault,
    },
    /// A variable `SIGNET_*` that names no key.
    #[error("environment variable {name}: unknown; {remedy}")]
    UnknownEnv {
        /// The variable.
        name: String,
        /// What to do.
        remedy: String,
    },
    /// A variable's value does not parse.
    #[error("environment variable {name}: {message}")]
    Env {
        /// The variable.
        name: String,
        /// Value and remedy.
        message: String,
    },
    /// A flag that names no key.
    #[error("flag --{name}: unknown; {remedy}")]
    UnknownFlag {
        /// The flag.
        name: String,
        /// What to do.
        remedy: String,
    },
    /// A flag's value does not parse.
    #[error("flag --{name}: {message}")]
    Flag {
        /// The flag.
        name: String,
        /// Value and remedy.
        message: String,
    },
    /// A key without default was not given.
    #[error("{key}: not set; {remedy}")]
    Missing {
        /// The key.
        key: &'static str,
        /// What to do.
        remedy: &'static str,
    },
}

/// `:12`, or nothing for line 0.
pub fn at_line(line: u64) -> String {
    if line == 0 { String::new() } else { format!(":{line}") }
}

/// Variables that are read elsewhere and are not configuration.
const OTHER_ENV: &[&str] = &["SIGNET_SOCKET", "SIGNET_MASK_FEATURES"];

impl Loaded {
    /// Where a key's value comes from.
    pub fn origin(&self, key: &str) -> Origin {
        self.origins.get(key).cloned().unwrap_or(Origin::Default)
    }

    /// `--print-config`: one key a line, `key: value  # source`, itself valid YAML.
    pub fn print(&self) -> String {
        let lines: Vec<(String, &Key)> = KEYS
            .iter()
            .map(|key| (format!("{}: {}", key.name, key.show(&self.config)), key))
            .collect();
        let width = lines.iter().map(|(l, _)| l.len()).filter(|l| *l <= 60).max().unwrap_or(0);
        let mut out = String::new();
        for (line, key) in lines {
            let origin = self.origin(key.name);
            out.push_str(&format!("{line:width$}  # {origin}\n"));
        }
        out
    }

    fn apply_file(&mut self, path: &Path, text: &str) -> Result<(), Fault> {
        let Some(root) = yaml::parse_one(text)? else { return Ok(()) };
        let mut top: Vec<&str> = KEYS.iter().flat_map(|key| [key.section(), key.name]).collect();
        top.dedup();
        root.known_fields(&top, |name, node| {
            if let Some(key) = Key::by_name(name) {
                return self.apply_node(path, key, node);
            }
            // A dotted key, as print-config writes it, or a section.
            let within = format!("{name}.");
            let inner: Vec<&str> =
                KEYS.iter().filter_map(|key| key.name.strip_prefix(&within)).collect();
            node.known_fields(&inner, |field, node| {
                match Key::by_name(&format!("{within}{field}")) {
                    Some(key) => self.apply_node(path, key, node),
                    None => Err(node.fault("unknown field")),
                }
            })
        })
    }

    fn apply_node(&mut self, path: &Path, key: &'static Key, node: &Node) -> Result<(), Fault> {
        let values = match &node.value {
            Value::List(_) if key.list => node.list(1024, scalar)?,
            Value::Null => return Ok(()),
            _ => split(key, &scalar(node)?),
        };
        (key.set)(&mut self.config, &values).map_err(|message| node.fault(message))?;
        self.origins.insert(key.name, Origin::File(path.to_owned(), node.line));
        Ok(())
    }

    fn apply_env(&mut self, name: &str, value: &str) -> Result<(), ConfigError> {
        if !name.starts_with("SIGNET_") || OTHER_ENV.contains(&name) || is_service_link(name) {
            return Ok(());
        }
        let Some(key) = KEYS.iter().find(|key| key.env() == name) else {
            let known: Vec<String> = KEYS.iter().map(Key::env).collect();
            let known: Vec<&str> = known.iter().map(String::as_str).collect();
            return Err(ConfigError::UnknownEnv {
                name: yaml::shorten(name),
                remedy: remedy(name, &known, "unset it; signet agent --help lists the variables"),
            });
        };
        (key.set)(&mut self.config, &split(key, value))
            .map_err(|message| ConfigError::Env { name: name.into(), message })?;
        self.origins.insert(key.name, Origin::Env(name.into()));
        Ok(())
    }

    fn apply_flags(&mut self, flags: &[(String, String)]) -> Result<(), ConfigError> {
        let mut given: BTreeMap<&'static str, (&'static Key, Vec<String>)> = BTreeMap::new();
        for (name, value) in flags {
            let Some(key) = KEYS.iter().find(|key| key.flag() == *name) else {
                let known: Vec<String> = KEYS.iter().map(Key::flag).collect();
                let known: Vec<&str> = known.iter().map(String::as_str).collect();
                return Err(ConfigError::UnknownFlag {
                    name: yaml::shorten(name),
                    remedy: remedy(name, &known, "signet agent --help lists the flags"),
                });
            };
            let entry = given.entry(key.name).or_insert((key, Vec::new()));
            if !key.list {
                entry.1.clear();
            }
            entry.1.extend(split(key, value));
        }
        for (key, values) in given.into_values() {
            let name = key.flag();
            (key.set)(&mut self.config, &values)
                .map_err(|message| ConfigError::Flag { name: name.clone(), message })?;
            self.origins.insert(key.name, Origin::Flag(name));
        }
        Ok(())
    }
}

fn remedy(name: &str, known: &[&str], otherwise: &str) -> String {
    match yaml::nearest(name, known) {
        Some(near) => format!("did you mean {near}?"),
        None => otherwise.into(),
    }
}

/// A list's elements (comma-separated where it is one text), else the one value.
fn split(key: &Key, value: &str) -> Vec<String> {
    if !key.list {
        return vec![value.trim().to_owned()];
    }
    value.split(',').map(str::trim).filter(|v| !v.is_empty()).map(str::to_owned).collect()
}

/// A scalar's text; numbers and booleans as YAML writes them.
fn scalar(node: &Node) -> Result<String, Fault> {
    match &node.value {
        Value::Int(v) => Ok(v.to_string()),
        Value::Uint(v) => Ok(v.to_string()),
        Value::Bool(v) => Ok(v.to_string()),
        _ => node.text().map(str::to_owned),
    }
}

/// Kubernetes puts `SIGNET_SERVICE_HOST`, `SIGNET_AUTHORITY_PORT_443_TCP_ADDR`, … into every
/// container of a namespace with Services of such names.
fn is_service_link(name: &str) -> bool {
    name.ends_with("_SERVICE_HOST")
        || name.contains("_SERVICE_PORT")
        || name.ends_with("_PORT")
        || name.contains("_PORT_") && (name.contains("_TCP") || name.contains("_UDP"))
}

/// Reads a file of at most [`yaml::MAX_FILE_BYTES`].
fn read_bounded(path: &Path) -> Result<String, ConfigError> {
    use std::io::Read as _;
    let unreadable = |source| ConfigError::Unreadable { path: path.to_owned(), source };
    let file = std::fs::File::open(path).map_err(unreadable)?;
    let mut text = String::new();
    // One byte more than is allowed, so that the parser sees and names the excess.
    file.take(yaml::MAX_FILE_BYTES + 1).read_to_string(&mut text).map_err(unreadable)?;
    Ok(text)
}

#[cfg(test)]
mod tests;
