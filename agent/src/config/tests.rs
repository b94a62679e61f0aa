use super::*;

fn sources(env: &[(&str, &str)], flags: &[(&str, &str)]) -> ConfigSources {
    let own = |pairs: &[(&str, &str)]| {
        pairs.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect()
    };
    ConfigSources { file: Some("/etc/signet/agent.yaml".into()), env: own(env), flags: own(flags) }
}

#[test]
fn flags_go_before_env_before_file_before_defaults() {
    let file = "node: a\ntrustDomain: file.test\ninstance: file\nlimits:\n  openFlows: 5\n";
    let loaded = sources(
        &[("SIGNET_TRUST_DOMAIN", "env.test"), ("SIGNET_INSTANCE", "env"), ("PATH", "/bin")],
        &[("instance", "flag"), ("pod-ranges", "10.0.0.0/8"), ("pod-ranges", "fd00::/48,1.2.3.4")],
    )
    .load_with(Some(file))
    .unwrap();
    let config = &loaded.config;
    assert_eq!(config.node, "a");
    assert_eq!(config.trust_domain, "env.test");
    assert_eq!(config.instance, "flag");
    assert_eq!(config.limits.open_flows, 5);
    assert_eq!(config.pod_ranges.len(), 3);
    assert_eq!(loaded.origin("node").to_string(), "file /etc/signet/agent.yaml:1");
    assert_eq!(loaded.origin("trustDomain").to_string(), "env SIGNET_TRUST_DOMAIN");
    assert_eq!(loaded.origin("instance").to_string(), "flag --instance");
    assert_eq!(loaded.origin("bpffs").to_string(), "default");
    assert_eq!(loaded.origin("limits.openFlows").to_string(), "file /etc/signet/agent.yaml:5");
}

#[test]
fn what_is_printed_loads_again_to_the_same() {
    let loaded = sources(
        &[],
        &[
            ("node", "n1"),
            ("cluster-dir", "/c d"),
            ("probe-cgroups", "/kubelet.slice,/x"),
            ("svid-ttl", "90s"),
            ("cores", "2"),
            ("log-level", "info,signet::proxy=debug"),
            ("outside-ranges", "fd00::1"),
            ("limits-backlog", "7"),
        ],
    )
    .load_with(None)
    .unwrap();
    let again = sources(&[], &[]).load_with(Some(&loaded.print())).unwrap();
    assert_eq!(again.config, loaded.config);
}

#[test]
fn print_config_is_this() {
    let loaded = sources(&[("SIGNET_NODE", "n1")], &[("enforcement", "audit")])
        .load_with(Some("podRanges: [10.0.0.0/8]\n"))
        .unwrap();
    let printed = loaded.print();
    let line = |key: &str| {
        let line = printed.lines().find(|l| l.starts_with(&format!("{key}: "))).unwrap();
        line.split_whitespace().collect::<Vec<_>>().join(" ")
    };
    assert_eq!(line("node"), "node: n1 # env SIGNET_NODE");
    assert_eq!(line("enforcement"), "enforcement: audit # flag --enforcement");
    assert_eq!(line("podRanges"), "podRanges: [10.0.0.0/8] # file /etc/signet/agent.yaml:1");
    assert_eq!(line("svidTtl"), "svidTtl: 1h # default");
    assert_eq!(line("clusterDir"), "clusterDir: null # default");
    assert_eq!(printed.lines().count(), KEYS.len());
}

#[test]
fn errors_name_place_value_and_remedy() {
    let file = |text: &str| sources(&[], &[("node", "a")]).load_with(Some(text));
    let cases = [
        (
            file("trustDomian: x\n"),
            "/etc/signet/agent.yaml:1: trustDomian: unknown field; did you mean trustDomain?",
        ),
        (
            file("limits:\n  openFlow: 3\n"),
            "/etc/signet/agent.yaml:2: limits.openFlow: unknown field; did you mean openFlows?",
        ),
        (
            file("node: a\nunknownPods: maybe\n"),
            "/etc/signet/agent.yaml:2: unknownPods: \"maybe\" is not one of auto, deny, allow",
        ),
        (
            file("podRanges: [10.0.0.1/8]\n"),
            "/etc/signet/agent.yaml:1: podRanges: \"10.0.0.1/8\" has bits set behind its prefix; \
             write 10.0.0.0/8",
        ),
        (
            file("limits: {openFlows: 0}\n"),
            "/etc/signet/agent.yaml:1: limits.openFlows: \"0\" is not a whole number from 1 to \
             1000000",
        ),
        (
            file("runDir: relative\n"),
            "/etc/signet/agent.yaml:1: runDir: \"relative\" is not an absolute path",
        ),
        (
            sources(&[("SIGNET_SVID_TTL", "soon")], &[]).load_with(None),
            "environment variable SIGNET_SVID_TTL: \"soon\" is not a duration from 10s to 168h; \
             write it like 90s, 10m or 1h",
        ),
        (
            sources(&[("SIGNET_SVIDTTL", "1h")], &[]).load_with(None),
            "environment variable SIGNET_SVIDTTL: unknown; did you mean SIGNET_SVID_TTL?",
        ),
        (
            sources(&[], &[("trust-domain", "spiffe://x")]).load_with(None),
            "flag --trust-domain: \"spiffe://x\" is not a trust domain: 1 to 255 characters a-z, \
             0-9, ., - and _, without spiffe://",
        ),
        (
            sources(&[], &[("zzz", "1")]).load_with(None),
            "flag --zzz: unknown; signet agent --help lists the flags",
        ),
        (
            sources(&[], &[]).load_with(None),
            "node: not set; give this node's name with --node, SIGNET_NODE or node: in the file",
        ),
    ];
    for (result, wanted) in cases {
        assert_eq!(result.unwrap_err().to_string(), wanted);
    }
}

#[test]
fn broken_yaml_and_missing_files_are_one_line() {
    let error = sources(&[], &[]).load_with(Some("a: [1\n")).unwrap_err().to_string();
    assert!(error.starts_with("/etc/signet/agent.yaml:"), "{error}");
    assert!(error.contains("not valid YAML"), "{error}");
    assert_eq!(error.lines().count(), 1);
    let missing = ConfigSources { file: Some("/nonexistent/x".into()), ..sources(&[], &[]) };
    let error = missing.load().unwrap_err().to_string();
    assert!(error.starts_with("configuration file /nonexistent/x: cannot be read"), "{error}");
}

#[test]
fn service_links_of_kubernetes_are_not_configuration() {
    let env = [
        ("SIGNET_SERVICE_HOST", "10.0.0.1"),
        ("SIGNET_AUTHORITY_SERVICE_PORT_GRPC", "1"),
        ("SIGNET_PORT", "tcp://10.0.0.1:1"),
        ("SIGNET_PORT_15012_TCP_ADDR", "10.0.0.1"),
        ("SIGNET_SOCKET", "/x"),
        ("SIGNET_NODE", "a"),
    ];
    assert_eq!(sources(&env, &[]).load_with(None).unwrap().config.node, "a");
}

#[test]
fn every_key_has_its_own_names_and_round_trips() {
    let mut seen = std::collections::BTreeSet::new();
    let config = AgentConfig { node: "n".into(), ..AgentConfig::default() };
    for key in KEYS {
        assert!(seen.insert(key.env()) && seen.insert(key.flag()), "{}", key.name);
        assert!(!key.doc.is_empty() && !key.form.is_empty());
        let values = (key.get)(&config);
        if !values.is_empty() {
            let mut again = config.clone();
            (key.set)(&mut again, &values).unwrap();
            assert_eq!(again, config, "{}", key.name);
        }
    }
    let env = Key::by_name("limits.handshakesPerSource").unwrap();
    assert_eq!(env.env(), "SIGNET_LIMITS_HANDSHAKES_PER_SOURCE");
    assert_eq!(env.flag(), "limits-handshakes-per-source");
}

#[test]
fn live_keys_are_taken_over_and_the_rest_waits() {
    let old = AgentConfig { node: "n".into(), ..AgentConfig::default() };
    let mut new = old.clone();
    new.enforcement = Enforcement::Off;
    new.never_deny = vec!["a".into()];
    new.instance = "other".into();
    let changed: Vec<_> = old.changes(&new).into_iter().map(|(k, a)| (k.name, a)).collect();
    assert_eq!(
        changed,
        [("instance", Apply::Restart), ("enforcement", Apply::Live), ("neverDeny", Apply::Live)]
    );
    let merged = old.with_live_keys_of(&new);
    assert_eq!(merged.enforcement, Enforcement::Off);
    assert_eq!(merged.never_deny, ["a"]);
    assert_eq!(merged.instance, "default");
    // A list that became empty is taken over, too.
    assert_eq!(merged.with_live_keys_of(&old), old);
}

proptest::proptest! {
    #[test]
    fn loading_never_panics(text in ".{0,200}", flag in "[a-z-]{0,20}", value in ".{0,40}") {
        let _ = sources(&[], &[(&flag, &value)]).load_with(Some(&text));
    }

    #[test]
    fn no_value_of_any_key_panics(index in 0usize..30, value in ".{0,60}") {
        let key = &KEYS[index % KEYS.len()];
        let _ = sources(&[(&key.env(), &value)], &[]).load_with(None);
    }
}

/// Every configuration in `manifests/`, base and overlays, is one that the product reads.
#[test]
fn the_shipped_configurations_are_valid() {
    let manifests = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../manifests");
    let mut files = vec![manifests];
    let (mut agents, mut authorities) = (0, 0);
    while let Some(path) = files.pop() {
        if path.is_dir() {
            files.extend(std::fs::read_dir(&path).unwrap().map(|entry| entry.unwrap().path()));
            continue;
        }
        let Ok(text) = std::fs::read_to_string(&path) else { continue };
        if path.extension().is_none_or(|e| e != "yaml") || !text.contains("kind: ConfigMap") {
            continue;
        }
        for object in yaml::parse(&text).unwrap() {
            let Some(data) = object.get("data") else { continue };
            if let Some(file) = data.get("agent.yaml") {
                let sources = ConfigSources {
                    env: vec![("SIGNET_NODE".into(), "node-1".into())],
                    ..ConfigSources::default()
                };
                let loaded = sources.load_with(Some(file.text().unwrap()));
                let loaded = loaded.unwrap_or_else(|e| panic!("{}: {e}", path.display()));
                assert_eq!(loaded.config.authority, values::Authority::Grpc);
                agents += 1;
            }
            if let Some(file) = data.get("authority.yaml") {
                let copy = tempfile::NamedTempFile::new().unwrap();
                std::fs::write(copy.path(), file.text().unwrap()).unwrap();
                let loaded =
                    authority::AuthorityConfig::load(Some(copy.path().to_owned()), &[], &[]);
                let loaded = loaded.unwrap_or_else(|e| panic!("{}: {e}", path.display()));
                assert!(loaded.store_secret.is_some());
                authorities += 1;
            }
        }
    }
    // The control: they were found.
    assert!(agents >= 2 && authorities >= 1, "{agents} {authorities}");
}
