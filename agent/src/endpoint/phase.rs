//! An endpoint's way between modes: pure, over time as an argument.

use std::time::Duration;

use signet_ebpf::abi::Mode;

/// How long a pod that was registered in a looser mode may stay in it while its SVID and
/// listeners are got ready; then it is enforced as it is, that is, closed.
pub const HOLD: Duration = Duration::from_secs(5);

/// How long an endpoint that is un-enrolled serves at least: its peers learn of it by the
/// board.
pub const LEAVE_AT_LEAST: Duration = Duration::from_secs(2);

/// Where an endpoint is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Phase {
    /// Off or observe: no listeners, not announced.
    Plain {
        /// The mode in force.
        mode: Mode,
    },
    /// To be enforced, and not ready yet.
    Preparing {
        /// Since when.
        since: Duration,
        /// The looser mode in force meanwhile; `None`: enforced already, so closed.
        held: Option<Mode>,
    },
    /// Enforced and served.
    Serving,
    /// Un-enrolled, not announced any more, and still serving those who have not heard.
    Leaving {
        /// Since when.
        since: Duration,
    },
}

/// What decides the next phase.
#[derive(Clone, Copy, Debug)]
pub struct Conditions {
    /// What the pod's labels ask for, as far as it can be.
    pub wanted: Mode,
    /// SVID and listeners are there.
    pub ready: bool,
    /// Flows that the data plane has open for it.
    pub open_flows: usize,
    /// Monotonic time.
    pub now: Duration,
    /// How long it may go on serving once it is un-enrolled.
    pub unenrol_grace: Duration,
}

impl Phase {
    /// The phase after `before` (`None`: not registered yet).
    pub fn next(before: Option<Self>, c: &Conditions) -> Self {
        if c.wanted.is_enforced() {
            return Self::enforced(before, c);
        }
        let leaving_since = match before {
            Some(Self::Serving) => Some(c.now),
            Some(Self::Leaving { since }) => Some(since),
            _ => None,
        };
        match leaving_since {
            Some(since) if c.still_leaving(since) => Self::Leaving { since },
            _ => Self::Plain { mode: c.wanted },
        }
    }

    fn enforced(before: Option<Self>, c: &Conditions) -> Self {
        if c.ready {
            return Self::Serving;
        }
        let (since, held) = match before {
            Some(Self::Plain { mode }) => (c.now, Some(mode)),
            Some(Self::Preparing { since, held }) => (since, held),
            Some(Self::Serving | Self::Leaving { .. }) | None => (c.now, None),
        };
        let held = held.filter(|_| c.now.saturating_sub(since) < HOLD);
        Self::Preparing { since, held }
    }

    /// The mode that the kernel gets.
    pub fn mode(self, wanted: Mode) -> Mode {
        match self {
            Self::Plain { mode } => mode,
            Self::Preparing { held, .. } => held.unwrap_or(wanted),
            Self::Serving => wanted,
            // Both tunnels and plaintext come in; nothing is refused.
            Self::Leaving { .. } => Mode::Permissive,
        }
    }

    /// True when tunnels may be opened and accepted.
    pub fn is_ready(self) -> bool {
        matches!(self, Self::Serving | Self::Leaving { .. })
    }

    /// True when it is announced to peers.
    pub fn is_served(self) -> bool {
        self == Self::Serving
    }

    /// True when listeners and an SVID are needed.
    pub fn needs_listeners(self) -> bool {
        !matches!(self, Self::Plain { .. })
    }

    /// True when its policies are in force.
    pub fn is_judged(self) -> bool {
        !matches!(self, Self::Leaving { .. })
    }

    /// When the phase may change by time alone.
    pub fn due(self, unenrol_grace: Duration) -> Option<Duration> {
        match self {
            Self::Preparing { since, held: Some(_) } => Some(since + HOLD),
            Self::Leaving { since } => Some(since + unenrol_grace.max(LEAVE_AT_LEAST)),
            _ => None,
        }
    }
}

impl Conditions {
    fn still_leaving(&self, since: Duration) -> bool {
        let gone = self.now.saturating_sub(since);
        gone < LEAVE_AT_LEAST || (gone < self.unenrol_grace && self.open_flows > 0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn at(seconds: u64, wanted: Mode, ready: bool, open_flows: usize) -> Conditions {
        Conditions {
            wanted,
            ready,
            open_flows,
            now: Duration::from_secs(seconds),
            unenrol_grace: Duration::from_secs(60),
        }
    }

    #[test]
    fn a_new_enforced_pod_is_closed_until_it_is_ready() {
        let phase = Phase::next(None, &at(0, Mode::Strict, false, 0));
        assert_eq!(phase.mode(Mode::Strict), Mode::Strict);
        assert!(!phase.is_ready() && phase.needs_listeners() && !phase.is_served());
        let phase = Phase::next(Some(phase), &at(1, Mode::Strict, true, 0));
        assert!(phase.is_ready() && phase.is_served());
    }

    #[test]
    fn a_pod_that_turns_strict_keeps_its_mode_while_it_is_prepared_but_not_for_long() {
        let plain = Phase::next(None, &at(0, Mode::Observe, false, 0));
        let phase = Phase::next(Some(plain), &at(10, Mode::Strict, false, 0));
        assert_eq!(phase.mode(Mode::Strict), Mode::Observe);
        assert_eq!(phase.due(Duration::ZERO), Some(Duration::from_secs(10) + HOLD));
        let late = Phase::next(Some(phase), &at(16, Mode::Strict, false, 0));
        assert_eq!(late.mode(Mode::Strict), Mode::Strict, "closed: fail closed");
        assert!(!late.is_ready());
        // The hold does not start over.
        let later = Phase::next(Some(late), &at(17, Mode::Strict, false, 0));
        assert_eq!(later.mode(Mode::Strict), Mode::Strict);
    }

    #[test]
    fn an_unenrolled_pod_serves_until_its_flows_end_or_the_grace_is_over() {
        let serving = Some(Phase::Serving);
        let leaving = Phase::next(serving, &at(100, Mode::Off, true, 3));
        assert_eq!(leaving.mode(Mode::Off), Mode::Permissive);
        assert!(leaving.is_ready() && !leaving.is_served() && !leaving.is_judged());
        let on = Phase::next(Some(leaving), &at(130, Mode::Off, true, 3));
        assert_eq!(on, leaving);
        let flowless = Phase::next(Some(leaving), &at(130, Mode::Off, true, 0));
        assert_eq!(flowless, Phase::Plain { mode: Mode::Off });
        let over = Phase::next(Some(leaving), &at(161, Mode::Off, true, 3));
        assert_eq!(over, Phase::Plain { mode: Mode::Off });
        // Peers may not have heard yet.
        let early = Phase::next(Some(leaving), &at(101, Mode::Off, true, 0));
        assert_eq!(early, leaving);
        // And back.
        assert_eq!(Phase::next(Some(leaving), &at(101, Mode::Strict, true, 0)), Phase::Serving);
    }

    proptest! {
        /// An enforced pod that was never registered looser is never open.
        #[test]
        fn nothing_opens_by_itself(steps in proptest::collection::vec((any::<bool>(), 0u64..10), 1..20)) {
            let mut phase = None;
            let mut now = 0;
            for (ready, seconds) in steps {
                now += seconds;
                let next = Phase::next(phase, &at(now, Mode::Strict, ready, 0));
                prop_assert_eq!(next.mode(Mode::Strict), Mode::Strict);
                prop_assert_eq!(next.is_served(), ready);
                phase = Some(next);
            }
        }
    }
}
