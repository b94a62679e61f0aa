//! What the kernel's side decided, on its way into the flow log.

use std::{sync::Arc, time::Duration};

use jiff::Timestamp;
use signet_ebpf::abi::{Direction, Event, Reason, Verdict, proto};
use tokio::{sync::mpsc, time::MissedTickBehavior};
use uuid::Uuid;

use super::picture::Losses;
use crate::{
    endpoint::{
        reconcile::ClosedFlows,
        state::{NodeState, NodeStateHandle},
    },
    flow::{
        FlowEvent, FlowRecord, KnownBy, Party, Recorder, Reporter, Via,
        kernel_events::{ClockOffset, KernelEvents},
        parties::known_by_address,
    },
};

/// Events converted under one reading of clock and node state.
const BATCH: usize = 256;

/// How long events wait for the name of the policy that decided them.
const NAMED_WITHIN: Duration = Duration::from_millis(500);

/// How often the kernel is asked what it lost.
const TELL_LOSSES: Duration = Duration::from_secs(1);

/// Turns events into records until the reader is gone, and tells what the kernel lost.
pub(super) async fn forward_events(
    mut events: mpsc::Receiver<Event>,
    state: NodeStateHandle,
    recorder: Recorder,
    losses: Arc<Losses>,
    any_errno: bool,
) {
    let mut converter = KernelEvents::new(any_errno);
    let mut batch = Vec::with_capacity(BATCH);
    let mut tick = tokio::time::interval(TELL_LOSSES);
    tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            received = events.recv_many(&mut batch, BATCH) => if received == 0 { return },
            _ = tick.tick() => losses.tell(),
        }
        let newest = batch.iter().map(|event| event.policy).max().unwrap_or(0);
        let (clock, state) = (ClockOffset::now(), state_with_policy(&state, newest).await);
        for event in batch.drain(..) {
            if let Some(record) = converter.convert(&event, &state, clock) {
                recorder.record_from_kernel(record);
            }
        }
    }
}

/// The node's state, once it can name policy `number`: the kernel judges by a new policy
/// before the state that names it is published. Numbers grow, so the highest will do.
async fn state_with_policy(handle: &NodeStateHandle, number: u32) -> Arc<NodeState> {
    let mut changes = handle.subscribe();
    let named = async {
        while number != 0 && !handle.current().policies.contains_key(&number) {
            // An error means that the reconciler is gone: the state stays what it is.
            if changes.changed().await.is_err() {
                return;
            }
        }
    };
    // A policy that has been withdrawn meanwhile is never named again.
    let _ = tokio::time::timeout(NAMED_WITHIN, named).await;
    handle.current()
}

/// Records the direct flows that the reconciler closed, until it is gone.
pub(super) async fn record_closed(
    mut closed: mpsc::UnboundedReceiver<ClosedFlows>,
    state: NodeStateHandle,
    recorder: Recorder,
) {
    while let Some(closed) = closed.recv().await {
        for record in end_records(&closed, &state.current(), Timestamp::now()) {
            recorder.record_from_kernel(record);
        }
    }
}

/// The `end` records of flows that were closed from the kernel's side: the right that they
/// had is withdrawn, and `cause` says what a new one would meet.
fn end_records(closed: &ClosedFlows, state: &NodeState, now: Timestamp) -> Vec<FlowRecord> {
    let endpoint = state.endpoints.get(&closed.key.netns).filter(|e| e.key == closed.key);
    let record = |flow: &crate::endpoint::rejudge::Closed| {
        let mut own = Party::unknown(flow.local);
        if let Some(endpoint) = endpoint {
            own = Party::of_pod(&endpoint.pod, flow.local);
            own.identity = Some(endpoint.identity.clone());
            own.known_by = KnownBy::Kernel;
        }
        let other = known_by_address(flow.remote, state, None);
        let (direction, reporter, source, destination) = if flow.ingress {
            (Direction::Ingress, Reporter::Destination, other, own)
        } else {
            (Direction::Egress, Reporter::Source, own, other)
        };
        FlowRecord {
            time: now,
            event: FlowEvent::End { sent: 0, received: 0, duration: Duration::ZERO },
            uuid: Uuid::new_v4(),
            node: state.node.clone(),
            reporter,
            direction,
            protocol: proto::TCP,
            via: Via::Plaintext,
            verdict: Verdict::Dropped,
            reason: Reason::RightWithdrawn,
            policy: None,
            revision: closed.revision,
            extra: vec![("cause", crate::telemetry::reason::name(flow.reason).to_owned())],
            http: None,
            source,
            destination,
        }
    };
    closed.flows.iter().map(record).collect()
}
