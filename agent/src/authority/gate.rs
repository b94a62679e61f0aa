//! Before any service: who calls, and whether the node's rate allows it. What an unknown caller
//! sends is never read.

use std::{
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    task::{Context, Poll},
    time::Instant,
};

use http::{HeaderMap, Request, Response, header::AUTHORIZATION};
use tonic::{Code, Status, body::Body};
use tower::{Layer, Service};

use super::{
    callers::{AuthError, Caller, CallerAuth},
    limits::Limits,
    listen::Peer,
    metrics::AuthorityMetrics,
    request::AUDIT,
};

/// Authenticates and limits; cheap to clone.
#[derive(Clone)]
pub struct GateLayer {
    gate: Arc<Gate>,
}

struct Gate {
    callers: Arc<dyn CallerAuth>,
    limits: Limits,
    unknown: UnknownCallers,
    metrics: AuthorityMetrics,
}

/// Audit lines about callers that nobody knows: whoever can connect could otherwise fill the
/// log. What is left out is counted in the next line that is written.
struct UnknownCallers {
    lines: Limits,
    left_out: AtomicU64,
}

/// Audit lines about unknown callers: a second, in the long run, and at once.
const UNKNOWN_LINES: (u32, u32) = (20, 200);

impl UnknownCallers {
    fn new() -> Self {
        Self { lines: Limits::new(UNKNOWN_LINES.0, UNKNOWN_LINES.1), left_out: AtomicU64::new(0) }
    }

    /// How many lines were left out before this one; `None`: this one is left out too.
    fn line(&self, now: Instant) -> Option<u64> {
        match self.lines.take(&"".into(), now) {
            Ok(()) => Some(self.left_out.swap(0, Ordering::Relaxed)),
            Err(_) => {
                self.left_out.fetch_add(1, Ordering::Relaxed);
                None
            }
        }
    }
}

impl GateLayer {
    /// Lets through whom `callers` knows, as often as `limits` says.
    pub fn new(callers: Arc<dyn CallerAuth>, limits: Limits, metrics: AuthorityMetrics) -> Self {
        let unknown = UnknownCallers::new();
        Self { gate: Arc::new(Gate { callers, limits, unknown, metrics }) }
    }
}

impl<S> Layer<S> for GateLayer {
    type Service = Gated<S>;

    fn layer(&self, inner: S) -> Gated<S> {
        Gated { gate: self.gate.clone(), inner }
    }
}

/// A service behind the gate.
#[derive(Clone)]
pub struct Gated<S> {
    gate: Arc<Gate>,
    inner: S,
}

impl<S> Service<Request<Body>> for Gated<S>
where
    S: Service<Request<Body>, Response = Response<Body>> + Clone + Send + 'static,
    S::Future: Send,
{
    type Response = Response<Body>;
    type Error = S::Error;
    type Future = Pin<Box<dyn Future<Output = Result<Response<Body>, S::Error>> + Send>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, mut request: Request<Body>) -> Self::Future {
        // The one that is ready goes, the clone gets ready again.
        let clone = self.inner.clone();
        let mut inner = std::mem::replace(&mut self.inner, clone);
        let gate = self.gate.clone();
        Box::pin(async move {
            let begun = Instant::now();
            match gate.admit(request.headers()).await {
                Ok(caller) => {
                    request.extensions_mut().insert(caller);
                    let path = request.uri().path().to_owned();
                    let answer = inner.call(request).await?;
                    // A refusal of a unary call is all in its head.
                    let code =
                        Status::from_header_map(answer.headers()).map_or(Code::Ok, |s| s.code());
                    gate.metrics.request(&path, code, Some(begun.elapsed()));
                    Ok(answer)
                }
                Err((node, status)) => {
                    let path = request.uri().path();
                    let known = node.is_some().then(|| begun.elapsed());
                    gate.metrics.request(path, status.code(), known);
                    gate.metrics.audit("refused", path, reason(&status));
                    let peer = request.extensions().get::<Peer>().map(|p| p.0);
                    let left_out = match &node {
                        Some(_) => Some(0),
                        None => gate.unknown.line(Instant::now()),
                    };
                    let Some(left_out) = left_out else {
                        gate.metrics.left_out();
                        return Ok(status.into_http());
                    };
                    tracing::warn!(
                        target: AUDIT,
                        outcome = "refused",
                        method = request.uri().path(),
                        code = ?status.code(),
                        reason = reason(&status),
                        node = node.as_deref(),
                        peer = peer.map(tracing::field::display),
                        left_out = (left_out > 0).then_some(left_out),
                        error = status.message(),
                        "request refused"
                    );
                    Ok(status.into_http())
                }
            }
        })
    }
}

impl Gate {
    async fn admit(&self, headers: &HeaderMap) -> Result<Caller, (Option<Arc<str>>, Status)> {
        let unknown = |why: &str| (None, Status::unauthenticated(why));
        let mut values = headers.get_all(AUTHORIZATION).iter();
        let (Some(value), None) = (values.next(), values.next()) else {
            return Err(unknown("exactly one authorization header with a bearer token is needed"));
        };
        let token = value.to_str().ok().and_then(|v| {
            let (scheme, token) = v.split_once(' ')?;
            scheme.eq_ignore_ascii_case("bearer").then_some(token)
        });
        let token = token.ok_or_else(|| unknown("the authorization is not a bearer token"))?;
        let caller = self.callers.authenticate(token).await.map_err(|error| match error {
            AuthError::Unknown(why) => unknown(why),
            // Why not is for our log, not for somebody who may be anybody.
            AuthError::Unavailable(why) => {
                tracing::error!(error = why, "callers cannot be authenticated");
                (None, Status::unavailable("callers cannot be authenticated now; try again"))
            }
        })?;
        self.limits.take(&caller.node, Instant::now()).map_err(|wait| {
            let why = format!("too many requests of node {}; wait {wait:.1?}", caller.node);
            (Some(caller.node.clone()), Status::resource_exhausted(why))
        })?;
        Ok(caller)
    }
}

fn reason(status: &Status) -> &'static str {
    match status.code() {
        tonic::Code::Unauthenticated => "unauthenticated",
        tonic::Code::ResourceExhausted => "rate",
        _ => "unavailable",
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn unknown_callers_do_not_fill_the_log() {
        let unknown = UnknownCallers::new();
        let start = Instant::now();
        let written = (0..1000).filter(|_| unknown.line(start).is_some()).count();
        assert_eq!(written, 200);
        let later = start + Duration::from_secs(1);
        assert_eq!(unknown.line(later), Some(800), "what was left out is told");
        assert_eq!(unknown.line(later), Some(0));
    }
}
