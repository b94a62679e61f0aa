//! The verdict over policies for single HTTP requests.
//!
//! Who carries a flow of a workload whose policies ask about requests ([`asks_requests`]):
//!
//! 1. judges the flow with [`evaluate_before_requests`], which refuses only what would be
//!    refused whatever is requested,
//! 2. asks [`depends_on_requests`]; where it says no, every request has the flow's verdict and
//!    the bytes need not be HTTP,
//! 3. judges each request with [`evaluate_request`], over what its end user's token proves
//!    ([`super::end_user`]),
//! 4. judges what turns out not to be HTTP with [`super::evaluate::evaluate`], which fails
//!    closed.
//!
//! All of them decide as [`super::evaluate`] says, and as Istio does: DENY, ALLOW, the default;
//! AUDIT reports.

use std::{net::IpAddr, sync::Arc};

use http::{HeaderMap, HeaderName, header::HOST};
use signet_ebpf::abi::Direction;

use super::{
    asked::{Operation, RequestCondition, RequestKey, RequestSource},
    end_user::EndUser,
    evaluate::{FlowFacts, Outcome, Question, evaluate, judge},
    model::{Policy, pattern_matches},
};

/// What is known of an HTTP request when it is judged.
#[derive(Clone, Copy, Debug)]
pub struct RequestFacts<'a> {
    /// The method, as sent.
    pub method: &'a str,
    /// The path, normalised, without the query.
    pub path: &'a str,
    /// The authority or `Host` as received, with its port where it names one; upper and lower
    /// case are the same.
    pub host: &'a str,
    /// Every header as received.
    pub headers: &'a HeaderMap,
    /// The server name of a TLS that came through the flow; normally there is none.
    pub sni: Option<&'a str>,
    /// The request's first sender, as far as that can be trusted.
    pub remote_ip: IpAddr,
    /// The end user whose token is validated.
    pub user: Option<&'a EndUser>,
}

/// Judges one request on a flow, under the policies that select the pod, in their order.
pub fn evaluate_request(
    policies: &[Arc<Policy>],
    default_deny: bool,
    flow: &FlowFacts<'_>,
    request: &RequestFacts<'_>,
) -> Outcome {
    judge(policies, default_deny, &Question { flow, asked: Asked::Seen(request) })
}

/// Judges a flow whose requests are judged afterwards, one by one: refuses only what would be
/// refused whatever is requested. Never a verdict for a flow that nobody watches.
pub fn evaluate_before_requests(
    policies: &[Arc<Policy>],
    default_deny: bool,
    flow: &FlowFacts<'_>,
) -> Outcome {
    judge(policies, default_deny, &Question { flow, asked: Asked::Awaited })
}

/// True when any of the policies asks something of the HTTP requests that a pod receives.
///
/// Dry runs and AUDITs count: without a judge they would report what is not so.
pub fn asks_requests(policies: &[Arc<Policy>]) -> bool {
    policies.iter().any(|policy| {
        policy.unsupported.is_empty()
            && policy
                .rules(Direction::Ingress)
                .iter()
                .any(|rule| !rule.never && rule.asks_requests())
    })
}

/// True when the verdict on this flow's requests may depend on what they say; false when the
/// flow's own verdict is theirs, too.
pub fn depends_on_requests(
    policies: &[Arc<Policy>],
    default_deny: bool,
    flow: &FlowFacts<'_>,
) -> bool {
    evaluate(policies, default_deny, flow) != evaluate_before_requests(policies, default_deny, flow)
}

/// How a request is known to who judges.
#[derive(Clone, Copy)]
pub(super) enum Asked<'a> {
    /// Nobody looks at requests: what is asked of them never widens access.
    Unseen,
    /// They are judged afterwards: what is asked of them refuses and reports nothing yet.
    Awaited,
    /// This one.
    Seen(&'a RequestFacts<'a>),
}

impl Asked<'_> {
    /// True when the request is one of the operation's. `allow`: matching widens access.
    pub(super) fn is_of(&self, allow: bool, operation: &Operation) -> bool {
        operation.is_empty() || self.holds(allow, |request| is_of(operation, request))
    }

    /// True when the request comes from one of the source's.
    pub(super) fn comes_from(&self, allow: bool, source: &RequestSource) -> bool {
        source.is_empty() || self.holds(allow, |request| comes_from(source, request))
    }

    /// True when the condition holds.
    pub(super) fn fulfils(&self, allow: bool, condition: &RequestCondition) -> bool {
        self.holds(allow, |request| fulfils(condition, request))
    }

    fn holds(&self, allow: bool, test: impl FnOnce(&RequestFacts<'_>) -> bool) -> bool {
        match self {
            Self::Unseen => !allow,
            Self::Awaited => allow,
            Self::Seen(request) => test(request),
        }
    }
}

/// One of `values` (empty: any) and none of `not_values`.
fn among<T>(values: &[T], not_values: &[T], matches: impl Fn(&T) -> bool) -> bool {
    (values.is_empty() || values.iter().any(&matches)) && !not_values.iter().any(&matches)
}

fn is_of(operation: &Operation, request: &RequestFacts<'_>) -> bool {
    let method = |pattern: &Arc<str>| pattern_matches(pattern, request.method);
    // Patterns of hosts are in lower case.
    let host = request.host.to_ascii_lowercase();
    let host = |pattern: &Arc<str>| is_present(pattern) || pattern_matches(pattern, &host);
    among(&operation.methods, &operation.not_methods, method)
        && among(&operation.paths, &operation.not_paths, |path| path.matches(request.path))
        && among(&operation.hosts, &operation.not_hosts, host)
}

fn comes_from(source: &RequestSource, request: &RequestFacts<'_>) -> bool {
    let ip = request.remote_ip.to_canonical();
    among(&source.remote_blocks, &source.not_remote_blocks, |block| block.contains(&ip))
        && among(&source.principals, &source.not_principals, |pattern| {
            request.user.is_some_and(|user| pattern.matches(user.issuer(), user.subject()))
        })
}

fn fulfils(condition: &RequestCondition, request: &RequestFacts<'_>) -> bool {
    let matches = |pattern: &Arc<str>| match &condition.key {
        RequestKey::Header(name) => header_matches(pattern, name, request),
        RequestKey::Sni => request.sni.is_some_and(|sni| pattern_matches(pattern, sni)),
        RequestKey::Audiences => {
            let user = request.user;
            user.is_some_and(|user| user.audiences().any(|a| pattern_matches(pattern, a)))
        }
        RequestKey::Presenter => {
            let presenter = request.user.and_then(EndUser::presenter);
            presenter.is_some_and(|presenter| pattern_matches(pattern, presenter))
        }
        RequestKey::Claim(path) => {
            let user = request.user;
            user.is_some_and(|user| user.claim(path).any(|text| pattern_matches(pattern, text)))
        }
    };
    among(&condition.values, &condition.not_values, matches)
}

/// A header's values count as one text, as Envoy has it; `*` asks only whether it is there.
/// One that is not there has no value, not an empty one.
fn header_matches(pattern: &str, name: &HeaderName, request: &RequestFacts<'_>) -> bool {
    if *name == HOST {
        // HTTP/2 has it as `:authority` only.
        return is_present(pattern) || pattern_matches(pattern, request.host);
    }
    let mut values = request.headers.get_all(name).iter();
    let Some(first) = values.next() else { return false };
    if is_present(pattern) {
        return true;
    }
    let mut whole = first.as_bytes().to_vec();
    for value in values {
        whole.push(b',');
        whole.extend_from_slice(value.as_bytes());
    }
    // Patterns are text: what is not UTF-8 keeps the ASCII around it and matches no pattern
    // that names such a byte.
    pattern_matches(pattern, &String::from_utf8_lossy(&whole))
}

/// A bare `*`.
fn is_present(pattern: &str) -> bool {
    pattern == "*"
}

#[cfg(test)]
mod tests;
