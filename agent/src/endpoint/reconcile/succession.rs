//! One agent after another: who writes the kernel's maps, and who does not yet or no longer.
//!
//! Exactly one process writes at any moment. A new one waits ([`Role::Waiting`]): it reads the
//! cluster, finds the pods and gets their SVIDs, and writes nothing. The old one then stops
//! writing between two turns ([`Command::Yield`]), and only after that the new one begins
//! ([`Command::TakeOver`]). The old one goes on judging its open flows under every new state
//! ([`Role::Yielded`]); should the new one end before it serves, the old one reads the maps
//! again and goes on as before ([`Command::Resume`]).

use std::time::{Duration, Instant};

use signet_ebpf::abi::Mode;
use tokio::sync::{mpsc, oneshot};

use super::{
    super::{
        apply,
        identities::Identities,
        phase::Phase,
        plan::{Memory, Numbers, Remembered, wanted_mode},
        sockets,
        state::{EndpointKey, Standing},
        sweep,
    },
    Listeners, ReconcileError, Reconciler, identity_of, own_pods,
};
use crate::kernel::KernelError;

/// Whether the maps are this process's.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Role {
    /// Not yet.
    Waiting,
    /// They are.
    Acting,
    /// Not any more.
    Yielded,
}

/// How the task begins.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Start {
    /// Nobody else serves the node.
    AtOnce,
    /// Another agent does, until [`Command::TakeOver`].
    Waiting,
}

/// An endpoint that is handed over.
#[derive(Debug)]
pub struct Given {
    /// As it stands.
    pub standing: Standing,
    /// Its listeners, if it has any.
    pub listeners: Option<sockets::Listeners>,
}

/// What a hand-over asks of the task.
#[derive(Debug)]
pub enum Command {
    /// Could these endpoints be served by this process? The error says what is missing.
    Prepare(Vec<Standing>, oneshot::Sender<Result<(), String>>),
    /// The maps are this process's from now on. With endpoints: they are served and stay so.
    /// Without: whoever served them is gone. Answered once everything is applied.
    TakeOver(Option<Vec<Given>>, oneshot::Sender<Result<(), String>>),
    /// How the endpoints stand.
    List(oneshot::Sender<Vec<Standing>>),
    /// Write nothing any more, and give the endpoints away.
    Yield(oneshot::Sender<Result<Vec<Given>, String>>),
    /// The successor is gone: the maps are this process's again.
    Resume,
    /// The successor serves: there is no way back.
    Retire,
    /// The predecessor has ended: nobody else has flows here.
    Alone,
}

/// Tells the task.
#[derive(Clone, Debug)]
pub struct Control(mpsc::Sender<Command>);

impl Control {
    /// A control and its end for the task.
    pub fn new() -> (Self, mpsc::Receiver<Command>) {
        let (sender, receiver) = mpsc::channel(4);
        (Self(sender), receiver)
    }

    /// See [`Command::Prepare`].
    ///
    /// # Errors
    /// What is missing, for people.
    pub async fn prepare(&self, standing: Vec<Standing>) -> Result<(), String> {
        self.ask(|reply| Command::Prepare(standing, reply)).await.unwrap_or_else(Err)
    }

    /// See [`Command::TakeOver`].
    ///
    /// # Errors
    /// Why not everything is applied.
    pub async fn take_over(&self, given: Option<Vec<Given>>) -> Result<(), String> {
        self.ask(|reply| Command::TakeOver(given, reply)).await.unwrap_or_else(Err)
    }

    /// See [`Command::List`].
    ///
    /// # Errors
    /// Only when the task has ended.
    pub async fn list(&self) -> Result<Vec<Standing>, String> {
        self.ask(Command::List).await
    }

    /// See [`Command::Yield`].
    ///
    /// # Errors
    /// Where descriptors cannot be doubled; the task then goes on.
    pub async fn give(&self) -> Result<Vec<Given>, String> {
        self.ask(Command::Yield).await.unwrap_or_else(Err)
    }

    /// See [`Command::Resume`].
    pub async fn resume(&self) {
        // A task that has ended ends the process.
        let _ = self.0.send(Command::Resume).await;
    }

    /// See [`Command::Retire`].
    pub async fn retire(&self) {
        let _ = self.0.send(Command::Retire).await;
    }

    /// See [`Command::Alone`].
    pub async fn alone(&self) {
        let _ = self.0.send(Command::Alone).await;
    }

    async fn ask<T>(
        &self,
        command: impl FnOnce(oneshot::Sender<T>) -> Command,
    ) -> Result<T, String> {
        let gone = || "the reconciler has ended".to_owned();
        let (reply, answer) = oneshot::channel();
        self.0.send(command(reply)).await.map_err(|_| gone())?;
        answer.await.map_err(|_| gone())
    }
}

impl Reconciler {
    /// Does what a hand-over asks for. Whoever asked may have given up meanwhile.
    pub(super) async fn obey(&mut self, command: Command) -> Result<(), ReconcileError> {
        match command {
            Command::Prepare(standing, reply) => {
                let _ = reply.send(self.prepare(&standing).await);
            }
            Command::TakeOver(given, reply) => {
                if given.is_none() {
                    self.alone();
                }
                self.inherit(given)?;
                // Until the cluster is read, nothing changes: what is pinned stays.
                self.turn(true).await?;
                let _ = reply.send(self.is_applied());
            }
            Command::List(reply) => {
                let _ = reply.send(self.standing());
            }
            Command::Yield(reply) => {
                let given = self.give();
                if given.is_ok() {
                    tracing::info!("a successor takes over: nothing is written any more");
                    self.role = Role::Yielded;
                    // Falling silent cannot fail.
                    let _ = (self.deps.announce)(None, self.planned.unwrap_or_default());
                }
                let _ = reply.send(given);
            }
            Command::Resume => {
                self.resume()?;
                self.turn(true).await?;
            }
            Command::Alone => self.alone(),
            Command::Retire => {
                // The successor has them; here they are accepted from no longer.
                for listeners in self.listeners.values_mut() {
                    if let Listeners::Handed(kept) = listeners {
                        kept.outbound.clear();
                        (kept.inbound_v4, kept.inbound_v6) = (None, None);
                    }
                }
            }
        }
        self.deps.pulse.turned();
        Ok(())
    }

    /// What another version has left for the sake of its flows goes.
    fn alone(&mut self) {
        if let Err(error) = self.deps.programs.predecessor_is_gone() {
            self.fail("programs", &error);
        }
    }

    /// Makes the maps this process's: reads what is there, and goes on from it.
    pub(super) fn inherit(&mut self, given: Option<Vec<Given>>) -> Result<(), ReconcileError> {
        let failed = ReconcileError::Inherit;
        let maps = &mut self.deps.maps;
        self.applied = apply::read(maps).map_err(failed)?;
        let modes = self.applied.pods.iter().map(|(n, e)| (*n, Mode::from_u8(e.mode)));
        self.inherited = modes.collect();
        if given.is_none() {
            apply::close_all(maps, &mut self.applied).map_err(failed)?;
            sweep::forget_tunnels(maps).map_err(failed)?;
        } else if self.deps.programs.is_waiting() {
            for pins in self.deps.programs.other_pins() {
                maps.carry(pins);
            }
        }
        sweep::forget_revisions(maps).map_err(failed)?;
        let rows = maps.identities.rows().map_err(failed)?;
        self.numbers = Numbers::new(Identities::from_rows(&rows));
        self.said_enforcement = match &self.released.current().node {
            Some(node) => node.before,
            None => self.applied.config.enforcement,
        };
        self.memory = Memory::new();
        self.planned = None;
        let given = given.unwrap_or_default();
        self.remember_standing(given.iter().map(|given| &given.standing));
        self.adopted = given
            .into_iter()
            .filter_map(|given| Some((given.standing.key, given.listeners?)))
            .collect();
        self.role = Role::Acting;
        Ok(())
    }

    /// Whether a turn has brought everything into the kernel.
    fn is_applied(&self) -> Result<(), String> {
        if !self.deps.programs.is_waiting() && self.planned.is_some() {
            return Ok(());
        }
        let why = self.failures.first().map(|p| format!(": {}: {}", p.subject, p.message));
        let why = why.unwrap_or_default();
        Err(format!("the cluster's objects have not been applied to the kernel{why}"))
    }

    /// What a predecessor knew of its endpoints besides what is pinned.
    fn remember_standing<'a>(&mut self, standing: impl Iterator<Item = &'a Standing> + Clone) {
        let longest = standing.clone().flat_map(|s| s.leaving_for.max(s.strict_for)).max();
        // So that what began before this process began has a moment on its clock.
        let longest = longest.unwrap_or_default();
        self.started = self.started.checked_sub(longest).unwrap_or(self.started);
        let now = self.started.elapsed();
        let ago = |d: Duration| now.saturating_sub(d);
        for standing in standing {
            self.inherited.insert(standing.key.netns, standing.mode);
            let (leaving, strict) = (standing.leaving_for, standing.strict_for);
            if leaving.is_none() && strict.is_none() {
                continue;
            }
            let phase = match leaving {
                Some(since) => Phase::Leaving { since: ago(since) },
                None => Phase::Preparing { since: now, held: None },
            };
            let remembered =
                Remembered { phase, mode: standing.mode, strict_since: strict.map(ago) };
            self.memory.insert(standing.key.clone(), remembered);
        }
    }

    /// Looks whether everything that is served now could be served by this process: pods found,
    /// SVIDs there, the cluster read. Nothing is written.
    async fn prepare(&mut self, standing: &[Standing]) -> Result<(), String> {
        if self.role != Role::Waiting {
            return Err("this agent serves the node already".into());
        }
        let now = Instant::now();
        let world = self.deps.world.borrow().clone();
        let config = self.deps.config.borrow().clone();
        if !world.synced.pods {
            return Err("the cluster's pods and namespaces have not been read in full".into());
        }
        if !world.synced.policies {
            return Err("the cluster's policies have not been read in full".into());
        }
        let (params, _) = self.params(&world, &config);
        let pods = own_pods(&world, &params);
        self.discovery.poll(&pods, now).await;
        self.memory = Memory::new();
        self.inherited.clear();
        self.remember_standing(standing.iter());
        let observed = self.observed(&world, &params);
        // Numbers that this plan gives away are this process's own; the pinned ones are read
        // when the maps are.
        let plan = self.plan(&world, &params, &observed, now);
        self.deps.svids.want(plan.svids);
        for standing in standing.iter().filter(|s| s.served || s.leaving_for.is_some()) {
            // A pod that is gone is nobody's loss.
            let Some(pod) = pods.iter().find(|pod| pod.uid == standing.key.uid) else { continue };
            if standing.served && !wanted_mode(pod, &params).is_some_and(Mode::is_enforced) {
                continue;
            }
            let name = format!("{}/{}", pod.name.namespace, pod.name.name);
            let found = self.discovery.found().get(&pod.uid);
            if found.is_none_or(|found| found.netns.cookie != standing.key.netns) {
                let missing = self.discovery.missing().get(&pod.uid);
                let why = missing.map_or("its sandbox is another one", String::as_str);
                return Err(format!("pod {name} is not found yet: {why}"));
            }
            let Some(id) = identity_of(&world, pod) else { continue };
            if self.deps.svids.get(&id).is_none() {
                return Err(format!("no SVID has been issued yet for pod {name}"));
            }
        }
        Ok(())
    }

    /// The endpoints, for a successor.
    fn standing(&self) -> Vec<Standing> {
        let now = self.started.elapsed();
        let ago = |since: Duration| now.saturating_sub(since);
        self.memory
            .iter()
            .map(|(key, remembered)| Standing {
                key: key.clone(),
                mode: remembered.mode,
                served: remembered.phase.is_served(),
                leaving_for: match remembered.phase {
                    Phase::Leaving { since } => Some(ago(since)),
                    _ => None,
                },
                strict_for: remembered.strict_since.map(ago),
            })
            .collect()
    }

    fn give(&self) -> Result<Vec<Given>, String> {
        if self.role != Role::Acting || self.planned.is_none() {
            return Err("the agent does not serve the node itself yet".into());
        }
        let listeners = |key: &EndpointKey| match self.listeners.get(key) {
            Some(Listeners::Handed(kept)) => kept.try_clone().map(Some),
            _ => Ok(None),
        };
        self.standing()
            .into_iter()
            .map(|standing| {
                let listeners = listeners(&standing.key).map_err(|error| {
                    format!("the listeners of pod {} cannot be given: {error}", standing.key.uid)
                })?;
                Ok(Given { standing, listeners })
            })
            .collect()
    }

    /// The successor is gone: whatever it has written is read, and its programs are replaced.
    fn resume(&mut self) -> Result<(), ReconcileError> {
        if self.role != Role::Yielded {
            return Ok(());
        }
        tracing::warn!("the successor is gone before it served: this agent goes on");
        self.deps.programs.reload().map_err(ReconcileError::Inherit)?;
        let memory = std::mem::take(&mut self.memory);
        let started = self.started;
        self.inherit(Some(Vec::new()))?;
        (self.memory, self.started) = (memory, started);
        // The kernel steers to these again, whatever the successor has made of it.
        let mut failed: Vec<KernelError> = Vec::new();
        for (key, listeners) in &self.listeners {
            let Listeners::Handed(kept) = listeners else { continue };
            failed.extend(super::listening::steer(&mut self.deps.maps, key.netns, kept).err());
        }
        for error in failed {
            self.fail("kernel maps", &error);
        }
        self.announced.clear();
        self.announce_failed = Some("not announced since the successor is gone".into());
        Ok(())
    }

    /// A turn of one that has yielded: the state is published, so that open flows are judged
    /// again, and nothing is written.
    pub(super) async fn watch(&mut self, changed: bool) -> Result<(), ReconcileError> {
        let now = Instant::now();
        let world = self.deps.world.borrow_and_update().clone();
        let config = self.deps.config.borrow_and_update().clone();
        if !world.synced.pods {
            return Ok(());
        }
        let (params, released) = self.params(&world, &config);
        let pods = own_pods(&world, &params);
        let mut changed = changed | released | self.discovery.poll(&pods, now).await;
        changed |= self.drop_listeners_of_the_gone()?;
        changed |= self.due.is_some_and(|due| due <= now);
        changed |= self.planned != Some(world.revision);
        if !changed {
            return Ok(());
        }
        let observed = self.observed(&world, &params);
        let mut plan = self.plan(&world, &params, &observed, now);
        self.publish(&plan);
        self.deps.svids.want(plan.svids.clone());
        self.stop_listeners(&plan)?;
        self.memory = std::mem::take(&mut plan.memory);
        self.planned = Some(world.revision);
        self.due = plan.wake.map(|wake| self.started + wake);
        self.last_state = Some(plan.state);
        Ok(())
    }
}
