//! Watches: one JSON object a line.

use std::{sync::Arc, time::Duration};

use axum::{
    body::{Body, Bytes},
    response::Response,
};
use serde_json::{Value, json};

use super::{Refusal, Shared, kinds::Kind, select::Selection};

/// What a watch asks for.
pub(super) struct Wish {
    pub(super) selection: Selection,
    /// The version that is known; `None` or 0: tell what there is first.
    pub(super) from: Option<u64>,
    pub(super) bookmarks: bool,
    pub(super) seconds: Option<u64>,
}

/// Ends of a watch without the client's doing.
enum Cut {
    Timeout,
    /// Its connection breaks off in the midst.
    Dropped,
}

/// Tells changes until the client goes, its time is over, or a fault ends it.
pub(super) fn answer(shared: Arc<Shared>, kind: &'static Kind, wish: Wish) -> Response {
    let (sender, receiver) = tokio::sync::mpsc::channel::<Result<Bytes, Broken>>(64);
    tokio::spawn(async move {
        if let Some(Cut::Dropped) = tell(&shared, kind, wish, &sender).await {
            let _ = sender.send(Err(Broken)).await;
        }
    });
    let stream = futures_util::stream::unfold(receiver, |mut receiver| async {
        receiver.recv().await.map(|bytes| (bytes, receiver))
    });
    Response::new(Body::from_stream(stream))
}

/// The connection breaks.
#[derive(Debug, thiserror::Error)]
#[error("the connection breaks")]
struct Broken;

type Sender = tokio::sync::mpsc::Sender<Result<Bytes, Broken>>;

async fn tell(shared: &Shared, kind: &Kind, wish: Wish, sender: &Sender) -> Option<Cut> {
    let mut changed = shared.changed.subscribe();
    let mut drops = shared.drops.subscribe();
    let timeout = tokio::time::sleep(Duration::from_secs(wish.seconds.unwrap_or(1800)));
    tokio::pin!(timeout);
    let mut bookmark = tokio::time::interval(shared.bookmark_every());
    bookmark.reset();
    let mut seen = match wish.from {
        Some(from) if from > 0 => from,
        _ => {
            let (page, revision) = {
                let state = shared.state();
                (state.objects.list(&wish.selection, 0, None).ok(), state.objects.revision())
            };
            for object in page.into_iter().flat_map(|page| page.items) {
                send(sender, &json!({"type": "ADDED", "object": object})).await?;
            }
            revision
        }
    };
    loop {
        changed.borrow_and_update();
        let (changes, revision, is_stalled, is_there) = {
            let state = shared.state();
            (
                state.objects.since(seen),
                state.objects.revision(),
                state.faults.stalled,
                state.installed.has(kind),
            )
        };
        // A stalled watch is open, and silent.
        if !is_stalled {
            if !is_there {
                return Some(Cut::Timeout);
            }
            let Some(changes) = changes else {
                let gone = Refusal::new(410, "Expired", "too old resource version").body();
                send(sender, &json!({"type": "ERROR", "object": gone})).await?;
                return Some(Cut::Timeout);
            };
            for change in changes {
                if let Some(event) = change.event(&wish.selection) {
                    send(sender, &event).await?;
                }
            }
            seen = seen.max(revision);
        }
        tokio::select! {
            result = changed.changed() => if result.is_err() { return Some(Cut::Timeout) },
            result = drops.changed() => return result.ok().map(|()| Cut::Dropped),
            () = &mut timeout, if !is_stalled => {
                if wish.bookmarks {
                    send(sender, &mark(kind, seen)).await?;
                }
                return Some(Cut::Timeout);
            }
            _ = bookmark.tick(), if wish.bookmarks && !is_stalled => {
                send(sender, &mark(kind, seen)).await?;
            }
            () = sender.closed() => return None,
        }
    }
}

fn mark(kind: &Kind, revision: u64) -> Value {
    json!({"type": "BOOKMARK", "object": {
        "kind": kind.kind, "apiVersion": kind.api_version(),
        "metadata": {"resourceVersion": revision.to_string()},
    }})
}

/// `None`: the client has gone.
async fn send(sender: &Sender, event: &Value) -> Option<()> {
    sender.send(Ok(Bytes::from(format!("{event}\n")))).await.ok()
}
