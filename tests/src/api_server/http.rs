//! The server's HTTP side: paths, verbs, watches.

use std::{collections::HashMap, convert::Infallible, sync::Arc};

use axum::{
    Router,
    body::{Body, Bytes},
    extract::{Path, Query, Request, State as Extract},
    http::{Method, StatusCode, header},
    middleware::{self, Next},
    response::{IntoResponse, Response},
    routing::{any, post},
};
use serde_json::{Value, json};

use super::{
    Refusal, Shared, State,
    objects::{KINDS, Selection},
};

type Params = Query<HashMap<String, String>>;

pub(super) fn router(shared: Arc<Shared>) -> Router {
    Router::new()
        .route("/apis/authentication.k8s.io/v1/tokenreviews", post(review))
        .route("/api/v1/namespaces/{namespace}/serviceaccounts/{name}/token", post(token))
        .route("/api/v1/{plural}", any(cluster))
        .route("/api/v1/namespaces/{namespace}/{plural}", any(namespace))
        .route("/api/v1/namespaces/{namespace}/{plural}/{name}", any(one))
        .route("/api/v1/nodes/{name}", any(node))
        .fallback(|| async { Refusal::new(404, "NotFound", "there is no such path") })
        .layer(middleware::from_fn_with_state(shared.clone(), admit))
        .with_state(shared)
}

impl IntoResponse for Refusal {
    fn into_response(self) -> Response {
        let code = StatusCode::from_u16(self.code).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
        (code, axum::Json(self.body())).into_response()
    }
}

/// Who is let in, and when.
async fn admit(Extract(shared): Extract<Arc<Shared>>, request: Request, next: Next) -> Response {
    let (down, delay, gathering) = {
        let mut state = shared.state();
        let last = request.uri().path().split('/').rfind(|part| {
            KINDS.iter().any(|(plural, ..)| plural == part) || *part == "tokenreviews"
        });
        let what = format!("{} {}", request.method(), last.unwrap_or("other"));
        let gathering = state.gathering.as_ref().filter(|(of, _)| *of == what);
        let gathering = gathering.map(|(_, barrier)| Arc::clone(barrier));
        *state.requests.entry(what).or_default() += 1;
        (state.down, state.delay, gathering)
    };
    tokio::time::sleep(delay).await;
    if let Some(barrier) = gathering {
        barrier.wait().await;
    }
    let wanted = format!("Bearer {}", shared.client_token);
    if request.headers().get(header::AUTHORIZATION).is_none_or(|value| value != wanted.as_str()) {
        return Refusal::new(401, "Unauthorized", "Unauthorized").into_response();
    }
    if down {
        return Refusal::new(503, "ServiceUnavailable", "the server is down").into_response();
    }
    next.run(request).await
}

fn parse(body: &Bytes) -> Result<Value, Refusal> {
    serde_json::from_slice(body).map_err(|e| Refusal::new(400, "BadRequest", e.to_string()))
}

async fn review(Extract(shared): Extract<Arc<Shared>>, body: Bytes) -> Result<Response, Refusal> {
    let review = parse(&body)?;
    let state = shared.state();
    let answer = state.tokens.review(&state.objects, review);
    Ok((StatusCode::CREATED, axum::Json(answer)).into_response())
}

async fn token(
    Extract(shared): Extract<Arc<Shared>>,
    Path((namespace, name)): Path<(String, String)>,
    body: Bytes,
) -> Result<Response, Refusal> {
    let request = parse(&body)?;
    let mut state = shared.state();
    let State { objects, tokens, .. } = &mut *state;
    let answer = tokens.request(objects, &namespace, &name, request)?;
    Ok((StatusCode::CREATED, axum::Json(answer)).into_response())
}

async fn cluster(
    Extract(shared): Extract<Arc<Shared>>,
    Path(plural): Path<String>,
    params: Params,
    method: Method,
    body: Bytes,
) -> Result<Response, Refusal> {
    all(shared, &plural, "", params, method, body)
}

async fn namespace(
    Extract(shared): Extract<Arc<Shared>>,
    Path((namespace, plural)): Path<(String, String)>,
    params: Params,
    method: Method,
    body: Bytes,
) -> Result<Response, Refusal> {
    all(shared, &plural, &namespace, params, method, body)
}

/// Many objects of a kind: list, watch, create.
fn all(
    shared: Arc<Shared>,
    plural: &str,
    namespace: &str,
    Query(params): Params,
    method: Method,
    body: Bytes,
) -> Result<Response, Refusal> {
    let Some((_, kind, _)) = KINDS.iter().find(|(p, ..)| *p == plural) else {
        return Err(Refusal::new(404, "NotFound", format!("there is no resource {plural}")));
    };
    let param = |name: &str| params.get(name).map(String::as_str).unwrap_or_default();
    let selection = Selection::parse(plural, namespace, param("fieldSelector"))?;
    match method {
        Method::GET if matches!(param("watch"), "true" | "1") => {
            let from = param("resourceVersion").parse().unwrap_or(0);
            Ok(watch(shared, selection, from))
        }
        Method::GET => {
            let state = shared.state();
            let limit = param("limit").parse().unwrap_or(0);
            let after = Some(param("continue")).filter(|c| !c.is_empty());
            let (items, more) = state.objects.list(&selection, limit, after);
            let revision = state.objects.revision().to_string();
            Ok(axum::Json(json!({
                "kind": format!("{kind}List"), "apiVersion": "v1",
                "metadata": {"resourceVersion": revision, "continue": more.unwrap_or_default()},
                "items": items,
            }))
            .into_response())
        }
        Method::POST => {
            let object = parse(&body)?;
            let made = change(&shared, |state| state.objects.create(plural, namespace, object))?;
            Ok((StatusCode::CREATED, axum::Json(made)).into_response())
        }
        _ => Err(not_allowed()),
    }
}

async fn node(
    shared: Extract<Arc<Shared>>,
    Path(name): Path<String>,
    method: Method,
    body: Bytes,
) -> Result<Response, Refusal> {
    one(shared, Path((String::new(), "nodes".into(), name)), method, body).await
}

/// One object: get, replace, delete.
async fn one(
    Extract(shared): Extract<Arc<Shared>>,
    Path((namespace, plural, name)): Path<(String, String, String)>,
    method: Method,
    body: Bytes,
) -> Result<Response, Refusal> {
    let answer = match method {
        Method::GET => shared.state().objects.get(&plural, &namespace, &name)?,
        Method::PUT => {
            let object = parse(&body)?;
            change(&shared, |state| state.objects.replace(&plural, &namespace, &name, object))?
        }
        Method::DELETE => {
            change(&shared, |state| state.objects.delete(&plural, &namespace, &name))?
        }
        _ => return Err(not_allowed()),
    };
    Ok(axum::Json(answer).into_response())
}

fn change<T>(
    shared: &Shared,
    change: impl FnOnce(&mut State) -> Result<T, Refusal>,
) -> Result<T, Refusal> {
    let mut state = shared.state();
    let result = change(&mut state)?;
    let revision = state.objects.revision();
    drop(state);
    shared.announce(revision);
    Ok(result)
}

fn not_allowed() -> Refusal {
    Refusal::new(405, "MethodNotAllowed", "this verb is not known here")
}

/// One JSON object a line for each change, until the client goes.
fn watch(shared: Arc<Shared>, selection: Selection, from: u64) -> Response {
    let (sender, receiver) = tokio::sync::mpsc::channel::<Bytes>(64);
    tokio::spawn(async move {
        let mut changed = shared.changed.subscribe();
        let mut seen = from;
        loop {
            changed.borrow_and_update();
            let (changes, revision) = {
                let state = shared.state();
                (state.objects.since(seen), state.objects.revision())
            };
            let Some(changes) = changes else {
                let gone = Refusal::new(410, "Expired", "too old resource version").body();
                let _ = sender.send(line(&json!({"type": "ERROR", "object": gone}))).await;
                return;
            };
            for change in changes {
                let fits = selection.fits(&change.plural, &change.namespace, &change.object);
                let event = json!({"type": change.kind, "object": change.object});
                if fits && sender.send(line(&event)).await.is_err() {
                    return;
                }
            }
            seen = seen.max(revision);
            tokio::select! {
                result = changed.changed() => if result.is_err() { return },
                () = sender.closed() => return,
            }
        }
    });
    let stream = futures_util::stream::unfold(receiver, |mut receiver| async {
        receiver.recv().await.map(|bytes| (Ok::<_, Infallible>(bytes), receiver))
    });
    Response::new(Body::from_stream(stream))
}

fn line(event: &Value) -> Bytes {
    Bytes::from(format!("{event}\n"))
}
