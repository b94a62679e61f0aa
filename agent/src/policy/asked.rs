//! What rules ask of HTTP requests: operations, end users, headers. Part of the model; whether
//! it holds is said by [`super::request`].

use std::sync::Arc;

use http::HeaderName;
use ipnet::IpNet;

use super::model::pattern_matches;

/// Which requests a destination is about. A field without values asks nothing; those with
/// values must hold, one value of each.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Operation {
    /// Methods: exact, `prefix*`, `*suffix` or `*`. Case counts.
    pub methods: Vec<Arc<str>>,
    /// None of these.
    pub not_methods: Vec<Arc<str>>,
    /// Paths without the query.
    pub paths: Vec<PathPattern>,
    /// None of these.
    pub not_paths: Vec<PathPattern>,
    /// Hosts as the request names them, the port included where it names one: the same forms
    /// as methods, in lower case.
    pub hosts: Vec<Arc<str>>,
    /// None of these.
    pub not_hosts: Vec<Arc<str>>,
}

impl Operation {
    /// True when it asks nothing.
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }
}

/// On behalf of whom a request comes, and from where at first.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct RequestSource {
    /// End users.
    pub principals: Vec<PrincipalPattern>,
    /// None of these.
    pub not_principals: Vec<PrincipalPattern>,
    /// Addresses or ranges of the request's first sender.
    pub remote_blocks: Vec<IpNet>,
    /// None of these.
    pub not_remote_blocks: Vec<IpNet>,
}

impl RequestSource {
    /// True when it asks nothing.
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }
}

/// A demand on one property of a request: one of `values` (empty: any), none of `not_values`.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct RequestCondition {
    /// Which property.
    pub key: RequestKey,
    /// Patterns as in [`Operation::methods`].
    pub values: Vec<Arc<str>>,
    /// None of these.
    pub not_values: Vec<Arc<str>>,
}

/// A property of a request.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum RequestKey {
    /// `request.headers[name]`; several values are one text, with commas between.
    Header(HeaderName),
    /// `request.auth.audiences`: `aud` of the end user's token.
    Audiences,
    /// `request.auth.presenter`: `azp`.
    Presenter,
    /// `request.auth.claims[a][b]`: the claim at this path, a text or a list of texts.
    Claim(Vec<Arc<str>>),
    /// `connection.sni`.
    Sni,
}

/// A pattern over paths.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum PathPattern {
    /// Exact, `prefix*`, `*suffix` or `*`.
    Text(Arc<str>),
    /// With `{*}` or `{**}`.
    Template(PathTemplate),
}

/// Why a text is not a [`PathPattern`].
#[derive(Debug, thiserror::Error, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum PathPatternError {
    /// `/a{*}`.
    #[error("{{*}} and {{**}} stand for whole segments, between two slashes")]
    PartOfSegment,
    /// `/{**}/{*}`.
    #[error("{{**}} must be the last of its operators")]
    NotLast,
    /// `/{*}/b*`, `/{*}/{id}`.
    #[error("beside {{*}} and {{**}} there can be no other *, {{ or }}")]
    Mixed,
}

impl PathPattern {
    /// Reads a pattern; with `{*}` or `{**}` inside it is a template.
    ///
    /// # Errors
    ///
    /// A template that Istio refuses, too.
    pub fn parse(text: &str) -> Result<Self, PathPatternError> {
        if !text.contains("{*}") && !text.contains("{**}") {
            return Ok(Self::Text(text.into()));
        }
        let mut segments = Vec::new();
        let mut is_closed = false;
        for part in text.split('/') {
            let operator = match part {
                "{*}" => Segment::One,
                "{**}" => Segment::Rest,
                _ if part.contains("{*}") || part.contains("{**}") => {
                    return Err(PathPatternError::PartOfSegment);
                }
                _ if part.contains(['*', '{', '}']) => return Err(PathPatternError::Mixed),
                _ => {
                    segments.push(Segment::Text(part.into()));
                    continue;
                }
            };
            if is_closed {
                return Err(PathPatternError::NotLast);
            }
            is_closed = operator == Segment::Rest;
            segments.push(operator);
        }
        Ok(Self::Template(PathTemplate { text: text.into(), segments: segments.into() }))
    }

    /// True for a path that it covers.
    pub fn matches(&self, path: &str) -> bool {
        match self {
            Self::Text(pattern) => pattern_matches(pattern, path),
            Self::Template(template) => template.matches(path),
        }
    }

    /// As it was written.
    pub fn as_str(&self) -> &str {
        match self {
            Self::Text(text) => text,
            Self::Template(template) => &template.text,
        }
    }
}

/// A path with `{*}` for exactly one segment and at most one `{**}`, behind which no operator
/// follows, for any text with any number of slashes (as Envoy's URI templates have it:
/// `/a/{**}/b` wants both slashes, so `/a/b` is not one of it).
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct PathTemplate {
    text: Arc<str>,
    segments: Box<[Segment]>,
}

#[derive(Clone, PartialEq, Eq, Debug)]
enum Segment {
    Text(Box<str>),
    One,
    Rest,
}

impl PathTemplate {
    fn matches(&self, path: &str) -> bool {
        let rest_at = self.segments.iter().position(|segment| *segment == Segment::Rest);
        let Some(rest_at) = rest_at else {
            let parts: Vec<&str> = path.split('/').collect();
            return parts.len() == self.segments.len() && all_match(&self.segments, &parts);
        };
        // What is before `{**}` is counted from the front, what is behind it from the back;
        // between them is at least one part, which may be empty.
        let (before, behind) = (&self.segments[..rest_at], &self.segments[rest_at + 1..]);
        let parts: Vec<&str> = path.split('/').collect();
        parts.len() > before.len() + behind.len()
            && all_match(before, &parts[..before.len()])
            && all_match(behind, &parts[parts.len() - behind.len()..])
    }
}

fn all_match(segments: &[Segment], parts: &[&str]) -> bool {
    segments.iter().zip(parts).all(|(segment, part)| match segment {
        Segment::Text(text) => **text == **part,
        Segment::One => !part.is_empty(),
        Segment::Rest => true,
    })
}

/// A pattern over request principals, `issuer/subject`. As in Istio it is taken apart at its
/// last slash, and each half is compared for itself: `*` or `iss*` with any subject, `iss/*`,
/// `iss/sub*`, `*suffix/sub`, `*sub`, or both exactly.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct PrincipalPattern {
    text: Arc<str>,
    issuer: Half,
    subject: Half,
}

#[derive(Clone, PartialEq, Eq, Debug)]
enum Half {
    /// Anything but nothing.
    Any,
    Exact(Box<str>),
    Prefix(Box<str>),
    Suffix(Box<str>),
}

impl PrincipalPattern {
    /// Reads a pattern; every text is one.
    pub fn new(text: &str) -> Self {
        let split = text.rsplit_once('/');
        let prefix = |text: &str| match text {
            "" => Half::Any,
            _ => Half::Prefix(text.into()),
        };
        let suffix = |text: &str| match text {
            "" => Half::Any,
            _ => Half::Suffix(text.into()),
        };
        let (issuer, subject) = match (split, text.strip_prefix('*'), text.strip_suffix('*')) {
            _ if text == "*" => (Half::Any, Half::Any),
            (Some((issuer, subject)), Some(_), _) => {
                (suffix(issuer.strip_prefix('*').unwrap_or(issuer)), Half::Exact(subject.into()))
            }
            (None, Some(behind), _) => (Half::Any, suffix(behind)),
            (Some((issuer, subject)), None, Some(_)) => {
                let before = subject.strip_suffix('*').unwrap_or(subject);
                (Half::Exact(issuer.into()), prefix(before))
            }
            (None, None, Some(before)) => (prefix(before), Half::Any),
            (Some((issuer, subject)), None, None) => {
                (Half::Exact(issuer.into()), Half::Exact(subject.into()))
            }
            // Without a slash there is no subject, and no token is without one: it matches
            // nobody, as in Istio.
            (None, None, None) => (Half::Exact(text.into()), Half::Exact("".into())),
        };
        Self { text: text.into(), issuer, subject }
    }

    /// True for a token of this issuer and subject; neither is empty in one that counts.
    pub fn matches(&self, issuer: &str, subject: &str) -> bool {
        !issuer.is_empty()
            && !subject.is_empty()
            && self.issuer.holds(issuer)
            && self.subject.holds(subject)
    }

    /// As it was written.
    pub fn as_str(&self) -> &str {
        &self.text
    }

    /// True when some token may match.
    pub fn can_match(&self) -> bool {
        self.issuer != Half::Exact("".into()) && self.subject != Half::Exact("".into())
    }
}

impl Half {
    fn holds(&self, text: &str) -> bool {
        match self {
            Self::Any => true,
            Self::Exact(own) => **own == *text,
            Self::Prefix(prefix) => text.starts_with(&**prefix),
            Self::Suffix(suffix) => text.ends_with(&**suffix),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn path_patterns() {
        let rows: &[(&str, &[&str], &[&str])] = &[
            ("/a", &["/a"], &["/a/", "/A", "/ab", ""]),
            ("/a*", &["/a", "/a/b", "/ab"], &["/b", "/"]),
            ("*/b", &["/a/b", "/b"], &["/b/", "/ab"]),
            ("*", &["/", "/a", "*"], &[""]),
            ("/a/{*}", &["/a/b"], &["/a", "/a/", "/a/b/", "/a/b/c", "/b/b"]),
            ("/{*}/b", &["/a/b"], &["//b", "/a/c", "/a/a/b"]),
            ("/a/{*}/", &["/a/b/"], &["/a/b", "/a//"]),
            ("/a/{**}", &["/a/", "/a/b", "/a/b/c", "/a/b/"], &["/a", "/b/a/"]),
            ("/a/{**}/b", &["/a//b", "/a/x/b", "/a/x/y/b", "/a/b/b"], &["/a/b", "/a/x/b/", "/b"]),
            ("/{*}/x/{**}/b.tmp", &["/a/x/y/b.tmp"], &["/x/y/b.tmp", "/a/x/b.tmp", "/a/x/y/b_tmp"]),
            // Braces without an operator are only characters.
            ("/{id}", &["/{id}"], &["/7"]),
        ];
        for (pattern, matching, others) in rows {
            let read = PathPattern::parse(pattern).unwrap();
            assert_eq!(read.as_str(), *pattern);
            for path in *matching {
                assert!(read.matches(path), "{pattern} {path}");
            }
            for path in *others {
                assert!(!read.matches(path), "{pattern} {path}");
            }
        }
        use PathPatternError::{Mixed, NotLast, PartOfSegment};
        let refused = [
            ("/a{*}", PartOfSegment),
            ("/{**}b", PartOfSegment),
            ("/{*}{**}", PartOfSegment),
            ("/{**}/{*}", NotLast),
            ("/{**}/{**}", NotLast),
            ("/{*}/b*", Mixed),
            ("*/{*}", Mixed),
            ("/{*}/{id}", Mixed),
        ];
        for (pattern, error) in refused {
            assert_eq!(PathPattern::parse(pattern), Err(error), "{pattern}");
        }
    }

    #[test]
    fn request_principals_are_compared_half_by_half() {
        const ISS: &str = "https://login.example/realms/a";
        let rows: &[(&str, bool, bool)] = &[
            // With the subject alice, with alice/2.
            ("*", true, true),
            ("https://login.example/realms/a/alice", true, false),
            ("https://login.example/realms/a/bob", false, false),
            ("https://login.example/realms/a/*", true, true),
            ("https://login.example/realms/a/al*", true, true),
            ("https://login.example/realms/b/*", false, false),
            // A prefix without a subject must not end at a slash of the issuer.
            ("https://login.example/*", false, false),
            ("*/alice", true, false),
            ("*realms/a/alice", true, false),
            ("*realms/b/alice", false, false),
            ("*lice", true, false),
            ("https:*", true, true),
            ("alice", false, false),
            ("", false, false),
        ];
        for (pattern, alice, other) in rows {
            let read = PrincipalPattern::new(pattern);
            assert_eq!(read.matches(ISS, "alice"), *alice, "{pattern}");
            assert_eq!(read.matches(ISS, "alice/2"), *other, "{pattern}");
            assert!(!read.matches("", "alice") && !read.matches(ISS, ""), "{pattern}");
        }
        assert!(!PrincipalPattern::new("alice").can_match());
        assert!(!PrincipalPattern::new("/alice").can_match());
        assert!(PrincipalPattern::new("*lice").can_match());
    }
}
