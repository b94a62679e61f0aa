//! What the task waits for.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use tokio::sync::{mpsc, watch};
use tokio_util::sync::CancellationToken;

use super::{super::watcher::DirectoryWatcher, Command, ReconcileError, Reconciler, Survey};
use crate::{cluster::model::World, config::AgentConfig};

/// How often the task turns at least: within the time that the heartbeat allows.
const TURN: Duration = Duration::from_millis(500);
/// How often it turns while a pod is looked for.
const TURN_WAITING: Duration = Duration::from_millis(20);

/// What woke the task.
#[derive(Debug)]
pub(super) enum Woken {
    /// Somebody asks.
    Asked(Survey),
    /// A hand-over goes on.
    Told(Command),
    /// The world, the configuration or an SVID changed.
    Changed,
    /// Time passed, or a directory was made.
    Time,
    /// The end.
    Stop,
}

/// What the task waits for.
pub(super) struct Wake {
    world: watch::Receiver<Arc<World>>,
    config: watch::Receiver<Arc<AgentConfig>>,
    svids: watch::Receiver<u64>,
    directories: DirectoryWatcher,
    surveys: mpsc::Receiver<Survey>,
}

impl Wake {
    pub(super) fn new(task: &Reconciler, surveys: mpsc::Receiver<Survey>) -> Self {
        let mut world = task.deps.world.clone();
        world.mark_changed();
        Self {
            world,
            config: task.deps.config.clone(),
            svids: task.deps.svids.subscribe(),
            directories: DirectoryWatcher::new(&task.deps.programs.workloads().path),
            surveys,
        }
    }

    pub(super) async fn wait(
        &mut self,
        task: &mut Reconciler,
        stop: &CancellationToken,
    ) -> Result<Woken, ReconcileError> {
        let turn = if task.is_impatient() { TURN_WAITING } else { TURN };
        let next = Instant::now() + turn;
        let next = task.due.map_or(next, |due| due.min(next));
        tokio::select! {
            biased;
            () = stop.cancelled() => Ok(Woken::Stop),
            Some(command) = task.deps.commands.recv() => Ok(Woken::Told(command)),
            changed = self.world.changed() => {
                changed.map_err(|_| ReconcileError::WorldGone)?;
                Ok(Woken::Changed)
            }
            Ok(()) = self.config.changed() => Ok(Woken::Changed),
            Ok(()) = self.svids.changed() => Ok(Woken::Changed),
            () = self.directories.made() => Ok(Woken::Time),
            Some(survey) = self.surveys.recv() => Ok(Woken::Asked(survey)),
            () = tokio::time::sleep_until(next.into()) => Ok(Woken::Time),
        }
    }
}
