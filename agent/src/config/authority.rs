//! The authority's configuration: as the agent's, a file, below the environment, below flags.

use std::{net::SocketAddr, path::PathBuf, time::Duration};

use super::{
    ConfigError, OTHER_ENV, is_service_link,
    keys::{duration, each, label, number, one, path, quote, show_duration, shown, shown_path},
    read_bounded, remedy, scalar,
    values::LogFormat,
    yaml::{self, Fault, Value, shorten},
};

/// The authority's configuration, complete and valid.
#[derive(Clone, PartialEq, Eq, Debug)]
#[expect(missing_docs, reason = "SETTINGS documents every field, for the reference page too")]
pub struct AuthorityConfig {
    pub trust_domain: String,
    pub listen: SocketAddr,
    pub names: Vec<String>,
    pub store_dir: Option<PathBuf>,
    pub store_secret: Option<ObjectPath>,
    pub ca_dir: Option<PathBuf>,
    pub cluster_dir: Option<PathBuf>,
    pub node_token_dir: Option<PathBuf>,
    pub kubeconfig: Option<PathBuf>,
    pub audience: String,
    pub node_accounts: Vec<ObjectPath>,
    pub bundle_file: Option<PathBuf>,
    pub bundle_config_map: Option<ObjectPath>,
    pub taint_lease: Option<ObjectPath>,
    pub web_listen: Option<SocketAddr>,
    pub web_cert_file: Option<PathBuf>,
    pub web_key_file: Option<PathBuf>,
    pub oidc_issuer: Option<String>,
    pub metrics_listen: Option<SocketAddr>,
    pub svid_ttl: Duration,
    pub max_ttl: Duration,
    pub intermediate_ttl: Duration,
    pub refresh_hint: Duration,
    pub requests_per_second: u32,
    pub request_burst: u32,
    pub log_level: String,
    pub log_format: LogFormat,
}

fn address(value: &str) -> Result<SocketAddr, String> {
    value.parse().map_err(|_| {
        format!(
            "{:?} is not an address with a port; write it like 0.0.0.0:15012 or [::]:15012",
            shorten(value)
        )
    })
}

/// An OIDC issuer (OpenID Connect Core 1.0, section 2): https, no query, no fragment.
fn issuer(value: &str) -> Result<String, String> {
    let fine = value.len() <= 1024
        && value.strip_prefix("https://").is_some_and(|rest| {
            !rest.is_empty()
                && !rest.starts_with('/')
                && rest.bytes().all(|b| b.is_ascii_alphanumeric() || b"-._~/:[]".contains(&b))
        });
    if !fine {
        return Err(format!(
            "{:?} is not an issuer; write https:// and a host, without query or fragment",
            shorten(value)
        ));
    }
    Ok(value.into())
}

/// Namespace and name.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct ObjectPath {
    /// Namespace.
    pub namespace: String,
    /// Name.
    pub name: String,
}

impl ObjectPath {
    fn parse(value: &str) -> Result<Self, String> {
        match value.split_once('/') {
            Some((namespace, name)) if !namespace.is_empty() && !name.is_empty() => {
                Ok(Self { namespace: label(namespace, 63)?, name: label(name, 253)? })
            }
            _ => Err(format!("{:?} is not <namespace>/<name>", shorten(value))),
        }
    }
}

impl std::fmt::Display for ObjectPath {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}/{}", self.namespace, self.name)
    }
}

impl Default for AuthorityConfig {
    fn default() -> Self {
        let signet =
            |name: &str| ObjectPath { namespace: "signet-system".into(), name: name.into() };
        Self {
            trust_domain: "cluster.local".into(),
            listen: SocketAddr::from(([0u16; 8], 15012)),
            names: vec![
                "signet-authority.signet-system.svc".into(),
                "signet-authority.signet-system.svc.cluster.local".into(),
                "localhost".into(),
            ],
            store_dir: None,
            store_secret: None,
            ca_dir: None,
            cluster_dir: None,
            node_token_dir: None,
            kubeconfig: None,
            audience: "signet-authority".into(),
            node_accounts: vec![signet("signet-agent")],
            bundle_file: None,
            bundle_config_map: None,
            taint_lease: None,
            web_listen: None,
            web_cert_file: None,
            web_key_file: None,
            oidc_issuer: None,
            metrics_listen: None,
            svid_ttl: Duration::from_secs(3600),
            max_ttl: Duration::from_secs(24 * 3600),
            intermediate_ttl: Duration::from_secs(7 * 24 * 3600),
            refresh_hint: Duration::from_secs(300),
            requests_per_second: 50,
            request_burst: 500,
            log_level: "info".into(),
            log_format: LogFormat::Text,
        }
    }
}

/// A key of the authority's configuration.
pub struct Setting {
    /// Name in the file.
    pub name: &'static str,
    /// True for a list.
    pub list: bool,
    /// What its values look like.
    pub form: &'static str,
    /// What it means.
    pub doc: &'static str,
    set: fn(&mut AuthorityConfig, &[String]) -> Result<(), String>,
    get: fn(&AuthorityConfig) -> Vec<String>,
}

impl Setting {
    /// Its flag, without the dashes.
    pub fn flag(&self) -> String {
        self.words('-')
    }

    /// Its environment variable.
    pub fn env(&self) -> String {
        format!("SIGNET_{}", self.words('_').to_uppercase())
    }

    /// Its value in a configuration, as YAML.
    pub fn show(&self, config: &AuthorityConfig) -> String {
        let values: Vec<String> = (self.get)(config).iter().map(|v| quote(v)).collect();
        match (self.list, values.first()) {
            (true, _) => format!("[{}]", values.join(", ")),
            (false, Some(value)) => value.clone(),
            (false, None) => "null".into(),
        }
    }

    fn words(&self, by: char) -> String {
        let mut out = String::new();
        for c in self.name.chars() {
            if c.is_ascii_uppercase() {
                out.push(by);
            }
            out.push(c.to_ascii_lowercase());
        }
        out
    }

    fn split(&self, value: &str) -> Vec<String> {
        if !self.list {
            return vec![value.trim().to_owned()];
        }
        value.split(',').map(str::trim).filter(|v| !v.is_empty()).map(str::to_owned).collect()
    }
}

macro_rules! settings {
    ($($name:literal $list:literal $form:literal $doc:literal
        set($sc:ident, $sv:ident) $set:block
        get($gc:ident) $get:expr;)*) => {
        /// Every key, in the order in which they are printed.
        pub static SETTINGS: &[Setting] = &[$(Setting {
            name: $name,
            list: $list,
            form: $form,
            doc: $doc,
            set: |$sc: &mut AuthorityConfig, $sv: &[String]| -> Result<(), String> { $set Ok(()) },
            get: |$gc: &AuthorityConfig| $get,
        },)*];
    };
}

settings! {
    "trustDomain" false "name" "The trust domain that is signed for."
        set(c, v) { c.trust_domain = super::keys::trust_domain(one(v)?)?; }
        get(c) vec![c.trust_domain.clone()];
    "listen" false "address:port" "Where the gRPC services are served, over TLS."
        set(c, v) {
            c.listen = address(one(v)?)?;
        }
        get(c) vec![c.listen.to_string()];
    "names" true "DNS names or addresses" "Names in the serving certificate, by which agents dial."
        set(c, v) { c.names = each(v, |name| label(name, 253).or_else(|e| name.parse::<std::net::IpAddr>().map(|a| a.to_string()).map_err(|_| e)))?; }
        get(c) c.names.clone();
    "storeDir" false "directory"
        "Where the root is kept (mode 0700, files 0600); this or storeSecret is required."
        set(c, v) { c.store_dir = Some(path(v)?); }
        get(c) c.store_dir.iter().flat_map(|p| shown_path(p)).collect();
    "storeSecret" false "namespace/name" "The Secret that keeps the root, shared by replicas."
        set(c, v) { c.store_secret = Some(ObjectPath::parse(one(v)?)?); }
        get(c) shown(c.store_secret.as_slice());
    "caDir" false "directory"
        "A provided authority (ca-cert.pem, ca-key.pem, root-cert.pem, cert-chain.pem) that is \
         used instead of a root of our own."
        set(c, v) { c.ca_dir = Some(path(v)?); }
        get(c) c.ca_dir.iter().flat_map(|p| shown_path(p)).collect();
    "clusterDir" false "directory"
        "Directory of manifests that says which pods there are, instead of the Kubernetes API \
         (standalone mode)."
        set(c, v) { c.cluster_dir = Some(path(v)?); }
        get(c) c.cluster_dir.iter().flat_map(|p| shown_path(p)).collect();
    "nodeTokenDir" false "directory"
        "With clusterDir: one file a node, named like it, with the token that its agent presents \
         (mode 0600, at least 32 characters)."
        set(c, v) { c.node_token_dir = Some(path(v)?); }
        get(c) c.node_token_dir.iter().flat_map(|p| shown_path(p)).collect();
    "kubeconfig" false "file"
        "How the API server is reached; the default is the pod's own service account."
        set(c, v) { c.kubeconfig = Some(path(v)?); }
        get(c) c.kubeconfig.iter().flat_map(|p| shown_path(p)).collect();
    "audience" false "text" "The audience that agents' tokens must be bound to."
        set(c, v) { c.audience = one(v)?.into(); }
        get(c) vec![c.audience.clone()];
    "nodeAccounts" true "namespace/name" "Service accounts of node agents."
        set(c, v) { c.node_accounts = each(v, ObjectPath::parse)?; }
        get(c) shown(&c.node_accounts);
    "bundleFile" false "file" "Where the trust bundle is written as PEM, for agents to pin."
        set(c, v) { c.bundle_file = Some(path(v)?); }
        get(c) c.bundle_file.iter().flat_map(|p| shown_path(p)).collect();
    "bundleConfigMap" false "namespace/name"
        "A ConfigMap that gets the trust bundle as root-cert.pem, for agents to mount."
        set(c, v) { c.bundle_config_map = Some(ObjectPath::parse(one(v)?)?); }
        get(c) shown(c.bundle_config_map.as_slice());
    "taintLease" false "namespace/name"
        "Nodes whose agent is not ready get the taint node.signet.dev/agent-not-ready, never more \
         than a tenth of them, by the replica that holds this Lease; the default is no taint."
        set(c, v) { c.taint_lease = Some(ObjectPath::parse(one(v)?)?); }
        get(c) shown(c.taint_lease.as_slice());
    "webListen" false "address:port"
        "Where OIDC discovery and the bundle (/bundle) are served over HTTPS, for everybody."
        set(c, v) { c.web_listen = Some(address(one(v)?)?); }
        get(c) shown(c.web_listen.as_slice());
    "webCertFile" false "file"
        "PEM chain of the certificate at webListen; the default is the one that agents see."
        set(c, v) { c.web_cert_file = Some(path(v)?); }
        get(c) c.web_cert_file.iter().flat_map(|p| shown_path(p)).collect();
    "webKeyFile" false "file" "PEM key of webCertFile."
        set(c, v) { c.web_key_file = Some(path(v)?); }
        get(c) c.web_key_file.iter().flat_map(|p| shown_path(p)).collect();
    "oidcIssuer" false "URL"
        "The issuer in JWT-SVIDs, under which discovery is reached from outside; https, without \
         query."
        set(c, v) { c.oidc_issuer = Some(issuer(one(v)?)?); }
        get(c) shown(c.oidc_issuer.as_slice());
    "metricsListen" false "address:port|off"
        "Where metrics are served at /metrics, over HTTP and to everybody who can connect."
        set(c, v) { c.metrics_listen = super::keys::listener(one(v)?)?; }
        get(c) vec![super::keys::shown_listener(c.metrics_listen)];
    "svidTtl" false "duration" "How long an SVID is valid when the request leaves it open."
        set(c, v) { c.svid_ttl = duration(v, 10, 7 * 86_400)?; }
        get(c) vec![show_duration(c.svid_ttl)];
    "maxTtl" false "duration"
        "The longest that a request may ask for; an old root retires after it."
        set(c, v) { c.max_ttl = duration(v, 10, 30 * 86_400)?; }
        get(c) vec![show_duration(c.max_ttl)];
    "intermediateTtl" false "duration"
        "How long a replica's own signing certificate is valid; it is replaced before a leaf \
         could outlive it."
        set(c, v) { c.intermediate_ttl = duration(v, 20, 90 * 86_400)?; }
        get(c) vec![show_duration(c.intermediate_ttl)];
    "refreshHint" false "duration" "How often agents ask for the bundle again."
        set(c, v) { c.refresh_hint = duration(v, 1, 86_400)?; }
        get(c) vec![show_duration(c.refresh_hint)];
    "requestsPerSecond" false "number" "Requests that one node may make a second, in the long run."
        set(c, v) { c.requests_per_second = number(v, 1, 100_000)?; }
        get(c) vec![c.requests_per_second.to_string()];
    "requestBurst" false "number" "Requests that one node may make at once."
        set(c, v) { c.request_burst = number(v, 1, 100_000)?; }
        get(c) vec![c.request_burst.to_string()];
    "logLevel" false "directives" "Levels of the log: error, warn, info, debug, trace, or tracing's directives."
        set(c, v) {
            let value = one(v)?;
            if tracing_subscriber::EnvFilter::builder().parse(value).is_err() {
                return Err(format!("{:?} is not a log level; write error, warn, info, debug or trace", shorten(value)));
            }
            c.log_level = value.into();
        }
        get(c) vec![c.log_level.clone()];
    "logFormat" false "text|json" "How log lines are written."
        set(c, v) { c.log_format = LogFormat::parse(one(v)?)?; }
        get(c) vec![c.log_format.as_str().into()];
}

impl AuthorityConfig {
    /// Merges the file (if any), the environment's `SIGNET_*` and flags (name without `--`,
    /// value), weakest first.
    ///
    /// # Errors
    /// The first key that is unknown, does not parse, is missing or does not fit another.
    pub fn load(
        file: Option<PathBuf>,
        env: &[(String, String)],
        flags: &[(String, String)],
    ) -> Result<Self, ConfigError> {
        let mut config = Self::default();
        if let Some(path) = file {
            let text = read_bounded(&path)?;
            config.apply_file(&text).map_err(|fault| ConfigError::File { path, fault })?;
        }
        for (name, value) in env {
            if !name.starts_with("SIGNET_")
                || OTHER_ENV.contains(&name.as_str())
                || is_service_link(name)
            {
                continue;
            }
            let Some(setting) = SETTINGS.iter().find(|s| s.env() == *name) else {
                let known: Vec<String> = SETTINGS.iter().map(Setting::env).collect();
                let known: Vec<&str> = known.iter().map(String::as_str).collect();
                let otherwise = "unset it; signet authority --help lists the variables";
                return Err(ConfigError::UnknownEnv {
                    name: shorten(name),
                    remedy: remedy(name, &known, otherwise),
                });
            };
            (setting.set)(&mut config, &setting.split(value))
                .map_err(|message| ConfigError::Env { name: name.clone(), message })?;
        }
        for setting in SETTINGS {
            let name = setting.flag();
            let given: Vec<Vec<String>> = flags
                .iter()
                .filter(|(flag, _)| *flag == name)
                .map(|(_, value)| setting.split(value))
                .collect();
            // Lists add up, else the last one counts.
            let values = match given.split_last() {
                None => continue,
                Some(_) if setting.list => given.concat(),
                Some((last, _)) => last.clone(),
            };
            (setting.set)(&mut config, &values)
                .map_err(|message| ConfigError::Flag { name, message })?;
        }
        config.check()?;
        Ok(config)
    }

    fn apply_file(&mut self, text: &str) -> Result<(), Fault> {
        let Some(root) = yaml::parse_one(text)? else { return Ok(()) };
        let names: Vec<&str> = SETTINGS.iter().map(|s| s.name).collect();
        root.known_fields(&names, |name, node| {
            let Some(setting) = SETTINGS.iter().find(|s| s.name == name) else {
                return Err(node.fault("unknown field"));
            };
            let values = match &node.value {
                Value::List(_) if setting.list => node.list(1024, scalar)?,
                Value::Null => return Ok(()),
                _ => setting.split(&scalar(node)?),
            };
            (setting.set)(self, &values).map_err(|message| node.fault(message))
        })
    }

    /// Keys that need or exclude each other.
    fn check(&self) -> Result<(), ConfigError> {
        let missing = |key, remedy| Err(ConfigError::Missing { key, remedy });
        match (&self.store_dir, &self.store_secret) {
            (None, None) => {
                return missing(
                    "storeDir",
                    "say where the root is kept with --store-dir or --store-secret",
                );
            }
            (Some(_), Some(_)) => {
                return missing("storeSecret", "cannot be given beside storeDir: leave one out");
            }
            _ => {}
        }
        if self.cluster_dir.is_some() != self.node_token_dir.is_some() {
            return missing(
                "nodeTokenDir",
                "clusterDir and nodeTokenDir belong together: give both, or neither to use the Kubernetes API",
            );
        }
        if self.web_cert_file.is_some() != self.web_key_file.is_some() {
            return missing("webKeyFile", "webCertFile and webKeyFile belong together");
        }
        if self.oidc_issuer.is_some() && self.web_listen.is_none() {
            return missing("webListen", "with oidcIssuer, say where discovery is served");
        }
        if self.names.is_empty() {
            return missing("names", "give the DNS name or address by which agents dial");
        }
        if self.max_ttl < self.svid_ttl {
            return missing("maxTtl", "must not be shorter than svidTtl");
        }
        if self.intermediate_ttl < self.max_ttl * 2 {
            return missing(
                "intermediateTtl",
                "must be at least twice maxTtl, so that no leaf outlives it",
            );
        }
        Ok(())
    }

    /// Every key with its value, itself valid YAML.
    pub fn print(&self) -> String {
        SETTINGS.iter().map(|s| format!("{}: {}\n", s.name, s.show(self))).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn flags(list: &[(&str, &str)]) -> Vec<(String, String)> {
        list.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect()
    }

    fn load(list: &[(&str, &str)]) -> Result<AuthorityConfig, ConfigError> {
        AuthorityConfig::load(None, &[], &flags(list))
    }

    #[test]
    fn what_is_printed_is_read_again() {
        let given = [
            ("store-secret", "signet-system/root"),
            ("names", "a.example"),
            ("names", "10.0.0.1"),
            ("node-accounts", "a/b,c/d"),
            ("svid-ttl", "20s"),
            ("listen", "127.0.0.1:0"),
            ("bundle-file", "/tmp/bundle.pem"),
        ];
        let config = load(&given).unwrap();
        assert_eq!(config.names, ["a.example", "10.0.0.1"]);
        assert_eq!(config.node_accounts.len(), 2);
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("authority.yaml");
        std::fs::write(&file, config.print()).unwrap();
        assert_eq!(AuthorityConfig::load(Some(file), &[], &[]).unwrap(), config);
    }

    #[test]
    fn later_sources_win_and_unknown_keys_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("authority.yaml");
        std::fs::write(&file, "storeDir: /a\naudience: file\nsvidTtl: 1m\n").unwrap();
        let env = flags(&[("SIGNET_AUDIENCE", "env"), ("SIGNET_SVID_TTL", "2m")]);
        let config =
            AuthorityConfig::load(Some(file.clone()), &env, &flags(&[("svid-ttl", "3m")])).unwrap();
        assert_eq!((config.audience.as_str(), config.svid_ttl), ("env", Duration::from_secs(180)));
        let env = flags(&[("SIGNET_AUDIENC", "env")]);
        let error = AuthorityConfig::load(Some(file.clone()), &env, &[]).unwrap_err().to_string();
        assert!(error.contains("did you mean SIGNET_AUDIENCE"), "{error}");
        std::fs::write(&file, "storeDir: /a\n\naudienc: file\n").unwrap();
        let error = AuthorityConfig::load(Some(file), &[], &[]).unwrap_err().to_string();
        assert!(error.contains("authority.yaml:3") && error.contains("audienc"), "{error}");
    }

    #[test]
    fn keys_that_do_not_fit_each_other() {
        let store = ("store-dir", "/a");
        assert!(load(&[store]).is_ok());
        for (wrong, says) in [
            (vec![], "--store-dir"),
            (vec![store, ("store-secret", "a/b")], "leave one out"),
            (vec![store, ("cluster-dir", "/c")], "belong together"),
            (vec![store, ("svid-ttl", "20h"), ("max-ttl", "1h")], "svidTtl"),
            (vec![store, ("intermediate-ttl", "30h")], "twice maxTtl"),
            (vec![store, ("listen", "here")], "0.0.0.0:15012"),
            (vec![store, ("oidc-issuer", "http://a.example")], "https://"),
            (vec![store, ("oidc-issuer", "https://a.example?x")], "without query"),
            (vec![store, ("oidc-issuer", "https://a.example")], "where discovery is served"),
            (vec![store, ("web-key-file", "/k")], "belong together"),
            (vec![("store-secret", "noslash")], "<namespace>/<name>"),
        ] {
            let error = load(&wrong).unwrap_err().to_string();
            assert!(error.contains(says), "{wrong:?}: {error}");
        }
    }
}
