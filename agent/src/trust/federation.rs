//! Whom to trust besides our own domain, and whom to dial there: `federation.yaml`.
//!
//! ```yaml
//! trustDomains:
//! - name: partner.example
//!   bundle: /etc/signet/bundles/partner.json      # JWKS or PEM; followed
//! - name: other.example
//!   endpoint:
//!     url: https://bundles.other.example/bundle
//!     profile: https_spiffe                        # or https_web
//!     spiffeId: spiffe://other.example/bundles     # https_spiffe: who answers there
//!     bootstrap: /etc/signet/bundles/other.json    # https_spiffe: trusted until the first answer
//! remotePeers:
//! - cidr: 198.51.100.0/24
//!   trustDomain: partner.example
//!   identities: ["spiffe://partner.example/ns/prod/sa/api"]
//! trustDomainAliases: [other.example]              # the same workloads under another name
//! ```

use std::{collections::BTreeMap, net::IpAddr, path::PathBuf, sync::Arc};

use http::{Uri, uri::Scheme};
use ipnet::IpNet;

use crate::{
    config::{
        values::parse_range,
        yaml::{self, Fault, Node, shorten},
    },
    spiffe::{SpiffeId, TrustDomain},
};

/// Most trust domains that one cluster federates with.
const MAX_DOMAINS: usize = 256;
/// Most ranges of remote peers.
const MAX_REMOTES: usize = 1024;
/// Most other names of our own domain.
const MAX_ALIASES: usize = 8;
/// Most identities of one range.
const MAX_IDENTITIES: usize = 256;

/// What the file says.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Federation {
    /// Foreign trust domains and where their bundles come from; never our own.
    pub domains: BTreeMap<TrustDomain, BundleSource>,
    /// Peers outside the cluster that are dialled through tunnels.
    pub remotes: Vec<RemotePeers>,
    /// Other names of our own domain, while it gets a new one; each has a bundle in `domains`.
    pub aliases: Vec<TrustDomain>,
}

/// Where a foreign domain's bundle comes from (SPIFFE Federation, section 5).
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum BundleSource {
    /// A file, as JWKS or PEM.
    File(PathBuf),
    /// A bundle endpoint with a web certificate.
    Web {
        /// `https://…`.
        url: Uri,
        /// PEM of the web authorities; the system's when absent.
        roots: Option<PathBuf>,
    },
    /// A bundle endpoint with an X509-SVID.
    Spiffe {
        /// `https://…`.
        url: Uri,
        /// Whose SVID the endpoint shows.
        id: SpiffeId,
        /// The bundle that verifies it until the first answer.
        bootstrap: Option<PathBuf>,
    },
}

/// Peers outside the cluster.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct RemotePeers {
    /// Their addresses.
    pub range: IpNet,
    /// Who may answer there: at least one, all of one foreign domain.
    pub identities: Arc<[SpiffeId]>,
}

impl Federation {
    /// Who may answer at an address, by the most specific range.
    pub fn remote(&self, ip: IpAddr) -> Option<&RemotePeers> {
        let ip = ip.to_canonical();
        self.remotes
            .iter()
            .filter(|peers| peers.range.contains(&ip))
            .max_by_key(|peers| peers.range.prefix_len())
    }
}

/// Reads `federation.yaml` for a cluster whose own domain is `own`.
///
/// # Errors
/// The first field that is unknown, missing or not what it should be; above all a bundle
/// that claims our own domain.
pub fn read(text: &str, own: &TrustDomain) -> Result<Federation, Fault> {
    let mut federation = Federation::default();
    let Some(root) = yaml::parse_one(text)? else { return Ok(federation) };
    root.known_fields(&["trustDomains", "remotePeers", "trustDomainAliases"], |field, node| {
        if field == "trustDomainAliases" {
            federation.aliases = node.list(MAX_ALIASES, parse_domain)?;
        } else if field == "trustDomains" {
            for (node, (domain, source)) in
                node.list(MAX_DOMAINS, |n| Ok((n.line, read_domain(n, own)?)))?
            {
                if federation.domains.insert(domain.clone(), source).is_some() {
                    return Err(Fault::new(
                        node,
                        format!("{domain} is there twice; write it once"),
                    ));
                }
            }
        } else {
            federation.remotes = node.list(MAX_REMOTES, |n| read_remote(n, own))?;
        }
        Ok(())
    })?;
    for alias in &federation.aliases {
        let message = if alias == own {
            format!("{alias} is the domain's present name; take it out")
        } else if !federation.domains.contains_key(alias) {
            format!("there is no bundle of {alias}; add it to trustDomains")
        } else {
            continue;
        };
        return Err(Fault::new(root.line, message).within("trustDomainAliases"));
    }
    for remote in &federation.remotes {
        let domain = remote.identities[0].trust_domain();
        if !federation.domains.contains_key(&domain) {
            return Err(Fault::new(
                root.line,
                format!(
                    "{} is dialled as {domain}, of which there is no bundle; add it to trustDomains",
                    remote.range
                ),
            )
            .within("remotePeers"));
        }
    }
    Ok(federation)
}

fn read_domain(node: &Node, own: &TrustDomain) -> Result<(TrustDomain, BundleSource), Fault> {
    let (mut name, mut bundle, mut endpoint) = (None, None, None);
    node.known_fields(&["name", "bundle", "endpoint"], |field, node| {
        match field {
            "name" => {
                let domain = parse_domain(node)?;
                if domain == *own {
                    return Err(node.fault(format!(
                        "{domain} is this cluster's own domain, which only its own authority \
                         speaks for; take it out"
                    )));
                }
                name = Some(domain);
            }
            "bundle" => bundle = Some(BundleSource::File(read_path(node)?)),
            _ => endpoint = Some(read_endpoint(node)?),
        }
        Ok(())
    })?;
    let name = name.ok_or_else(|| node.fault("missing").within("name"))?;
    match (bundle, endpoint) {
        (Some(source), None) | (None, Some(source)) => Ok((name, source)),
        (None, None) => Err(node.fault("neither bundle nor endpoint; give one of them")),
        (Some(_), Some(_)) => Err(node.fault("both bundle and endpoint; give one of them")),
    }
}

fn read_endpoint(node: &Node) -> Result<BundleSource, Fault> {
    let (mut url, mut profile, mut id) = (None, None, None);
    let (mut bootstrap, mut roots) = (None, None);
    let known = ["url", "profile", "spiffeId", "bootstrap", "webRoots"];
    node.known_fields(&known, |field, node| {
        match field {
            "url" => url = Some(read_url(node)?),
            "profile" => profile = Some(node.text()?),
            "spiffeId" => id = Some(parse_id(node)?),
            "bootstrap" => bootstrap = Some(read_path(node)?),
            _ => roots = Some(read_path(node)?),
        }
        Ok(())
    })?;
    let url = url.ok_or_else(|| node.fault("missing").within("url"))?;
    let misplaced = |field: &str, profile: &str| {
        Err(node.fault(format!("not for the profile {profile}; take it out")).within(field))
    };
    match profile {
        Some("https_web") => match (id, bootstrap) {
            (Some(_), _) => misplaced("spiffeId", "https_web"),
            (_, Some(_)) => misplaced("bootstrap", "https_web"),
            (None, None) => Ok(BundleSource::Web { url, roots }),
        },
        Some("https_spiffe") => {
            if roots.is_some() {
                return misplaced("webRoots", "https_spiffe");
            }
            let id = id.ok_or_else(|| {
                node.fault("missing; name the SPIFFE ID that the endpoint shows").within("spiffeId")
            })?;
            Ok(BundleSource::Spiffe { url, id, bootstrap })
        }
        Some(other) => Err(node
            .fault(format!("{:?} is no profile; write https_web or https_spiffe", shorten(other)))
            .within("profile")),
        None => Err(node.fault("missing; write https_web or https_spiffe").within("profile")),
    }
}

fn read_remote(node: &Node, own: &TrustDomain) -> Result<RemotePeers, Fault> {
    let (mut range, mut domain, mut identities) = (None, None, Vec::new());
    node.known_fields(&["cidr", "trustDomain", "identities"], |field, node| {
        match field {
            "cidr" => range = Some(parse_range(node.text()?).map_err(|m| node.fault(m))?),
            "trustDomain" => domain = Some(parse_domain(node)?),
            _ => identities = node.list(MAX_IDENTITIES, |n| Ok((n.line, parse_id(n)?)))?,
        }
        Ok(())
    })?;
    let missing = |field: &str| node.fault("missing").within(field);
    let range = range.ok_or_else(|| missing("cidr"))?;
    let domain = domain.ok_or_else(|| missing("trustDomain"))?;
    if domain == *own {
        let message = format!("{domain} is this cluster's own domain; its pods need no entry");
        return Err(node.fault(message).within("trustDomain"));
    }
    if identities.is_empty() {
        return Err(node.fault("missing; name who may answer there").within("identities"));
    }
    for (line, id) in &identities {
        if id.trust_domain() != domain {
            let message = format!("{id} is not of the trust domain {domain}");
            return Err(Fault::new(*line, message).within("identities"));
        }
    }
    let mut identities: Vec<SpiffeId> = identities.into_iter().map(|(_, id)| id).collect();
    identities.sort();
    identities.dedup();
    Ok(RemotePeers { range, identities: identities.into() })
}

fn parse_domain(node: &Node) -> Result<TrustDomain, Fault> {
    let text = node.text()?;
    TrustDomain::parse(text)
        .map_err(|e| node.fault(format!("{:?} is not a trust domain ({e})", shorten(text))))
}

fn parse_id(node: &Node) -> Result<SpiffeId, Fault> {
    let text = node.text()?;
    SpiffeId::parse(text)
        .map_err(|e| node.fault(format!("{:?} is not a SPIFFE ID ({e})", shorten(text))))
}

fn read_path(node: &Node) -> Result<PathBuf, Fault> {
    let text = node.text()?;
    if !text.starts_with('/') {
        return Err(node.fault(format!("{:?} is not an absolute path", shorten(text))));
    }
    Ok(text.into())
}

fn read_url(node: &Node) -> Result<Uri, Fault> {
    let text = node.text()?;
    let wrong = || {
        node.fault(format!(
            "{:?} is not a bundle endpoint; write it like https://bundles.example/bundle",
            shorten(text)
        ))
    };
    let url: Uri = text.parse().map_err(|_| wrong())?;
    // SPIFFE Federation, section 5.1.1: https, and no userinfo.
    let plain = url.authority().is_some_and(|a| !a.as_str().contains('@') && !a.host().is_empty());
    if url.scheme() != Some(&Scheme::HTTPS) || !plain {
        return Err(wrong());
    }
    Ok(url)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn own() -> TrustDomain {
        TrustDomain::parse("cluster.local").unwrap()
    }

    fn good(text: &str) -> Federation {
        read(text, &own()).unwrap()
    }

    #[track_caller]
    fn bad(text: &str, says: &str) {
        let fault = read(text, &own()).unwrap_err();
        assert!(fault.to_string().contains(says), "{fault}");
    }

    const WEB: &str = "trustDomains:\n- name: a.example\n  endpoint: {url: \"https://a.example:8443/b\", profile: https_web}\n";

    #[test]
    fn the_example_in_the_documentation_reads() {
        let text: String = include_str!("federation.rs")
            .lines()
            .skip_while(|l| *l != "//! ```yaml")
            .skip(1)
            .take_while(|l| *l != "//! ```")
            .map(|l| format!("{}\n", l.trim_start_matches("//!").strip_prefix(' ').unwrap_or("")))
            .collect();
        let federation = good(&text);
        assert_eq!(federation.domains.len(), 2);
        let remote = federation.remote("198.51.100.7".parse().unwrap()).unwrap();
        assert_eq!(remote.identities[0].as_str(), "spiffe://partner.example/ns/prod/sa/api");
        assert_eq!(federation.remote("198.51.101.7".parse().unwrap()), None);
    }

    #[test]
    fn the_most_specific_range_counts() {
        let entry = |cidr: &str, name: &str| {
            format!(
                "- {{cidr: {cidr}, trustDomain: a.example, identities: [\"spiffe://a.example/{name}\"]}}\n"
            )
        };
        let text = format!(
            "{WEB}remotePeers:\n{}{}",
            entry("10.0.0.0/8", "wide"),
            entry("10.1.0.0/16", "narrow")
        );
        let federation = good(&text);
        let at = |ip: &str| {
            federation.remote(ip.parse().unwrap()).unwrap().identities[0].path().to_owned()
        };
        assert_eq!((at("10.2.0.1"), at("10.1.0.1")), ("/wide".into(), "/narrow".into()));
        assert_eq!(at("::ffff:10.1.0.1"), "/narrow");
    }

    #[test]
    fn nothing_is_federated_without_a_file_or_with_an_empty_one() {
        assert_eq!(good(""), Federation::default());
        assert_eq!(good("trustDomains: []\n"), Federation::default());
    }

    #[test]
    fn faults_name_field_value_and_remedy() {
        bad("trustDomain: []\n", "did you mean trustDomains?");
        bad("trustDomains:\n- name: cluster.local\n  bundle: /a\n", "own domain");
        bad("trustDomains:\n- name: A B\n  bundle: /a\n", "trustDomains[0].name");
        bad("trustDomains:\n- name: a\n", "neither bundle nor endpoint");
        bad("trustDomains:\n- name: a\n  bundle: a.pem\n", "not an absolute path");
        bad("trustDomains:\n- {name: a, bundle: /a}\n- {name: a, bundle: /b}\n", "there twice");
        let endpoint = |rest: &str| format!("trustDomains:\n- name: a\n  endpoint: {{{rest}}}\n");
        bad(&endpoint("profile: https_web"), "endpoint.url: missing");
        bad(&endpoint("url: \"http://a/b\", profile: https_web"), "https://bundles.example");
        bad(&endpoint("url: \"https://u:p@a/b\", profile: https_web"), "not a bundle endpoint");
        bad(&endpoint("url: \"https://a/b\", profile: web"), "https_web or https_spiffe");
        bad(&endpoint("url: \"https://a/b\", profile: https_spiffe"), "spiffeId: missing");
        bad(
            &endpoint("url: \"https://a/b\", profile: https_web, spiffeId: \"spiffe://a/b\""),
            "not for the profile https_web",
        );
        let remote = |rest: &str| format!("{WEB}remotePeers:\n- {{cidr: 10.0.0.0/8, {rest}}}\n");
        bad(&remote("trustDomain: a.example"), "identities: missing");
        bad(
            &remote("trustDomain: a.example, identities: [\"spiffe://b/x\"]"),
            "not of the trust domain",
        );
        bad(
            &remote("trustDomain: cluster.local, identities: [\"spiffe://cluster.local/x\"]"),
            "own domain",
        );
        bad("trustDomainAliases: [old.example]\n", "no bundle of old.example");
        bad("trustDomainAliases: [cluster.local]\n", "present name");
        let aliased = format!("{WEB}trustDomainAliases: [a.example]\n");
        assert_eq!(good(&aliased).aliases[0].as_str(), "a.example");
        bad(&remote("trustDomain: b, identities: [\"spiffe://b/x\"]"), "no bundle");
    }

    proptest! {
        #[test]
        fn nothing_makes_it_panic(text in "(trustDomains:|remotePeers:|- |name: |a\\.example|endpoint:|\\{|\\}|url: |https://a/b|profile: https_web|\n|  |cidr: |::/0|identities: |\\[|\\]|, ){0,40}") {
            let _ = read(&text, &own());
        }
    }
}
