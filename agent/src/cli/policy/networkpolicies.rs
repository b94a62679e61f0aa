//! `signet policy suggest --from-networkpolicies`: what a namespace's NetworkPolicies let in, as
//! policies on identities.

use std::collections::BTreeSet;

use super::suggest::{Form, comment, quoted};
use crate::{
    cli::{
        exit::{Exit, Failure, print},
        sockets::{self, SocketArgs},
    },
    proto::admin::{
        PortRange, TranslateNetworkPoliciesRequest, TranslatedPeer, TranslatedPolicy,
        TranslatedRule, admin_client::AdminClient,
    },
};

/// Single ports that a range may become where ranges cannot be written.
const MOST_SINGLE: u32 = 64;

/// Asks the first agent (each knows the whole cluster) and prints.
pub async fn run(sockets: &SocketArgs, namespace: &str, istio: bool) -> Result<Exit, Failure> {
    let (agents, _) = sockets::connect_all(sockets).await?;
    let Some(agent) = agents.first() else {
        return Err(Failure::new(Exit::Unreachable, "no agent was asked"));
    };
    let mut client = AdminClient::new(agent.channel.clone());
    let request = TranslateNetworkPoliciesRequest { namespace: namespace.into() };
    let answer = sockets::within_time(agent, client.translate_network_policies(request)).await?;
    let form = if istio { Form::Istio { domain: answer.trust_domain } } else { Form::Native };
    let (text, written) = write(&answer.policies, namespace, &form);
    print(&text)?;
    if answer.policies.is_empty() {
        anstream::eprintln!("no NetworkPolicy of the namespace {namespace} is known");
    }
    Ok(if written > 0 { Exit::Done } else { Exit::No })
}

/// All of them as documents of one file, and how many.
fn write(policies: &[TranslatedPolicy], namespace: &str, form: &Form) -> (String, usize) {
    let (mut out, mut written) = (String::new(), 0);
    for policy in policies {
        let (comments, document) = write_one(policy, namespace, form);
        if !document.is_empty() {
            if written > 0 {
                out.push_str("---\n");
            }
            written += 1;
        }
        out.push_str(&comments);
        out.push_str(&document);
    }
    (out, written)
}

/// Comments and, where it is translated, a document.
fn write_one(policy: &TranslatedPolicy, namespace: &str, form: &Form) -> (String, String) {
    let mut comments =
        format!("# NetworkPolicy {}/{}\n", comment(namespace), comment(&policy.name));
    let mut remark = |text: &str| comments.push_str(&format!("# - {}\n", comment(text)));
    policy.remarks.iter().for_each(|text| remark(text));
    if !policy.is_translated {
        return (comments, String::new());
    }
    let mut rules = String::new();
    for rule in &policy.rules {
        match form {
            Form::Native => rules.push_str(&native(rule)),
            Form::Istio { .. } if rule.udp => remark("not translated: UDP"),
            Form::Istio { domain } => match istio(rule, domain) {
                Ok(text) => rules.push_str(&text),
                Err(why) => remark(&why),
            },
        }
    }
    let (version, kind, action, field) = match form {
        Form::Native => ("signet.dev/v1alpha1", "IdentityPolicy", "Allow", "ingress"),
        Form::Istio { .. } => ("security.istio.io/v1", "AuthorizationPolicy", "ALLOW", "rules"),
    };
    let mut document = format!(
        "apiVersion: {version}\nkind: {kind}\nmetadata:\n  name: {}\n  namespace: {}\nspec:\n",
        quoted(&policy.name),
        quoted(namespace)
    );
    let mut labels: Vec<_> = policy.selector.iter().collect();
    labels.sort();
    if !labels.is_empty() {
        document.push_str("  selector:\n    matchLabels:\n");
        for (label, value) in labels {
            document.push_str(&format!("      {}: {}\n", quoted(label), quoted(value)));
        }
    }
    document.push_str(&format!("  action: {action}\n"));
    match (rules.is_empty(), form) {
        (false, _) => document.push_str(&format!("  {field}:\n{rules}")),
        // Nobody comes in: an ALLOW that matches nothing.
        (true, Form::Native) => document.push_str("  ingress: []\n"),
        (true, Form::Istio { .. }) => {}
    }
    (comments, document)
}

fn list<'a>(values: impl IntoIterator<Item = &'a String>) -> String {
    values.into_iter().map(|value| quoted(value)).collect::<Vec<_>>().join(", ")
}

fn native(rule: &TranslatedRule) -> String {
    let mut fields = Vec::new();
    if !rule.peers.is_empty() {
        let mut from = "from:\n".to_owned();
        for peer in &rule.peers {
            let TranslatedPeer { namespaces, accounts, block, except } = peer;
            let mut peer = Vec::new();
            if !namespaces.is_empty() {
                peer.push(format!("namespaces: [{}]", list(namespaces)));
            }
            if !accounts.is_empty() {
                peer.push(format!("serviceAccounts: [{}]", list(accounts)));
            }
            if !block.is_empty() {
                peer.push(format!("ipBlocks: [{}]", quoted(block)));
            }
            if !except.is_empty() {
                peer.push(format!("notIpBlocks: [{}]", list(except)));
            }
            from.push_str(&format!("    - {{{}}}\n", peer.join(", ")));
        }
        fields.push(from);
    }
    if !rule.ports.is_empty() {
        let protocol = if rule.udp { "UDP" } else { "TCP" };
        let mut ports = "ports:\n".to_owned();
        for PortRange { first, last } in &rule.ports {
            let end = if first == last { String::new() } else { format!(", endPort: {last}") };
            ports.push_str(&format!("    - {{port: {first}{end}, protocol: {protocol}}}\n"));
        }
        fields.push(ports);
    }
    if rule.udp {
        fields.push(
            "# No tunnel carries UDP: callers are known by their address alone.\n    \
             unauthenticated: true\n"
                .into(),
        );
    }
    if fields.is_empty() {
        return "  - {}\n".into();
    }
    let mut out = String::new();
    for (index, field) in fields.iter().enumerate() {
        out.push_str(if index == 0 { "  - " } else { "    " });
        out.push_str(field);
    }
    out
}

/// The error says why it cannot be written.
fn istio(rule: &TranslatedRule, domain: &str) -> Result<String, String> {
    let mut ports = BTreeSet::new();
    let every = rule.ports.iter().any(|range| (range.first, range.last) == (1, 65_535));
    if !every {
        for PortRange { first, last } in &rule.ports {
            if last - first >= MOST_SINGLE {
                return Err(format!("not translated: ports {first} to {last}: too wide a range"));
            }
            ports.extend((*first..=*last).map(|port| format!("\"{port}\"")));
        }
    }
    let mut fields = Vec::new();
    if !rule.peers.is_empty() {
        let mut from = "from:\n".to_owned();
        for peer in &rule.peers {
            let TranslatedPeer { namespaces, accounts, block, except } = peer;
            from.push_str("    - source:\n");
            let principals = accounts.iter().filter_map(|account| {
                let (namespace, name) = account.split_once('/')?;
                Some(format!("{domain}/ns/{namespace}/sa/{name}"))
            });
            let principals: Vec<String> = principals.collect();
            let blocks: Vec<String> =
                Some(block.clone()).filter(|b| !b.is_empty()).into_iter().collect();
            for (field, values) in [
                ("namespaces", namespaces),
                ("principals", &principals),
                ("ipBlocks", &blocks),
                ("notIpBlocks", except),
            ] {
                if !values.is_empty() {
                    from.push_str(&format!("        {field}: [{}]\n", list(values)));
                }
            }
        }
        fields.push(from);
    }
    if !ports.is_empty() {
        let ports: Vec<String> = ports.into_iter().collect();
        fields.push(format!("to:\n    - operation:\n        ports: [{}]\n", ports.join(", ")));
    }
    if fields.is_empty() {
        return Ok("  - {}\n".into());
    }
    Ok(format!("  - {}", fields.join("    ")))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::policy::validate::validate;

    fn rule(peers: &[TranslatedPeer], ports: &[(u32, u32)], udp: bool) -> TranslatedRule {
        let ports = ports.iter().map(|&(first, last)| PortRange { first, last });
        TranslatedRule { peers: peers.to_vec(), ports: ports.collect(), udp }
    }

    fn policy(name: &str, rules: Vec<TranslatedRule>) -> TranslatedPolicy {
        TranslatedPolicy {
            name: name.into(),
            selector: [("app".into(), name.into())].into(),
            is_translated: true,
            rules,
            remarks: vec!["left out: something".into()],
        }
    }

    fn policies() -> Vec<TranslatedPolicy> {
        let accounts = TranslatedPeer {
            accounts: vec!["ops/cron".into(), "shop/web".into()],
            ..TranslatedPeer::default()
        };
        let spaces = TranslatedPeer { namespaces: vec!["ops".into()], ..TranslatedPeer::default() };
        let block = TranslatedPeer {
            block: "192.0.2.0/24".into(),
            except: vec!["192.0.2.9/32".into()],
            ..TranslatedPeer::default()
        };
        let all = [accounts, spaces, block];
        let whole = TranslatedPolicy { is_translated: false, ..policy("whole", vec![]) };
        let mut every = policy("every", vec![rule(&[], &[], false)]);
        every.selector.clear();
        vec![
            policy("db", vec![rule(&all, &[(5432, 5432), (8000, 8002)], false)]),
            policy("dns", vec![rule(&all[..1], &[(53, 53)], true), rule(&[], &[(80, 80)], false)]),
            whole,
            policy("nobody", vec![]),
            every,
        ]
    }

    #[test]
    fn what_is_written_is_understood_without_a_complaint() {
        let istio = Form::Istio { domain: "cluster.local".into() };
        for form in [Form::Native, istio] {
            let ((text, written), mut found) = (write(&policies(), "shop", &form), Vec::new());
            let read = validate("suggested.yaml".as_ref(), &text, "istio-system", &mut found);
            let understood = found.iter().all(|found| !found.is_fault);
            assert!(read == 4 && written == 4 && understood, "{found:?} in\n{text}");
            assert!(
                text.contains("# NetworkPolicy shop/whole\n# - left out: something\n"),
                "{text}"
            );
        }
    }

    #[test]
    fn peers_and_ports_as_both_write_them() {
        let (text, _) = write(&policies(), "shop", &Form::Native);
        for line in [
            "    - {serviceAccounts: [\"ops/cron\", \"shop/web\"]}",
            "    - {namespaces: [\"ops\"]}",
            "    - {ipBlocks: [\"192.0.2.0/24\"], notIpBlocks: [\"192.0.2.9/32\"]}",
            "    - {port: 8000, endPort: 8002, protocol: TCP}",
            "    - {port: 53, protocol: UDP}",
            "    unauthenticated: true",
            "  - ports:",
            "  ingress: []",
            "  - {}",
        ] {
            assert!(text.lines().any(|l| l == line), "{line} is not in\n{text}");
        }
        let form = Form::Istio { domain: "cluster.local".into() };
        let (text, _) = write(&policies(), "shop", &form);
        for line in [
            "        principals: [\"cluster.local/ns/ops/sa/cron\", \"cluster.local/ns/shop/sa/web\"]",
            "        notIpBlocks: [\"192.0.2.9/32\"]",
            "        ports: [\"5432\", \"8000\", \"8001\", \"8002\"]",
            "# - not translated: UDP",
        ] {
            assert!(text.lines().any(|l| l == line), "{line} is not in\n{text}");
        }
        let wide = policy("wide", vec![rule(&[], &[(1000, 2000)], false)]);
        let (text, _) = write(&[wide], "shop", &form);
        // The range is left out and said, and what is left lets nobody in.
        assert!(text.contains("# - not translated: ports 1000 to 2000"), "{text}");
        assert!(!text.contains("rules:"), "{text}");
    }
}
