//! The page's server: on loopback, for who has the secret, read-only.
//!
//! A browser sends what any page asks it to, so requests must carry a cookie that only our own
//! address with the secret sets, and a `Host` that is ours: a name that somebody lets point to
//! loopback is none.

use std::{convert::Infallible, io, net::SocketAddr, sync::Arc, time::Duration};

use aws_lc_rs::constant_time::verify_slices_are_equal;
use axum::{
    Router,
    extract::{Query, Request, State},
    http::{HeaderMap, HeaderName, HeaderValue, StatusCode, header},
    middleware::{self, Next},
    response::{
        Html, IntoResponse, Response,
        sse::{Event, KeepAlive, Sse},
    },
    routing::get,
};
use futures_util::{Stream, StreamExt as _, stream};
use hyper_util::{
    rt::{TokioExecutor, TokioIo, TokioTimer},
    server::conn::auto::Builder,
    service::TowerToHyperService,
};
use serde::Deserialize;
use tokio::{
    net::TcpListener,
    sync::{Semaphore, broadcast::error::RecvError},
};

use super::live::{self, Feed};
use crate::cli::{
    exit::{Exit, Failure},
    policy, rollout,
    sockets::SocketArgs,
};

const PAGE: &str = include_str!("page/index.html");
const SCRIPT: &str = include_str!("page/app.js");
const STYLE: &str = include_str!("page/style.css");

/// The cookie's name.
const COOKIE: &str = "signet-ui";
/// Connections at the same time: a browser has six.
const MAX_CONNECTIONS: usize = 64;
/// Flows that a click shows.
const SHOWN: usize = 100;

/// What every answer carries: nothing from elsewhere, nowhere else, nothing kept.
const HEADERS: [(HeaderName, &str); 5] = [
    (
        header::CONTENT_SECURITY_POLICY,
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; \
         base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    ),
    (header::X_CONTENT_TYPE_OPTIONS, "nosniff"),
    (header::REFERRER_POLICY, "no-referrer"),
    (header::CACHE_CONTROL, "no-store"),
    (header::X_FRAME_OPTIONS, "DENY"),
];

#[derive(Debug)]
struct Shared {
    address: SocketAddr,
    token: String,
    feed: Feed,
    sockets: SocketArgs,
}

/// Everything that is served at `address` to who has `token`.
pub fn page(address: SocketAddr, token: &str, feed: Feed, sockets: SocketArgs) -> Router {
    let shared = Arc::new(Shared { address, token: token.to_owned(), feed, sockets });
    Router::new()
        .route("/", get(|| async { Html(PAGE) }))
        .route("/app.js", get(|| async { ([(header::CONTENT_TYPE, "text/javascript")], SCRIPT) }))
        .route("/style.css", get(|| async { ([(header::CONTENT_TYPE, "text/css")], STYLE) }))
        .route("/api/live", get(tell))
        .route("/api/flows", get(flows))
        .route("/api/policies", get(policies))
        .route("/api/rollout", get(check))
        .layer(middleware::from_fn_with_state(shared.clone(), guard))
        .with_state(shared)
}

/// Serves on a listener until the task is dropped.
pub async fn serve(listener: TcpListener, page: Router) -> io::Result<()> {
    let service = TowerToHyperService::new(page);
    let room = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    loop {
        let Ok(turn) = Arc::clone(&room).acquire_owned().await else { return Ok(()) };
        let (stream, _) = listener.accept().await?;
        let service = service.clone();
        tokio::spawn(async move {
            let mut builder = Builder::new(TokioExecutor::new());
            builder.http1().timer(TokioTimer::new()).header_read_timeout(Duration::from_secs(5));
            // A browser that goes away in the middle is none of our business.
            let _ = builder.http1_only().serve_connection(TokioIo::new(stream), service).await;
            drop(turn);
        });
    }
}

/// Lets in who has the secret, once by the address and then by the cookie.
async fn guard(State(shared): State<Arc<Shared>>, request: Request, next: Next) -> Response {
    let mut response = match admit(&shared, request.uri().query(), request.headers()) {
        Admitted::Yes => next.run(request).await,
        Admitted::WithSecret => {
            let cookie = format!("{COOKIE}={}; HttpOnly; SameSite=Strict; Path=/", shared.token);
            let headers = [(header::SET_COOKIE, cookie), (header::LOCATION, "/".to_owned())];
            (StatusCode::SEE_OTHER, headers).into_response()
        }
        Admitted::No(why) => (StatusCode::FORBIDDEN, format!("{why}\n")).into_response(),
    };
    for (name, value) in HEADERS {
        response.headers_mut().insert(name, HeaderValue::from_static(value));
    }
    response
}

#[derive(PartialEq, Eq, Debug)]
enum Admitted {
    Yes,
    /// By the address that was printed: it is exchanged for a cookie.
    WithSecret,
    No(&'static str),
}

fn admit(shared: &Shared, query: Option<&str>, headers: &HeaderMap) -> Admitted {
    let host = headers.get(header::HOST).and_then(|value| value.to_str().ok()).unwrap_or_default();
    let port = shared.address.port();
    let is_ours = host == shared.address.to_string() || host == format!("localhost:{port}");
    if !is_ours {
        return Admitted::No("this is not the address that signet ui printed");
    }
    let is_secret =
        |given: &str| verify_slices_are_equal(given.as_bytes(), shared.token.as_bytes()).is_ok();
    let given = query.and_then(|query| query.strip_prefix("token="));
    if given.is_some_and(is_secret) {
        return Admitted::WithSecret;
    }
    let cookies = headers.get_all(header::COOKIE).iter().filter_map(|value| value.to_str().ok());
    let mut pairs =
        cookies.flat_map(|value| value.split(';')).filter_map(|p| p.trim().split_once('='));
    match pairs.any(|(name, value)| name == COOKIE && is_secret(value)) {
        true => Admitted::Yes,
        false => Admitted::No("open the address that signet ui printed: it has a secret in it"),
    }
}

/// The picture now and whenever it changes, and flows as they come.
async fn tell(
    State(shared): State<Arc<Shared>>,
) -> Sse<impl Stream<Item = Result<Event, Infallible>>> {
    let pictures =
        stream::unfold((shared.feed.graph.clone(), true), |(mut graph, first)| async move {
            if !first {
                graph.changed().await.ok()?;
            }
            let picture = graph.borrow_and_update().clone();
            let event = Event::default().event("graph").json_data(&*picture).unwrap_or_default();
            Some((Ok(event), (graph, false)))
        });
    let flows = stream::unfold(shared.feed.flows.subscribe(), |mut flows| async move {
        let event = match flows.recv().await {
            Ok(line) => Event::default().event("flow").data(&*line),
            Err(RecvError::Lagged(missed)) => {
                Event::default().event("missed").data(missed.to_string())
            }
            Err(RecvError::Closed) => return None,
        };
        Some((Ok(event), flows))
    });
    Sse::new(stream::select(pictures.boxed(), flows.boxed())).keep_alive(KeepAlive::default())
}

#[derive(Deserialize)]
struct Pair {
    from: String,
    to: String,
}

/// `[flow, …]`, newest first.
async fn flows(State(shared): State<Arc<Shared>>, Query(pair): Query<Pair>) -> Response {
    let found = live::between(&shared.feed.agents, &pair.from, &pair.to, SHOWN).await;
    json(found.map(|lines| format!("[{}]", lines.join(","))))
}

/// `[policy, …]`, as `signet policy list -o json` has them.
async fn policies(State(shared): State<Arc<Shared>>) -> Response {
    json(policy::list_lines(&shared.feed.agents).await.map(|l| format!("[{}]", l.join(","))))
}

#[derive(Deserialize)]
struct Rollout {
    namespace: String,
    to: rollout::Target,
}

/// `{"findings": […], "seen": n, "isComplete": …}`, as `signet rollout check` has them.
async fn check(State(shared): State<Arc<Shared>>, Query(asked): Query<Rollout>) -> Response {
    let found = rollout::find(&shared.sockets, &asked.namespace, asked.to, None).await;
    json(
        found.and_then(|found| {
            serde_json::to_string(&found).map_err(|e| Failure::caused(Exit::Bug, e))
        }),
    )
}

fn json(answer: Result<String, Failure>) -> Response {
    match answer {
        Ok(text) => ([(header::CONTENT_TYPE, "application/json")], text).into_response(),
        Err(failure) => (StatusCode::BAD_GATEWAY, format!("{failure}\n")).into_response(),
    }
}
