//! Which open flows another mode of a namespace would close, asked beforehand.

use std::{
    collections::BTreeMap,
    os::fd::AsFd,
    sync::Arc,
    time::{Duration, Instant},
};

use signet_ebpf::abi::{Mode, enforcement, pod};
use tokio::sync::oneshot;

use super::{
    super::{
        rejudge::{self, Close, Closed, Verdicts},
        state::EndpointState,
    },
    Reconciler,
    closing::diag_socket,
};
use crate::{cluster::model::ObjectName, kernel::KernelError};

/// How often open flows in clear are counted: it costs a look into every enforced pod.
const COUNT: Duration = Duration::from_secs(15);

/// The question.
#[derive(Debug)]
pub struct Survey {
    /// Whose pods.
    pub namespace: Arc<str>,
    /// The mode that they would have.
    pub mode: Mode,
    /// Where the answer goes.
    pub answer: oneshot::Sender<Result<Vec<Surveyed>, String>>,
}

/// A pod of this node with direct flows that would be closed.
#[derive(Clone, Debug)]
pub struct Surveyed {
    /// It.
    pub pod: ObjectName,
    /// They; still open.
    pub flows: Vec<Closed>,
}

impl Reconciler {
    /// Answers; nothing is changed, in the kernel or here.
    pub(super) async fn survey(&mut self, survey: Survey) {
        let answer = self
            .surveyed(survey.mode, |endpoint| {
                endpoint.pod.name.namespace == survey.namespace
                    && endpoint.pod.is_enrollable_in(survey.mode)
            })
            .await;
        // Who asked may have gone away.
        let _ = survey.answer.send(answer);
    }

    /// Counts, now and then, the open flows of enforced pods that `strict` does not take anew, by
    /// namespace: those in clear that are left, or that would be closed.
    pub(super) async fn count_plaintext(&mut self, now: Instant) {
        if self.last_count.is_some_and(|last| now.duration_since(last) < COUNT) {
            return;
        }
        self.last_count = Some(now);
        match self.surveyed(Mode::Strict, |endpoint| endpoint.mode.is_enforced()).await {
            Ok(pods) => {
                let mut counts: BTreeMap<Arc<str>, u64> = BTreeMap::new();
                for pod in pods {
                    *counts.entry(pod.pod.namespace).or_default() += pod.flows.len() as u64;
                }
                self.plaintext = counts;
            }
            // Its pods come and go meanwhile; the last counts stay.
            Err(error) => tracing::debug!(error, "open flows in clear are not counted"),
        }
    }

    /// The direct flows of the chosen pods that would be closed in a mode.
    async fn surveyed(
        &mut self,
        mode: Mode,
        chosen: impl Fn(&EndpointState) -> bool,
    ) -> Result<Vec<Surveyed>, String> {
        let found: Vec<_> = self
            .last_state
            .iter()
            .flat_map(|state| state.endpoints.values())
            .filter(|endpoint| chosen(endpoint))
            .filter_map(|endpoint| {
                let found = self.discovery.found().get(&endpoint.key.uid)?;
                Some((endpoint.pod.name.clone(), found.netns.clone()))
            })
            .collect();
        let attested = self.attested();
        let agent = self.deps.programs.agent().id;
        // As the kernel would judge: over the tables in force, the pod's mode apart.
        let config = self.applied.config;
        self.applied.config.enforcement = enforcement::ENFORCE;
        let what = match mode {
            Mode::Strict => Close::NotAsDialledNow,
            _ => Close::Denied,
        };
        let mut answer = Ok(Vec::new());
        for (name, netns) in found {
            let Some(entry) = self.applied.pods.get(&netns.cookie).copied() else { continue };
            let asked = signet_ebpf::abi::PodEntry {
                mode: mode as u8,
                flags: entry.flags | pod::READY,
                ..entry
            };
            self.applied.pods.insert(netns.cookie, asked);
            let listed: Result<_, KernelError> = match diag_socket(&self.deps.opener, &netns).await
            {
                Ok(diag) => {
                    let verdicts = Verdicts::new(&self.applied, &attested);
                    rejudge::survey(diag.as_fd(), netns.cookie, agent, &verdicts, what)
                }
                Err(error) => Err(error),
            };
            self.applied.pods.insert(netns.cookie, entry);
            match (&mut answer, listed) {
                (Ok(pods), Ok(flows)) if !flows.is_empty() => {
                    pods.push(Surveyed { pod: name, flows });
                }
                (_, Ok(_)) => {}
                (answer, Err(error)) => {
                    *answer = Err(format!("pod {}/{}: {error}", name.namespace, name.name));
                }
            }
        }
        self.applied.config = config;
        answer
    }
}
