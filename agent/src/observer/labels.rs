//! A side's labels as Hubble names them, and Kubernetes' label selectors over them.
//!
//! Hubble's labels carry their source before a colon: `k8s:app=payments`, `reserved:world`.
//! A selector's key may name the source; without one, or with `any:`, every source counts.

use std::borrow::Cow;

use crate::flow::Party;

/// Requirements that one selector may have.
const MAX_REQUIREMENTS: usize = 64;

/// One label.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Label<'a> {
    /// `k8s`, `spiffe` or `reserved`.
    pub source: &'static str,
    /// The key.
    pub key: &'a str,
    /// The value; empty for reserved ones.
    pub value: Cow<'a, str>,
}

impl std::fmt::Display for Label<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}:{}", self.source, self.key)?;
        if self.source == "reserved" { Ok(()) } else { write!(f, "={}", self.value) }
    }
}

/// Every label of a side: the pod's own, its namespace and account under Cilium's keys, its
/// identity, and `reserved:world` for who is nobody that is known.
pub fn labels(party: &Party) -> impl Iterator<Item = Label<'_>> {
    let label = |source, key, value| Label { source, key, value: Cow::Borrowed(value) };
    let own = party.labels.iter().map(move |(key, value)| label("k8s", key, value));
    let space = party.pod.iter().map(move |(n, _)| label("k8s", "io.kubernetes.pod.namespace", n));
    let account = party
        .service_account
        .iter()
        .map(move |account| label("k8s", "io.cilium.k8s.policy.serviceaccount", account));
    let identity = party.identity.iter().map(move |i| label("spiffe", "id", i.as_str()));
    let is_world = party.pod.is_none() && party.identity.is_none();
    let world = is_world.then(|| label("reserved", "world", ""));
    own.chain(space).chain(account).chain(identity).chain(world)
}

/// A label selector: all of its requirements hold.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct LabelSelector(Vec<Requirement>);

#[derive(Clone, PartialEq, Eq, Debug)]
struct Requirement {
    source: Option<String>,
    key: String,
    test: Test,
}

#[derive(Clone, PartialEq, Eq, Debug)]
enum Test {
    Exists,
    Absent,
    In(Vec<String>),
    NotIn(Vec<String>),
}

impl LabelSelector {
    /// Reads Kubernetes' form: `app=payments,tier!=test,env in (a, b),region notin (c),x,!y`.
    /// `None` when it is not one.
    pub fn parse(text: &str) -> Option<Self> {
        let requirements: Vec<_> =
            split(text)?.into_iter().map(requirement).collect::<Option<_>>()?;
        (1..=MAX_REQUIREMENTS).contains(&requirements.len()).then_some(Self(requirements))
    }

    /// True when the side has such labels.
    pub fn matches(&self, party: &Party) -> bool {
        self.0.iter().all(|requirement| requirement.holds(party))
    }
}

impl Requirement {
    fn holds(&self, party: &Party) -> bool {
        let mut values = labels(party)
            .filter(|label| self.source.as_deref().is_none_or(|s| s == label.source))
            .filter(|label| label.key == self.key)
            .map(|label| label.value)
            .peekable();
        match &self.test {
            Test::Exists => values.peek().is_some(),
            Test::Absent => values.peek().is_none(),
            Test::In(wanted) => values.any(|value| wanted.iter().any(|w| **w == *value)),
            // As in Kubernetes, what has no such label is not in the set either.
            Test::NotIn(wanted) => values.all(|value| wanted.iter().all(|w| **w != *value)),
        }
    }
}

/// Parts between commas that are not in parentheses; `None` when these do not pair.
fn split(text: &str) -> Option<Vec<&str>> {
    let (mut parts, mut start, mut inside) = (Vec::new(), 0, false);
    for (at, c) in text.char_indices() {
        match c {
            '(' if inside => return None,
            ')' if !inside => return None,
            '(' | ')' => inside = c == '(',
            ',' if !inside => {
                parts.push(text.get(start..at)?);
                start = at + 1;
            }
            _ => {}
        }
    }
    parts.push(text.get(start..)?);
    (!inside).then_some(parts)
}

fn requirement(text: &str) -> Option<Requirement> {
    let text = text.trim();
    let made = |key: &str, test| {
        let (source, key) = match key.trim().split_once(':') {
            Some(("any", key)) => (None, key),
            Some((source, key)) => (Some(source.to_owned()), key),
            None => (None, key.trim()),
        };
        let is_word = |s: &str| !s.is_empty() && !s.contains(|c: char| " \t()!=:".contains(c));
        (is_word(key) && source.as_deref().is_none_or(is_word)).then(|| Requirement {
            source,
            key: key.to_owned(),
            test,
        })
    };
    let one = |value: &str| is_value(value.trim()).then(|| vec![value.trim().to_owned()]);
    if let Some(key) = text.strip_prefix('!') {
        return made(key, Test::Absent);
    }
    if let Some(set) = text.strip_suffix(')') {
        let (head, values) = set.split_once('(')?;
        let values: Vec<_> = values.split(',').map(|v| v.trim().to_owned()).collect();
        let is_set = values.iter().all(|v| is_value(v));
        let (key, operator) = head.trim().rsplit_once(char::is_whitespace)?;
        return match operator {
            "in" if is_set => made(key, Test::In(values)),
            "notin" if is_set => made(key, Test::NotIn(values)),
            _ => None,
        };
    }
    if let Some((key, value)) = text.split_once("!=") {
        return made(key, Test::NotIn(one(value)?));
    }
    if let Some((key, value)) = text.split_once("==").or_else(|| text.split_once('=')) {
        return made(key, Test::In(one(value)?));
    }
    made(text, Test::Exists)
}

/// A SPIFFE ID is a value here, too.
fn is_value(s: &str) -> bool {
    !s.contains(|c: char| " \t()!=,".contains(c))
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::flow::{KnownBy, example::party};

    fn payments() -> Party {
        let labels = [("app", "payments"), ("tier", "gold")];
        Party {
            labels: Arc::new(labels.map(|(k, v)| (k.into(), v.into())).into()),
            ..party("shop/payments-5b7f", KnownBy::Kernel, "10.0.2.7:8080")
        }
    }

    #[test]
    fn labels_are_written_as_hubble_writes_them() {
        let shown: Vec<_> = labels(&payments()).map(|l| l.to_string()).collect();
        assert_eq!(
            shown,
            [
                "k8s:app=payments",
                "k8s:tier=gold",
                "k8s:io.kubernetes.pod.namespace=shop",
                "k8s:io.cilium.k8s.policy.serviceaccount=payments",
                "spiffe:id=spiffe://cluster.local/ns/shop/sa/payments",
            ]
        );
        let nobody = Party::unknown("10.9.0.7:1".parse().unwrap());
        assert_eq!(labels(&nobody).map(|l| l.to_string()).collect::<Vec<_>>(), ["reserved:world"]);
    }

    #[test]
    fn selectors_hold_as_in_kubernetes() {
        let party = payments();
        for (text, holds) in [
            ("app=payments", true),
            ("app==payments", true),
            ("app = payments", true),
            ("app=other", false),
            ("app!=other", true),
            ("app!=payments", false),
            ("absent!=x", true),
            ("app", true),
            ("!app", false),
            ("absent", false),
            ("!absent", true),
            ("app in (a, payments)", true),
            ("app in (a,b)", false),
            ("app notin (a,b)", true),
            ("app notin (payments)", false),
            ("absent notin (x)", true),
            ("app=payments,tier=gold", true),
            ("app=payments,tier=silver", false),
            ("app in (payments),tier notin (silver, bronze)", true),
            ("k8s:app=payments", true),
            ("any:app=payments", true),
            ("reserved:app=payments", false),
            ("spiffe:id=spiffe://cluster.local/ns/shop/sa/payments", true),
            ("io.kubernetes.pod.namespace=shop", true),
            ("reserved:world", false),
        ] {
            let selector = LabelSelector::parse(text).unwrap_or_else(|| panic!("{text}"));
            assert_eq!(selector.matches(&party), holds, "{text}");
        }
        let world = LabelSelector::parse("reserved:world").unwrap();
        assert!(world.matches(&Party::unknown("10.9.0.7:1".parse().unwrap())));
    }

    #[test]
    fn what_is_no_selector_is_refused() {
        for text in [
            "",
            ",",
            "app=a,",
            "=a",
            "app in",
            "app in (",
            "app in )",
            "app in ((a))",
            "app on (a)",
            "in (a)",
            "a b",
            "app=a b",
            "!",
            "!=a",
            ":a",
            "k8s:",
            "app=(a",
            "a:b:c=d",
        ] {
            assert_eq!(LabelSelector::parse(text), None, "{text}");
        }
        let many = vec!["a"; MAX_REQUIREMENTS + 1].join(",");
        assert_eq!(LabelSelector::parse(&many), None);
        assert!(LabelSelector::parse(&vec!["a"; MAX_REQUIREMENTS].join(",")).is_some());
    }

    proptest::proptest! {
        #[test]
        fn no_text_makes_it_panic(text in "[a-z:!=(), ]{0,40}") {
            let _ = LabelSelector::parse(&text).map(|s| s.matches(&payments()));
        }
    }
}
