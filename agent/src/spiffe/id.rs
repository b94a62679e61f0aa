//! SPIFFE IDs and trust domains (SPIFFE-ID standard, sections 2 and 3).

use std::{fmt, hash, str::FromStr, sync::Arc};

/// The longest ID that is parsed, in bytes (SPIFFE-ID section 2.3).
pub const MAX_ID_LEN: usize = 2048;
/// The longest trust domain name, in bytes (SPIFFE-ID section 2.1).
pub const MAX_TRUST_DOMAIN_LEN: usize = 255;

const SCHEME: &str = "spiffe://";

/// A trust domain's name: `[a-z0-9._-]`, 1 to 255 bytes, lower case. Cheap to clone.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct TrustDomain(Arc<str>);

/// A SPIFFE ID in canonical form: `spiffe://<trust domain>[/<segment>…]`. Cheap to clone.
///
/// Equality, order and hash are those of the canonical text.
#[derive(Clone)]
pub struct SpiffeId {
    text: Arc<str>,
    domain: TrustDomain,
}

/// Why a string is not a SPIFFE ID or not a trust domain.
#[derive(Debug, thiserror::Error, PartialEq, Eq, Clone)]
#[non_exhaustive]
pub enum SpiffeIdError {
    /// It does not begin with `spiffe://`.
    #[error(
        "\"{0}\" is no SPIFFE ID: it does not begin with spiffe://; write spiffe://<trust domain>/ns/<namespace>/sa/<service account>"
    )]
    Scheme(Excerpt),
    /// It is longer than [`MAX_ID_LEN`].
    #[error("a SPIFFE ID of {0} bytes is too long: at most {MAX_ID_LEN} are accepted")]
    TooLong(usize),
    /// The trust domain is empty.
    #[error("the trust domain is empty; write a name such as cluster.local")]
    EmptyTrustDomain,
    /// The trust domain is longer than [`MAX_TRUST_DOMAIN_LEN`].
    #[error("a trust domain of {0} bytes is too long: at most {MAX_TRUST_DOMAIN_LEN} are accepted")]
    TrustDomainTooLong(usize),
    /// The trust domain has a character that it may not have.
    #[error(
        "the trust domain \"{name}\" may not contain {character:?}: only a-z, 0-9, '.', '-' and '_', without port, user or percent-encoding"
    )]
    TrustDomainCharacter {
        /// The trust domain as written.
        name: Excerpt,
        /// The first character that is refused.
        character: char,
    },
    /// A path segment is empty, or the path ends with `/`.
    #[error("the path \"{0}\" has an empty segment; remove the doubled or trailing '/'")]
    EmptySegment(Excerpt),
    /// A path segment is `.` or `..`.
    #[error(
        "the path \"{0}\" has a segment '.' or '..'; a SPIFFE ID names one thing and cannot be relative"
    )]
    DotSegment(Excerpt),
    /// The path has a character that it may not have.
    #[error(
        "the path \"{path}\" may not contain {character:?}: only a-z, A-Z, 0-9, '.', '-' and '_', without query, fragment or percent-encoding"
    )]
    PathCharacter {
        /// The path as written.
        path: Excerpt,
        /// The first character that is refused.
        character: char,
    },
}

/// The beginning of an untrusted string, safe to print: at most 80 characters, controls escaped.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Excerpt(Box<str>);

impl TrustDomain {
    /// Parses a trust domain's name (not an ID); upper case is lowered.
    pub fn parse(name: &str) -> Result<Self, SpiffeIdError> {
        if name.is_empty() {
            return Err(SpiffeIdError::EmptyTrustDomain);
        }
        if name.len() > MAX_TRUST_DOMAIN_LEN {
            return Err(SpiffeIdError::TrustDomainTooLong(name.len()));
        }
        match name.chars().find(|c| !(is_segment_character(*c))) {
            Some(character) => {
                Err(SpiffeIdError::TrustDomainCharacter { name: Excerpt::new(name), character })
            }
            None => Ok(Self(name.to_ascii_lowercase().into())),
        }
    }

    /// The name.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The domain's own ID, which has no path: that of its signing certificates.
    pub fn id(&self) -> SpiffeId {
        SpiffeId { text: format!("{SCHEME}{self}").into(), domain: self.clone() }
    }
}

impl SpiffeId {
    /// Parses a SPIFFE ID; scheme and trust domain in any case, canonical form out.
    pub fn parse(id: &str) -> Result<Self, SpiffeIdError> {
        if id.len() > MAX_ID_LEN {
            return Err(SpiffeIdError::TooLong(id.len()));
        }
        // `get` is None inside a character, and then the scheme is not there either.
        let rest = match (id.get(..SCHEME.len()), id.get(SCHEME.len()..)) {
            (Some(scheme), Some(rest)) if scheme.eq_ignore_ascii_case(SCHEME) => rest,
            _ => return Err(SpiffeIdError::Scheme(Excerpt::new(id))),
        };
        let (domain, path) = rest.split_at(rest.find('/').unwrap_or(rest.len()));
        let domain = TrustDomain::parse(domain)?;
        check_path(path)?;
        Ok(Self { text: format!("{SCHEME}{domain}{path}").into(), domain })
    }

    /// `spiffe://<td>/ns/<namespace>/sa/<service account>`.
    ///
    /// # Errors
    /// When a name is not one valid path segment or the whole gets longer than [`MAX_ID_LEN`].
    pub fn for_service_account(
        domain: &TrustDomain,
        namespace: &str,
        service_account: &str,
    ) -> Result<Self, SpiffeIdError> {
        check_segment(namespace, namespace)?;
        check_segment(service_account, service_account)?;
        let text = format!("{SCHEME}{domain}/ns/{namespace}/sa/{service_account}");
        if text.len() > MAX_ID_LEN {
            return Err(SpiffeIdError::TooLong(text.len()));
        }
        Ok(Self { text: text.into(), domain: domain.clone() })
    }

    /// The whole ID.
    pub fn as_str(&self) -> &str {
        &self.text
    }

    /// The trust domain (a reference count is all that it costs).
    pub fn trust_domain(&self) -> TrustDomain {
        self.domain.clone()
    }

    /// The path with its leading `/`; empty for a trust domain's own ID.
    pub fn path(&self) -> &str {
        &self.text[SCHEME.len() + self.domain.0.len()..]
    }

    /// Namespace and service account of an ID of the form `/ns/<ns>/sa/<sa>`, else `None`.
    pub fn workload(&self) -> Option<(&str, &str)> {
        let (namespace, account) = self.path().strip_prefix("/ns/")?.split_once("/sa/")?;
        (!namespace.contains('/') && !account.contains('/')).then_some((namespace, account))
    }
}

impl Excerpt {
    const LEN: usize = 80;

    /// The beginning of `text`.
    pub fn new(text: &str) -> Self {
        let mut excerpt: String =
            text.chars().take(Self::LEN).flat_map(char::escape_debug).collect();
        if text.chars().nth(Self::LEN).is_some() {
            excerpt.push('…');
        }
        Self(excerpt.into())
    }
}

impl FromStr for TrustDomain {
    type Err = SpiffeIdError;
    fn from_str(s: &str) -> Result<Self, Self::Err> {
        Self::parse(s)
    }
}

impl fmt::Display for TrustDomain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for TrustDomain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl FromStr for SpiffeId {
    type Err = SpiffeIdError;
    fn from_str(s: &str) -> Result<Self, Self::Err> {
        Self::parse(s)
    }
}

impl fmt::Display for SpiffeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

impl fmt::Debug for SpiffeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

// The domain is part of the text, so the text alone decides.
impl PartialEq for SpiffeId {
    fn eq(&self, other: &Self) -> bool {
        self.text == other.text
    }
}

impl Eq for SpiffeId {}

impl PartialOrd for SpiffeId {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for SpiffeId {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        self.text.cmp(&other.text)
    }
}

impl hash::Hash for SpiffeId {
    fn hash<H: hash::Hasher>(&self, state: &mut H) {
        self.text.hash(state);
    }
}

impl fmt::Display for Excerpt {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

fn is_segment_character(c: char) -> bool {
    c.is_ascii_alphanumeric() || matches!(c, '.' | '-' | '_')
}

/// Checks a path: empty, or segments each led by a `/`.
fn check_path(path: &str) -> Result<(), SpiffeIdError> {
    match path.strip_prefix('/') {
        None => Ok(()),
        Some(segments) => segments.split('/').try_for_each(|segment| check_segment(segment, path)),
    }
}

fn check_segment(segment: &str, path: &str) -> Result<(), SpiffeIdError> {
    match segment {
        "" => Err(SpiffeIdError::EmptySegment(Excerpt::new(path))),
        "." | ".." => Err(SpiffeIdError::DotSegment(Excerpt::new(path))),
        _ => match segment.chars().find(|c| !is_segment_character(*c)) {
            Some(character) => {
                Err(SpiffeIdError::PathCharacter { path: Excerpt::new(path), character })
            }
            None => Ok(()),
        },
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn ids_that_are_accepted() {
        for (text, canonical, domain, path) in [
            ("spiffe://cluster.local/ns/shop/sa/web", "", "cluster.local", "/ns/shop/sa/web"),
            (
                "SPIFFE://Cluster.LOCAL/Ns/a",
                "spiffe://cluster.local/Ns/a",
                "cluster.local",
                "/Ns/a",
            ),
            ("spiffe://td", "", "td", ""),
            ("spiffe://1.2.3.4/...", "", "1.2.3.4", "/..."),
            ("spiffe://a_b-c/x.y_z-0", "", "a_b-c", "/x.y_z-0"),
        ] {
            let id = SpiffeId::parse(text).unwrap();
            let canonical = if canonical.is_empty() { text } else { canonical };
            assert_eq!(id.as_str(), canonical);
            assert_eq!(id.trust_domain().as_str(), domain);
            assert_eq!(id.path(), path);
            assert_eq!(canonical.parse::<SpiffeId>().unwrap(), id);
        }
    }

    #[test]
    fn ids_that_are_refused() {
        use SpiffeIdError as E;
        let x = Excerpt::new;
        let domain = |name, character| E::TrustDomainCharacter { name: x(name), character };
        let path = |path, character| E::PathCharacter { path: x(path), character };
        for (text, error) in [
            ("", E::Scheme(x(""))),
            ("cluster.local/ns/a", E::Scheme(x("cluster.local/ns/a"))),
            ("https://td/a", E::Scheme(x("https://td/a"))),
            ("spiffe:/td/a", E::Scheme(x("spiffe:/td/a"))),
            ("spiffé://td/a", E::Scheme(x("spiffé://td/a"))),
            (" spiffe://td/a", E::Scheme(x(" spiffe://td/a"))),
            ("spiffe://", E::EmptyTrustDomain),
            ("spiffe:///a", E::EmptyTrustDomain),
            ("spiffe://td:443/a", domain("td:443", ':')),
            ("spiffe://user@td/a", domain("user@td", '@')),
            ("spiffe://t%64/a", domain("t%64", '%')),
            ("spiffe://td?x", domain("td?x", '?')),
            ("spiffe://[::1]/a", domain("[::1]", '[')),
            ("spiffe://tdé/a", domain("tdé", 'é')),
            ("spiffe://td/", E::EmptySegment(x("/"))),
            ("spiffe://td/a/", E::EmptySegment(x("/a/"))),
            ("spiffe://td//a", E::EmptySegment(x("//a"))),
            ("spiffe://td/./a", E::DotSegment(x("/./a"))),
            ("spiffe://td/a/..", E::DotSegment(x("/a/.."))),
            ("spiffe://td/a?b=c", path("/a?b=c", '?')),
            ("spiffe://td/a#b", path("/a#b", '#')),
            ("spiffe://td/%61", path("/%61", '%')),
            ("spiffe://td/a b", path("/a b", ' ')),
            ("spiffe://td/a\0", path("/a\0", '\0')),
            ("spiffe://td/ns/é", path("/ns/é", 'é')),
        ] {
            assert_eq!(SpiffeId::parse(text), Err(error), "{text:?}");
        }
    }

    #[test]
    fn lengths() {
        let fits = format!("spiffe://td/{}", "a".repeat(MAX_ID_LEN - 12));
        assert_eq!(SpiffeId::parse(&fits).unwrap().as_str().len(), MAX_ID_LEN);
        assert_eq!(
            SpiffeId::parse(&format!("{fits}a")),
            Err(SpiffeIdError::TooLong(MAX_ID_LEN + 1))
        );
        assert!(TrustDomain::parse(&"a".repeat(255)).is_ok());
        assert_eq!(
            TrustDomain::parse(&"a".repeat(256)),
            Err(SpiffeIdError::TrustDomainTooLong(256))
        );
        let td = TrustDomain::parse("td").unwrap();
        assert!(matches!(
            SpiffeId::for_service_account(&td, &"n".repeat(2000), &"s".repeat(100)),
            Err(SpiffeIdError::TooLong(_))
        ));
    }

    #[test]
    fn workloads() {
        let td = TrustDomain::parse("td").unwrap();
        let id = SpiffeId::for_service_account(&td, "shop", "web.v2").unwrap();
        assert_eq!(id.as_str(), "spiffe://td/ns/shop/sa/web.v2");
        assert_eq!(id.workload(), Some(("shop", "web.v2")));
        for other in ["", "/ns/a", "/ns/a/sa", "/ns/a/sa/b/c", "/x/ns/a/sa/b", "/ns/a/b/sa/c"] {
            assert_eq!(SpiffeId::parse(&format!("spiffe://td{other}")).unwrap().workload(), None);
        }
        // A name cannot smuggle further segments in.
        for (ns, sa) in [("a/sa/admin", "b"), ("a", "b/c"), ("", "b"), ("a", ".."), ("a", "b?")] {
            assert!(SpiffeId::for_service_account(&td, ns, sa).is_err(), "{ns} {sa}");
        }
    }

    #[test]
    fn an_excerpt_is_short_and_printable() {
        let error = SpiffeId::parse(&"\u{1b}[31m".repeat(300)).unwrap_err().to_string();
        assert!(error.len() < 800 && !error.contains('\u{1b}'), "{error}");
    }

    proptest! {
        #[test]
        fn parsing_is_idempotent_and_total(text in "(spiffe://)?[a-zA-Z0-9._/%:?#é-]{0,40}") {
            if let Ok(id) = SpiffeId::parse(&text) {
                prop_assert_eq!(&SpiffeId::parse(id.as_str()).unwrap(), &id);
                prop_assert_eq!(format!("spiffe://{}{}", id.trust_domain(), id.path()), id.as_str());
                // Only case may differ, and only before the path.
                prop_assert!(id.as_str().eq_ignore_ascii_case(&text));
                prop_assert!(text.ends_with(id.path()));
            }
        }

        #[test]
        fn arbitrary_text_never_panics(text in any::<String>()) {
            let _ = SpiffeId::parse(&text);
            let _ = SpiffeId::parse(&format!("spiffe://td/{text}"));
            let _ = TrustDomain::parse(&text);
        }

        #[test]
        fn what_is_composed_of_valid_parts_parses(
            domain in "[a-z0-9._-]{1,40}",
            segments in proptest::collection::vec("[a-zA-Z0-9_-][a-zA-Z0-9._-]{0,20}", 0..6),
        ) {
            let path: String = segments.iter().map(|s| format!("/{s}")).collect();
            let text = format!("spiffe://{domain}{path}");
            let id = SpiffeId::parse(&text).unwrap();
            prop_assert_eq!(id.as_str(), &text);
            prop_assert_eq!(id.path(), &path);
        }

        #[test]
        fn accounts_round_trip(ns in "[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?", sa in "[a-z0-9]([a-z0-9.-]{0,60}[a-z0-9])?") {
            let td = TrustDomain::parse("cluster.local").unwrap();
            let id = SpiffeId::for_service_account(&td, &ns, &sa).unwrap();
            prop_assert_eq!(id.workload(), Some((ns.as_str(), sa.as_str())));
            prop_assert_eq!(SpiffeId::parse(id.as_str()).unwrap(), id);
        }
    }
}
