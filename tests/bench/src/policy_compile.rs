//! Policies at three sizes: reading them, what a node's pods' kernel entries take to compile,
//! and what one changed policy costs. Pure: no kernel, no agent.

use std::{collections::BTreeMap, fmt::Write as _, hint::black_box, sync::Arc, time::Instant};

use anyhow::{Context, Result, ensure};
use signet::{
    config::yaml,
    policy::{
        compile::{CompileInput, PolicyEntry, compile},
        model::{Policy, PolicySet},
        native,
    },
    spiffe::{SpiffeId, TrustDomain},
};

use crate::results::{Results, SIGNET};

/// (policies, service accounts): ten policies a workload at the largest.
const SIZES: [(usize, usize); 3] = [(100, 10), (1_000, 100), (10_000, 1_000)];
/// Accounts of one namespace, each with a workload of its own.
const PER_NAMESPACE: usize = 10;
/// Pods of one node.
const PODS: usize = 100;
/// Bytes of a trie node beside key and value, about.
const NODE: usize = 40;

/// One cluster's worth of policies.
struct Size {
    policies: usize,
    accounts: usize,
    set: PolicySet,
    identities: Vec<(u32, SpiffeId)>,
}

pub fn run(quick: bool, results: &mut Results) -> Result<()> {
    let sizes = if quick { &SIZES[..2] } else { &SIZES[..] };
    let rounds = if quick { 1 } else { 3 };
    for &(policies, accounts) in sizes {
        let yaml = yaml(policies, accounts);
        for round in 1..=rounds {
            let case = |what: &str| format!("policy-{what}-{policies}x{accounts}");
            let start = Instant::now();
            let size = read(&yaml, policies, accounts)?;
            results.add(&case("read"), SIGNET, round, milliseconds(start), "ms");

            let start = Instant::now();
            let entries: usize =
                (0..PODS).map(|pod| entries(&size, pod)).sum::<Result<usize, _>>()?;
            results.add(&case("compile-node"), SIGNET, round, milliseconds(start), "ms");
            let bytes = entries * (size_of::<PolicyEntry>() + NODE);
            results.add(&case("map-memory"), SIGNET, round, bytes as f64 / 1024.0, "KiB");

            // One policy changes: the pods that it selects are compiled again, the others are
            // only asked whether they are among them.
            let start = Instant::now();
            let changed = &size.set.policies[0];
            let mut again = 0;
            for pod in 0..PODS {
                let (namespace, labels) = workload(&size, pod);
                if changed.selector.selects(&namespace, &labels) {
                    black_box(entries_of(&size, &namespace, &labels)?);
                    again += 1;
                }
            }
            ensure!(again > 0, "the changed policy selects no pod of the node");
            results.add(&case("change"), SIGNET, round, milliseconds(start), "ms");
        }
    }
    Ok(())
}

fn milliseconds(since: Instant) -> f64 {
    since.elapsed().as_secs_f64() * 1000.0
}

/// Policies in turn over the workloads; each names three callers, a port, and every third a block.
fn yaml(policies: usize, accounts: usize) -> String {
    let mut text = String::new();
    for n in 0..policies {
        let account = n % accounts;
        let (namespace, app) = (account / PER_NAMESPACE, account);
        let action = ["Allow", "Allow", "Deny"][n / accounts % 3];
        let callers: Vec<String> =
            (1..=3).map(|i| format!("a{}", (account + i * 7) % accounts)).collect();
        let block = if n % 3 == 0 {
            format!(", {{ipBlocks: [10.{}.{}.0/24]}}", n / 250 % 250, n % 250)
        } else {
            String::new()
        };
        // Writing to a String cannot fail.
        let _ = write!(
            text,
            "---\napiVersion: signet.dev/v1alpha1\nkind: IdentityPolicy\nmetadata: {{name: p{n}, \
             namespace: n{namespace}}}\nspec:\n  selector: {{matchLabels: {{app: a{app}}}}}\n  action: \
             {action}\n  ingress:\n    - from: [{{serviceAccounts: [{}]}}{block}]\n      ports: \
             [{{port: {}}}]\n",
            callers.join(", "),
            8000 + n % 16,
        );
    }
    text
}

fn read(text: &str, policies: usize, accounts: usize) -> Result<Size> {
    let mut read = Vec::with_capacity(policies);
    for document in text.split("---\n").filter(|part| !part.is_empty()) {
        let node = yaml::parse_one(document)
            .map_err(|fault| anyhow::anyhow!("{fault}"))?
            .context("an empty document")?;
        let policy = native::read(&node).map_err(|fault| anyhow::anyhow!("{fault}"))?;
        read.push(Arc::new(policy));
    }
    ensure!(read.len() == policies, "{} of {policies} policies", read.len());
    let domain = domain()?;
    let identities = (0..accounts)
        .map(|n| {
            let id = SpiffeId::for_service_account(
                &domain,
                &format!("n{}", n / PER_NAMESPACE),
                &format!("a{n}"),
            )?;
            Ok((u32::try_from(n)? + 256, id))
        })
        .collect::<Result<_>>()?;
    Ok(Size { policies, accounts, set: PolicySet::new(read), identities })
}

fn domain() -> Result<TrustDomain> {
    TrustDomain::parse("cluster.local").context("trust domain")
}

/// Namespace and labels of a node's pod; pods are spread over the cluster's workloads.
fn workload(size: &Size, pod: usize) -> (String, BTreeMap<Arc<str>, Arc<str>>) {
    let account = pod * size.accounts / PODS.min(size.policies) % size.accounts;
    let labels = BTreeMap::from([("app".into(), format!("a{account}").into())]);
    (format!("n{}", account / PER_NAMESPACE), labels)
}

fn entries(size: &Size, pod: usize) -> Result<usize> {
    let (namespace, labels) = workload(size, pod);
    entries_of(size, &namespace, &labels)
}

fn entries_of(
    size: &Size,
    namespace: &str,
    labels: &BTreeMap<Arc<str>, Arc<str>>,
) -> Result<usize> {
    let policies: Vec<Arc<Policy>> = size.set.selecting(namespace, labels);
    let compiled = compile(&CompileInput {
        policies: &policies,
        default_deny: false,
        trust_domain: &domain()?,
        aliases: &[],
        identities: &size.identities,
        number: &|_| 1,
        observe: false,
        local_ips: &[],
        max_entries: 4096,
    })?;
    Ok(compiled.len())
}
