//! Before any service: who calls, and whether the node's rate allows it. What an unknown caller
//! sends is never read.

use std::{
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::Instant,
};

use http::{HeaderMap, Request, Response, header::AUTHORIZATION};
use tonic::{Status, body::Body};
use tower::{Layer, Service};

use super::{
    callers::{AuthError, Caller, CallerAuth},
    limits::Limits,
    listen::Peer,
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
}

impl GateLayer {
    /// Lets through whom `callers` knows, as often as `limits` says.
    pub fn new(callers: Arc<dyn CallerAuth>, limits: Limits) -> Self {
        Self { gate: Arc::new(Gate { callers, limits }) }
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
            match gate.admit(request.headers()).await {
                Ok(caller) => {
                    request.extensions_mut().insert(caller);
                    inner.call(request).await
                }
                Err((node, status)) => {
                    let peer = request.extensions().get::<Peer>().map(|p| p.0);
                    tracing::warn!(
                        target: AUDIT,
                        outcome = "refused",
                        method = request.uri().path(),
                        code = ?status.code(),
                        reason = reason(&status),
                        node = node.as_deref(),
                        peer = peer.map(tracing::field::display),
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
