//! The calls of the Workload API: who calls, what they get, and what they are told else.
//!
//! Status codes and texts are the standard's (SPIFFE_Workload_API, section 6): clients act by
//! them.

use std::{
    collections::HashSet,
    sync::Arc,
    time::{Duration, Instant},
};

use jiff::Timestamp;
use tokio::{
    sync::{mpsc, watch},
    time,
};
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::{Code, Request, Response, Status};

use super::{
    Limits, Workload, WorkloadApiDeps, WorkloadKey, answers,
    attest::{self, AttestError, Caller},
    connections::{Payer, Slot, Slots},
    counters::Counters,
    keeper::{Keeper, Listening},
    tokens::{Token, Tokens},
};
use crate::{
    proto::workload::{
        JwtBundlesRequest, JwtBundlesResponse, Jwtsvid, JwtsvidRequest, JwtsvidResponse,
        ValidateJwtsvidRequest, ValidateJwtsvidResponse, X509BundlesRequest, X509BundlesResponse,
        X509svidRequest, X509svidResponse,
        spiffe_workload_api_server::{SpiffeWorkloadApi, SpiffeWorkloadApiServer},
    },
    spiffe::{JwtSvid, SpiffeId, Svid, jwt},
    svid::issuer::{JwtIssuer, JwtRequest},
};

/// The metadata that every call carries, so that no web page can be made to call.
const SECURITY_HEADER: &str = "workload.spiffe.io";
/// The authority has so long to sign a token.
const JWT_TIMEOUT: Duration = Duration::from_secs(10);
/// The longest audience, in bytes.
const MAX_AUDIENCE_LEN: usize = 2048;
/// Messages that wait for a slow reader of a stream; what comes after is the newest state.
const STREAM_BUFFER: usize = 1;

type Answer<T> = Result<Response<T>, Status>;
type Messages<T> = ReceiverStream<Result<T, Status>>;

/// Answers the Workload API's calls; cheap to clone.
#[derive(Clone)]
pub(super) struct Service(Arc<Inner>);

struct Inner {
    deps: WorkloadApiDeps,
    keeper: Arc<Keeper>,
    counters: Arc<Counters>,
    tokens: Tokens,
    calls: Slots,
    stop: CancellationToken,
}

/// A call whose caller is a workload.
struct Call {
    workload: Workload,
    slot: Slot,
}

impl Service {
    pub(super) fn new(
        deps: WorkloadApiDeps,
        keeper: Arc<Keeper>,
        counters: Arc<Counters>,
        stop: CancellationToken,
    ) -> Self {
        let (tokens, calls) = (Tokens::default(), Slots::default());
        Self(Arc::new(Inner { deps, keeper, counters, tokens, calls, stop }))
    }

    pub(super) fn into_server(self, max_request: usize) -> SpiffeWorkloadApiServer<Self> {
        SpiffeWorkloadApiServer::new(self).max_decoding_message_size(max_request)
    }

    pub(super) fn limits(&self) -> Limits {
        self.0.deps.limits
    }

    pub(super) fn counters(&self) -> &Arc<Counters> {
        &self.0.counters
    }

    /// Follows the node's state.
    pub(super) fn states(&self) -> watch::Receiver<u64> {
        self.0.deps.state.subscribe()
    }

    /// Forgets SVIDs that nobody has any use for.
    pub(super) fn sweep(&self, now: Instant) {
        self.0.keeper.sweep(|key| self.0.id_of(key).is_some(), now);
        let ids: HashSet<SpiffeId> = {
            let state = self.0.deps.state.current();
            let pods = state.endpoints.values().map(|endpoint| endpoint.identity.clone());
            pods.chain(self.0.deps.entries.ids()).collect()
        };
        self.0.tokens.sweep(|id| ids.contains(id), Timestamp::now());
    }

    /// The workload that the process belongs to.
    pub(super) fn workload_of(&self, caller: &Caller) -> Result<Option<Workload>, AttestError> {
        self.0.workload_of(caller)
    }

    /// Counts a call by its outcome.
    fn counted<T>(&self, method: &'static str, answer: Answer<T>) -> Answer<T> {
        let code = answer.as_ref().map_or_else(Status::code, |_| Code::Ok);
        self.0.counters.call(method, code);
        if let Err(status) = &answer {
            tracing::debug!(method, code = ?status.code(), reason = status.message(), "a call of the Workload API was refused");
        }
        answer
    }
}

impl Inner {
    fn workload_of(&self, caller: &Caller) -> Result<Option<Workload>, AttestError> {
        let hierarchy = &self.deps.hierarchy;
        let Some(name) = caller.cgroup(hierarchy)? else { return Ok(None) };
        let state = self.deps.state.current();
        if let Some(endpoint) = attest::pod_of(&state, hierarchy, &name) {
            return Ok(Some(Workload {
                key: WorkloadKey::Pod(endpoint.key.clone()),
                id: endpoint.identity.clone(),
            }));
        }
        // A pod that is not known yet is never taken for something else: its root user is not
        // the node's.
        if name.starts_with(&self.deps.workloads_root) {
            return Ok(None);
        }
        let entry = self.deps.entries.of(caller, &name)?;
        Ok(entry.map(|entry| Workload { key: WorkloadKey::Entry(entry.name), id: entry.id }))
    }

    /// What every call begins with: the header, then who calls, then whether it is too much.
    fn enter<T>(&self, request: &Request<T>) -> Result<Call, Status> {
        let header = request.metadata().get(SECURITY_HEADER);
        if header.is_none_or(|value| value != "true") {
            return Err(Status::invalid_argument(format!(
                "security header missing from request: send the metadata {SECURITY_HEADER}: true"
            )));
        }
        if self.deps.state.current().revision == 0 {
            return Err(Status::unavailable("the agent is starting: try again"));
        }
        let caller = request.extensions().get::<Arc<Caller>>().ok_or_else(no_identity)?;
        let workload = match self.workload_of(caller) {
            Ok(Some(workload)) => workload,
            Ok(None) => {
                self.counters.unattested("no_workload");
                return Err(no_identity());
            }
            Err(error) => {
                self.counters.unattested(error.kind());
                tracing::debug!(?caller, %error, "a caller of the Workload API is not known");
                return Err(no_identity());
            }
        };
        let payer = Payer::Workload(workload.key.clone());
        let slot = self.calls.take(&payer, self.deps.limits.calls).ok_or_else(|| {
            Status::resource_exhausted(format!(
                "this workload has {} calls open already: end some",
                self.deps.limits.calls
            ))
        })?;
        Ok(Call { workload, slot })
    }

    /// The JWT issuer, or that there is none.
    fn jwt(&self) -> Result<&Arc<dyn JwtIssuer>, Status> {
        self.deps.jwt_issuer.as_ref().filter(|issuer| issuer.issues_jwts()).ok_or_else(|| {
            Status::unimplemented("this node's certificate authority issues no JWT-SVIDs")
        })
    }

    /// The SVID to be handed out now; `None` while there is no usable one.
    fn svid(&self, workload: &Workload) -> Option<Arc<Svid>> {
        let svid = self.keeper.svids().get(&workload.key)?;
        (svid.id == workload.id && svid.is_valid_at(Timestamp::now())).then_some(svid)
    }

    /// Why there is no SVID yet, for the caller's log.
    fn why_none(&self, key: &WorkloadKey) -> Status {
        let status = self.keeper.svids().status().into_iter().find(|s| s.key == *key);
        let why = status.and_then(|s| s.last_error);
        Status::unavailable(match why {
            Some(why) => format!("no SVID has been issued yet: {why}"),
            None => "no SVID has been issued yet: try again".to_owned(),
        })
    }

    /// True while the workload is there and is who it was.
    fn is_still(&self, workload: &Workload) -> bool {
        self.id_of(&workload.key).is_some_and(|id| id == workload.id)
    }

    /// The identity of a workload that is there.
    fn id_of(&self, key: &WorkloadKey) -> Option<SpiffeId> {
        match key {
            WorkloadKey::Pod(key) => {
                let state = self.deps.state.current();
                let endpoint = state.endpoints.get(&key.netns)?;
                (endpoint.key == *key).then(|| endpoint.identity.clone())
            }
            WorkloadKey::Entry(name) => self.deps.entries.id_of(name),
        }
    }
}

/// Clients know this text.
fn no_identity() -> Status {
    Status::permission_denied("no identity issued")
}

fn stopping() -> Status {
    Status::unavailable("the agent is stopping: connect again")
}

/// A stream's end: what it is made of, and everything that may change that.
struct Stream<T> {
    inner: Arc<Inner>,
    workload: Workload,
    changes: Vec<watch::Receiver<u64>>,
    sender: mpsc::Sender<Result<T, Status>>,
    /// While the stream lives, the SVID is wanted and the call counts.
    _kept: (Option<Listening>, Slot),
}

/// What a stream has to say at a moment.
enum Now<T> {
    /// This, which is version so and so.
    Message(T, Version),
    /// The same as before.
    Same,
    /// Nothing can be said yet.
    Nothing,
}

/// Tells a stream's messages apart without comparing keys byte by byte.
struct Version {
    /// Held, so that no other SVID can come to lie at its address.
    svid: Option<Arc<Svid>>,
    generation: u64,
}

impl PartialEq for Version {
    fn eq(&self, other: &Self) -> bool {
        let same_svid = match (&self.svid, &other.svid) {
            (Some(one), Some(other)) => Arc::ptr_eq(one, other),
            (one, other) => one.is_none() && other.is_none(),
        };
        same_svid && self.generation == other.generation
    }
}

impl<T: Send + 'static> Stream<T> {
    /// Sends what `now` says at each change, the first at once, until somebody ends it.
    async fn run(mut self, now: impl Fn(&Inner, &Workload, Option<&Version>) -> Now<T> + Send) {
        let begun = time::Instant::now();
        let first_answer = self.inner.deps.limits.first_answer;
        let mut sent: Option<Version> = None;
        loop {
            for changes in &mut self.changes {
                changes.mark_unchanged();
            }
            if !self.inner.is_still(&self.workload) {
                let _ = self.sender.send(Err(no_identity())).await;
                return;
            }
            match now(&self.inner, &self.workload, sent.as_ref()) {
                Now::Message(message, version) => {
                    if self.sender.send(Ok(message)).await.is_err() {
                        return;
                    }
                    self.inner.counters.message();
                    sent = Some(version);
                }
                Now::Same | Now::Nothing => {}
            }
            let waiting = sent.is_none();
            tokio::select! {
                going_on = any_changed(&mut self.changes) => {
                    if !going_on {
                        let _ = self.sender.send(Err(stopping())).await;
                        return;
                    }
                }
                () = self.sender.closed() => return,
                () = self.inner.stop.cancelled() => {
                    let _ = self.sender.send(Err(stopping())).await;
                    return;
                }
                () = time::sleep_until(begun + first_answer), if waiting => {
                    let status = self.inner.why_none(&self.workload.key);
                    let _ = self.sender.send(Err(status)).await;
                    return;
                }
            }
        }
    }
}

/// Waits for a change of any; false when one has no sender any more.
async fn any_changed(changes: &mut [watch::Receiver<u64>]) -> bool {
    let waits = changes.iter_mut().map(|changes| Box::pin(changes.changed()));
    let (first, _, _) = futures_util::future::select_all(waits).await;
    first.is_ok()
}

#[tonic::async_trait]
impl SpiffeWorkloadApi for Service {
    type FetchX509SVIDStream = Messages<X509svidResponse>;
    type FetchX509BundlesStream = Messages<X509BundlesResponse>;
    type FetchJWTBundlesStream = Messages<JwtBundlesResponse>;

    async fn fetch_x509svid(
        &self,
        request: Request<X509svidRequest>,
    ) -> Answer<Self::FetchX509SVIDStream> {
        let inner = Arc::clone(&self.0);
        let answer = inner.enter(&request).map(|Call { workload, slot }| {
            let listening = inner.keeper.listen(&workload.key, &workload.id);
            let changes = vec![
                inner.keeper.svids().subscribe(),
                inner.deps.trust.subscribe(),
                inner.deps.state.subscribe(),
                inner.deps.entries.subscribe(),
            ];
            let (sender, receiver) = mpsc::channel(STREAM_BUFFER);
            let stream =
                Stream { inner, workload, changes, sender, _kept: (Some(listening), slot) };
            tokio::spawn(stream.run(|inner, workload, sent| {
                let generation = inner.deps.trust.generation();
                let Some(svid) = inner.svid(workload) else { return Now::Nothing };
                let version = Version { svid: Some(Arc::clone(&svid)), generation };
                if sent == Some(&version) {
                    return Now::Same;
                }
                match answers::x509_svid(&svid, &inner.deps.trust) {
                    Some(message) => Now::Message(message, version),
                    None => Now::Nothing,
                }
            }));
            Response::new(ReceiverStream::new(receiver))
        });
        self.counted("FetchX509SVID", answer)
    }

    async fn fetch_x509_bundles(
        &self,
        request: Request<X509BundlesRequest>,
    ) -> Answer<Self::FetchX509BundlesStream> {
        let inner = Arc::clone(&self.0);
        let answer = inner.enter(&request).map(|Call { workload, slot }| {
            let changes = vec![
                inner.deps.trust.subscribe(),
                inner.deps.state.subscribe(),
                inner.deps.entries.subscribe(),
            ];
            let (sender, receiver) = mpsc::channel(STREAM_BUFFER);
            let stream = Stream { inner, workload, changes, sender, _kept: (None, slot) };
            tokio::spawn(stream.run(|inner, _, sent| {
                let version = Version { svid: None, generation: inner.deps.trust.generation() };
                if sent == Some(&version) {
                    return Now::Same;
                }
                match answers::x509_bundles(&inner.deps.trust, &inner.deps.trust_domain) {
                    Some(message) => Now::Message(message, version),
                    None => Now::Nothing,
                }
            }));
            Response::new(ReceiverStream::new(receiver))
        });
        self.counted("FetchX509Bundles", answer)
    }

    async fn fetch_jwtsvid(&self, request: Request<JwtsvidRequest>) -> Answer<JwtsvidResponse> {
        let answer = self.0.fetch_jwt_svid(request).await;
        self.counted("FetchJWTSVID", answer)
    }

    async fn fetch_jwt_bundles(
        &self,
        request: Request<JwtBundlesRequest>,
    ) -> Answer<Self::FetchJWTBundlesStream> {
        let inner = Arc::clone(&self.0);
        let entered = inner.enter(&request).and_then(|call| inner.jwt().map(|_| call));
        let answer = entered.map(|Call { workload, slot }| {
            let changes = vec![
                inner.deps.trust.subscribe_jwt(),
                inner.deps.state.subscribe(),
                inner.deps.entries.subscribe(),
            ];
            let (sender, receiver) = mpsc::channel(STREAM_BUFFER);
            let stream = Stream { inner, workload, changes, sender, _kept: (None, slot) };
            tokio::spawn(stream.run(|inner, _, sent| {
                let generation = *inner.deps.trust.subscribe_jwt().borrow();
                let version = Version { svid: None, generation };
                if sent == Some(&version) {
                    return Now::Same;
                }
                match answers::jwt_bundles(&inner.deps.trust, &inner.deps.trust_domain) {
                    Some(message) => Now::Message(message, version),
                    None => Now::Nothing,
                }
            }));
            Response::new(ReceiverStream::new(receiver))
        });
        self.counted("FetchJWTBundles", answer)
    }

    async fn validate_jwtsvid(
        &self,
        request: Request<ValidateJwtsvidRequest>,
    ) -> Answer<ValidateJwtsvidResponse> {
        let answer = self.0.validate_jwt_svid(request);
        self.counted("ValidateJWTSVID", answer)
    }
}

impl Inner {
    async fn fetch_jwt_svid(&self, request: Request<JwtsvidRequest>) -> Answer<JwtsvidResponse> {
        let Call { workload, slot: _slot } = self.enter(&request)?;
        let issuer = self.jwt()?;
        let JwtsvidRequest { audience, spiffe_id } = request.into_inner();
        check_audiences(&audience)?;
        if !spiffe_id.is_empty() {
            let asked = SpiffeId::parse(&spiffe_id)
                .map_err(|error| Status::invalid_argument(format!("spiffe_id: {error}")))?;
            if asked != workload.id {
                return Err(no_identity());
            }
        }
        let keys = issuer.jwt_bundle().borrow().clone();
        let held = self.tokens.get(&workload.id, &audience, &keys, Timestamp::now());
        let token = match held {
            Some(token) => {
                self.counters.token("cached");
                token
            }
            None => {
                let asked = self.new_token(&**issuer, &workload.id, audience).await;
                self.counters.token(if asked.is_ok() { "issued" } else { "failed" });
                asked.map_err(|error| {
                    tracing::warn!(id = %workload.id, %error, "no JWT-SVID could be issued");
                    Status::unavailable(format!("no JWT-SVID could be issued: {error}"))
                })?
            }
        };
        let svid = Jwtsvid { spiffe_id: workload.id.to_string(), svid: token, hint: String::new() };
        Ok(Response::new(JwtsvidResponse { svids: vec![svid] }))
    }

    /// Asks the authority for a token. Its answer is held against what was asked for, before it
    /// is anybody's, and kept.
    async fn new_token(
        &self,
        issuer: &dyn JwtIssuer,
        id: &SpiffeId,
        audiences: Vec<String>,
    ) -> Result<String, String> {
        let request = JwtRequest { id: id.clone(), audiences, ttl: None };
        let token = time::timeout(JWT_TIMEOUT, issuer.issue_jwt(&request))
            .await
            .map_err(|_| format!("the authority did not answer within {JWT_TIMEOUT:?}"))?
            .map_err(|error| error.to_string())?;
        let (keys, now) = (issuer.jwt_bundle().borrow().clone(), Timestamp::now());
        let own = &self.deps.trust_domain;
        let mut expires_at = Timestamp::MAX;
        for audience in &request.audiences {
            let bundle_of = |domain: &_| (domain == own).then(|| Arc::clone(&keys));
            let svid = JwtSvid::validate(&token, audience, bundle_of, now)
                .map_err(|error| format!("the authority's answer is refused: {error}"))?;
            if svid.id != *id {
                return Err(format!("the authority's answer is for {}", svid.id));
            }
            expires_at = svid.expires_at;
        }
        let kept = Token::new(token.clone(), expires_at, keys, now);
        self.tokens.put(id, request.audiences, kept, now);
        Ok(token)
    }

    fn validate_jwt_svid(
        &self,
        request: Request<ValidateJwtsvidRequest>,
    ) -> Answer<ValidateJwtsvidResponse> {
        let _call = self.enter(&request)?;
        self.jwt()?;
        let ValidateJwtsvidRequest { audience, svid } = request.into_inner();
        check_audiences(std::slice::from_ref(&audience))?;
        if svid.is_empty() {
            return Err(Status::invalid_argument("svid: the token to be validated is missing"));
        }
        let bundle_of = |domain: &_| self.deps.trust.jwt_bundle(domain);
        let valid = JwtSvid::validate(&svid, &audience, bundle_of, Timestamp::now())
            .map_err(|error| Status::invalid_argument(format!("svid: {error}")))?;
        Ok(Response::new(ValidateJwtsvidResponse {
            spiffe_id: valid.id.to_string(),
            claims: Some(answers::claims(valid.claims)),
        }))
    }
}

/// At least one audience, none of them empty, not too many and not too long.
fn check_audiences(audiences: &[String]) -> Result<(), Status> {
    let problem = if audiences.is_empty() || audiences.iter().any(String::is_empty) {
        "audience must be specified".to_owned()
    } else if audiences.len() > jwt::MAX_AUDIENCES {
        format!("audience: {} are too many, at most {}", audiences.len(), jwt::MAX_AUDIENCES)
    } else if audiences.iter().any(|audience| audience.len() > MAX_AUDIENCE_LEN) {
        format!("audience: longer than {MAX_AUDIENCE_LEN} bytes")
    } else {
        return Ok(());
    };
    Err(Status::invalid_argument(problem))
}
