//! Where the agent's World comes from and where it says whom it serves.

use std::sync::Arc;

use super::DaemonError;
use crate::{
    cluster::{
        enrolment::{EnrolmentBoard, FilesBoard},
        files::FilesSource,
        kubernetes::{KubernetesParams, KubernetesSource},
        source::{ClusterSource, SourceParams, WatchFacts, WatchState},
    },
    config::{AgentConfig, values::DefaultAction},
    spiffe::TrustDomain,
    telemetry::metrics::Reading,
};

/// Opens both: the directory of manifests where there is one, else the Kubernetes API.
pub(super) fn open(
    config: &AgentConfig,
    domain: &TrustDomain,
) -> Result<(Arc<dyn ClusterSource>, Box<dyn EnrolmentBoard>), DaemonError> {
    let params = SourceParams {
        ranges: super::ranges(config),
        root_namespace: config.root_namespace.as_str().into(),
        default_deny: config.default_action == DefaultAction::Deny,
        ..SourceParams::new(domain.clone())
    };
    if let Some(dir) = &config.cluster_dir {
        let source = FilesSource::start(dir, params)?;
        let board = FilesBoard::open(dir, &config.node)?;
        return Ok((Arc::new(source), Box::new(board)));
    }
    let (source, board) = KubernetesSource::start(KubernetesParams {
        common: params,
        node: config.node.as_str().into(),
        namespace: config.namespace.clone(),
        kubeconfig: config.kubeconfig.clone(),
        watch_timeout: config.watch_timeout,
    })?;
    Ok((Arc::new(source), Box::new(board)))
}

/// What metrics say of the watches.
pub(super) fn readings(watches: &[WatchFacts]) -> Vec<Reading> {
    let of = |reading: Reading, value: &dyn Fn(&WatchFacts) -> Option<f64>| {
        reading.each("kind", watches.iter().filter_map(|w| Some((w.kind, value(w)?))))
    };
    let now = jiff::Timestamp::now();
    let count = |n: u64| Some(n as f64);
    let flag = |is: bool| Some(f64::from(u8::from(is)));
    vec![
        of(Reading::gauge("watch_synced", "Watches whose first list was completed"), &|w| {
            flag(w.state != WatchState::Waiting)
        }),
        of(Reading::gauge("watch_failing", "Watches that do not work at this moment"), &|w| {
            flag(w.error.is_some())
        }),
        of(Reading::gauge("watch_objects", "Objects that are known by a watch"), &|w| {
            count(w.objects as u64)
        }),
        of(Reading::gauge("watch_faulty_objects", "Objects that could not be read"), &|w| {
            count(w.faulty as u64)
        }),
        of(
            Reading::gauge(
                "watch_silence_seconds",
                "Since anything, also a bookmark, came from the API server for a watch",
            ),
            &|w| Some(now.duration_since(w.last_heard?).as_secs_f64()),
        ),
        of(Reading::counter("watch_lists", "Lists that were completed"), &|w| count(w.lists)),
        of(Reading::counter("watch_events", "Objects that were told by lists and changes"), &|w| {
            count(w.events)
        }),
        of(Reading::counter("watch_errors", "Lists and watches that failed"), &|w| count(w.errors)),
    ]
}
