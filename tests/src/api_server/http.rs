//! The server's HTTP side: who is let in, paths and verbs.

use std::{collections::HashMap, sync::Arc};

use axum::{
    Extension, Router,
    body::Bytes,
    extract::{Query, Request, State as Extract},
    http::{HeaderMap, Method, StatusCode, Uri, header},
    middleware::{self, Next},
    response::{IntoResponse, Response},
    routing::get,
};
use serde_json::{Value, json};

use super::{
    Refusal, Shared, State,
    access::{self, Attributes, User},
    admission::{Gate, Unknown},
    kinds::{KINDS, Kind},
    openapi, portforward,
    select::Selection,
    table,
    watch::{self, Wish},
};

pub(super) type Params = HashMap<String, String>;

pub(super) fn router(shared: Arc<Shared>) -> Router {
    Router::new()
        .route("/api/v1/namespaces/{namespace}/pods/{name}/portforward", get(portforward::answer))
        .fallback(answer)
        .layer(middleware::from_fn_with_state(shared.clone(), admit))
        .with_state(shared)
}

impl IntoResponse for Refusal {
    fn into_response(self) -> Response {
        let code = StatusCode::from_u16(self.code).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
        let body = axum::Json(self.body());
        match self.code {
            429 => (code, [(header::RETRY_AFTER, "1")], body).into_response(),
            _ => (code, body).into_response(),
        }
    }
}

/// Who is let in, and when.
async fn admit(
    Extract(shared): Extract<Arc<Shared>>,
    mut request: Request,
    next: Next,
) -> Response {
    let query = request.uri().query().unwrap_or_default();
    let is_watch = query.split('&').any(|part| matches!(part, "watch=true" | "watch=1"));
    let (faults, gathering) = {
        let mut state = shared.state();
        let last =
            request.uri().path().split('/').rfind(|part| {
                KINDS.iter().any(|kind| kind.plural == *part) || *part == "tokenreviews"
            });
        let verb = if is_watch { "WATCH" } else { request.method().as_str() };
        let what = format!("{verb} {}", last.unwrap_or("other"));
        let gathering = state.gathering.as_ref().filter(|(of, _)| *of == what);
        let gathering = gathering.map(|(_, barrier)| Arc::clone(barrier));
        *state.requests.entry(what).or_default() += 1;
        (state.faults, gathering)
    };
    tokio::time::sleep(faults.delay).await;
    if let Some(barrier) = gathering {
        barrier.wait().await;
    }
    let Some(user) = caller(&shared, request.headers()) else {
        return Refusal::new(401, "Unauthorized", "Unauthorized").into_response();
    };
    request.extensions_mut().insert(user);
    match faults.refusal {
        Some(429) => {
            return Refusal::new(429, "TooManyRequests", "too many requests").into_response();
        }
        Some(code) => {
            return Refusal::new(code, "ServiceUnavailable", "the server is down").into_response();
        }
        None => {}
    }
    next.run(request).await
}

/// Who asks: the one that made the server, or a service account by its token.
fn caller(shared: &Shared, headers: &HeaderMap) -> Option<User> {
    let token = headers.get(header::AUTHORIZATION)?.to_str().ok()?.strip_prefix("Bearer ")?;
    if token == shared.client_token {
        return Some(User::admin());
    }
    let state = shared.state();
    state.tokens.user(&state.objects, token)
}

fn parse(body: &Bytes) -> Result<Value, Refusal> {
    serde_json::from_slice(body).map_err(|e| Refusal::new(400, "BadRequest", e.to_string()))
}

/// Everything: the path says what.
async fn answer(
    Extract(shared): Extract<Arc<Shared>>,
    method: Method,
    uri: Uri,
    Query(params): Query<Params>,
    Extension(user): Extension<User>,
    headers: HeaderMap,
    body: Bytes,
) -> Result<Response, Refusal> {
    let path: Vec<&str> = uri.path().split('/').filter(|part| !part.is_empty()).collect();
    if headers.keys().any(|name| name.as_str().starts_with("impersonate-")) {
        return Err(cannot("impersonation"));
    }
    let is_watch = params.get("watch").is_some_and(|watch| matches!(watch.as_str(), "true" | "1"));
    let fields = params.get("fieldSelector").map(String::as_str).unwrap_or_default();
    let wanted = Attributes::of(&method, &path, is_watch, fields);
    let content = headers.get(header::CONTENT_TYPE).and_then(|value| value.to_str().ok());
    if content.is_some_and(|content| content.contains("protobuf")) {
        let message = "the test server reads JSON only, no protobuf";
        return Err(Refusal::new(415, "UnsupportedMediaType", message));
    }
    shared.state().authorize(&user, &wanted)?;
    match path.as_slice() {
        ["apis", "authentication.k8s.io", "v1", "selfsubjectreviews"] if method == Method::POST => {
            let mut answer = parse(&body)?;
            answer["status"] = json!({"userInfo": user.info()});
            return Ok((StatusCode::CREATED, axum::Json(answer)).into_response());
        }
        ["apis", "authorization.k8s.io", "v1", reviews] if method == Method::POST => {
            let is_own = match *reviews {
                "subjectaccessreviews" => false,
                "selfsubjectaccessreviews" => true,
                other => return Err(cannot(other)),
            };
            let answer = access::review(&shared.state().objects, &user, is_own, parse(&body)?);
            return Ok((StatusCode::CREATED, axum::Json(answer)).into_response());
        }
        ["apis", "authentication.k8s.io", "v1", "tokenreviews"] if method == Method::POST => {
            return review(&shared, &body);
        }
        ["api", "v1", "namespaces", namespace, "serviceaccounts", name, "token"]
            if method == Method::POST =>
        {
            return token(&shared, namespace, name, &body);
        }
        ["version"] => {
            return Ok(axum::Json(
                json!({"major": "1", "minor": "33", "gitVersion": "v1.33.0-lab"}),
            )
            .into_response());
        }
        _ => {}
    }
    if method == Method::GET && path.first() == Some(&"openapi") {
        let state = shared.state();
        let found = openapi::answer(&state.installed, &state.objects, &path);
        let found = found.ok_or_else(|| Refusal::new(404, "NotFound", "no such document"))?;
        return Ok(axum::Json(found).into_response());
    }
    if method == Method::GET
        && let Some(found) = shared.state().installed.discover(&path)
    {
        return Ok(axum::Json(found).into_response());
    }
    let place = Place::of(&shared, &path)?;
    let call = Call { shared, user, wanted, place, params, headers, body };
    match (method, &call.place.name, call.param("watch")) {
        (Method::GET, None, "true" | "1") => call.watch(),
        (Method::GET, None, _) => call.list(),
        (Method::POST, None, _) => call.create(),
        (Method::GET, Some(name), _) => call.get(name),
        (Method::PUT, Some(name), _) => call.replace(name),
        (Method::PATCH, Some(name), _) => call.patch(name),
        (Method::DELETE, Some(name), _) => call.delete(name),
        _ => Err(cannot("this verb here")),
    }
}

/// What this server is not made for.
pub(super) fn cannot(what: &str) -> Refusal {
    Refusal::new(501, "NotImplemented", format!("the test server cannot do {what}"))
}

fn review(shared: &Shared, body: &Bytes) -> Result<Response, Refusal> {
    let review = parse(body)?;
    let state = shared.state();
    let answer = state.tokens.review(&state.objects, review);
    Ok((StatusCode::CREATED, axum::Json(answer)).into_response())
}

fn token(shared: &Shared, namespace: &str, name: &str, body: &Bytes) -> Result<Response, Refusal> {
    let request = parse(body)?;
    let mut state = shared.state();
    let State { objects, tokens, .. } = &mut *state;
    let answer = tokens.request(objects, namespace, name, request)?;
    Ok((StatusCode::CREATED, axum::Json(answer)).into_response())
}

/// What a path is about.
struct Place {
    kind: &'static Kind,
    version: String,
    /// Empty: none, or all.
    namespace: String,
    name: Option<String>,
    is_status: bool,
}

impl Place {
    fn of(shared: &Shared, path: &[&str]) -> Result<Self, Refusal> {
        let nowhere = || Refusal::new(404, "NotFound", "there is no such path");
        let (group, version, rest) = match path {
            ["api", version, rest @ ..] => ("", *version, rest),
            ["apis", group, version, rest @ ..] => (*group, *version, rest),
            _ => return Err(nowhere()),
        };
        // `namespaces/<name>` itself and its status are cluster-wide.
        let (namespace, rest) = match rest {
            ["namespaces", namespace, rest @ ..] if !matches!(rest, [] | ["status"]) => {
                (*namespace, rest)
            }
            rest => ("", rest),
        };
        let (plural, name, is_status) = match rest {
            [plural] => (*plural, None, false),
            [plural, name] => (*plural, Some((*name).to_owned()), false),
            [plural, name, "status"] => (*plural, Some((*name).to_owned()), true),
            [_, _, other] => return Err(cannot(&format!("the subresource {other}"))),
            _ => return Err(nowhere()),
        };
        let kind = shared.state().installed.find(group, version, plural)?;
        if is_status && !kind.has_status {
            return Err(nowhere());
        }
        let (version, namespace) = (version.to_owned(), namespace.to_owned());
        Ok(Self { kind, version, namespace, name, is_status })
    }
}

/// A call about objects.
struct Call {
    shared: Arc<Shared>,
    user: User,
    wanted: Attributes,
    place: Place,
    params: Params,
    headers: HeaderMap,
    body: Bytes,
}

impl Call {
    fn param(&self, name: &str) -> &str {
        self.params.get(name).map(String::as_str).unwrap_or_default()
    }

    fn number<T: std::str::FromStr>(&self, name: &str) -> Result<Option<T>, Refusal> {
        let text = self.param(name);
        let bad = |_| Refusal::new(400, "BadRequest", format!("{name}: {text:?} is not a number"));
        (!text.is_empty()).then(|| text.parse().map_err(bad)).transpose()
    }

    fn selection(&self) -> Result<Selection, Refusal> {
        let (fields, labels) = (self.param("fieldSelector"), self.param("labelSelector"));
        Selection::parse(self.place.kind.plural, &self.place.namespace, fields, labels)
    }

    fn watch(self) -> Result<Response, Refusal> {
        if !self.param("sendInitialEvents").is_empty() {
            return Err(cannot("streaming lists"));
        }
        let wish = Wish {
            selection: self.selection()?,
            from: self.number("resourceVersion")?,
            bookmarks: matches!(self.param("allowWatchBookmarks"), "true" | "1"),
            seconds: self.number("timeoutSeconds")?,
        };
        Ok(watch::answer(self.shared, self.place.kind, wish))
    }

    fn list(self) -> Result<Response, Refusal> {
        if matches!(self.param("resourceVersionMatch"), "Exact") {
            return Err(cannot("lists of a past version"));
        }
        let selection = self.selection()?;
        let limit = self.number("limit")?.unwrap_or(0);
        let token = Some(self.param("continue")).filter(|token| !token.is_empty());
        let kind = self.place.kind;
        let state = self.shared.state();
        let page = state.objects.list(&selection, limit, token)?;
        let list = json!({
            "kind": format!("{}List", kind.kind), "apiVersion": kind.api_version(),
            "metadata": {
                "resourceVersion": page.revision.to_string(),
                "continue": page.more.unwrap_or_default(),
            },
            "items": page.items,
        });
        Ok(axum::Json(self.shown(&state, list)).into_response())
    }

    /// What is read, as a table for those that want one.
    fn shown(&self, state: &State, found: Value) -> Value {
        let accept = self.headers.get(header::ACCEPT).and_then(|value| value.to_str().ok());
        if !accept.is_some_and(table::is_wanted) {
            return found;
        }
        let Place { kind, version, .. } = &self.place;
        let definition = format!("{}.{}", kind.plural, kind.group);
        let definition = state.objects.get("customresourcedefinitions", "", &definition).ok();
        table::of(kind, version, definition.as_ref(), found)
    }

    /// What a write has to pass.
    fn gate(&self, state: &State) -> Result<Gate, Refusal> {
        let unknown = match self.param("fieldValidation") {
            "Strict" => Unknown::Refused,
            _ => Unknown::Pruned,
        };
        let Place { kind, version, .. } = &self.place;
        state.gate(kind, version, &self.user, &self.wanted, unknown)
    }

    fn create(self) -> Result<Response, Refusal> {
        let object = parse(&self.body)?;
        let Place { kind, namespace, .. } = &self.place;
        let made = self.shared.change(|state| {
            let gate = self.gate(state)?;
            let made = state.objects.create(kind, namespace, object, &gate)?;
            state.follow(kind, &made)?;
            Ok(made)
        })?;
        Ok((StatusCode::CREATED, axum::Json(made)).into_response())
    }

    fn get(&self, name: &str) -> Result<Response, Refusal> {
        let Place { kind, namespace, .. } = &self.place;
        let state = self.shared.state();
        let found = state.objects.get(kind.plural, namespace, name)?;
        Ok(axum::Json(self.shown(&state, found)).into_response())
    }

    fn replace(&self, name: &str) -> Result<Response, Refusal> {
        let object = parse(&self.body)?;
        let Place { kind, namespace, is_status, .. } = &self.place;
        let made = self.shared.change(|state| {
            let gate = self.gate(state)?;
            state.objects.replace(kind, namespace, name, object, *is_status, &gate)
        })?;
        Ok(axum::Json(made).into_response())
    }

    fn patch(&self, name: &str) -> Result<Response, Refusal> {
        let Place { kind, namespace, is_status, .. } = &self.place;
        let content = self.headers.get(header::CONTENT_TYPE).and_then(|value| value.to_str().ok());
        let made = match content {
            Some("application/apply-patch+yaml") => {
                let manager = self.param("fieldManager");
                if manager.is_empty() {
                    let message = "fieldManager: Required value: is required for apply patch";
                    return Err(Refusal::new(422, "Invalid", message));
                }
                if *is_status {
                    return Err(cannot("server-side apply of a status"));
                }
                // JSON is YAML, and what clients send.
                let object = parse(&self.body)?;
                let force = self.param("force") == "true";
                self.shared.change(|state| {
                    // Applying an object that is not there is creating it.
                    if state.objects.get(kind.plural, namespace, name).is_err() {
                        let wanted = Attributes { verb: "create".into(), ..self.wanted.clone() };
                        state.authorize(&self.user, &wanted)?;
                    }
                    let gate = self.gate(state)?;
                    let by = (manager, force);
                    let made = state.objects.apply_by(kind, namespace, name, object, by, &gate)?;
                    state.follow(kind, &made)?;
                    Ok(made)
                })?
            }
            Some("application/merge-patch+json") => {
                let patch = parse(&self.body)?;
                self.shared.change(|state| {
                    let gate = self.gate(state)?;
                    state.objects.merge_patch(kind, namespace, name, &patch, *is_status, &gate)
                })?
            }
            other => return Err(cannot(&format!("patches of type {other:?}"))),
        };
        Ok(axum::Json(made).into_response())
    }

    fn delete(&self, name: &str) -> Result<Response, Refusal> {
        let Place { kind, namespace, .. } = &self.place;
        let gone = self.shared.change(|state| {
            let old = state.objects.get(kind.plural, namespace, name)?;
            self.gate(state)?.leave(&old)?;
            state.take_along(kind, &old);
            state.objects.delete(kind.plural, namespace, name)
        })?;
        Ok(axum::Json(gone).into_response())
    }
}
