//! A flow whose requests are judged, from its acceptance to its last record.

use std::{
    net::SocketAddr,
    sync::{Arc, OnceLock},
};

use signet_ebpf::abi::Reason;
use tokio::net::TcpStream;

use super::{Carrier, Ended, Judged, carry};
use crate::{
    proxy::{
        counters::Counters,
        judge::{Facts, Judgement},
        open_flows::Registration,
        plane::Core,
        records::FlowRecords,
        served::Served,
    },
    tunnel::copy::Counts,
};

/// A flow that is accepted: policy admits it, or refuses it whatever it requests, which each
/// request is to be told.
pub struct Admitted<'a> {
    /// The core that carries it.
    pub core: &'a Arc<Core>,
    /// The endpoint.
    pub served: &'a Arc<Served>,
    /// Who asks, as the connection proves it.
    pub facts: Facts,
    /// The client's address.
    pub client: SocketAddr,
    /// What policy says of the whole of it.
    pub judgement: Judgement,
    /// Its records; none is written yet.
    pub records: FlowRecords,
    /// Its place among the open flows.
    pub registration: &'a Registration,
    /// Why its connection is cut, when it is.
    pub cut_for: Option<&'a OnceLock<Reason>>,
}

impl Admitted<'_> {
    /// Serves it to its end, without an application where policy refuses all of it; gives back
    /// what carried it, when that may serve another flow.
    pub async fn serve(self, carrier: Carrier, app: Option<TcpStream>) -> Option<Carrier> {
        let Self { core, served, facts, client, judgement, mut records, registration, cut_for } =
            self;
        let counts = Arc::<Counts>::default();
        let judged = Arc::new(Judged {
            core: core.clone(),
            served: served.clone(),
            facts,
            client,
            records: records.of_requests(),
        });
        let passes = app.is_some();
        let begins = || {
            if passes {
                records.passed(&judgement);
                Counters::add(&core.plane.counters.forwarded);
            } else {
                Counters::add(&core.plane.counters.refused);
            }
        };
        let stop = registration.closed();
        let tracker = &core.tracker;
        match carry(judged, carrier, app, counts.clone(), tracker, begins, stop).await {
            // Each of its requests has its record.
            Ended::Carried(_, carrier) if !passes => carrier,
            Ended::Carried(result, carrier) => {
                let cut_for = cut_for.and_then(|reason| reason.get().copied());
                records.closed(&counts, result, cut_for, registration.close_reason());
                carrier
            }
            Ended::Abandoned if !passes => {
                Counters::add(&core.plane.counters.refused);
                records.refused(judgement.reason, judgement.policy, judgement.revision);
                None
            }
            Ended::Abandoned => {
                Counters::add(&core.plane.counters.abandoned);
                None
            }
            Ended::NotHttp(refused) => {
                Counters::add(&core.plane.counters.refused);
                tracing::debug!(%client, reason = ?refused.reason, "a flow that is no HTTP is refused");
                records.note("protocol", "not HTTP".to_owned());
                records.refused(refused.reason, refused.policy, refused.revision);
                None
            }
        }
    }
}
