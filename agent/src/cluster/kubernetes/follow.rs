//! One kind's watch: list, follow, begin anew; for ever.

use std::{pin::pin, sync::Arc, time::Duration};

use futures_util::StreamExt as _;
use kube::{
    Api, Client,
    core::{ApiResource, GroupVersionKind},
    runtime::{
        WatchStreamExt as _,
        utils::ResetTimerBackoff,
        watcher::{self, Config, Error, Event, ExponentialBackoff},
    },
};

use super::{Shared, kinds::Kind, raw::Raw, store::Reading};
use crate::cluster::source::WatchState;

/// Objects asked for at a time.
const PAGE: u32 = 500;
/// The shortest pause after a failure.
const PAUSE: Duration = Duration::from_millis(500);
/// After this long without a failure pauses are short again.
const CALM: Duration = Duration::from_secs(120);

/// Why a watch is given up, to be begun anew with a list.
enum End {
    /// The server does not know the kind.
    NoSuchKind,
    /// kube's watcher has ended, which it never does.
    Over,
}

/// Follows one kind.
pub(super) async fn follow(shared: Arc<Shared>, index: usize, client: Client) {
    let kind = &shared.kinds[index];
    let mut version = 0;
    let mut doubted = false;
    loop {
        match watch(&shared, index, version, &client, &mut doubted).await {
            End::Over => tokio::time::sleep(PAUSE).await,
            End::NoSuchKind if version + 1 < kind.versions.len() => version += 1,
            End::NoSuchKind => {
                version = 0;
                if none(&shared, index, &mut doubted) {
                    shared.changed.notify_one();
                }
                tokio::time::sleep(jittered(shared.params.absent_retry())).await;
            }
        }
    }
}

/// What a 404 of the kind means. A server that starts may not know its custom kinds yet: what
/// was there is given up only when it is not there for the second time.
fn none(shared: &Shared, index: usize, doubted: &mut bool) -> bool {
    let kind = &shared.kinds[index];
    let mut stores = shared.stores();
    let store = &mut stores[index];
    if store.state == WatchState::Listed && !*doubted {
        *doubted = true;
        let message = "the API server does not know this kind any more; asking again";
        tracing::warn!(kind = kind.shown, "{message}");
        shared.watching[index].failed(message);
        return false;
    }
    shared.watching[index].listed();
    let news = store.none();
    if news {
        tracing::info!(kind = kind.shown, "the API server does not know this kind: there are none");
    }
    news
}

async fn watch(
    shared: &Shared,
    index: usize,
    version: usize,
    client: &Client,
    doubted: &mut bool,
) -> End {
    let kind = &shared.kinds[index];
    let params = &shared.params;
    let version = kind.versions.get(version).copied().unwrap_or_default();
    let reading = Reading {
        trust_domain: params.common.trust_domain.clone(),
        root_namespace: params.common.root_namespace.clone(),
    };
    let resource = resource(kind, version);
    let api: Api<Raw> = match &kind.namespace {
        Some(namespace) => Api::namespaced_with(client.clone(), namespace, &resource),
        None => Api::all_with(client.clone(), &resource),
    };
    let mut config = Config::default()
        .timeout(u32::try_from(params.watch_timeout.as_secs()).unwrap_or(u32::MAX))
        .page_size(PAGE);
    config.field_selector.clone_from(&kind.fields);
    let pauses = backon::ExponentialBuilder::default()
        .with_min_delay(PAUSE)
        .with_max_delay(params.longest_pause())
        .with_jitter()
        .without_max_times();
    let pauses = ResetTimerBackoff::new(ExponentialBackoff::from(pauses), CALM);
    let mut events = pin!(watcher::watcher(api, config).backoff(pauses));
    let watching = &shared.watching[index];
    while let Some(event) = events.next().await {
        let news = match event {
            Ok(event) => {
                if matches!(event, Event::InitDone) {
                    watching.listed();
                    *doubted = false;
                } else if !matches!(event, Event::Init) {
                    watching.told();
                }
                let mut stores = shared.stores();
                let store = &mut stores[index];
                match event {
                    Event::Init => {
                        store.begin();
                        false
                    }
                    Event::InitApply(object) => {
                        store.listed(kind, version, &reading, object);
                        false
                    }
                    Event::InitDone => store.complete(),
                    Event::Apply(object) => store.changed(kind, version, &reading, object),
                    Event::Delete(object) => store.gone(&object),
                }
            }
            Err(error) if kind.is_optional() && is_unknown_kind(&error) => return End::NoSuchKind,
            Err(error) => {
                let message = describe(&error);
                if watching.failed(&message) {
                    tracing::warn!(
                        kind = kind.shown,
                        error = message,
                        "a watch failed; what it told stays in force"
                    );
                }
                false
            }
        };
        if news {
            shared.changed.notify_one();
        }
    }
    End::Over
}

fn resource(kind: &Kind, version: &str) -> ApiResource {
    let gvk = GroupVersionKind::gvk(kind.group, version, kind.kind);
    ApiResource::from_gvk_with_plural(&gvk, kind.plural)
}

/// True for the answer 404 to a list or watch, which is about the kind, never about objects.
fn is_unknown_kind(error: &Error) -> bool {
    match error {
        Error::InitialListFailed(kube::Error::Api(status))
        | Error::WatchStartFailed(kube::Error::Api(status)) => status.code == 404,
        _ => false,
    }
}

/// One sentence with the causes, and what to do where that is known.
fn describe(error: &Error) -> String {
    if let Error::InitialListFailed(kube::Error::Api(status))
    | Error::WatchStartFailed(kube::Error::Api(status)) = error
    {
        let remedy = match status.code {
            401 | 403 => "; look at the role of the agent's service account",
            _ => "",
        };
        return format!("the API server answers {}: {}{remedy}", status.code, status.message);
    }
    let mut text = error.to_string();
    let mut cause = std::error::Error::source(error);
    while let Some(error) = cause {
        let more = error.to_string();
        if !text.contains(&more) {
            text = format!("{text}: {more}");
        }
        cause = error.source();
    }
    text
}

/// Between three quarters and five quarters of a time, so that nodes do not ask all at once.
fn jittered(time: Duration) -> Duration {
    time.mul_f64(0.75 + rand::random::<f64>() / 2.0)
}
