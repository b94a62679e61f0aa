//! A judged flow's requests: each one judged, forwarded or refused, and recorded.

use std::{
    net::SocketAddr,
    sync::{Arc, PoisonError},
    time::Instant,
};

use http::{HeaderMap, Request, Response, StatusCode, Version, header::UPGRADE};
use hyper::{
    body::Incoming,
    client::conn::{http1, http2},
};
use signet_ebpf::abi::{Reason, Verdict};

use super::{
    Upgraded,
    answer::{Answer, Open, refusal},
    framing::{Fault, Head},
    head::{self, Malformed, Target},
    stream::Requests,
};
use crate::{
    cluster::model::IdentityHeaders,
    endpoint::state::EndpointState,
    flow::record::HttpRecord,
    policy::{
        end_user::{Invalid, Validated, authenticate, output_headers},
        request::RequestFacts,
    },
    proxy::{
        inbound::endpoint,
        judge::{Facts, Judgement, judge, judge_request},
        plane::Core,
        records::RequestRecords,
        served::Served,
    },
};

/// What every request of a flow has in common.
pub struct Judged {
    /// The core that carries it.
    pub core: Arc<Core>,
    /// The endpoint.
    pub served: Arc<Served>,
    /// Who asks, as the connection proves it.
    pub facts: Facts,
    /// The client's address.
    pub client: SocketAddr,
    /// Where the records go.
    pub records: RequestRecords,
}

/// Why a request is not forwarded.
#[derive(Debug, thiserror::Error)]
enum Refused {
    #[error("{0}")]
    Malformed(#[from] Malformed),
    #[error("the pod is not registered (any more)")]
    Unregistered,
    #[error("policy refuses")]
    Policy(Box<Judgement>),
    #[error("{0}")]
    Token(#[from] Invalid),
    #[error("policy refused the whole flow when it came")]
    Undelivered,
}

impl Refused {
    fn reason(&self) -> Reason {
        match self {
            Self::Malformed(_) => Reason::ProtocolError,
            Self::Unregistered => Reason::PodUnregistered,
            Self::Token(_) => Reason::TokenInvalid,
            Self::Undelivered => Reason::AppUnreachable,
            Self::Policy(judgement) => judgement.reason,
        }
    }

    fn status(&self) -> StatusCode {
        match self {
            Self::Malformed(Malformed::Framing(Fault::Slow)) => StatusCode::REQUEST_TIMEOUT,
            Self::Malformed(_) => StatusCode::BAD_REQUEST,
            Self::Token(error) => error.status(),
            Self::Unregistered | Self::Undelivered => StatusCode::SERVICE_UNAVAILABLE,
            Self::Policy(_) => StatusCode::FORBIDDEN,
        }
    }
}

/// The way to the application.
pub enum Sender {
    /// There is none: nothing may pass.
    Nobody,
    /// One request at a time.
    Http1(tokio::sync::Mutex<http1::SendRequest<Incoming>>),
    /// Many.
    Http2(http2::SendRequest<Incoming>),
}

impl Sender {
    pub(super) fn http1(sender: http1::SendRequest<Incoming>) -> Self {
        Self::Http1(tokio::sync::Mutex::new(sender))
    }

    /// Sends a request; none without an application.
    async fn send(&self, request: Request<Incoming>) -> Option<hyper::Result<Response<Incoming>>> {
        Some(match self {
            Self::Nobody => return None,
            Self::Http1(sender) => {
                let mut sender = sender.lock().await;
                if let Err(error) = sender.ready().await {
                    return Some(Err(error));
                }
                let answer = sender.send_request(request);
                drop(sender);
                answer.await
            }
            Self::Http2(sender) => {
                let mut sender = sender.clone();
                match sender.ready().await {
                    Ok(()) => sender.send_request(request).await,
                    Err(error) => Err(error),
                }
            }
        })
    }
}

/// A flow's requests, between its client and its application.
pub struct Exchange {
    judged: Arc<Judged>,
    sender: Sender,
    open: Open,
    /// What the watch over HTTP/1 found.
    requests: Option<Requests>,
    upgraded: Upgraded,
}

/// A request that may pass.
struct Passing {
    target: Target,
    upgrades: bool,
    judgement: Judgement,
    endpoint: Arc<EndpointState>,
    validated: Option<Validated>,
    told: IdentityHeaders,
}

impl Judged {
    pub(super) fn exchange(
        self: &Arc<Self>,
        sender: Sender,
        open: Open,
        requests: Option<Requests>,
        upgraded: Upgraded,
    ) -> Arc<Exchange> {
        Arc::new(Exchange { judged: self.clone(), sender, open, requests, upgraded })
    }

    /// What policy says of the flow when nobody looks at its requests.
    pub(super) fn judge_unseen(&self) -> Judgement {
        let state = self.core.plane.state.current();
        let facts = Facts { by_request: false, ..self.facts.clone() };
        match endpoint(&state, &self.served) {
            Some(endpoint) => {
                let judgement = judge(&state, &endpoint, &facts);
                let namespace = state.world.namespaces.get(&endpoint.pod.name.namespace);
                let told =
                    namespace.is_some_and(|n| n.identity_headers != IdentityHeaders::default());
                // The application believes tokens and headers because they were looked at: a
                // client must not get past that by a silence or by bytes that only some servers
                // take for HTTP.
                if judgement.passes() && (told || !endpoint.request_authentications.is_empty()) {
                    return Judgement {
                        verdict: Verdict::Dropped,
                        reason: Reason::ProtocolError,
                        policy: None,
                        revision: state.revision,
                    };
                }
                judgement
            }
            None => Judgement {
                verdict: Verdict::Dropped,
                reason: Reason::PodUnregistered,
                policy: None,
                revision: state.revision,
            },
        }
    }

    /// Completes when the endpoint takes nothing new any more.
    pub(super) async fn draining(&self) {
        self.served.drain.cancelled().await;
    }

    /// Records that a request's body broke HTTP's rules after its head had passed.
    pub(super) fn refused_body(&self, fault: Fault) {
        let revision = self.core.plane.state.current().revision;
        tracing::debug!(client = %self.client, error = %fault, "request body refused");
        self.records.refused(Reason::ProtocolError, None, revision, HttpRecord::default());
    }
}

impl Exchange {
    /// Answers one request.
    ///
    /// # Errors
    /// When the application's connection broke: then the client's does, too.
    pub async fn answer(
        self: Arc<Self>,
        mut request: Request<Incoming>,
    ) -> hyper::Result<Response<Answer>> {
        let began = Instant::now();
        let answering = self.open.begin();
        let seen = self.requests.as_ref().map(Requests::next);
        let mut http = HttpRecord {
            method: request.method().as_str().into(),
            path: request.uri().path().into(),
            version: version(request.version()),
            ..HttpRecord::default()
        };
        let passing = match self.judge(&request, seen) {
            Ok(passing) => passing,
            Err(refused) => {
                self.go_on(false);
                return Ok(self.refuse(&refused, &request, http, began));
            }
        };
        let Passing { target, upgrades, judgement, endpoint, validated, told } = passing;
        http.path = target.path.as_str().into();
        let on_client = upgrades.then(|| hyper::upgrade::on(&mut request));
        let (mut parts, body) = request.into_parts();
        if let Err(error) = head::rewrite(&mut parts, &target, upgrades, &told) {
            let request = Request::from_parts(parts, body);
            self.go_on(false);
            return Ok(self.refuse(&error.into(), &request, http, began));
        }
        // What only a valid token says is not the client's to say.
        for name in output_headers(&endpoint.request_authentications) {
            parts.headers.remove(name);
        }
        if let Some(validated) = validated {
            head::take_tokens(&mut parts, &validated.remove);
            for (name, value) in validated.set {
                parts.headers.insert(name, value);
            }
        }
        let peer = self.judged.facts.peer.as_ref().filter(|_| self.judged.facts.proven);
        head::tell(&mut parts.headers, &told, peer, &endpoint.identity);
        let mut answer = match self.sender.send(Request::from_parts(parts, body)).await {
            None => {
                // The flow came before the policy that would have it; the next one is delivered.
                self.go_on(false);
                let (asked, version) = (HeaderMap::new(), Version::HTTP_11);
                return Ok(self.refuse_as(&Refused::Undelivered, &asked, version, http, began));
            }
            Some(Ok(answer)) => answer,
            Some(Err(error)) => {
                http.latency = began.elapsed();
                self.judged.records.passed(&judgement, http);
                return Err(error);
            }
        };
        http.status = answer.status().as_u16();
        http.latency = began.elapsed();
        self.judged.records.passed(&judgement, http);
        if answer.status() == StatusCode::SWITCHING_PROTOCOLS {
            let is_websocket = answer
                .headers()
                .get(UPGRADE)
                .is_some_and(|v| v.as_bytes().eq_ignore_ascii_case(b"websocket"));
            let Some(on_client) = on_client.filter(|_| is_websocket) else {
                // Nobody asked for it: what follows would be no HTTP, and unjudged.
                self.go_on(false);
                let mut bad = Response::new(Answer::Said(None));
                *bad.status_mut() = StatusCode::BAD_GATEWAY;
                return Ok(bad);
            };
            let on_app = hyper::upgrade::on(&mut answer);
            *self.upgraded.lock().unwrap_or_else(PoisonError::into_inner) =
                Some((on_client, on_app));
            self.go_on(true);
        } else {
            self.go_on(false);
        }
        let (parts, body) = answer.into_parts();
        Ok(Response::from_parts(parts, Answer::App(body, answering)))
    }

    fn go_on(&self, switched: bool) {
        if let Some(requests) = &self.requests {
            requests.go_on(switched);
        }
    }

    fn judge(
        &self,
        request: &Request<Incoming>,
        seen: Option<Option<Result<Head, Fault>>>,
    ) -> Result<Passing, Refused> {
        let head = match seen {
            // HTTP/2: the library's own checks, and ours of the head.
            None => None,
            Some(Some(Ok(head))) => Some(head),
            Some(Some(Err(fault))) => return Err(Malformed::Framing(fault).into()),
            Some(None) => return Err(Malformed::TwoReadings.into()),
        };
        let upgrades = head.as_ref().is_some_and(|head| head.upgrades);
        // The checks look at the head alone.
        let target = head::check(request, head.as_ref())?;
        let judged = &self.judged;
        let state = judged.core.plane.state.current();
        let endpoint = endpoint(&state, &judged.served).ok_or(Refused::Unregistered)?;
        let validated = authenticate(
            &endpoint.request_authentications,
            &**judged.core.plane.trust.issuers(),
            request.headers(),
            request.uri().query(),
            jiff::Timestamp::now(),
        )?;
        let facts = RequestFacts {
            method: request.method().as_str(),
            path: &target.path,
            host: &target.host,
            headers: request.headers(),
            sni: None,
            remote_ip: judged.client.ip(),
            user: validated.as_ref().map(|validated| &validated.user),
        };
        let judgement = judge_request(&state, &endpoint, &judged.facts, &facts);
        if !judgement.passes() {
            return Err(Refused::Policy(Box::new(judgement)));
        }
        let namespace = state.world.namespaces.get(&endpoint.pod.name.namespace);
        let told = namespace.map(|n| n.identity_headers.clone()).unwrap_or_default();
        Ok(Passing { target, upgrades, judgement, endpoint, validated, told })
    }

    fn refuse(
        &self,
        why: &Refused,
        request: &Request<Incoming>,
        http: HttpRecord,
        began: Instant,
    ) -> Response<Answer> {
        self.refuse_as(why, request.headers(), request.version(), http, began)
    }

    fn refuse_as(
        &self,
        why: &Refused,
        asked: &HeaderMap,
        version: Version,
        mut http: HttpRecord,
        began: Instant,
    ) -> Response<Answer> {
        let judged = &self.judged;
        let (policy, revision) = match why {
            Refused::Policy(judgement) => (judgement.policy.clone(), judgement.revision),
            _ => (None, judged.core.plane.state.current().revision),
        };
        tracing::debug!(client = %judged.client, error = %why, "request refused");
        let detail: Option<&dyn std::fmt::Display> = match why {
            Refused::Malformed(error) => {
                if let Malformed::Framing(_) = error {
                    // What stands in for it says nothing of the request.
                    (http.method, http.path) = (Arc::from("-"), Arc::from("-"));
                }
                Some(error)
            }
            Refused::Token(error) => Some(error),
            _ => None,
        };
        let answer = refusal(why.status(), why.reason(), detail, asked, version);
        http.status = why.status().as_u16();
        http.latency = began.elapsed();
        judged.records.refused(why.reason(), policy, revision, http);
        answer
    }
}

fn version(version: Version) -> &'static str {
    match version {
        Version::HTTP_10 => "HTTP/1.0",
        Version::HTTP_2 => "HTTP/2",
        _ => "HTTP/1.1",
    }
}
