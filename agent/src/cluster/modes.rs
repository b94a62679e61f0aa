//! The rules of labels (DESIGN §2): which mode a namespace and a pod are in.
//!
//! An unknown value keeps the last valid one of the same object and is reported; with none,
//! the tightest holds. Pure, but for the memory of last valid values.

use std::{
    collections::{HashMap, HashSet},
    sync::Arc,
};

use http::HeaderName;
use signet_ebpf::abi::Mode;

use super::{
    model::{ExemptPort, IdentityHeaders, ModeOrigin, Namespace, PodUid},
    objects::{LABEL_PREFIX, Labels, NamespaceFacts, PodFacts},
};
use crate::config::yaml::{nearest, shorten};

/// Label: a namespace's or pod's mode.
pub const MODE: &str = "signet.dev/mode";
/// Label: pods may loosen the mode themselves.
pub const ALLOW_POD_OVERRIDE: &str = "signet.dev/allow-pod-override";
/// Label: what passes where no ALLOW selects.
pub const DEFAULT: &str = "signet.dev/default";
/// Label: how flows between pods of one node travel.
pub const SAME_NODE: &str = "signet.dev/same-node";
/// Annotation: ports that take plaintext in strict.
pub const EXEMPT_PORTS: &str = "signet.dev/exempt-inbound-ports";

/// Annotation: which headers tell applications who their client is.
pub const IDENTITY_HEADERS: &str = "signet.dev/identity-headers";

/// Ports in one [`EXEMPT_PORTS`].
const MAX_EXEMPT_PORTS: usize = 64;

/// A label or annotation that was not understood or not followed.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct LabelFault {
    /// The label's or annotation's key.
    pub key: Arc<str>,
    /// Value and remedy.
    pub message: String,
}

/// A mode's name.
pub const fn mode_name(mode: Mode) -> &'static str {
    match mode {
        Mode::Off => "off",
        Mode::Observe => "observe",
        Mode::Permissive => "permissive",
        Mode::Strict => "strict",
    }
}

fn parse_mode(text: &str) -> Result<Mode, String> {
    match text {
        "off" => Ok(Mode::Off),
        "observe" => Ok(Mode::Observe),
        "permissive" => Ok(Mode::Permissive),
        "strict" => Ok(Mode::Strict),
        other => Err(format!(
            "{:?} is not a mode; write off, observe, permissive or strict",
            shorten(other)
        )),
    }
}

fn parse_flag(text: &str) -> Result<bool, String> {
    match text {
        "true" => Ok(true),
        "false" => Ok(false),
        other => Err(format!("{:?} is not \"true\" or \"false\"", shorten(other))),
    }
}

fn parse_default(text: &str) -> Result<bool, String> {
    match text {
        "allow" => Ok(false),
        "deny" => Ok(true),
        other => Err(format!("{:?} is not a default; write allow or deny", shorten(other))),
    }
}

/// `9090,8443/tcp`; without a protocol, TCP.
fn parse_exempt(text: &str) -> Result<Arc<[ExemptPort]>, String> {
    let mut ports = Vec::new();
    for item in text.split(',').map(str::trim).filter(|item| !item.is_empty()) {
        let (number, protocol) = item.split_once('/').unwrap_or((item, "tcp"));
        let protocol = match protocol.to_ascii_lowercase().as_str() {
            "tcp" => Some(6),
            "udp" => Some(17),
            _ => None,
        };
        match (number.parse::<u16>(), protocol) {
            (Ok(port), Some(protocol)) if port != 0 => ports.push(ExemptPort { port, protocol }),
            _ => {
                return Err(format!(
                    "{:?} is not a port; write ports like 9090,8443/tcp",
                    shorten(item)
                ));
            }
        }
    }
    if ports.len() > MAX_EXEMPT_PORTS {
        return Err(format!("{} ports; {MAX_EXEMPT_PORTS} is the most", ports.len()));
    }
    ports.sort_by_key(|p| (p.port, p.protocol));
    ports.dedup();
    Ok(ports.into())
}

/// What is wrong with a Namespace's labels and annotations by themselves.
pub fn check_namespace(labels: &Labels, annotations: &Labels) -> Vec<LabelFault> {
    let mut faults = Vec::new();
    let mut check = |map: &Labels, key: &str, wrong: Option<String>| {
        if map.contains_key(key)
            && let Some(message) = wrong
        {
            faults.push(LabelFault { key: key.into(), message });
        }
    };
    let value = |map: &Labels, key: &str| map.get(key).cloned().unwrap_or_default();
    check(labels, MODE, parse_mode(&value(labels, MODE)).err());
    check(labels, ALLOW_POD_OVERRIDE, parse_flag(&value(labels, ALLOW_POD_OVERRIDE)).err());
    check(labels, DEFAULT, parse_default(&value(labels, DEFAULT)).err());
    check(labels, SAME_NODE, check_same_node(&value(labels, SAME_NODE)));
    check(annotations, EXEMPT_PORTS, parse_exempt(&value(annotations, EXEMPT_PORTS)).err());
    let headers = parse_identity_headers(&value(annotations, IDENTITY_HEADERS)).err();
    check(annotations, IDENTITY_HEADERS, headers);
    let known = [MODE, ALLOW_POD_OVERRIDE, DEFAULT, SAME_NODE];
    faults.extend(unknown_keys(labels, &known, "label"));
    let known = [EXEMPT_PORTS, IDENTITY_HEADERS];
    faults.extend(unknown_keys(annotations, &known, "annotation"));
    faults
}

/// What is wrong with a Pod's labels by themselves.
pub fn check_pod(labels: &Labels) -> Vec<LabelFault> {
    let mut faults = Vec::new();
    if let Some(Err(message)) = labels.get(MODE).map(|value| parse_mode(value)) {
        faults.push(LabelFault { key: MODE.into(), message });
    }
    faults.extend(unknown_keys(labels, &[MODE], "label"));
    faults
}

fn check_same_node(value: &str) -> Option<String> {
    match value {
        // This version tunnels in both cases, which is the tighter of the two.
        "tunnel" | "kernel" => None,
        other => Some(format!("{:?} is not a way; write tunnel or kernel", shorten(other))),
    }
}

/// A slip in a key must not quietly mean "off".
fn unknown_keys<'a>(
    map: &'a Labels,
    known: &'a [&'a str],
    what: &'a str,
) -> impl Iterator<Item = LabelFault> + 'a {
    map.keys()
        .filter(move |key| key.starts_with(LABEL_PREFIX) && !known.contains(&key.as_ref()))
        .map(move |key| LabelFault {
            key: key.clone(),
            message: match nearest(key, known) {
                Some(near) => format!("unknown {what}; did you mean {near}?"),
                None => format!("unknown {what}; known are {}", known.join(", ")),
            },
        })
}

/// `xfcc`, the name of one header, or both.
fn parse_identity_headers(text: &str) -> Result<IdentityHeaders, String> {
    let mut headers = IdentityHeaders::default();
    for name in text.split(',').map(str::trim) {
        if name == "xfcc" {
            headers.client_cert = true;
            continue;
        }
        // An own header: none that means something to servers, in one spelling.
        let is_own = name.starts_with("x-")
            && name.len() <= 64
            && !name.starts_with("x-forwarded-")
            && name.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-');
        let own = HeaderName::from_bytes(name.as_bytes()).ok().filter(|_| is_own);
        let own = own.ok_or_else(|| {
            format!(
                "{:?} is neither xfcc nor the name of a header that begins with x-, in lower case",
                shorten(name)
            )
        })?;
        if headers.plain.replace(own).is_some() {
            return Err(format!("{:?} names two headers beside xfcc; write one", shorten(text)));
        }
    }
    Ok(headers)
}

/// Last valid values.
#[derive(Clone, Debug, Default)]
pub struct LabelMemory {
    /// What holds where no label says.
    default_deny: bool,
    namespaces: HashMap<Arc<str>, (Namespace, ModeOrigin)>,
    pods: HashMap<PodUid, Mode>,
}

impl LabelMemory {
    /// For a cluster whose namespaces allow or deny where their labels do not say.
    pub fn new(default_deny: bool) -> Self {
        Self { default_deny, ..Self::default() }
    }

    /// The namespace's state under its present labels.
    pub fn namespace(&mut self, facts: &NamespaceFacts) -> (Namespace, ModeOrigin) {
        let last = self.namespaces.get(&facts.name);
        let label = |key: &str| facts.labels.get(key).map(AsRef::as_ref);
        let annotation = |key: &str| facts.annotations.get(key).map(AsRef::as_ref);
        let (mode, origin) = match label(MODE).map(parse_mode) {
            None => (Mode::Off, ModeOrigin::Default),
            Some(Ok(mode)) => (mode, ModeOrigin::Namespace),
            Some(Err(_)) => match last {
                // An object that said nothing so far has no valid value to keep.
                Some((last, ModeOrigin::Namespace)) => (last.mode, ModeOrigin::Namespace),
                _ => (Mode::Strict, ModeOrigin::InvalidLabel),
            },
        };
        let last = last.map(|(namespace, _)| namespace);
        let namespace = Namespace {
            name: facts.name.clone(),
            mode,
            allow_pod_override: match label(ALLOW_POD_OVERRIDE).map(parse_flag) {
                None => false,
                Some(Ok(flag)) => flag,
                Some(Err(_)) => last.is_some_and(|last| last.allow_pod_override),
            },
            default_deny: match label(DEFAULT).map(parse_default) {
                None => self.default_deny,
                Some(Ok(deny)) => deny,
                Some(Err(_)) => last.is_none_or(|last| last.default_deny),
            },
            exempt_ports: match facts.annotations.get(EXEMPT_PORTS).map(|v| parse_exempt(v)) {
                None => Arc::from([]),
                Some(Ok(ports)) => ports,
                Some(Err(_)) => {
                    last.map_or_else(|| Arc::from([]), |last| last.exempt_ports.clone())
                }
            },
            identity_headers: match annotation(IDENTITY_HEADERS).map(parse_identity_headers) {
                None => IdentityHeaders::default(),
                Some(Ok(headers)) => headers,
                Some(Err(_)) => last.map(|last| last.identity_headers.clone()).unwrap_or_default(),
            },
            labels: facts.all_labels.clone(),
        };
        self.namespaces.insert(facts.name.clone(), (namespace.clone(), origin));
        (namespace, origin)
    }

    /// A namespace whose object is gone while pods are left in it: its last state.
    pub fn vanished_namespace(&self, name: &str) -> Option<(Namespace, ModeOrigin)> {
        self.namespaces.get(name).cloned()
    }

    /// The pod's mode under its namespace's, and a looser label that was ignored.
    pub fn pod(
        &mut self,
        facts: &PodFacts,
        namespace: Option<&(Namespace, ModeOrigin)>,
    ) -> (Mode, ModeOrigin, Option<LabelFault>) {
        let (base, origin, may_loosen) = match namespace {
            Some((namespace, origin)) => (namespace.mode, *origin, namespace.allow_pod_override),
            None => (Mode::Off, ModeOrigin::Default, false),
        };
        let Some(label) = facts.labels.get(MODE) else {
            self.pods.remove(&facts.uid);
            return (base, origin, None);
        };
        let (wanted, wanted_origin) = match parse_mode(label) {
            Ok(mode) => {
                self.pods.insert(facts.uid.clone(), mode);
                (mode, ModeOrigin::Pod)
            }
            Err(_) => match self.pods.get(&facts.uid) {
                Some(last) => (*last, ModeOrigin::Pod),
                None => (Mode::Strict, ModeOrigin::InvalidLabel),
            },
        };
        if wanted == base {
            return (base, origin, None);
        }
        if wanted > base || may_loosen {
            return (wanted, wanted_origin, None);
        }
        let ignored = LabelFault {
            key: MODE.into(),
            message: format!(
                "{:?} is looser than the namespace's {:?} and is ignored; label the Namespace \
                 {ALLOW_POD_OVERRIDE}: \"true\" to allow it",
                mode_name(wanted),
                mode_name(base)
            ),
        };
        (base, origin, Some(ignored))
    }

    /// Forgets objects that are gone.
    pub fn retain(&mut self, namespaces: &HashSet<Arc<str>>, pods: &HashSet<PodUid>) {
        self.namespaces.retain(|name, _| namespaces.contains(name));
        self.pods.retain(|uid, _| pods.contains(uid));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cluster::model::ObjectName;

    fn namespace(labels: &[(&str, &str)], annotations: &[(&str, &str)]) -> NamespaceFacts {
        let map = |pairs: &[(&str, &str)]| {
            pairs.iter().map(|(k, v)| ((*k).into(), (*v).into())).collect()
        };
        NamespaceFacts {
            name: "shop".into(),
            labels: map(labels),
            annotations: map(annotations),
            all_labels: map(labels),
            origin: "".into(),
        }
    }

    fn pod(mode: Option<&str>) -> PodFacts {
        PodFacts {
            uid: "u1".into(),
            name: ObjectName { namespace: "shop".into(), name: "p".into() },
            service_account: "default".into(),
            node: None,
            ips: vec![],
            labels: Arc::new(mode.map(|m| (MODE.into(), m.into())).into_iter().collect()),
            workload: None,
            host_network: false,
            finished: false,
            alive: true,
            mirror: false,
            terminating: false,
            created: 0,
            named_ports: Default::default(),
            unenforceable: None,
            captured: false,
            origin: "".into(),
        }
    }

    #[test]
    fn unknown_value_keeps_the_last_valid_one_else_strict() {
        let mut memory = LabelMemory::default();
        let bad = namespace(&[(MODE, "strikt")], &[]);
        let (ns, origin) = memory.namespace(&bad);
        assert_eq!((ns.mode, origin), (Mode::Strict, ModeOrigin::InvalidLabel));
        let (ns, _) = memory.namespace(&namespace(&[(MODE, "observe")], &[]));
        assert_eq!(ns.mode, Mode::Observe);
        let (ns, origin) = memory.namespace(&bad);
        assert_eq!((ns.mode, origin), (Mode::Observe, ModeOrigin::Namespace));
        // Still the last valid one after a second wrong value.
        assert_eq!(memory.namespace(&namespace(&[(MODE, "x")], &[])).0.mode, Mode::Observe);
        // No label is valid and means off; a wrong one after it has nothing to keep.
        assert_eq!(memory.namespace(&namespace(&[], &[])).0.mode, Mode::Off);
        assert_eq!(memory.namespace(&bad).0.mode, Mode::Strict);
    }

    #[test]
    fn other_labels_keep_their_last_value_else_the_tight_one() {
        let mut memory = LabelMemory::default();
        let bad = namespace(
            &[(DEFAULT, "maybe"), (ALLOW_POD_OVERRIDE, "yes")],
            &[(EXEMPT_PORTS, "http")],
        );
        let (ns, _) = memory.namespace(&bad);
        assert!(ns.default_deny && !ns.allow_pod_override && ns.exempt_ports.is_empty());
        let good = namespace(
            &[(DEFAULT, "allow"), (ALLOW_POD_OVERRIDE, "true")],
            &[(EXEMPT_PORTS, "9090, 8443/tcp,53/udp,9090/TCP")],
        );
        let (ns, _) = memory.namespace(&good);
        assert!(!ns.default_deny && ns.allow_pod_override);
        let ports: Vec<_> = ns.exempt_ports.iter().map(|p| (p.port, p.protocol)).collect();
        assert_eq!(ports, [(53, 17), (8443, 6), (9090, 6)]);
        let (kept, _) = memory.namespace(&bad);
        assert_eq!(Namespace { labels: ns.labels.clone(), ..kept }, ns);
    }

    #[test]
    fn the_cluster_s_default_holds_where_no_label_says() {
        for (default, label, wanted) in [
            (false, None, false),
            (true, None, true),
            (true, Some("allow"), false),
            (false, Some("deny"), true),
        ] {
            let mut memory = LabelMemory::new(default);
            let labels: Vec<_> = label.iter().map(|value| (DEFAULT, *value)).collect();
            assert_eq!(memory.namespace(&namespace(&labels, &[])).0.default_deny, wanted);
        }
    }

    #[test]
    fn pod_label_raises_only_unless_the_namespace_allows() {
        let modes = [Mode::Off, Mode::Observe, Mode::Permissive, Mode::Strict];
        for base in modes {
            for wanted in modes {
                for may_loosen in [false, true] {
                    let mut memory = LabelMemory::default();
                    let flag = if may_loosen { "true" } else { "false" };
                    let ns = memory.namespace(&namespace(
                        &[(MODE, mode_name(base)), (ALLOW_POD_OVERRIDE, flag)],
                        &[],
                    ));
                    let (mode, origin, fault) =
                        memory.pod(&pod(Some(mode_name(wanted))), Some(&ns));
                    let follows = wanted > base || may_loosen;
                    assert_eq!(mode, if follows { wanted } else { base });
                    assert_eq!(fault.is_some(), wanted < base && !may_loosen);
                    let by_pod = follows && wanted != base;
                    let expected = if by_pod { ModeOrigin::Pod } else { ModeOrigin::Namespace };
                    assert_eq!(origin, expected);
                }
            }
        }
    }

    #[test]
    fn pod_with_an_unknown_value() {
        let mut memory = LabelMemory::default();
        let ns = memory.namespace(&namespace(&[(MODE, "observe")], &[]));
        let (mode, origin, _) = memory.pod(&pod(Some("x")), Some(&ns));
        assert_eq!((mode, origin), (Mode::Strict, ModeOrigin::InvalidLabel));
        memory.pod(&pod(Some("permissive")), Some(&ns));
        let (mode, origin, _) = memory.pod(&pod(Some("x")), Some(&ns));
        assert_eq!((mode, origin), (Mode::Permissive, ModeOrigin::Pod));
        // Without a label it is the namespace's, and the memory is gone.
        assert_eq!(memory.pod(&pod(None), Some(&ns)).0, Mode::Observe);
        assert_eq!(memory.pod(&pod(Some("x")), Some(&ns)).0, Mode::Strict);
    }

    #[test]
    fn identity_headers_are_xfcc_and_one_other() {
        let read = |text| parse_identity_headers(text).map_err(drop);
        let plain = |name| Some(HeaderName::from_static(name));
        for (text, client_cert, own) in [
            ("xfcc", true, None),
            ("x-signet-identity", false, plain("x-signet-identity")),
            ("xfcc, x-caller", true, plain("x-caller")),
        ] {
            assert_eq!(read(text), Ok(IdentityHeaders { client_cert, plain: own }), "{text}");
        }
        let bad = ["", "host", "x-a, x-b", "X-Caller", "x_caller", "x-forwarded-for", "x-a b"];
        for text in bad {
            assert_eq!(read(text), Err(()), "{text}");
        }
        let mut memory = LabelMemory::default();
        let kept = |memory: &mut LabelMemory, text| {
            memory.namespace(&namespace(&[], &[(IDENTITY_HEADERS, text)])).0.identity_headers
        };
        assert!(kept(&mut memory, "xfcc").client_cert);
        assert!(kept(&mut memory, "nonsense").client_cert, "the last valid value is kept");
    }

    #[test]
    fn faults_name_key_value_and_remedy() {
        let facts = namespace(
            &[(MODE, "Strict"), ("signet.dev/mod", "strict"), (SAME_NODE, "fast")],
            &[(EXEMPT_PORTS, "0")],
        );
        let faults: Vec<String> = check_namespace(&facts.labels, &facts.annotations)
            .into_iter()
            .map(|f| format!("{}: {}", f.key, f.message))
            .collect();
        assert_eq!(
            faults,
            [
                "signet.dev/mode: \"Strict\" is not a mode; write off, observe, permissive or \
                 strict",
                "signet.dev/same-node: \"fast\" is not a way; write tunnel or kernel",
                "signet.dev/exempt-inbound-ports: \"0\" is not a port; write ports like \
                 9090,8443/tcp",
                "signet.dev/mod: unknown label; did you mean signet.dev/mode?",
            ]
        );
        let fine = namespace(&[(MODE, "strict")], &[]);
        assert!(check_namespace(&fine.labels, &fine.annotations).is_empty());
        assert_eq!(check_pod(&pod(Some("x")).labels).len(), 1);
    }
}
