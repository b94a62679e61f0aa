//! Which open flows another mode of a namespace would close, asked beforehand.

use std::{os::fd::AsFd, sync::Arc};

use signet_ebpf::abi::{Mode, enforcement, pod};
use tokio::sync::oneshot;

use super::{
    super::rejudge::{self, Close, Closed, Verdicts},
    Reconciler,
    closing::diag_socket,
};
use crate::{cluster::model::ObjectName, kernel::KernelError};

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
        let found: Vec<_> = self
            .last_state
            .iter()
            .flat_map(|state| state.endpoints.values())
            .filter(|endpoint| endpoint.pod.name.namespace == survey.namespace)
            .filter(|endpoint| endpoint.pod.is_enrollable_in(survey.mode))
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
        let what = match survey.mode {
            Mode::Strict => Close::NotAsDialledNow,
            _ => Close::Denied,
        };
        let mut answer = Ok(Vec::new());
        for (name, netns) in found {
            let Some(entry) = self.applied.pods.get(&netns.cookie).copied() else { continue };
            let asked = signet_ebpf::abi::PodEntry {
                mode: survey.mode as u8,
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
        // Who asked may have gone away.
        let _ = survey.answer.send(answer);
    }
}
