//! Clients for watches and calls, and what is noted of their answers.

use std::{
    pin::Pin,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    task::{Context, Poll},
    time::Duration,
};

use bytes::Bytes;
use http::{Request, Response};
use http_body_util::{BodyExt as _, combinators::MapFrame};
use jiff::Timestamp;
use kube::{
    Client, Config,
    client::{Body, ClientBuilder},
};
use tower::{Layer, Service};

use super::{KubernetesParams, kinds::Kind, store::Store};
use crate::{api_server::ApiError, cluster::source::WatchFacts};

/// A call that takes longer has failed.
pub(super) const CALL_TIMEOUT: Duration = Duration::from_secs(10);

/// What one watch has lived through.
#[derive(Default)]
pub(super) struct Watching(Mutex<Noted>);

#[derive(Default)]
struct Noted {
    lists: u64,
    events: u64,
    errors: u64,
    last_event: Option<Timestamp>,
    last_heard: Option<Timestamp>,
    error: Option<Arc<str>>,
}

impl Watching {
    fn noted(&self) -> MutexGuard<'_, Noted> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Something, if only a bookmark, came from the server.
    fn heard(&self) {
        self.noted().last_heard = Some(Timestamp::now());
    }

    /// The server has taken the watch.
    fn taken(&self) {
        self.noted().error = None;
    }

    /// An object was told.
    pub(super) fn told(&self) {
        let mut noted = self.noted();
        noted.events += 1;
        noted.last_event = Some(Timestamp::now());
    }

    /// A list was completed, or the server said for certain that there is no such kind.
    pub(super) fn listed(&self) {
        let mut noted = self.noted();
        noted.lists += 1;
        noted.last_event = Some(Timestamp::now());
        noted.error = None;
    }

    /// Something went wrong. Returns whether it is another thing than before.
    pub(super) fn failed(&self, error: &str) -> bool {
        let mut noted = self.noted();
        noted.errors += 1;
        let news = noted.error.as_deref() != Some(error);
        noted.error = Some(error.into());
        news
    }

    pub(super) fn facts(&self, kind: &Kind, store: &Store) -> WatchFacts {
        let noted = self.noted();
        let (objects, faulty) = store.counts();
        WatchFacts {
            kind: kind.shown,
            state: store.state,
            objects,
            faulty,
            lists: noted.lists,
            events: noted.events,
            errors: noted.errors,
            last_event: noted.last_event,
            last_heard: noted.last_heard,
            error: noted.error.clone(),
        }
    }
}

/// A client for one watch alone, which notes what comes.
pub(super) fn of_watch(
    config: &Config,
    params: &KubernetesParams,
    watching: &Arc<Watching>,
) -> Result<Client, ApiError> {
    let mut config = config.clone();
    config.connect_timeout = Some(CALL_TIMEOUT);
    config.write_timeout = Some(CALL_TIMEOUT);
    // A server that hangs without closing sends no bookmarks either.
    config.read_timeout = Some(params.silence());
    config.reset_reader_on_write = true;
    // Failures are shown and waited out by the watch itself.
    config.default_retry = false;
    let builder = ClientBuilder::try_from(config).map_err(wrong)?;
    Ok(builder.with_layer(&Noting(watching.clone())).build())
}

/// A client for single calls.
pub(super) fn of_calls(config: &Config) -> Result<Client, ApiError> {
    let mut config = config.clone();
    config.connect_timeout = Some(CALL_TIMEOUT);
    config.read_timeout = Some(CALL_TIMEOUT);
    config.write_timeout = Some(CALL_TIMEOUT);
    config.reset_reader_on_write = true;
    config.default_retry = false;
    Ok(ClientBuilder::try_from(config).map_err(wrong)?.build())
}

fn wrong(error: kube::Error) -> ApiError {
    ApiError::Config(error.to_string())
}

/// Notes every frame of every answer.
#[derive(Clone)]
struct Noting(Arc<Watching>);

impl<S> Layer<S> for Noting {
    type Service = NotingService<S>;

    fn layer(&self, inner: S) -> Self::Service {
        NotingService { inner, watching: self.0.clone() }
    }
}

struct NotingService<S> {
    inner: S,
    watching: Arc<Watching>,
}

type Note = Box<dyn FnMut(http_body::Frame<Bytes>) -> http_body::Frame<Bytes> + Send>;
type Noted_<B> = Response<MapFrame<B, Note>>;
type Answer<B, E> = Pin<Box<dyn Future<Output = Result<Noted_<B>, E>> + Send>>;

impl<S, B> Service<Request<Body>> for NotingService<S>
where
    S: Service<Request<Body>, Response = Response<B>>,
    S::Future: Send + 'static,
    B: http_body::Body<Data = Bytes> + Send + 'static,
{
    type Response = Noted_<B>;
    type Error = S::Error;
    type Future = Answer<B, S::Error>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, request: Request<Body>) -> Self::Future {
        let query = request.uri().query().unwrap_or_default();
        let is_watch = query.split('&').any(|part| part == "watch=true" || part == "watch=1");
        let watching = self.watching.clone();
        let answer = self.inner.call(request);
        Box::pin(async move {
            let answer = answer.await?;
            watching.heard();
            if is_watch && answer.status().is_success() {
                watching.taken();
            }
            let note: Note = Box::new(move |frame| {
                watching.heard();
                frame
            });
            Ok(answer.map(|body| body.map_frame(note)))
        })
    }
}
