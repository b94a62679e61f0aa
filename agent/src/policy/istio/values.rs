//! Single values of Istio's fields.

use std::sync::Arc;

use ipnet::IpNet;

use super::Reader;
use crate::{
    config::yaml::{Fault, Node, shorten},
    policy::{
        asked::{PathPattern, PrincipalPattern},
        model::Ports,
        native::is_dns_name,
    },
    spiffe::{SpiffeId, TrustDomain},
};

/// Values of one field.
const MAX_VALUES: usize = 1024;
/// Values of `serviceAccounts`, and characters of each (Istio's own limits).
const MAX_ACCOUNTS: usize = 16;
const MAX_ACCOUNT_CHARS: usize = 320;
/// Characters of any other value.
const MAX_CHARS: usize = 2048;

/// A field's values; `None` where one of them cannot be read, so that the field's meaning is
/// not known. A remark then says which.
pub(super) type Values<T> = Option<Vec<T>>;

impl Reader {
    /// `td/ns/X/sa/Y` and patterns of it, as patterns over SPIFFE IDs.
    pub(super) fn principals(&mut self, node: &Node) -> Result<Vec<Arc<str>>, Fault> {
        self.each(node, MAX_VALUES, |reader, node| {
            let text = bounded(node)?;
            let is_path = |c: char| c.is_ascii_alphanumeric() || "./-_".contains(c);
            let fine = if let Some(suffix) = text.strip_prefix('*') {
                suffix.chars().all(is_path) && !suffix.contains("//")
            } else if let Some(prefix) = text.strip_suffix('*') {
                let (domain, path) = prefix.split_once('/').unwrap_or((prefix, ""));
                TrustDomain::parse(domain).is_ok() && path.chars().all(is_path)
            } else {
                SpiffeId::parse(&format!("spiffe://{text}")).is_ok()
            };
            if let Some(bare) = text.strip_prefix("spiffe://") {
                reader.fault(
                    node,
                    format!(
                        "{:?} can never match: principals stand without spiffe://; write {:?}",
                        shorten(text),
                        shorten(bare)
                    ),
                );
            } else if !fine {
                reader.fault(
                    node,
                    format!(
                        "{:?} can never match; write it like cluster.local/ns/shop/sa/frontend",
                        shorten(text)
                    ),
                );
            }
            // What can never match keeps a form that no SPIFFE ID has: a star inside, or the
            // scheme twice.
            let is_suffix = fine && text.starts_with('*');
            Ok(if is_suffix { text.into() } else { format!("spiffe://{text}").into() })
        })
    }

    /// Namespaces and patterns of them.
    pub(super) fn namespaces(&mut self, node: &Node) -> Result<Vec<Arc<str>>, Fault> {
        self.patterns(node, "a namespace", |bare| {
            bare.len() <= 63
                && bare.bytes().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || c == b'-')
        })
    }

    /// Trust domains and patterns of them.
    pub(super) fn trust_domains(&mut self, node: &Node) -> Result<Vec<Arc<str>>, Fault> {
        self.patterns(node, "a trust domain", |bare| {
            bare.bytes().all(|c| {
                c.is_ascii_lowercase() || c.is_ascii_digit() || matches!(c, b'.' | b'-' | b'_')
            })
        })
    }

    fn patterns(
        &mut self,
        node: &Node,
        what: &str,
        is_fine: impl Fn(&str) -> bool,
    ) -> Result<Vec<Arc<str>>, Fault> {
        self.each(node, MAX_VALUES, |reader, node| {
            let text = bounded(node)?;
            let bare = match text.strip_prefix('*') {
                Some(suffix) => suffix,
                None => text.strip_suffix('*').unwrap_or(text),
            };
            if text.is_empty() || !is_fine(bare) {
                reader.fault(
                    node,
                    format!(
                        "{:?} can never match; write {what}, prefix*, *suffix or *",
                        shorten(text)
                    ),
                );
            }
            Ok(text.into())
        })
    }

    /// `namespace/name`, or `name` in the policy's own namespace.
    pub(super) fn accounts(
        &mut self,
        node: &Node,
        namespace: &Arc<str>,
    ) -> Result<Values<(Arc<str>, Arc<str>)>, Fault> {
        let values = self.each(node, MAX_VALUES, |reader, node| {
            let text = bounded(node)?;
            let (space, name) = text.split_once('/').unwrap_or((namespace, text));
            if is_dns_name(space, 63) && is_dns_name(name, 253) && text.len() <= MAX_ACCOUNT_CHARS {
                return Ok(Some((Arc::from(space), Arc::from(name))));
            }
            reader.fault(
                node,
                format!(
                    "{:?} is not a service account; write name or namespace/name, without *",
                    shorten(text)
                ),
            );
            Ok(None)
        })?;
        if values.len() > MAX_ACCOUNTS {
            self.fault(node, format!("{} entries; {MAX_ACCOUNTS} is the most", values.len()));
            return Ok(None);
        }
        Ok(values.into_iter().collect())
    }

    /// Addresses and ranges; bits behind the prefix do not count.
    pub(super) fn blocks(&mut self, node: &Node) -> Result<Values<IpNet>, Fault> {
        let values = self.each(node, MAX_VALUES, |reader, node| {
            let text = bounded(node)?;
            let block = block_of(text);
            if block.is_none() {
                reader.fault(
                    node,
                    format!(
                        "{:?} is not an address or range; write it like 10.0.0.0/8 or fd00::1",
                        shorten(text)
                    ),
                );
            }
            Ok(block)
        })?;
        Ok(values.into_iter().collect())
    }

    /// Texts and patterns of them, as requests have them.
    pub(super) fn texts(&mut self, node: &Node) -> Result<Vec<Arc<str>>, Fault> {
        self.each(node, MAX_VALUES, |_, node| bounded(node).map(Into::into))
    }

    /// Methods and patterns of them.
    pub(super) fn methods(&mut self, node: &Node) -> Result<Vec<Arc<str>>, Fault> {
        self.each(node, MAX_VALUES, |reader, node| {
            let text = bounded(node)?;
            if text.bytes().any(|c| c.is_ascii_lowercase()) {
                reader.note(
                    node,
                    format!(
                        "{:?}: upper and lower case count in methods, and those of the standards \
                         are in upper case",
                        shorten(text)
                    ),
                );
            }
            Ok(text.into())
        })
    }

    /// Hosts and patterns of them; in lower case, because case does not count in them.
    pub(super) fn hosts(&mut self, node: &Node) -> Result<Vec<Arc<str>>, Fault> {
        self.each(node, MAX_VALUES, |reader, node| {
            let text = bounded(node)?;
            if !text.contains(['*', ':']) && !text.is_empty() {
                reader.note(
                    node,
                    format!(
                        "{0:?}: a request may name the port, too; add \"{0}:*\" to cover that",
                        shorten(text)
                    ),
                );
            }
            Ok(text.to_ascii_lowercase().into())
        })
    }

    /// Paths, patterns and templates of them.
    pub(super) fn paths(&mut self, node: &Node) -> Result<Values<PathPattern>, Fault> {
        let values = self.each(node, MAX_VALUES, |reader, node| {
            let text = bounded(node)?;
            match PathPattern::parse(text) {
                Ok(pattern) => {
                    if !text.starts_with(['/', '*', '{']) || text.contains(['?', '#']) {
                        reader.fault(
                            node,
                            format!(
                                "{:?} can never match; a path begins with / and stands without \
                                 the query",
                                shorten(text)
                            ),
                        );
                    }
                    Ok(Some(pattern))
                }
                Err(error) => {
                    reader.fault(
                        node,
                        format!("{:?} is not a path template: {error}", shorten(text)),
                    );
                    Ok(None)
                }
            }
        })?;
        Ok(values.into_iter().collect())
    }

    /// `issuer/subject` and patterns of it.
    pub(super) fn request_principals(
        &mut self,
        node: &Node,
    ) -> Result<Vec<PrincipalPattern>, Fault> {
        self.each(node, MAX_VALUES, |reader, node| {
            let text = bounded(node)?;
            let pattern = PrincipalPattern::new(text);
            if !pattern.can_match() {
                reader.fault(
                    node,
                    format!("{:?} can never match; write it like issuer/subject", shorten(text)),
                );
            }
            Ok(pattern)
        })
    }

    /// Port numbers, as text.
    pub(super) fn ports(&mut self, node: &Node) -> Result<Values<Ports>, Fault> {
        let values = self.each(node, MAX_VALUES, |reader, node| {
            let text = bounded(node)?;
            let digits = text.bytes().all(|c| c.is_ascii_digit());
            match text.parse::<u16>() {
                Ok(port) if digits && port != 0 => {
                    Ok(Some(Ports { first: port, last: port, protocol: None }))
                }
                _ => {
                    reader.fault(
                        node,
                        format!(
                            "{:?} is not a port; write a number from 1 to 65535",
                            shorten(text)
                        ),
                    );
                    Ok(None)
                }
            }
        })?;
        Ok(values.into_iter().collect())
    }
}

fn bounded(node: &Node) -> Result<&str, Fault> {
    let text = node.text()?;
    if text.len() > MAX_CHARS {
        return Err(node.fault(format!("{} bytes; {MAX_CHARS} is the most", text.len())));
    }
    Ok(text)
}

fn block_of(text: &str) -> Option<IpNet> {
    let net = match text.parse::<std::net::IpAddr>() {
        Ok(ip) => IpNet::from(ip),
        Err(_) => text.parse::<IpNet>().ok()?,
    };
    if let IpNet::V6(v6) = net
        && let Some(v4) = v6.addr().to_ipv4_mapped()
        && let Some(bits) = v6.prefix_len().checked_sub(96)
    {
        return IpNet::new(v4.into(), bits).ok().map(|net| net.trunc());
    }
    Some(net.trunc())
}
