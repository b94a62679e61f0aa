//! What is done from time to time: the heartbeat, sweeping, the kubelet's cgroup, the report.

use std::time::{Duration, Instant};

use super::{
    super::{apply, probes::ProbeCgroups, sweep},
    KernelReport, Reconciler,
};
use crate::{
    cluster::model::Problem,
    config::values::Builtin,
    kernel::{clock, features::Features},
};

/// How often the heartbeat is written.
const HEARTBEAT: Duration = Duration::from_secs(1);
/// How often leftovers are swept and the kubelet's cgroup is looked after.
const SWEEP: Duration = Duration::from_secs(10);

impl Reconciler {
    pub(super) fn beat(&mut self, now: Instant) {
        if self.last_heartbeat.is_some_and(|last| now.duration_since(last) < HEARTBEAT) {
            return;
        }
        match apply::heartbeat(&mut self.deps.maps, &self.applied) {
            Ok(()) => self.last_heartbeat = Some(now),
            Err(error) => self.fail("heartbeat", &error),
        }
    }

    /// Sweeps, now and then; true when the probes' cgroups changed.
    pub(super) async fn sweep(&mut self, now: Instant) -> bool {
        if self.last_sweep.is_some_and(|last| now.duration_since(last) < SWEEP) {
            return false;
        }
        self.last_sweep = Some(now);
        let registered = self.applied.pods.keys().copied().collect();
        match sweep::sweep(&mut self.deps.maps, &registered, clock::monotonic()) {
            Ok(fill) => self.fill = fill,
            Err(error) => self.fail("sweep", &error),
        }
        self.sweep_cut().await;
        self.count_plaintext(now).await;
        self.deps.report.send_if_modified(|report| {
            let changed = report.maps != self.fill || report.plaintext != self.plaintext;
            report.maps.clone_from(&self.fill);
            report.plaintext.clone_from(&self.plaintext);
            changed
        });
        let hierarchy = self.deps.programs.hierarchy();
        if self.probes.is_current(hierarchy) {
            return false;
        }
        self.find_probes()
    }

    /// Attaches the programs again when the workloads root was made anew; true when it was.
    pub(super) fn follow_workloads(&mut self) -> bool {
        match self.deps.programs.follow_workloads() {
            Ok(false) => false,
            Ok(true) => {
                let programs = &self.deps.programs;
                tracing::warn!(root = %programs.workloads().path.display(), "the pods' root was made anew: the programs are attached to it");
                self.workloads_level = programs.workloads_level();
                true
            }
            Err(error) => {
                self.fail("programs", &error);
                false
            }
        }
    }

    pub(super) fn find_probes(&mut self) -> bool {
        let programs = &self.deps.programs;
        let configured = self.deps.config.borrow().probe_cgroups.clone();
        let found = ProbeCgroups::find(programs.hierarchy(), programs.workloads(), &configured);
        if found == self.probes {
            return false;
        }
        for problem in &found.problems {
            tracing::warn!(%problem, "probes");
        }
        self.probes = found;
        true
    }

    pub(super) fn report(&self) {
        let programs = &self.deps.programs;
        let problem = |subject: &str, message: &String| Problem {
            subject: subject.to_owned(),
            message: message.clone(),
        };
        let mut problems = self.failures.clone();
        if self.deps.config.borrow().builtins.contains(&Builtin::KubeletProbes) {
            problems.extend(self.probes.problems.iter().map(|p| problem("probes", p)));
        }
        problems.extend(programs.warnings().iter().map(|w| problem("programs", w)));
        problems.extend(self.released.problems());
        problems.extend(self.announce_failed.iter().map(|e| problem("board", e)));
        let report = KernelReport {
            programs: programs.attached(),
            workloads: programs.workloads().name.display().to_string(),
            pins: programs.pins().display().to_string(),
            probe_cgroups: self
                .probes
                .cgroups
                .iter()
                .map(|c| c.name.display().to_string())
                .collect(),
            missing_features: Features::missing(programs.features()),
            problems,
            maps: self.fill.clone(),
            plaintext: self.plaintext.clone(),
        };
        self.deps.report.send_if_modified(|old| {
            let changed = *old != report;
            *old = report;
            changed
        });
    }
}
