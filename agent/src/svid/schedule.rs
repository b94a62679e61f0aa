//! When to renew and when to try again. Pure.

use std::time::Duration;

use jiff::{SignedDuration, Timestamp};

/// When an SVID that was obtained at `obtained` is renewed: at half of the life it then had
/// left, moved by up to a tenth of that life either way. `jitter` is in −1 to 1.
pub(super) fn renew_at(obtained: Timestamp, not_after: Timestamp, jitter: f64) -> Timestamp {
    let left = not_after.duration_since(obtained).max(SignedDuration::ZERO);
    let share = 0.5 + 0.1 * jitter.clamp(-1.0, 1.0);
    obtained.saturating_add(left.mul_f64(share)).unwrap_or(obtained)
}

/// How long to wait after `failures` failures in a row (1 or more): doubling from `first`, at
/// most `longest`, less up to a half of it. `jitter` is in 0 to 1.
pub(super) fn retry_after(
    failures: u32,
    first: Duration,
    longest: Duration,
    jitter: f64,
) -> Duration {
    let doubled = first.saturating_mul(2u32.saturating_pow(failures.saturating_sub(1)));
    doubled.min(longest).mul_f64(1.0 - 0.5 * jitter.clamp(0.0, 1.0))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn half_of_the_life_that_is_left() {
        let t = Timestamp::from_second(1_000_000).unwrap();
        let end = t + SignedDuration::from_secs(3600);
        assert_eq!(renew_at(t, end, 0.0), t + SignedDuration::from_secs(1800));
        assert_eq!(renew_at(t, end, -1.0), t + SignedDuration::from_secs(1440));
        assert_eq!(renew_at(t, end, 1.0), t + SignedDuration::from_secs(2160));
        assert_eq!(renew_at(end, t, 0.5), end, "what has run out is due at once");
    }

    #[test]
    fn retries_double_up_to_a_cap() {
        let wait = |n| retry_after(n, Duration::from_millis(250), Duration::from_secs(30), 0.0);
        assert_eq!(wait(1), Duration::from_millis(250));
        assert_eq!(wait(2), Duration::from_millis(500));
        assert_eq!(wait(7), Duration::from_secs(16));
        assert_eq!(wait(8), Duration::from_secs(30));
        assert_eq!(wait(u32::MAX), Duration::from_secs(30));
    }

    proptest! {
        #[test]
        fn renewal_leaves_time_to_try_again(life in 1i64..10_000_000, jitter in -2.0f64..2.0) {
            let t = Timestamp::from_second(1_700_000_000).unwrap();
            let end = t + SignedDuration::from_secs(life);
            let at = renew_at(t, end, jitter);
            prop_assert!(t < at && at < end);
            prop_assert!(end.duration_since(at).as_secs_f64() >= 0.39 * life as f64);
        }

        #[test]
        fn retries_stay_within_bounds(n in 1u32.., jitter in 0.0f64..1.0) {
            let (first, longest) = (Duration::from_millis(100), Duration::from_secs(60));
            let wait = retry_after(n, first, longest, jitter);
            prop_assert!(wait >= first / 2 && wait <= longest);
        }
    }
}
